"""From a pair of volumes to a tumour reading, or to the sentence that says why there is none.

:func:`classify` never raises for what is wrong with a patient's volumes: that leads to an abstention, whose sentence
the command line and the panel show in place of probabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import NOTICE
from ..config import FusionOptions
from ..errors import Cancelled, InputError, WeightsError
from ..models.classifier import Classifier, load_classifier
from ..pretrained import FOLDER, read_index, sha256
from ..volumes import Volume, compare_grids, resample_onto
from .intensity import guess_modality
from .tumour_features import Reading
from .tumour_region import GRID_MM, SMALLEST_ML, Brain, find_region, is_cut, standardise

CLASSIFIERS = FOLDER / "classifiers.json"
# Blocks that the occlusion map hides one after another, at most.
BLOCKS = {"features": 300, "resnet50-2d": 60, "resnet50-3d": 40}
Progress = Callable[[str, float], None]

_FLAIR = re.compile(r"flair|t2f(?![a-z])")
_T1 = re.compile(r"t1(w|wi|n)?(?![a-z])|mprage|spgr")
_T1CE = re.compile(r"t1(w|wi)?[-_ +]*(ce|c|gd|gad|km|post)(?![a-z])")
_T2 = re.compile(r"t2(w|wi)?(?![a-z])")
_CONTRAST = re.compile(r"(?<![a-z])(ce|gd|gad\w*|km|post|contrast)(?![a-z])|\+c(?![a-z])")
_NO_CONTRAST = re.compile(r"(?<![a-z])(pre|no|non|without|w/o)(?![a-z])")


@dataclass(frozen=True)
class Classification:
    """The answer of :func:`classify`.

    Attributes:
        model: name of the classifier.
        verdict: what the classifier may be used as, see :class:`..models.classifier.ClassifierInfo`.
        probabilities: (label, probability, low, high) with a 95 % interval, for a patient in whom both labels are as
            likely before the images are seen; empty where it abstains.
        abstention: why there are none, one sentence, or ``""``.
        note: what a reader of the numbers must know.
        occlusion: float32 on A's grid: by how many percentage points hiding a place (painting it with normal tissue)
            lowers the probability of the second label; None where it abstains.
        region: uint8 on A's grid, 1 where the tumour was found; None where it was not.
        details: more for the report, ready for JSON.
    """

    model: str
    verdict: str
    probabilities: tuple[tuple[str, float, float, float], ...] = ()
    abstention: str = ""
    note: str = ""
    occlusion: Volume | None = None
    region: Volume | None = None
    details: dict | None = None

    @property
    def text(self) -> str:
        """The reading in words."""
        if self.abstention:
            return f"no reading: {self.abstention}"
        words = ", ".join(
            f"{name} {100 * p:.0f} % ({100 * low:.0f} to {100 * high:.0f})" for name, p, low, high in self.probabilities
        )
        words += " if both were equally likely before the scan"
        low, high = self.probabilities[1][2:]
        words += ", undecided" if low < 0.5 < high else ""
        return words if self.verdict == "grade reading" else f"experimental, not a grade reading: {words}"

    def to_json(self) -> dict:
        """For ``--report`` and the worker's answer."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "probabilities": [
                {"label": n, "probability": p, "low": lo, "high": hi} for n, p, lo, hi in self.probabilities
            ],
            "prior": {row[0]: 0.5 for row in self.probabilities},
            "abstention": self.abstention,
            "text": self.text,
            "note": self.note,
            "details": self.details or {},
            "notice": NOTICE,
        }


def read_classifiers() -> dict[str, dict]:
    """Bundled classifiers by name: file, sha256, labels, verdict, description and card."""
    return json.loads(CLASSIFIERS.read_text(encoding="utf-8")) if CLASSIFIERS.is_file() else {}


def find_classifier(choice: str) -> Path:
    """The file of a bundled classifier (``"auto"``: the first) or of a user's own.

    Raises:
        WeightsError: there is none, or a bundled file is not what the index says.
    """
    index = read_classifiers()
    if choice == "auto":
        if not index:
            raise WeightsError("no tumour classifier is bundled with this version; give the path of one")
        choice = next(iter(index))
    if choice in index:
        path = FOLDER / index[choice]["file"]
        if not path.is_file() or sha256(path) != index[choice]["sha256"]:
            raise WeightsError(f"the classifier {choice} is missing or corrupt ({path}); install ClinicalFMamba again")
        return path
    path = Path(choice)
    if path.suffix != ".safetensors" or not path.is_file():
        bundled = ", ".join(index) or "none"
        raise WeightsError(f"no classifier {choice!r}; bundled: {bundled}; or give the path of a .safetensors file")
    return path


