"""The selective scan (S6) of Mamba as one function with several backends.

    h[l] = exp(Δ[l] A) h[l-1] + Δ[l] B[l] u[l]        y[l] = C[l]ᵀ h[l] + D u[l]

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752,
equations 2a and 2b with the zero-order hold for A and the Euler step for B, as in mamba-ssm.

Backends:
    ``reference``  one token after the other in plain PyTorch; any floating type; the standard for all others
    ``blocked``    blocks of tokens that stay in the processor's cache; values and gradients; any device
    ``chunked``    segments of tokens side by side, no loop over all tokens; values only; any device
    ``numba``      compiled for this CPU, where numba is installed; values only
    ``mamba-ssm``  the CUDA kernel of the mamba-ssm package, where that is installed
"""

from __future__ import annotations

import functools
import logging

import torch

from ..errors import InputError, MissingDependencyError
from .token_scan import numba_kernels, scan_tokens

logger = logging.getLogger(__name__)

# Elements of one block of states. 2**18 float32 are 1 MiB: a block of decays or of states fits the
# L2 cache of a core; measured best of 2**17 ... 2**21 on 2 Zen 5 cores. Elsewhere few and large kernels count.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS_GPU = 2**24
# States of one chunk of the values-only forms: 16 MiB.
_CHUNK_ELEMENTS = 2**22


@functools.cache
def _mamba_ssm_scan():
    """mamba-ssm's ``selective_scan_fn``, or None where it cannot be imported or was installed without its kernel."""
    try:
        from mamba_ssm.ops import selective_scan_interface
    except Exception as error:  # a broken CUDA build raises OSError or RuntimeError as well as ImportError
        logger.debug("mamba-ssm is not usable: %s", error)
        return None
    # mamba-ssm 2.3 builds it only with MAMBA_KEEP_CUDA_BUILD=TRUE, can be imported without and fails when it is called
    if getattr(selective_scan_interface, "selective_scan_cuda", None) is None:
        logger.debug("mamba-ssm is installed without selective_scan_cuda")
        return None
    return selective_scan_interface.selective_scan_fn


