"""Lightning callbacks: early warnings in words, pictures for TensorBoard, stopping on a signal, safe checkpoints."""

from __future__ import annotations

import io
import logging
import signal
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..errors import Stopped, TrainingError
from ..evaluation.metrics import IGNORED_SHARE, source_shares
from ..files import replacing
from .losses import magnitude, slices

logger = logging.getLogger(__name__)

# Measured over whole data sets of MRI-CT and MRI-SPECT pairs: the plain average keeps half of the edge strength, the
# maximum 0.7 to 0.8.
WASHED_OUT = 0.55
# Of the first epoch's mean loss; training that works has lost more than this by then.
CONVERGED = 0.98
# Share of the training before which fused images are not judged: averaged weights lag behind.
TOO_EARLY = 0.15


def _on_any_process(trainer, flag: bool) -> bool:
    return flag if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(flag, all=False)


class FailureSignatures(pl.Callback):
    """Says in words when training goes wrong, while there is time to stop it.

    - NaN: the loss is no number. Training ends with :class:`TrainingError`; the last checkpoint is untouched.
    - washed out: the fused validation images have less than 0.55 of the sources' edge strength.
    - one source ignored: the least-squares share of a source in the fused validation images is below 0.2, and that
      of the other is not. It may be right for SPECT and PET, which colour shows as well.
    - no convergence: the mean loss of the last three epochs is not below 0.98 of the first epoch's.

    Each sentence is logged as a warning when the failure shows and once more when it is gone, and shows in
    TensorBoard.

    Attributes:
        found: name of the failure -> sentence, for those that show at present.
    """

    def __init__(self, names: tuple[str, str] = ("the first source", "the second source")):
        self.names = names
        self.found: dict[str, str] = {}
        self.losses: list[float] = []
        self._epoch: list[float] = []
        self._sums: list[torch.Tensor] = []

    def state_dict(self) -> dict:
        return {"losses": self.losses, "epoch": self._epoch, "found": self.found}

    def load_state_dict(self, state: dict) -> None:
        self.losses, self._epoch, self.found = list(state["losses"]), list(state["epoch"]), dict(state["found"])

    # ------------------------------------------------------------------------------------------- training

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = float(outputs["loss"].detach())
        if _on_any_process(trainer, not loss - loss == 0):
            raise TrainingError(
                f"NaN: the loss was no number at step {trainer.global_step} (epoch {trainer.current_epoch + 1}). Lower"
                f" training.lr (now {module.lr:g}), use training.precision=32-true (now {trainer.precision}), or check"
                " the data with --dry-run; the last checkpoint is from before, --resume continues from it"
            )
        self._epoch.append(loss)

    def on_train_epoch_end(self, trainer, module) -> None:
        if not self._epoch:
            return
        self.losses.append(sum(self._epoch) / len(self._epoch))
        self._epoch = []
        if len(self.losses) < 5:
            return
        first, last = self.losses[0], sum(self.losses[-3:]) / 3
        self._report(
            trainer,
            "no convergence",
            f"the loss went from {first:.3g} to {last:.3g} in {len(self.losses)} epochs: check training.lr (now"
            f" {module.lr:g}) and the weights of the loss"
            if last > CONVERGED * first
            else "",
        )

    # ----------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self, trainer, module) -> None:
        self._sums = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is None:
            return
        a, b = batch[:, 0].float(), batch[:, 1].float()
        fused = outputs["fused"].float()
        self._sums.append(torch.stack([_sharpness(fused, a, b), *_shares(fused, a, b)]))
        self._cmca = _cmca_range(module.model, a, b)

    def on_validation_epoch_end(self, trainer, module) -> None:
        if not self._sums or trainer.current_epoch + 1 < max(2, TOO_EARLY * trainer.max_epochs):
            return
        means = trainer.strategy.reduce(torch.stack(self._sums).nanmean(0), reduce_op="mean")
        sharpness, *share = (float(x) for x in means)
        stuck = ""
        if self._cmca and (self._cmca[0] > 0.98 or self._cmca[1] < 0.02):
            stuck = f"; the CMCA weights are stuck ({self._cmca[0]:.2f} to {self._cmca[1]:.2f})"
        self._report(
            trainer,
            "washed out",
            f"fused images keep {sharpness:.0%} of the sources' edge strength (a plain average keeps 50 %): raise"
            f" loss.gradient or loss.edge{stuck}"
            if sharpness < WASHED_OUT
            else "",
        )
        for name, value, other in zip(self.names, share, reversed(share)):
            self._report(
                trainer,
                f"{name} ignored",
                f"it makes up {value:.0%} of the fused images, the other source {other:.0%}: look at the pictures,"
                " which metrics do not replace; check data.order and the windows, raise loss.ssim"
                if value < IGNORED_SHARE <= other
                else "",
            )

    def _report(self, trainer, failure: str, sentence: str) -> None:
        if sentence and failure not in self.found:
            self._say(trainer, logging.WARNING, f"{failure}, epoch {trainer.current_epoch + 1}: {sentence}")
            self.found[failure] = sentence
        elif not sentence and self.found.pop(failure, None):
            self._say(trainer, logging.INFO, f"{failure}: no longer, in epoch {trainer.current_epoch + 1}")

    def _say(self, trainer, level: int, text: str) -> None:
        if trainer.is_global_zero:
            logger.log(level, "%s", text)
            if trainer.logger:
                trainer.logger.experiment.add_text("warnings", text, trainer.global_step)


