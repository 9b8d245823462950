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


@numba.njit(inline="always", fastmath=True)
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


@numba.njit(inline="always", fastmath=True)
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
    return max(x, _F(0)) + z * p


@numba.njit(inline="always", fastmath=True)
def _silu(x):
    return x / (_F(1) + _exp2(min(-x * _LOG2E, _F(126))))


@numba.njit(cache=True, nogil=True, fastmath=True)
def conv_silu(x, weight, bias, tail, out, low, high):
    """Causal depth-wise convolution and SiLU of the channels low to high.

    Args:
        x: (L, E); weight: (E, taps) transposed to (taps, E); bias: (E,).
        tail: the taps - 1 tokens before x, (taps - 1, E); replaced by the last ones of x.
        out: (L, E).
    """
    length = x.shape[0]
    taps = weight.shape[0]
    for l in range(length):  # noqa: E741  (the letter of the paper)
        row = out[l]
        for e in range(low, high):
            row[e] = bias[e]
        for k in range(taps):
            past = l + k - (taps - 1)
            if past >= 0:
                for e in range(low, high):
                    row[e] += weight[k, e] * x[past, e]
            else:
                for e in range(low, high):
                    row[e] += weight[k, e] * tail[past + taps - 1, e]
        for e in range(low, high):
            row[e] = _silu(row[e])
    for k in range(taps - 1):
        past = length + k - (taps - 1)
        for e in range(low, high):
            tail[k, e] = x[past, e] if past >= 0 else tail[k + length, e]


@numba.njit(cache=True, nogil=True, fastmath=True)
def scan(u, delta, A2, B, C, D, state, y, low, high, raw):
    """The selective scan of the channels low to high.

    Args:
        u, delta: (L, E); delta before its softplus where ``raw``.
        A2: state matrix times log2(e), (N, E); D: (E,).
        B, C: (L, N).
        state: h before the first token, (N, E); replaced by that after the last one.
        y: (L, E), written.
    """
    states = A2.shape[0]
    width = high - low
    step = np.empty(width, np.float32)
    source = np.empty(width, np.float32)
    sums = np.empty(width, np.float32)
    for l in range(u.shape[0]):  # noqa: E741
        if raw:
            for e in range(width):
                step[e] = _softplus(delta[l, low + e])
        else:
            for e in range(width):
                step[e] = delta[l, low + e]
        for e in range(width):
            x = u[l, low + e]
            source[e] = step[e] * x
            sums[e] = D[low + e] * x
        for n in range(states):
            b = B[l, n]
            c = C[l, n]
            for e in range(width):
                h = _exp2(step[e] * A2[n, low + e]) * state[n, low + e] + source[e] * b
                state[n, low + e] = h
                sums[e] += c * h
        for e in range(width):
            y[l, low + e] = sums[e]