def available_backends(device: torch.device | str = "cpu", *, gradients: bool = False) -> tuple[str, ...]:
    """Names of the backends that work on ``device``, fastest first; with ``gradients`` only those that have them."""
    kind = torch.device(device).type
    names = ["mamba-ssm"] if kind == "cuda" and _mamba_ssm_scan() is not None else []
    if not gradients:
        names += ["numba"] if kind == "cpu" and numba_kernels() is not None else []
        names += ["chunked"]
    return (*names, "blocked", "reference")


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Run G independent groups of selective scans over the last axis.

    Args:
        u: input sequence, (B, G*E, L).
        delta: step size, positive (softplus applied), (B, G*E, L).
        A: state matrix, negative, (G*E, N).
        B: input matrix, (B, G, N, L).
        C: output matrix, (B, G, N, L).
        D: skip connection, (G*E,), or None.
        backend: ``"auto"`` for the fastest on the device of ``u``, or one of :func:`available_backends`.

    Returns:
        The output sequence, (B, G*E, L), of ``u``'s type. States are kept in float32 (float64 for float64
        input): the decay over thousands of tokens underflows bfloat16. On the meta device only its shape.

    Raises:
        InputError: shapes that do not fit together, or an unknown backend.
        MissingDependencyError: backend ``"mamba-ssm"`` where mamba-ssm cannot be imported.
    """
    _check_shapes(u, delta, A, B, C, D)
    if u.device.type == "meta":
        return torch.empty_like(u)
    if backend == "auto":
        inputs = (x for x in (u, delta, A, B, C, D) if x is not None)
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        # a double is asked for to be exact: the values-only forms compute in single precision
        backend = available_backends(u.device, gradients=gradients or u.dtype == torch.float64)[0]
    if backend == "reference":
        return _scan_reference(u, delta, A, B, C, D)
    if backend == "blocked":
        y = _BlockedScan.apply(*_time_major(u, delta, A, B, C))
        y = y.flatten(2).permute(1, 2, 0).to(u.dtype)
        return y if D is None else torch.addcmul(y, u, D.to(u.dtype)[:, None])
    if backend in ("numba", "chunked"):
        if backend == "numba" and (numba_kernels() is None or u.device.type != "cpu"):
            raise MissingDependencyError("backend 'numba' needs the numba package and the CPU")
        return _scan_chunks(u, delta, A, B, C, D, backend)
    if backend == "mamba-ssm":
        scan = _mamba_ssm_scan()
        if scan is None or u.device.type != "cuda":
            raise MissingDependencyError("backend 'mamba-ssm' needs the mamba-ssm package and a CUDA device")
        return scan(u, delta.to(u.dtype), A.float(), B.to(u.dtype), C.to(u.dtype), None if D is None else D.float())
    known = "auto, reference, blocked, chunked, numba, mamba-ssm"
    raise InputError(f"unknown scan backend {backend!r}; use one of {known}")


def _scan_chunks(u, delta, A, B, C, D, backend):
    """Through :func:`.token_scan.scan_tokens`: groups are its parameter sets."""
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]

    def tokens(x):
        return x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).float()

    A = A.float().unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
    D = (u.new_zeros(channels) if D is None else D).float().unflatten(0, (groups, -1))
    B, C = (x.permute(1, 0, 3, 2).float() for x in (B, C))
    u_, delta_ = tokens(u), tokens(delta)
    state = torch.zeros((groups, batch, states, channels // groups), device=u.device)
    y = torch.empty(u_.shape, device=u.device)
    step = max(64, _CHUNK_ELEMENTS // (batch * channels * states))
    for start in range(0, length, step):
        at = slice(start, start + step)
        inputs = (u_[:, :, at], delta_[:, :, at], A, B[:, :, at], C[:, :, at], D, state)
        scan_tokens(*inputs, out=y[:, :, at], backend=backend)
    return y.permute(1, 0, 3, 2).flatten(1, 2).to(u.dtype)


def scan_flops(batch: int, channels: int, tokens: int, states: int) -> int:
    """Floating-point operations of one scan: nine for each state and token, as mamba-ssm counts them."""
    return 9 * batch * channels * tokens * states


def _check_shapes(u, delta, A, B, C, D):
    fits = u.dim() == 3 and delta.shape == u.shape and A.dim() == 2 and A.shape[0] == u.shape[1]
    fits = fits and B.dim() == 4 and B.shape == C.shape and u.shape[1] % B.shape[1] == 0
    fits = fits and (B.shape[0], B.shape[2], B.shape[3]) == (u.shape[0], A.shape[1], u.shape[2])
    fits = fits and (D is None or D.shape == u.shape[1:2])
    if not fits:
        raise InputError(
            "selective_scan expects u and delta (B, G*E, L), A (G*E, N), B and C (B, G, N, L), D (G*E,); got "
            + ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip("uΔABCD", (u, delta, A, B, C, D)) if t is not None)
        )


def _scan_reference(u, delta, A, B, C, D):
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    shape = (batch, groups, channels // groups)
    A = A.to(work).reshape(groups, -1, states)
    h = u.new_zeros((*shape, states), dtype=work)
    outputs = []
    for l in range(length):  # noqa: E741  (the letter of the paper)
        step = delta[..., l].to(work).reshape(shape)
        x = u[..., l].to(work).reshape(shape)
        h = torch.exp(step[..., None] * A) * h + (step * x)[..., None] * B[..., l].to(work)[:, :, None]
        outputs.append((h * C[..., l].to(work)[:, :, None]).sum(-1).flatten(1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + u.to(work) * D.to(work)[:, None]
    return y.to(u.dtype)


def _time_major(u, delta, A, B, C):
    """Tokens first and channels last, so that one step of all scans is one run of memory.

    Returns u and delta (L, B, G, E), A (G, N, E), B and C (L, B, G, N) in the type of the states.
    """
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    groups = B.shape[1]

    def channels(x):
        return x.permute(2, 0, 1).to(work).contiguous().unflatten(-1, (groups, -1))

    def states(x):
        return x.permute(3, 0, 1, 2).to(work).contiguous()

    A = A.to(work).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
    return channels(u), channels(delta), A, states(B), states(C)


def _blocks(length: int, state: torch.Tensor):
    elements = _BLOCK_ELEMENTS_CPU if state.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
    step = max(1, min(length, elements // state.numel()))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _advance(decay: torch.Tensor, state: torch.Tensor, carry: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """In place, state[t] += decay[t] * state[t-1] along the first axis, from ``carry``; returns the last state."""
    steps = list(zip(decay.unbind(0), state.unbind(0)))
    for a, h in reversed(steps) if reverse else steps:
        carry = h.addcmul_(a, carry)
    return carry


class _BlockedScan(torch.autograd.Function):
    """Values and gradients of the scan in blocks of tokens; all tensors as :func:`_time_major` makes them."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        length, batch, groups, inner = u.shape
        states = A.shape[1]
        keep = any(ctx.needs_input_grad)
        history = u.new_empty((length, batch, groups, states, inner)) if keep else None
        y = torch.empty_like(u)
        carry = u.new_zeros((batch, groups, states, inner))
        for block in _blocks(length, carry):
            step = delta[block]
            decay = (step.unsqueeze(3) * A).exp_()
            source = (step * u[block]).unsqueeze(3)
            if keep:
                h = torch.mul(source, B[block].unsqueeze(-1), out=history[block])
            else:
                h = source * B[block].unsqueeze(-1)
            carry = _advance(decay, h, carry)
            torch.matmul(C[block].unsqueeze(3), h, out=y[block].unsqueeze(3))
        if keep:
            ctx.save_for_backward(u, delta, A, B, C, history)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        u, delta, A, B, C, history = ctx.saved_tensors
        length = u.shape[0]
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_A = torch.zeros_like(A)
        grad_y = grad_y.contiguous()
        # the adjoint state g[l] = C[l] ∂y[l] + exp(Δ[l+1] A) g[l+1] runs backwards through the same recursion
        carry = torch.zeros_like(history[0])
        for block in reversed(_blocks(length, carry)):
            start, stop = block.start, block.stop
            step, x = delta[block], u[block]
            decay = (step.unsqueeze(3) * A).exp_()
            adjoint = grad_y[block].unsqueeze(3) * C[block].unsqueeze(-1)
            following = torch.empty_like(decay)
            following[:-1] = decay[1:]
            following[-1] = 0 if stop == length else (delta[stop].unsqueeze(2) * A).exp_()
            _advance(following, adjoint, carry, reverse=True)
            carry = adjoint[0]
            torch.matmul(history[block], grad_y[block].unsqueeze(-1), out=grad_C[block].unsqueeze(-1))
            torch.matmul(adjoint, (step * x).unsqueeze(-1), out=grad_B[block].unsqueeze(-1))
            grad_source = torch.matmul(B[block].unsqueeze(3), adjoint).squeeze(3)
            # through the decay: ∂a[l] = g[l] h[l-1], ∂(ΔA) = ∂a · a
            if start == 0:
                grad_decay = torch.zeros_like(decay)
                torch.mul(adjoint[1:], history[: stop - 1], out=grad_decay[1:])
            else:
                grad_decay = adjoint * history[start - 1 : stop - 1]
            grad_decay.mul_(decay)
            grad_A += (grad_decay * step.unsqueeze(3)).sum((0, 1))
            grad_u[block] = grad_source * step
            grad_delta[block] = (grad_decay * A).sum(3).addcmul_(grad_source, x)
        return grad_u, grad_delta, grad_A, grad_B, grad_C
