"""A finished run becomes bundled weights with a card, and no picture of a patient leaves the run's folder."""

from __future__ import annotations

import json

import pytest

from ClinicalFMambaLib import NOTICE
from ClinicalFMambaLib.pretrained import sha256
from ClinicalFMambaLib.training.publish import publish
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
