"""How much SSIM a pair of sources allows at all: an image optimised for nothing else."""

from __future__ import annotations

import numpy as np

from ..errors import require
from .metrics import ssim


def ssim_ceiling(a: np.ndarray, b: np.ndarray, steps: int = 200) -> float:
    """The SSIM (mean over the two sources) of an image that gradient ascent made for it; no fusion scores more.

    The climb starts from the pixel-wise maximum and ends in a local optimum: read it as a close lower bound of the
    true ceiling. Deterministic; about 10 s for 256×256 pixels on one core.

    Args:
        a, b: sources (H, W) in [0, 1].
        steps: of Adam, with a cosine schedule from 0.02.

    Raises:
        MissingDependencyError: torch or MONAI is missing.
    """
    torch = require("torch", "the SSIM ceiling", "torch>=2.4")
    loss = require("monai.losses", "the SSIM ceiling", "monai").SSIMLoss(spatial_dims=2, data_range=1.0)
    a, b = (torch.as_tensor(np.asarray(x, np.float32))[None, None] for x in (a, b))
    fused = torch.maximum(a, b).requires_grad_()
    optimiser = torch.optim.Adam([fused], 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        (loss(fused, a) + loss(fused, b)).backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            fused.clamp_(0, 1)
    return ssim(*(x.detach()[0, 0].numpy() for x in (fused, a, b)))
