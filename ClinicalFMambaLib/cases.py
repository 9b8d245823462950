"""Finding registered cases in a folder or a table, and reading them in the windows that the engine uses.

Layouts:
    pairs: ``DIR/MRI/NAME.png`` beside ``DIR/{CT,PET,SPECT}/NAME.png`` (AANLIB), or any two folders that are named as
        sources; images or volumes.
    cases: one folder a case with ``SOURCE.nii.gz`` or ``ANYTHING_SOURCE.nii.gz`` (BraTS).
    table: a CSV file whose columns are ``patient``, optionally ``case``, and one path for each source, relative to
        the table.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError
from .volumes import IMAGE_SUFFIXES, VOLUME_SUFFIXES, compare_grids, read_volume, suffix_of

log = logging.getLogger(__name__)

FUNCTIONAL = ("CT", "SPECT", "PET")
SUFFIXES = (*VOLUME_SUFFIXES, *IMAGE_SUFFIXES)
# Files in a case folder that are no source.
_LABELS = re.compile(r"(.*[_-])?(seg|segmentation|labels?|mask)", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One registered set of images: patient, name, and the path of each source, the anatomical one first."""

    patient: str
    name: str
    paths: dict[str, Path]


@dataclass(frozen=True)
class Listing:
    """What :func:`list_cases` found.

    Attributes:
        cases: the complete ones.
        sources: names of their sources, the anatomical one first.
        problems: one sentence for each thing that is wrong.
        left_out: one sentence for each case that lacks a source and is not used.
    """

    cases: tuple[Case, ...]
    sources: tuple[str, ...]
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def patients(self) -> list[str]:
        return sorted({case.patient for case in self.cases}, key=_natural)


def list_cases(data: Path, order: Sequence[str] = ()) -> Listing:
    """Everything that ``data`` holds, with everything that is wrong with it.

    Args:
        data: folder or .csv file.
        order: names of the wanted sources; by default MRI with the CT, SPECT or PET beside it, T2 with FLAIR (the
            paper's BraTS pair), or whatever two sources there are.

    Raises:
        InputError: ``data`` does not exist, or which sources are meant cannot be told.
    """
    data = Path(data)
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; check the path")
    if data.is_file():
        if data.suffix.lower() != ".csv":
            raise InputError(f"{data}: expected a folder, or a table that ends with .csv")
        return _from_table(data, order)
    folders = {path.name: path for path in sorted(data.iterdir()) if path.is_dir()}
    named = _pair_folders(folders, order)
    return _from_pairs(data, named, order) if named else _from_case_folders(data, folders, order)


def find_cases(data: Path, order: Sequence[str] = ()) -> list[Case]:
    """The cases of :func:`list_cases`; raises :class:`InputError` where there is none, or anything is wrong."""
    listing = list_cases(data, order)
    if listing.problems:
        more = len(listing.problems) - 1
        raise InputError(listing.problems[0] + (f" (and {more} more problems of this data)" if more else ""))
    for sentence in listing.left_out:
        log.warning("%s: left out", sentence)
    return list(listing.cases)


def check_cases(
    cases: Sequence[Case], order: Sequence[str] = (), progress: Callable[[float], None] | None = None
) -> list[str]:
    """Read every file: one sentence for each that cannot be read or does not fit the others of its case."""
    problems = []
    for k, case in enumerate(cases):
        try:
            load_case(case, order)
        except InputError as error:
            problems.append(str(error))
        if progress:
            progress((k + 1) / len(cases))
    return problems


def load_case(case: Case, order: Sequence[str] = ()) -> np.ndarray:
    """The sources of a case, (S, H, W) or (S, D, H, W) float32 in [0, 1], in the windows that the engine would choose.

    Raises:
        InputError: a file cannot be read, shows nothing, or lies on another grid than the first.
    """
    from .inference.colour import luma
    from .inference.intensity import apply_window, choose_window

    volumes = [read_source(case, name) for name in order or case.paths]
    for path, volume in zip((case.paths[name] for name in order or case.paths), volumes):
        if difference := compare_grids(volumes[0], volume):
            first = case.paths[next(iter(order or case.paths))]
            raise InputError(f"{first} and {path} do not fit each other: {difference}; register and resample them")
    arrays = [luma(v.array) if v.is_colour else apply_window(v.array, choose_window(v)) for v in volumes]
    return np.stack([array[0] if len(array) == 1 else array for array in arrays])


