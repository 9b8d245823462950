"""Glioma patients for the classifier: grade, site, the standardised and fused pair, and the tumour painted out."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..cases import Case, find_cases, read_source
from ..errors import InputError
from ..files import replacing
from ..inference import tumour_region
from ..inference.classify import fuse_standardised
from ..inference.tumour_features import SOURCES, Reading
from ..inference.tumour_region import Brain, _dilate, find_region, is_cut, mirrored, normal_tissue, standardise
from ..volumes import VOLUME_SUFFIXES, compare_grids, read_volume, resample_onto, suffix_of

logger = logging.getLogger(__name__)

# To be raised when what a prepared case holds changes, so that old ones are made again.
PREPARATION = 1


@dataclass(frozen=True)
class Patient:
    """One glioma patient.

    Attributes:
        label: 0 or 1, the index of the grade among the labels; -1 for a patient without glioma.
        site: hospital.
        reading: as a user's pair would be read.
        control: the same with the tumour painted out; its region is where the tumour was.
        dice: overlap of the found region with the reader's segmentation, NaN where there is none.
    """

    name: str
    label: int
    site: str
    reading: Reading
    control: Reading
    dice: float


@dataclass(frozen=True)
class Entry:
    """A row of the table: a case, its grade and its site."""

    case: Case
    label: int
    site: str


def read_table(path: Path, labels: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Case to (label, site) from a CSV table with the columns case, grade and site.

    Rows without a grade are patients without glioma, label -1. BraTS' own ``name_mapping.csv`` (Grade,
    BraTS_2019_subject_ID …) is understood; its site is the institution in the case's name.

    Raises:
        InputError: the table cannot be read, or a grade is none of the labels.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV table ({error}); it needs case, grade, site") from error
    found = {}
    for line, row in enumerate(rows, start=2):
        lower = {str(key).strip().lower(): value.strip() for key, value in row.items() if isinstance(value, str)}
        name = lower.get("case") or next(
            (lower[k] for k in ("brats_2020_subject_id", "brats_2019_subject_id") if lower.get(k)), ""
        )
        if "grade" not in lower or not name:
            raise InputError(f"{path}, line {line}: expected the columns case, grade, site; found {', '.join(row)}")
        grade = lower["grade"]
        if grade and grade not in labels:
            raise InputError(f"{path}, line {line}: the grade {grade!r} is none of {', '.join(labels)}")
        found[name] = (list(labels).index(grade) if grade else -1, lower.get("site") or institution(name))
    return found


def institution(case: str) -> str:
    """The institution in a BraTS case name: ``BraTS19_TCIA10_628_1`` and ``Brats18_CBICA_ABM_1`` state one."""
    words = case.split("_")
    return words[1] if len(words) > 2 and not words[1].isdigit() else words[0]


def list_patients(data: Path, sources: Sequence[str], table: Path, labels: Sequence[str]) -> list[Entry]:
    """The cases of ``data`` that the table knows.

    Raises:
        InputError: no table, cases without a row, or a grade that nobody has.
    """
    known = read_table(table, labels)
    cases = find_cases(data, sources)
    missing = [case.name for case in cases if case.name not in known]
    if missing:
        logger.warning("not in %s, and left out: %s", table, ", ".join(missing))
    entries = [Entry(case, *known[case.name]) for case in cases if case.name in known]
    for k, label in enumerate(labels):
        if sum(entry.label == k for entry in entries) < 3:
            raise InputError(f"{data} has fewer than 3 patients with the grade {label}: too few to learn from")
    return entries


# ------------------------------------------------------------------------------------------------ reading


def load_patient(entry: Entry, engine, fusion: dict[str, str], segmentation: str, cache: Path) -> Patient:
    """Read, standardise and fuse one case, once as it is and once with the tumour painted out.

    Args:
        fusion: ``name`` and ``sha256`` of the fusion weights.
        segmentation: name of the file with the reader's segmentation, for the Dice and the painting; may not exist.
        cache: folder that keeps what takes long.

    Raises:
        InputError: the case cannot be read or shows no tumour; the message names it.
    """
    path = cache / f"{entry.case.name}-{_key(entry, fusion)}.npz"
    arrays = _load(path)
    if arrays is None:
        arrays = _prepare(entry, engine, fusion, segmentation)
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    place = json.loads(str(arrays["place"]))
    volume = replace(_EMPTY, array=arrays["mask"], **{k: tuple(v) for k, v in place.items()})

    def reading(kind: str) -> Reading:
        images = {name: arrays[f"{kind}.{name}"] for name in SOURCES}
        brain = Brain(images, arrays["mask"], arrays["inside"], volume)
        return Reading.of(brain, arrays[f"{kind}.fused"], arrays["region"])

    return Patient(
        entry.case.name, entry.label, entry.site, reading("patient"), reading("control"), float(arrays["dice"])
    )


_EMPTY = tumour_region.Volume(np.zeros((1, 1, 1), bool), spacing=(tumour_region.GRID_MM,) * 3)


def _key(entry: Entry, fusion: dict[str, str]) -> str:
    """Of everything that the prepared arrays depend on."""
    digest = hashlib.sha256(json.dumps([PREPARATION, fusion], sort_keys=True).encode())
    for name in sorted(entry.case.paths):
        status = entry.case.paths[name].stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _load(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError):
        return None  # half a file is made again


def _prepare(entry: Entry, engine, fusion, segmentation: str) -> dict[str, np.ndarray]:
    case = entry.case
    volumes = dict(zip(SOURCES, (read_source(case, name) for name in case.paths)))
    first, second = volumes.values()
    if difference := compare_grids(first, second):
        raise InputError(f"{case.name}: its sources lie on different grids: {difference}; resample them first")
    try:
        brain = standardise(volumes)
    except InputError as error:
        raise InputError(f"{case.name}: {error}") from error
    region = find_region(brain)
    tumour, dice = region, float("nan")
    label = _segmentation(case, segmentation)
    if label is not None:
        ones = replace(label, array=(label.array != 0).astype(np.float32))
        seen = (resample_onto(ones, brain.place, background=0.0).array > 0.5) & brain.mask
        dice = 2 * float((seen & region).sum()) / max(1.0, float(seen.sum() + region.sum()))
        tumour = region | seen
    if is_cut(brain, region):
        logger.warning("%s: the tumour reaches the edge of the field of view", case.name)
    painted = replace(brain, images=paint_out(brain, tumour, case.name))
    place = {name: getattr(brain.place, name) for name in ("spacing", "origin", "direction")}
    arrays = {
        "mask": brain.mask,
        "inside": brain.inside,
        "region": region,
        "dice": np.array(dice),
        "place": np.array(json.dumps(place)),
    }
    for kind, one in (("patient", brain), ("control", painted)):
        arrays |= {f"{kind}.{name}": one.images[name] for name in SOURCES}
        arrays[f"{kind}.fused"] = fuse_standardised(engine, one, fusion)
    return arrays


def _segmentation(case: Case, name: str):
    """The volume NAME beside the sources of a case, or None."""
    folder = next(iter(case.paths.values())).parent
    for path in sorted(folder.iterdir()) if name else ():
        stem = path.name[: -len(suffix_of(path))].lower() if suffix_of(path) else ""
        if suffix_of(path) in VOLUME_SUFFIXES and (stem == name or stem.endswith((f"_{name}", f"-{name}"))):
            return read_volume(path)
    return None


def paint_out(brain: Brain, tumour: np.ndarray, seed: str = "") -> dict[str, np.ndarray]:
    """The sources with healthy tissue in place of the tumour and what is within 4 mm of it.

    It is the tissue of the other hemisphere, mirrored; where that is tumour, too, or no brain, values drawn from the
    normal tissue.

    Args:
        seed: of the draws.
    """
    grown = _dilate(tumour, 2) & brain.mask
    other = mirrored(brain.mask & ~grown, brain) & grown
    rest = grown & ~other
    normal = normal_tissue(brain, tumour)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    drawn = rng.integers(0, max(1, int(normal.sum())), int(rest.sum()))
    painted = {}
    for name, image in brain.images.items():
        result = image.copy()
        result[other] = mirrored(image, brain)[other]
        # The same place is drawn in every source, so that the tissues still fit each other.
        result[rest] = image[normal][drawn] if normal.any() else 0
        painted[name] = result
    return painted
