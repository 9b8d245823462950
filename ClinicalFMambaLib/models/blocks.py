"""Convolutional building blocks: dilated gated convolutions and cross-modal channel attention.

Source: Zhou and Khalvati, arXiv 2508.03008, section 2.
"""

from __future__ import annotations

import torch
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SLOPE = 0.2


class DilatedGatedConvBlock(nn.Module):
    """DGCB: the product of a 3×3 and a 1×1 branch, each normalised and rectified, gates a dilated 3×3 convolution.

    Shape: (B, C, H, W) or (B, C, D, H, W) to the same; residual.
    """

    def __init__(self, dimension: int, channels: int, dilation: int):
        super().__init__()
        conv, norm = CONV[dimension], NORM[dimension]
        # no bias before a normalisation: its shift makes one redundant
        self.local = nn.Sequential(
            conv(channels, channels, 3, padding=1, bias=False), norm(channels), nn.LeakyReLU(SLOPE)
        )
        self.point = nn.Sequential(conv(channels, channels, 1, bias=False), norm(channels), nn.LeakyReLU(SLOPE))
        self.dilated = conv(channels, channels, 3, padding=dilation, dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dilated(self.local(x) * self.point(x))


class CrossModalChannelAttention(nn.Module):
    """CMCA: global pools of the reference modality weigh the channels of the query modality.

    Shape: both (B, C, H, W) or (B, C, D, H, W); returns the same.
    """

    def __init__(self, dimension: int, channels: int):
        super().__init__()
        self.query = CONV[dimension](channels, channels, 1)
        self.reference = CONV[dimension](channels, channels, 1)

    def weights(self, reference: torch.Tensor) -> torch.Tensor:
        """One weight in (0, 1) for each channel, (B, C)."""
        pooled = self.reference(reference).flatten(2)
        # max rather than amax: its gradient goes to one voxel, without passes over the whole map
        return torch.sigmoid(pooled.mean(-1) + pooled.max(-1).values)

    def forward(self, query: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        weights = self.weights(reference)
        return self.query(query) * weights.reshape(*weights.shape, *[1] * (query.dim() - 2))


class UpsampleBlock(nn.Module):
    """Nearest upsampling ×2, 3×3 convolution, normalisation, LeakyReLU: (B, C, H, W) to (B, C', 2H, 2W), or 3D."""

    def __init__(self, dimension: int, channels: int, out_channels: int):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv = CONV[dimension](channels, out_channels, 3, padding=1, bias=False)
        self.norm = NORM[dimension](out_channels)
        self.activation = nn.LeakyReLU(SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(self.upsample(x))))
