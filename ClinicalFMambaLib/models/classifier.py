"""Tumour classifiers behind one interface: logits of a :class:`..inference.tumour_features.Reading`, and their files.

A classifier is several members (bootstrap samples or seeds) of one of three kinds:
    ``features``: logistic regression on a few numbers of each image inside the tumour; needs numpy only.
    ``resnet50-2d``, ``resnet50-3d``: MONAI's ResNet-50 (He et al., CVPR 2016; 3D as Hara et al., CVPR 2018) on slices
        through, or a cube around, the tumour in one image.

Files are safetensors, weights in single precision, with a JSON text in their metadata: nothing in them is executed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import InputError, WeightsError, require
from ..files import replacing
from ..inference.tumour_features import (
    INPUTS,
    Reading,
    domain_features,
    domain_names,
    feature_names,
    features,
    is_input,
)
from ..pretrained import read_tensors, sort_header

KINDS = ("features", "resnet50-2d", "resnet50-3d")
# Scores beyond these are cut off, then divided by a third of it, for the networks.
CLIP_Z = 6.0
SLICES = 5


class Model(Protocol):
    """What the three kinds have in common."""

    def logits(self, reading: Reading, hidden: np.ndarray | None = None) -> np.ndarray:
        """(members,) float64, positive for the second label; ``hidden`` (D, H, W) bool is painted with normal tissue.

        The first member is the classifier, the others tell how sure it is.
        """

    def tensors(self) -> dict[str, np.ndarray]:
        """What is stored of it."""


@dataclass(frozen=True)
class FeatureModel:
    """Logistic regression on :func:`..inference.tumour_features.features`.

    Attributes:
        inputs: images whose features are taken, or single features such as ``t1ce.bright``.
        mean, scale: (F,) of the training patients.
        weights, bias: (M, F) and (M,).
    """

    inputs: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def logits(self, reading: Reading, hidden: np.ndarray | None = None) -> np.ndarray:
        return self.of_features(features(reading, self.inputs, hidden))

    def of_features(self, values: np.ndarray) -> np.ndarray:
        """(members,) or (N, members) from (F,) or (N, F)."""
        return (values - self.mean) / self.scale @ self.weights.T + self.bias

    def tensors(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "scale": self.scale, "weights": self.weights, "bias": self.bias}


class NetworkModel:
    """ResNet-50 members on one image.

    Args:
        dimension: 2 for slices, 3 for a cube.
        image: name in :data:`..inference.tumour_features.INPUTS`.
        crop: edge in voxels of the working grid.
        networks: one for each member.
    """

    def __init__(self, dimension: int, image: str, crop: int, networks):
        self.dimension, self.image, self.crop = dimension, image, crop
        self.networks = list(networks)

    def logits(self, reading: Reading, hidden: np.ndarray | None = None) -> np.ndarray:
        import torch

        batch = torch.from_numpy(network_input(reading, self.image, self.dimension, self.crop, hidden))
        results = []
        with torch.inference_mode():
            for network in self.networks:
                device = next(network.parameters()).device
                results.append(float(network.eval()(batch.to(device)).double().mean()))
        return np.array(results)

    def tensors(self) -> dict[str, np.ndarray]:
        return {
            f"{k}.{name}": tensor.detach().cpu().numpy()
            for k, network in enumerate(self.networks)
            for name, tensor in network.state_dict().items()
        }


def build_network(dimension: int):
    """MONAI's ResNet-50 with one input channel and one output, the logit of the second label."""
    networks = require("monai.networks.nets", "a ResNet-50 classifier", "monai>=1.4")
    return networks.resnet50(pretrained=False, spatial_dims=dimension, n_input_channels=1, num_classes=1)


def network_input(
    reading: Reading, image: str, dimension: int, crop: int, hidden: np.ndarray | None = None, shift=(0, 0, 0)
) -> np.ndarray:
    """(slices, 1, H, W) in 2D, (1, 1, D, H, W) in 3D, float32 scores in [-3, 3] around the middle of the region.

    The slices are :data:`SLICES` axial ones, at equal shares of the region's volume from bottom to top.

    Args:
        crop: edge in voxels.
        shift: of the crop in voxels (z, y, x), for augmentation.
    """
    scores = np.clip(reading.scores(image), -CLIP_Z, CLIP_Z) * np.float32(3 / CLIP_Z)
    scores = np.where(reading.brain.mask, scores, np.float32(-3))
    if hidden is not None:
        scores[hidden] = 0
    centre = [round(c) + s for c, s in zip(np.argwhere(reading.region).mean(axis=0), shift)]
    if dimension == 3:
        return _cut(scores, centre, (crop,) * 3)[None, None]
    areas = np.cumsum(reading.region.sum(axis=(1, 2)))
    shares = (np.arange(SLICES) + 0.5) / SLICES * areas[-1]
    chosen = np.clip(np.searchsorted(areas, shares) + shift[0], 0, len(areas) - 1)
    return np.stack([_cut(scores[k], centre[1:], (crop, crop)) for k in chosen])[:, None]


