"""Loss of a fused image against its two sources.

Source of the first three terms: Zhou and Khalvati, arXiv 2508.03008, section 2.4. The others answer what these
leave open (the paper's loss alone tends toward the pixel-wise maximum) and are zero in the paper's preset.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from monai.losses import SSIMLoss
from torch import nn


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of :class:`FusionLoss`.

    Attributes:
        pixel: mean |F - max(A, B)|.
        gradient: mean | |∇F| - max(|∇A|, |∇B|) | with Sobel gradients.
        ssim: 1 - (SSIM(A, F) + SSIM(B, F)) / 2.
        edge: 1 - Q^AB/F, the share of the sources' edge strength and orientation that F keeps.
        vif: 1 - (VIF(A, F) + VIF(B, F)) / 2, visual information fidelity in the pixel domain, capped at one. Pulls
            toward a copy of one source; on CT-MRI pairs a weight of 2 lost the MRI's lesions.
        scd: 1 - SCD / 2, the correlations of what F adds to one source with the other source.
        symmetry: mean |F(A, B) - F(B, A)|, for sources without an order, such as two MRI contrasts: keeps a network
            from following the one or the other input. Doubles what a step computes.
    """

    pixel: float = 2.0
    gradient: float = 10.0
    ssim: float = 5.0
    edge: float = 0.0
    vif: float = 0.0
    scd: float = 0.0
    symmetry: float = 0.0