def read_source(case: Case, name: str):
    """One source of a case as a :class:`.volumes.Volume`; its modality is that of the source's name, if it says one."""
    from .inference.intensity import modality_of_name

    return read_volume(case.paths[name], modality_of_name(name))


# ------------------------------------------------------------------------------------------------ layouts


def _pair_folders(folders: dict[str, Path], order: Sequence[str]) -> dict[str, Path]:
    """The folders that hold one source each; empty where the layout is another one."""
    if order:
        found = {name: folders[name] for name in order if name in folders}
        return found if len(found) == len(order) or (found and not _case_folder(next(iter(found.values())))) else {}
    if "MRI" in folders:
        others = [name for name in FUNCTIONAL if name in folders]
        if len(others) > 1:
            raise InputError(f"{folders['MRI'].parent} has {' and '.join(others)} beside MRI; choose with --sources")
        if others:
            return {"MRI": folders["MRI"], others[0]: folders[others[0]]}
    if len(folders) == 2:
        contents = [{_stem(path) for path in _files(folder)} for folder in folders.values()]
        if contents[0] & contents[1] and not _case_folder(next(iter(folders.values()))):
            return dict(folders)
    return {}


def _case_folder(folder: Path) -> bool:
    """Whether the files of a folder are named as sequences of one patient."""
    return any(_source_of(path, ("t1", "t1ce", "t2", "flair", "ct")) for path in _files(folder))


def _from_pairs(data: Path, named: dict[str, Path], order: Sequence[str]) -> Listing:
    if missing := [name for name in order if name not in named]:
        raise InputError(f"{data} has no pairs: there is a folder {', '.join(named)}, but none called {missing[0]}")
    files = {name: {_stem(path): path for path in _files(folder)} for name, folder in named.items()}
    first, *rest = files
    problems = []
    for name in rest:
        for here, there in ((name, first), (first, name)):
            problems += [
                f"{files[here][stem]} has no partner {named[there] / stem}.*"
                for stem in sorted(files[here].keys() - files[there].keys(), key=_natural)
            ]
    stems = sorted(set.intersection(*(set(f) for f in files.values())), key=_natural)
    cases = [Case(_patient_of(stem), stem, {name: files[name][stem] for name in named}) for stem in stems]
    if not any(files.values()):
        problems.append(f"{data} has no pairs: its folders {', '.join(named)} hold no image and no volume")
    return Listing(tuple(cases), tuple(named), tuple(problems))


def _from_case_folders(data: Path, folders: dict[str, Path], order: Sequence[str]) -> Listing:
    held = {folder: _files(folder) for folder in folders.values()}
    held = {folder: files for folder, files in held.items() if files}
    if not held:
        raise InputError(
            f"{data} has no pairs and no cases: expected MRI/NAME.png beside CT, SPECT or PET/NAME.png,"
            " one folder a case with .nii.gz files, or a .csv table"
        )
    order = tuple(order) or _common_sources(data, held)
    cases, problems, left_out = [], [], []
    for folder, files in held.items():
        found = {name: [path for path in files if _source_of(path, (name,))] for name in order}
        missing = [name for name, paths in found.items() if not paths]
        double = [name for name, paths in found.items() if len(paths) > 1]
        if missing:
            left_out.append(f"{folder} has no {' and no '.join(missing)}")
        elif double:
            problems.append(
                f"{folder} has several files for {double[0]}: {', '.join(p.name for p in found[double[0]])}"
            )
        else:
            cases.append(Case(folder.name, folder.name, {name: paths[0] for name, paths in found.items()}))
    if not cases:
        problems.insert(0, f"{data} has no case folder that holds all of {', '.join(order)} (.nii.gz, .nrrd, .mha)")
    return Listing(tuple(sorted(cases, key=lambda c: _natural(c.name))), order, tuple(problems), tuple(left_out))


