"""Early warnings: each failure is made to happen, and a good fusion raises none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy import ndimage

from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.errors import OutputError, TrainingError
from ClinicalFMambaLib.evaluation.baselines import BASELINES
from ClinicalFMambaLib.training.callbacks import FailureSignatures, SafeCheckpoints
from ClinicalFMambaLib.training.losses import LossWeights
from ClinicalFMambaLib.training.module import FusionModule


def sources(*shape):
    noise = [ndimage.gaussian_filter(np.random.default_rng(k).random(shape), 1.5) for k in (0, 1)]
    return [np.float32((x - x.min()) / np.ptp(x)) for x in noise]


def module(dimension=2):
    return FusionModule(ModelConfig(dimension, channels=(4, 4, 8), mamba_layers=1), LossWeights(), 1e-3, 10, 1)


class Trainer:
    """What the callback asks of a trainer."""

    world_size, is_global_zero, precision, global_step, max_epochs = 1, True, "32-true", 7, 10

    def __init__(self, epoch=4):
        self.current_epoch = epoch
        self.texts = []
        self.strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
        self.logger = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *a: self.texts.append(a[1])))


def validate(callback, trainer, fused, a, b, network=None):
    tensor = [torch.from_numpy(x)[None, None] for x in (fused, a, b)]
    network = network or module()
    callback.on_validation_epoch_start(trainer, network)
    callback.on_validation_batch_end(
        trainer, network, {"fused": tensor[0]}, torch.stack([tensor[1][0], tensor[2][0]])[None], 0
    )
    callback.on_validation_epoch_end(trainer, network)
    return list(callback.found)


A, B = sources(64, 64)
WRONG = {
    "washed out": (0.3 * np.maximum(A, B) + 0.3, ["washed out"]),
    "grey": (np.full_like(A, 0.5), ["washed out"]),
    "first alone": (A, ["CT ignored"]),
    "second alone": (B, ["MRI ignored"]),
    "second with a trace of the first": (0.9 * B + 0.1 * A, ["MRI ignored"]),
}


@pytest.mark.parametrize(("fused", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_fusions_are_named(fused, expected, caplog):
    callback, trainer = FailureSignatures(("MRI", "CT")), Trainer()
    with caplog.at_level(logging.WARNING):
        assert validate(callback, trainer, fused, A, B) == expected
    (record,) = caplog.records
    assert expected[0] in record.getMessage() and "loss." in record.getMessage()
    assert trainer.texts == [record.getMessage()]


@pytest.mark.parametrize("name", ["maximum", "laplacian_pyramid", "wavelet"])
def test_good_fusions_are_not(name):
    assert validate(FailureSignatures(), Trainer(), BASELINES[name](A, B), A, B) == []


def test_volumes_are_judged_too():
    a, b = sources(16, 24, 24)
    tensor = [torch.from_numpy(x)[None, None] for x in (a, a, b)]
    callback, network = FailureSignatures(("T2", "FLAIR")), module(3)
    callback.on_validation_epoch_start(Trainer(), network)
    callback.on_validation_batch_end(Trainer(), network, {"fused": tensor[0]}, torch.stack(tensor[1:], 1), 0)
    callback.on_validation_epoch_end(Trainer(), network)
    assert list(callback.found) == ["FLAIR ignored"]


def test_a_warning_comes_once_and_is_taken_back(caplog):
    callback, trainer = FailureSignatures(("MRI", "CT")), Trainer()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            validate(callback, trainer, A, A, B)
        validate(callback, trainer, np.maximum(A, B), A, B)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "no longer" in caplog.records[1].getMessage() and callback.found == {}


def test_nothing_is_judged_before_the_averaged_weights_have_moved():
    assert validate(FailureSignatures(), Trainer(epoch=0), np.full_like(A, 0.5), A, B) == []


def test_stuck_attention_is_named(caplog):
    network = module()
    for branch in (network.model.cmca_ab, network.model.cmca_ba):
        torch.nn.init.constant_(branch.reference.bias, 20.0)
    validate(FailureSignatures(), Trainer(), np.full_like(A, 0.5), A, B, network)
    assert "CMCA weights are stuck (1.00 to 1.00)" in caplog.text


def test_no_convergence(caplog):
    callback, trainer = FailureSignatures(), Trainer()
    for epoch in range(8):
        trainer.current_epoch = epoch
        for _ in range(3):
            callback.on_train_batch_end(trainer, module(), {"loss": torch.tensor(5.0 + 0.01 * epoch)}, None, 0)
        callback.on_train_epoch_end(trainer, module())
    (record,) = caplog.records
    assert "no convergence, epoch 5: the loss went from 5 to 5.03" in record.getMessage()
    resumed = FailureSignatures()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.found == callback.found and len(resumed.losses) == 8


def test_convergence_is_silent(caplog):
    callback = FailureSignatures()
    for epoch in range(8):
        callback.on_train_batch_end(Trainer(epoch), module(), {"loss": torch.tensor(5.0 * 0.9**epoch)}, None, 0)
        callback.on_train_epoch_end(Trainer(epoch), module())
    assert not caplog.records


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_ends_a_real_training(value, tmp_path):
    class Broken(FusionModule):
        def training_step(self, pairs, index):
            return super().training_step(pairs, index) * (value if index == 2 else 1)

    network = Broken(ModelConfig(channels=(4, 4, 8), mamba_layers=1), LossWeights(), 1e-3, 10, 1)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FailureSignatures()],
    )
    with pytest.raises(TrainingError, match=r"NaN: .* at step 3 .*training.lr .*--resume"):
        trainer.fit(network, torch.utils.data.DataLoader(torch.rand(6, 2, 1, 16, 16)))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.ckpt"
    SafeCheckpoints().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"last.ckpt: cannot be written \(File too large\)"):
            SafeCheckpoints().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
