"""Inference forms of the causal convolution and of the selective scan, on tokens in chunks.

Sequences lie token after token with the channels last, and a state is carried from one chunk to the next, so that a
long sequence needs no more memory than a chunk and its values stay in the cache between one step and the next.

Two forms compute the same: ``numba`` (compiled for this CPU at the first use, in threads) and ``chunked`` (plain
PyTorch, any device). The chunked form cuts a sequence into S segments of T tokens, S about T: T steps advance all
segments together from zero, S steps carry their last states on, and exp(A ΣΔ) of the carried states is added. All
exponents are negative, so that nothing can overflow, however long the sequence (unlike a division by cumulative
decays).

Source: Gu and Dao, arXiv 2312.00752, equations 2a and 2b; Blelloch, "Prefix sums and their applications", 1990, for
the scan in two levels.
"""

from __future__ import annotations

import functools
import logging
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_LOG2E = 1.4426950408889634
# Channels of one task of a thread, where there are tasks enough: 256 channels take half the time of 4 × 64.
_CHANNELS = 256


@functools.cache
def numba_kernels():
    """The compiled kernels, or None where numba cannot be imported."""
    try:
        from . import scan_kernels
    except Exception as error:  # an unfit numpy raises ImportError, a broken LLVM OSError or AttributeError
        logger.debug("numba is not usable: %s", error)
        return None
    return scan_kernels


def token_backend(device: torch.device | str) -> str:
    """Name of the form that is used on ``device``."""
    return "numba" if torch.device(device).type == "cpu" and numba_kernels() is not None else "chunked"


def causal_conv_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tail: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Causal depth-wise convolution followed by SiLU.

    Args:
        x: tokens, (M, B, L, E) float32: M parameter sets, B sequences each.
        weight: (M, taps, E); the last tap is that of the token itself. bias: (M, E).
        tail: the taps - 1 tokens before x, (M, B, taps - 1, E); replaced in place by the last ones of x.

    Returns:
        (M, B, L, E).
    """
    if _choose(backend, x) == "numba":
        x, out = x.contiguous(), torch.empty(x.shape)
        kernel = numba_kernels().conv_silu
        w, b, t, v, o = (tensor.numpy() for tensor in (weight, bias, tail, x, out))
        _in_threads(x, lambda m, s, low, high: kernel(v[m, s], w[m], b[m], t[m, s], o[m, s], low, high))
        return out
    taps = weight.shape[1]
    x = torch.cat([tail, x], 2)
    tail.copy_(x[:, :, x.shape[2] - (taps - 1) :])
    length = x.shape[2] - (taps - 1)
    out = x[:, :, :length] * weight[:, None, :1] + bias[:, None, None]
    for k in range(1, taps):
        out.addcmul_(x[:, :, k : k + length], weight[:, None, k : k + 1])
    return F.silu(out, inplace=True)


def scan_tokens(
    u: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor,
    *,
    dt: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The selective scan of one chunk of tokens.

    Args:
        u: input, (M, B, L, E) float32.
        step: step size Δ, (M, B, L, E); with ``dt`` its low-rank part, (M, B, L, R).
        A: negative, (M, N, E). B, C: (M, B, L, N). D: (M, E).
        state: h before the first token, (M, B, N, E) float32; replaced in place by h after the last one.
        dt: projection (M, R, E) and bias (M, E), with Δ = softplus(step @ projection + bias).

    Returns:
        y with the skip D u, (M, B, L, E).
    """
    if _choose(backend, u) == "numba":
        kernel = numba_kernels().scan
        y = torch.empty(u.shape)
        dt_proj, dt_bias = dt or (u.new_empty((len(A), 0, u.shape[3])), D)
        nu, nd, nw, ni, na, nb, nc, ns = (
            x.contiguous().numpy() for x in (u, step, dt_proj, dt_bias, A * _LOG2E, B, C, D)
        )
        h, o = state.numpy(), y.numpy()
        _in_threads(
            u,
            lambda m, s, low, high: kernel(
                nu[m, s], nd[m, s], nw[m], ni[m], na[m], nb[m, s], nc[m, s], ns[m], h[m, s], o[m, s], low, high
            ),
        )
        return y
    if dt is not None:
        step = F.softplus(torch.matmul(step, dt[0][:, None]) + dt[1][:, None, None])
    y = _scan_segments(u, step, A, B, C, state)
    return y.addcmul_(u, D[:, None, None])


def _choose(backend: str, x: torch.Tensor) -> str:
    return token_backend(x.device) if backend == "auto" else backend


def _in_threads(x: torch.Tensor, work) -> None:
    """Call work(m, sequence, low, high) for all parameter sets, sequences and blocks of channels."""
    sets, sequences, _, channels = x.shape
    threads = torch.get_num_threads()
    width = _CHANNELS
    while width > 64 and sets * sequences * -(-channels // width) < threads:
        width //= 2
    tasks = [
        (m, s, low, min(low + width, channels))
        for m in range(sets)
        for s in range(sequences)
        for low in range(0, channels, width)
    ]
    if threads == 1:
        for task in tasks:
            work(*task)
        return
    list(_pool(threads).map(lambda task: work(*task), tasks))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="scan")


def _scan_segments(u, delta, A, B, C, state):
    sets, sequences, length, channels = u.shape
    states = A.shape[1]
    steps = max(1, math.isqrt(length))
    segments = -(-length // steps)

    def split(x):
        """(M, B, L, X) to (T, M, B, S, X); missing tokens have no step and so change nothing."""
        x = F.pad(x, (0, 0, 0, segments * steps - length))
        return x.unflatten(2, (segments, steps)).permute(3, 0, 1, 2, 4)

    delta_ = split(delta)
    decay = torch.exp(delta_.unsqueeze(-2) * A[:, None, None])  # (T, M, B, S, N, E)
    h = split(delta * u).unsqueeze(-2) * split(B).unsqueeze(-1)
    for t in range(1, steps):
        h[t].addcmul_(decay[t], h[t - 1])
    decay = torch.exp(delta_.cumsum(0).unsqueeze(-2) * A[:, None, None], out=decay)
    first = u.new_empty((sets, sequences, segments, states, channels))
    for s in range(segments):
        first[:, :, s] = state
        state.mul_(decay[-1, :, :, s]).add_(h[-1, :, :, s])
    h.addcmul_(decay, first)
    y = torch.matmul(split(C).unsqueeze(-2), h).squeeze(-2)  # (T, M, B, S, E)
    return y.permute(1, 2, 3, 0, 4).flatten(2, 3)[:, :, :length].contiguous()
