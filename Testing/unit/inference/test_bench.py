"""The bench: both paths in processes of their own, on sizes that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ClinicalFMambaLib.cli import main
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.inference import bench
from ClinicalFMambaLib.phantom import make_phantom
from ClinicalFMambaLib.volumes import write_volume


def test_unknown_case_is_refused_before_anything_runs(capsys):
    assert main(["bench", "--case", "4d"]) == 2
    error = capsys.readouterr().err
    assert "4d" in error and "3d-clinical" in error and len(error.strip().splitlines()) == 1
    with pytest.raises(InputError):
        bench.run_bench(["2d-256", "4d"], report=lambda row: pytest.fail("ran"))


def test_scan_and_network_rows_are_measured(tmp_path, monkeypatch, capsys):
    # the children read the cases from the module, so the test takes a case that exists and is quick
    monkeypatch.setattr(bench, "SCAN_LENGTHS", (1024,))
    file = tmp_path / "bench.json"
    assert main(["bench", "--case", "scan", "--case", "2d-256", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["case"] for row in rows] == ["scan-1k", "2d-256"]
    for row in rows:
        assert row["fast_s"] > 0 and row["plain_s"] > 0  # which is faster, a busy machine cannot tell
        assert row["ratio"] == pytest.approx(row["plain_s"] / row["fast_s"])
        assert row["cpu_ratio"] == pytest.approx(row["plain_cpu_s"] / row["fast_cpu_s"])
        assert row["floors"] == {} or row["device"] != "cpu"
        assert row["max_abs_diff"] < 1e-3
        assert row["peak_mib"] > 0 and row["plain_peak_mib"] > 0
    assert sum(rows[1]["shares"].values()) == pytest.approx(1, abs=0.01)
    assert rows[1]["voxels"] == 256 * 256
    out = capsys.readouterr().out
    assert "2d-256" in out and "scan-1k" in out and "ratio" in out


def test_time_a_voxel_and_floors_are_said():
    row = bench.BenchRow(
        "3d-128", 2.0, 30.0, 15.0, 9.0, 9.0, 1e-6, 100, 50.0, {}, "w", "cpu", "float32", "numba", 2, 4.0, 50.0, 12.5
    )
    more = replace(row, case="3d-brats", voxels=200, fast_s=4.4, fast_cpu_s=8.0, floors={"memory": 0.044})
    lines = bench.table([row, more]).splitlines()
    assert "3d-brats: time a voxel 1.10 of that of 3d-128 (1.00 in processor seconds)" in lines
    assert any("floors: memory 44.0 ms (1% of it)" in line for line in lines)


def test_all_cases(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "_measure", lambda case, *rest: asked.append(case))
    bench.run_bench(["all"])
    assert asked == [*bench.CASES, *(f"scan-{2**k}k" for k in range(7))]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is Linux's")
def test_a_whole_fuse_process_keeps_to_its_bound(tmp_path):
    """What ``fuse --max-memory`` takes from reading to writing, beyond what torch takes when it is imported.

    160³, so that the volume weighs more than the imports and the scan's compilation, whose share varies by 100 MiB.
    """
    for name, volume in make_phantom(160).items():
        if name in ("T1", "T2"):
            write_volume(volume, tmp_path / f"{name.lower()}.nrrd")
    code = (
        "import sys, torch\n"
        "from ClinicalFMambaLib.inference.bench import _resident\n"
        "before = _resident('VmRSS')\n"
        "from ClinicalFMambaLib.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print('beyond torch', _resident('VmHWM') - before)\n"
        "sys.exit(status)\n"
    )
    arguments = [str(tmp_path / name) for name in ("t1.nrrd", "t2.nrrd")]
    options = ["--model", "mri-mri-3d", "--max-memory", "0.75", "-o", str(tmp_path / "f.nrrd")]
    done = subprocess.run(
        [sys.executable, "-c", code, "fuse", *arguments, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.split()[-1]) < 0.75 * 2**30


def test_failing_child_is_one_line():
    with pytest.raises(InputError, match="fast path"):
        bench._run_child({"case": "2d-256", "path": "fast", "device": "gpu", "precision": "float32"})