def _common_sources(data: Path, held: dict[Path, list[Path]]) -> tuple[str, ...]:
    """Which two sources the case folders have in common."""
    pair = ("t2", "flair")
    if all(any(_source_of(path, (name,)) for path in files) for files in held.values() for name in pair):
        return pair
    names = [{_stem(p).removeprefix(f"{folder.name}_") for p in files} for folder, files in held.items()]
    common = sorted(name for name in set.intersection(*names) if not _LABELS.fullmatch(name))
    if len(common) != 2:
        found = ", ".join(common) or "nothing under one name"
        raise InputError(f"{data}: its case folders have {found} in common; name the two to use with --sources A,B")
    from .inference.intensity import modality_of_name

    return tuple(sorted(common, key=lambda name: modality_of_name(name) in FUNCTIONAL))


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names of a CSV table as they are written, and each row's line with its cells by lower-case column name.

    Commas, semicolons (as spreadsheets write them where the comma is in numbers) and tabs separate cells. Empty lines
    are left out; missing cells at the end of a row are empty.

    Raises:
        InputError: the file is missing or no CSV table, a column is there twice, or a row has more cells than columns.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=head.count), strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV table ({error}); save it as UTF-8 CSV") from error
    (_, columns), *rows = [(line, row) for line, row in lines if any(row)] or [(1, [])]
    names = [name.lower() for name in columns]
    if double := [name for name in columns if names.count(name.lower()) > 1]:
        raise InputError(f"{path}: the column {double[0]!r} is there twice")
    for line, row in rows:
        if any(row[len(names) :]):
            raise InputError(
                f"{path}, line {line}: {len(row)} cells for {len(names)} columns; put quotes around a cell with a comma"
            )
    return columns, [(line, dict(zip(names, row + [""] * len(names)))) for line, row in rows]


def _from_table(path: Path, order: Sequence[str]) -> Listing:
    columns, rows = read_rows(path)
    names = {name.lower(): name for name in columns if name.lower() not in ("patient", "case")}
    wanted = [name.lower() for name in order] or list(names)
    missing = [name for name in wanted if name not in names]
    if "patient" not in (name.lower() for name in columns) or missing or len(wanted) < 2:
        expected = ", ".join(order) or "a column for each of two sources"
        raise InputError(
            f"{path}: expected the columns patient, {expected} (and case, if wanted); found {', '.join(columns)}"
        )
    cases, problems = [], []
    for line, lower in rows:
        keys = order or [names[name] for name in wanted]
        paths = {key: path.parent / lower[name] for key, name in zip(keys, wanted)}
        absent = [str(p) for key, p in paths.items() if not lower[key.lower()] or not p.exists()]
        name = lower.get("case") or _stem(next(iter(paths.values())))
        if not lower["patient"]:
            problems.append(f"{path}, line {line}: the patient is not given")
        elif absent:
            problems.append(f"{path}, line {line}: {absent[0]} does not exist")
        elif name in {case.name for case in cases}:
            problems.append(f"{path}, line {line}: the case {name} is there twice; give a column case")
        else:
            cases.append(Case(lower["patient"], name, paths))
    if not rows:
        problems.append(f"{path} has no row below its header")
    return Listing(tuple(cases), tuple(order or (names[name] for name in wanted)), tuple(problems))


# ------------------------------------------------------------------------------------------------- names


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if suffix_of(p) in SUFFIXES and not p.name.startswith(".")]


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(suffix_of(path))] if suffix_of(path) in SUFFIXES else path.name


def _source_of(path: Path, names: Sequence[str]) -> str:
    """Which of the names a file in a case folder has: NAME.nii.gz or ANYTHING_NAME.nii.gz."""
    stem = _stem(path).lower()
    return next((n for n in names if stem == n.lower() or stem.endswith((f"_{n.lower()}", f"-{n.lower()}"))), "")


def _patient_of(stem: str) -> str:
    """AANLIB: the number without its last three digits. ``p01_s003``: without its last part. Else the whole name."""
    if stem.isdigit():
        return stem[:-3] if len(stem) > 3 else stem
    match = re.fullmatch(r"(.*\d.*?)[_-][A-Za-z]*\d+", stem)
    return match[1] if match else stem


def _natural(text: str) -> list:
    """Sort key under which p2 comes before p10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
