"""Train one preset: data, Lightning trainer, checkpoints, export of the averaged weights."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from ..config import ModelConfig
from ..errors import InputError
from ..files import write_text
from ..pretrained import find_weights, load_model, save_weights
from .data import PairCrops, WholePairs, find_cases, find_pairs, split_by_patient
from .losses import LossWeights
from .module import FusionModule
from .warm_start import warm_start

logger = logging.getLogger(__name__)


def list_presets() -> list[str]:
    """Names of the presets that come with the package."""
    folder = importlib.resources.files(__package__) / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> dict:
    """A preset by name, or from a path that ends with .yaml, with ``section.key=value`` overrides.

    Raises:
        InputError: no such preset, section or key, or text that is not YAML.
    """
    path = Path(name) if name.endswith(".yaml") else importlib.resources.files(__package__) / "presets" / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"unknown preset {name!r}; known: {', '.join(list_presets())}, or the path of a .yaml file")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
        for override in overrides:
            key, _, value = override.partition("=")
            section, _, key = key.strip().partition(".")
            if not value or section not in preset or not key:
                raise InputError(f"override {override!r} should read section.key=value; sections: {', '.join(preset)}")
            preset[section][key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    return preset


def _options(cls, values: dict):
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise InputError(f"unknown option {sorted(unknown)} for {cls.__name__}; known: {', '.join(sorted(known))}")
    return cls(**values)


def train(preset: dict, name: str, data: Path, out: Path, resume: bool = False) -> Path:
    """Train to the end and export the averaged weights.

    Args:
        preset: as :func:`load_preset` returns it.
        name: of the model; the weights are written to ``out/NAME.safetensors``.
        data: folder in the layout that the preset names.
        out: folder of checkpoints, logs and weights.
        resume: go on from ``out/checkpoints/last.ckpt`` where there is one.

    Returns:
        Path of the weights. Beside them ``NAME.json`` records data, split, settings and time.
    """
    settings, source = preset["training"], preset["data"]
    config, loss = _options(ModelConfig, preset["model"]), _options(LossWeights, preset["loss"])
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    cases = find_pairs(data) if source["layout"] == "pairs" else find_cases(data, source["order"])
    training, validation = split_by_patient(cases, source["validation"], settings["seed"])
    logger.info("%d training and %d validation cases", len(training), len(validation))
    crops = PairCrops(
        training,
        source["order"],
        source["crop"],
        dimension=config.dimension,
        seed=settings["seed"],
        swap=source["swap"],
        length=settings["steps_per_epoch"] * source["batch"],
    )
    # whole epochs, and their number alone as the end: with max_steps as well, Lightning 2.6 counts the epoch of a
    # checkpoint twice when it resumes
    epochs = -(-settings["steps"] // settings["steps_per_epoch"])
    module = FusionModule(config, loss, settings["lr"], epochs * settings["steps_per_epoch"], settings["warmup"])
    if settings.get("init"):
        warm_start(module.model, load_model(find_weights(settings["init"])[1])[0])
    last = out / "checkpoints" / "last.ckpt"
    started = time.time()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        precision=settings["precision"],
        gradient_clip_val=settings["clip"],
        logger=TensorBoardLogger(out, name="logs", version=""),
        callbacks=[
            ModelCheckpoint(
                out / "checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True
            ),
            EMAWeightAveraging(decay=settings["ema"]),
            LearningRateMonitor(),
            _EpochOfData(crops),
            TQDMProgressBar(refresh_rate=10),
        ],
        check_val_every_n_epoch=max(1, epochs // 4),
        limit_val_batches=16 if config.dimension == 3 else 1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    whole = WholePairs(validation, source["order"]) if config.dimension == 2 else None
    trainer.fit(
        module,
        DataLoader(crops, batch_size=source["batch"]),
        DataLoader(whole) if whole else None,
        ckpt_path=str(last) if resume and last.is_file() else None,
    )
    record = {
        "name": name,
        "preset": preset,
        "data": str(data.name),
        "training_patients": sorted({c.patient for c in training}),
        "validation_patients": sorted({c.patient for c in validation}),
        "training_cases": len(training),
        "validation_cases": len(validation),
        "hours": round((time.time() - started) / 3600, 2),
        "torch": torch.__version__,
        "device": str(trainer.strategy.root_device),
    }
    weights = save_weights(module.model, out / f"{name}.safetensors", {"name": name})
    write_text(out / f"{name}.json", json.dumps(record, indent=2) + "\n")
    return weights


class _EpochOfData(pl.Callback):
    """Tell the data which epoch it is, so that a resumed run draws what the uninterrupted one would have drawn."""

    def __init__(self, crops: PairCrops):
        self.crops = crops

    def on_train_epoch_start(self, trainer, module) -> None:
        self.crops.set_epoch(trainer.current_epoch)
