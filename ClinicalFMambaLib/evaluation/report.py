"""The report of an evaluation: one HTML file with everything in it, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import NOTICE, __version__
from ..cases import Case
from ..files import write_text
from ..pretrained import find_weights, read_record, sha256
from ..volumes import write_volume
from .baselines import BASELINES
from .evaluate import (
    MODEL,
    SLICE_STEP,
    SOURCES,
    STANDARD,
    TRIVIAL,
    Measured,
    Row,
    evaluate,
    interval,
    method_title,
    patient_means,
    ranking,
    summarise,
    write_tables,
)
from .metrics import IGNORED_SHARE, METRICS
from .pictures import make_example, save_chart, save_example

# The metrics that the mean rank is taken over: each has a better direction, and they pull in different ones.
RANKED = ("SSIM", "FSIM", "FMI", "QABF", "VIF", "SCD")
EXAMPLES = 3


def evaluate_data(
    engine,
    model: str,
    data: Path,
    cases: Sequence[Case],
    order: Sequence[str],
    out: Path,
    metrics: Sequence[str] = STANDARD,
    peers: Mapping[str, Path] | None = None,
    jobs: int | None = None,
    readers: int = 0,
) -> list[Row]:
    """Measure a model on cases of ``data`` and write the report, the tables and the fused images into ``out``.

    See :func:`.evaluate.evaluate` for the arguments and errors. The fused images are ``out/fused/CASE.png`` or
    ``.nii.gz``.

    Args:
        readers: cases of a blinded reader study (:mod:`.reader_study`); 0 for none.
    """
    from .reader_study import ReaderStudy

    study = ReaderStudy(cases, readers, order, out) if readers else None
    report = Report(f"Fusion of {order[0]} with {order[1]}: {MODEL} against baseline fusions", order)
    report.facts["model"] = model
    if model != "auto":
        name, weights = find_weights(model)
        report.facts["model"] = f"{name}, SHA-256 {sha256(weights)}"
        if seen := sorted({case.patient for case in cases} & _training_patients(model)):
            listed = ", ".join(seen[:12]) + (" …" if len(seen) > 12 else "")
            report.warnings.append(
                f"The model was trained on {len(seen)} of these patients, or on others of that name ({listed}): only"
                " the rest says how it does on new patients. --patients chooses."
            )
    report.facts["data"] = f"{Path(data).resolve().name}: {order[0]} (A) with {order[1]} (B)"
    report.choose(cases)
    folder = out / "fused"
    folder.mkdir(parents=True, exist_ok=True)

    def keep(measured: Measured) -> None:
        report.keep(measured)
        if study:
            study.keep(measured)
        volume = measured.result.volume
        suffix = ".png" if volume.is_image else ".nii.gz"
        write_volume(volume, folder / f"{measured.case.name}{suffix}", measured.result.metadata())

    rows = evaluate(engine, model, cases, order, metrics=metrics, keep=keep, peers=peers, jobs=jobs)
    report.write(rows, out)
    if study:
        study.write(rows)
    return rows


def _training_patients(model: str) -> set[str]:
    """Those that the model's record names; none where there is no record, or one that cannot be read."""
    try:
        return set(read_record(model)["training_patients"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@dataclass
class Report:
    """Collects cases while they are measured, then writes tables, pictures and ``report.html``.

    The examples are the middle case of up to three patients, chosen before anything is measured, and the case on
    which the model has its lowest SSIM.

    Attributes:
        title: of the report.
        sources: names of the two sources.
        facts: name -> text, shown in a table: model, data …
        warnings: sentences that stand above the results.
    """

    title: str
    sources: Sequence[str]
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._chosen: set[str] = set()
        self._examples: list = []
        self._worst = None
        self._models: set[str] = set()
        self._volumes = False
        self._lowest = math.inf

    def choose(self, cases: Sequence) -> None:
        """Choose the examples from all cases that will be measured."""
        patients = list(dict.fromkeys(case.patient for case in cases))
        step = max(1, len(patients) / EXAMPLES)
        for patient in (patients[int(k * step)] for k in range(min(EXAMPLES, len(patients)))):
            mine = [case.name for case in cases if case.patient == patient]
            self._chosen.add(mine[len(mine) // 2])

    def keep(self, measured: Measured) -> None:
        """Take what the report shows of one case; for the argument ``keep`` of :func:`.evaluate.evaluate`."""
        for warning in measured.result.warnings:
            # A warning about one image, such as a black one, is not one about the evaluation.
            if warning not in self.warnings and "was trained on" in warning:
                self.warnings.append(warning)
        self._volumes |= measured.a.ndim == 3
        self._models.add(measured.result.provenance["model"]["name"])
        if measured.case.name in self._chosen:
            self._examples.append(make_example(measured, self.sources, f"patient {measured.case.patient}"))
        value = next(iter(measured.rows)).values.get("SSIM", math.nan)
        if value < self._lowest and measured.case.name not in self._chosen:
            self._lowest = value
            why = f"patient {measured.case.patient}, the lowest SSIM of {MODEL} ({value:.3f})"
            self._worst = make_example(measured, self.sources, why)

    def write(self, rows: Sequence[Row], out: Path) -> Path:
        """``metrics.csv``, ``summary.json``, ``metrics.png``, ``example-*.png`` and ``report.html`` in ``out``."""
        write_tables(rows, out)
        pictures = [save_chart(out / "metrics.png", rows)]
        examples = self._examples + ([self._worst] if self._worst else [])
        for number, example in enumerate(examples, start=1):
            pictures.append(save_example(out / f"example-{number}.png", example))
        write_text(out / "report.html", self._html(rows, pictures))
        return out / "report.html"

    # ------------------------------------------------------------------------------------------------ html

    def _html(self, rows: Sequence[Row], pictures: Sequence[Path]) -> str:
        summary = summarise(rows)
        chart, *examples = pictures
        sections = [
            f"<h1>{html.escape(self.title)}</h1>",
            f"<p class=notice>{NOTICE}</p>",
            "".join(f"<p class=warning>{html.escape(text)}</p>" for text in self._cautions(rows, summary)),
            _facts({**self.facts, "fused with": ", ".join(sorted(self._models)), **_counts(rows)}),
            "<h2>What the numbers say</h2>",
            "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in findings(rows, summary)) + "</ul>",
            "<h2>Metrics</h2>",
            _table(summary),
            "<p class=small><b>Best</b> and <u>second best</u> fusion of each column; a single source is no fusion and"
            " not compared, but marked † where it scores higher than every fusion. Mean over patients of each"
            " patient's mean; below it the 95 % bootstrap interval over patients. An exact copy counts as a PSNR of"
            " 100 dB, which is why a single source seems to lead there.</p>",
            _figure(chart, "A dot for each patient; mean and 95 % interval over patients."),
            "<h2>Against the best other fusion</h2>",
            _paired(rows, summary),
            "<h2>Pictures</h2>",
            "<p class=small>The middle case of up to three patients, chosen before anything was measured, and the case"
            " on which the model does worst by SSIM. Click a picture to see it at full size, and again to see it"
            " whole.</p>",
            "".join(_figure(path, "") for path in examples),
            "<h2>Definitions</h2>",
            _definitions(summary, self._volumes),
            f"<p class=notice>{NOTICE} ClinicalFMamba {__version__}.</p>",
        ]
        return _PAGE.format(title=html.escape(self.title), body="\n".join(sections))

    def _cautions(self, rows: Sequence[Row], summary: dict) -> list[str]:
        cautions = list(self.warnings)
        patients = len({row.patient for row in rows})
        if patients < 3:
            cautions.append(f"{patients} patients are too few for a confidence interval: judge nothing by this table.")
        missing = sorted({m for values in summary.values() for m, v in values.items() if math.isnan(v["mean"])})
        if missing:
            cautions.append(f"{', '.join(missing)}: not defined on some of these images (too small, or constant).")
        return cautions


def trivial_winners(summary: dict) -> dict[str, str]:
    """Metric -> the trivial answer (a source, the average, the maximum) that no other method beats there."""
    best = {metric: ranking(summary, metric, list(summary)) for metric in next(iter(summary.values()))}
    return {metric: order[0] for metric, order in best.items() if order and order[0] in TRIVIAL}


def ranked_metrics(summary: dict) -> list[str]:
    """Those of :data:`RANKED` that were measured and are defined for every fusion."""
    fusions = [values for method, values in summary.items() if method not in SOURCES]
    return [m for m in RANKED if all(m in values and not math.isnan(values[m]["mean"]) for values in fusions)]


def mean_ranks(summary: dict) -> dict[str, float]:
    """Mean rank of each fusion over :func:`ranked_metrics`, the best first; equal values share their rank."""
    from scipy.stats import rankdata

    fusions = [method for method in summary if method not in SOURCES]
    metrics = ranked_metrics(summary)
    if not metrics:
        return {}
    ranks = np.mean([rankdata([-summary[f][m]["mean"] for f in fusions]) for m in metrics], axis=0)
    return dict(sorted(zip(fusions, (float(r) for r in ranks)), key=lambda item: item[1]))


def findings(rows: Sequence[Row], summary: dict) -> list[str]:
    """Sentences computed from the table: who leads, and which metrics say nothing because a trivial answer wins."""
    texts = []
    ranks = mean_ranks(summary)
    if len(ranks) > 1:
        listed = ", ".join(f"{method_title(method)} {rank:.1f}" for method, rank in ranks.items())
        texts.append(f"Mean rank over {', '.join(ranked_metrics(summary))} among the {len(ranks)} fusions: {listed}.")
    if MODEL in summary:
        fusions = [method for method in summary if method not in SOURCES]
        best = [m for m in summary[MODEL] if ranking(summary, m, fusions)[:1] == [MODEL]]
        if len(fusions) > 1:
            texts.append(f"{MODEL} is the best fusion on {', '.join(best) if best else 'no metric'}.")
        share = summary[MODEL].get("SHARE", {}).get("mean", math.nan)
        if share < IGNORED_SHARE:
            texts.append(
                f"{MODEL} nearly copies one source: the other one makes up {share:.0%} of the fused images. High"
                " numbers do not show what that loses; look at the pictures."
            )
    winners = trivial_winners(summary)
    if winners:
        listed = "; ".join(
            f"{', '.join(m for m, w in winners.items() if w == method)}: {method_title(method)}"
            for method in dict.fromkeys(winners.values())
        )
        texts.append(
            f"A trivial answer wins {len(winners)} of the metrics, so a high value there proves nothing ({listed})."
        )
    elif any(method in TRIVIAL for method in summary):
        texts.append("No metric is won by a trivial answer (a source alone, the average or the maximum).")
    neutral = [m for m in next(iter(summary.values())) if METRICS[m].higher_is_better is None]
    if neutral:
        texts.append(f"{', '.join(neutral)} have no better direction: noise raises them. They are not ranked.")
    return texts


def _counts(rows: Sequence[Row]) -> dict[str, str]:
    cases, patients = {row.case for row in rows}, {row.patient for row in rows}
    return {"cases": f"{len(cases)} of {len(patients)} patients"}


def _facts(facts: dict[str, str]) -> str:
    lines = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return "<table class=facts>" + "".join(lines) + "</table>"


def _table(summary: dict) -> str:
    known = list(next(iter(summary.values())))
    metrics = sorted(known, key=lambda metric: metric not in (*RANKED, "NABF"))  # a table may be wider than the window
    fusions = [method for method in summary if method not in SOURCES]
    order = {metric: ranking(summary, metric, fusions) for metric in metrics}
    ranks = mean_ranks(summary)
    arrows = {True: " ↑", False: " ↓", None: ""}
    head = "".join(f"<th>{m}{arrows[METRICS[m].higher_is_better]}</th>" for m in metrics)
    lines = [f"<tr><th>method</th><th>mean rank</th>{head}</tr>"]
    for method, values in summary.items():
        cells = []
        for metric in metrics:
            text = _number(values[metric]["mean"])
            if len(fusions) > 1 and method in order[metric][:2]:
                text = f"<b>{text}</b>" if method == order[metric][0] else f"<u>{text}</u>"
            if method in SOURCES and order[metric] and ranking(summary, metric, [*fusions, method])[0] == method:
                text += " †"
            low, high = values[metric]["low"], values[metric]["high"]
            if not math.isnan(low):
                text += f"<br><small>{_number(low)}–{_number(high)}</small>"
            cells.append(f"<td>{text}</td>")
        rank = f"{ranks[method]:.1f}" if method in ranks else ""
        kind = "source" if method in SOURCES else "model" if method == MODEL else ""
        lines.append(f"<tr class='{kind}'><th>{method_title(method)}</th><td>{rank}</td>{''.join(cells)}</tr>")
    return "<div class=wide><table class=metrics>" + "".join(lines) + "</table></div>"


def _paired(rows: Sequence[Row], summary: dict) -> str:
    """The model minus the best other fusion on the same patients, with its interval."""
    others = [method for method in summary if method not in (*SOURCES, MODEL)]
    if MODEL not in summary or not others:
        return "<p>There is no other fusion to compare with.</p>"
    lines = ["<tr><th>metric</th><th>best other fusion</th><th>difference</th><th>95 % interval</th><th></th></tr>"]
    for metric in summary[MODEL]:
        order = ranking(summary, metric, others)
        if not order or math.isnan(summary[MODEL][metric]["mean"]):
            continue
        mine, theirs = (patient_means(rows, method, metric) for method in (MODEL, order[0]))
        differences = np.array([mine[p] - theirs[p] for p in mine])
        low, high = interval(differences)
        sign = 1 if METRICS[metric].higher_is_better else -1
        if math.isnan(low):
            verdict = ""
        elif min(sign * low, sign * high) > 0:
            verdict = "better"
        elif max(sign * low, sign * high) < 0:
            verdict = "worse"
        else:
            verdict = "no clear difference"
        band = "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
        lines.append(
            f"<tr><th>{metric}</th><td>{method_title(order[0])}</td><td>{differences.mean():+.4f}</td><td>{band}</td>"
            f"<td>{verdict}</td></tr>"
        )
    note = "<p class=small>Paired: the differences are taken on the same patients, then averaged.</p>"
    return "<table class=metrics>" + "".join(lines) + "</table>" + note


def _definitions(summary: dict, with_volumes: bool) -> str:
    metrics = "".join(
        f"<dt>{m}</dt><dd>{html.escape(METRICS[m].description)}</dd>" for m in next(iter(summary.values()))
    )
    methods = "".join(
        f"<dt>{method_title(m)}</dt><dd>{html.escape(_first_sentence(BASELINES[m]))}</dd>"
        for m in summary
        if m in BASELINES
    )
    sliced = ", ".join(m for m in next(iter(summary.values())) if not METRICS[m].native_3d)
    volumes = (
        f"<p class=small>{sliced}: of volumes on every {SLICE_STEP}th axial slice, the others in 3D; without the"
        " empty margin.</p>"
    )
    return f"<dl>{metrics}{methods}</dl>{volumes if with_volumes and sliced else ''}"


def _first_sentence(function) -> str:
    return " ".join((function.__doc__ or "").partition("\n\n")[0].split())


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = (
        f"<img class=fit onclick=\"this.classList.toggle('fit')\" alt='{path.name}' src='data:image/png;base64,{data}'>"
    )
    return f"<figure><div class=wide>{image}</div>{text}</figure>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1.5em; color: #1c1c1c; }}
h1 {{ font-size: 1.6em; margin-bottom: .2em }} h2 {{ margin-top: 1.8em; font-size: 1.2em }}
.notice {{ font-weight: 600; color: #8a1c1c }} .small {{ color: #555; font-size: .87em }}
.warning {{ background: #fff4d6; border-left: 4px solid #d9a300; padding: .5em .8em; margin: .4em 0 }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse }}
.facts th {{ text-align: left; padding-right: 1.2em }}
.metrics th, .metrics td {{ padding: .28em .6em; border-bottom: 1px solid #ddd; text-align: right }}
.metrics th, .metrics td {{ white-space: nowrap }}
.metrics th:first-child {{ text-align: left }} .metrics small {{ color: #777 }}
.metrics tr.model {{ background: #fdeeee }} .metrics tr.source {{ color: #777 }}
figure {{ margin: 1em 0 }} figcaption {{ color: #555; font-size: .87em }}
img {{ cursor: zoom-out }} img.fit {{ max-width: 100%; cursor: zoom-in }}
dt {{ font-weight: 600; float: left; clear: left; width: 9.5em }} dd {{ margin: 0 0 .25em 10em }}
</style></head><body>
{body}
</body></html>
"""
