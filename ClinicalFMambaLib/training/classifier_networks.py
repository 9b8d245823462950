"""ResNet-50 classifiers on Lightning: focal loss, augmentation, early stopping inside the training patients alone."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.model_selection import StratifiedShuffleSplit
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, require
from ..inference.tumour_features import Reading
from ..models.classifier import NetworkModel, build_network, network_input
from .train import _lightning_quiet
from .train_classifier import Fitted, TrainingOptions, calibrate

logger = logging.getLogger(__name__)

SHIFT = 4  # voxels of the working grid


class Crops(Dataset):
    """(slices or cube, label) of patients; with ``seed``, another augmentation of each in every epoch.

    Augmentation: shift, left-right flip, gain, offset and noise of the scores.
    """

    def __init__(self, readings: Sequence[Reading], labels, dimension: int, image: str, crop: int, seed: int | None):
        self.readings, self.labels, self.options = list(readings), np.asarray(labels), (image, dimension, crop)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.readings)

    def __getitem__(self, index: int):
        label = torch.tensor([float(self.labels[index])])
        if self.seed is None:
            return torch.from_numpy(network_input(self.readings[index], *self.options)), label
        rng = np.random.default_rng([self.seed, self.epoch, index])
        x = network_input(self.readings[index], *self.options, shift=rng.integers(-SHIFT, SHIFT + 1, 3))
        if rng.random() < 0.5:
            x = x[..., ::-1]
        x = x * rng.uniform(0.9, 1.1) + rng.uniform(-0.2, 0.2) + rng.normal(0, 0.1, x.shape)
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)), label


class GradeModule(pl.LightningModule):
    """One ResNet-50 with MONAI's focal loss, the rarer grade weighing more."""

    def __init__(self, dimension: int, positive: float, settings: TrainingOptions):
        super().__init__()
        self.network = build_network(dimension)
        losses = require("monai.losses", "training a ResNet-50", "monai>=1.4")
        # alpha weighs the second label, 1 - alpha the first.
        self.loss = losses.FocalLoss(gamma=settings.gamma, alpha=1 - positive)
        self.settings = settings

    def _step(self, batch) -> torch.Tensor:
        x, labels = batch
        logits = self.network(x.flatten(0, 1))
        # A patient's slices vote with their mean.
        return self.loss(logits.unflatten(0, x.shape[:2]).mean(1), labels)

    def training_step(self, batch, index):
        return self._step(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self._step(batch), batch_size=len(batch[1]), sync_dist=True)

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.dataset.epoch = self.current_epoch

    def configure_optimizers(self):
        options = {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay}
        return torch.optim.AdamW(self.parameters(), **options)


def fit_networks(
    readings: Sequence[Reading], labels: np.ndarray, dimension: int, image: str, crop: int, settings: TrainingOptions,
    trainer: dict, seed: int, members: int = 1,
) -> Fitted:  # fmt: skip
    """Train ``members`` networks, each stopped by another part of these patients, which also calibrates them.

    Raises:
        InputError: too few patients of a grade, or Lightning refuses the options.
    """
    if min(np.bincount(labels, minlength=2)) < 2:
        raise InputError("a network needs two patients of each grade at least in every training fold")
    networks, logits, seen = [], [], []
    for member in range(members):
        network, validation = _fit_one(
            readings, labels, dimension, image, crop, settings, trainer, seed + 1000 * member
        )
        networks.append(network)
        one = NetworkModel(dimension, image, crop, [network])
        logits += [float(one.logits(readings[k])[0]) for k in validation]
        seen += list(labels[validation])
    return Fitted(NetworkModel(dimension, image, crop, networks), *calibrate(np.array(logits), np.array(seen)))


def _fit_one(readings, labels, dimension, image, crop, settings: TrainingOptions, trainer: dict, seed: int):
    """A network, and the indices of the patients that stopped its training."""
    pl.seed_everything(seed, workers=True, verbose=False)
    count = max(2, round(settings.validation * len(labels)))
    train, validation = next(StratifiedShuffleSplit(1, test_size=count, random_state=seed).split(labels, labels))
    options = (dimension, image, crop)
    # A last batch of one patient has no variance for batch norm in 3D.
    batch = settings.batch - 1 if len(train) % settings.batch == 1 and settings.batch > 2 else settings.batch
    loaders = [
        DataLoader(
            Crops([readings[k] for k in part], labels[part], *options, seed if shuffled else None),
            batch_size=batch,
            shuffle=shuffled,
            drop_last=shuffled and len(train) % batch == 1 and len(train) > batch,
        )
        for part, shuffled in ((train, True), (validation, False))
    ]
    module = GradeModule(dimension, float(labels[train].mean()), settings)
    with tempfile.TemporaryDirectory() as folder, _lightning_quiet():
        best = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)
        try:
            runner = pl.Trainer(
                **{
                    "max_epochs": settings.epochs,
                    "precision": settings.precision,
                    "callbacks": [EarlyStopping("val_loss", patience=settings.patience), best],
                    "default_root_dir": folder,
                    "logger": False,
                    "devices": 1,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "num_sanity_val_steps": 0,
                    "deterministic": "warn",
                    **trainer,
                }
            )
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise InputError(f"Lightning refuses these settings: {' '.join(str(error).split())}") from error
        runner.fit(module, *loaders)
        path = Path(runner.strategy.broadcast(best.best_model_path))
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        # Another process may still be reading.
        runner.strategy.barrier()
    logger.info("%d epochs, validation loss %.3f", runner.current_epoch, float(best.best_model_score))
    return module.network.eval(), validation
