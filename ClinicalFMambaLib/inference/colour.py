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
    """Inverse of :func:`rgb_to_ycbcr`, uint8; a colour that RGB does not hold pales until it does.

    Clipping the channels instead would change the luma, and with it what was fused: by up to a third where the MRI is
    bright below a saturated colour. Luma and hue stay.
    """
    ycbcr = np.asarray(ycbcr, np.float32)
    grey = np.clip(ycbcr[..., :1], 0, 1)
    colour = ycbcr[..., 1:] @ _TO_RGB[:, 1:].T
    room = np.where(colour > 0, 1 - grey, grey)
    # not above one; the smallest share of the three channels
    share = np.min(room / np.maximum(np.abs(colour), np.maximum(room, 1e-6)), axis=-1, keepdims=True)
    return np.rint((grey + share * colour) * 255).astype(np.uint8)


def luma(rgb: np.ndarray) -> np.ndarray:
    """Y of 8-bit RGB (..., 3), float32 in [0, 1]."""
    return np.clip(rgb_to_ycbcr(rgb)[..., 0], 0, 1)
