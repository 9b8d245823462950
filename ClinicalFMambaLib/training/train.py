"""Train one preset: data, Lightning trainer, checkpoints, export of the averaged weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from ..cases import Case, Listing, check_cases, find_cases, list_cases
from ..config import ModelConfig
from ..errors import InputError, OutputError, WeightsError
from ..files import write_text
from ..inference.intensity import modality_of_name
from ..pretrained import find_weights, load_model, save_weights
from . import preset_files
from .callbacks import EpochLines, FailureSignatures, Pictures, SafeCheckpoints, StopOnSignal
from .data import CropSampler, PairCrops, ValidationPairs, split_by_patient
from .losses import LossWeights
from .module import FusionModule
from .warm_start import warm_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """Section ``data`` of a preset.

    Attributes:
        order: names of the sources, the anatomical one first: folders, endings of file names, or columns.
        validation: share of the patients held back, drawn with the seed; or a list of patients.
        crop: edge in pixels or voxels.
        batch: crops of a step, on each process.
        swap: draw two of the sources in any order for each crop, instead of the first two in theirs.
        augment: flips, transposition, gamma, window and noise.
        workers: processes that cut crops beside each training process.
    """

    order: list
    validation: float | list = 0.25
    crop: int = 128
    batch: int = 2
    swap: bool = False
    augment: bool = True
    workers: int = 0

    def __post_init__(self):
        if len(self.order) < 2:
            raise InputError(f"data.order={self.order} must name two sources at least")
        if self.crop < 8 or self.batch < 1 or self.workers < 0:
            raise InputError("data.crop must be 8 or more, data.batch 1 or more, data.workers 0 or more")


@dataclass(frozen=True)
class TrainingOptions:
    """Section ``training`` of a preset.

    Attributes:
        lr: peak learning rate of Adam; a cosine takes it to 1e-6.
        steps: optimiser steps, rounded up to whole epochs.
        warmup: steps of linear warm-up.
        ema: decay of the averaged weights, which are the ones exported; 0 exports the last ones.
        clip: largest norm of the gradient, or null.
        precision: of Lightning: 32-true, bf16-mixed, 16-mixed.
        steps_per_epoch: steps between two checkpoints.
        init: weights to start from, a bundled model or a .safetensors file; also of fewer latent Mamba layers, or 2D
            where the model is 3D (:mod:`.warm_start`).
        keep_init: share of the weights that the run started from in the exported ones. Between two networks of one
            descent lies what neither training reaches alone (Wortsman et al., CVPR 2022, WiSE-FT, eq. 1).
        freeze_norm: fix the statistics of the batch norms at their mean over the first crops, so that training sees
            what inference will compute: those of the last few crops differ too much from those of whole images.
        seed: of split, initialisation, crops and augmentation.
    """

    lr: float = 1e-4
    steps: int = 4000
    warmup: int = 100
    ema: float = 0.995
    clip: float | None = 1.0
    precision: str = "32-true"
    steps_per_epoch: int = 125
    init: str | None = None
    keep_init: float = 0.0
    freeze_norm: bool = False
    seed: int = 3407

    def __post_init__(self):
        if self.lr <= 0 or self.steps < 1 or self.steps_per_epoch < 1 or self.warmup < 0 or self.seed < 0:
            raise InputError("training.lr, steps and steps_per_epoch must be positive, warmup and seed not negative")
        if not 0 <= self.ema < 1:
            raise InputError(f"training.ema={self.ema} must be at least 0 and below 1")
        if not 0 <= self.keep_init < 1 or (self.keep_init and not self.init):
            raise InputError(
                f"training.keep_init={self.keep_init} must be at least 0 and below 1, and needs training.init"
            )

    @property
    def epochs(self) -> int:
        # whole epochs, and their number alone as the end: with max_steps as well, Lightning 2.6 counts the epoch of a
        # checkpoint twice when it resumes
        return -(-self.steps // self.steps_per_epoch)


SECTIONS = {"model": ModelConfig, "data": DataOptions, "loss": LossWeights, "training": TrainingOptions}
# Crops whose mean the frozen batch norms take.
NORM_CROPS = 128
# Options of Lightning's Trainer that say where and how a run is computed. The others would contradict the preset's
# sections (max_epochs, precision …), or leave the run without what it needs (checkpoints, crops, logs).
TRAINER_OPTIONS = (
    *("accelerator", "benchmark", "check_val_every_n_epoch", "detect_anomaly", "deterministic", "devices"),
    *("gradient_clip_algorithm", "limit_val_batches", "log_every_n_steps", "num_nodes", "profiler", "strategy"),
    "sync_batchnorm",
)


def list_presets() -> list[str]:
    """Names of the presets that come with the package."""
    return preset_files.list_presets("presets")


def load_preset(name: str, overrides: Sequence[str] = ()) -> dict:
    """A preset by name, or from a path that ends with .yaml, with ``section.key=value`` overrides.

    Besides :data:`SECTIONS` there are ``trainer``, whose keys are options of Lightning's Trainer
    (:data:`TRAINER_OPTIONS`), and ``card``, which the model card quotes and training ignores.

    Raises:
        InputError: no such preset, section or key, a value of the wrong kind, or text that is not YAML.
    """
    preset = preset_files.load_sections("presets", name, overrides, [*SECTIONS, "trainer", "card"])
    read_preset(preset)
    return preset


def read_preset(preset: dict) -> tuple[ModelConfig, DataOptions, LossWeights, TrainingOptions]:
    """The sections of a preset, checked; raises :class:`InputError`."""
    if unknown := sorted(set(preset.get("trainer", {})) - set(TRAINER_OPTIONS)):
        raise InputError(
            f"trainer.{unknown[0]} cannot be set; of Lightning's Trainer there are {', '.join(TRAINER_OPTIONS)}"
        )
    return tuple(preset_files.read_section(cls, section, preset[section]) for section, cls in SECTIONS.items())


# ------------------------------------------------------------------------------------------------ dry run


def dry_run(preset: dict, data: Path, progress=None) -> tuple[str, list[str]]:
    """What a training run would find in ``data``, as text, and every problem that would stop it.

    Reads every file. Problems: sources without partner, files that cannot be read, sizes that differ, one patient only.
    """
    config, source, _, settings = read_preset(preset)
    listing = list_cases(data, source.order)
    problems = [*listing.problems, *check_cases(listing.cases, source.order, progress)]
    lines = [_found(data, listing)]
    try:
        training, validation = split_by_patient(listing.cases, source.validation, settings.seed)
        for name, cases in (("training", training), ("validation", validation)):
            patients = list(dict.fromkeys(case.patient for case in cases))
            lines.append(f"{name}: {len(cases)} cases of {len(patients)} patients: {', '.join(patients)}")
    except InputError as error:
        problems.append(str(error))
    lines.append(
        f"{config.dimension}D, crops of {source.crop}, {source.batch} a step, {settings.steps} steps in"
        f" {settings.epochs} epochs"
    )
    lines += [f"note: {sentence}" for sentence in _unnamed_patients(listing.cases)]
    lines += [f"left out: {sentence}" for sentence in listing.left_out]
    lines += [f"problem: {sentence}" for sentence in problems]
    return "\n".join(lines), problems


def _found(data: Path, listing: Listing) -> str:
    return (
        f"{data}: {len(listing.cases)} cases of {len(listing.patients)} patients, sources"
        f" {', '.join(f'{name} ({modality_of_name(name) or chr(63)})' for name in listing.sources)}"
    )


def _unnamed_patients(cases: Sequence[Case]) -> list[str]:
    """A sentence where slices of one patient might be split between training and validation."""
    flat = all(path.parent.name == name for case in cases for name, path in case.paths.items())
    if not flat or any(case.patient != case.name for case in cases):
        return []
    return [
        "each file counts as a patient of its own; if some are slices of one patient, name them as p01_003 or 20013"
        " (patients p01 and 20), or give a .csv table with a column patient"
    ]


# --------------------------------------------------------------------------------------------------- run


class _Data(pl.LightningDataModule):
    """Loaders that know which process, epoch and step they are for."""

    def __init__(self, crops: PairCrops, whole: ValidationPairs, options: DataOptions, steps_per_epoch: int):
        super().__init__()
        self.crops, self.whole, self.options, self.steps_per_epoch = crops, whole, options, steps_per_epoch

    def train_dataloader(self) -> DataLoader:
        trainer, batch = self.trainer, self.options.batch
        loop = trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.processed % self.steps_per_epoch
        sampler = CropSampler(
            self.steps_per_epoch * batch * trainer.world_size,
            trainer.world_size,
            trainer.global_rank,
            loop.epoch_progress.current.processed,
            done * batch,
        )
        return DataLoader(self.crops, batch_size=batch, sampler=sampler, num_workers=self.options.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.whole)


def train(preset: dict, name: str, data: Path, out: Path, resume: bool = False) -> Path:
    """Train to the end and export the averaged weights.

    Args:
        preset: as :func:`load_preset` returns it.
        name: of the model; the weights are written to ``out/NAME.safetensors``.
        data: folder or table, see :mod:`..cases`.
        out: folder of checkpoints, logs and weights.
        resume: go on from ``out/checkpoints/last.ckpt`` where there is one. Settings may change, such as
            ``training.lr`` or ``training.steps``; without a change the run ends as if it had never stopped.

    Returns:
        Path of the weights. Beside them ``NAME.json`` records data, split, settings and time.

    Raises:
        InputError: data or settings that cannot be used; a checkpoint of another architecture, or of a run that was
            trained on what are validation patients now.
        OutputError: the disk is full; the last complete checkpoint stays.
        TrainingError: the loss is no number.
        Stopped: SIGTERM or Ctrl-C, after the checkpoint was written.
    """
    config, source, loss, settings = sections = read_preset(preset)
    last = out / "checkpoints" / "last.ckpt"
    if last.is_file() and not resume and rank_zero_only.rank == 0:
        raise InputError(f"{out} already holds a run; --resume continues it, or choose another folder")
    if rank_zero_only.rank:  # one process speaks for all
        logging.getLogger("ClinicalFMambaLib").setLevel(logging.ERROR)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    cases = find_cases(data, source.order)
    for sentence in _unnamed_patients(cases):
        logger.warning("%s", sentence)
    training, validation = split_by_patient(cases, source.validation, settings.seed)
    logger.info("%d training and %d validation cases", len(training), len(validation))
    module = FusionModule(config, loss, settings.lr, settings.epochs * settings.steps_per_epoch, settings.warmup)
    module.run = {
        "settings": {name: dataclasses.asdict(section) for name, section in zip(SECTIONS, sections)},
        "training_patients": sorted({case.patient for case in training}),
        "validation_patients": sorted({case.patient for case in validation}),
    }
    if settings.init:
        warm_start(module.model, load_model(find_weights(settings.init)[1])[0])
    start = copy.deepcopy(module.model.state_dict()) if settings.keep_init else {}
    resumed = resume and last.is_file()
    if resumed:
        _check_checkpoint(last, module)
    crops = PairCrops(
        training,
        source.order,
        source.crop,
        dimension=config.dimension,
        seed=settings.seed,
        swap=source.swap,
        augment=source.augment,
        cache=out / "cache",
    )
    if settings.freeze_norm:
        if not resumed:
            module.measure_norms([crops[0, k] for k in range(NORM_CROPS)], source.batch)
        module.freeze_norm = True
        module.train()  # Lightning takes the modes as it finds them
    whole = ValidationPairs(validation, source.order, dimension=config.dimension, crop=max(source.crop, 64))
    timer = Timer()
    with _lightning_quiet():
        trainer = _trainer(preset, settings, source, out, last, timer)
        try:
            datamodule = _Data(crops, whole, source, settings.steps_per_epoch)
            trainer.fit(module, datamodule=datamodule, ckpt_path=str(last) if resumed else None)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not isinstance(error, OutputError):
                raise OutputError(f"{out}: {error.strerror}; free some space, then --resume continues") from error
            raise
    weights = out / f"{name}.safetensors"
    if trainer.is_global_zero:
        # the averaged weights of the last step; the module's own are these only if a step was trained just now
        module.load_state_dict(_load_checkpoint(last)["state_dict"])
        if settings.keep_init:
            for key, tensor in module.model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.lerp_(start[key], settings.keep_init)
        modalities = ",".join(modality_of_name(n) for n in source.order[:2])
        save_weights(module.model, weights, {"name": name, "modalities": modalities})
        record = _record(name, preset, data, training, validation, trainer, timer)
        write_text(weights.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return weights


def _trainer(preset, settings: TrainingOptions, source: DataOptions, out: Path, last: Path, timer) -> pl.Trainer:
    shows_bar = sys.stderr.isatty()
    names = ("the first source", "the second source") if source.swap else tuple(source.order[:2])
    options = {
        "max_epochs": settings.epochs,
        "precision": settings.precision,
        "gradient_clip_val": settings.clip,
        "logger": TensorBoardLogger(out, name="logs", version=""),
        "plugins": [SafeCheckpoints()],
        "callbacks": [
            EMAWeightAveraging(decay=settings.ema),
            FailureSignatures(names),
            Pictures(),
            LearningRateMonitor(),
            timer,
            TQDMProgressBar(refresh_rate=10) if shows_bar else EpochLines(),
            StopOnSignal(last),
            ModelCheckpoint(last.parent, filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
        ],
        "devices": 1,  # more would multiply the batch: only when asked for
        "enable_progress_bar": shows_bar,
        "enable_model_summary": False,
        "default_root_dir": out,
        "check_val_every_n_epoch": max(1, settings.epochs // 10),
        "num_sanity_val_steps": 0,
        "sync_batchnorm": torch.cuda.is_available(),  # of several GPUs; torch has none for CPUs
        "log_every_n_steps": min(10, settings.steps_per_epoch),
        **preset.get("trainer", {}),
    }
    try:
        return pl.Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(f"Lightning refuses these settings: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _lightning_quiet() -> Iterator[None]:
    """Lightning's advice for programmers is not for users, and its progress bar belongs on stderr."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels):
            log.setLevel(level)


