"""Metrics of image fusion.

Every metric is ``f(fused, a, b, *, data_range=1.0) -> float`` on arrays (H, W) or (D, H, W) with values in
[0, data_range]; ``a`` and ``b`` are the two sources. Where the definition has constants for 8-bit images (EN, MI, SD,
SF, AG, FSIM, VIF, QABF, NABF), values are scaled to 0..255 first, so numbers compare with those of the literature. EN,
MI, FMI, QABF and NABF also clip and round to 8 bits: they need grey levels, or compare values for equality, where
rounding errors of float images would count as edges.

Volumes: PSNR, SSIM, MS-SSIM, EN, MI, SD, SF, AG, SCD and SHARE are computed in 3D; FSIM, FMI, VIF, QABF and NABF are
defined for images, so they are the mean over the axial slices (axis 0) in which at least one source is not constant;
nan if there is none. A volume of one slice is an image. Voxels are taken as they are: spacing is not used.

Errors, the same for all: :class:`InputError` for arrays that are not 2D or 3D, of different shapes, with NaN or
infinite values, or smaller than the metric's window (``METRICS[name].minimum_side``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage
from scipy.special import expit

from ..errors import InputError, require

PSNR_CAP = 100.0
# SHARE below which one source counts as ignored. A fusion that shows both sources in grey has 0.3 at least; one of two
# MRI contrasts with 0.17 to 0.19 was first by its other metrics and had lost what enhances.
IGNORED_SHARE = 0.2
SSIM_SIDE = 11
VIF_SIDE = 41
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class Metric(NamedTuple):
    """An entry of :data:`METRICS`.

    ``higher_is_better`` is None where a better fusion may have either; ``minimum_side`` is the shortest height and
    width (voxels); ``native_3d`` tells whether volumes are measured in 3D or slice by slice; ``needs_torch`` whether
    torch and torchmetrics must be installed.
    """

    function: Callable[..., float]
    higher_is_better: bool | None
    description: str
    minimum_side: int
    native_3d: bool
    needs_torch: bool = False


def _prepare(fused, a, b, data_range: float, side: int) -> list[np.ndarray]:
    """Fused image and sources as float64 in [0, 1], checked; a volume of one slice becomes an image."""
    if not data_range > 0:
        raise InputError(f"data_range must be positive, got {data_range}; give the largest possible value")
    arrays = [np.asarray(array) for array in (fused, a, b)]
    shapes = [array.shape for array in arrays]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise InputError(
            f"fused image and sources must have one shape, got {shapes[0]}, {shapes[1]}, {shapes[2]}; resample first"
        )
    if len(shapes[0]) not in (2, 3):
        raise InputError(f"expected arrays (H, W) or (D, H, W), got {shapes[0]}; give colour images as their luma")
    if arrays[0].size == 0 or min(shapes[0][-2:]) < side:
        raise InputError(f"expected at least {side} x {side} pixels, got shape {shapes[0]}; use a larger image")
    for name, array in zip(("fused image", "source a", "source b"), arrays, strict=True):
        if not np.isfinite(array).all():
            raise InputError(f"{name} has NaN or infinite values; replace them before measuring")
    arrays = [array.astype(np.float64) / data_range for array in arrays]
    if arrays[0].ndim == 3 and len(arrays[0]) == 1:
        arrays = [array[0] for array in arrays]
    return arrays


def _grey_levels(array: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.int64)


def _by_slice(function: Callable[..., float], fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The function itself for an image; for a volume its mean over the axial slices that have content."""
    if fused.ndim == 2:
        return float(function(fused, a, b))
    values = [function(f, x, y) for f, x, y in zip(fused, a, b, strict=True) if np.ptp(x) > 0 or np.ptp(y) > 0]
    return float(np.mean(values)) if values else float("nan")


