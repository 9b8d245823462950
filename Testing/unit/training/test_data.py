"""Finding, splitting and cropping training pairs."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.training.data import PairCrops, WholePairs, find_cases, find_pairs, split_by_patient


@pytest.fixture
def pairs(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("MRI", "CT"):
        (tmp_path / folder).mkdir()
        for name in ("2005", "2006", "20005", "21007"):
            image = rng.integers(0, 255, (40, 36), dtype=np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(image), str(tmp_path / folder / f"{name}.png"))
    return tmp_path


@pytest.fixture
def cases(tmp_path):
    rng = np.random.default_rng(0)
    for patient in ("p1", "p2", "p3"):
        (tmp_path / patient).mkdir()
        for name in ("t1ce", "t2", "flair"):
            volume = rng.integers(0, 255, (12, 20, 18), dtype=np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / patient / f"{name}.nii.gz"))
    (tmp_path / "p3" / "t2.nii.gz").unlink()
    return tmp_path


def test_patients_come_from_the_slice_names(pairs):
    assert [(c.patient, c.name) for c in find_pairs(pairs)] == [
        ("2", "2005"),
        ("2", "2006"),
        ("20", "20005"),
        ("21", "21007"),
    ]


def test_cases_need_all_sequences(cases):
    assert [c.patient for c in find_cases(cases, ["t1ce", "t2"])] == ["p1", "p2"]
    assert [c.patient for c in find_cases(cases, ["t1ce", "flair"])] == ["p1", "p2", "p3"]


@pytest.mark.parametrize("validation", [0.25, 0.5, ["2"], [20]])
def test_split_shares_no_patient_and_loses_no_case(pairs, validation):
    found = find_pairs(pairs)
    train, held = split_by_patient(found, validation, seed=1)
    assert not {c.patient for c in train} & {c.patient for c in held}
    assert len(train) + len(held) == len(found)
    assert (train, held) == split_by_patient(found, validation, seed=1)


@pytest.mark.parametrize("validation", [["7"], ["2", "20", "21"]])
def test_impossible_splits_are_refused(pairs, validation):
    with pytest.raises(InputError):
        split_by_patient(find_pairs(pairs), validation, seed=1)


def test_one_patient_cannot_be_split(pairs):
    one = [c for c in find_pairs(pairs) if c.patient == "2"]
    with pytest.raises(InputError, match="at least 2"):
        split_by_patient(one, 0.25, seed=1)


def test_folders_without_pairs_are_refused(tmp_path, pairs):
    with pytest.raises(InputError, match="no pairs"):
        find_pairs(tmp_path / "CT")
    (pairs / "MRI" / "2005.png").unlink()
    with pytest.raises(InputError, match="no partner"):
        find_pairs(pairs)


def crops(cases, order, crop=16, dimension=2, **options):
    return PairCrops(cases, order, crop, dimension=dimension, seed=3, length=6, **options)


def test_crops_hold_both_sources_in_order_and_range(pairs):
    data = crops(find_pairs(pairs), ["MRI", "CT"], augment=False)
    batch = torch.stack(list(data))
    assert batch.shape == (6, 2, 1, 16, 16)
    assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.1
    mri = torch.stack([torch.from_numpy(x[0].astype(np.float32)) for x in data.images]) / 65535
    window = batch[0, 0, 0]
    found = (mri.unfold(1, 16, 1).unfold(2, 16, 1) - window).abs().amax((-1, -2)).min()
    assert found < 1e-6


def test_crops_repeat_with_the_seed_and_change_with_the_epoch(pairs):
    first, second = (crops(find_pairs(pairs), ["MRI", "CT"]) for _ in range(2))
    assert torch.equal(torch.stack(list(first)), torch.stack(list(second)))
    second.set_epoch(1)
    assert not torch.equal(torch.stack(list(first)), torch.stack(list(second)))


def test_swapping_draws_all_sequences_in_any_order(cases):
    data = crops(find_cases(cases, ["t1ce", "t2", "flair"]), ["t1ce", "t2", "flair"], 8, 3, swap=True)
    assert torch.stack(list(data)).shape == (6, 2, 1, 8, 8, 8)


def test_crops_larger_than_the_image_are_padded_black(pairs):
    sample = next(iter(crops(find_pairs(pairs), ["MRI", "CT"], 48, augment=False)))
    assert sample.shape == (2, 1, 48, 48)
    assert (sample[..., 40:, :] == 0).all()


def test_validation_sees_whole_images(pairs):
    data = WholePairs(find_pairs(pairs), ["MRI", "CT"])
    assert len(data) == 4 and data[0].shape == (2, 1, 40, 36)
