"""What the small classifier looks at: a few numbers of each image inside the abnormal region.

Intensities count in standard deviations from the patient's own normal tissue, so that a scanner's scale drops out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .tumour_region import GRID_MM, Brain, mirrored, normal_tissue, parts, scores

BRIGHT_Z, DARK_Z = 2.5, -1.5
# Of one image, in this order.
FEATURES = ("mean", "spread", "bright", "dark", "peak")
SOURCES = ("t1ce", "flair")
SHAPE = ("log_ml", "largest_part", "mirror_overlap", "t1ce_contrast", "flair_contrast", "brain_litres")
INPUTS = (*SOURCES, "average", "fused")


@dataclass(frozen=True)
class Reading:
    """One patient as a classifier sees it, on the working grid of :mod:`.tumour_region`.

    Attributes:
        brain: the sources.
        images: name in :data:`INPUTS` to (D, H, W) float32 in [0, 1].
        region: (D, H, W) bool, the tumour.
    """

    brain: Brain
    images: dict[str, np.ndarray]
    region: np.ndarray
    _scores: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    _features: dict[str, list[float]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, brain: Brain, fused: np.ndarray, region: np.ndarray) -> Reading:
        """A reading of the brain's sources, their average and the engine's fusion of them."""
        average = np.mean([brain.images[name] for name in SOURCES], axis=0, dtype=np.float32)
        return cls(brain, {**brain.images, "average": average, "fused": fused}, region)

    @cached_property
    def normal(self) -> np.ndarray:
        """(D, H, W) bool, the normal tissue."""
        return normal_tissue(self.brain, self.region)

    def scores(self, name: str) -> np.ndarray:
        """One image in standard deviations from the normal tissue."""
        if name not in self._scores:
            self._scores[name] = scores(self.images[name], self.normal)
        return self._scores[name]

    def features(self, name: str) -> list[float]:
        """:func:`summarise` of one image inside the region."""
        if name not in self._features:
            self._features[name] = summarise(self.scores(name)[self.region])
        return self._features[name]


def summarise(values: np.ndarray) -> list[float]:
    """:data:`FEATURES` of the scores (N,) inside a region.

    Mean; distance of the 10th and 90th percentile; fraction brighter than :data:`BRIGHT_Z` (of T1ce the enhancing
    fraction), fraction darker than :data:`DARK_Z` (of T1ce necrosis and cysts); 95th percentile.
    """
    low, high, peak = np.percentile(values, (10, 90, 95))
    return [
        float(values.mean()),
        float(high - low),
        float((values > BRIGHT_Z).mean()),
        float((values < DARK_Z).mean()),
        float(peak),
    ]


def is_input(name: str) -> bool:
    """Whether ``name`` is an image of :data:`INPUTS`, or one feature of it, such as ``t1ce.bright``."""
    image, _, feature = name.partition(".")
    return image in INPUTS and (name == image or feature in FEATURES)


def feature_names(inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The features of images, five each, and those that are named alone."""
    return tuple(f for name in inputs for f in ([name] if "." in name else [f"{name}.{f}" for f in FEATURES]))


def _chosen(inputs: tuple[str, ...], of_image) -> np.ndarray:
    names = [name.split(".") for name in feature_names(inputs)]
    found = {image: dict(zip(FEATURES, of_image(image))) for image in dict.fromkeys(image for image, _ in names)}
    return np.array([found[image][feature] for image, feature in names])


def features(reading: Reading, inputs: tuple[str, ...], hidden: np.ndarray | None = None) -> np.ndarray:
    """(F,) float64, in the order of :func:`feature_names`.

    Args:
        hidden: (D, H, W) bool, painted with normal tissue first.
    """
    if hidden is None:
        return _chosen(inputs, reading.features)
    seen = ~hidden[reading.region]
    return _chosen(inputs, lambda name: summarise(reading.scores(name)[reading.region] * seen))


def domain_names() -> tuple[str, ...]:
    return (*SHAPE, "flair.mean")


def domain_features(reading: Reading) -> np.ndarray:
    """(7,) float64, in the order of :func:`domain_names`: whether a case is like those of the training.

    Logarithm of the region's ml; share of its largest part; how much of it overlaps its own mirror image (much in
    demyelination and in normal variants around the midline, little in most gliomas); how much the normal tissue of each
    source varies, in units of its mean; litres of brain; how bright the region is on FLAIR.
    """
    region = reading.region
    ml = region.sum() * GRID_MM**3 / 1e3
    sizes = parts(region)[1]
    overlap = (mirrored(region, reading.brain) & region).sum() / max(1, region.sum())
    contrasts = []
    for name in SOURCES:
        values = reading.images[name][reading.normal]
        contrasts.append(float(values.std() / max(float(values.mean()), 1e-3)))
    litres = reading.brain.mask.sum() * GRID_MM**3 / 1e6
    shape = [np.log(max(ml, 1e-3)), sizes.max() / sizes.sum(), overlap, *contrasts, litres]
    return np.array([*shape, *features(reading, ("flair.mean",))])
