"""The networks: shapes, sizes, ablations, parameters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ClinicalFMambaLib.config import SCANS, ModelConfig
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.models.clinicalfmamba import (
    ClinicalFMamba,
    count_flops,
    count_parameters,
    fused_from_maps,
    pad_to_stride,
)

SMALL = {"channels": (4, 4, 8), "mamba_layers": 1, "d_state": 4}


def small(dimension: int, seed: int = 0, **options) -> ClinicalFMamba:
    torch.manual_seed(seed)
    return ClinicalFMamba(ModelConfig(dimension=dimension, **{**SMALL, **options})).eval()


@pytest.mark.parametrize(
    "dimension, size",
    [(2, (32, 32)), (2, (40, 61)), (2, (8, 9)), (2, (3, 50)), (3, (16, 16, 16)), (3, (17, 24, 33)), (3, (1, 20, 24))],
)
def test_any_size_comes_back_as_it_went_in(dimension, size):
    a, b = torch.rand(2, 2, 1, *size)
    with torch.no_grad():
        fused = small(dimension)(a, b)
    assert fused.shape == a.shape
    assert fused.isfinite().all() and fused.min() >= 0 and fused.max() <= 1


@pytest.mark.parametrize("dimension", [2, 3])
def test_every_parameter_takes_part_in_the_forward_pass(dimension):
    model = small(dimension).train()
    a, b = torch.rand(2, 1, 1, *[16] * dimension)
    model(a, b).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias in front of a global pool plus sigmoid, or a scan's skip, may be tiny but never exactly without effect
    assert unused == []


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_head_that_has_learnt_nothing_blends_to_the_average(dimension):
    model = small(dimension, head="blend")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    a, b = torch.rand(2, 2, 1, *[20] * dimension)
    with torch.no_grad():
        torch.testing.assert_close(model(a, b), (a + b) / 2)


def test_the_blend_chooses_a_source_adds_the_residual_and_stays_in_range():
    a, b = torch.tensor([0.2, 0.2, 0.9]), torch.tensor([0.6, 0.6, 0.8])
    maps = torch.tensor([[30.0, -30.0, 0.0], [0.0, 0.1, 0.5]])
    fused = fused_from_maps(maps[None], a[None, None], b[None, None])
    torch.testing.assert_close(fused, torch.tensor([[[0.2, 0.7, 1.0]]]))


@pytest.mark.parametrize("dimension, low, high", [(2, 2.5e6, 3.5e6), (3, 3.5e6, 4.5e6)])
def test_parameters_are_about_those_the_paper_uses(dimension, low, high):
    assert low < count_parameters(ClinicalFMamba(ModelConfig(dimension=dimension))) < high


def test_flops_match_a_count_by_hand():
    config = ModelConfig(dimension=2, channels=(4, 4, 8), mamba_layers=0, cmca=False, scan="single")
    bigger = dataclasses.replace(config, cmca=True)
    # CMCA: four 1×1 convolutions, 4 to 4 channels, on 32×32 pixels, two operations for a multiply-add
    assert count_flops(bigger, (32, 32)) - count_flops(config, (32, 32)) == 4 * 2 * 4 * 4 * 32 * 32
    assert count_flops(ModelConfig(dimension=3), (128, 128, 128)) == pytest.approx(3.3e11, rel=0.1)


@pytest.mark.parametrize(
    "dimension, options",
    [(2, {"cmca": False}), (2, {"scan": "single"}), (3, {"scan": "single-axis"}), (2, {"mamba_layers": 0})],
)
def test_ablations_are_smaller_and_work(dimension, options):
    full, ablated = small(dimension), small(dimension, **options)
    assert count_parameters(ablated) < count_parameters(full)
    x = torch.rand(1, 1, *[16] * dimension)
    assert ablated(x, x).shape == x.shape


def test_both_sources_and_their_order_matter():
    model = small(2)
    a, b, c = torch.rand(3, 1, 1, 32, 32)
    with torch.no_grad():
        reference = model(a, b)
        assert not torch.equal(reference, model(c, b))
        assert not torch.equal(reference, model(a, c))
        assert not torch.equal(reference, model(b, a))


def test_distant_tokens_reach_each_other():
    """The latent scan is global: without CMCA a change in one corner is felt in the opposite one."""
    model = small(2, cmca=False)
    a, b = torch.rand(2, 1, 1, 128, 128)
    changed = a.clone()
    changed[..., :8, :8] += 0.5
    with torch.no_grad():
        assert (model(a, b) - model(changed, b))[..., -8:, -8:].abs().max() > 0


@pytest.mark.parametrize("dimension", [2, 3])
def test_same_seed_same_input_same_bytes(dimension):
    a, b = torch.rand(2, 1, 1, *[24] * dimension)
    with torch.no_grad():
        first, second = small(dimension, seed=5)(a, b), small(dimension, seed=5)(a, b)
    assert torch.equal(first, second)


def test_scan_backends_agree_in_the_network():
    model = small(3)
    a, b = torch.rand(2, 1, 1, 17, 24, 33)
    with torch.no_grad():
        fast = model(a, b)
        model.set_scan_backend("reference")
        torch.testing.assert_close(fast, model(a, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "a, b",
    [((1, 1, 16, 16), (1, 1, 16, 24)), ((1, 2, 16, 16), (1, 2, 16, 16)), ((1, 16, 16), (1, 16, 16))],
)
def test_inputs_that_do_not_fit_are_refused(a, b):
    with pytest.raises(InputError, match="needs two inputs of one shape"):
        small(2)(torch.rand(a), torch.rand(b))


def test_padding_reflects_and_continues_single_slices():
    x = torch.arange(10.0).reshape(1, 1, 1, 10)
    padded = pad_to_stride(x)
    assert padded.shape == (1, 1, 8, 16)
    assert padded[0, 0, 0].tolist() == [*range(10), 8, 7, 6, 5, 4, 3]
    assert (padded[0, 0] == padded[0, 0, :1]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dimension": 4}, "dimension must be 2 or 3"),
        ({"dimension": 2, "scan": "tri-plane"}, "2D model scans"),
        ({"channels": (8, 8)}, "three values"),
        ({"d_state": 0}, "positive"),
        ({"mamba_layers": -1}, "negative"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize("dimension", [2, 3])
def test_configuration_survives_json(dimension):
    for scan in SCANS[dimension]:
        config = ModelConfig(dimension=dimension, scan=scan, **SMALL)
        assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "[]", '{"depth": 3}', '{"dimension": 5}'])
def test_text_that_is_no_configuration_is_refused(text):
    with pytest.raises(InputError):
        ModelConfig.from_json(text)
