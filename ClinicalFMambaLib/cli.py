"""The command line, ``clinicalfmamba``.

Exit status: 0; 2 for bad input, with one line on stderr; 128 + signal when a signal ended it (130 for Ctrl-C).
Results go to stdout, warnings and progress to stderr. What computes is imported inside the commands, so that help is
quick and works without torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import NOTICE, __version__
from .allocator import keep_freed_memory
from .errors import ClinicalFMambaError, InputError, OutputError, Stopped, TrainingError, WeightsError, require
from .files import write_text

log = logging.getLogger("ClinicalFMambaLib.cli")
app = typer.Typer(
    name="clinicalfmamba",
    help=f"CNN-Mamba fusion of two registered neuro-images. {NOTICE}",
    no_args_is_help=True,
    add_completion=False,
)

# Typer and, before 0.26, click raise their usage errors from one class that typer itself does not export.
_UsageErrors = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    keep_freed_memory()
    # Libraries' warnings are for programmers; without a handler of its own, logging would print them.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    package, handler = logging.getLogger("ClinicalFMambaLib"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    package.addHandler(handler)
    try:
        return typer.main.get_command(app).main(argv, prog_name="clinicalfmamba", standalone_mode=False) or 0
    except (Stopped, TrainingError) as error:  # in every process of a distributed run
        require("lightning.pytorch.utilities", "training", "lightning").rank_zero_only(_refuse)(str(error))
        return 128 + error.signal if isinstance(error, Stopped) else 2
    except ClinicalFMambaError as error:
        return _refuse(str(error))
    except _UsageErrors as error:
        if not error.format_message():  # called without a command: typer has shown the help
            return 2
        return _refuse(f"{error.format_message().rstrip('.')}; try --help")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    finally:
        package.removeHandler(handler)
        logging.captureWarnings(False)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {_one_line(record.getMessage())}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _refuse(message: str) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return 2


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"clinicalfmamba {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------ output


def _check_folder(path: Path) -> None:
    """Raise OutputError unless a file can be made beside ``path``; asked before anything long is computed."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot write into {folder} ({error.strerror}); choose another folder") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from error
    _check_folder(folder / "file")


