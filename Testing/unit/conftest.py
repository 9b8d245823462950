"""Fixtures of all unit tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; ``pytest -rs`` shows the tests that skip without it."""
    if not (SHARED_DATA / "README.md").is_file():
        pytest.skip(f"no real data: {SHARED_DATA} does not exist, so what was measured on it is not checked")
    return SHARED_DATA


@pytest.fixture
def run(capfd):
    """Run a command in this process: status, stdout, stderr of the whole process, ITK's included."""
    from ClinicalFMambaLib import cli

    def call(*arguments):
        capfd.readouterr()
        status = cli.main([str(a) for a in arguments])
        return (status, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def write_pairs():
    """Write smooth random 8-bit pairs as DIR/SOURCE/NAME.png, and return the folder."""

    def write(folder: Path, names=("1001", "2001", "3001"), sources=("MRI", "CT"), size=48) -> Path:
        rng = np.random.default_rng(0)
        for source in sources:
            (folder / source).mkdir(parents=True)
            for name in names:
                image = ndimage.gaussian_filter(rng.random((size, size)), 1)
                image = np.uint8(255 * (image - image.min()) / np.ptp(image))
                sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / source / f"{name}.png"))
        return folder

    return write