class FusionLoss(nn.Module):
    """Weighted sum of the terms of :class:`LossWeights`.

    Shape: fused, a, b all (B, 1, H, W) or (B, 1, D, H, W) in [0, 1]. Returns the loss and its unweighted terms.
    ``swapped`` is what the network makes of the sources in the other order; only the symmetry term needs it.
    In 3D the edge, VIF and gradient terms are taken on orthogonal slices.
    """

    def __init__(self, dimension: int, weights: LossWeights | None = None):
        super().__init__()
        self.weights = weights or LossWeights()
        self.ssim = SSIMLoss(spatial_dims=2, data_range=1.0, win_size=11) if dimension == 2 else ssim_loss_3d

    def forward(self, fused, a, b, swapped=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        compute = {
            "pixel": lambda: (fused - torch.maximum(a, b)).abs().mean(),
            "gradient": lambda: gradient_loss(fused, a, b),
            "ssim": lambda: (self.ssim(fused, a) + self.ssim(fused, b)) / 2,
            "edge": lambda: 1 - edge_preservation(*(slices(x) for x in (fused, a, b))),
            "vif": lambda: (
                1 - (visual_information(slices(fused), slices(a)) + visual_information(slices(fused), slices(b))) / 2
            ),
            "scd": lambda: 1 - (correlation(fused - b, a) + correlation(fused - a, b)) / 2,
            "symmetry": lambda: (fused - swapped).abs().mean(),
        }
        weights = {field.name: getattr(self.weights, field.name) for field in fields(self.weights)}
        terms = {name: compute[name]() for name, weight in weights.items() if weight}
        return sum(weights[name] * term for name, term in terms.items()), {k: v.detach() for k, v in terms.items()}


def ssim_loss_3d(fused: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """1 - SSIM of volumes (B, 1, D, H, W) in [0, 1] over uniform 7³ windows that lie inside, as MONAI defines it.

    MONAI's own loss convolves with the whole 7³ kernel, whose gradient costs a third of a training step on the CPU;
    the same window is separable.

    Source: Wang et al., IEEE TIP 13(4), 2004, eq. 13.
    """
    moments = torch.cat([fused, source, fused * fused, source * source, fused * source]).float()
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = 7
        moments = F.conv3d(moments, moments.new_full((1, 1, *kernel), 1 / 7))
    mean_f, mean_s, ff, ss, fs = moments.chunk(5)
    product, squares = mean_f * mean_s, mean_f**2 + mean_s**2
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * product + c1) * (2 * (fs - product) + c2) / ((squares + c1) * (ff + ss - squares + c2))
    return 1 - ssim.mean()


def slices(x: torch.Tensor) -> torch.Tensor:
    """Volumes (B, 1, D, H, W) as their axial slices (B*D, 1, H, W); images unchanged."""
    return x if x.dim() == 4 else x.transpose(1, 2).flatten(0, 1)


def planes(x: torch.Tensor) -> list[torch.Tensor]:
    """The slices of a volume (B, 1, D, H, W) in each orthogonal orientation; an image (B, 1, H, W) alone."""
    return [x] if x.dim() == 4 else [slices(x), slices(x.transpose(2, 3)), slices(x.transpose(2, 4))]


def sobel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sobel derivatives of (B, 1, H, W) along W and H, scaled so that a unit step gives 1; edges replicated."""
    kernel = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(x, torch.stack([kernel, kernel.T])[:, None])
    return gradient[:, :1], gradient[:, 1:]


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """|∇x| as |∂x| + |∂y|, for each plane orientation of a volume."""
    gx, gy = sobel(x)
    return gx.abs() + gy.abs()


def gradient_loss(fused, a, b) -> torch.Tensor:
    """mean | |∇F| - max(|∇A|, |∇B|) |, over the three slice orientations in 3D."""
    triples = zip(planes(fused), planes(a), planes(b))
    terms = [(magnitude(f) - torch.maximum(magnitude(x), magnitude(y))).abs().mean() for f, x, y in triples]
    return sum(terms) / len(terms)


def edge_preservation(fused, a, b) -> torch.Tensor:
    """Differentiable Q^AB/F of (B, 1, H, W): Xydeas and Petrović, Electronics Letters 36(4), 2000, eq. 1 to 9."""
    eps = 1e-6
    fx, fy = sobel(fused)
    strength_f = torch.sqrt(fx**2 + fy**2 + eps)
    total = weight_sum = 0
    for source in (a, b):
        sx, sy = sobel(source)
        strength = torch.sqrt(sx**2 + sy**2 + eps)
        ratio = torch.minimum(strength_f, strength) / torch.maximum(strength_f, strength)
        # the angle between undirected gradients, 1 for parallel and 0 for orthogonal
        cosine = ((fx * sx + fy * sy) / (strength_f * strength)).abs().clamp(max=1 - 1e-4)
        orientation = 1 - torch.acos(cosine) * (2 / torch.pi)
        kept = 0.9994 / (1 + torch.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + torch.exp(-22 * (orientation - 0.8)))
        total = total + (kept * strength).sum((1, 2, 3))
        weight_sum = weight_sum + strength.sum((1, 2, 3))
    return (total / weight_sum.clamp(min=eps)).mean()


def visual_information(fused: torch.Tensor, source: torch.Tensor, noise: float = 2.0) -> torch.Tensor:
    """Differentiable VIF-P of (B, 1, H, W): Sheikh and Bovik, IEEE TIP 15(2), 2006, in the pixel domain.

    The Gaussian windows are separable, so four scales cost little. Scales for which the image is too small are
    left out.
    """
    fused, source = fused * 255, source * 255
    eps = 1e-6
    kept = possible = fused.new_zeros(len(fused))
    for scale in range(4):
        size = 2 ** (4 - scale) + 1
        if min(fused.shape[-2:]) < size:
            continue
        if scale:
            if min(fused.shape[-2:]) < 3 * size - 1:  # blurred, halved, blurred again
                break
            fused, source = _blur(fused, size)[..., ::2, ::2], _blur(source, size)[..., ::2, ::2]
        mean_f, mean_s = _blur(fused, size), _blur(source, size)
        var_f = (_blur(fused**2, size) - mean_f**2).clamp(min=0)
        var_s = (_blur(source**2, size) - mean_s**2).clamp(min=0)
        covariance = (_blur(fused * source, size) - mean_f * mean_s).clamp(min=0)
        gain = covariance / (var_s + eps)
        distortion = (var_f - gain * covariance).clamp(min=eps)
        kept = kept + torch.log(1 + gain**2 * var_s / (distortion + noise)).sum((1, 2, 3))
        possible = possible + torch.log(1 + var_s / noise).sum((1, 2, 3))
    # an empty crop carries no information: count it as kept
    return torch.where(possible > 1, kept / possible.clamp(min=1), 1.0).clamp(max=1).mean()


def _blur(x: torch.Tensor, size: int) -> torch.Tensor:
    position = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    kernel = torch.exp(-(position**2) / (2 * (size / 5) ** 2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x, kernel[None, None, None, :]), kernel[None, None, :, None])


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of each pair in the batch, averaged; 0 where one of them is constant."""
    x, y = x.flatten(1), y.flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return ((x * y).sum(1) / torch.sqrt((x * x).sum(1) * (y * y).sum(1) + 1e-8)).mean()
