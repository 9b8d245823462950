"""Baseline fusions, the ones a user could pick instead of a network.

Every baseline is ``f(a, b) -> fused`` on arrays (H, W) or (D, H, W) with values in [0, 1]; float32 in [0, 1] comes
back. Volumes are fused in 3D; volumes of fewer than 16 slices slice by slice, as the filters need room. Spacing is not
used.

Raises :class:`InputError` for arrays that are not 2D or 3D, of different shapes, empty, or with NaN or infinite values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ..errors import InputError, require

MINIMUM_SLICES = 16


def _prepare(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise InputError(f"the sources must have one shape, got {a.shape} and {b.shape}; resample one onto the other")
    if a.ndim not in (2, 3) or a.size == 0:
        raise InputError(f"expected arrays (H, W) or (D, H, W), got {a.shape}; give colour images as their luma")
    for name, array in (("a", a), ("b", b)):
        if not np.isfinite(array).all():
            raise InputError(f"source {name} has NaN or infinite values; replace them before fusing")
    return a.astype(np.float32), b.astype(np.float32)


def _fuse(function: Callable[[np.ndarray, np.ndarray], np.ndarray], a, b) -> np.ndarray:
    a, b = _prepare(a, b)
    if a.ndim == 3 and len(a) < MINIMUM_SLICES:
        fused = np.stack([function(x, y) for x, y in zip(a, b, strict=True)])
    else:
        fused = function(a, b)
    return np.clip(fused, 0, 1).astype(np.float32)


def _larger(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each pair of coefficients the one of larger magnitude."""
    return np.where(np.abs(x) >= np.abs(y), x, y)


def average(a, b) -> np.ndarray:
    """Mean of the sources."""
    return _fuse(lambda x, y: (x + y) / 2, a, b)


def maximum(a, b) -> np.ndarray:
    """Larger of the sources, pixel by pixel."""
    return _fuse(np.maximum, a, b)


def source_a(a, b) -> np.ndarray:
    """Source a alone; what a metric gives to a fusion that ignores b."""
    return _fuse(lambda x, y: x, a, b)


def source_b(a, b) -> np.ndarray:
    """Source b alone; what a metric gives to a fusion that ignores a."""
    return _fuse(lambda x, y: y, a, b)


def laplacian_pyramid(a, b, *, base: str = "average") -> np.ndarray:
    """Laplacian pyramid: details of larger magnitude; the coarsest level is the mean, or the maximum, of the sources'.

    Kernel 1 4 6 4 1 along each axis, four levels or as many as leave 4 voxels a side. ``base="maximum"`` dims bright
    bone less, which raises SCD and VIF and lowers SSIM and QABF a little.

    References:
        P. Burt, E. Adelson, "The Laplacian pyramid as a compact image code", IEEE Trans. Communications 31(4), 1983.
    """
    if base not in ("average", "maximum"):
        raise InputError(f"unknown base {base!r} of the pyramid; use 'average' or 'maximum'")
    merge = np.maximum if base == "maximum" else lambda x, y: (x + y) / 2
    return _fuse(lambda x, y: _laplacian_pyramid(x, y, merge), a, b)


def _laplacian_pyramid(a: np.ndarray, b: np.ndarray, merge: Callable) -> np.ndarray:
    details, shapes = [], []
    while len(details) < 4 and min(a.shape) >= 8:
        coarse_a, coarse_b = _reduce(a), _reduce(b)
        details.append(_larger(a - _expand(coarse_a, a.shape), b - _expand(coarse_b, b.shape)))
        shapes.append(a.shape)
        a, b = coarse_a, coarse_b
    fused = merge(a, b)
    for detail, shape in zip(reversed(details), reversed(shapes), strict=True):
        fused = _expand(fused, shape) + detail
    return fused


def _binomial(image: np.ndarray, gain: float) -> np.ndarray:
    kernel = np.array([1, 4, 6, 4, 1], np.float32) * gain / 16
    for axis in range(image.ndim):
        image = ndimage.convolve1d(image, kernel, axis=axis, mode="mirror")
    return image


