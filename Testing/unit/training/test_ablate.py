"""The ablation: which variants, the same split for all, going on where it stopped, the table."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from ClinicalFMambaLib import NOTICE
from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.evaluation.evaluate import Row
from ClinicalFMambaLib.training import ablate as ablation
from ClinicalFMambaLib.training.ablate import ablate, ablation_table, t_interval, variants
from ClinicalFMambaLib.training.train import load_preset

TINY = [
    "model.channels=[4, 4, 8]",
    "model.mamba_layers=1",
    "model.head=image",
    "data.crop=16",
    "training.steps=1",
    "training.steps_per_epoch=1",
    "training.warmup=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_pairs):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation")
    return out, ablate(load_preset("mri-ct-2d", TINY), "tiny", data, out, seeds=2)


def test_variants_change_one_thing_each():
    assert variants(ModelConfig(dimension=2)) == {
        "full": {},
        "without CMCA": {"cmca": False},
        "single-direction scan": {"scan": "single"},
    }
    assert list(variants(ModelConfig(dimension=3)).items())[2] == ("single-axis scan", {"scan": "single-axis"})
    assert variants(ModelConfig(dimension=2, head="blend"))["image head"] == {"head": "image"}


def test_each_variant_sees_the_same_patients_and_seeds(done):
    out, rows = done
    assert [(row.method, row.patient) for row in rows] == [
        (variant, seed) for seed in ("3407", "3408") for variant in variants(ModelConfig(dimension=2))
    ]
    for seed in ("3407", "3408"):
        records = [json.loads((p / "tiny.json").read_text()) for p in sorted(out.glob(f"*/seed-{seed}"))]
        assert len(records) == 3
        assert len({tuple(r["validation_patients"]) for r in records}) == 1
        assert all(r["preset"]["training"]["seed"] == int(seed) for r in records)
    assert len({row.values["SSIM"] for row in rows}) == 6


def test_files(done):
    out, rows = done
    with open(out / "ablation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 and float(lines[0]["SSIM"]) == pytest.approx(rows[0].values["SSIM"], rel=1e-4)
    for name in ("ablation.png", "ablation-differences.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert NOTICE in (out / "ablation.md").read_text()


def test_a_second_call_trains_nothing(done, data, monkeypatch):
    out, rows = done
    monkeypatch.setattr(ablation, "train", lambda *a, **k: pytest.fail("trained again"))
    again = ablate(load_preset("mri-ct-2d", TINY), "tiny", data, out, seeds=2)
    assert again == rows


def test_a_stopped_ablation_goes_on(done, data, tmp_path, monkeypatch):
    trained = []

    def stop_at_the_second(preset, name, data, out, resume):
        trained.append(out)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(preset, name, data, out, resume)

    train = ablation.train
    monkeypatch.setattr(ablation, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ablate(load_preset("mri-ct-2d", TINY), "tiny", data, tmp_path, seeds=1)
    rows = ablate(load_preset("mri-ct-2d", TINY), "tiny", data, tmp_path, seeds=1)
    assert rows == done[1][:3] and len(trained) == 2 + 2


def test_other_settings_are_refused(done, data):
    with pytest.raises(InputError, match="other settings"):
        ablate(load_preset("mri-ct-2d", [*TINY, "training.lr=0.1"]), "tiny", data, done[0], seeds=2)


def test_weights_to_start_from_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"leave .*init out"):
        ablate(load_preset("mri-ct-2d", ["training.init=mri-ct-2d"]), "tiny", data, tmp_path)


def test_intervals_are_student_t():
    values = np.array([0.71, 0.74, 0.72])
    low, high = t_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(t_interval([0.5])[0])


def test_differences_are_paired_by_seed():
    rows = [
        Row(variant, seed, "validation", {"SSIM": base + gain})
        for seed, base in (("1", 0.5), ("2", 0.7), ("3", 0.6))
        for variant, gain in (("full", 0.0), ("without CMCA", -0.02))
    ]
    text = ablation_table(rows, load_preset("mri-ct-2d"))
    assert "| without CMCA | -0.0200 (-0.0200 to -0.0200) |" in text
    assert "| full | 2.88 M | 12.8 |" in text and "0.600 (0.352 to 0.848) |" in text


def test_a_table_of_one_seed_claims_no_interval():
    rows = [Row(variant, "1", "validation", {"SSIM": 0.5, "VIF": math.nan}) for variant in ("full", "without CMCA")]
    text = ablation_table(rows, load_preset("mri-ct-2d"))
    assert "one seed (1), so no interval" in text and "| +0.0000 | – |" in text and "nan" not in text
