"""ClinicalFMamba-2D and -3D.

Source: Zhou and Khalvati, "ClinicalFMamba: Advancing Clinical Assessment using Mamba-based Multimodal
Neuroimaging Fusion", arXiv 2508.03008, section 2 and figure 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig
from ..errors import InputError
from ..ops.selective_scan import scan_flops
from .blocks import CONV, CrossModalChannelAttention, DilatedGatedConvBlock, UpsampleBlock
from .mamba import DirectionalScan, FusionMamba, MambaLayer

STRIDE = 8  # three stride-2 levels


class ClinicalFMamba(nn.Module):
    """Fuses two registered images or volumes in [0, 1] into one.

    Shape:
        a, b: (B, 1, H, W) for ``config.dimension == 2``, (B, 1, D, H, W) for 3; any size of at least one.
        Returns the same shape, in [0, 1].

    The first input is the anatomical modality (MRI) that the model was trained with, the second the other one.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        dimension, channels = config.dimension, config.channels
        conv = CONV[dimension]
        self.stem = conv(1, channels[0], 3, padding=1)
        widths = (channels[0], *channels)
        self.encoder = nn.ModuleList(
            nn.Sequential(conv(width, out, 2, stride=2), DilatedGatedConvBlock(dimension, out, dilation))
            for width, out, dilation in zip(widths, channels, config.dilations)
        )
        self.latent_a = nn.Sequential(*(MambaLayer(config) for _ in range(config.mamba_layers)))
        self.latent_b = nn.Sequential(*(MambaLayer(config) for _ in range(config.mamba_layers)))
        self.fusion_ab = FusionMamba(config)
        self.fusion_ba = FusionMamba(config)
        self.mix = nn.Linear(channels[-1], channels[-1])
        self.cmca_ab = CrossModalChannelAttention(dimension, channels[0]) if config.cmca else None
        self.cmca_ba = CrossModalChannelAttention(dimension, channels[0]) if config.cmca else None
        down = tuple(reversed(widths))
        self.decoder = nn.Sequential(*(UpsampleBlock(dimension, i, o) for i, o in zip(down, down[1:])))
        self.head = conv(channels[0], config.head_channels, 3, padding=1)

    def set_scan_backend(self, backend: str) -> None:
        """Choose the selective scan's backend for all layers; see :func:`..ops.selective_scan.selective_scan`."""
        for module in self.modules():
            if isinstance(module, DirectionalScan):
                module.backend = backend

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shallow features at full resolution and the 1/8-resolution feature map."""
        shallow = deep = self.stem(x)
        for level in self.encoder:
            deep = level(deep)
        return shallow, deep

    def fuse_tokens(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Latent Mamba for each modality, Fusion Mamba both ways, mean, linear; all at 1/8 resolution."""
        a, b = self.latent_a(a), self.latent_b(b)
        mean = (self.fusion_ab(a, b) + self.fusion_ba(b, a)) / 2
        return self.mix(mean.movedim(1, -1)).movedim(-1, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape != b.shape or a.dim() != self.config.dimension + 2 or a.shape[1] != 1:
            axes = "(B, 1, H, W)" if self.config.dimension == 2 else "(B, 1, D, H, W)"
            raise InputError(
                f"a {self.config.dimension}D model needs two inputs of one shape {axes};"
                f" got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        size = a.shape[2:]
        a, b = pad_to_stride(a), pad_to_stride(b)
        shallow_a, deep_a = self.encode(a)
        shallow_b, deep_b = self.encode(b)
        features = self.decoder(self.fuse_tokens(deep_a, deep_b))
        if self.cmca_ab is not None:
            features = features + self.cmca_ab(shallow_a, shallow_b) + self.cmca_ba(shallow_b, shallow_a)
        fused = fused_from_maps(self.head(features), a, b)
        return fused[(..., *(slice(n) for n in size))]


def fused_from_maps(maps: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The fused image from what the head makes.

    One map: its sigmoid, as in the paper. Two maps w, r: σ(w)·A + (1 - σ(w))·B + r, cut to [0, 1]. The decoder's last
    nonlinear features are at half the resolution and the full-resolution branch (CMCA) is linear in the sources, so a
    single map cannot choose between two sharp edges; a weight can.

    Shape: maps (B, 1 or 2, ...), sources (B, 1, ...); returns (B, 1, ...).
    """
    if maps.shape[1] == 1:
        return torch.sigmoid(maps)
    weight, residual = maps.to(a.dtype).split(1, 1)  # under autocast the head is in half precision
    return torch.lerp(b, a, torch.sigmoid(weight)).add(residual).clamp(0, 1)


def pad_to_stride(x: torch.Tensor, stride: int = STRIDE) -> torch.Tensor:
    """Pad the end of each spatial axis to a multiple of ``stride`` by reflection.

    An axis that is too short to be reflected (a single slice, say) is continued with its edge.
    """
    spatial = x.shape[2:]
    missing = [-size % stride for size in spatial]
    for axis, (size, more) in enumerate(zip(spatial, missing)):
        if more == 0:
            continue
        pad = [0, 0] * len(spatial)
        pad[2 * (len(spatial) - 1 - axis) + 1] = more
        x = F.pad(x, pad, mode="reflect" if more < size else "replicate")
    return x


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(config: ModelConfig, size: tuple[int, ...]) -> int:
    """Floating-point operations of one forward pass for a pair of ``size`` (H, W) or (D, H, W), a multiple of 8.

    Convolutions and matrix products as torch counts them (two for a multiply-add), plus the scans.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = ClinicalFMamba(config).eval()
        x = torch.empty(1, 1, *size)
    scans = [m for m in model.modules() if isinstance(m, DirectionalScan)]
    tokens = 1
    for n in size:
        tokens *= n // STRIDE
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, x)
    return counter.get_total_flops() + sum(scan_flops(1, m.D.numel(), tokens, m.states) for m in scans)
