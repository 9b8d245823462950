"""Brain, tumour and normal tissue of synthetic heads whose parts are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.inference.tumour_region import find_region, is_cut, mirrored, normal_level, standardise
from ClinicalFMambaLib.volumes import Volume, resample_onto


def test_normal_level_ignores_a_lesion():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.4, 0.05, 20000), rng.normal(0.9, 0.02, 3000)])
    centre, spread = normal_level(values, np.ones(values.shape, bool))
    assert centre == pytest.approx(0.4, abs=0.005)
    assert spread == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("grade", [0.05, 0.5, 0.8])
def test_the_tumour_is_found(make_pair, grade):
    brain = standardise(make_pair(grade=grade))
    assert brain.mask.sum() * 8e-6 == pytest.approx(1.30, abs=0.05)  # 4/3 pi 62 x 78 x 64 mm
    region = find_region(brain)
    assert region.sum() * 8e-3 == pytest.approx(44.6, rel=0.3)  # a ball of 22 mm, give or take a voxel
    centre = np.argwhere(region).mean(axis=0)[::-1] * 2 + brain.place.origin
    np.testing.assert_allclose(centre, (30, 0, 10), atol=1.5)
    assert not is_cut(brain, region)


def test_a_healthy_brain_has_none(make_pair):
    assert not find_region(standardise(make_pair(radius=0))).any()


def turned(volume: Volume) -> Volume:
    """The same head with its array axes in another order and direction."""
    array = np.ascontiguousarray(volume.array.transpose(1, 2, 0)[::-1, :, ::-1])
    columns = np.eye(3)  # index axes x, y, z of the new array are the old z (backwards), x, y (backwards)
    direction = np.stack([-columns[:, 2], columns[:, 0], -columns[:, 1]], axis=1)
    size = np.array(volume.shape[::-1])
    origin = np.array(volume.origin) + [0, (size[1] - 1) * 2, (size[2] - 1) * 2]
    return replace(volume, array=array, direction=tuple(direction.ravel()), origin=tuple(map(float, origin)))


def test_orientation_does_not_matter(make_pair):
    pair = make_pair()
    straight = standardise(pair)
    other = standardise({name: turned(volume) for name, volume in pair.items()})
    assert other.place.direction == straight.place.direction
    np.testing.assert_allclose(other.place.origin, straight.place.origin, atol=1e-6)
    np.testing.assert_array_equal(other.mask, straight.mask)
    np.testing.assert_allclose(other.images["t1ce"], straight.images["t1ce"], atol=1e-5)


def test_finer_voxels_give_the_same_region(make_pair):
    coarse = standardise(make_pair())
    fine = standardise(make_pair(spacing=1.5))
    region = find_region(fine).astype(np.float32)
    same = resample_onto(replace(fine.place, array=region), coarse.place, 0.0).array > 0.5
    expected = find_region(coarse)
    assert 2 * (same & expected).sum() / (same.sum() + expected.sum()) > 0.9


def test_a_tumour_at_the_end_of_the_slices_is_cut(make_pair):
    def upper(volume):
        start = 34  # through the tumour
        origin = (*volume.origin[:2], volume.origin[2] + 2 * start)
        return replace(volume, array=volume.array[start:], origin=origin)

    pair = {name: upper(volume) for name, volume in make_pair(radius=30).items()}
    brain = standardise(pair)
    assert is_cut(brain, find_region(brain))


def test_mirrored(make_pair):
    brain = standardise(make_pair())
    region = find_region(brain)
    other = mirrored(region, brain)
    assert other.sum() == region.sum() and not (other & region).any()
    np.testing.assert_array_equal(mirrored(other, brain), region)


def whole_head(pair):
    """Scalp and fat around the brain."""
    return {name: replace(v, array=np.maximum(v.array, 70)) for name, v in pair.items()}


def half_covered(pair):
    array = pair["flair"].array.copy()
    array[: len(array) // 2] = 0
    return {**pair, "flair": replace(pair["flair"], array=array)}


def small(pair):
    return {name: replace(v, spacing=(1.0, 1.0, 1.0)) for name, v in pair.items()}


def image(pair):
    return {name: replace(v, array=v.array[40:41], is_image=True) for name, v in pair.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (whole_head, "without skull"),
        (half_covered, "flair shows"),
        (small, "litres of brain"),
        (image, "too few slices"),
        (lambda pair: {**pair, "t1ce": replace(pair["t1ce"], array=0 * pair["t1ce"].array)}, "constant volume"),
    ],
)
def test_what_is_no_whole_brain_is_refused(make_pair, change, message):
    with pytest.raises(InputError, match=message):
        standardise(change(make_pair()))
