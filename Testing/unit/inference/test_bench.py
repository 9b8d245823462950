"""The bench: both paths in processes of their own, on sizes that take no time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ClinicalFMambaLib.cli import main
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.inference import bench


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


def test_failing_child_is_one_line():
    with pytest.raises(InputError, match="fast path"):
        bench._run_child({"case": "2d-256", "path": "fast", "device": "gpu", "precision": "float32"})
