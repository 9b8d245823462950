"""Evaluation and scoring: the same numbers by both ways, means over patients, what is refused."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from ClinicalFMambaLib.cases import find_cases, load_case
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.evaluation.baselines import BASELINES
from ClinicalFMambaLib.evaluation.evaluate import (
    MODEL,
    STANDARD,
    Row,
    evaluate,
    find_fused,
    load_fused,
    markdown_table,
    measure,
    score,
    summarise,
    write_tables,
)
from ClinicalFMambaLib.evaluation.metrics import METRICS, evaluate_all
from ClinicalFMambaLib.inference.engine import FusionEngine
from ClinicalFMambaLib.volumes import Volume, read_volume, write_volume

FEW = ("PSNR", "SSIM", "SCD", "QABF")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def test_the_standard_metrics_are_those_of_the_field():
    field = {*("PSNR", "SSIM", "MS-SSIM", "FSIM", "FMI", "EN", "MI", "SD", "SF", "AG", "SCD", "VIF", "QABF", "NABF")}
    assert set(STANDARD) == {*field, "SHARE"}
    for name in field:
        assert "References:" in METRICS[name].function.__doc__, name


def test_model_and_baselines_are_measured_on_the_same_images(pairs, weights):
    cases, kept = find_cases(pairs), []
    rows = evaluate(FusionEngine("cpu"), str(weights), cases, (), ("average", "source_a"), FEW, kept.append, jobs=1)
    assert len(rows) == 6 * 3 and {row.method for row in rows} == {MODEL, "average", "source_a"}
    a, b = load_case(cases[0])
    np.testing.assert_array_equal(kept[0].a, a)
    np.testing.assert_array_equal(kept[0].fused["average"], BASELINES["average"](a, b))
    assert rows[0].values == evaluate_all(kept[0].fused[MODEL], a, b, FEW)


@pytest.mark.parametrize("data", ["pairs", "colour_pairs"])
def test_scoring_the_written_images_gives_the_same_numbers(data, request, weights, tmp_path):
    """Of colour, too: the luma of what a user sees is what was fused."""

    def keep(measured):
        write_volume(measured.result.volume, tmp_path / f"{measured.case.name}.png")

    cases = find_cases(request.getfixturevalue(data))
    rows = evaluate(FusionEngine("cpu"), str(weights), cases, (), (), FEW, keep, jobs=1)
    again = score(tmp_path, cases, (), FEW, jobs=1)
    assert [row.case for row in again] == [row.case for row in rows]
    for mine, theirs in zip(rows, again):
        for metric in FEW:
            assert theirs.values[metric] == pytest.approx(mine.values[metric], abs=0.02), metric


def test_processes_give_the_same_numbers(pairs, tmp_path):
    cases = find_cases(pairs)[:2]
    for case in cases:
        save(tmp_path / f"{case.name}.png", np.uint8(255 * load_case(case).mean(0)))
    assert score(tmp_path, cases, (), FEW, jobs=2) == score(tmp_path, cases, (), FEW, jobs=1)


def test_peers_are_measured_beside_the_model(pairs, weights, tmp_path):
    cases = find_cases(pairs)
    for case in cases:
        save(tmp_path / case.name / "fused.png", np.rint(255 * BASELINES["maximum"](*load_case(case))).astype(np.uint8))
    peers = {"somebody": tmp_path}
    rows = evaluate(FusionEngine("cpu"), str(weights), cases, (), ("maximum",), ("SSIM",), peers=peers, jobs=1)
    summary = summarise(rows)
    assert summary["somebody"]["SSIM"]["mean"] == pytest.approx(summary["maximum"]["SSIM"]["mean"], abs=1e-4)


def test_colour_is_measured_by_its_luma(colour_pairs, weights):
    kept = []
    cases = find_cases(colour_pairs)
    rows = evaluate(FusionEngine("cpu"), str(weights), cases, (), ("source_b",), ("SSIM",), kept.append, jobs=1)
    assert kept[0].b.shape == (64, 72) and kept[0].result.volume.is_colour
    assert len(rows) == 6


def test_volumes_are_measured_without_their_margin(volumes, weights):
    kept = []
    cases = find_cases(volumes)
    rows = evaluate(FusionEngine("cpu"), str(weights), cases, (), ("average",), FEW, kept.append, jobs=1)
    assert kept[0].a.shape == (20 - 4 + 4, 48, 44) and kept[0].fused[MODEL].shape == kept[0].a.shape
    assert all(math.isfinite(v) for row in rows for v in row.values.values())


# ------------------------------------------------------------------------------------------ fused files

SCALES = {
    "8 bit": (np.array([[0, 255]], np.uint8), None, [0, 1]),
    "floats": (np.array([[0.25, 1.0]], np.float32), None, [0.25, 1]),
    "thousandths": (np.array([[0, 800]], np.int16), None, [0, 0.8]),
    "given": (np.array([[-10, 90]], np.int16), (-10, 90), [0, 1]),
    "clipped": (np.array([[-50, 40]], np.int16), (-10, 90), [0, 0.5]),
}


@pytest.mark.parametrize(("array", "limits", "expected"), SCALES.values(), ids=SCALES)
def test_scale_of_fused_files(tmp_path, array, limits, expected):
    save(tmp_path / "x.nrrd", array[None])
    source = Volume(np.zeros((1, 1, 2)))
    np.testing.assert_allclose(load_fused(tmp_path / "x.nrrd", source, limits)[0], expected, atol=1e-6)


@pytest.mark.parametrize("values", [(-5, 4000), (0, 255), (0, 65535)])
def test_an_unknown_scale_is_asked_for(tmp_path, values):
    save(tmp_path / "x.nrrd", np.array([[values]], np.int32))
    with pytest.raises(InputError, match="--range LO,HI"):
        load_fused(tmp_path / "x.nrrd", Volume(np.zeros((1, 1, 2))))


def test_a_fused_volume_elsewhere_is_compared_with_a_warning(tmp_path, caplog):
    array = np.random.default_rng(0).random((12, 16, 16), np.float32)
    write_volume(Volume(array, spacing=(1.0, 1.0, 3.0)), tmp_path / "x.nrrd")
    np.testing.assert_allclose(load_fused(tmp_path / "x.nrrd", Volume(array, spacing=(1.0, 1.0, 3.0))), array)
    assert not caplog.records
    load_fused(tmp_path / "x.nrrd", Volume(array))
    assert "lies elsewhere than its sources" in caplog.text


def test_volumes_are_scored_on_the_whole_grid(volumes, tmp_path):
    cases = find_cases(volumes)
    for case in cases:
        source = read_volume(case.paths["t2"])
        fused = np.rint(1000 * load_case(case).max(0)).astype(np.int16)
        write_volume(replace(source, array=fused), tmp_path / f"{case.name}.nii.gz")
    rows = score(tmp_path, cases, (), FEW, jobs=1)
    assert [row.case for row in rows] == ["p1", "p2"]
    for case, row in zip(cases, rows):
        a, b = load_case(case)
        assert row.values == pytest.approx(measure(np.maximum(a, b), a, b, FEW), abs=0.02)


def test_fused_images_that_do_not_fit_are_refused(pairs, tmp_path):
    cases = find_cases(pairs)
    with pytest.raises(InputError, match="no such folder"):
        find_fused(tmp_path / "no", cases)
    with pytest.raises(InputError, match="holds no image"):
        find_fused(tmp_path, cases)
    save(tmp_path / "1001.png", np.zeros((64, 70), np.uint8))
    with pytest.raises(InputError, match=r"1001.png is 70x64, its sources are 72x64"):
        score(tmp_path, cases, (), FEW)
    with pytest.raises(InputError, match="no fused image for 5 of 6 cases"):
        find_fused(tmp_path, cases, every=True)
    save(tmp_path / "1001.jpg", np.zeros((64, 72), np.uint8))
    with pytest.raises(InputError, match=r"two fused images for 1001: 1001.jpg and 1001.png"):
        find_fused(tmp_path, cases)
    (tmp_path / "1001.jpg").unlink()
    save(tmp_path / "stranger.png", np.zeros((64, 72), np.uint8))
    with pytest.raises(InputError, match=r"stranger.png; name them as the cases"):
        find_fused(tmp_path, cases)


@pytest.mark.parametrize(
    ("suffix", "colour"),
    [("png", False), ("png", True), ("jpg", False), ("jpg", True), ("tif", False), ("tif", True), ("nii.gz", False)],
)
def test_fused_images_of_any_format_and_in_colour(pairs, tmp_path, suffix, colour):
    (case, *_) = cases = find_cases(pairs)
    grey = np.rint(255 * load_case(case).max(0)).astype(np.uint8)
    array = np.stack([grey] * 3, -1) if colour else grey
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=colour), str(tmp_path / f"{case.name}.{suffix}"))
    (row,) = score(tmp_path, cases, (), FEW, jobs=1)
    expected = evaluate_all(BASELINES["maximum"](*load_case(case)), *load_case(case), FEW)
    assert row.values == pytest.approx(expected, abs=0.05 if suffix == "jpg" else 0.002)


def test_some_fused_images_are_enough(pairs, tmp_path, caplog):
    save(tmp_path / "2001.png", np.uint8(np.random.default_rng(0).integers(0, 255, (64, 72))))
    (row,) = score(tmp_path, find_cases(pairs), (), FEW)
    assert (row.patient, row.case) == ("2", "2001")
    assert "5 of 6 cases have no fused image" in caplog.text


# ------------------------------------------------------------------------------------------------ tables

ROWS = [
    Row(method, patient, case, {"SSIM": value, "NABF": 1 - value})
    for method, base in ((MODEL, 0.6), ("average", 0.5), ("source_a", 0.9))
    for patient, case, value in (("1", "a", base), ("1", "b", base + 0.1), ("2", "c", base), ("3", "d", base))
]


def test_patients_count_equally():
    value = summarise(ROWS)[MODEL]["SSIM"]
    assert value["mean"] == pytest.approx((0.65 + 0.6 + 0.6) / 3) and value["patients"] == 3
    assert value["low"] == pytest.approx(0.6) and value["high"] == pytest.approx(0.65)


def test_two_patients_have_no_interval():
    value = summarise([row for row in ROWS if row.patient != "3"])[MODEL]["SSIM"]
    assert math.isnan(value["low"])


def test_markdown_marks_the_best_fusion_in_its_direction():
    text = markdown_table(summarise(ROWS), ["SSIM", "NABF"]).splitlines()
    assert text[2].count("**") == 4 and "**" not in text[3] and "**" not in text[4]


def test_what_is_not_defined_is_a_dash():
    rows = [replace(row, values={**row.values, "VIF": math.nan}) for row in ROWS]
    text = markdown_table(summarise(rows), ["SSIM", "VIF"])
    assert text.count("| – |") == 3 and "nan" not in text


def test_tables_on_disk(tmp_path):
    write_tables(ROWS, tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ROWS) and lines[1] == {
        "method": MODEL,
        "patient": "1",
        "case": "b",
        "SSIM": "0.7",
        "NABF": "0.3",
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["average"]["SSIM"]["mean"] == pytest.approx(0.5166667)


def test_nothing_to_evaluate(weights):
    with pytest.raises(InputError, match="no case"):
        evaluate(FusionEngine("cpu"), str(weights), [])
