"""Finding, splitting and cropping training pairs."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ClinicalFMambaLib.cases import find_cases
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.training.data import CropSampler, PairCrops, ValidationPairs, _augment, split_by_patient


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


@pytest.mark.parametrize("validation", [0.25, 0.5, ["2"], [20]])
def test_split_shares_no_patient_and_loses_no_case(pairs, validation):
    found = find_cases(pairs)
    train, held = split_by_patient(found, validation, seed=1)
    assert not {c.patient for c in train} & {c.patient for c in held}
    assert len(train) + len(held) == len(found)
    assert (train, held) == split_by_patient(found, validation, seed=1)


@pytest.mark.parametrize("validation", [["7"], ["2", "20", "21"], [], 1.5, 0])
def test_impossible_splits_are_refused(pairs, validation):
    with pytest.raises(InputError):
        split_by_patient(find_cases(pairs), validation, seed=1)


def test_one_patient_cannot_be_split(pairs):
    one = [c for c in find_cases(pairs) if c.patient == "2"]
    with pytest.raises(InputError, match="at least 2"):
        split_by_patient(one, 0.25, seed=1)


def crops(cases, order, crop=16, dimension=2, **options):
    return PairCrops(cases, order, crop, dimension=dimension, seed=3, **options)


def draw(data, epoch=0, count=6):
    return torch.stack([data[epoch, number] for number in range(count)])


def test_crops_hold_both_sources_in_order_and_range(pairs):
    data = crops(find_cases(pairs), ["MRI", "CT"], augment=False)
    batch = draw(data)
    assert batch.shape == (6, 2, 1, 16, 16)
    assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.1
    mri = torch.stack([torch.from_numpy(x[0].astype(np.float32)) for x in data.images]) / 65535
    window = batch[0, 0, 0]
    found = (mri.unfold(1, 16, 1).unfold(2, 16, 1) - window).abs().amax((-1, -2)).min()
    assert found < 1e-6


def test_crops_repeat_with_the_seed_and_change_with_the_epoch(pairs):
    first, second = (crops(find_cases(pairs), ["MRI", "CT"]) for _ in range(2))
    assert torch.equal(draw(first), draw(second))
    assert not torch.equal(draw(first), draw(second, epoch=1))


@pytest.mark.parametrize("shape", [(24, 24), (12, 20, 20)])
def test_augmentation_keeps_the_sources_registered(shape):
    """Flips and transpositions are those of both; grey values change for each on its own, and keep their order."""
    image = np.random.default_rng(0).random(shape, np.float32)
    darkest, differ = set(), 0
    for seed in range(40):
        both = _augment(np.stack([image, image]), np.random.default_rng(seed))
        assert both[0].shape == shape and both.min() >= 0 and both.max() <= 1
        ranks = [x.argsort(None).argsort() for x in both]
        assert np.corrcoef(*ranks)[0, 1] > 0.9
        darkest.add(int(both[0].argmin()))
        differ += not np.array_equal(*both)
    assert len(darkest) > 2 ** len(shape) and differ > 20


@pytest.mark.parametrize("dimension", [2, 3])
def test_swapping_draws_all_sequences_in_any_order(cases, dimension):
    data = crops(find_cases(cases, ["t1ce", "t2", "flair"]), ["t1ce", "t2", "flair"], 8, dimension, swap=True)
    assert draw(data).shape == (6, 2, 1, *[8] * dimension)


def test_crops_of_volumes_in_2d_are_axial_slices(cases):
    data = crops(find_cases(cases, ["t1ce", "t2"]), ["t1ce", "t2"], 20, 2, augment=False)
    slices = torch.cat([torch.from_numpy(x[0].astype(np.float32)) for x in data.images]) / 65535
    crop = draw(data, count=1)[0, 0, 0]
    assert (slices - crop[:, :18]).abs().amax((-1, -2)).min() < 1e-6


def test_more_images_than_memory_are_mapped_from_disk(pairs, tmp_path, monkeypatch):
    found = find_cases(pairs)
    inside = crops(found, ["MRI", "CT"], cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("ClinicalFMambaLib.training.data._free_memory", lambda: 10_000.0)
    mapped = crops(found, ["MRI", "CT"], cache=tmp_path / "cache")
    assert all(isinstance(image, np.memmap) for image in mapped.images)
    assert torch.equal(draw(mapped), draw(inside))
    del mapped
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_are_refused_by_a_3d_preset(pairs):
    with pytest.raises(InputError, match="use a 2D preset"):
        crops(find_cases(pairs), ["MRI", "CT"], 8, 3)
    with pytest.raises(InputError, match="use a 2D preset"):
        ValidationPairs(find_cases(pairs), ["MRI", "CT"], dimension=3, crop=8)


def test_crops_larger_than_the_image_are_padded_black(pairs):
    sample = draw(crops(find_cases(pairs), ["MRI", "CT"], 48, augment=False))[0]
    assert sample.shape == (2, 1, 48, 48)
    assert (sample[..., 40:, :] == 0).all()


def test_processes_share_the_crops_of_an_epoch():
    alone = list(CropSampler(12, 1, 0, epoch=2))
    assert alone == [(2, number) for number in range(12)]
    shared = [list(CropSampler(12, 3, rank, epoch=2)) for rank in range(3)]
    assert sorted(index for part in shared for index in part) == alone and {len(part) for part in shared} == {4}


def test_a_resumed_epoch_goes_on_where_it_stopped():
    sampler = CropSampler(8, 2, 1, epoch=3, start=2)
    assert list(sampler) == [(3, 5), (3, 7)] and len(sampler) == 4
    sampler.set_epoch(4)
    assert list(sampler) == [(4, 1), (4, 3), (4, 5), (4, 7)]


def test_validation_sees_whole_images(pairs):
    data = ValidationPairs(find_cases(pairs), ["MRI", "CT"], dimension=2, crop=16)
    assert len(data) == 4 and data[0].shape == (2, 1, 40, 36)


@pytest.mark.parametrize(("dimension", "items", "shape"), [(2, 6, (20, 18)), (3, 2, (10, 10, 10))])
def test_validation_sees_the_middle_of_volumes(cases, dimension, items, shape):
    data = ValidationPairs(find_cases(cases, ["t1ce", "t2"]), ["t1ce", "t2"], dimension=dimension, crop=10)
    assert len(data) == items and data[0].shape == (2, 1, *shape)
    assert torch.equal(data[0], data[0]) and data[0].std() > 0.1
