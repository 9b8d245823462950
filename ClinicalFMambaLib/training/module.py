"""The Lightning module: network, loss, optimiser, validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
import torch

from ..config import ModelConfig
from ..models.clinicalfmamba import ClinicalFMamba
from .losses import FusionLoss, LossWeights


class FusionModule(pl.LightningModule):
    """Trains a :class:`ClinicalFMamba` on batches (B, 2, 1, *size): the anatomical source, then the other.

    Source of the settings: Zhou and Khalvati, arXiv 2508.03008, section 3.1 (Adam, cosine schedule to 1e-6).
    """

    def __init__(self, model: ModelConfig, loss: LossWeights, lr: float, steps: int, warmup: int = 100):
        super().__init__()
        self.model = ClinicalFMamba(model)
        self.loss = FusionLoss(model.dimension, loss)
        self.lr, self.steps, self.warmup = lr, steps, warmup
        self.skip_validation = False
        self.freeze_norm = False
        self.run: dict = {}  # what the checkpoint says about the run

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[torch.nn.Module]:
        return [m for m in self.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d))]

    def measure_norms(self, pairs: Sequence[torch.Tensor], batch: int) -> None:
        """Set the statistics of the batch norms to their mean over ``pairs``, (2, 1, *size) each."""
        norms = self._norms()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
        self.train()
        with torch.no_grad():
            for start in range(0, len(pairs), batch):
                stack = torch.stack(list(pairs[start : start + batch]))
                self(stack[:, 0], stack[:, 1])
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.model(a, b)

    def _losses(self, pairs: torch.Tensor):
        a, b = pairs[:, 0], pairs[:, 1]
        fused = self(a, b).float()
        swapped = self(b, a).float() if self.loss.weights.symmetry else None
        # variances and edge ratios of the loss do not survive bfloat16
        with torch.autocast(fused.device.type, enabled=False):
            return fused, *self.loss(fused, a, b, swapped)

    def training_step(self, pairs: torch.Tensor, _index: int) -> torch.Tensor:
        _, loss, terms = self._losses(pairs)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return loss

    def validation_step(self, pairs: torch.Tensor, _index: int) -> dict[str, torch.Tensor] | None:
        if self.skip_validation:
            return None
        fused, loss, terms = self._losses(pairs)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(pairs))
        self.log_dict({f"val/{k}": v for k, v in terms.items()}, sync_dist=True, batch_size=len(pairs))
        return {"fused": fused}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["architecture"] = self.model.config.to_json()
        checkpoint["run"] = self.run

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from a twentieth of the peak, then a cosine to 1e-6."""
        if step < self.warmup:
            return self.lr * (0.05 + 0.95 * step / self.warmup)
        part = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return 1e-6 + (self.lr - 1e-6) * (1 + math.cos(math.pi * part)) / 2

    def configure_optimizers(self):
        # with a base rate of one, the rate is never that of a checkpoint, and a run may go on with another
        optimizer = torch.optim.Adam(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.learning_rate(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        for group in self.optimizers().param_groups:
            group["lr"] = self.learning_rate(self.lr_schedulers().last_epoch)
