"""Compiled CPU kernels of the scan, token after token with the state in the first-level cache. Needs numba.

Exponential and logarithm are polynomials without branches, so that LLVM makes vector code of the channel loops: a
library call for each element would take most of the time. Their relative error is below 3e-7, that of float32
arithmetic itself.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

_F = np.float32
_LOG2E = _F(1.4426950408889634)


@intrinsic
def _as_float(context, bits):
    """The float32 that has these 32 bits."""
    signature = types.float32(types.int32)

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return signature, generate


@numba.njit(inline="always", fastmath=True, error_model="numpy")
def _exp2(x):
    """2**x for x <= 127, at least the smallest normal number; Taylor series around the nearest integer."""
    x = max(x, _F(-126))
    whole = np.floor(x + _F(0.5))
    r = x - whole
    p = _F(1.5252734e-5)
    p = p * r + _F(1.5403531e-4)
    p = p * r + _F(1.3333558e-3)
    p = p * r + _F(9.6181291e-3)
    p = p * r + _F(5.5504109e-2)
    p = p * r + _F(2.4022651e-1)
    p = p * r + _F(6.9314718e-1)
    p = p * r + _F(1)
    return p * _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@numba.njit(inline="always", fastmath=True, error_model="numpy")
def _softplus(x):
    """log(1 + exp(x)); the logarithm of 1 + t through the series of the inverse hyperbolic tangent of t / (2 + t)."""
    t = _exp2(-abs(x) * _LOG2E)
    z = t / (_F(2) + t)
    q = z * z
    p = _F(2 / 15)
    p = p * q + _F(2 / 13)
    p = p * q + _F(2 / 11)
    p = p * q + _F(2 / 9)
    p = p * q + _F(2 / 7)
    p = p * q + _F(2 / 5)
    p = p * q + _F(2 / 3)
    p = p * q + _F(2)
    return _F(0.5) * (x + abs(x)) + z * p


@numba.njit(inline="always", fastmath=True, error_model="numpy")
def _silu(x):
    return x / (_F(1) + _exp2(min(-x * _LOG2E, _F(126))))


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def conv_silu(x, weight, bias, tail, out, low, high):
    """Causal depth-wise convolution and SiLU of the channels low to high.

    Args:
        x: (L, E); weight: (E, taps) transposed to (taps, E); bias: (E,).
        tail: the taps - 1 tokens before x, (taps - 1, E); replaced by the last ones of x.
        out: (L, E).
    """
    # Rows are sliced before they are indexed: an index with an offset could be negative, which stops vector code.
    length = x.shape[0]
    taps = weight.shape[0]
    for l in range(length):  # noqa: E741  (the letter of the paper)
        row = out[l, low:high]
        row[:] = bias[low:high]
        for k in range(taps):
            past = l + k - (taps - 1)
            token = x[past, low:high] if past >= 0 else tail[past + taps - 1, low:high]
            w = weight[k, low:high]
            for e in range(row.size):
                row[e] += w[e] * token[e]
        for e in range(row.size):
            row[e] = _silu(row[e])
    for k in range(taps - 1):
        past = length + k - (taps - 1)
        tail[k, low:high] = x[past, low:high] if past >= 0 else tail[k + length, low:high]


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def scan(u, step, dt_proj, dt_bias, A2, B, C, D, state, y, low, high):
    """The selective scan of the channels low to high.

    Args:
        u: (L, E).
        step: step sizes (L, E) where dt_proj is (0, E); else their low-rank part (L, R), and they are
            softplus(step @ dt_proj + dt_bias).
        A2: state matrix times log2(e), (N, E); D: (E,).
        B, C: (L, N).
        state: h before the first token, (N, E); replaced by that after the last one.
        y: (L, E), written.
    """
    width = high - low
    delta = np.empty(width, np.float32)
    source = np.empty(width, np.float32)
    sums = np.empty(width, np.float32)
    skip = D[low:high]
    bias = dt_bias[low:high]
    rank = dt_proj.shape[0]
    for l in range(u.shape[0]):  # noqa: E741
        x = u[l, low:high]
        if rank == 0:
            delta[:] = step[l, low:high]
        else:
            for e in range(width):
                delta[e] = bias[e]
            for r in range(rank):
                row = dt_proj[r, low:high]
                value = step[l, r]
                for e in range(width):
                    delta[e] += value * row[e]
            for e in range(width):
                delta[e] = _softplus(delta[e])
        for e in range(width):
            source[e] = delta[e] * x[e]
            sums[e] = skip[e] * x[e]
        for n in range(A2.shape[0]):
            b = B[l, n]
            c = C[l, n]
            a = A2[n, low:high]
            h = state[n, low:high]
            for e in range(width):
                value = _exp2(delta[e] * a[e]) * h[e] + source[e] * b
                h[e] = value
                sums[e] += c * value
        y[l, low:high] = sums