def psnr(fused, a, b, *, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, mean over the two sources.

    10 log10(data_range^2 / MSE(F, S)) for S = A and S = B. An exact copy counts as 100 dB instead of infinity, so that
    means stay finite. 3D natively.

    References:
        Z. Wang, A. C. Bovik, "Mean squared error: love it or leave it?", IEEE Signal Processing Magazine 26(1), 2009.
    """
    fused, a, b = _prepare(fused, a, b, data_range, 1)
    errors = [max(float(np.mean((fused - source) ** 2)), 10 ** (-PSNR_CAP / 10)) for source in (a, b)]
    return float(np.mean([-10 * np.log10(error) for error in errors]))


def ssim(fused, a, b, *, data_range: float = 1.0) -> float:
    """Structural similarity, mean over the two sources.

    Gaussian window of sigma 1.5 and side 11, K1 = 0.01, K2 = 0.03, population covariance, mean over all positions where
    the window fits. 3D natively (11 x 11 x 11 window); volumes of fewer than 11 slices are measured slice by slice.
    Two constant images give the luminance term alone.

    References:
        Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4),
        2004.
    """
    fused, a, b = _prepare(fused, a, b, data_range, SSIM_SIDE)
    if fused.ndim == 3 and len(fused) < SSIM_SIDE:
        return _by_slice(_ssim_mean, fused, a, b)
    return _ssim_mean(fused, a, b)


def _ssim_mean(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([_ssim_terms(source, fused)[0] for source in (a, b)]))


def ms_ssim(fused, a, b, *, data_range: float = 1.0) -> float:
    """Multi-scale structural similarity, mean over the two sources.

    Product over the scales of the contrast-structure term (at the coarsest scale: SSIM) to the power 0.0448, 0.2856,
    0.3001, 0.2363, 0.1333, with negative terms set to 0; each scale halves the image by 2 x 2 means; the window is that
    of :func:`ssim`. Images with a side below 176 do not hold five scales: as many as fit are used, with the exponents
    normalised to the sum 1. 3D natively, if at least three scales fit (44 slices), else slice by slice.

    References:
        Z. Wang, E. P. Simoncelli, A. C. Bovik, "Multi-scale structural similarity for image quality assessment",
        Asilomar 2003.
    """
    fused, a, b = _prepare(fused, a, b, data_range, SSIM_SIDE)
    if fused.ndim == 3 and len(fused) < 4 * SSIM_SIDE:
        return _by_slice(_ms_ssim_mean, fused, a, b)
    return _ms_ssim_mean(fused, a, b)


def _ms_ssim_mean(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    scales = min(len(MS_SSIM_WEIGHTS), int(np.log2(min(fused.shape) // SSIM_SIDE)) + 1)
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    if scales < len(MS_SSIM_WEIGHTS):
        weights /= weights.sum()
    values = []
    for source in (a, b):
        x, y, value = source, fused, 1.0
        for scale, weight in enumerate(weights):
            similarity, contrast = _ssim_terms(x, y)
            value *= max(similarity if scale == scales - 1 else contrast, 0.0) ** weight
            x, y = _halve(x), _halve(y)
        values.append(value)
    return float(np.mean(values))


def _ssim_terms(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term; separable filters, for volumes a dense window is too slow."""

    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)[(slice(5, -5),) * image.ndim]

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blur(x), blur(y)
    covariance = blur(x * y) - mean_x * mean_y
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * contrast)), float(np.mean(contrast))


