"""The SSIM ceiling is above what fusions reach, and knows where it must lie."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ClinicalFMambaLib.evaluation.baselines import BASELINES
from ClinicalFMambaLib.evaluation.ceiling import best_image, ssim_ceiling
from ClinicalFMambaLib.evaluation.metrics import qabf, ssim


def images():
    noise = np.random.default_rng(0).random((2, 48, 40))
    smooth = [ndimage.gaussian_filter(x, 2) for x in noise]
    return [((x - x.min()) / np.ptp(x)).astype(np.float32) for x in smooth]


def test_no_baseline_reaches_the_ceiling():
    a, b = images()
    ceiling = ssim_ceiling(a, b, 60)
    assert all(ssim(fuse(a, b), a, b) < ceiling for fuse in BASELINES.values())
    assert ssim_ceiling(a, b, 60) == ceiling


def test_equal_sources_allow_everything():
    a, _ = images()
    assert ssim_ceiling(a, a, 5) == pytest.approx(1, abs=0.02)


def test_edges_are_bought_with_ssim():
    a, b = images()
    plain, edged = (best_image(a, b, edge, 60) for edge in (0, 0.3))
    assert qabf(edged, a, b) > qabf(plain, a, b) + 0.05
    assert ssim(edged, a, b) < ssim(plain, a, b)