def _sharpness(fused, a, b) -> torch.Tensor:
    """Edge strength of the fused image over that of the stronger source at each pixel."""
    strongest = torch.maximum(magnitude(slices(a)), magnitude(slices(b))).mean()
    return magnitude(slices(fused)).mean() / strongest.clamp(min=1e-6)


def _shares(fused, a, b) -> list[torch.Tensor]:
    """:func:`.source_shares` of a whole batch."""
    images = (x.detach().cpu().flatten(0, -2).numpy() for x in (fused, a, b))
    return [fused.new_tensor(share) for share in source_shares(*images)]


@torch.no_grad()
def _cmca_range(model, a, b) -> tuple[float, float] | None:
    """Smallest and largest channel weight of the cross-modal attention."""
    if model.cmca_ab is None:
        return None
    weights = torch.cat([model.cmca_ab.weights(model.stem(b)), model.cmca_ba.weights(model.stem(a))])
    return float(weights.min()), float(weights.max())


class Pictures(pl.Callback):
    """The first validation pairs and their fusion in TensorBoard: A, B, fused side by side, one axial slice."""

    def __init__(self, count: int = 4):
        self.count = count

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is None or batch_idx >= self.count or not trainer.is_global_zero or not trainer.logger:
            return
        panels = [x[0].float().cpu() for x in (batch[:, 0], batch[:, 1], outputs["fused"])]
        panels = [x[:, x.shape[1] // 2] if x.dim() == 4 else x for x in panels]
        picture = torch.cat(panels, dim=-1).clamp(0, 1)
        trainer.logger.experiment.add_image(f"fused/{batch_idx}", picture, trainer.global_step)


class StopOnSignal(pl.Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C: finish the step, write the checkpoint, and end with :class:`Stopped`.

    SIGUSR1 is what SLURM jobs are commonly told of their end with (``--signal=USR1@120``).

    In the last step of an epoch the epoch is finished first, without the rest of its validation. A second Ctrl-C ends
    at once.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.received: int | None = None

    def on_train_start(self, trainer, module) -> None:
        # In place of Lightning's own handlers, which end without writing anything; it restores them all afterwards.
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
                if number := getattr(signal, name, None):
                    signal.signal(number, self._receive)

    def _receive(self, number, frame) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        stop = _on_any_process(trainer, self.received is not None)
        if stop and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.checkpoint)
            self._stop(trainer)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        module.skip_validation = self.received is not None and trainer.world_size == 1

    def on_train_epoch_start(self, trainer, module) -> None:
        if _on_any_process(trainer, self.received is not None):
            self._stop(trainer)

    def _stop(self, trainer) -> None:
        raise Stopped(
            f"stopped at step {trainer.global_step} (epoch {trainer.current_epoch + 1} of {trainer.max_epochs});"
            f" {self.checkpoint} is saved, --resume continues from it",
            self.received or signal.SIGTERM,
        )


class EpochLines(pl.Callback):
    """One line an epoch in the log, where no progress bar is drawn."""

    def on_train_start(self, trainer, module) -> None:
        self.on_train_epoch_start(trainer, module)  # which Lightning leaves out when a run resumes in an epoch

    def on_train_epoch_start(self, trainer, module) -> None:
        self._started, self._first = time.perf_counter(), trainer.global_step

    def on_train_epoch_end(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        steps, seconds = trainer.global_step - self._first, time.perf_counter() - self._started
        left = (trainer.max_epochs - trainer.current_epoch - 1) * trainer.num_training_batches * seconds / steps
        shown = {k: trainer.callback_metrics[k] for k in ("loss", "val_loss") if k in trainer.callback_metrics}
        logger.info(
            "epoch %d of %d: %s, %.2f steps/s, about %.0f min left",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            ", ".join(f"{name} {float(value):.4f}" for name, value in shown.items()),
            steps / seconds,
            left / 60,
        )


class SafeCheckpoints(TorchCheckpointIO):
    """Checkpoints that take the place of the last one only when they are complete.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        with replacing(path) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            # through memory: torch's own writer hides the reason when the disk is full
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            temporary.write_bytes(buffer.getbuffer())
