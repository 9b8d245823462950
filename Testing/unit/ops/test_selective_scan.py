"""Every backend of the scan against the reference, values and gradients; chunks against the whole."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import ClinicalFMambaLib.ops.selective_scan as scans
from ClinicalFMambaLib.errors import InputError, MissingDependencyError
from ClinicalFMambaLib.ops.selective_scan import available_backends, selective_scan
from ClinicalFMambaLib.ops.token_scan import causal_conv_silu, scan_tokens

BACKENDS = [b for b in available_backends("cpu") if b != "reference"]


def inputs(batch=2, groups=3, inner=5, states=4, length=37, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    channels = groups * inner

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    u, delta = normal(batch, channels, length), (normal(batch, channels, length).abs() * scale)
    A = -(1 + normal(channels, states).abs())
    return u, delta, A, normal(batch, groups, states, length), normal(batch, groups, states, length), normal(channels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 1, "groups": 1, "inner": 1, "states": 1, "length": 1},
        {"length": 2},
        {"batch": 1, "groups": 1, "inner": 64, "states": 8, "length": 1111},
        {"inner": 67, "length": 130},
        {"scale": 40.0, "length": 300},
        {"scale": 1e-3, "length": 2000, "inner": 3},
    ],
    ids=str,
)
def test_values_are_those_of_the_reference_in_double_precision(backend, sizes):
    case = inputs(**sizes)
    expected = selective_scan(*(x.double() for x in case), backend="reference").float()
    y = selective_scan(*case, backend=backend)
    torch.testing.assert_close(y, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_input_keeps_its_type_and_single_precision_states(backend):
    case = inputs(dtype=torch.bfloat16, length=500, scale=0.01)
    expected = selective_scan(*(x.double() for x in case), backend="reference")
    y = selective_scan(*case, backend=backend)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 0.01 * expected.abs().max()


def test_gradients_of_the_blocked_form_are_right():
    case = [x.requires_grad_() for x in inputs(batch=1, groups=2, inner=2, states=2, length=7, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, backend="blocked"), case)


def test_automatic_choice_has_gradients_where_they_are_asked_for():
    case = inputs()
    case[0].requires_grad_()
    selective_scan(*case).sum().backward()
    assert case[0].grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["chunked", *(["numba"] if "numba" in BACKENDS else [])])
@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_chunks_with_a_carried_state_are_the_whole(backend, chunk):
    torch.manual_seed(0)
    u = torch.randn(2, 3, 65, 70)
    A, B, C, D = -torch.rand(2, 4, 70) - 0.5, torch.randn(2, 3, 65, 4), torch.randn(2, 3, 65, 4), torch.randn(2, 70)
    weight, bias = torch.randn(2, 4, 70), torch.randn(2, 70)
    dt = (torch.randn(2, 5, 70), torch.randn(2, 70))
    low_rank = torch.randn(2, 3, 65, 5)

    def run(step, backend):
        state, tail, out = torch.zeros(2, 3, 4, 70), torch.zeros(2, 3, 3, 70), []
        for start in range(0, 65, step):
            at = slice(start, start + step)
            x = causal_conv_silu(u[:, :, at], weight, bias, tail, backend)
            inputs = (x, low_rank[:, :, at], A, B[:, :, at], C[:, :, at], D, state)
            out.append(torch.empty(2, 3, len(range(65)[at]), 70))
            scan_tokens(*inputs, out=out[-1], dt=dt, backend=backend)
        return torch.cat(out, 2), state, tail

    for got, expected in zip(run(chunk, backend), run(65, "chunked")):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_convolution_is_torchs():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 2, 30, 6), torch.randn(1, 4, 6), torch.randn(1, 6)
    conv = torch.nn.functional.conv1d(x[0].mT, weight[0].T[:, None], bias[0], padding=3, groups=6)[..., :30]
    expected = torch.nn.functional.silu(conv).mT[None]
    for backend in ("chunked", *(["numba"] if "numba" in BACKENDS else [])):
        got = causal_conv_silu(x, weight, bias, torch.zeros(1, 2, 3, 6), backend)
        torch.testing.assert_close(got[0], expected[0], atol=1e-6, rtol=1e-5)


@pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not installed: the compiled scan is NOT TESTED")
def test_threads_do_not_change_a_bit():
    case = inputs(batch=3, inner=70, length=100)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(selective_scan(*case, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: the scans on CUDA are NOT TESTED")
@pytest.mark.parametrize("backend", ["mamba-ssm", "chunked", "blocked"])
def test_cuda_backends_agree_with_the_reference(backend):
    if backend not in available_backends("cuda"):
        pytest.skip(f"{backend} is not installed: NOT TESTED on CUDA")
    case = inputs(inner=64, states=8, length=1000)
    expected = selective_scan(*(x.double() for x in case), backend="reference").float()
    y = selective_scan(*(x.cuda() for x in case), backend=backend).cpu()
    torch.testing.assert_close(y, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kernel, offered", [(None, False), (object(), True)])
def test_mamba_ssm_without_its_kernel_is_not_offered(monkeypatch, kernel, offered):
    """mamba-ssm 2.3 can be installed without the kernel: then it can be imported, and fails when it is called."""
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_cuda, interface.selective_scan_fn = kernel, print
    packages = {name: types.ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops")}
    packages["mamba_ssm.ops"].selective_scan_interface = interface
    for name, module in {**packages, interface.__name__: interface}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(scans, "_mamba_ssm_scan", scans._mamba_ssm_scan.__wrapped__)
    assert ("mamba-ssm" in available_backends("cuda")) == offered


def test_bad_calls_are_refused():
    case = inputs()
    with pytest.raises(InputError, match="unknown scan backend"):
        selective_scan(*case, backend="fast")
    with pytest.raises(InputError, match="expects u and delta"):
        selective_scan(case[0], case[1][:, :3], *case[2:])
    with pytest.raises(MissingDependencyError):
        selective_scan(*case, backend="mamba-ssm")
