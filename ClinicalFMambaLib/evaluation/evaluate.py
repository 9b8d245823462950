"""Measure a model, the baseline fusions and anybody's fused images on the same registered cases.

The model's images come from :meth:`.inference.engine.FusionEngine.fuse`, so what is measured is what a user gets.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cases import SUFFIXES, Case, load_case, read_source
from ..config import FusionOptions
from ..errors import InputError
from ..files import replacing, write_text
from ..inference.colour import luma
from ..volumes import Volume, compare_grids, read_volume, suffix_of
from .baselines import BASELINES
from .metrics import METRICS, evaluate_all

log = logging.getLogger(__name__)

MODEL = "ClinicalFMamba"
SOURCES = ("source_a", "source_b")
# Fusions that anybody makes without a method; a metric that one of them leads says little about quality.
TRIVIAL = ("average", "maximum", *SOURCES)
# FMI of grey values is a second variant of a metric that is there already.
STANDARD = tuple(name for name in METRICS if name != "FMI-pixel")
# Slice-wise metrics of a volume are taken on every fourth slice: neighbours at 1 mm say nearly the same, and the
# phase congruency of all of them takes minutes.
SLICE_STEP = 4
# Starting processes for the metrics takes seconds.
_WORTH_PROCESSES = 100


@dataclass(frozen=True)
class Row:
    """Metrics of one method on one case."""

    method: str
    patient: str
    case: str
    values: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """One case after it was measured.

    Attributes:
        result: what the engine returned.
        a, b: sources in [0, 1], (H, W) or (D, H, W); volumes without their empty margin.
        fused: method -> image, the same shape.
        box: the part of the volume that a, b and fused are.
        rows: one for each method.
    """

    case: Case
    result: object
    a: np.ndarray
    b: np.ndarray
    fused: dict[str, np.ndarray]
    box: tuple[slice, ...]
    rows: list[Row]


def evaluate(
    engine,
    model: str,
    cases: Sequence[Case],
    order: Sequence[str] = (),
    baselines: Sequence[str] = tuple(BASELINES),
    metrics: Sequence[str] = STANDARD,
    keep: Callable[[Measured], None] | None = None,
    peers: Mapping[str, Path] | None = None,
    jobs: int | None = None,
) -> list[Row]:
    """Fuse each case with the model and with each baseline, and measure all of them.

    Args:
        engine: a :class:`.inference.engine.FusionEngine`.
        model: name or path of the model.
        cases: of :func:`.cases.find_cases`.
        order: names of the two sources, the anatomical one first; by default the first two of each case.
        baselines: names in :data:`.baselines.BASELINES`.
        metrics: names in :data:`.metrics.METRICS`.
        keep: called after each case, to draw pictures and write images.
        peers: name of another method -> folder of its fused images, see :func:`find_fused`.
        jobs: processes that compute metrics; by default as many as the machine has cores, if that is worth it.

    Returns:
        One row for each method and case; the model's method is called ``"ClinicalFMamba"``.

    Raises:
        InputError: no case, a source that cannot be read, peers that do not fit.
    """
    if not cases:
        raise InputError("there is no case to evaluate")
    others = {name: find_fused(folder, cases, every=True) for name, folder in (peers or {}).items()}
    count = len(cases) * (1 + len(baselines) + len(others))
    rows: list[Row] = []
    with _measuring(count, jobs) as measure_all:
        for number, case in enumerate(cases, start=1):
            first, second = list(order or case.paths)[:2]
            options = FusionOptions(model=model, check_registration=False)
            result = engine.fuse(read_source(case, first), read_source(case, second), options)
            sources = [luma(x) if x.ndim == 4 else x for x in (result.a01, result.b01)]
            a, b, own = (x[0] if len(x) == 1 else x for x in (*sources, result.fused))
            box = _content_box(a, b)
            fused = {MODEL: own[box]}
            for name, paths in others.items():
                fused[name] = load_fused(paths[case.name], result.volume)[box]
            a, b = a[box], b[box]
            fused.update({name: BASELINES[name](a, b) for name in baselines})
            values = measure_all([(image, a, b, tuple(metrics)) for image in fused.values()])
            mine = [Row(method, case.patient, case.name, v) for method, v in zip(fused, values)]
            rows += mine
            _tell(number, len(cases))
            if keep:
                keep(Measured(case, result, a, b, fused, box, mine))
    return rows


def score(
    folder: Path,
    cases: Sequence[Case],
    order: Sequence[str] = (),
    metrics: Sequence[str] = STANDARD,
    limits: tuple[float, float] | None = None,
    jobs: int | None = None,
) -> list[Row]:
    """Measure fused images that somebody has made, against the sources in the windows that the engine would choose.

    Args:
        folder: one file a case, see :func:`find_fused`.
        limits: the values that mean 0 and 1 in the fused files, see :func:`load_fused`.

    Returns:
        One row for each fused file; the method is called as the folder.

    Raises:
        InputError: no fused file, one without sources, of another size, or of unknown scale.
    """
    paths = find_fused(folder, cases)
    if left := len(cases) - len(paths):
        log.warning("%d of %d cases have no fused image in %s and are left out", left, len(cases), folder)
    rows = []
    with _measuring(len(paths), jobs) as measure_all:
        chosen = [case for case in cases if case.name in paths]
        for start in range(0, len(chosen), 16):
            part, tasks = chosen[start : start + 16], []
            for case in part:
                names = list(order or case.paths)[:2]
                a, b = load_case(case, names)
                box = _content_box(a, b)
                fused = load_fused(paths[case.name], read_source(case, names[0]), limits)
                tasks.append((fused[box], a[box], b[box], tuple(metrics)))
            values = measure_all(tasks)
            rows += [Row(Path(folder).resolve().name, c.patient, c.name, v) for c, v in zip(part, values)]
            _tell(len(rows), len(chosen))
    return rows


def find_fused(folder: Path, cases: Sequence[Case], every: bool = False) -> dict[str, Path]:
    """The fused file of each case: ``CASE.png``, ``CASE.nii.gz`` … or one file in a folder ``CASE``.

    Args:
        every: whether each case needs one.

    Raises:
        InputError: no such folder, no fused file, one that belongs to no case, two for a case, or a case without one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it should hold one fused image a case, named as the case")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if suffix_of(file) in SUFFIXES and not file.name.startswith(".")]
        if path.is_dir() and len(files) > 1:
            raise InputError(f"{path} holds {len(files)} images; one fused image a case is expected")
        for file in files:
            name = path.name if path.is_dir() else file.name[: -len(suffix_of(file))]
            if name in found:
                raise InputError(f"{folder} has two fused images for {name}: {found[name].name} and {file.name}")
            found[name] = file
    names = {case.name for case in cases}
    if not found:
        raise InputError(f"{folder} holds no image and no volume")
    if strangers := sorted(set(found) - names):
        raise InputError(
            f"{len(strangers)} of {len(found)} fused images in {folder} belong to no case of the data, the first is"
            f" {found[strangers[0]].name}; name them as the cases, such as {min(names)}"
        )
    if every and (missing := sorted(names - set(found))):
        raise InputError(f"{folder} has no fused image for {len(missing)} of {len(names)} cases, such as {missing[0]}")
    return found


