"""Loss terms against what they are defined to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import SSIMLoss
from scipy import ndimage

from ClinicalFMambaLib.evaluation import metrics
from ClinicalFMambaLib.training import losses
from ClinicalFMambaLib.training.losses import FusionLoss, LossWeights

ALL = LossWeights(1, 1, 1, 1, 1, 1)


def images(*shape, seed=0):
    noise = np.random.default_rng(seed).random((3, *shape))
    smooth = [ndimage.gaussian_filter(x, 2) for x in noise]
    return [torch.tensor((x - x.min()) / np.ptp(x), dtype=torch.float32)[None, None] for x in smooth]


def test_sobel_is_that_of_an_independent_implementation():
    x = images(20, 30)[0]
    gx, gy = losses.sobel(x)
    for mine, axis in ((gx, 1), (gy, 0)):
        theirs = ndimage.sobel(x[0, 0].numpy(), axis=axis, mode="nearest") / 4
        np.testing.assert_allclose(mine[0, 0].numpy(), theirs, atol=1e-5)


def test_gradient_loss_looks_along_all_three_axes_of_a_volume():
    flat = torch.zeros(1, 1, 12, 12, 12)
    for axis in (2, 3, 4):
        step = flat.clone()
        step.narrow(axis, 6, 6).fill_(1)
        # each axis lies in two of the three planes
        assert losses.gradient_loss(flat, step, flat) == pytest.approx(2 / 3 * 2 / 12, rel=1e-4)


@pytest.mark.parametrize("shape", [(48, 56), (24, 48, 40)])
def test_terms_are_finite_differentiable_and_lower_for_a_better_fusion(shape):
    a, b, c = images(*shape)
    loss = FusionLoss(len(shape), ALL)
    fused = torch.maximum(a, b).requires_grad_()
    good, terms = loss(fused, a, b)
    good.backward()
    assert fused.grad.isfinite().all() and set(terms) == {"pixel", "gradient", "ssim", "edge", "vif", "scd"}
    bad, bad_terms = loss(c, a, b)
    assert good < bad
    assert all(terms[name] < bad_terms[name] for name in terms)


def test_gradients_are_finite_on_black_images():
    zero = torch.zeros(1, 1, 48, 48)
    fused = zero.clone().requires_grad_()
    FusionLoss(2, ALL)(fused, zero, zero)[0].backward()
    assert fused.grad.isfinite().all()


def test_terms_with_no_weight_are_not_computed():
    a, b, _ = images(32, 32)
    _, terms = FusionLoss(2, LossWeights(pixel=1, gradient=0, ssim=0))(a, a, b)
    assert set(terms) == {"pixel"}


def test_symmetry_term_compares_both_orders_of_the_sources():
    a, b, _ = images(32, 32)
    loss = FusionLoss(2, LossWeights(pixel=0, gradient=0, ssim=0, symmetry=2))
    value, terms = loss(a, a, b, swapped=b)
    assert terms["symmetry"] == pytest.approx(float((a - b).abs().mean())) and value == 2 * terms["symmetry"]
    assert loss(a, a, b, swapped=a)[0] == 0


def test_scd_term_is_the_metric():
    a, b, _ = images(64, 64)
    fused = 0.7 * a + 0.3 * b
    theirs = 1 - metrics.scd(*(x[0, 0].numpy().astype(float) for x in (fused, a, b))) / 2
    assert FusionLoss(2, ALL)(fused, a, b)[1]["scd"].item() == pytest.approx(theirs, abs=1e-3)


def test_edge_term_is_the_metric_where_orientations_need_no_wrapping():
    """The metric's orientations jump at ±90°; the loss compares undirected gradients. Along one axis they agree, but
    for the rows at the border, where the metric pads with black."""
    ramps = (torch.linspace(0, 1, 48).pow(p).expand(48, 48) for p in (1.0, 3.0))
    a, b = (torch.cat([r, r.flip(1)], 1).repeat(8, 1)[None, None] for r in ramps)
    fused = torch.maximum(a, b)
    theirs = 1 - metrics.qabf(*(x[0, 0].numpy().astype(float) for x in (fused, a, b)))
    assert FusionLoss(2, ALL)(fused, a, b)[1]["edge"].item() == pytest.approx(theirs, abs=0.03)


def test_the_paper_weights_are_the_default():
    weights = LossWeights()
    assert (weights.pixel, weights.gradient, weights.ssim) == (2, 10, 5)
    assert (weights.edge, weights.vif, weights.scd) == (0, 0, 0)


def test_ssim_of_volumes_agrees_with_monai():
    fused, source = (torch.rand(2, 1, 12, 15, 9, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    expected = SSIMLoss(spatial_dims=3, data_range=1.0, win_size=7, kernel_type="uniform")(fused, source)
    assert losses.ssim_loss_3d(fused, source) == pytest.approx(expected.item(), abs=1e-5)
