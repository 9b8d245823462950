"""Ablations: the same training without one part of the network, over several seeds, measured on held-out patients.

Source of the variants: Zhou and Khalvati, arXiv 2508.03008, section 3.4 (without CMCA; single scan).
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from .. import NOTICE
from ..cases import find_cases
from ..config import SCANS, ModelConfig
from ..errors import InputError
from ..evaluation.evaluate import STANDARD, Row, evaluate, patient_means, write_csv
from ..evaluation.pictures import save_chart
from ..files import write_text
from ..inference.engine import FusionEngine
from ..models.clinicalfmamba import ClinicalFMamba, count_flops, count_parameters
from .train import read_preset, train

log = logging.getLogger(__name__)

FULL = "full"


def variants(config: ModelConfig) -> dict[str, dict]:
    """Name -> what it changes in the section ``model`` of a preset; the paper's head where ``config`` has another."""
    single = SCANS[config.dimension][1]
    changes = {
        FULL: {},
        "without CMCA": {"cmca": False},
        {2: "single-direction scan", 3: "single-axis scan"}[config.dimension]: {"scan": single},
    }
    return changes if config.head == "image" else {**changes, "image head": {"head": "image"}}


def ablate(preset: dict, name: str, data: Path, out: Path, seeds: int = 3) -> list[Row]:
    """Train and measure each variant with each seed; go on where an earlier call has stopped.

    A seed decides the split (where the preset gives a share of the patients), the initialisation and the crops, and is
    the same for all variants, so that they can be compared pair by pair. Writes ``ablation.csv``, ``ablation.md``,
    ``ablation.png`` (values) and ``ablation-differences.png`` (from the full network) into ``out``, and one folder for
    each run.

    Args:
        preset: of :func:`.train.load_preset`; ``training.seed`` is the first seed.
        seeds: how many.

    Returns:
        One row for each variant and seed: the variant as method, the seed as patient, means over patients as values.

    Raises:
        InputError: the folder holds runs of other settings; and all that :func:`.train.train` raises.
    """
    config, source, _, settings = read_preset(preset)
    if settings.init:
        raise InputError("an ablation trains each variant from nothing, as no weights fit all: leave training.init out")
    rows = []
    chosen = variants(config)
    for seed in range(settings.seed, settings.seed + seeds):
        for variant, change in chosen.items():
            mine = copy.deepcopy(preset)
            mine["model"].update(change)
            mine["training"]["seed"] = seed
            folder = out / variant.replace(" ", "-") / f"seed-{seed}"
            done = len(rows) + 1
            log.info("run %d of %d: %s, seed %d", done, seeds * len(chosen), variant, seed)
            values = _run(mine, name, data, folder, source.order[:2])
            rows.append(Row(variant, str(seed), "validation", values))
    if rank_zero_only.rank == 0:
        _write(rows, preset, out)
    return rows


def _run(preset: dict, name: str, data: Path, folder: Path, order: Sequence[str]) -> dict[str, float]:
    """Metrics of one variant and seed, from its folder where it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, table = folder / "preset.json", folder / "metrics.csv"
    text = json.dumps(preset, indent=1, sort_keys=True) + "\n"
    if settings.is_file() and settings.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds a run with other settings; choose another folder, or the same settings")
    if not table.is_file():
        if rank_zero_only.rank == 0:
            write_text(settings, text)
        weights = train(preset, name, data, folder, resume=True)
        if rank_zero_only.rank != 0:
            return {}
        record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        held = [case for case in find_cases(data, order) if case.patient in record["validation_patients"]]
        write_csv(evaluate(FusionEngine(), str(weights), held, order, ()), table)
    with open(table, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [Row("", r["patient"], r["case"], {m: float(r[m]) for m in STANDARD}) for r in lines]
    return {m: float(np.mean(list(patient_means(rows, "", m).values()))) for m in STANDARD}


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over seeds by Student's t; nan for a single one."""
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _write(rows: Sequence[Row], preset: dict, out: Path) -> None:
    write_csv(rows, out / "ablation.csv")
    write_text(out / "ablation.md", ablation_table(rows, preset))
    save_chart(out / "ablation.png", rows, t_interval, FULL)
    full = {row.patient: row.values for row in rows if row.method == FULL}
    differences = [
        Row(row.method, row.patient, row.case, {m: v - full[row.patient][m] for m, v in row.values.items()})
        for row in rows
        if row.method != FULL
    ]
    save_chart(out / "ablation-differences.png", differences, t_interval, FULL, "the full network, seed by seed")


def ablation_table(rows: Sequence[Row], preset: dict) -> str:
    """Two tables in Markdown: each variant, and its paired difference from the full network."""
    config = read_preset(preset)[0]
    metrics, seeds = list(rows[0].values), sorted({row.patient for row in rows})
    size = (256, 256) if config.dimension == 2 else (128, 128, 128)
    values = {v: {m: patient_means(rows, v, m) for m in metrics} for v in dict.fromkeys(row.method for row in rows)}
    head = "| variant | parameters | GFLOP | " + " | ".join(metrics) + " |"
    whole, paired = [head, "|---" * (len(metrics) + 3) + "|"], []
    for variant, means in values.items():
        mine = read_preset({**preset, "model": {**preset["model"], **variants(config)[variant]}})[0]
        cells = [_cell(np.array([means[m][s] for s in seeds]), "{:.3f}") for m in metrics]
        parameters = f"{count_parameters(ClinicalFMamba(mine)) / 1e6:.2f} M"
        whole.append(f"| {variant} | {parameters} | {count_flops(mine, size) / 1e9:.1f} | " + " | ".join(cells) + " |")
        if variant != FULL:
            cells = [_cell(np.array([means[m][s] - values[FULL][m][s] for s in seeds]), "{:+.4f}") for m in metrics]
            paired.append(f"| {variant} | " + " | ".join(cells) + " |")
    words = "x".join(map(str, size))
    over = f"one seed ({seeds[0]}), so no interval"
    if len(seeds) > 1:
        over = f"of these the mean over {len(seeds)} seeds ({', '.join(seeds)}) with its 95 % interval (Student's t)"
    return "\n".join(
        [
            f"Mean over the validation patients; {over}. Operations for a pair of {words}.",
            "",
            *whole,
            "",
            "Difference from the full network, seed by seed on the same patients:",
            "",
            "| variant | " + " | ".join(metrics) + " |",
            "|---" * (len(metrics) + 1) + "|",
            *paired,
            "",
            NOTICE,
            "",
        ]
    )


def _cell(values: np.ndarray, form: str) -> str:
    low, high = t_interval(values)
    if math.isnan(values.mean()):
        return "–"  # not defined on these images
    text = form.format(values.mean())
    return text if math.isnan(low) else f"{text} ({form.format(low)} to {form.format(high)})"
