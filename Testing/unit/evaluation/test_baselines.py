"""Baseline fusions: properties that their definitions imply, and their edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.evaluation.baselines import BASELINES, laplacian_pyramid
from ClinicalFMambaLib.evaluation.metrics import METRICS

SHAPES = [(64, 64), (61, 83), (7, 9), (1, 1), (24, 33, 40), (17, 61, 43), (5, 40, 40), (1, 30, 30)]


def sources(shape=(64, 72), seed=0):
    rng = np.random.default_rng(seed)
    smooth = [ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap") for sigma in (1, 2)]
    return tuple(np.clip(0.5 + image / max(4 * image.std(), 1e-6), 0, 1) for image in smooth)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_range_and_determinism(name, shape):
    a, b = sources(shape)
    fused = BASELINES[name](a, b)
    assert fused.shape == shape
    assert fused.dtype == np.float32
    assert fused.min() >= 0
    assert fused.max() <= 1
    assert np.array_equal(fused, BASELINES[name](a.copy(), b.copy()))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(64, 64), (61, 83), (17, 30, 43)])
def test_equal_sources_come_back(name, shape):
    a, _ = sources(shape)
    np.testing.assert_allclose(BASELINES[name](a, a), a, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BASELINES if not name.startswith("source")])
def test_symmetric(name):
    a, b = sources()
    np.testing.assert_allclose(BASELINES[name](a, b), BASELINES[name](b, a), atol=1e-6)


def test_pointwise_baselines():
    a, b = (image.astype(np.float32) for image in sources())
    assert np.array_equal(BASELINES["average"](a, b), (a + b) / 2)
    assert np.array_equal(BASELINES["maximum"](a, b), np.maximum(a, b))
    assert np.array_equal(BASELINES["source_a"](a, b), a)
    assert np.array_equal(BASELINES["source_b"](a, b), b)


@pytest.mark.parametrize("name", ["laplacian_pyramid", "wavelet", "guided_filter"])
def test_details_of_both_sources_are_kept(name):
    """Texture in the left half of one source and in the right half of the other: more of it than the average keeps."""
    rng = np.random.default_rng(0)
    texture = rng.normal(0, 0.1, (96, 96))
    a, b = np.full((96, 96), 0.4), np.full((96, 96), 0.6)
    a[:, :48] += texture[:, :48]
    b[:, 48:] += texture[:, 48:]
    fused = BASELINES[name](a, b)
    for part, source in ((slice(10, 38), a), (slice(58, 86), b)):
        kept = np.polyfit(source[:, part].ravel(), fused[:, part].ravel(), 1)[0]
        assert kept > 0.85
    assert METRICS["QABF"].function(fused, a, b) > METRICS["QABF"].function(BASELINES["average"](a, b), a, b) + 0.1


@pytest.mark.parametrize("name", ["laplacian_pyramid", "wavelet"])
def test_base_is_the_average(name):
    assert np.allclose(BASELINES[name](np.full((64, 64), 0.2), np.full((64, 64), 0.6)), 0.4, atol=1e-6)


def test_pyramid_base_maximum():
    a, b = np.full((64, 64), 0.2), np.full((64, 64), 0.6)
    assert np.allclose(laplacian_pyramid(a, b, base="maximum"), 0.6, atol=1e-6)
    with pytest.raises(InputError, match="base"):
        laplacian_pyramid(a, b, base="median")


@pytest.mark.parametrize("name", BASELINES)
def test_few_slices_are_fused_one_by_one(name):
    a, b = sources((4, 40, 44))
    expected = np.stack([BASELINES[name](x, y) for x, y in zip(a, b, strict=True)])
    assert np.array_equal(BASELINES[name](a, b), expected)


@pytest.mark.parametrize("name", ["laplacian_pyramid", "wavelet", "guided_filter"])
def test_volumes_are_fused_in_3d(name):
    """The order of the axes does not matter, and a slice is not fused as if it were alone."""
    (a, _), (b, _) = sources((32, 32, 32), 0), sources((32, 32, 32), 1)
    fused = BASELINES[name](a, b)
    turned = BASELINES[name](a.transpose(2, 0, 1), b.transpose(2, 0, 1))
    np.testing.assert_allclose(turned, fused.transpose(2, 0, 1), atol=1e-5)
    assert np.abs(fused[16] - BASELINES[name](a[16], b[16])).max() > 1e-3


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((8, 8)), np.zeros((8, 9)), "one shape"),
        (np.full((8, 8), np.nan), np.zeros((8, 8)), "source a has NaN"),
        (np.zeros((8, 8)), np.full((8, 8), np.inf), "source b has NaN or infinite"),
        (np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 3)), "expected arrays"),
        (np.zeros((0, 8)), np.zeros((0, 8)), "expected arrays"),
    ],
)
def test_bad_input(name, a, b, message):
    with pytest.raises(InputError, match=message):
        BASELINES[name](a, b)
