"""Mamba layers over feature maps: several scan directions (latent) and two inputs (fusion).

Source: Zhou and Khalvati, arXiv 2508.03008, section 2.2; Gu and Dao, arXiv 2312.00752.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig
from ..ops.scan_order import DIRECTIONS, scan_axes, scan_orders
from ..ops.selective_scan import selective_scan


class DirectionalScan(nn.Module):
    """Causal convolution and selective scan along K token orders, put back in image order and averaged.

    Each direction has its own parameters. The scanned sequence and the sequence that decides Δ, B and C
    (what the scan keeps and forgets) may be two different ones.

    Shape:
        sequences: one for each axis order of the scan, (B, P, L, E); context: the same shape, or None.
        Returns (B, L, E).
    """

    def __init__(self, config: ModelConfig, two_inputs: bool = False):
        super().__init__()
        self.scan = config.scan
        self.axes = scan_axes(config.scan)
        self.rank, self.states, self.taps = config.dt_rank, config.d_state, config.d_conv
        self.backend = "auto"
        directions, inner = len(DIRECTIONS[config.scan]), config.d_inner
        self.conv = self._causal_conv(directions * inner)
        self.context_conv = self._causal_conv(directions * inner) if two_inputs else None
        self.x_proj = nn.Parameter(torch.empty(directions, self.rank + 2 * self.states, inner))
        self.dt_proj = nn.Parameter(torch.empty(directions, inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(directions * inner))
        self.A_log = nn.Parameter(torch.empty(directions * inner, self.states))
        self.D = nn.Parameter(torch.ones(directions * inner))
        self.reset_parameters()

    def _causal_conv(self, channels: int) -> nn.Conv1d:
        return nn.Conv1d(channels, channels, self.taps, groups=channels, padding=self.taps - 1)

    def reset_parameters(self) -> None:
        """Mamba's initialisation: A = -(1..N), Δ log-uniform in 0.001..0.1 (arXiv 2312.00752, section 3.6)."""
        inner = self.x_proj.shape[-1]
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            step = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            self.A_log.copy_(torch.log(torch.arange(1.0, self.states + 1)).expand_as(self.A_log))

    def _in_scan_order(self, sequences, orders, conv):
        gathered = [
            sequences[:, axis].index_select(1, order) for axis, order in zip(self.axes, orders)
        ]  # K × (B, L, E)
        x = torch.stack(gathered, 1).transpose(2, 3).flatten(1, 2)  # (B, K*E, L)
        return F.silu(conv(x)[..., : x.shape[-1]])

    def forward(self, sequences: torch.Tensor, shape: tuple[int, ...], context: torch.Tensor | None = None):
        orders, inverses = scan_orders(shape, self.scan, sequences.device)
        directions = len(orders)
        u = self._in_scan_order(sequences, orders, self.conv)
        chooser = u if context is None else self._in_scan_order(context, orders, self.context_conv)
        chosen = torch.einsum("kre,bkel->bkrl", self.x_proj, chooser.unflatten(1, (directions, -1)))
        low_rank, B, C = chosen.split([self.rank, self.states, self.states], dim=2)
        delta = torch.einsum("ker,bkrl->bkel", self.dt_proj, low_rank).flatten(1, 2)
        delta = F.softplus(delta + self.dt_bias[:, None])
        y = selective_scan(u, delta, -torch.exp(self.A_log), B, C, self.D, backend=self.backend)
        y = y.unflatten(1, (directions, -1))
        back = [y[:, k].index_select(-1, inverses[k]) for k in range(directions)]
        return (sum(back) / directions).transpose(1, 2)


class MambaLayer(nn.Module):
    """Pre-norm residual Mamba layer on a feature map (B, C, H, W) or (B, C, D, H, W).

    The outputs of the scan directions are averaged, normalised, gated and projected. Each axis order (rows and
    columns in 2D, the three planes in 3D) has its own input projection; a direction and its reverse share it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.channels[-1], config.d_inner
        self.axis_count = len(set(scan_axes(config.scan)))
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, (self.axis_count + 1) * inner, bias=False)
        self.directions = DirectionalScan(config)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.in_proj(self.norm(x.flatten(2).transpose(1, 2)))
        *sequences, gate = projected.chunk(self.axis_count + 1, dim=-1)
        y = self.directions(torch.stack(sequences, 1), tuple(x.shape[2:]))
        y = self.out_proj(self.out_norm(y) * F.silu(gate))
        return x + y.transpose(1, 2).reshape(x.shape)


class FusionMamba(nn.Module):
    """Mamba layer with two inputs: sequence and gate from ``x``; Δ, B and C from ``context``.

    Shape: both (B, C, H, W) or (B, C, D, H, W); returns the same, with ``x`` as the residual.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.channels[-1], config.d_inner
        self.axis_count = len(set(scan_axes(config.scan)))
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, (self.axis_count + 1) * inner, bias=False)
        self.context_proj = nn.Linear(width, self.axis_count * inner, bias=False)
        self.directions = DirectionalScan(config, two_inputs=True)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        *sequences, gate = self.in_proj(self.norm(x.flatten(2).transpose(1, 2))).chunk(self.axis_count + 1, dim=-1)
        other = self.context_proj(self.context_norm(context.flatten(2).transpose(1, 2)))
        other = torch.stack(other.chunk(self.axis_count, dim=-1), 1)
        y = self.directions(torch.stack(sequences, 1), tuple(x.shape[2:]), other)
        y = self.out_proj(self.out_norm(y) * F.silu(gate))
        return x + y.transpose(1, 2).reshape(x.shape)
