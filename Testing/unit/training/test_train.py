"""A whole, tiny training run; resuming; presets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.pretrained import load_model
from ClinicalFMambaLib.training.module import FusionModule
from ClinicalFMambaLib.training.train import list_presets, load_preset, train

TINY = [
    "model.channels=[4, 4, 8]",
    "model.mamba_layers=1",
    "data.crop=24",
    "data.batch=2",
    "training.steps_per_epoch=2",
    "training.warmup=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for modality in ("MRI", "CT"):
        (folder / modality).mkdir()
        for name in ("1001", "2001"):
            image = rng.integers(0, 255, (48, 48), dtype=np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / modality / f"{name}.png"))
    return folder


def run(data, out, steps, resume=False):
    return train(load_preset("mri-ct-2d", [*TINY, f"training.steps={steps}"]), "tiny", data, out, resume)


def test_weights_load_and_their_record_names_the_split(data, tmp_path):
    weights = run(data, tmp_path, 2)
    model, metadata = load_model(weights)
    assert metadata["name"] == "tiny" and model.config.channels == (4, 4, 8)
    record = json.loads(weights.with_suffix(".json").read_text())
    assert sorted(record["training_patients"] + record["validation_patients"]) == ["1", "2"]
    x = torch.rand(1, 1, 24, 24)
    with torch.no_grad():
        assert model(x, x).isfinite().all()


def test_an_interrupted_run_ends_where_the_whole_run_ends(data, tmp_path, monkeypatch):
    whole = load_model(run(data, tmp_path / "whole", 4))[0].state_dict()
    step = FusionModule.training_step

    def die_in_the_second_epoch(self, pairs, index):
        if self.trainer.current_epoch == 1:
            raise RuntimeError("power cut")
        return step(self, pairs, index)

    monkeypatch.setattr(FusionModule, "training_step", die_in_the_second_epoch)
    with pytest.raises(RuntimeError, match="power cut"):
        run(data, tmp_path / "cut", 4)
    monkeypatch.setattr(FusionModule, "training_step", step)
    resumed = load_model(run(data, tmp_path / "cut", 4, resume=True))[0].state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_every_preset_is_complete():
    assert {"mri-ct-2d", "mri-mri-3d"} <= set(list_presets())
    for name in list_presets():
        preset = load_preset(name)
        assert set(preset) == {"model", "data", "loss", "training"}


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("mri-xy", "loss.ssim=1", "unknown preset"),
        ("mri-ct-2d", "steps=1", "section.key=value"),
        ("mri-ct-2d", "nonsense.steps=1", "section.key=value"),
        ("mri-ct-2d", "training.steps=[", "not valid YAML"),
    ],
)
def test_bad_presets_and_overrides_are_refused(name, override, message):
    with pytest.raises(InputError, match=message):
        load_preset(name, [override])


def test_unknown_options_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="unknown option"):
        train(load_preset("mri-ct-2d", ["loss.sism=1"]), "tiny", data, tmp_path)