def open_classifier(choice: str) -> Classifier:
    """The classifier of :func:`find_classifier`, read.

    Raises:
        WeightsError: there is none, its file is damaged, or it reads images fused by weights that are not bundled.
        MissingDependencyError: MONAI is needed and not installed.
    """
    classifier = load_classifier(find_classifier(choice))
    fusion = classifier.info.fusion
    if fusion and read_index().get(fusion["name"], {}).get("sha256") != fusion["sha256"]:
        raise WeightsError(
            f"{classifier.info.name} was trained on images fused by other weights than this version's {fusion['name']};"
            " train it again with train-classifier"
        )
    return classifier


def sequence_of_name(name: str) -> str:
    """``"t1ce"``, ``"flair"``, ``"t2"``, ``"t1"`` or ``""``: the MR sequence that a name states."""
    text = name.lower()
    if _FLAIR.search(text):  # before T2, as in "T2 FLAIR"
        return "flair"
    if _T1CE.search(text) or (_T1.search(text) and _CONTRAST.search(text) and not _NO_CONTRAST.search(text)):
        return "t1ce"
    return "t1" if _T1.search(text) else "t2" if _T2.search(text) else ""


# ------------------------------------------------------------------------------------------------ reading


class _NoReading(Exception):
    pass


def classify(
    engine,
    a: Volume,
    b: Volume,
    choice: str = "auto",
    *,
    sequences: tuple[str, str] = ("", ""),
    mask: Volume | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Classification:
    """Read the grade of a glioma from a registered, skull-stripped T1ce + FLAIR pair, or abstain.

    Args:
        engine: a :class:`.engine.FusionEngine`, which makes the fused image on the classifier's own grid.
        a, b: the sources, in any order.
        choice: see :func:`find_classifier`.
        sequences: ``"t1ce"`` or ``"flair"`` for each; ``""`` reads it from the volume's name.
        mask: where the tumour is, not zero; by default it is searched for.

    Raises:
        WeightsError, MissingDependencyError: the classifier cannot be used at all.
        Cancelled: ``cancelled()`` returned True.
    """

    def at(stage: str, fraction: float) -> None:
        if cancelled is not None and cancelled():
            raise Cancelled("the classification was cancelled")
        if progress is not None:
            progress(stage, fraction)

    at("loading the classifier", 0.0)
    classifier = open_classifier(choice)
    info = classifier.info
    base = Classification(info.name, info.verdict, note=_note(info))
    region = None
    try:
        volumes = _sequences((a, b), sequences, info.sequences)
        at("finding the brain", 0.05)
        brain = standardise(volumes)
        at("finding the tumour", 0.3)
        region = _region(brain, mask)
        at("fusing for the classifier", 0.4)
        reading = Reading.of(brain, fuse_standardised(engine, brain, info.fusion, device), region)
        at("classifying", 0.7)
        distance, strangest = classifier.distance(reading)
        details = {
            "region_ml": round(float(region.sum()) * GRID_MM**3 / 1e3, 1),
            "region_origin": "given" if mask is not None else "found",
            "distance": round(distance, 1),
            "distance_threshold": round(classifier.domain.threshold, 1),
            "strangest_feature": strangest,
            "patients": info.patients,
        }
        base = replace(base, details=details, region=_on_grid(region.astype(np.uint8), brain, a, nearest=True))
        if not distance <= classifier.domain.threshold:
            raise _NoReading(
                f"this case is outside what {info.name} has seen: its distance is {distance:.0f}, above the limit of"
                f" {classifier.domain.threshold:.0f} (most by {strangest})"
            )
        members = classifier.probabilities(reading)
        p = float(members[0])
        low, high = (min(p, members.min()), max(p, members.max())) if len(members) < 20 else _interval(p, members)
        negative, positive = info.labels
        probabilities = ((negative, 1 - p, 1 - high, 1 - low), (positive, p, low, high))
        drop = _occlusion(classifier, reading, lambda part: at("mapping what speaks for it", 0.72 + 0.26 * part))
        occlusion = _on_grid(100 * drop, brain, a)
        return replace(base, probabilities=probabilities, occlusion=occlusion)
    except (_NoReading, InputError) as reason:
        return replace(base, abstention=" ".join(str(reason).split()))


def _note(info) -> str:
    counts = " and ".join(f"{info.patients[label]} {label}" for label in info.labels if label in info.patients)
    return f"{info.name}, trained on {counts} patients of {info.sites} sites. {info.evidence} {NOTICE}"


def _interval(p: float, members: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(members[1:], (2.5, 97.5))
    return min(p, float(low)), max(p, float(high))


def _sequences(volumes, given, wanted) -> dict[str, Volume]:
    """The two volumes by sequence, on A's grid, in the order that the classifier was trained with."""
    found: dict[str, Volume] = {}
    pair = " with ".join(wanted)
    for volume, stated, letter in zip(volumes, given, "AB"):
        name = volume.name or letter
        modality = guess_modality(volume)
        if volume.is_colour or modality != "MR":
            what = modality if modality != "MR" else "in colour"
            raise _NoReading(f"the classifier reads {pair}, and {name} is {what}")
        sequence = stated or sequence_of_name(volume.name)
        if sequence not in wanted:
            what = f"is {sequence}" if sequence else "does not say in its name which MR sequence it is"
            raise _NoReading(
                f"the classifier reads {pair}, and {name} {what}; where that is wrong, rename it so that it contains"
                f" {' or '.join(wanted)}"
            )
        if sequence in found:
            raise _NoReading(f"the classifier reads {pair}, and both volumes are {sequence}")
        found[sequence] = volume
    first = volumes[0]
    for sequence, volume in found.items():
        if volume is not first and compare_grids(first, volume):
            found[sequence] = resample_onto(volume, first)
    return {sequence: found[sequence] for sequence in wanted}


def _region(brain: Brain, mask: Volume | None) -> np.ndarray:
    if mask is None:
        region = find_region(brain)
        if not region.any():
            raise _NoReading(
                "no tumour was found: there is no FLAIR-bright region of"
                f" {SMALLEST_ML:g} ml or more inside the brain, and without one there is nothing to grade"
            )
    else:
        ones = replace(mask, array=(mask.array != 0).astype(np.float32))
        region = (resample_onto(ones, brain.place, background=0.0).array > 0.5) & brain.mask
        if region.sum() * GRID_MM**3 / 1e3 < SMALLEST_ML:
            raise _NoReading(f"the tumour mask holds less than {SMALLEST_ML:g} ml inside the brain")
    if is_cut(brain, region):
        raise _NoReading("the tumour is cut by the edge of the field of view, so that part of it is not seen")
    return region


def fuse_standardised(engine, brain: Brain, fusion: dict[str, str], device: str = "auto") -> np.ndarray:
    """(D, H, W) float32 in [0, 1]: T1ce and FLAIR fused by the engine on the working grid.

    Args:
        fusion: ``name`` of the weights; empty where no fused image is read, and the result is zeros.
    """
    if not fusion:
        return np.zeros_like(brain.images["t1ce"])
    pair = [replace(brain.place, array=brain.images[name], name=name) for name in ("t1ce", "flair")]
    options = FusionOptions(
        model=fusion["name"],
        device=device,
        window_a=(0.0, 1.0),
        window_b=(0.0, 1.0),
        modality_a="MR",
        modality_b="MR",
        check_registration=False,
    )
    return engine.fuse(*pair, options).fused


# -------------------------------------------------------------------------------------------- occlusion


def _occlusion(classifier: Classifier, reading: Reading, tick: Callable[[float], None]) -> np.ndarray:
    """(D, H, W) float32: how much hiding each block lowers the probability of the second label.

    Source: Zeiler and Fergus, ECCV 2014, with normal tissue instead of grey.
    """
    whole = classifier.probabilities(reading)[0]
    edge = 3
    while True:
        blocks = np.unique(np.argwhere(reading.region) // edge, axis=0)
        if len(blocks) <= BLOCKS[classifier.info.kind]:
            break
        edge += 1
    drop = np.zeros(reading.region.shape, np.float32)
    for k, block in enumerate(blocks):
        box = tuple(slice(n * edge, (n + 1) * edge) for n in block)
        hidden = np.zeros_like(reading.region)
        hidden[box] = True
        drop[box] = whole - classifier.probabilities(reading, hidden)[0]
        if k % 10 == 0:
            tick(k / len(blocks))
    drop[~reading.region] = 0
    return drop


def _on_grid(array: np.ndarray, brain: Brain, reference: Volume, nearest: bool = False) -> Volume:
    """An array of the working grid on the grid of ``reference``."""
    volume = replace(brain.place, array=array.astype(np.float32), name="")
    result = resample_onto(volume, reference, background=0.0).array
    place = replace(reference, modality="", path="", notes=())
    if nearest:
        return replace(place, array=(result > 0.5).astype(np.uint8), name=f"{reference.name} tumour region")
    return replace(place, array=result, name=f"{reference.name} occlusion map")
