"""The model card of a trained classifier with its plots; and bundling it.

``python -m ClinicalFMambaLib.training.classifier_report RUN`` bundles what ``train-classifier`` has left in RUN.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from .. import NOTICE
from ..files import replacing, write_text
from ..inference.classify import CLASSIFIERS
from ..pretrained import FOLDER, sha256
from .train_classifier import BINS, SITE_FOLDS, even_weights, reliability

MEASURES = {"auc": "AUC", "f1": "F1", "ece": "ECE", "brier": "Brier score"}


def write_report(out: Path, results: dict, judged: dict) -> None:
    """The card ``NAME.md`` and its plots ``NAME-roc.png``, in ``out``."""
    name = results["name"]
    _draw(out / f"{name}-roc.png", results, judged)
    write_text(out / f"{name}.md", card(results, sha256(out / f"{name}.safetensors")))


def _draw(path: Path, results: dict, judged: dict) -> None:
    """ROC of the models, mean of the seeds, and reliability on held-out patients, a row for each scheme."""
    from matplotlib.figure import Figure

    main, grid = results["main"], np.linspace(0, 1, 1001)
    figure = Figure(figsize=(9, 4.2 * len(judged)), layout="constrained")
    rows = figure.subplots(len(judged), 2, squeeze=False)
    for (scheme, by), (roc, calibration) in zip(judged.items(), rows):
        colours = {main: "#1f5fa8", "fused": "#2a9d5c", "average": "#b08900", "control": "#c0392b"}
        for model, colour in colours.items():
            if model not in by:
                continue
            j, summary = by[model], results["schemes"][scheme][model]["auc"]
            label = "tumour painted out" if model == "control" else model.replace("+", " + ")
            words = f"{label}: {summary['mean']:.2f} ({summary['low']:.2f} to {summary['high']:.2f})"
            curves = [roc_curve(j.labels, scores)[:2] for scores in j.scores]
            mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
            roc.plot([0, *grid], [0, *mean], color=colour, linewidth=1.6, label=words)
        roc.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        title = f"ROC, {scheme.replace('-', ' ')},\nmean of the seeds"
        roc.set(xlabel="1 - specificity", ylabel="sensitivity", title=title, aspect="equal")
        roc.legend(frameon=True, framealpha=0.9, fontsize=7, loc="lower right")
        j = by[main]
        _draw_reliability(calibration, j.probabilities.ravel(), np.tile(j.labels, len(j.probabilities)))
        ece = results["schemes"][scheme][main]["ece"]
        words = f"ECE {ece['mean']:.2f}, by chance {ece['chance']:.2f} (up to {ece['chance_high']:.2f})"
        calibration.set_title(f"Reliability at even odds of {' and '.join(results['patients'])}\n{words}")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})


def _draw_reliability(axes, probabilities: np.ndarray, labels: np.ndarray) -> None:
    predicted, observed, weight = reliability(probabilities, labels, even_weights(labels))
    axes.scatter(predicted, observed, s=20 + 400 * weight, color="#1f5fa8", zorder=3)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), xlabel="predicted probability", ylabel="observed share", aspect="equal")
    axes.text(0.97, 0.02, "size: share of the patients,\neach grade counting half", fontsize=8, color="0.4", ha="right")


def _value(x: dict) -> str:
    return f"{x['mean']:.2f} ({x['low']:.2f} to {x['high']:.2f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _title(model: str, results: dict) -> str:
    if model == "control":
        return "control: tumour painted out"
    words = model.replace("+", " + ")
    return f"**{words}** (this model)" if model == results["main"] else words


def card(results: dict, checksum: str) -> str:
    """The model card, Markdown."""
    preset, name = results["preset"], results["name"]
    about = preset["card"]
    tables = []
    for scheme, by in results["schemes"].items():
        apart = results["differences"][scheme]
        rows = [
            [
                _title(m, results),
                *(_value(s[k]) for k in MEASURES),
                f"{s['ece']['chance']:.2f} (up to {s['ece']['chance_high']:.2f})",
                _value(apart[m]) if m in apart else "",
            ]
            for m, s in by.items()
        ]
        header = ["input", *MEASURES.values(), "ECE by chance", "AUC of this model minus that"]
        tables.append(f"### {scheme.replace('-', ' ').capitalize()}\n\n{_table(header, rows)}")
    labels = list(results["patients"])
    sites = _table(
        ["site", *labels, "held-out patients read rightly"],
        [[site, *(str(c[k]) for k in labels), _right(results, site)] for site, c in results["sites"].items()],
    )
    dice = np.array([d for d in results["dice"].values() if d == d])
    found = (
        f"Agreement with readers' segmentations: median Dice {np.median(dice):.2f}, mean {dice.mean():.2f},"
        f" {int((dice < 0.5).sum())} of {len(dice)} below 0.5. "
        if len(dice)
        else ""
    )
    if results["unfound"]:
        found += f"Not found in {', '.join(results['unfound'])}, which are left out. "
    counts = " and ".join(f"{n} {label}" for label, n in results["patients"].items())
    known = results["known"]
    fusion = results["fusion"]
    seeds = len(preset["training"].get("seeds", [0]))
    tried = f"\n\n{about['calibration']}" if "calibration" in about else ""
    return f"""# {name}

