"""Turn a finished training run into bundled weights: measure them, write the model card, enter them in the index."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from .. import NOTICE
from ..cases import find_cases
from ..evaluation.evaluate import evaluate, markdown_table, summarise
from ..files import replacing, write_text
from ..inference.engine import FusionEngine
from ..models.clinicalfmamba import count_parameters
from ..pretrained import FOLDER, INDEX, load_model, read_index, sha256
from ..preview import save_preview

logger = logging.getLogger(__name__)

TABLE = ("SSIM", "FSIM", "FMI", "QABF", "VIF", "SCD", "NABF", "PSNR")
COMPARED = ("average", "maximum", "laplacian_pyramid", "wavelet", "guided_filter", "source_a", "source_b")


def publish(run: Path, data: Path, about: dict, folder: Path = FOLDER) -> dict:
    """Measure the weights of ``run`` on its validation patients and bundle them in ``folder``.

    Args:
        run: a folder that :func:`.train.train` has filled: NAME.safetensors and NAME.json.
        data: the folder that the run was trained on; only its validation patients are read.
        about: ``modalities`` (of the two inputs, in order), ``order`` (file names of the two sources), ``title``,
            ``data`` (origin and terms), ``use`` and ``limits``, each one or more sentences of the card.

    Returns:
        The summary of :func:`..evaluation.evaluate.summarise`.
    """
    (record_file,) = run.glob("*.json")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    name, source = record["name"], run / f"{record['name']}.safetensors"
    cases = [case for case in find_cases(data, about["order"]) if case.patient in record["validation_patients"]]
    shown = _one_for_each_patient(cases)

    def draw(measured) -> None:
        case, result = measured.case.name, measured.result
        if case in shown[:3]:
            panels = [("A", result.a01), ("B", result.b01), (name, result.fused)]
            volume = result.volume
            save_preview(folder / f"{name}-{shown.index(case) + 1}.png", panels, volume.spacing, f"{name}, {case}")

    rows = evaluate(FusionEngine(), str(source), cases, about["order"], COMPARED, TABLE, draw)
    summary = summarise(rows)
    model, _ = load_model(source)
    with replacing(folder / f"{name}.safetensors") as temporary:
        shutil.copyfile(source, temporary)
    entry = {
        "file": f"{name}.safetensors",
        "sha256": sha256(folder / f"{name}.safetensors"),
        "dimension": model.config.dimension,
        "training_patients": record["training_patients"],
        "modalities": about["modalities"],
        "description": about["title"],
        "card": f"{name}.md",
    }
    write_text(
        folder / f"{name}.md", _card(name, entry, record, about, summary, count_parameters(model), len(shown[:3]))
    )
    write_text(INDEX, json.dumps({**read_index(), name: entry}, indent=2, sort_keys=True) + "\n")
    return summary


def _one_for_each_patient(cases) -> list[str]:
    """Name of the middle case of each patient."""
    patients = dict.fromkeys(case.patient for case in cases)
    mine = [[case.name for case in cases if case.patient == patient] for patient in patients]
    return [names[len(names) // 2] for names in mine]


def _card(name, entry, record, about, summary, parameters, pictures) -> str:
    preset = record["preset"]
    settings = ", ".join(f"{k} {v}" for k, v in preset["training"].items() if v is not None)
    loss = ", ".join(f"{k} {v}" for k, v in preset["loss"].items())
    patients = next(iter(next(iter(summary.values())).values()))["patients"]
    interval = (
        "Mean over patients (95 % bootstrap interval over patients)"
        if patients >= 3
        else f"Mean over {patients} patients: too few for an interval"
    )
    gallery = "\n\n".join(f"![A, B and the fused image]({name}-{i + 1}.png)" for i in range(pictures))
    return f"""# {name}

**{NOTICE}**

{about["title"]}

| | |
|---|---|
| inputs, in order | {", ".join(about["modalities"])} |
| dimension | {entry["dimension"]}D |
| parameters | {parameters:,} |
| file | {entry["file"]}, half precision, SHA-256 `{entry["sha256"]}` |

## Data

{about["data"]}

Trained on {record["training_cases"]} cases of {len(record["training_patients"])} patients
({", ".join(record["training_patients"])}). Validated on {record["validation_cases"]} cases of
{len(record["validation_patients"])} other patients ({", ".join(record["validation_patients"])}).

## Training

Loss: {loss}. Settings: {settings}. {about.get("history", "")}
It took {record["hours"]} hours on {record["device"]} with torch {record["torch"]}.

## Measured on the validation patients

{interval}. The fused images come from the same engine that users run, with these half-precision weights. The best
fusion of each column is bold; a single source is no fusion, but shows which metrics a trivial answer wins.

{markdown_table(summary, TABLE)}

{gallery}

## Use

{about["use"]}

## Not for

{about["limits"]}
"""