def _reduce(image: np.ndarray) -> np.ndarray:
    return _binomial(image, 1)[(slice(None, None, 2),) * image.ndim]


def _expand(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    spread = np.zeros(shape, np.float32)
    spread[(slice(None, None, 2),) * image.ndim] = image
    # Half of the samples are zeros along each axis.
    return _binomial(spread, 2)


def wavelet(a, b) -> np.ndarray:
    """Discrete wavelet transform: details of larger magnitude, mean approximation.

    Daubechies 1 (Haar), up to three levels: longer wavelets ring into the black background, which costs SSIM and FSIM
    on CT-MRI pairs. Needs PyWavelets.

    References:
        H. Li, B. S. Manjunath, S. K. Mitra, "Multisensor image fusion using the wavelet transform", Graphical Models
        and Image Processing 57(3), 1995.
    """
    return _fuse(_wavelet, a, b)


def _wavelet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    pywt = require("pywt", "the wavelet baseline", "PyWavelets")
    level = min(3, pywt.dwtn_max_level(a.shape, "db1"))
    (base_a, *details_a), (base_b, *details_b) = (pywt.wavedecn(image, "db1", level=level) for image in (a, b))
    fused = [(base_a + base_b) / 2]
    for level_a, level_b in zip(details_a, details_b, strict=True):
        fused.append({key: _larger(level_a[key], level_b[key]) for key in level_a})
    return pywt.waverecn(fused, "db1")[tuple(slice(size) for size in a.shape)]


def guided_filter(a, b) -> np.ndarray:
    """Fusion with guided filtering (GFF).

    Base = mean over a box of 31, detail = the rest. Saliency = |Laplacian| smoothed by a Gaussian of sigma 5 cut at
    radius 5; the binary map of the most salient source is refined by a guided filter with that source as guide, radius
    45 and eps 0.3 for the base, radius 7 and eps 1e-6 for the detail; the weights are normalised to the sum 1.

    References:
        S. Li, X. Kang, J. Hu, "Image fusion with guided filtering", IEEE TIP 22(7), 2013.
        K. He, J. Sun, X. Tang, "Guided image filtering", IEEE TPAMI 35(6), 2013.
    """
    return _fuse(_guided_filter, a, b)


def _guided_filter(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # float64: the detail filter's eps of 1e-6 is near the rounding error of float32 variances.
    sources = [a.astype(np.float64), b.astype(np.float64)]
    bases = [ndimage.uniform_filter(source, 31) for source in sources]
    saliency = [ndimage.gaussian_filter(np.abs(ndimage.laplace(source)), 5, truncate=1) for source in sources]
    peak = np.maximum(*saliency)
    masks = [(each == peak).astype(np.float64) for each in saliency]
    details = [source - base for source, base in zip(sources, bases, strict=True)]
    fused = np.zeros(a.shape)
    for layers, radius, eps in ((bases, 45, 0.3), (details, 7, 1e-6)):
        weights = [
            np.clip(_guide(source, mask, radius, eps), 0, 1) + 1e-12
            for source, mask in zip(sources, masks, strict=True)
        ]
        fused += (weights[0] * layers[0] + weights[1] * layers[1]) / (weights[0] + weights[1])
    return fused


def _guide(guide: np.ndarray, image: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """Guided filter with box windows of side 2 radius + 1."""

    def box(x: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(x, 2 * radius + 1)

    mean_guide, mean_image = box(guide), box(image)
    slope = (box(guide * image) - mean_guide * mean_image) / (box(guide * guide) - mean_guide**2 + eps)
    offset = mean_image - slope * mean_guide
    return box(slope) * guide + box(offset)


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "average": average,
    "maximum": maximum,
    "laplacian_pyramid": laplacian_pyramid,
    "wavelet": wavelet,
    "guided_filter": guided_filter,
    "source_a": source_a,
    "source_b": source_b,
}
