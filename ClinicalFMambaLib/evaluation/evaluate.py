"""Measure a model and the baseline fusions on the same registered pairs.

The model's images come from :meth:`.inference.engine.FusionEngine.fuse`, so what is measured is what a user gets.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import FusionOptions
from ..errors import InputError
from ..files import replacing, write_text
from ..inference.colour import luma
from ..volumes import read_volume
from .baselines import BASELINES
from .metrics import METRICS, evaluate_all

logger = logging.getLogger(__name__)

# Slice-wise metrics of a volume are taken on every fourth slice: neighbours at 1 mm say nearly the same, and the
# phase congruency of all of them takes minutes.
SLICE_STEP = 4


@dataclass(frozen=True)
class Row:
    """Metrics of one method on one case."""

    method: str
    patient: str
    case: str
    values: dict[str, float]


def evaluate(
    engine,
    model: str,
    cases: Iterable,
    order: Sequence[str],
    baselines: Sequence[str] = tuple(BASELINES),
    metrics: Sequence[str] = tuple(METRICS),
    keep: Callable[[str, object], None] | None = None,
) -> list[Row]:
    """Fuse each case with the model and with each baseline, and measure all of them.

    Args:
        engine: a :class:`.inference.engine.FusionEngine`.
        model: name or path of the model.
        cases: of :func:`.training.data.find_pairs` or :func:`.training.data.find_cases`.
        order: names of the two sources, the anatomical one first.
        baselines: names in :data:`.baselines.BASELINES`.
        metrics: names in :data:`.metrics.METRICS`.
        keep: called with the case's name and the engine's result, to draw pictures from it.

    Returns:
        One row for each method and case; the model's method is called ``"ClinicalFMamba"``.
    """
    rows = []
    for case in cases:
        a, b = (read_volume(case.paths[name], modality="" if name in case.paths else name) for name in order)
        result = engine.fuse(a, b, FusionOptions(model=model, check_registration=False))
        sources = [luma(x) if x.ndim == 4 else x for x in (result.a01, result.b01)]
        first, second = (x[0] if len(x) == 1 else x for x in sources)
        box = _content_box(first, second)
        first, second = first[box], second[box]
        fused = {"ClinicalFMamba": (result.fused[0] if len(result.fused) == 1 else result.fused)[box]}
        fused.update({name: BASELINES[name](first, second) for name in baselines})
        for method, image in fused.items():
            values = measure(image, first, second, metrics)
            rows.append(Row(method, case.patient, case.name, values))
        logger.info("%s: %s", case.name, {k: round(v, 3) for k, v in rows[-len(fused)].values.items()})
        if keep:
            keep(case.name, result)
    if not rows:
        raise InputError("there is no case to evaluate")
    return rows


def measure(fused: np.ndarray, a: np.ndarray, b: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of one case; what is defined on slices only is taken on every :data:`SLICE_STEP`-th of a volume."""
    if fused.ndim == 2:
        return evaluate_all(fused, a, b, metrics)
    whole = evaluate_all(fused, a, b, [m for m in metrics if METRICS[m].native_3d])
    thin = (x[SLICE_STEP // 2 :: SLICE_STEP] for x in (fused, a, b))
    sliced = evaluate_all(*thin, [m for m in metrics if not METRICS[m].native_3d])
    return {m: {**whole, **sliced}[m] for m in metrics}


def _content_box(a: np.ndarray, b: np.ndarray) -> tuple[slice, ...]:
    """Volumes without their empty margin (images whole: published figures are of whole images)."""
    if a.ndim == 2:
        return (slice(None), slice(None))
    inside = np.argwhere((a > 0) | (b > 0))
    low, high = inside.min(0), inside.max(0) + 1
    return tuple(slice(int(max(0, i - 4)), int(j + 4)) for i, j in zip(low, high))


def summarise(rows: Sequence[Row], seed: int = 0, draws: int = 2000) -> dict[str, dict[str, dict[str, float]]]:
    """Mean over patients of each patient's mean, with a 95 % bootstrap interval over patients.

    Returns:
        method -> metric -> {"mean", "low", "high", "patients"}; the interval is nan for fewer than three patients.
    """
    summary: dict = {}
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        patients = sorted({row.patient for row in mine})
        summary[method] = {}
        for metric in mine[0].values:
            means = np.array([np.mean([r.values[metric] for r in mine if r.patient == p]) for p in patients])
            low = high = math.nan
            if len(means) >= 3:
                picks = np.random.default_rng(seed).integers(len(means), size=(draws, len(means)))
                low, high = np.percentile(means[picks].mean(1), [2.5, 97.5])
            summary[method][metric] = {
                "mean": float(means.mean()),
                "low": float(low),
                "high": float(high),
                "patients": len(means),
            }
    return summary


def write_tables(rows: Sequence[Row], out: Path) -> None:
    """``metrics.csv``, a line for each method and case, and ``summary.json``."""
    out.mkdir(parents=True, exist_ok=True)
    names = list(rows[0].values)
    with replacing(out / "metrics.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "patient", "case", *names])
        writer.writerows([r.method, r.patient, r.case, *(f"{r.values[n]:.6g}" for n in names)] for r in rows)
    write_text(out / "summary.json", json.dumps(summarise(rows), indent=1) + "\n")


def markdown_table(summary: dict, metrics: Sequence[str]) -> str:
    """A table of methods and metrics; the best fusion in bold, the single sources left out of the comparison."""
    compared = [method for method in summary if not method.startswith("source_")]
    lines = ["| method | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for method, values in summary.items():
        cells = []
        for metric in metrics:
            value = values[metric]
            text = f"{value['mean']:.3f}"
            if not math.isnan(value["low"]):
                text += f" ({value['low']:.3f} to {value['high']:.3f})"
            better = METRICS[metric].higher_is_better
            if better is not None and method in compared:
                best = (max if better else min)(summary[m][metric]["mean"] for m in compared)
                text = f"**{text}**" if value["mean"] == best else text
            cells.append(text)
        lines.append(f"| {method.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