def _cut(array: np.ndarray, centre, size) -> np.ndarray:
    """A box around ``centre``; what lies outside the array is background."""
    padded = np.pad(array, [(n, n) for n in size], constant_values=-3)
    box = tuple(slice(c + n - n // 2, c + n - n // 2 + n) for c, n in zip(centre, size))
    return np.ascontiguousarray(padded[box])


# ---------------------------------------------------------------------------------------- the whole reading


@dataclass(frozen=True)
class Domain:
    """What the training patients look like: squared Mahalanobis distance of the domain features.

    Attributes:
        mean: (7,); precision: (7, 7); threshold: the largest distance that counts as known.
    """

    mean: np.ndarray
    precision: np.ndarray
    threshold: float

    def distance(self, values: np.ndarray) -> float:
        apart = values - self.mean
        return float(apart @ self.precision @ apart)

    def strangest(self, values: np.ndarray) -> str:
        """The feature that adds most to the distance."""
        apart = values - self.mean
        return domain_names()[int(np.argmax(apart * (self.precision @ apart)))]


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier's file says about it.

    Attributes:
        kind: one of :data:`KINDS`; inputs: images that it reads; crop: of the networks, in voxels.
        sequences: what the pair must be.
        labels: the two classes.
        fusion: name and SHA-256 of the fusion weights that made its fused images; empty where it reads none.
        slope, intercept: Platt calibration of the logit, for even odds of the labels before the images are seen.
        patients: number for each label; sites: number.
        verdict: ``"grade reading"``, or ``"experimental"`` where the controls do as well or chance is not excluded.
        evidence: one sentence with what was measured.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    crop: int = 0
    sequences: tuple[str, ...] = ("t1ce", "flair")
    labels: tuple[str, str] = ("LGG", "HGG")
    fusion: dict[str, str] = field(default_factory=dict)
    slope: float = 1.0
    intercept: float = 0.0
    patients: dict[str, int] = field(default_factory=dict)
    sites: int = 0
    verdict: str = "experimental"
    evidence: str = ""

    def __post_init__(self):
        for name in ("inputs", "sequences", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KINDS:
            raise InputError(f"a classifier is {', '.join(KINDS)}, not {self.kind!r}")
        known = is_input if self.kind == "features" else INPUTS.__contains__
        if unknown := [name for name in self.inputs if not known(name)] or (not self.inputs and ["nothing"]):
            raise InputError(f"a classifier reads {', '.join(INPUTS)}, not {unknown[0]}")
        if self.kind != "features" and (len(self.inputs) != 1 or self.crop < 16):
            raise InputError("a ResNet-50 reads one image, in crops of 16 voxels or more")
        if set(self.sequences) != {"t1ce", "flair"} or len(self.labels) != 2:
            raise InputError(f"a classifier reads t1ce with flair into two labels, not {self.sequences}, {self.labels}")

    @property
    def dimension(self) -> int:
        return 2 if self.kind.endswith("2d") else 3


@dataclass(frozen=True)
class Classifier:
    """A model with its calibration, its domain and what is known about it."""

    info: ClassifierInfo
    model: Model
    domain: Domain

    def probabilities(self, reading: Reading, hidden: np.ndarray | None = None) -> np.ndarray:
        """(members,) calibrated probabilities of the second label, where both are as likely before."""
        logits = self.info.slope * self.model.logits(reading, hidden) + self.info.intercept
        return 1 / (1 + np.exp(-np.clip(logits, -50, 50)))

    def distance(self, reading: Reading) -> tuple[float, str]:
        """Squared Mahalanobis distance, and the feature that adds most to it."""
        values = domain_features(reading)
        return self.domain.distance(values), self.domain.strangest(values)


def save_classifier(classifier: Classifier, path: Path) -> Path:
    """Write a classifier; atomic, the same bytes each time."""
    save = require("safetensors.numpy", "writing a classifier", "safetensors").save
    domain = classifier.domain
    tensors = {
        **{f"model.{name}": np.ascontiguousarray(t) for name, t in classifier.model.tensors().items()},
        "domain.mean": np.asarray(domain.mean),
        "domain.precision": np.ascontiguousarray(domain.precision),
        "domain.threshold": np.array([domain.threshold]),
    }
    content = save(tensors, {"classifier": json.dumps(asdict(classifier.info), sort_keys=True)})
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_bytes(sort_header(content))
    return path


def load_classifier(path: Path) -> Classifier:
    """Inverse of :func:`save_classifier`.

    Raises:
        WeightsError: no safetensors file, no classifier, or one of another version.
        MissingDependencyError: MONAI is needed and not installed.
    """
    tensors, metadata = read_tensors(path, "numpy")
    if "classifier" not in metadata:
        what = "a fusion model" if "config" in metadata else "no classifier"
        raise WeightsError(f"{path} holds {what}: its metadata has no 'classifier'; give one from train-classifier")
    try:
        info = ClassifierInfo(**json.loads(metadata["classifier"]))
        state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        domain = Domain(tensors["domain.mean"], tensors["domain.precision"], float(tensors["domain.threshold"][0]))
        size = len(domain_names())
        if domain.precision.shape != (size, size) or domain.mean.shape != (size,):
            raise InputError("its domain has other features than this version's")
        return Classifier(info, _model(info, state), domain)
    except (InputError, TypeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{path} does not fit this version's classifiers: {reason}") from error


def _model(info: ClassifierInfo, state: dict[str, np.ndarray]) -> Model:
    if info.kind == "features":
        size = len(feature_names(info.inputs))
        if state["weights"].ndim != 2 or state["weights"].shape[1] != size:
            raise InputError(f"its weights have the shape {state['weights'].shape}, its inputs {size} features")
        return FeatureModel(info.inputs, **state)
    import torch

    networks = []
    for member in sorted({int(name.split(".")[0]) for name in state}):
        network = build_network(info.dimension)
        prefix = f"{member}."
        network.load_state_dict(
            {k.removeprefix(prefix): torch.from_numpy(v) for k, v in state.items() if k.startswith(prefix)}
        )
        networks.append(network.eval())
    return NetworkModel(info.dimension, info.inputs[0], info.crop, networks)