def _load_checkpoint(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as a checkpoint ({reason}); start again in another folder"
        ) from error


def _check_checkpoint(path: Path, module: FusionModule) -> None:
    checkpoint = _load_checkpoint(path)
    shapes = {k: tuple(v.shape) for k, v in checkpoint.get("state_dict", {}).items()}
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    config = module.model.config.to_json()
    if shapes != wanted or checkpoint.get("architecture", config) != config:
        raise InputError(
            f"{path} is of another architecture than this preset's model; choose another folder, or the preset and the"
            " overrides that the run was started with"
        )
    if "run" not in checkpoint:
        raise InputError(f"{path} does not say what it was trained on; start again in another folder")
    before = checkpoint["run"]
    if seen := sorted(set(before["training_patients"]) & set(module.run["validation_patients"])):
        raise InputError(
            f"{path}: the run was trained on {', '.join(seen)}, which would be validation patients now; give the data,"
            f" data.validation and training.seed that it was started with, or"
            f' "data.validation={before["validation_patients"]}"'
        )
    if changed := _changes(before["settings"], module.run["settings"]):
        logger.warning("the run goes on with other settings: %s", ", ".join(changed))


def _changes(before: dict, now: dict) -> list[str]:
    """``section.key=value`` of each setting that differs."""
    return [
        f"{section}.{key}={value} (was {before[section].get(key)})"
        for section in now
        for key, value in now[section].items()
        if value != before[section].get(key)
    ]


def _record(name, preset, data: Path, training: list[Case], validation: list[Case], trainer, timer) -> dict:
    return {
        "name": name,
        "preset": preset,
        "data": Path(data).name,
        "training_patients": sorted({c.patient for c in training}),
        "validation_patients": sorted({c.patient for c in validation}),
        "training_cases": len(training),
        "validation_cases": len(validation),
        "validation_loss": _number(trainer.callback_metrics.get("val_loss")),
        "warnings": {k: v for c in trainer.callbacks if isinstance(c, FailureSignatures) for k, v in c.found.items()},
        "hours": round(timer.time_elapsed("train") / 3600, 2),
        "torch": torch.__version__,
        "device": str(trainer.strategy.root_device),
        "processes": trainer.world_size,
    }


def _number(value) -> float | None:
    return None if value is None else round(float(value), 5)
