"""The self-tests of the Slicer module in the stand-in host, each file as Slicer runs it: in its own application."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("slicer", reason="the stand-in host needs slicer-core and PySide6: pip install '.[test]'")

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in (ROOT / "Testing" / "Python").glob("*Test.py"))
MINUTES = 10  # a hang shall fail the test, not the run


@pytest.mark.parametrize("file", FILES)
def test_selftest(file):
    # As in a Slicer that is new, but for the test that fuses with the real engine.
    without = file != "ClinicalFMambaFusionTest.py"
    command = [sys.executable, "Testing/host", "--testing", "--additional-module-paths", "ClinicalFMamba"]
    done = subprocess.run(
        [*command, "--python-script", f"Testing/Python/{file}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLICERHOST_HIDE": "torch,safetensors" if without else ""},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    print(done.stdout[-20000:], done.stderr[-20000:])
    assert done.returncode == 0
    passed = [line for line in done.stdout.splitlines() if line.startswith("OK")]
    assert passed and "skipped=3" not in passed[-1]


CLOSED = """
import sys
sys.path.insert(0, "Testing/Python")
from clinicalfmamba_selftest import addVolume, makeLogic, slicer, spin
slicer.util.selectModule("ClinicalFMamba")
panel = slicer.util.getModuleWidget("ClinicalFMamba")
panel.setLogic(makeLogic("--mode", "stuck"))
panel._parameterNode.volumeA, panel._parameterNode.volumeB = addVolume("T1"), addVolume("CT", seed=1)
panel.ui.fuseButton.click()
spin(lambda: panel.logic.stage == "Fusing")
print("WORKER", panel.logic._client.ready["pid"], panel.logic._scratch, flush=True)
"""


def test_application_is_closed_while_it_fuses():
    """No process and no patient's volume is left."""
    command = [sys.executable, "Testing/host", "--testing", "--additional-module-paths", "ClinicalFMamba"]
    done = subprocess.run(
        [*command, "--python-code", CLOSED], cwd=ROOT, capture_output=True, text=True, timeout=60 * MINUTES
    )
    print(done.stdout[-20000:], done.stderr[-20000:])
    assert done.returncode == 0
    _word, pid, scratch = next(line for line in done.stdout.splitlines() if line.startswith("WORKER")).split()
    assert not Path(scratch).exists()
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"the worker {pid} is still there")