@contextlib.contextmanager
def _progress_bar():
    """A function (stage, fraction) that draws on stderr where a person looks at it, and is None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)


def _require_engine() -> None:
    """Say what to install before any work is done."""
    for module, package in (("numpy", ""), ("SimpleITK", ""), ("safetensors", ""), ("torch", "torch>=2.4")):
        require(module, "fusing volumes", package or None)


# ---------------------------------------------------------------------------------------------- commands

_DATA = "DIR/MRI beside DIR/{CT,PET,SPECT}, NAME.png in each; or one folder a case; or a .csv table."
_SOURCES = "Names of the two sources, the anatomical one first; found by default."


_Model = Annotated[str, typer.Option(metavar="NAME|PATH", help="Bundled model or .safetensors file.")]
_Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps")]
_WindowA = Annotated[str, typer.Option(metavar="LO,HI", help="Also auto; for CT in HU brain, bone, soft, full.")]
_WindowB = Annotated[str, typer.Option(metavar="LO,HI")]
_ModalityA = Annotated[str, typer.Option(metavar="CT|MR|SPECT|PET", help="Read or guessed by default.")]
_ModalityB = Annotated[str, typer.Option(metavar="CT|MR|SPECT|PET")]
_Plane = Annotated[str, typer.Option(metavar="auto|axial|coronal|sagittal", help="Of the slices that a 2D model sees.")]
_Resample = Annotated[
    bool, typer.Option("--resample/--no-resample", help="Interpolate B onto A's grid if they differ.")
]
_Precision = Annotated[
    str, typer.Option(metavar="float32|bfloat16", help="bfloat16 is faster on new processors, and less exact.")
]
_MaxMemory = Annotated[float | None, typer.Option(metavar="GIB", help="Bound on the network's memory.")]


@app.command()
def fuse(
    a: Annotated[Path, typer.Argument(metavar="A", help="Volume, image or DICOM folder; the result lies on its grid.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one, registered to A.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="nrrd, nii, nii.gz, mha; png, jpg, tif.")],
    model: _Model = "auto",
    device: _Device = "auto",
    window_a: _WindowA = "auto",
    window_b: _WindowB = "auto",
    modality_a: _ModalityA = "",
    modality_b: _ModalityB = "",
    plane: _Plane = "auto",
    resample: _Resample = False,
    precision: _Precision = "float32",
    max_memory: _MaxMemory = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also write A, B and the result as a picture.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="JSON", help="Also write what was done with what.")] = None,
    classify: Annotated[
        str, typer.Option(metavar="auto|NAME|PATH", help="Also read the glioma's grade from T1ce with FLAIR.")
    ] = "",
    tumour_mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the tumour is; searched for by default.")
    ] = None,
    sequences: Annotated[
        str, typer.Option(metavar="A,B", help="t1ce,flair or flair,t1ce; read from the names by default.")
    ] = "",
    occlusion_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write where the reading comes from, on A's grid.")
    ] = None,
) -> None:
    """Fuse two registered volumes or images into one."""
    from .config import FusionOptions

    options = FusionOptions(
        model=model,
        device=device,
        window_a=window_a,
        window_b=window_b,
        modality_a=modality_a,
        modality_b=modality_b,
        plane=plane,
        resample=resample,
        precision=precision,
        max_memory_gib=max_memory,
    )
    from .outputs import write_result
    from .volumes import read_volume

    _check_outputs(out, preview, report, (a, b), occlusion_map)
    stated = _check_reading(classify, tumour_mask, sequences, occlusion_map)
    volume_a, volume_b = read_volume(a, options.modality_a), read_volume(b, options.modality_b)
    _check_fits(out, volume_a)
    if preview is not None:
        require("PIL.Image", "--preview", "pillow")
    _require_engine()
    from .inference.engine import FusionEngine

    engine, reading = FusionEngine(), None
    with _progress_bar() as progress:
        result = engine.fuse(volume_a, volume_b, options, progress)
        if classify:
            from .inference.classify import classify as read_grade

            mask = read_volume(tumour_mask) if tumour_mask else None
            reading = read_grade(
                engine, volume_a, volume_b, classify, sequences=stated, mask=mask, device=device, progress=progress
            )
    write_result(result.volume, result.fused, result.metadata(), out)
    if reading is not None and reading.occlusion is not None and occlusion_map is not None:
        from .volumes import write_volume

        write_volume(
            reading.occlusion, occlusion_map, {"notice": NOTICE, "scale": "percentage points of the probability"}
        )
    if preview is not None:
        from .preview import save_fusion

        save_fusion(preview, result)
    if report is not None:
        content = {"output_file": str(out), **result.provenance}
        if reading is not None:
            content["classification"] = reading.to_json()
        write_text(report, json.dumps(content, indent=2) + "\n")
    for warning in result.warnings:
        log.warning("%s", warning)
    _summarise(result, out, preview, report, reading)


def _check_reading(classify: str, mask: Path | None, sequences: str, occlusion_map: Path | None) -> tuple[str, str]:
    """The sequences of A and B as stated; raises before anything is computed."""
    if not classify:
        for value, option in ((mask, "--tumour-mask"), (sequences, "--sequences"), (occlusion_map, "--occlusion-map")):
            if value:
                raise InputError(f"{option} is for --classify; add --classify auto, or leave it out")
        return "", ""
    stated = tuple(word.strip().lower() for word in sequences.split(",")) if sequences else ("", "")
    if sequences and sorted(stated) != ["flair", "t1ce"]:
        raise InputError(f"--sequences {sequences} should be t1ce,flair or flair,t1ce")
    if mask is not None and not mask.exists():
        raise InputError(f"{mask}: no such file; check the path of --tumour-mask")
    _require_engine()
    from .inference.classify import open_classifier

    open_classifier(classify)
    return stated


def _check_outputs(
    out: Path, preview: Path | None, report: Path | None, inputs: Sequence[Path], occlusion_map: Path | None = None
) -> None:
    from .volumes import WRITABLE_SUFFIXES, suffix_of

    if suffix_of(out) not in WRITABLE_SUFFIXES:
        known = ", ".join(s[1:] for s in WRITABLE_SUFFIXES)
        raise InputError(f"{out}: cannot write {suffix_of(out) or 'a file without extension'}; use one of {known}")
    if preview is not None and suffix_of(preview) != ".png":
        raise InputError(f"{preview}: the preview is a PNG; give a name that ends with .png")
    if occlusion_map is not None and suffix_of(occlusion_map) not in (".nrrd", ".nii", ".nii.gz", ".mha"):
        raise InputError(f"{occlusion_map}: the map is a volume; give a name that ends with .nrrd or .nii.gz")
    outputs = [path for path in (out, preview, report, occlusion_map) if path is not None]
    for path in outputs:
        _check_folder(path)
        for taken in inputs:
            if path.resolve() == taken.resolve():
                raise OutputError(f"{path} is one of the inputs; give another name")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise OutputError("output, preview, report and occlusion map need different names")


def _check_fits(out: Path, a) -> None:
    from .volumes import IMAGE_SUFFIXES, suffix_of

    if suffix_of(out) in IMAGE_SUFFIXES and a.shape[0] != 1:
        raise InputError(f"{out}: {suffix_of(out)[1:]} holds one slice, {a.name} has {a.shape[0]}; write a .nrrd")


def _summarise(result, out: Path, preview: Path | None, report: Path | None, reading=None) -> None:
    p = result.provenance
    lines = [
        ("output", str(out)),
        *((name, str(path)) for name, path in (("preview", preview), ("report", report)) if path is not None),
        ("model", f"{p['model']['name']} ({p['model']['config']['dimension']}D)"),
        ("device", f"{p['device']['name']} ({p['device']['reason']})"),
        *(
            (f"input {k.upper()}", f"{i['name']}, {i['modality']}, {i['window']['text']}")
            for k, i in p["inputs"].items()
        ),
        ("scale", p["output"]["scale"]),
        ("time", f"{p['seconds']:.1f} s"),
        *((("reading", reading.text), ("", reading.note)) if reading is not None else ()),
    ]
    for name, value in lines:
        print(f"{name + ':' if name else '':10}{value}")
    print(NOTICE)


@app.command()
def batch(
    cases: Annotated[
        Path,
        typer.Argument(metavar="CASES.csv", help="Columns a, b; if wanted name, model, window_a, ..."),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")],
    model: _Model = "auto",
    device: _Device = "auto",
    window_a: _WindowA = "auto",
    window_b: _WindowB = "auto",
    modality_a: _ModalityA = "",
    modality_b: _ModalityB = "",
    plane: _Plane = "auto",
    resample: _Resample = False,
    precision: _Precision = "float32",
    max_memory: _MaxMemory = None,
    format: Annotated[
        str, typer.Option(metavar="nrrd|nii.gz|mha|png|...", help="By default .nrrd, and .png for images.")
    ] = "auto",
    preview: Annotated[bool, typer.Option("--preview", help="Also draw NAME.preview.png for each case.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Fuse finished cases again.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that read and write, for each device.")] = 2,
    devices: Annotated[str, typer.Option(metavar="N|auto|0,1", help="GPUs, or processes on the CPU.")] = "1",
    num_nodes: Annotated[int, typer.Option(min=1, help="Machines, as Lightning and SLURM count them.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning's, such as ddp.")] = "auto",
) -> None:
    """Fuse many pairs; a failure stops only its own case, and a second call does what is left."""
    from .batch import (
        FORMATS,
        TABLE,
        Layout,
        check_settings,
        raise_failures,
        read_cases,
        run_batch,
        run_on_devices,
        write_table,
    )
    from .config import FusionOptions

    if format not in FORMATS:
        raise InputError(f"format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if cases.resolve() == (out / TABLE).resolve():
        raise InputError(f"{cases} is where the table of results goes; choose another folder, or rename it")
    options = FusionOptions(
        model=model,
        device=device,
        window_a=window_a,
        window_b=window_b,
        modality_a=modality_a,
        modality_b=modality_b,
        plane=plane,
        resample=resample,
        precision=precision,
        max_memory_gib=max_memory,
    )
    table = read_cases(cases, options)
    if preview:
        require("PIL.Image", "--preview", "pillow")
    _require_engine()
    from .inference.device import choose_device
    from .inference.engine import FusionEngine
    from .pretrained import find_weights

    for choice in {case.options.model for case in table} - {"auto"}:
        find_weights(choice)
    engine = FusionEngine(device)
    log.parent.setLevel(logging.INFO)
    _make_folder(out)
    layout = Layout(out, format, preview)
    alone = devices == "1" and num_nodes == 1

    def run(part):
        known = []

        def report(outcome) -> None:
            known.append(outcome)
            words = {"fused": f"fused in {outcome.seconds:.1f} s", "failed": f"FAILED: {outcome.error}"}
            log.info("%s (%d of %d): %s", outcome.case, len(known), len(part), words.get(outcome.status, "finished"))
            if alone:  # a table of what is done so far
                write_table(known, out)

        with _progress_bar() as progress:
            return run_batch(engine, part, layout, jobs=jobs, overwrite=overwrite, progress=progress, report=report)

    if alone:
        outcomes = run(table)
    else:
        require("lightning", "several devices", "lightning>=2.6")
        if not overwrite:  # here, so that one process says it
            check_settings(table, layout)
        accelerator = choose_device(device)[0].type
        outcomes = run_on_devices(run, table, accelerator, devices, num_nodes, strategy)
        if outcomes is None:  # the first process speaks for all
            return
    results = write_table(outcomes, out)
    counts = [(word, sum(o.status == word for o in outcomes)) for word in ("fused", "skipped", "failed")]
    print(f"{', '.join(f'{count} {word}' for word, count in counts if count)}: {results}")
    print(NOTICE)
    raise_failures(outcomes, results)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")] = Path("demo-output"),
    size: Annotated[int, typer.Option(min=16, max=512, help="Voxels along each edge of the phantom.")] = 128,
) -> None:
    """Fuse a generated head phantom: CT with T2, T1 with T2, SPECT in colour with T2. Needs no input."""
    _require_engine()
    require("PIL.Image", "the demo's pictures", "pillow")
    _make_folder(out)
    from .demo import run_demo

    with _progress_bar() as progress:
        summary = run_demo(out, size, progress=progress)
    for warning in summary.warnings:
        log.warning("%s", warning)
    print(summary.text())
    print(f"Volumes, pictures and metrics are in {out}.")
    print(NOTICE)


@app.command()
def phantom(
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")],
    size: Annotated[int, typer.Option(min=16, max=512, help="Voxels along each edge; 224 mm field of view.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tumour: Annotated[bool, typer.Option("--tumour/--healthy")] = True,
) -> None:
    """Write a registered head phantom: CT, MR T1, T2, FLAIR, SPECT and labels."""
    from .phantom import make_phantom
    from .volumes import write_volume

    _make_folder(out)
    for name, volume in make_phantom(size, seed=seed, tumour=tumour).items():
        path = out / f"{name.lower()}.nrrd"
        write_volume(volume, path, {"content": "ClinicalFMamba head phantom: synthetic, no patient"})
        print(path)


@app.command()
def bench(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows as JSON.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="2d-256, 2d-512, 2d-slices, 3d-128, 3d-brats, 3d-clinical, scan, all; repeatable."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Of the fast path.")] = "float32",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps")] = "auto",
    max_memory: Annotated[float | None, typer.Option(metavar="GIB", help="Bound on the fast path's memory.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the two paths take turns.")] = 3,
) -> None:
    """Measure time and memory of the fast path against the plain one: 2D 256x256 and 3D 128x128x128 by default."""
    _require_engine()
    from .inference.bench import DEFAULT_CASES, run_bench, table, to_json

    if json_file is not None:
        _check_folder(json_file)
    rows = run_bench(
        case or DEFAULT_CASES,
        precision=precision,
        device=device,
        max_memory_gib=max_memory,
        rounds=rounds,
        report=lambda row: log.info("%s: %.3f s", row.case, row.fast_s),
    )
    print(table(rows))
    if json_file is not None:
        to_json(rows, json_file)
        print(json_file)


@app.command()
def models(
    verify: Annotated[bool, typer.Option("--verify", help="Check the files against their SHA-256.")] = False,
) -> None:
    """List the bundled models."""
    from .pretrained import FOLDER, read_index, sha256

    index = read_index()
    if not index:
        print("No model is bundled with this version; give the path of a .safetensors file to --model.")
    damaged = []
    for name, entry in index.items():
        path = FOLDER / entry["file"]
        modalities = entry["modalities"]
        print(f"{name}: {entry['description']}" if "description" in entry else name)
        lines = [
            ("modalities", modalities if isinstance(modalities, str) else ", ".join(modalities)),
            ("dimension", f"{entry['dimension']}D"),
            ("file", f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB" if path.is_file() else "missing"),
            ("SHA-256", entry["sha256"]),
        ]
        intact = not verify or (path.is_file() and sha256(path) == entry["sha256"])
        if verify:
            lines.append(("checksum", "ok" if intact else "WRONG"))
        if intact and path.is_file():
            lines[2:2] = _size_of_network(path)
        card = FOLDER / entry.get("card", f"{name}.md")
        lines.append(("card", str(card) if card.is_file() else "missing"))
        for key, value in lines:
            print(f"  {key + ':':14}{value}")
        if not intact:
            damaged.append(name)
    from .inference.classify import read_classifiers

    for name, entry in read_classifiers().items():
        path = FOLDER / entry["file"]
        print(f"{name}: {entry['description']}")
        lines = [
            ("reads", f"T1ce with FLAIR into {' or '.join(entry['labels'])}"),
            ("status", f"{entry['verdict']}: {entry['evidence']}"),
            ("file", path.name if path.is_file() else "missing"),
            ("SHA-256", entry["sha256"]),
        ]
        if verify:
            intact = path.is_file() and sha256(path) == entry["sha256"]
            lines.append(("checksum", "ok" if intact else "WRONG"))
            damaged += [] if intact else [name]
        for key, value in [*lines, ("card", str(FOLDER / entry["card"]))]:
            print(f"  {key + ':':14}{value}")
    if damaged:
        raise WeightsError(f"the weights of {', '.join(damaged)} are missing or corrupt; install ClinicalFMamba again")


def _size_of_network(path: Path) -> list[tuple[str, str]]:
    try:
        require("torch", "counting parameters", "torch>=2.4")
    except ClinicalFMambaError as error:
        return [("parameters", f"not counted: {error}")]
    from .models.clinicalfmamba import count_flops, count_parameters
    from .pretrained import load_model

    network, _ = load_model(path)
    size = (256, 256) if network.config.dimension == 2 else (128, 128, 128)
    words = "x".join(map(str, size))
    return [
        ("parameters", f"{count_parameters(network) / 1e6:.2f} M"),
        ("operations", f"{count_flops(network.config, size) / 1e9:.1f} GFLOP for a pair of {words}"),
    ]


@app.command()
def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="Name of a preset, or a .yaml file.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help=_DATA)],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the preset.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what was found in the data and what is wrong with it.")
    ] = False,
) -> None:
    """Train a model. SIGTERM and Ctrl-C save the state first; --resume continues from it."""
    trainer = _trainer()
    settings = trainer.load_preset(preset, overrides or [])
    if dry_run:
        with _progress_bar() as progress:
            text, problems = trainer.dry_run(settings, data, progress and (lambda part: progress("reading", part)))
        print(text)
        if problems:
            raise InputError(f"{len(problems)} problems of {data}, the first: {problems[0]}")
        return
    _make_folder(out)
    weights = trainer.train(settings, Path(preset).name.removesuffix(".yaml"), data, out, resume)
    trainer.rank_zero_only(print)(weights)


def _trainer():
    """The module :mod:`.training.train`, with its packages checked and its progress shown."""
    for module, package in (("torch", "torch>=2.4"), ("lightning", "lightning>=2.6"), ("yaml", "pyyaml")):
        require(module, "training", package)
    from .training import train as trainer

    log.parent.setLevel(logging.INFO)
    return trainer


@app.command()
def train_classifier(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="Name of a preset, or a .yaml file.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="One folder a case, and a table of grades and sites.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the preset.")
    ] = None,
) -> None:
    """Train a tumour classifier and judge it by patient and by site, against its baselines and its control."""
    _require_engine()
    for module, package in (("lightning", "lightning>=2.6"), ("yaml", "pyyaml"), ("sklearn", "scikit-learn")):
        require(module, "training a classifier", package)
    require("matplotlib", "the model card", "matplotlib")
    from .training import train_classifier as trainer

    log.parent.setLevel(logging.INFO)
    settings = trainer.load_preset(preset, overrides or [])
    _make_folder(out)
    path = trainer.train_classifier(settings, Path(preset).name.removesuffix(".yaml"), data, out)
    say = trainer.rank_zero_only(print)
    say(f"The classifier is {path}, its card {path.with_suffix('.md')}.")
    say(NOTICE)


@app.command()
def ablate(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="Name of a preset, or a .yaml file.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help=_DATA)],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the preset.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
) -> None:
    """Train without CMCA and with a single scan direction, over several seeds; table and plot. Call again to go on."""
    trainer = _trainer()
    _require_evaluation()
    from .training.ablate import ablate as run

    settings = trainer.load_preset(preset, overrides or [])
    _make_folder(out)
    run(settings, Path(preset).name.removesuffix(".yaml"), data, out, seeds)
    trainer.rank_zero_only(lambda: print((out / "ablation.md").read_text(encoding="utf-8"), end=""))()


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(metavar="DIR", help=_DATA)],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR")],
    model: Annotated[str, typer.Option(metavar="NAME|PATH", help="Bundled model or .safetensors file.")] = "auto",
    sources: Annotated[str, typer.Option(metavar="A,B", help=_SOURCES)] = "",
    patients: Annotated[str, typer.Option(metavar="P,...", help="Only these patients.")] = "",
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Fused images of another method, named as the cases.")
    ] = None,
    metrics: Annotated[str, typer.Option(metavar="M,...", help="Only these metrics.")] = "",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps")] = "auto",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compute metrics.")] = None,
    readers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also write a blinded reader study of N cases, see ratings.")
    ] = 0,
) -> None:
    """Measure a model against the baseline fusions: metrics.csv, summary.json, report.html with pictures."""
    _require_evaluation()
    from .evaluation.report import evaluate_data
    from .inference.engine import FusionEngine

    cases, order = _cases_of(data, sources, patients)
    chosen, peers = _metrics_of(metrics), dict(_named_folder(text) for text in peer or [])
    engine = FusionEngine(device)
    _make_folder(out)
    rows = evaluate_data(engine, model, data, cases, order, out, chosen, peers, jobs, readers)
    _print_summary(rows)
    print(f"The report is {out / 'report.html'}.")


@app.command()
def score(
    fused: Annotated[Path, typer.Argument(metavar="FUSED_DIR", help="Fused images, named as the cases of the data.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help=_DATA)],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.csv")],
    sources: Annotated[str, typer.Option(metavar="A,B", help=_SOURCES)] = "",
    values: Annotated[
        str, typer.Option("--range", metavar="LO,HI", help="Values in the fused files that mean black and white.")
    ] = "",
    metrics: Annotated[str, typer.Option(metavar="M,...", help="Only these metrics.")] = "",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compute metrics.")] = None,
) -> None:
    """Measure anybody's fused images with the same metrics."""
    if out.suffix.lower() != ".csv":
        raise InputError(f"{out}: the table is a CSV file; give a name that ends with .csv")
    _check_folder(out)
    _require_evaluation()
    from .evaluation.evaluate import score as measure
    from .evaluation.evaluate import write_csv

    limits = None
    if values:
        from .inference.intensity import parse_limits

        limits = parse_limits(values)
    cases, order = _cases_of(data, sources, "")
    rows = measure(fused, cases, order, _metrics_of(metrics), limits, jobs)
    write_csv(rows, out)
    _print_summary(rows)


