"""Registered pairs on disk, and a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from ClinicalFMambaLib import pretrained
from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba


def smooth(shape, seed):
    image = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2)
    return np.uint8(255 * (image - image.min()) / np.ptp(image))


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = array.ndim == 3 and array.shape[-1] == 3
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=colour), str(path))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Four patients, six MRI-CT pairs of 64 x 72."""
    folder = tmp_path_factory.mktemp("mri-ct")
    for k, name in enumerate(("1001", "1002", "1003", "2001", "3001", "4001")):
        write(folder / "MRI" / f"{name}.png", smooth((64, 72), k))
        write(folder / "CT" / f"{name}.png", smooth((64, 72), 100 + k))
    return folder


@pytest.fixture(scope="session")
def colour_pairs(tmp_path_factory):
    """Three patients, MRI with PET in colour."""
    folder = tmp_path_factory.mktemp("mri-pet")
    for k, name in enumerate(("1001", "2001", "3001")):
        write(folder / "MRI" / f"{name}.png", smooth((64, 72), k))
        rgb = np.stack([smooth((64, 72), 50 + k + 10 * c) for c in range(3)], axis=-1)
        write(folder / "PET" / f"{name}.png", rgb)
    return folder


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """Two cases of T2 with FLAIR, 20 x 48 x 44."""
    folder = tmp_path_factory.mktemp("cases")
    for k, name in enumerate(("p1", "p2")):
        for j, sequence in enumerate(("t2", "flair")):
            array = smooth((20, 48, 44), 10 * k + j)
            array[:4] = 0
            write(folder / name / f"{sequence}.nii.gz", array)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Path of an untrained 2D model."""
    torch.manual_seed(0)
    model = ClinicalFMamba(ModelConfig(channels=(4, 4, 8), mamba_layers=1))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return pretrained.save_weights(model, path, {"modalities": "MR,CT"})