**{NOTICE}**

{about.get("title", "Glioma grade.")}

**Status: {results["verdict"]}.** {results["evidence"]}

| | |
|---|---|
| inputs | T1 with contrast agent, FLAIR; images read: {results["main"].replace("+", ", ")} |
| kind | {preset["model"].get("kind", "features")} |
| fusion weights | {fusion["name"]}, SHA-256 `{fusion["sha256"]}`{_unread(results)} |
| patients | {counts}, {len(results["sites"])} sites |
| file | {name}.safetensors, SHA-256 `{checksum}` |

## Data

{about.get("data", "The user's own.")}

## How it reads

Both volumes come to a 2 mm grid around the brain. The abnormal region is found by a classical segmentation (FLAIR
brighter than the patient's own normal tissue, with what enhances beside it and what that encloses), or given as a mask.
{found}The engine fuses the pair on that grid. {_method(preset)}

## Measured on held-out patients

Nested: {_nesting(preset)} come from inner folds of the training patients alone.
Mean over {seeds} seeds, 95 % bootstrap intervals over patients. The control is the same method on the same places with
the tumour painted out by tissue of the other hemisphere; where it does as well, the model reads the scanner and not the
tumour.

**What the probabilities mean**: they are those of a patient in whom {" and ".join(labels)} are equally likely before
the images are seen. The prevalence among the training patients is not in them, since it is that of a collection
and not of a clinic. Where another prevalence is known, multiply p / (1 - p) by its odds.

So the expected calibration error (ECE, {BINS} bins of equal width) and the Brier score let both grades weigh the same;
F1 counts patients, {labels[1]} being read at one half or more. **ECE by chance** is what a model with the same
probabilities, all of them right, would show on as many patients (their grades drawn from the probabilities): the mean
and, in brackets, what it stays below 95 times in 100. An ECE below that is no proof of a good calibration, only no
evidence against it.{tried}

{(chr(10) * 2).join(tables)}

![ROC and reliability]({name}-roc.png)

### Sites

{sites}

{_confounding(results)}

## Abstention

It gives no reading where no tumour is found, the tumour is cut by the field of view, the head is not skull-stripped, a
volume covers part of the brain only, the sequences are not T1ce and FLAIR, or the case is far from the training
patients (Mahalanobis distance, limit at 90 % of their own left-out distances; what it is computed from, and the limit,
were chosen with these volumes in view). Of glioma patients of hospitals left
out, {known["known"]} of {known["patients"]} count as known. Of volumes without glioma it abstains on:

{_negatives(results["negatives"])}

## Beside the paper

{_paper(results)}

## Not for

{about.get("limits", "Diagnosis, treatment planning.")}
"""


def _unread(results: dict) -> str:
    return "" if "fused" in results["main"] else "; for the comparison only, this model reads no fused image"


def _nesting(preset: dict) -> str:
    if preset["model"].get("kind", "features") == "features":
        return f"the penalty and the calibration (on hospitals left out, in at most {SITE_FOLDS} groups)"
    return "the end of training and the calibration"


def _method(preset: dict) -> str:
    kind = preset["model"].get("kind", "features")
    if kind == "features":
        return (
            "It reads numbers of the images inside the region, in standard deviations from normal tissue: mean, spread"
            " (10th to 90th percentile), bright fraction (above 2.5; of T1ce the enhancing fraction), dark fraction"
            " (below -1.5; of T1ce necrosis and cysts), peak (95th percentile). An image's name below means all five."
            " Then L2-regularised logistic regression, both grades weighing the same."
        )
    return (
        f"MONAI's ResNet-50 ({kind[-2:].upper()}, one channel), crops of {preset['model'].get('crop', 48)} voxels"
        " around the region, focal loss, both grades weighing the same."
    )


def _right(results: dict, site: str) -> str:
    right = results["right"].get(site) if "right" in results else None
    return right or ""


def _confounding(results: dict) -> str:
    both = [site for site, counts in results["sites"].items() if min(counts.values()) > 0]
    if len(both) * 2 >= len(results["sites"]):
        return ""
    number = f"{len(both)} of {len(results['sites'])} sites have" if both else "No site has"
    return (
        f"{number} patients of both grades: hospital and grade are confounded in these data, and no split of them can"
        " prove that the model would tell the grades apart within one hospital."
    )


def _negatives(rows: list[dict]) -> str:
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    lines = []
    for kind, members in kinds.items():
        read = [row["name"] for row in members if not row["abstention"]]
        lines.append([kind, f"{len(members) - len(read)} of {len(members)}", ", ".join(read) or "none"])
    total = sum(bool(row["abstention"]) for row in rows)
    lines.append(["all", f"{total} of {len(rows)}", ""])
    return _table(["volumes", "abstains on", "read all the same"], lines)


def _paper(results: dict) -> str:
    main = results["main"]
    rows = [
        [
            "paper, ResNet-50 2D, T2 + FLAIR",
            "0.790 ± 0.013",
            "0.778",
            "AUC +2.1 %, F1 +5.5 % over the next best fusion",
        ],
        ["paper, ResNet-50 3D, T2 + FLAIR", "0.652 ± 0.038", "0.584", ""],
    ]
    for scheme, by in results["schemes"].items():
        auc, f1 = by[main]["auc"], by[main]["f1"]
        gain = ""
        if "average" in by and main != "average":
            apart = results["differences"][scheme]["average"]
            gain = f"AUC {apart['mean']:+.2f} ({apart['low']:+.2f} to {apart['high']:+.2f}) over plain averaging"
        rows.append([f"here, {main.replace('+', ' + ')}, {scheme}", _value(auc), _value(f1), gain])
    table = _table(["", "AUC", "F1", "what fusion adds"], rows)
    return f"""{table}

Comparable: the question (HGG against LGG) and the origin of the images (BraTS). Not comparable: patients (theirs many
hundreds, here {sum(results["patients"].values())}), sequences (theirs T2 + FLAIR, here T1ce + FLAIR), split (theirs
random by patient, which lets a network recognise the hospital), and classifier. A difference between the rows of the
paper and ours says nothing about which method is better."""


# --------------------------------------------------------------------------------------------- bundling


def publish(run: Path, folder: Path = FOLDER) -> None:
    """Copy classifier, card and plots of a finished run into ``folder`` and enter it in the index."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    name = results["name"]
    for file in (f"{name}.safetensors", f"{name}.md", f"{name}-roc.png"):
        with replacing(folder / file) as temporary:
            shutil.copyfile(run / file, temporary)
    index = folder / CLASSIFIERS.name
    known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    known[name] = {
        "file": f"{name}.safetensors",
        "sha256": sha256(folder / f"{name}.safetensors"),
        "labels": list(results["patients"]),
        "verdict": results["verdict"],
        "evidence": results["evidence"],
        "fusion": results["fusion"] if "fused" in results["main"] else {},
        "description": results["preset"]["card"].get("title", ""),
        "card": f"{name}.md",
    }
    write_text(index, json.dumps(known, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=publish.__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    publish(parser.parse_args().run)
