"""Pairs of registered images and volumes for training, split by patient.

Layouts:
    pairs: ``DIR/{CT,PET,SPECT}/NAME.png`` beside ``DIR/MRI/NAME.png`` (AANLIB). The patient is the file name
        without its last three digits, or the whole name where it has fewer than four digits.
    cases: one folder a case with ``{t1ce,t1,t2,flair}.nii.gz`` (BraTS). The patient is the folder.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import InputError

FUNCTIONAL = ("CT", "SPECT", "PET")
CASE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


@dataclass(frozen=True)
class Case:
    """One registered set of images: patient, name, and the path of each modality."""

    patient: str
    name: str
    paths: dict[str, Path]


def find_pairs(folder: Path) -> list[Case]:
    """The registered image pairs below ``folder``; raises :class:`InputError` where there is none."""
    others = [name for name in FUNCTIONAL if (folder / name).is_dir()]
    if not (folder / "MRI").is_dir() or not others:
        raise InputError(f"{folder} has no pairs: expected MRI/NAME.png beside one of {', '.join(FUNCTIONAL)}/NAME.png")
    cases = []
    for other in others:
        for path in sorted((folder / other).glob("*.png")):
            mri = folder / "MRI" / path.name
            if not mri.is_file():
                raise InputError(f"{path} has no partner {mri}")
            patient = path.stem[:-3] if path.stem.isdigit() and len(path.stem) > 3 else path.stem
            cases.append(Case(patient, path.stem, {"MRI": mri, other: path}))
    if not cases:
        raise InputError(f"{folder} has no pairs: its folders hold no PNG file")
    return sorted(cases, key=lambda case: (len(case.name), case.name))


def find_cases(folder: Path, sequences: Sequence[str]) -> list[Case]:
    """The folders below ``folder`` that hold all ``sequences``; raises :class:`InputError` where there is none."""
    cases = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = {s: next((f for e in CASE_SUFFIXES if (f := path / f"{s}{e}").is_file()), None) for s in sequences}
        if all(found.values()):
            cases.append(Case(path.name, path.name, found))
    if not cases:
        raise InputError(f"{folder} has no case folder that holds all of {', '.join(sequences)} (.nii.gz, .nrrd, .mha)")
    return cases


def split_by_patient(cases: Sequence[Case], validation: Sequence[str] | float, seed: int):
    """Training and validation cases that share no patient.

    Args:
        validation: the patients to hold back, or the share of patients to draw with ``seed``.

    Raises:
        InputError: one side would be empty, or a named patient does not exist.
    """
    patients = sorted({case.patient for case in cases})
    if isinstance(validation, float):
        held = set(random.Random(seed).sample(patients, max(1, round(validation * len(patients)))))
    else:
        held = {str(p) for p in validation}
        if missing := held - set(patients):
            raise InputError(f"validation patients {sorted(missing)} are not among the patients {patients}")
    train = [case for case in cases if case.patient not in held]
    kept = [case for case in cases if case.patient in held]
    if not train or not kept:
        raise InputError(
            f"{len(patients)} patients cannot be split into training and validation; at least 2 are needed"
        )
    return train, kept


def load_grey(path: Path) -> np.ndarray:
    """Image or volume as (H, W) or (D, H, W) float32 in [0, 1] in the windows that the engine would choose."""
    from ..inference.colour import luma
    from ..inference.intensity import apply_window, choose_window
    from ..volumes import read_volume

    volume = read_volume(path)
    array = luma(volume.array) if volume.is_colour else apply_window(volume.array, choose_window(volume))
    return array[0] if volume.is_image else array


class PairCrops(IterableDataset):
    """Endless random crops of pairs with augmentation, kept in memory as 8 or 16 bit.

    Yields (2, 1, *crop) float32 tensors: the anatomical source first. Each worker, epoch and rank draws its own
    sequence from the seed. Crops are drawn around a voxel that is not background.
    """

    def __init__(self, cases, order, crop, *, dimension, seed, swap=False, augment=True, length=1000):
        self.crop, self.dimension = (crop,) * dimension, dimension
        self.seed, self.swap, self.augment, self.length = seed, swap, augment, length
        self.epoch = 0
        self.images = []
        for case in cases:
            stack = np.stack([load_grey(case.paths[name]) for name in order if name in case.paths])
            self.images.append(np.round(stack * 65535).astype(np.uint16))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        rank, world = _rank()
        shard, shards = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = np.random.default_rng([self.seed, self.epoch, rank, shard])
        for _ in range(self.length // (shards * world)):
            yield self.sample(rng)

    def sample(self, rng: np.random.Generator) -> torch.Tensor:
        stack = self.images[rng.integers(len(self.images))]
        chosen = [0, 1]
        if self.swap:
            chosen = list(rng.choice(len(stack), 2, replace=False))
        window = _crop_around_content(stack[chosen], self.crop, rng)
        pair = np.stack([_fit(stack[i][window], self.crop) for i in chosen]).astype(np.float32) / 65535
        if self.augment:
            pair = _augment(pair, rng)
        return torch.from_numpy(np.ascontiguousarray(pair))[:, None]


class WholePairs(Dataset):
    """Whole pairs without augmentation, for validation: name and (2, 1, *size)."""

    def __init__(self, cases: Sequence[Case], order: Sequence[str]):
        self.cases, self.order = list(cases), order

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> torch.Tensor:
        case = self.cases[index]
        stack = np.stack([load_grey(case.paths[name]) for name in self.order if name in case.paths][:2])
        return torch.from_numpy(stack)[:, None]


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


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
