"""A finished run becomes bundled weights with a card, and no picture of a patient leaves the run's folder."""

from __future__ import annotations

import json

import pytest

from ClinicalFMambaLib import NOTICE
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.pretrained import INDEX, sha256
from ClinicalFMambaLib.training.publish import _lineage, publish
from ClinicalFMambaLib.training.train import load_preset, train

TINY = [
    "model.channels=[4, 4, 8]",
    "model.mamba_layers=1",
    "data.crop=24",
    "training.steps=2",
    "training.steps_per_epoch=2",
    "training.warmup=1",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory, write_pairs):
    run, folder = (tmp_path_factory.mktemp(name) for name in ("run", "bundle"))
    data = write_pairs(tmp_path_factory.mktemp("data"), ("1001", "2001"), size=64)
    train(load_preset("mri-ct-2d", TINY), "mri-ct-2d", data, run)
    return run, folder, publish(run, data, folder)


def test_bundle_is_complete(published):
    _, folder, _ = published
    entry = json.loads((folder / "index.json").read_text())["mri-ct-2d"]
    assert entry["sha256"] == sha256(folder / entry["file"])
    assert (entry["dimension"], entry["modalities"]) == (2, ["MR", "CT"])
    names = {"index.json", entry["file"], entry["card"], "mri-ct-2d.png", "mri-ct-2d-curves.png"}
    assert {path.name for path in folder.iterdir()} == names


def test_card_states_what_was_measured_on_whom(published):
    run, folder, summary = published
    record = json.loads((run / "mri-ct-2d.json").read_text())
    card = (folder / "mri-ct-2d.md").read_text(encoding="utf-8")
    (held_back,) = record["validation_patients"]
    assert NOTICE in card
    assert f"1 other patients ({held_back})" in " ".join(card.split())
    assert f"{summary['maximum']['SSIM']['mean']:.3f}" in card
    assert "images optimised for it alone reach" in card
    assert list((run / "pictures").iterdir()) == [run / "pictures" / f"{held_back}001.png"]


def test_card_and_index_tell_every_stage(published):
    run, folder, _ = published
    first = json.loads((run / "mri-ct-2d.json").read_text())
    second = json.loads(json.dumps(first))
    second["preset"]["training"]["init"] = str(run / "mri-ct-2d.safetensors")
    second["training_patients"] = ["7"]
    stages, patients = _lineage(second)
    assert len(stages) == 2 and "started from stage 1" in stages[1]
    assert patients == {"7", *first["training_patients"]}
    assert json.loads((folder / "index.json").read_text())["mri-ct-2d"]["stages"] == stages[:1]


def test_stages_of_a_bundled_model_come_from_the_index(published):
    record = json.loads((published[0] / "mri-ct-2d.json").read_text())
    record["preset"]["training"]["init"] = "mri-spect-2d"
    bundled = json.loads(INDEX.read_text())["mri-spect-2d"]
    stages, patients = _lineage(record)
    assert stages[:-1] == bundled["stages"] and set(bundled["training_patients"]) < patients


def test_validation_patients_of_an_earlier_stage_are_refused(published, tmp_path):
    run, folder, _ = published
    record = json.loads((run / "mri-ct-2d.json").read_text())
    earlier = {**record, "training_patients": record["validation_patients"]}
    (tmp_path / "first.json").write_text(json.dumps(earlier))
    record["preset"]["training"]["init"] = str(tmp_path / "first.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mri-ct-2d.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="earlier stage was trained on the validation patients"):
        publish(tmp_path / "run", tmp_path, folder)
