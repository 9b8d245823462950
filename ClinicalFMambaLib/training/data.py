"""Crops of registered pairs for training and validation, split by patient."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ..cases import Case, load_case
from ..errors import InputError
from ..files import replacing
from ..inference.device import free_memory


def split_by_patient(cases: Sequence[Case], validation: Sequence[str] | float, seed: int):
    """Training and validation cases that share no patient.

    Args:
        validation: the patients to hold back, or the share of patients to draw with ``seed``.

    Raises:
        InputError: one side would be empty, or a named patient does not exist.
    """
    patients = sorted({case.patient for case in cases})
    if len(patients) < 2:
        raise InputError(
            f"{len(cases)} cases of {len(patients)} patient ({', '.join(patients)}): at least 2 patients are needed to"
            " split them into training and validation; a .csv table with a column patient can name them"
        )
    if isinstance(validation, (int, float)):
        if not 0 < validation < 1:
            raise InputError(f"data.validation={validation} must be a share between 0 and 1, or a list of patients")
        held = set(random.Random(seed).sample(patients, max(1, round(validation * len(patients)))))
    else:
        held = {str(p) for p in validation}
        if missing := held - set(patients):
            raise InputError(f"validation patients {sorted(missing)} are not among the patients {patients}")
    train = [case for case in cases if case.patient not in held]
    kept = [case for case in cases if case.patient in held]
    if not train or not kept:
        raise InputError(
            f"validation patients {sorted(held)} of the patients {patients}: training and validation need one at least"
        )
    return train, kept


class PairCrops(Dataset):
    """Random crops of pairs with augmentation; the images are kept as 16 bit, in memory where they fit.

    An item is a (2, 1, *crop) float32 tensor, the anatomical source first. Its index is (epoch, number): each has
    draws of its own from the seed, so that processes, workers and resumed runs see what one uninterrupted process
    would see. Crops are drawn around a voxel that is not background; 2D crops of volumes are axial slices.

    Args:
        crop: edge in pixels or voxels.
        swap: draw two of the sources in any order, instead of the first two in theirs.
        cache: folder for a file of the images, mapped into memory, where they would fill more than half of it.

    Raises:
        InputError: a file cannot be read, or the sources of a case do not fit each other.
        OutputError: the disk is full.
    """

    def __init__(self, cases, order, crop, *, dimension, seed, swap=False, augment=True, cache: Path | None = None):
        self.crop, self.seed, self.swap, self.augment = (crop,) * dimension, seed, swap, augment
        self.images, self.slices = [], []
        self._folder = None
        for case in cases:
            stack = _load(case, order, dimension)
            if not self.images and cache and stack.nbytes * len(cases) > _free_memory() / 2:
                cache.mkdir(parents=True, exist_ok=True)
                self._folder = tempfile.TemporaryDirectory(dir=cache)
            self.images.append(self._mapped(stack) if self._folder else stack)
            self.slices.append(_filled_slices(stack) if stack.ndim - 1 > dimension else None)

    def _mapped(self, stack: np.ndarray) -> np.ndarray:
        path = Path(self._folder.name) / f"{len(self.images)}.npy"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, stack)
        return np.load(path, mmap_mode="r")

    def __getitem__(self, index: tuple[int, int]) -> torch.Tensor:
        return self.sample(np.random.default_rng([self.seed, *index]))

    def sample(self, rng: np.random.Generator) -> torch.Tensor:
        number = rng.integers(len(self.images))
        stack, slices = self.images[number], self.slices[number]
        chosen = list(rng.choice(len(stack), 2, replace=False)) if self.swap else [0, 1]
        pair = stack[chosen] if slices is None else stack[chosen, rng.choice(slices)]
        window = _crop_around_content(pair, self.crop, rng)
        pair = np.stack([_fit(image[window], self.crop) for image in pair]).astype(np.float32) / 65535
        if self.augment:
            pair = _augment(pair, rng)
        return torch.from_numpy(np.ascontiguousarray(pair))[:, None]


class CropSampler(DistributedSampler):
    """The indices (epoch, number) of :class:`PairCrops`, dealt out to the processes of a distributed run.

    Args:
        length: crops of an epoch over all processes.
        start: crops of this process that the first epoch has already seen, when a run resumes in it.
    """

    def __init__(self, length: int, replicas: int, rank: int, epoch: int = 0, start: int = 0):
        super().__init__(range(length), replicas, rank, shuffle=False)
        self.epoch, self.first_epoch, self.start = epoch, epoch, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        skipped = self.start if self.epoch == self.first_epoch else 0
        for number in list(super().__iter__())[skipped:]:
            yield self.epoch, number


class ValidationPairs(Dataset):
    """Pairs without augmentation: whole images, three axial slices of a volume for 2D, its middle for 3D.

    An item is a (2, 1, *size) float32 tensor of the first two sources. All are read at once, so that a file that
    cannot be used is found before the first step.

    Args:
        crop: edge (voxels) of the middle of a volume.

    Raises:
        InputError: a file cannot be read, or the sources of a case do not fit each other.
    """

    def __init__(self, cases: Sequence[Case], order: Sequence[str], *, dimension: int, crop: int):
        self.items = []
        for case in cases:
            pair = _load(case, list(order)[:2], dimension)
            if pair.ndim == 3:
                self.items.append(pair)
            elif dimension == 2:
                filled = _filled_slices(pair)
                self.items += [pair[:, filled[len(filled) * quarter // 4]].copy() for quarter in (1, 2, 3)]
            else:
                self.items.append(pair[(slice(None), *_middle(pair, crop))].copy())

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.items[index].astype(np.float32) / 65535)[:, None]


def _load(case: Case, order: Sequence[str], dimension: int) -> np.ndarray:
    """The sources of a case, (S, *size), in 16 bit."""
    stack = np.round(load_case(case, order) * 65535).astype(np.uint16)
    if stack.ndim - 1 < dimension:
        raise InputError(f"{case.name} is an image, and this preset trains on volumes; use a 2D preset")
    return stack


def _free_memory() -> float:
    return free_memory(torch.device("cpu")) or float("inf")


def _filled_slices(pair: np.ndarray) -> np.ndarray:
    """Axial slices of (S, D, H, W) that hold at least half as much as the fullest one; one at least."""
    filled = np.count_nonzero(pair[0], axis=(1, 2))
    return np.flatnonzero(2 * filled >= max(filled.max(), 1)) if filled.any() else np.array([pair.shape[1] // 2])


def _middle(pair: np.ndarray, crop: int) -> tuple[slice, ...]:
    """The cube of edge ``crop`` around the middle of what is not background, or as much as there is."""
    inside = np.argwhere(pair.any(axis=0))
    middle = (inside.min(0) + inside.max(0)) // 2 if len(inside) else np.array(pair.shape[1:]) // 2
    starts = [max(0, min(int(m) - crop // 2, n - crop)) for m, n in zip(middle, pair.shape[1:])]
    return tuple(slice(s, s + crop) for s in starts)


def _crop_around_content(pair: np.ndarray, crop: Sequence[int], rng) -> tuple[slice, ...]:
    shape = pair.shape[1:]
    centre = [int(rng.integers(n)) for n in shape]
    for _ in range(8):  # an all-black crop teaches little; a few of them remain
        if pair[(slice(None), *centre)].any():
            break
        centre = [int(rng.integers(n)) for n in shape]
    starts = [max(0, min(c - k // 2, n - k)) for c, k, n in zip(centre, crop, shape)]
    return tuple(slice(s, s + k) for s, k in zip(starts, crop))


def _fit(array: np.ndarray, crop: Sequence[int]) -> np.ndarray:
    return np.pad(array, [(0, k - n) for k, n in zip(crop, array.shape)])


def _augment(pair: np.ndarray, rng) -> np.ndarray:
    axes = range(1, pair.ndim)
    pair = np.flip(pair, [axis for axis in axes if rng.random() < 0.5])
    if rng.random() < 0.5:  # the in-plane axes are the last two
        pair = np.swapaxes(pair, -1, -2)
    pair = pair.copy()
    for image in pair:
        if rng.random() < 0.5:
            image[...] = image ** rng.uniform(0.7, 1.4)  # gamma
        if rng.random() < 0.5:
            image *= rng.uniform(0.7, 1.1)  # window
        if rng.random() < 0.15:
            image += (image > 0) * rng.normal(0, rng.uniform(0, 0.03), image.shape)
    return pair.clip(0, 1)
