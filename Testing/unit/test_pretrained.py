"""Weights: found by name or path, checked, and refused in one line when they are not what they should be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ClinicalFMambaLib import pretrained
from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.errors import OutputError, WeightsError
from ClinicalFMambaLib.inference.classify import open_classifier, read_classifiers
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba

CONFIG = ModelConfig(channels=(4, 4, 8), mamba_layers=1)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    return pretrained.save_weights(ClinicalFMamba(CONFIG), tmp_path / "tiny.safetensors", {"modalities": "MR,CT"})


@pytest.fixture
def index(weights, monkeypatch):
    entry = {"file": weights.name, "sha256": pretrained.sha256(weights), "dimension": 2, "modalities": ["MR", "CT"]}
    (weights.parent / "index.json").write_text(json.dumps({"tiny-2d": entry}))
    monkeypatch.setattr(pretrained, "FOLDER", weights.parent)
    monkeypatch.setattr(pretrained, "INDEX", weights.parent / "index.json")


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ModelConfig(dimension=3, channels=(4, 4, 8), mamba_layers=1),
        ModelConfig(channels=(4, 4, 8), mamba_layers=0, cmca=False, scan="single"),
    ],
    ids=["2d", "3d", "ablated"],
)
def test_round_trip(tmp_path, config):
    torch.manual_seed(1)
    model = ClinicalFMamba(config).half().float()  # what half precision can hold
    path = pretrained.save_weights(model, tmp_path / "m.safetensors", {"name": "m"})
    loaded, metadata = pretrained.load_model(path)
    assert loaded.config == config
    assert metadata["name"] == "m"
    assert not loaded.training
    x = torch.rand(1, 1, *[16] * config.dimension)
    with torch.no_grad():
        assert torch.equal(loaded(x, 1 - x), model.eval()(x, 1 - x))
    assert all(v.dtype != torch.float32 for v in load_file(path).values())


def test_saving_leaves_no_rest(tmp_path):
    (tmp_path / "file").write_text("a file where a folder is needed")
    with pytest.raises(OutputError, match="cannot create"):
        pretrained.save_weights(ClinicalFMamba(CONFIG), tmp_path / "file" / "m.safetensors", {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bundled_model_is_found_by_name(index, weights):
    assert pretrained.find_weights("tiny-2d") == ("tiny-2d", weights)


def test_path_is_found(weights):
    assert pretrained.find_weights(str(weights)) == ("tiny", weights)


@pytest.mark.parametrize("name", ["tiny-3d", "mri-ct", "folder/model.pt"])
def test_unknown_name_lists_the_known(index, name):
    with pytest.raises(WeightsError, match=r"unknown model .*bundled: tiny-2d"):
        pretrained.find_weights(name)


def test_missing_file(index, tmp_path):
    with pytest.raises(WeightsError, match="does not exist; bundled models: tiny-2d"):
        pretrained.find_weights(str(tmp_path / "no.safetensors"))


def test_wrong_checksum(index, weights):
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(WeightsError, match=r"tiny-2d are corrupt \(checksum"):
        pretrained.find_weights("tiny-2d")


def test_bundled_file_gone(index, weights):
    weights.unlink()
    with pytest.raises(WeightsError, match="missing"):
        pretrained.find_weights("tiny-2d")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _text(path):
    path.write_text("these are no weights")


def _no_config(path):
    save_file(load_file(path), path)


def _other_architecture(path):
    save_file({"conv.weight": torch.zeros(3)}, path, {"config": CONFIG.to_json()})


def _other_width(path):
    wide = ModelConfig(channels=(8, 8, 16), mamba_layers=1)
    save_file(load_file(path), path, {"config": wide.to_json()})


def _later_version(path):
    config = {**json.loads(CONFIG.to_json()), "experts": 4}
    save_file(load_file(path), path, {"config": json.dumps(config)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "cannot be read as safetensors"),
        (_text, "cannot be read as safetensors"),
        (_no_config, "no ClinicalFMamba model"),
        (_other_architecture, "does not fit"),
        (_other_width, "does not fit"),
        (_later_version, "does not fit"),
    ],
)
def test_wrong_files_are_refused_in_one_line(weights, damage, words):
    damage(weights)
    with pytest.raises(WeightsError, match=words) as caught:
        pretrained.load_model(weights)
    assert "\n" not in str(caught.value)


def test_index_of_the_package_agrees_with_its_files():
    for name, entry in pretrained.read_index().items():
        found, path = pretrained.find_weights(name)  # checks the checksum
        model, _ = pretrained.load_model(path)
        assert (found, model.config.dimension) == (name, entry["dimension"])
        assert path.with_suffix(".md").is_file(), f"{name} has no model card"
    classifiers = read_classifiers()
    for name, entry in classifiers.items():
        info = open_classifier(name).info  # checks the checksum, and that its fusion weights are the bundled ones
        assert (info.name, info.verdict, info.evidence) == (name, entry["verdict"], entry["evidence"])
        card = (pretrained.FOLDER / entry["card"]).read_text(encoding="utf-8")
        assert entry["sha256"] in card and info.evidence in card
    listed = [entry["file"] for entry in (*pretrained.read_index().values(), *classifiers.values())]
    assert {p.name for p in pretrained.FOLDER.glob("*.safetensors")} == set(listed)


def test_record_of_a_bundled_model_is_its_entry_whatever_lies_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mri-ct-2d.json").write_text("{}")
    assert pretrained.read_record("mri-ct-2d") == pretrained.read_index()["mri-ct-2d"]


def test_record_of_a_file_lies_beside_it_even_if_it_is_called_like_a_bundled_model(tmp_path):
    weights = tmp_path / "mri-ct-2d.safetensors"
    assert pretrained.read_record(str(weights)) == {}
    weights.with_suffix(".json").write_text('{"training_patients": ["7"]}')
    assert pretrained.read_record(str(weights)) == {"training_patients": ["7"]}
