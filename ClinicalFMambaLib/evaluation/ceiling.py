"""How much SSIM and Q^AB/F a pair of sources allows at all: an image optimised for nothing else."""

from __future__ import annotations

import numpy as np

from ..errors import require
from .metrics import ssim


def ssim_ceiling(a: np.ndarray, b: np.ndarray, steps: int = 200) -> float:
    """The SSIM (mean over the two sources) of the image of :func:`best_image`; no fusion scores much more.

    Args:
        a, b: sources (H, W) in [0, 1].
        steps: as for :func:`best_image`.

    Raises:
        MissingDependencyError: torch or MONAI is missing.
    """
    return ssim(best_image(a, b, steps=steps), a, b)


def best_image(a: np.ndarray, b: np.ndarray, edge: float = 0.0, steps: int = 200) -> np.ndarray:
    """An image that gradient ascent made for SSIM + ``edge`` · Q^AB/F.

    The climb starts from the pixel-wise maximum and ends in a local optimum: read its score as a close lower bound of
    the true ceiling. Deterministic; about 10 s for 256×256 pixels on one core.

    Args:
        a, b: sources (H, W) in [0, 1].
        edge: weight of Q^AB/F beside that of SSIM (mean over the two sources).
        steps: of Adam, with a cosine schedule from 0.02.

    Raises:
        MissingDependencyError: torch or MONAI is missing.
    """
    torch = require("torch", "the ceiling", "torch>=2.4")
    require("monai.losses", "the ceiling", "monai")
    from ..training.losses import FusionLoss, LossWeights

    loss = FusionLoss(2, LossWeights(pixel=0, gradient=0, ssim=1, edge=edge))
    a, b = (torch.as_tensor(np.asarray(x, np.float32))[None, None] for x in (a, b))
    fused = torch.maximum(a, b).requires_grad_()
    optimiser = torch.optim.Adam([fused], 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(fused, a, b)[0].backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            fused.clamp_(0, 1)
    return fused.detach()[0, 0].numpy()
