"""RGB and YCbCr."""

from __future__ import annotations

import numpy as np
import pytest

from ClinicalFMambaLib.inference.colour import luma, rgb_to_ycbcr, ycbcr_to_rgb


def test_round_trip_is_exact_for_all_of_a_grid_of_colours():
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels), -1)
    assert (ycbcr_to_rgb(rgb_to_ycbcr(rgb)) == rgb).all()


@pytest.mark.parametrize("grey", [0, 1, 128, 255])
def test_grey_has_no_chroma_and_keeps_its_value(grey):
    y, cb, cr = rgb_to_ycbcr(np.full(3, grey, np.uint8))
    assert (y, cb, cr) == pytest.approx((grey / 255, 0, 0), abs=1e-6)


@pytest.mark.parametrize("rgb, expected", [((255, 0, 0), 0.299), ((0, 255, 0), 0.587), ((0, 0, 255), 0.114)])
def test_luma_weights_are_those_of_bt601(rgb, expected):
    assert luma(np.array([rgb], np.uint8))[0] == pytest.approx(expected, abs=1e-6)


def test_a_colour_that_rgb_does_not_hold_keeps_its_luma_and_hue():
    rng = np.random.default_rng(0)
    chroma = rgb_to_ycbcr(rng.integers(0, 256, (2000, 3), dtype=np.uint8))[:, 1:]
    y = rng.random((2000, 1), np.float32)
    rgb = ycbcr_to_rgb(np.concatenate([y, chroma], -1))
    back = rgb_to_ycbcr(rgb)
    np.testing.assert_allclose(back[:, :1], y, atol=0.5 / 255 + 1e-4)
    share = (back[:, 1:] * chroma).sum(-1) / (chroma**2).sum(-1)
    np.testing.assert_allclose(back[:, 1:], share[:, None] * chroma, atol=0.005)
    assert share.max() < 1.05 and share.min() > -0.05 and (share < 0.9).any()


@pytest.mark.parametrize(("y", "expected"), [(0.0, 0), (1.0, 255), (1.2, 255), (-0.1, 0)])
def test_black_and_white_have_no_colour(y, expected):
    assert (ycbcr_to_rgb(np.array([y, 0.3, -0.2], np.float32)) == expected).all()
