"""Where the tumour is: brain, abnormal region and normal tissue of a registered T1ce + FLAIR pair.

A classical segmentation, not a learned one: FLAIR hyperintensity inside the brain, with what enhances or is enclosed by
it. It works on a grid of its own, :data:`GRID_MM` isotropic around the brain, so that what follows does not see the
scanner's voxel size. How well it agrees with readers' segmentations is in the card of each classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError, require
from ..preview import patient_axes
from ..volumes import Volume, resample_onto
from .intensity import apply_window, choose_window

GRID_MM = 2.0
MARGIN_VOXELS = 4
# Litres inside the skull without the skull: adults have 1.0 to 1.8; whole heads have 3 and more.
BRAIN_LITRES = (0.7, 2.2)
FOREGROUND = 0.02
# In robust standard deviations of normal tissue: where a region begins, how far it grows, what enhances.
SEED_Z, GROW_Z, ENHANCING_Z = 2.5, 1.75, 2.5
SMALLEST_ML = 4.0


@dataclass(frozen=True)
class Brain:
    """A registered pair on the working grid, cut to the brain.

    Attributes:
        images: sequence name to (D, H, W) float32 in [0, 1].
        mask: (D, H, W) bool, the brain.
        inside: (D, H, W) bool, what lies inside the field of view of the original volumes.
        place: the grid, as a volume whose array is ``mask``; its axes are those nearest to left, posterior, superior.
    """

    images: dict[str, np.ndarray]
    mask: np.ndarray
    inside: np.ndarray
    place: Volume


def standardise(volumes: dict[str, Volume]) -> Brain:
    """Window the volumes, bring them to the working grid and find the brain.

    Args:
        volumes: sequence name to volume, all on one grid.

    Raises:
        InputError: an image instead of a volume, no skull-stripped brain, or a volume that covers part of it only.
    """
    first = next(iter(volumes.values()))
    if first.is_image or min(first.shape) < 8:
        raise InputError(f"a tumour is read from whole volumes, and {first.name or 'A'} has too few slices")
    images, inside, grid = {}, None, _working_grid(first)
    for name, volume in volumes.items():
        image = replace(volume, array=apply_window(volume.array, choose_window(replace(volume, modality="MR"))))
        images[name] = resample_onto(_smooth(image), grid, background=0.0).array
        if inside is None:
            ones = replace(image, array=np.ones(image.shape, np.float32))
            inside = resample_onto(ones, grid, background=0.0).array > 0.5
    mask = _brain(images)
    litres = mask.sum() * GRID_MM**3 / 1e6
    low, high = BRAIN_LITRES
    if litres > high:
        raise InputError(
            f"the foreground holds {litres:.1f} litres, more than a brain: the classifier has seen brains without skull"
            " only; remove it first (HD-BET, SynthStrip)"
        )
    if litres < low:
        raise InputError(f"the volumes show {litres:.2f} litres of brain, not a whole one: the reading needs it whole")
    for name, image in images.items():
        covered = (image[mask] > FOREGROUND).mean()
        if covered < 0.75:
            raise InputError(f"{name} shows {100 * covered:.0f} % of the brain only; both volumes must cover it")
    box = _box(mask, MARGIN_VOXELS)
    corner = np.array([b.start for b in box[::-1]]) * GRID_MM
    origin = np.reshape(grid.direction, (3, 3)) @ corner + grid.origin
    place = replace(grid, array=mask[box], origin=tuple(map(float, origin)))
    return Brain({k: np.ascontiguousarray(v[box]) for k, v in images.items()}, mask[box], inside[box], place)


def _working_grid(volume: Volume) -> Volume:
    """An empty volume of GRID_MM voxels over the field of view of ``volume``, turned to left, posterior, superior."""
    axes = patient_axes(volume.direction)
    columns = np.reshape(volume.direction, (3, 3))
    direction = np.stack([sign * columns[:, 2 - axis] for axis, sign in axes], axis=1)
    spacing, size = np.array(volume.spacing), np.array(volume.shape[::-1])
    centre = columns @ ((size - 1) / 2 * spacing) + volume.origin
    extent = np.array([(size * spacing)[2 - axis] for axis, _ in axes])
    count = np.maximum(1, np.ceil(extent / GRID_MM)).astype(int)
    origin = centre - direction @ ((count - 1) / 2 * GRID_MM)
    return replace(
        volume,
        array=np.broadcast_to(np.float32(0), tuple(count[::-1])),
        spacing=(GRID_MM,) * 3,
        origin=tuple(map(float, origin)),
        direction=tuple(map(float, direction.ravel())),
        name="working grid",
    )


def _smooth(volume: Volume) -> Volume:
    """Without what the working grid cannot hold."""
    sitk = require("SimpleITK", "finding the tumour")
    image = sitk.GetImageFromArray(volume.array)
    # Sigma in voxels: half of the factor by which the voxels grow.
    sigmas = [0.5 * GRID_MM / s if s < 0.9 * GRID_MM else 0.0 for s in volume.spacing]
    if not any(sigmas):
        return volume
    smooth = sitk.DiscreteGaussian(image, [s * s for s in sigmas], 8)
    return replace(volume, array=sitk.GetArrayFromImage(smooth))


def _brain(images: dict[str, np.ndarray]) -> np.ndarray:
    foreground = np.any([image > FOREGROUND for image in images.values()], axis=0)
    return fill_holes(_close(largest_part(_open(foreground, 1)), 2))


def _box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    box = []
    for axis in range(3):
        filled = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        box.append(slice(max(0, filled[0] - margin), min(mask.shape[axis], filled[-1] + 1 + margin)))
    return tuple(box)


# ------------------------------------------------------------------------------------------ normal tissue


def normal_level(image: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the bulk of the tissue: clipped iteratively, so that lesions and CSF drop out."""
    values = image[where]
    centre = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - centre)))
    for _ in range(5):
        kept = values[np.abs(values - centre) <= 2.5 * spread]
        if kept.size < 100:
            break
        # The bulk of a normal distribution cut at 2.5 has 0.97 of its standard deviation.
        centre, spread = float(kept.mean()), float(kept.std()) / 0.97
    return centre, max(spread, 1e-3)


