"""RGB and YCbCr for functional images shown in colour: luma is fused, chroma is kept.

Source: ITU-R BT.601 with full range (JPEG), as the fusion literature uses it.
"""

from __future__ import annotations

import numpy as np

# rows: Y, Cb, Cr; columns: R, G, B; the chroma rows are centred on zero
_TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
_TO_RGB = np.linalg.inv(_TO_YCBCR.astype(np.float64)).astype(np.float32)


def rgb_to_ycbcr(rgb: np.ndarray) -> np.ndarray:
    """8-bit RGB (..., 3) to Y in [0, 1] and Cb, Cr in [-0.5, 0.5], float32 (..., 3)."""
    return (np.asarray(rgb, np.float32) / 255) @ _TO_YCBCR.T


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """Inverse of :func:`rgb_to_ycbcr`, rounded and clipped to uint8."""
    return np.clip(np.rint(np.asarray(ycbcr, np.float32) @ _TO_RGB.T * 255), 0, 255).astype(np.uint8)


def luma(rgb: np.ndarray) -> np.ndarray:
    """Y of 8-bit RGB (..., 3), float32 in [0, 1]."""
    return np.clip(rgb_to_ycbcr(rgb)[..., 0], 0, 1)
