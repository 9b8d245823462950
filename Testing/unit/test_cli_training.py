"""The commands train, evaluate, score and ablate: exit status, one line for bad input, what they write."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ClinicalFMambaLib import NOTICE, pretrained
from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba

TINY = ["model.channels=[4,4,8]", "model.mamba_layers=1", "data.crop=24", "training.warmup=1"]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(path))


@pytest.fixture
def data(tmp_path, write_pairs):
    """Three patients, MRI with CT."""
    return write_pairs(tmp_path / "data")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = ClinicalFMamba(ModelConfig(channels=(4, 4, 8), mamba_layers=1))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return pretrained.save_weights(model, path, {"modalities": "MR,CT"})


def drop(data, path):
    (data / path).unlink()


def spoil(data, path):
    (data / path).write_bytes(b"\x89PNG no more")


def shrink(data, path):
    save(data / path, np.random.default_rng(1).integers(0, 255, (40, 48), dtype=np.uint8))


def keep_one_patient(data):
    for path in [*data.rglob("2001.png"), *data.rglob("3001.png")]:
        path.unlink()


BAD_DATA = {
    "no partner": (lambda d: drop(d, "MRI/2001.png"), "2001.png has no partner"),
    # one of the three is in the validation
    **{
        f"corrupt image {name}": (lambda d, n=name: spoil(d, f"CT/{n}.png"), f"{name}.png: cannot be read as png")
        for name in ("1001", "2001", "3001")
    },
    "different sizes": (lambda d: shrink(d, "CT/1001.png"), "do not fit each other"),
    "black image": (lambda d: save(d / "CT/1001.png", np.zeros((48, 48), np.uint8)), "constant"),
    "empty folders": (lambda d: [p.unlink() for p in d.rglob("*.png")], "hold no image"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_DATA.values(), ids=BAD_DATA)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_bad_data_is_one_line_before_anything_is_written(run, data, weights, tmp_path, command, spoil, words):
    spoil(data)
    start = ["train", "mri-ct-2d", *TINY] if command == "train" else ["evaluate", "--model", weights]
    status, stdout, stderr = run(*start, "--data", data, "-o", tmp_path / "out")
    assert (status, stdout) == (2, "")
    errors = [line for line in stderr.splitlines() if not line.startswith("info: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]
    assert not list((tmp_path / "out").rglob("*.*"))


BAD_TRAINING = {
    "one patient": (keep_one_patient, ["mri-ct-2d"], "at least 2 patients"),
    "other sources": (lambda d: None, ["mri-spect-2d"], "none called SPECT"),
    "preset": (lambda d: None, ["mri-xx-2d"], "unknown preset 'mri-xx-2d'"),
    "override": (lambda d: None, ["mri-ct-2d", "training=3"], "section.key=value"),
    "option": (lambda d: None, ["mri-ct-2d", "training.stepz=3"], "unknown option training.stepz"),
    "weights to start from": (lambda d: None, ["mri-ct-2d", "training.init=none"], "unknown model 'none'"),
}


@pytest.mark.parametrize(("spoil", "arguments", "words"), BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_train_refuses(run, data, tmp_path, spoil, arguments, words):
    spoil(data)
    status, stdout, stderr = run("train", *arguments, "--data", data, "-o", tmp_path / "out")
    assert (status, stdout) == (2, "")
    assert words in stderr.splitlines()[-1] and "Traceback" not in stderr


def test_dry_run(run, data, tmp_path):
    status, stdout, stderr = run("train", "mri-ct-2d", "--data", data, "-o", tmp_path / "out", "--dry-run")
    assert (status, stderr) == (0, "")
    assert "3 cases of 3 patients" in stdout and not (tmp_path / "out").exists()
    drop(data, "MRI/2001.png")
    spoil(data, "CT/3001.png")
    status, stdout, stderr = run("train", "mri-ct-2d", "--data", data, "-o", tmp_path / "out", "--dry-run")
    assert status == 2 and len(stderr.splitlines()) == 1
    assert stdout.count("problem: ") == 2


def test_train_evaluate_score(run, data, tmp_path):
    """What a user does from data to numbers."""
    arguments = [*TINY, "training.steps=2", "training.steps_per_epoch=2"]
    status, stdout, _ = run("train", "mri-ct-2d", "--data", data, "-o", tmp_path / "run", *arguments)
    model = tmp_path / "run" / "mri-ct-2d.safetensors"
    assert (status, stdout) == (0, f"{model}\n")
    held = ",".join(json.loads(model.with_suffix(".json").read_text())["validation_patients"])

    choice = ["--model", model, "--data", data, "--patients", held, "--metrics", "SSIM,SCD"]
    status, stdout, stderr = run("evaluate", *choice, "-o", tmp_path / "ev")
    assert status == 0 and NOTICE in stdout and "| ClinicalFMamba |" in stdout
    assert (tmp_path / "ev" / "report.html").is_file()
    with open(tmp_path / "ev" / "metrics.csv", newline="") as file:
        evaluated = {row["case"]: row for row in csv.DictReader(file) if row["method"] == "ClinicalFMamba"}

    status, stdout, stderr = run("score", tmp_path / "ev" / "fused", "--data", data, "-o", tmp_path / "mine.csv")
    assert status == 0 and "| fused |" in stdout and "2 of 3 cases have no fused image" in stderr
    with open(tmp_path / "mine.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["SSIM"]) == pytest.approx(float(evaluated[row["case"]]["SSIM"]), abs=0.01)
    assert set(row) > {"FSIM", "FMI", "QABF", "VIF", "NABF"}


def test_a_reader_study_from_pictures_to_ratings(run, data, weights, tmp_path):
    arguments = ["--model", weights, "--data", data, "-o", tmp_path / "ev", "--metrics", "SSIM", "--readers", 3]
    assert run("evaluate", *arguments)[0] == 0
    folder = tmp_path / "ev" / "reader-study"
    blank = folder / "ratings.csv"
    key = tmp_path / "ev" / "reader-study-key.csv"
    blank.write_text(blank.read_text().replace(",,,,,,,", ",me,3,3,3,3,4,"))
    status, stdout, _ = run("ratings", key, blank)
    assert status == 0 and "| overall | 4.00 | 4.00 | +0.00 | +0.00 to +0.00 |" in stdout and NOTICE in stdout
    status, _, stderr = run("ratings", key, key)
    assert (status, len(stderr.splitlines())) == (2, 1) and "is missing" in stderr
    status, _, stderr = run("evaluate", *arguments)
    assert status == 2 and "already holds a reader study" in stderr


def test_a_model_measures_other_modalities(run, weights, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("1001", "2001"):
        save(tmp_path / "pet" / "MRI" / f"{name}.png", rng.integers(0, 255, (48, 48), dtype=np.uint8))
        save(tmp_path / "pet" / "PET" / f"{name}.png", rng.integers(0, 255, (48, 48, 3), dtype=np.uint8))
    arguments = ["--model", weights, "--data", tmp_path / "pet", "-o", tmp_path / "ev", "--metrics", "SSIM"]
    status, _, _ = run("evaluate", *arguments)
    assert status == 0
    assert "not on MR with PET" in (tmp_path / "ev" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metrics", "SSIM,PNSR"], "unknown metric 'PNSR'"),
        (["--sources", "MRI"], "two sources"),
        (["--sources", "MRI,PET"], "none called PET"),
        (["--patients", "7"], "patients 7 are not in"),
        (["--peer", "somewhere"], "NAME=DIR"),
        (["--peer", "x=/nowhere"], "no such folder"),
        (["--model", "best"], "unknown model 'best'"),
        (["--device", "tpu"], "auto, cpu, cuda"),
    ],
)
def test_evaluate_refuses(run, data, weights, tmp_path, arguments, words):
    model = [] if "--model" in arguments else ["--model", weights]
    status, stdout, stderr = run("evaluate", *model, "--data", data, "-o", tmp_path / "out", *arguments)
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/none", "-o", "{}/x.csv"], "no such folder"),
        (["{}/fused", "-o", "{}/x.txt"], "ends with .csv"),
        (["{}/fused", "-o", "{}/no/x.csv"], "does not exist"),
        (["{}/fused", "-o", "{}/x.csv", "--range", "1"], "not two numbers"),
        (["{}/fused", "-o", "{}/x.csv"], "belong to no case"),
    ],
)
def test_score_refuses(run, data, tmp_path, arguments, words):
    save(tmp_path / "fused" / "other.png", np.zeros((48, 48), np.uint8))
    status, stdout, stderr = run("score", *(a.format(tmp_path) for a in arguments), "--data", data)
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert words in line
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_ends_with_its_status(data, tmp_path):
    command = [sys.executable, "-m", "ClinicalFMambaLib", "train", "mri-ct-2d", "--data", str(data)]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "run"), *TINY, "training.steps=100000", "training.steps_per_epoch=4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        seen = []
        while not any("epoch 1 of" in line for line in seen):
            seen.append(process.stderr.readline())
            assert seen[-1], "".join(seen)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert stdout == "" and stderr.splitlines()[-1].startswith("error: stopped at step") and "--resume" in stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
