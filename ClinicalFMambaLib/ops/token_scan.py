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
from collections.abc import Sequence
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


def causal_conv_silu(
    x: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, tail: torch.Tensor, backend: str = "auto"
) -> list[torch.Tensor]:
    """Causal depth-wise convolution followed by SiLU.

    Args:
        x: tokens (B, L, E) float32 for each of M parameter sets.
        weight: (M, taps, E); the last tap is that of the token itself. bias: (M, E).
        tail: the taps - 1 tokens before x, (M, B, taps - 1, E); replaced in place by the last ones of x.

    Returns:
        (B, L, E) for each parameter set.
    """
    if _choose(backend, tail) == "numba":
        kernel = numba_kernels().conv_silu
        out = [torch.empty(tokens.shape) for tokens in x]
        v, o = ([tokens.contiguous().numpy() for tokens in some] for some in (x, out))
        w, b, t = weight.numpy(), bias.numpy(), tail.numpy()
        _in_threads(x, lambda m, s, low, high: kernel(v[m][s], w[m], b[m], t[m, s], o[m][s], low, high))
        return out
    x = torch.cat([tail, torch.stack(tuple(x))], 2)
    before = tail.shape[2]
    length = x.shape[2] - before
    tail.copy_(x[:, :, length:])
    out = x[:, :, :length] * weight[:, None, :1] + bias[:, None, None]
    for k in range(1, before + 1):
        out.addcmul_(x[:, :, k : k + length], weight[:, None, k : k + 1])
    return list(F.silu(out, inplace=True))


def scan_tokens(
    u: Sequence[torch.Tensor],
    step: Sequence[torch.Tensor],
    A: torch.Tensor,
    B: Sequence[torch.Tensor],
    C: Sequence[torch.Tensor],
    D: torch.Tensor,
    state: torch.Tensor,
    *,
    out: torch.Tensor,
    dt: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """The selective scan of one chunk of tokens, with the skip D u, for each of M parameter sets.

    Args:
        u: input, M × (B, L, E) float32.
        step: step size Δ, M × (B, L, E); with ``dt`` its low-rank part, M × (B, L, R).
        A: negative, (M, N, E). B, C: M × (B, L, N). D: (M, E).
        state: h before the first token, (M, B, N, E) float32; replaced in place by h after the last one.
        out: y, (M, B, L, E), written; its channels must be contiguous.
        dt: projection (M, R, E) and bias (M, E), with Δ = softplus(step @ projection + bias).
    """
    if _choose(backend, out) == "numba":
        kernel = numba_kernels().scan
        dt_proj, dt_bias = dt or (out.new_empty((len(A), 0, out.shape[3])), D)
        nu, nd, nb, nc = ([x.contiguous().numpy() for x in some] for some in (u, step, B, C))
        nw, ni, na, ns = (x.contiguous().numpy() for x in (dt_proj, dt_bias, A * _LOG2E, D))
        h, o = state.numpy(), out.numpy()
        _in_threads(
            u,
            lambda m, s, low, high: kernel(
                nu[m][s], nd[m][s], nw[m], ni[m], na[m], nb[m][s], nc[m][s], ns[m], h[m, s], o[m, s], low, high
            ),
        )
        return
    u, step, B, C = (torch.stack(tuple(x)) for x in (u, step, B, C))
    if dt is not None:
        step = F.softplus(torch.matmul(step, dt[0][:, None]) + dt[1][:, None, None])
    out.copy_(_scan_segments(u, step, A, B, C, state).addcmul_(u, D[:, None, None]))


def _choose(backend: str, x: torch.Tensor) -> str:
    if backend == "auto":
        return "numba" if x.device.type == "cpu" and numba_kernels() is not None else "chunked"
    return "numba" if backend == "numba" else "chunked"


def _in_threads(x: Sequence[torch.Tensor], work) -> None:
    """Call work(m, sequence, low, high) for all parameter sets, sequences and blocks of channels."""
    sets, (sequences, _, channels) = len(x), x[0].shape
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
