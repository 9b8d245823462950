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


class AveragingEngine:
    """Stands for the fusion engine where a test is not about fusion: the fused image is the mean of the sources."""

    def fuse(self, a, b, options=None, progress=None, cancelled=None):
        from types import SimpleNamespace

        return SimpleNamespace(fused=((a.array + b.array) / 2).astype("float32"))


@pytest.fixture
def averaging_engine() -> AveragingEngine:
    return AveragingEngine()


@pytest.fixture(scope="session")
def make_pair():
    """A function that makes a skull-stripped head with a tumour: {"t1ce": Volume, "flair": Volume}, 2 mm voxels.

    ``grade`` is the enhancing share of the tumour, ``radius`` its size in mm (0 for none), ``side`` its place in mm to
    the left.
    """
    import numpy as np

    from ClinicalFMambaLib.volumes import Volume

    def make(seed=0, grade=0.5, radius=22.0, side=30.0, spacing=2.0):
        rng = np.random.default_rng(seed)
        shape = np.array([156, 190, 150]) / spacing
        axes = [(np.arange(int(n)) - (int(n) - 1) / 2) * spacing for n in shape]
        z, y, x = np.meshgrid(*axes, indexing="ij")
        distance = np.sqrt((z / 62) ** 2 + (y / 78) ** 2 + (x / 64) ** 2)
        brain = distance < 1
        t1ce = 90 + rng.normal(0, 6, brain.shape)
        flair = 80 + rng.normal(0, 6, brain.shape)
        if radius:
            far = np.sqrt((z - 10) ** 2 + y**2 + (x - side) ** 2)
            tumour, enhancing = far < radius, far < radius * grade ** (1 / 3)
            flair[tumour] += 40
            t1ce[tumour] -= 20
            t1ce[enhancing] += 90
        arrays = {
            name: np.where(brain, np.clip(image, 1, 255), 0).astype(np.uint8)
            for name, image in (("t1ce", t1ce), ("flair", flair))
        }
        origin = tuple(float(axis[0]) for axis in axes[::-1])
        return {
            name: Volume(array, (spacing,) * 3, origin, name=f"p{seed}_{name}", modality="MR")
            for name, array in arrays.items()
        }

    return make


@pytest.fixture(scope="session")
def classifier_file(make_pair, tmp_path_factory):
    """It calls a tumour high grade where much of it enhances, and knows brains of the size of ``make_pair``'s only."""
    import numpy as np

    from ClinicalFMambaLib.inference.tumour_features import Reading, domain_features, domain_names, feature_names
    from ClinicalFMambaLib.inference.tumour_region import find_region, standardise
    from ClinicalFMambaLib.models.classifier import Classifier, ClassifierInfo, Domain, FeatureModel, save_classifier

    inputs = ("t1ce", "average")
    names = feature_names(inputs)
    weights = np.zeros((21, len(names)))
    weights[:, names.index("t1ce.bright")] = np.linspace(6, 10, 21)[[10, *range(10), *range(11, 21)]]
    model = FeatureModel(inputs, np.zeros(len(names)), np.ones(len(names)), weights, np.full(21, -2.0))
    brain = standardise(make_pair())
    known = domain_features(Reading.of(brain, brain.images["t1ce"], find_region(brain)))
    litres = np.array([name == "brain_litres" for name in domain_names()], float)
    domain = Domain(known, np.diag(litres / 0.1**2), 4.0)
    info = ClassifierInfo("toy", "features", inputs, patients={"LGG": 9, "HGG": 8}, sites=3, evidence="A test.")
    return str(save_classifier(Classifier(info, model, domain), tmp_path_factory.mktemp("toy") / "toy.safetensors"))