def load_fused(path: Path, source: Volume, limits: tuple[float, float] | None = None) -> np.ndarray:
    """A fused image (H, W) or volume (D, H, W) in [0, 1] on the grid of ``source``; of colour the luma.

    Without ``limits``, 8-bit values are 0 to 255, integers up to between 256 and 1000 this program's thousandths, and
    floats from 0 to 1 what they are: a window chosen from the data would hide a fusion's loss of contrast.

    Raises:
        InputError: the file cannot be read, has another size than the sources, or values of unknown scale.
    """
    volume = read_volume(path)
    array = luma(volume.array) if volume.is_colour else volume.array.astype(np.float32)
    if volume.is_colour:
        low, high = 0.0, 1.0
    elif limits is not None:
        low, high = limits
    elif volume.array.dtype == np.uint8:
        low, high = 0.0, 255.0
    elif array.min() >= -0.01 and array.max() <= 1.01:
        low, high = 0.0, 1.0
    elif volume.array.dtype.kind in "iu" and array.min() >= 0 and 255 < array.max() <= 1000:
        low, high = 0.0, 1000.0
    else:
        raise InputError(
            f"{path} has values from {array.min():g} to {array.max():g}: say with --range LO,HI which mean black and"
            " white"
        )
    if volume.shape != source.shape:
        size = ["x".join(str(n) for n in reversed(v.shape[v.shape[0] == 1 :])) for v in (volume, source)]
        raise InputError(f"{path} is {size[0]}, its sources are {size[1]}; resample it onto them")
    if difference := compare_grids(source, volume):
        log.warning("%s lies elsewhere than its sources (%s): compared voxel by voxel all the same", path, difference)
    array = array[0] if len(array) == 1 else array
    return np.clip((array - low) / (high - low), 0, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------ metrics


def measure(fused: np.ndarray, a: np.ndarray, b: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of one case; what is defined on slices only is taken on every :data:`SLICE_STEP`-th of a volume."""
    if fused.ndim == 2:
        return evaluate_all(fused, a, b, metrics)
    whole = evaluate_all(fused, a, b, [m for m in metrics if METRICS[m].native_3d])
    thin = (x[SLICE_STEP // 2 :: SLICE_STEP] for x in (fused, a, b))
    sliced = evaluate_all(*thin, [m for m in metrics if not METRICS[m].native_3d])
    return {m: {**whole, **sliced}[m] for m in metrics}


def _tell(number: int, count: int) -> None:
    if number == count or number % max(1, count // 20) == 0:
        log.info("%d of %d cases measured", number, count)


@contextlib.contextmanager
def _measuring(count: int, jobs: int | None) -> Iterator[Callable[[list[tuple]], list[dict[str, float]]]]:
    """A function that measures several (fused, a, b, metrics), in processes of its own where that is faster."""
    if jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = min(cores, 16) if count >= _WORTH_PROCESSES else 1
    if jobs <= 1:
        yield lambda tasks: [measure(*task) for task in tasks]
        return
    # fork would copy torch's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        yield lambda tasks: list(pool.map(_measure_task, tasks))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _measure_task(task: tuple) -> dict[str, float]:
    return measure(*task)


def _content_box(a: np.ndarray, b: np.ndarray) -> tuple[slice, ...]:
    """Volumes without their empty margin (images whole: published figures are of whole images)."""
    if a.ndim == 2:
        return (slice(None), slice(None))
    inside = np.argwhere((a > 0) | (b > 0))
    low, high = inside.min(0), inside.max(0) + 1
    return tuple(slice(int(max(0, i - 4)), int(j + 4)) for i, j in zip(low, high))


# ------------------------------------------------------------------------------------------------- tables


def method_title(method: str) -> str:
    """The name of a method as people write it."""
    alone = {"source_a": "source A alone", "source_b": "source B alone"}
    return alone.get(method, method.replace("_", " ") if method in BASELINES else method)


def patient_means(rows: Sequence[Row], method: str, metric: str) -> dict[str, float]:
    """Mean of each patient's cases, so that a patient with many slices counts no more than one with few."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.method == method:
            values.setdefault(row.patient, []).append(row.values[metric])
    return {patient: float(np.mean(values[patient])) for patient in sorted(values)}


def interval(means: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over patients; nan for fewer than three of them."""
    if len(means) < 3:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(len(means), size=(draws, len(means)))
    low, high = np.percentile(np.asarray(means)[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Sequence[Row], seed: int = 0, draws: int = 2000) -> dict[str, dict[str, dict[str, float]]]:
    """Mean over patients of each patient's mean, with a 95 % bootstrap interval over patients.

    Returns:
        method -> metric -> {"mean", "low", "high", "patients"}; the interval is nan for fewer than three patients.
    """
    summary: dict = {}
    for method in dict.fromkeys(row.method for row in rows):
        summary[method] = {}
        for metric in rows[0].values:
            means = np.array(list(patient_means(rows, method, metric).values()))
            low, high = interval(means, seed, draws)
            summary[method][metric] = {"mean": float(means.mean()), "low": low, "high": high, "patients": len(means)}
    return summary


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each method and case."""
    names = list(rows[0].values)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "patient", "case", *names])
        writer.writerows([r.method, r.patient, r.case, *(f"{r.values[n]:.6g}" for n in names)] for r in rows)


def write_tables(rows: Sequence[Row], out: Path) -> None:
    """``metrics.csv``, a line for each method and case, and ``summary.json``."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / "metrics.csv")
    summary = {m: {k: {n: _json(x) for n, x in v.items()} for k, v in s.items()} for m, s in summarise(rows).items()}
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")


def _json(value: float) -> float | None:
    """JSON has no nan."""
    return None if isinstance(value, float) and math.isnan(value) else value


def ranking(summary: dict, metric: str, methods: Sequence[str]) -> list[str]:
    """The methods from best to worst; empty for a metric that has no better direction."""
    better = METRICS[metric].higher_is_better
    known = [m for m in methods if not math.isnan(summary[m][metric]["mean"])]
    if better is None:
        return []
    return sorted(known, key=lambda m: summary[m][metric]["mean"], reverse=better)


def markdown_table(summary: dict, metrics: Sequence[str]) -> str:
    """A table of methods and metrics; the best fusion in bold, the single sources left out of the comparison."""
    compared = [method for method in summary if method not in SOURCES]
    best = {metric: ranking(summary, metric, compared)[:1] for metric in metrics}
    lines = ["| method | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for method, values in summary.items():
        cells = []
        for metric in metrics:
            value = values[metric]
            text = "–" if math.isnan(value["mean"]) else f"{value['mean']:.3f}"
            if not math.isnan(value["low"]):
                text += f" ({value['low']:.3f} to {value['high']:.3f})"
            cells.append(f"**{text}**" if method in best[metric] else text)
        lines.append(f"| {method_title(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
