"""What a fusion writes: one place for the command line and the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from .preview import to_uint8
from .volumes import IMAGE_SUFFIXES, Volume, suffix_of, write_volume


def write_result(volume: Volume, fused: np.ndarray, metadata: dict[str, str], out: Path) -> None:
    """Write a fused volume, as 8 bit where ``out`` is a picture.

    Args:
        volume, fused, metadata: of :class:`.inference.engine.FusionResult`.
        out: .nrrd, .nii, .nii.gz, .mha, or for one slice .png, .jpg, .tif.

    Raises:
        OutputError: the file cannot be written.
        InputError: a volume of several slices into a picture.
    """
    if suffix_of(out) in IMAGE_SUFFIXES and volume.array.dtype != np.uint8:
        volume, metadata = replace(volume, array=to_uint8(fused)), {**metadata, "scale": "255 x network output"}
    write_volume(volume, out, metadata)