def scores(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """``image`` in standard deviations from the normal tissue ``where``."""
    centre, spread = normal_level(image, where)
    return (image - np.float32(centre)) / np.float32(spread)


# ------------------------------------------------------------------------------------------------ region


def find_region(brain: Brain) -> np.ndarray:
    """(D, H, W) bool: what is abnormal; empty where nothing is.

    FLAIR much brighter than normal tissue and away from the brain's surface, the largest part and those of at least a
    quarter of it, grown into what is less bright; with enhancing tissue that touches it and all that it encloses.
    """
    core = _core(brain)
    flair = scores(_blur(brain.images["flair"], 0.75), core)
    seed = _main_parts(_open((flair > SEED_Z) & core, 1))
    if not seed.any():
        return seed
    region = _touching(_open((flair > GROW_Z) & core, 1) & _dilate(seed, 6), seed)
    t1ce = scores(_blur(brain.images["t1ce"], 0.5), core & ~_dilate(region, 2))
    enhancing = _open((t1ce > ENHANCING_Z) & core, 1)
    region |= _touching(enhancing, region) & _dilate(region, 8)
    return _main_parts(fill_holes(_close(region, 4)) & brain.mask)


def _touching(mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The seed with the parts of the mask that are connected to it."""
    labels, _ = parts(mask | seed)
    touched = np.unique(labels[seed])
    return np.isin(labels, touched[touched > 0])


def _main_parts(mask: np.ndarray) -> np.ndarray:
    labels, sizes = parts(mask)
    if not len(sizes) or sizes.max() * GRID_MM**3 / 1e3 < SMALLEST_ML:
        return np.zeros_like(mask)
    return np.isin(labels, 1 + np.flatnonzero(sizes >= 0.25 * sizes.max()))


def normal_tissue(brain: Brain, region: np.ndarray) -> np.ndarray:
    """(D, H, W) bool: brain away from its surface and from the region."""
    return _core(brain) & ~_dilate(region, 3)


def _core(brain: Brain) -> np.ndarray:
    """The brain without 4 mm at its surface; the end of the field of view is no surface."""
    beyond = np.pad(~brain.inside, 2, constant_values=True)
    near = _dilate(~(np.pad(brain.mask, 2) | beyond), 2)
    return ~near[(slice(2, -2),) * 3] & brain.mask


def mirrored(array: np.ndarray, brain: Brain) -> np.ndarray:
    """``array`` reflected at the middle of the brain's mask, left to right; zero where nothing is reflected."""
    filled = np.flatnonzero(brain.mask.any(axis=(0, 1)))
    low, high = int(filled[0]), int(filled[-1])
    out = np.zeros_like(array)
    out[..., low : high + 1] = array[..., low : high + 1][..., ::-1]
    return out


def is_cut(brain: Brain, region: np.ndarray) -> bool:
    """Whether the region reaches the end of the field of view over at least half a square centimetre."""
    inside = np.pad(brain.inside, 1)
    return int((np.pad(region, 1) & _dilate(~inside, 1)).sum()) * GRID_MM**2 >= 50


# -------------------------------------------------------------------------------------------- morphology


def _apply(mask: np.ndarray, function, *arguments) -> np.ndarray:
    sitk = require("SimpleITK", "finding the tumour")
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(function(sitk, image, *arguments)) > 0


def _open(mask, radius):
    return _apply(mask, lambda sitk, i: sitk.BinaryMorphologicalOpening(i, [radius] * 3, sitk.sitkBall))


def _close(mask, radius):
    # Safe border: else the closing eats what lies at the edge of the array.
    return _apply(mask, lambda sitk, i: sitk.BinaryMorphologicalClosing(i, [radius] * 3, sitk.sitkBall, 1, True))


def _dilate(mask, radius):
    if not mask.any():
        return mask.copy()
    sitk = require("SimpleITK", "finding the tumour")
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    # A distance map takes the same time for every radius.
    distance = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=False)
    return sitk.GetArrayFromImage(distance) <= radius


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """What is enclosed in 3D."""
    return _apply(mask, lambda sitk, i: sitk.BinaryFillhole(i))


def parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts as labels 1, 2 … by falling size, and their sizes in voxels."""
    sitk = require("SimpleITK", "finding the tumour")
    labels = sitk.RelabelComponent(sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8))))
    array = sitk.GetArrayFromImage(labels)
    return array, np.bincount(array.ravel())[1:]


def largest_part(mask: np.ndarray) -> np.ndarray:
    return parts(mask)[0] == 1


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    sitk = require("SimpleITK", "finding the tumour")
    return sitk.GetArrayFromImage(sitk.DiscreteGaussian(sitk.GetImageFromArray(image), sigma * sigma, 8))
