"""Turn a finished training run into bundled weights: measure them, write the model card, enter them in the index.

``python -m ClinicalFMambaLib.training.publish RUN --data DIR``
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import numpy as np

from .. import NOTICE
from ..cases import find_cases, load_case
from ..config import FusionOptions
from ..demo import coloured
from ..errors import InputError
from ..evaluation.ceiling import ssim_ceiling
from ..evaluation.evaluate import evaluate, markdown_table, summarise
from ..files import replacing, write_text
from ..inference.engine import FusionEngine
from ..models.clinicalfmamba import count_parameters
from ..phantom import make_phantom
from ..pretrained import FOLDER, INDEX, load_model, read_record, sha256
from ..preview import save_fusion
from .train import load_preset

logger = logging.getLogger(__name__)

TABLE = ("SSIM", "FSIM", "FMI", "QABF", "VIF", "SCD", "NABF", "SHARE", "PSNR")
COMPARED = ("average", "maximum", "laplacian_pyramid", "wavelet", "guided_filter", "source_a", "source_b")
# The ceiling of one pair takes ten seconds; this many tell it well enough.
CEILING_PAIRS = 8


def publish(run: Path, data: Path, folder: Path = FOLDER) -> dict:
    """Measure the weights of ``run`` on its validation patients and bundle them in ``folder``.

    What the card says beside the measurements comes from the section ``card`` of the preset of the run's name. Its
    pictures show the phantom; pictures of patients stay in ``run/pictures``, as the data's terms ask.

    Args:
        run: a folder that :func:`.train.train` has filled: NAME.safetensors, NAME.json and logs.
        data: the folder that the run was trained on; only its validation patients are read.

    Returns:
        The summary of :func:`..evaluation.evaluate.summarise`.

    Raises:
        InputError: a validation patient was trained on in an earlier stage.
    """
    (record_file,) = run.glob("*.json")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    name, source = record["name"], run / f"{record['name']}.safetensors"
    about = load_preset(name)["card"]
    stages, trained = _lineage(record)
    if seen := sorted(trained & set(record["validation_patients"])):
        raise InputError(f"{run}: an earlier stage was trained on the validation patients {', '.join(seen)}")
    cases = [case for case in find_cases(data, about["sources"]) if case.patient in record["validation_patients"]]
    (run / "pictures").mkdir(exist_ok=True)
    engine = FusionEngine()
    rows = evaluate(
        engine,
        str(source),
        cases,
        about["sources"],
        COMPARED,
        TABLE,
        lambda measured: save_fusion(run / "pictures" / f"{measured.case.name}.png", measured.result),
    )
    summary = summarise(rows)
    model, _ = load_model(source)
    ceiling = _ceiling(cases, about["sources"], rows)
    with replacing(folder / f"{name}.safetensors") as temporary:
        shutil.copyfile(source, temporary)
    entry = {
        "file": f"{name}.safetensors",
        "sha256": sha256(folder / f"{name}.safetensors"),
        "dimension": model.config.dimension,
        "training_patients": sorted(trained),
        "stages": stages,
        "modalities": about["modalities"],
        "description": about["title"],
        "card": f"{name}.md",
    }
    _draw_phantom(engine, str(source), about["phantom"], folder / f"{name}.png")
    _draw_curves(run / "logs", folder / f"{name}-curves.png")
    write_text(folder / f"{name}.md", _card(name, entry, record, about, summary, count_parameters(model), ceiling))
    index = folder / INDEX.name
    known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    write_text(index, json.dumps({**known, name: entry}, indent=2, sort_keys=True) + "\n")
    return summary


def _draw_phantom(engine: FusionEngine, model: str, pair: list[str], path: Path) -> None:
    volumes = make_phantom(128)
    first, second = (coloured(volumes[name]) if name == "SPECT" else volumes[name] for name in pair)
    result = engine.fuse(first, second, FusionOptions(model=model))
    save_fusion(path, result, f"Phantom, {path.stem}", pair)


def _draw_curves(logs: Path, path: Path) -> None:
    """The loss in training and on the validation patients, from the run's TensorBoard log."""
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(logs))
    log.Reload()
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for tag, label in (("loss", "training crops"), ("val_loss", "validation patients")):
        if tag in log.Tags()["scalars"]:
            events = log.Scalars(tag)
            style = {"linewidth": 0.8} if tag == "loss" else {"marker": "o"}
            axes.plot([e.step for e in events], [e.value for e in events], label=label, **style)
    axes.set(xlabel="step", ylabel="loss", title=f"{path.stem.removesuffix('-curves')}: training")
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _ceiling(cases, sources, rows) -> str:
    """What SSIM some of the cases allow at all, and how far from it the model is, in one sentence; "" for volumes."""
    some = cases[:: max(1, -(-len(cases) // CEILING_PAIRS))]
    if load_case(some[0], sources).ndim == 4:
        return ""
    names = {case.name for case in some}
    reached = [r.values["SSIM"] for r in rows if r.method == "ClinicalFMamba" and r.case in names]
    possible = [ssim_ceiling(*load_case(case, sources)) for case in some]
    return (
        f"SSIM has a ceiling below one, as the sources differ: images optimised for it alone reach "
        f"{np.mean(possible):.3f} on {len(some)} of these pairs, the model {np.mean(reached):.3f} on the same."
    )


def _lineage(record: dict) -> tuple[list[str], set[str]]:
    """A sentence for each stage of the training, and the patients of all of them.

    The stages before the run are those of the weights that it started from: another run, or a bundled model.
    """
    preset = record["preset"]
    init = preset["training"].get("init")
    stages, patients = [], set()
    earlier = read_record(init) if init else {}
    if "stages" in earlier:  # of the index
        stages, patients = earlier["stages"], set(earlier["training_patients"])
    elif earlier:
        stages, patients = _lineage(earlier)
    settings = {**preset["model"], "crop": preset["data"]["crop"], "batch": preset["data"]["batch"]}
    settings.update({k: v for k, v in preset["training"].items() if v is not None and k != "init"})
    start = f" started from {f'stage {len(stages)}' if stages else Path(init).stem}," if init else ""
    stage = (
        f"{record['data']}, {record['training_cases']} cases of {len(record['training_patients'])} patients:{start}"
        f" {_listed(settings)}; loss {_listed(preset['loss'])}."
        f" It took {record['hours']} hours on {record['device']} with torch {record['torch']}."
    )
    return [*stages, stage], patients | set(record["training_patients"])


def _listed(settings: dict) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items())


def _card(name, entry, record, about, summary, parameters, ceiling) -> str:
    stages = "\n".join(f"{k + 1}. {stage}" for k, stage in enumerate(entry["stages"]))
    patients = next(iter(next(iter(summary.values())).values()))["patients"]
    interval = (
        "Mean over patients (95 % bootstrap interval over patients)"
        if patients >= 3
        else f"Mean over {patients} patients: too few for an interval"
    )
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

Trained on {len(entry["training_patients"])} patients
({", ".join(entry["training_patients"])}). Validated on {record["validation_cases"]} cases of
{len(record["validation_patients"])} other patients ({", ".join(record["validation_patients"])}).

## Training

{stages}

## Measured on the validation patients

{interval}. The fused images come from the same engine that users run, with these half-precision weights. The best
fusion of each column is bold; a single source is no fusion, but shows which metrics a trivial answer wins.

{markdown_table(summary, TABLE)}

{ceiling}

![The phantom, A, B and fused]({name}.png)

The picture shows the synthetic phantom, not a patient: the terms of the data forbid its images here.

![Loss against steps]({name}-curves.png)

## Use

{about["use"]}

## Not for

{about["limits"]}
"""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(description=publish.__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    publish(arguments.run, arguments.data)
