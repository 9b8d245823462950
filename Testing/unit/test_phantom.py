"""The synthetic head: geometry, tissue values, determinism."""

from __future__ import annotations

import numpy as np
import pytest

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.phantom import FIELD_OF_VIEW, LABELS, make_phantom

DTYPES = {"CT": np.int16, "T1": np.int16, "T2": np.int16, "FLAIR": np.int16, "SPECT": np.uint16, "labels": np.uint8}
MODALITIES = {"CT": "CT", "T1": "MR", "T2": "MR", "FLAIR": "MR", "SPECT": "SPECT", "labels": ""}


@pytest.fixture(scope="module")
def head():
    return make_phantom(80)


def typical(volumes, name, label):
    # The median: voxels at a border share the neighbour's value, and bone's is large.
    return float(np.median(volumes[name].array[volumes["labels"].array == LABELS[label]]))


@pytest.mark.parametrize("size", [16, 19, 33])
def test_grid(size):
    volumes = make_phantom(size)
    assert list(volumes) == list(DTYPES)
    for name, volume in volumes.items():
        assert volume.array.shape == (size,) * 3
        assert volume.array.dtype == DTYPES[name]
        assert (volume.name, volume.modality) == (name, MODALITIES[name])
        np.testing.assert_allclose(np.multiply(volume.spacing, size), FIELD_OF_VIEW)
        # The middle of the field of view, not of the first voxel, is at the origin of the patient frame.
        np.testing.assert_allclose(np.add(volume.origin, np.multiply(volume.spacing, (size - 1) / 2)), 0, atol=1e-6)
        assert tuple(volume.direction) == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_same_arguments_same_bytes_and_another_seed_another_head():
    first, again, other = (make_phantom(20, seed=s) for s in (3, 3, 4))
    for name in DTYPES:
        assert first[name].array.tobytes() == again[name].array.tobytes()
        assert first[name].array.tobytes() != other[name].array.tobytes()


def test_head_has_the_size_of_a_head(head):
    labels = head["labels"]
    brain = np.isin(labels.array, [LABELS[n] for n in ("grey matter", "white matter", "deep grey matter", "cerebellum",
                                                       "oedema", "tumour rim", "necrosis")])  # fmt: skip
    spacing = labels.spacing[0]
    litres = brain.sum() * spacing**3 / 1e6
    assert 0.9 < litres < 1.5
    above_ears = labels.array[int(0.55 * 80) :] != LABELS["background"]
    width, length = (np.flatnonzero(above_ears.any(axis=axes)).size * spacing for axes in ((0, 1), (0, 2)))
    assert 140 < width < 165
    assert 180 < length < 205


def test_orientation(head):
    labels = head["labels"].array
    z, y, x = (np.arange(80) for _ in range(3))
    eyes = labels == LABELS["eye"]
    cerebellum = labels == LABELS["cerebellum"]
    tumour = labels == LABELS["necrosis"]
    assert (y[None, :, None] * eyes).sum() / eyes.sum() < 25  # LPS: y grows towards the back
    assert (y[None, :, None] * cerebellum).sum() / cerebellum.sum() > 45
    assert (z[:, None, None] * cerebellum).sum() / cerebellum.sum() < (z[:, None, None] * tumour).sum() / tumour.sum()
    assert (x[None, None, :] * tumour).sum() / tumour.sum() > 44  # the patient's left


@pytest.mark.parametrize(
    ("name", "brighter", "darker", "factor"),
    [
        ("CT", "bone", "grey matter", 5),
        ("CT", "grey matter", "white matter", 1.1),
        ("CT", "white matter", "CSF", 1.2),
        ("CT", "calcification", "grey matter", 2),
        ("T1", "white matter", "grey matter", 1.15),
        ("T1", "grey matter", "CSF", 1.6),
        ("T1", "tumour rim", "necrosis", 1.8),
        ("T2", "CSF", "grey matter", 1.3),
        ("T2", "grey matter", "white matter", 1.15),
        ("T2", "oedema", "white matter", 1.5),
        ("FLAIR", "oedema", "white matter", 1.5),
        ("FLAIR", "white matter", "CSF", 1.5),
        ("SPECT", "grey matter", "white matter", 1.2),
        ("SPECT", "tumour rim", "oedema", 1.5),
    ],
)
def test_contrast(head, name, brighter, darker, factor):
    assert typical(head, name, brighter) > factor * typical(head, name, darker)


def test_skull_has_diploe_between_two_tables():
    # Along a ray from the middle of the head to the back, CT crosses inner table, diploe and outer table.
    volume = make_phantom(128)["CT"]
    ray = volume.array[67, 64:, 64].astype(int)
    bone = np.flatnonzero(ray > 300)
    profile = ray[bone[0] : bone[-1] + 1]
    assert 3 <= len(profile) * volume.spacing[0] <= 14
    assert profile[1:-1].min() < 0.85 * min(profile[: len(profile) // 2].max(), profile[len(profile) // 2 :].max())


def test_values_are_those_of_the_modality(head):
    ct = head["CT"].array
    corner = ct[:, :8, :8]
    assert abs(float(corner.mean()) + 1000) < 1
    assert 3 < float(corner.std()) < 5
    assert 900 < ct.max() <= 3071
    for name in ("T1", "T2", "FLAIR"):
        assert head[name].array.min() >= 0
        assert head[name].array.max() < 1500
    assert (ct[head["labels"].array == LABELS["air cavity"]] < -400).mean() > 0.8


def test_healthy_head_has_no_tumour_and_the_same_skull(head):
    healthy = make_phantom(80, tumour=False)
    mass = [LABELS[n] for n in ("oedema", "tumour rim", "necrosis")]
    assert np.isin(head["labels"].array, mass).sum() > 200
    assert not np.isin(healthy["labels"].array, mass).any()
    np.testing.assert_array_equal(head["labels"].array == LABELS["bone"], healthy["labels"].array == LABELS["bone"])


def test_cortex_is_folded(head):
    # Much more border between grey matter and fluid than a smooth brain of that volume has.
    grey = head["labels"].array == LABELS["grey matter"]
    white = head["labels"].array == LABELS["white matter"]
    faces = sum(np.count_nonzero(np.diff((grey | white).astype(np.int8), axis=axis)) for axis in range(3))
    inner = sum(np.count_nonzero(np.diff(white.astype(np.int8), axis=axis)) for axis in range(3))
    volume = (grey | white).sum()
    sphere = 1.5 * (36 * np.pi) ** (1 / 3) * volume ** (2 / 3)
    assert faces > 1.2 * sphere
    assert inner > 1.6 * sphere


@pytest.mark.parametrize("size", [15, 0, -3, 64.0, "64", True, None])
def test_bad_size(size):
    with pytest.raises(InputError, match="integer of 16 or more"):
        make_phantom(size)


def test_bad_seed():
    with pytest.raises(InputError, match="seed"):
        make_phantom(16, seed=-1)