@app.command()
def ratings(
    key: Annotated[Path, typer.Argument(metavar="KEY.csv", help="reader-study-key.csv of evaluate --readers.")],
    tables: Annotated[
        list[Path], typer.Argument(metavar="RATINGS.csv...", help="One filled-in table for each reader.")
    ],
) -> None:
    """Unblind a reader study: mean ratings of each method, and their difference with its confidence interval."""
    _require_evaluation()
    from .evaluation.reader_study import read_ratings

    print(read_ratings(key, tables))


def _require_evaluation() -> None:
    _require_engine()
    for module, package in (
        ("torchmetrics", "torchmetrics"),
        ("pywt", "PyWavelets"),
        ("PIL", "pillow"),
        ("matplotlib", "matplotlib"),
    ):
        require(module, "the evaluation", package)
    log.parent.setLevel(logging.INFO)


def _cases_of(data: Path, sources: str, patients: str):
    """The cases to measure, all of them readable, and the names of their two sources."""
    from .cases import check_cases, find_cases

    wanted = [word.strip() for word in sources.split(",") if word.strip()]
    if wanted and len(wanted) != 2:
        raise InputError(f"--sources {sources} should name two sources, the anatomical one first, such as MRI,CT")
    cases = find_cases(data, wanted)
    if chosen := {word.strip() for word in patients.split(",") if word.strip()}:
        known = {case.patient for case in cases}
        if strangers := sorted(chosen - known):
            raise InputError(f"patients {', '.join(strangers)} are not in {data}; there are {', '.join(sorted(known))}")
        cases = [case for case in cases if case.patient in chosen]
    order = wanted or list(cases[0].paths)[:2]
    with _progress_bar() as progress:
        problems = check_cases(cases, order, progress and (lambda part: progress("reading", part)))
    if problems:
        raise InputError(problems[0] + (f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""))
    return cases, order


def _metrics_of(text: str) -> tuple[str, ...]:
    from .evaluation.evaluate import STANDARD
    from .evaluation.metrics import METRICS

    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if unknown := [name for name in names if name not in METRICS]:
        raise InputError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    return names or STANDARD


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise InputError(f"--peer {text} should read NAME=DIR, such as IFCNN=results/ifcnn")
    return name, Path(folder)


def _print_summary(rows) -> None:
    from .evaluation.evaluate import markdown_table, summarise

    print(markdown_table(summarise(rows), list(rows[0].values)))
    print(NOTICE)


if __name__ == "__main__":
    sys.exit(main())