def _halve(image: np.ndarray) -> np.ndarray:
    even = image[tuple(slice(0, size // 2 * 2) for size in image.shape)]
    pairs = even.reshape([n for size in even.shape for n in (size // 2, 2)])
    return pairs.mean(axis=tuple(range(1, pairs.ndim, 2)))


def fsim(fused, a, b, *, data_range: float = 1.0) -> float:
    """Feature similarity (grey), mean over the two sources.

    Sum of S_PC S_G PC_m over the sum of PC_m, with PC the phase congruency (log-Gabor filters, 4 scales from 6 pixels,
    4 orientations), PC_m the larger of the two, S_PC = (2 PC1 PC2 + 0.85) / (PC1^2 + PC2^2 + 0.85) and S_G the same of
    the Scharr gradient with 160, on the 0..255 scale. Images are first averaged down by round(shorter side / 256).
    Where no image has any phase congruency (constants), 1. Volumes: slice by slice.

    References:
        L. Zhang et al., "FSIM: a feature similarity index for image quality assessment", IEEE TIP 20(8), 2011.
        P. Kovesi, "Image features from phase congruency", Videre 1(3), 1999.
    """
    fused, a, b = _prepare(fused, a, b, data_range, 16)
    return _by_slice(_fsim_mean, fused, a, b)


def _fsim_mean(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    block = max(1, round(min(fused.shape) / 256))
    images = []
    for image in (fused, a, b):
        height, width = (size // block * block for size in image.shape)
        blocks = image[:height, :width].reshape(height // block, block, width // block, block)
        images.append(blocks.mean(axis=(1, 3)) * 255)
    congruency = [_phase_congruency(images[0]), *(_source_congruency(image) for image in images[1:])]
    gradient = [_scharr(image) for image in images]
    values = []
    for source in (1, 2):
        weight = np.maximum(congruency[0], congruency[source])
        similarity = _similarity(congruency[0], congruency[source], 0.85)
        similarity *= _similarity(gradient[0], gradient[source], 160)
        values.append(np.sum(similarity * weight) / np.sum(weight) if weight.any() else 1.0)
    return float(np.mean(values))


def _similarity(x: np.ndarray, y: np.ndarray, constant: float) -> np.ndarray:
    return (2 * x * y + constant) / (x * x + y * y + constant)


def _scharr(image: np.ndarray) -> np.ndarray:
    kernel = np.array([[3, 0, -3], [10, 0, -10], [3, 0, -3]]) / 16
    return np.hypot(
        ndimage.convolve(image, kernel, mode="constant"), ndimage.convolve(image, kernel.T, mode="constant")
    )


@lru_cache(maxsize=4)
def _log_gabor(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Transfer functions (orientations, scales, H, W), zero frequency first, and their noise gains (orientations)."""
    scales, orientations = 4, 4

    def frequencies(size: int) -> np.ndarray:
        # Odd sizes are spread over [-1/2, 1/2] as in the reference implementation, not over multiples of 1/size.
        half = size // 2
        return np.arange(-half, half + 1) / (size - 1) if size % 2 else np.arange(-half, half) / size

    y, x = np.meshgrid(frequencies(height), frequencies(width), indexing="ij")
    radius = np.hypot(x, y)
    low_pass = fft.ifftshift(1 / (1 + (radius / 0.45) ** 30))
    radius, theta = fft.ifftshift(radius), fft.ifftshift(np.arctan2(-y, x))
    radius[0, 0] = 1
    sigma = np.pi / orientations / 1.2
    filters = np.empty((orientations, scales, height, width))
    for scale in range(scales):
        radial = np.exp(-(np.log(radius * 6 * 2**scale) ** 2) / (2 * np.log(0.55) ** 2)) * low_pass
        radial[0, 0] = 0
        for orientation in range(orientations):
            difference = theta - orientation * np.pi / orientations
            distance = np.abs(np.arctan2(np.sin(difference), np.cos(difference)))
            filters[orientation, scale] = radial * np.exp(-(distance**2) / (2 * sigma**2))
    # The energy that white noise has after all scales, relative to its power at the finest scale.
    summed = np.sum(fft.ifft2(filters).real.sum(axis=1) ** 2, axis=(1, 2)) * height * width
    gains = summed / np.sum(filters[:, 0] ** 2, axis=(1, 2))
    filters.setflags(write=False)
    return filters, gains


def _phase_congruency(image: np.ndarray) -> np.ndarray:
    """Phase congruency with noise compensation, as FSIM defines it; 0 for a constant image."""
    if np.ptp(image) == 0:
        return np.zeros_like(image)
    filters, gains = _log_gabor(*image.shape)
    spectrum = fft.fft2(image)
    energy_sum, amplitude_sum = np.zeros(image.shape), np.zeros(image.shape)
    for bank, gain in zip(filters, gains, strict=True):
        response = fft.ifft2(spectrum * bank)
        total = response.sum(axis=0)
        unit = total / (np.abs(total) + np.finfo(float).eps)
        projected = response * unit.conj()
        energy = np.sum(projected.real - np.abs(projected.imag), axis=0)
        # Noise power from the median response of the finest scale (chi-squared with 2 degrees of freedom).
        tau = np.sqrt(np.median(np.abs(response[0]) ** 2) / np.log(2) * gain)
        # 1.7: the estimate is too high for this measure by about that factor (Kovesi).
        threshold = tau * (np.sqrt(np.pi / 2) + 2 * np.sqrt(2 - np.pi / 2)) / 1.7
        energy_sum += np.maximum(energy - threshold, 0)
        amplitude_sum += np.abs(response).sum(axis=0)
    return energy_sum / (amplitude_sum + np.finfo(float).eps)


def _source_congruency(image: np.ndarray) -> np.ndarray:
    """Phase congruency of a source, kept for the next fused image: it is a quarter of the time of all metrics."""
    return _kept_congruency(image.tobytes(), image.shape)


@lru_cache(maxsize=128)
def _kept_congruency(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    congruency = _phase_congruency(np.frombuffer(data).reshape(shape))
    congruency.setflags(write=False)
    return congruency


def fmi(fused, a, b, *, data_range: float = 1.0, feature: str = "edge") -> float:
    """Feature mutual information, mean over the two sources.

    In each 3 x 3 window the feature values, rescaled to [0, 1] and divided by their sum, are taken as a distribution
    over the nine positions (column by column). The joint distribution of source and fused image is estimated by mixing
    independence and the Frechet bound (upper for correlation >= 0, else lower) so that it has their correlation. The
    value is 2 I(S, F) / (H(S) + H(F)), 1 for equal windows, 0 where one has nothing to share; mean over windows and
    sources. Grey values are rounded to 8 bits, as equality of windows depends on it. Volumes: slice by slice.

    ``feature="edge"``, the default, is the default of the authors' code, which the published tables use (often under
    the name FMI_pixel): a binary edge map, squared Sobel gradient above four times its mean, thinned to local maxima.
    ``feature="pixel"`` takes the grey values themselves; it is lower by 0.1 to 0.2.

    References:
        M. Haghighat, A. Aghagolzadeh, H. Seyedarabi, "A non-reference image fusion metric based on mutual information
        of image features", Computers & Electrical Engineering 37(5), 2011.
        M. Haghighat, M. A. Razian, "Fast-FMI: non-reference image fusion metric", AICT 2014 (the variant computed).
    """
    if feature not in ("edge", "pixel"):
        raise InputError(f"unknown FMI feature {feature!r}; use 'edge' or 'pixel'")
    fused, a, b = (_grey_levels(array) for array in _prepare(fused, a, b, data_range, 3))
    return _by_slice(_fmi_edges if feature == "edge" else _fmi_mean, fused, a, b)


def fmi_pixel(fused, a, b, *, data_range: float = 1.0) -> float:
    """:func:`fmi` with the grey values as feature."""
    return fmi(fused, a, b, data_range=data_range, feature="pixel")


def _fmi_edges(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return _fmi_mean(*(_edge_map(image) for image in (fused, a, b)))


def _edge_map(image: np.ndarray) -> np.ndarray:
    """Thinned Sobel edges, 0 or 1, with MATLAB's automatic threshold."""
    x, y = (np.abs(ndimage.sobel(image, axis=axis, mode="nearest")) for axis in (1, 0))
    strength = x * x + y * y
    padded = np.pad(strength, 1, mode="edge")
    ridge_x = (padded[1:-1, :-2] <= strength) & (strength > padded[1:-1, 2:])
    ridge_y = (padded[:-2, 1:-1] <= strength) & (strength > padded[2:, 1:-1])
    return ((strength > 4 * strength.mean()) & ((x >= y) & ridge_x | (y >= x) & ridge_y)).astype(np.int64)


def _fmi_mean(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    windows = [_windows(image) for image in (fused, a, b)]
    return float(np.mean([_window_information(windows[0], source).mean() for source in windows[1:]]))


def _windows(image: np.ndarray) -> np.ndarray:
    """All 3 x 3 windows, (windows, 9), each column by column."""
    views = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    return views.transpose(0, 1, 3, 2).reshape(-1, 9)


def _window_information(fused: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Normalised mutual information of each pair of windows, both (windows, 9)."""
    value = np.ones(len(fused))
    differ = np.flatnonzero((fused != source).any(axis=1))
    fused, source = fused[differ], source[differ]
    first = inverse = np.arange(len(differ))
    if max(fused.max(initial=0), source.max(initial=0)) <= 1:  # few of the possible pairs of edge maps occur
        codes = np.concatenate([fused, source], axis=1) @ (1 << np.arange(18))
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    information = np.empty(len(first))
    # 4096 windows at a time keep the (windows, 9, 9) arrays in the cache.
    for start in range(0, len(first), 4096):
        part = first[start : start + 4096]
        information[start : start + 4096] = _information(_distribution(fused[part]), _distribution(source[part]))
    value[differ] = information[inverse]
    return value


def _distribution(windows: np.ndarray) -> np.ndarray:
    low = windows.min(axis=1, keepdims=True)
    spread = windows.max(axis=1, keepdims=True) - low
    weights = np.where(spread > 0, (windows - low) / np.maximum(spread, 1), 1.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _entropy_terms(p: np.ndarray) -> np.ndarray:
    # Mixing weights above 1 can make a cell slightly negative; the reference takes the real part of its logarithm.
    size = np.abs(p)
    return -p * np.log2(np.where(size > 0, size, 1))


def _information(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    index = np.arange(1, p.shape[1] + 1)

    def deviation(d: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum((d * index**2).sum(1) - (d * index).sum(1) ** 2, 0))

    def centred(d: np.ndarray) -> np.ndarray:
        return d - d.mean(axis=1, keepdims=True)

    x, y = centred(p), centred(q)
    norm = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    # A constant window leaves rounding noise of about 1e-17 here.
    correlation = np.where(norm > 1e-15, (x * y).sum(1) / np.maximum(norm, 1e-15), 0)
    cumulative_p, cumulative_q = np.cumsum(p, axis=1)[:, :, None], np.cumsum(q, axis=1)[:, None, :]
    independent = cumulative_p * cumulative_q
    bound = np.where(
        correlation[:, None, None] >= 0,
        np.minimum(cumulative_p, cumulative_q),
        np.maximum(cumulative_p + cumulative_q - 1, 0),
    )
    scale = deviation(p) * deviation(q)
    covariance = (bound - independent).sum((1, 2))
    usable = (scale > 1e-12) & (np.abs(covariance) > 1e-12)
    mixing = np.where(usable, correlation * scale / np.where(usable, covariance, 1), 0)[:, None, None]
    joint = mixing * np.diff(np.diff(bound, axis=1, prepend=0), axis=2, prepend=0)
    joint += (1 - mixing) * p[:, :, None] * q[:, None, :]
    entropies = _entropy_terms(p).sum(1) + _entropy_terms(q).sum(1)
    information = entropies - _entropy_terms(joint).sum((1, 2))
    # A window with a single bright position has no entropy; neither have two of them anything to share.
    return np.where(entropies > 0, 2 * information / np.where(entropies > 0, entropies, 1), 0)


def en(fused, a, b, *, data_range: float = 1.0) -> float:
    """Entropy of the fused image in bits, from its histogram of 256 grey levels (at most 8); 0 for a constant.

    The sources are not used. 3D natively.

    References:
        J. W. Roberts, J. van Aardt, F. Ahmed, "Assessment of image fusion procedures using entropy, image quality, and
        multispectral classification", Journal of Applied Remote Sensing 2(1), 2008.
    """
    fused, _, _ = _prepare(fused, a, b, data_range, 1)
    return _entropy(np.bincount(_grey_levels(fused).ravel()))


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(abs(-np.sum(p * np.log2(p))))


def mi(fused, a, b, *, data_range: float = 1.0) -> float:
    """Mutual information in bits: I(A, F) + I(B, F), the sum over the sources, from histograms of 256 grey levels.

    0 for a constant fused image. 3D natively.

    References:
        G. Qu, D. Zhang, P. Yan, "Information measure for performance of image fusion", Electronics Letters 38(7), 2002.
    """
    fused, a, b = (_grey_levels(array).ravel() for array in _prepare(fused, a, b, data_range, 1))
    total = 0.0
    for source in (a, b):
        joint = _entropy(np.bincount(fused * 256 + source))
        total += _entropy(np.bincount(fused)) + _entropy(np.bincount(source)) - joint
    return float(max(total, 0.0))


def sd(fused, a, b, *, data_range: float = 1.0) -> float:
    """Standard deviation of the fused image in grey levels (0..255 scale); contrast. The sources are not used.

    3D natively.

    References:
        Y.-J. Rao, "In-fibre Bragg grating sensors", Measurement Science and Technology 8(4), 1997 (as the field cites
        it).
    """
    fused, _, _ = _prepare(fused, a, b, data_range, 1)
    return float(fused.std() * 255)


def sf(fused, a, b, *, data_range: float = 1.0) -> float:
    """Spatial frequency of the fused image in grey levels: root of the summed mean squared differences along each axis.

    sqrt(RF^2 + CF^2), in 3D also the slice axis. The sources are not used.

    References:
        A. M. Eskicioglu, P. S. Fisher, "Image quality measures and their performance", IEEE Trans. Communications
        43(12), 1995.
    """
    fused, _, _ = _prepare(fused, a, b, data_range, 2)
    squares = sum(np.mean(np.diff(fused, axis=axis) ** 2) for axis in range(fused.ndim))
    return float(255 * np.sqrt(squares))


def ag(fused, a, b, *, data_range: float = 1.0) -> float:
    """Average gradient of the fused image in grey levels.

    Sum over the pixels of sqrt(mean over the axes of the squared central difference), divided by the product of
    (side - 1), as the field's toolboxes do; in 3D over three axes. The sources are not used.

    References:
        G. Cui et al., "Detail preserved fusion of visible and infrared images using regional saliency extraction and
        multi-scale image decomposition", Optics Communications 341, 2015.
    """
    fused, _, _ = _prepare(fused, a, b, data_range, 2)
    squares = sum(gradient**2 for gradient in np.gradient(fused)) / fused.ndim
    return float(255 * np.sqrt(squares).sum() / np.prod([size - 1 for size in fused.shape]))


def scd(fused, a, b, *, data_range: float = 1.0) -> float:
    """Sum of the correlations of differences: r(F - B, A) + r(F - A, B), r the correlation coefficient; in [-2, 2].

    A term with a constant (F = A, say) is 0. 3D natively.

    References:
        V. Aslantas, E. Bendes, "A new image quality metric for image fusion: the sum of the correlations of
        differences", AEU 69(12), 2015.
    """
    fused, a, b = _prepare(fused, a, b, data_range, 1)
    return _correlation(fused - b, a) + _correlation(fused - a, b)


def source_shares(fused, a, b, *, data_range: float = 1.0) -> tuple[float, float]:
    """Coefficients of A and B in the least-squares fit F = share_a A + share_b B + c, where A or B is not black.

    NaN for both where they cannot be told apart (a constant source, or proportional ones). 3D natively.
    """
    fused, a, b = _prepare(fused, a, b, data_range, 1)
    inside = (a > 0.02) | (b > 0.02)
    if not inside.any():
        return math.nan, math.nan
    x, y, z = (v[inside] - v[inside].mean() for v in (a, b, fused))
    determinant = (x @ x) * (y @ y) - (x @ y) ** 2
    if not determinant > 1e-4 * (x @ x) * (y @ y):
        return math.nan, math.nan
    share_a = ((y @ y) * (x @ z) - (x @ y) * (y @ z)) / determinant
    share_b = ((x @ x) * (y @ z) - (x @ y) * (x @ z)) / determinant
    return float(share_a), float(share_b)


def lesser_share(fused, a, b, *, data_range: float = 1.0) -> float:
    """The lesser of the two :func:`source_shares`: 0 for a copy of one source, 0.5 for the average.

    Not from the literature. Q^AB/F, VIF, FSIM and SCD are all high for a copy of one source with a trace of the other;
    below :data:`IGNORED_SHARE` a grey fusion has lost what only the lesser source shows. The luma of a colour fusion
    may be lower: colour shows that source as well.
    """
    return min(source_shares(fused, a, b, data_range=data_range))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    # Below this, rounding errors of a constant would be correlated.
    return float(np.sum(x * y) / scale) if scale > 1e-12 * x.size else 0.0


def vif(fused, a, b, *, data_range: float = 1.0) -> float:
    """Visual information fidelity in the pixel domain (VIFp), the sum over the two sources.

    VIFp(A -> F) + VIFp(B -> F), four scales, noise variance 2 on the 0..255 scale. The sum, not the mean, is the
    convention of the common fusion toolboxes; it is above 1 for either source alone. A constant source has no
    information to keep: it is left out; both constant gives nan. Needs 41 x 41 pixels. Volumes: slice by slice.
    Computed by torchmetrics.

    References:
        H. R. Sheikh, A. C. Bovik, "Image information and visual quality", IEEE TIP 15(2), 2006.
    """
    fused, a, b = _prepare(fused, a, b, data_range, VIF_SIDE)
    return _by_slice(_vif_sum, fused, a, b)


def _vif_sum(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    torch = require("torch", "VIF")
    fidelity = require("torchmetrics.functional.image", "VIF", "torchmetrics").visual_information_fidelity
    # float32 is 20 times faster than float64 and differs by less than 1e-4.
    fused, a, b = (torch.from_numpy((image * 255).astype(np.float32))[None, None] for image in (fused, a, b))
    values = [float(fidelity(fused, source)) for source in (a, b) if source.max() > source.min()]
    return float(sum(values)) if values else float("nan")


def qabf(fused, a, b, *, data_range: float = 1.0) -> float:
    """Edge preservation Q^AB/F: how much of the sources' edges is found in the fused image, in [0, 1).

    Sobel strength g and angle alpha (zero padding); G = the smaller over the larger strength, Delta = 1 - |alpha_S -
    alpha_F| / (pi / 2); Q^SF = 0.9994 / (1 + exp(-15 (G - 0.5))) x 0.9879 / (1 + exp(-22 (Delta - 0.8))); mean of Q^AF
    and Q^BF weighted by the strength in the source. 0 if neither source has an edge (an image that is not black at its
    border has one there). Volumes: slice by slice.

    References:
        C. S. Xydeas, V. Petrovic, "Objective image fusion performance measure", Electronics Letters 36(4), 2000.
    """
    fused, a, b = (_grey_levels(array) for array in _prepare(fused, a, b, data_range, 3))
    return _by_slice(_qabf, fused, a, b)


def _qabf(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = _sobel(image, "constant")
        # Minus as in the authors' kernels: with x = 0 taken as +pi/2, a mirrored angle gives another value.
        return np.hypot(x, y), np.arctan(np.divide(-y, x, out=np.full_like(x, np.inf), where=x != 0))

    strength_f, angle_f = edges(fused)
    preserved = total = 0.0
    for source in (a, b):
        strength, angle = edges(source)
        delta = 1 - np.abs(angle - angle_f) / (np.pi / 2)
        quality = expit(15 * (_ratio(strength, strength_f) - 0.5)) * expit(22 * (delta - 0.8))
        preserved += np.sum(0.9994 * 0.9879 * quality * strength)
        total += np.sum(strength)
    return float(preserved / total) if total > 0 else 0.0


def _sobel(image: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(ndimage.sobel(image, axis=axis, mode=mode).astype(np.float64) for axis in (1, 0))


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The smaller over the larger; 0 where both are 0."""
    larger = np.maximum(x, y)
    return np.divide(np.minimum(x, y), larger, out=np.zeros_like(larger), where=larger > 0)


def nabf(fused, a, b, *, data_range: float = 1.0) -> float:
    """Modified fusion artefacts N^AB/F: strength of the edges that neither source has; 0 is best.

    Sum of n ((1 - Q^AF) w_A + (1 - Q^BF) w_B) over the sum of w_A + w_B, with n = 1 where the fused image's Sobel
    strength exceeds that of both sources, w_S = g_S^1.5 where g_S (Sobel / 8, 0..255 scale, mirrored border) is at
    least 2, else 0.001, and Q^SF = sqrt(Q_g Q_alpha), sigmoids with (0.9999, 19, 0.5) and (0.9995, 22, 0.5). Volumes:
    slice by slice.

    References:
        B. K. Shreyamsha Kumar, "Multifocus and multispectral image fusion based on pixel significance using discrete
        cosine harmonic wavelet transform", Signal, Image and Video Processing 7(6), 2013.
        V. Petrovic, C. Xydeas, "Objective image fusion performance characterisation", ICCV 2005.
    """
    fused, a, b = (_grey_levels(array) for array in _prepare(fused, a, b, data_range, 3))
    return _by_slice(_nabf, fused, a, b)


def _nabf(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = _sobel(image, "mirror")
        steep = np.divide(x, y, out=np.copysign(np.inf, x), where=y != 0)
        return np.hypot(x, y) / 8, np.where((x == 0) & (y == 0), 0, np.arctan(steep))

    strength_f, angle_f = edges(fused)
    lost = total = 0.0
    artefact = np.ones(fused.shape, bool)
    for source in (a, b):
        strength, angle = edges(source)
        artefact &= strength_f > strength
        alike = np.abs(np.abs(angle - angle_f) - np.pi / 2) * 2 / np.pi
        quality = 0.9999 * expit(19 * (_ratio(strength, strength_f) - 0.5)) * 0.9995 * expit(22 * (alike - 0.5))
        weight = np.where(strength >= 2, strength**1.5, 0.001)
        lost = lost + (1 - np.sqrt(quality)) * weight
        total += weight.sum()
    return float(np.sum(lost * artefact) / total)


METRICS: dict[str, Metric] = {
    "PSNR": Metric(psnr, True, "peak signal-to-noise ratio (dB), mean over the sources", 1, True),
    "SSIM": Metric(ssim, True, "structural similarity, mean over the sources", SSIM_SIDE, True),
    "MS-SSIM": Metric(ms_ssim, True, "multi-scale structural similarity, mean over the sources", SSIM_SIDE, True),
    "FSIM": Metric(fsim, True, "feature similarity, mean over the sources", 16, False),
    "FMI": Metric(fmi, True, "feature mutual information of edges, mean over the sources", 3, False),
    "FMI-pixel": Metric(fmi_pixel, True, "feature mutual information of grey values, mean over the sources", 3, False),
    "EN": Metric(en, None, "entropy of the fused image (bits)", 1, True),
    "MI": Metric(mi, True, "mutual information, sum over the sources (bits)", 1, True),
    "SD": Metric(sd, None, "standard deviation of the fused image (grey levels)", 1, True),
    "SF": Metric(sf, None, "spatial frequency of the fused image (grey levels)", 2, True),
    "AG": Metric(ag, None, "average gradient of the fused image (grey levels)", 2, True),
    "SCD": Metric(scd, True, "sum of the correlations of differences", 1, True),
    "SHARE": Metric(
        lesser_share, None, "share of the lesser source (least squares); 0 for a copy of one source", 1, True
    ),
    "VIF": Metric(vif, True, "visual information fidelity, sum over the sources", VIF_SIDE, False, True),
    "QABF": Metric(qabf, True, "edge preservation Q^AB/F", 3, False),
    "NABF": Metric(nabf, False, "fusion artefacts N^AB/F", 3, False),
}


def evaluate_all(fused, a, b, metrics: Iterable[str] | None = None, *, data_range: float = 1.0) -> dict[str, float]:
    """Several metrics of one fused image or volume, in the order asked for.

    Args:
        fused: (H, W) or (D, H, W), values in [0, data_range].
        a: first source, the same shape.
        b: second source, the same shape.
        metrics: names in :data:`METRICS`; all of them by default.
        data_range: the largest possible value.

    Returns:
        Name -> value; nan where the image is too small for the metric or the metric is not defined for it.

    Raises:
        InputError: unknown name, or arrays that cannot be measured.
    """
    names = list(METRICS if metrics is None else metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InputError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    fused, a, b = _prepare(fused, a, b, data_range, 1)
    side = min(fused.shape[-2:])
    return {
        name: METRICS[name].function(fused, a, b) if side >= METRICS[name].minimum_side else float("nan")
        for name in names
    }
