"""Runs the stand-in host of Slicer, one process a call."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MISSING = [name for name in ("slicer_core", "PySide6") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def host():
    """Call: host(*arguments, code=None, env=None, timeout=120) -> CompletedProcess, always with --testing."""
    if MISSING:
        pytest.skip(f"THE PANEL IS NOT TESTED: no {' and no '.join(MISSING)} here (pip install -e '.[test]')")

    def run(*arguments, code=None, env=None, timeout=120):
        command = [sys.executable, str(ROOT / "Testing" / "host"), "--testing", *map(str, arguments)]
        if code is not None:
            command += ["--python-code", code]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"No end after {timeout} s:\n{output}") from None
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
