"""A whole, tiny training run; resuming, stopping, failing; presets."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ClinicalFMambaLib.cases import find_cases
from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.errors import InputError, OutputError, Stopped, WeightsError
from ClinicalFMambaLib.pretrained import load_model
from ClinicalFMambaLib.training.data import PairCrops, split_by_patient
from ClinicalFMambaLib.training.losses import LossWeights
from ClinicalFMambaLib.training.module import FusionModule
from ClinicalFMambaLib.training.train import NORM_CROPS, dry_run, list_presets, load_preset, train

TINY = [
    "model.channels=[4, 4, 8]",
    "model.mamba_layers=1",
    "data.crop=24",
    "data.batch=2",
    "training.steps_per_epoch=3",
    "training.warmup=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_pairs):
    return write_pairs(tmp_path_factory.mktemp("pairs"), ("1001", "2001"))


def run(data, out, steps=6, resume=False, *overrides):
    return train(load_preset("mri-ct-2d", [*TINY, f"training.steps={steps}", *overrides]), "tiny", data, out, resume)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of two epochs."""
    return run(data, tmp_path_factory.mktemp("whole"))


def at_step(monkeypatch, cls, method, epoch, index, act):
    """Do something in one step of the training or validation."""
    step = getattr(cls, method)

    def wrapped(self, pairs, number):
        if (self.trainer.current_epoch, number) == (epoch, index):
            act()
        return step(self, pairs, number)

    monkeypatch.setattr(cls, method, wrapped)


def test_weights_load_and_their_record_names_the_split(whole):
    model, metadata = load_model(whole)
    assert metadata["name"] == "tiny" and metadata["modalities"] == "MR,CT" and model.config.channels == (4, 4, 8)
    record = json.loads(whole.with_suffix(".json").read_text())
    assert sorted(record["training_patients"] + record["validation_patients"]) == ["1", "2"]
    x = torch.rand(1, 1, 24, 24)
    with torch.no_grad():
        assert model(x, x).isfinite().all()


def test_tensorboard_has_curves_and_fused_pictures(whole):
    events = EventAccumulator(str(whole.parent / "logs"), {"images": 0}).Reload()
    assert {"loss", "val_loss", "train/ssim", "val/edge", "lr-Adam"} <= set(events.Tags()["scalars"])
    picture = events.Images("fused/0")[-1]
    assert (picture.height, picture.width) == (48, 3 * 48)


def test_frozen_norms_keep_the_mean_over_crops(data, tmp_path):
    state = load_model(run(data, tmp_path, 2, False, "training.freeze_norm=true"))[0].state_dict()
    preset = load_preset("mri-ct-2d", TINY)
    training, _ = split_by_patient(find_cases(data, ["MRI", "CT"]), 0.25, 3407)
    crops = PairCrops(training, ["MRI", "CT"], 24, dimension=2, seed=3407)
    pl.seed_everything(3407, verbose=False)
    module = FusionModule(ModelConfig(**preset["model"]), LossWeights(**preset["loss"]), 1e-3, 2)
    module.measure_norms([crops[0, k] for k in range(NORM_CROPS)], 2)
    names = [name for name in state if name.endswith("running_mean")]
    assert names
    for name in names:
        torch.testing.assert_close(state[name], module.model.state_dict()[name], atol=1e-3, rtol=1e-3)  # half precision


def test_same_seed_same_bytes(data, whole, tmp_path):
    assert run(data, tmp_path).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_sigterm_saves_and_resuming_ends_with_the_same_bytes(data, whole, tmp_path, monkeypatch, index):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, FusionModule, "training_step", 0, index, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match=rf"stopped at step {index + 1} .*--resume") as error:
            run(data, tmp_path)
    assert error.value.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert run(data, tmp_path, resume=True).read_bytes() == whole.read_bytes()
    assert_same(checkpoint(tmp_path), checkpoint(whole.parent))


def checkpoint(out):
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one, two, where="checkpoint"):
    """Bit by bit, all but times and places."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one.keys() - {"Timer", "dirpath", "best_model_path", "kth_best_model_path", "last_model_path"}:
            if not str(key).startswith("ModelCheckpoint"):
                assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for k, values in enumerate(zip(one, two)):
            assert_same(*values, f"{where}/{k}")
    else:
        assert one == two, where


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_a_slurm_job_that_is_told_of_its_end_saves_and_goes_on(data, whole, tmp_path, monkeypatch):
    job = {"JOB_ID": "71234", "JOB_NAME": "train", "NODELIST": "localhost", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    for name, value in {**job, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    # which Lightning would load, of whatever run it is
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, FusionModule, "training_step", 1, 0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stopped, match="stopped at step 4") as error:
            run(data, out, 6, True)
    assert error.value.signal == signal.SIGUSR1
    assert run(data, out, 6, True).read_bytes() == whole.read_bytes()
    assert not list(out.rglob("hpc*"))


def test_ctrl_c_in_the_validation_ends_the_epoch_and_saves(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, FusionModule, "validation_step", 0, 0, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped) as error:
            run(data, tmp_path)
    assert error.value.signal == signal.SIGINT
    assert run(data, tmp_path, resume=True).read_bytes() == whole.read_bytes()


def test_a_power_cut_costs_no_more_than_the_epoch(data, whole, tmp_path, monkeypatch):
    def die():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        at_step(patch, FusionModule, "training_step", 1, 1, die)
        with pytest.raises(RuntimeError, match="power cut"):
            run(data, tmp_path)
    assert run(data, tmp_path, resume=True).read_bytes() == whole.read_bytes()


def test_resuming_a_finished_run_exports_the_same_weights(data, tmp_path):
    first = run(data, tmp_path).read_bytes()
    (tmp_path / "tiny.safetensors").unlink()
    assert run(data, tmp_path, resume=True).read_bytes() == first


def test_a_full_disk_leaves_the_last_checkpoint(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def fill():
            def full(path, data):
                path.write_text("half a")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(Path, "write_bytes", full)

        at_step(patch, FusionModule, "training_step", 1, 0, fill)
        with pytest.raises(OutputError, match="No space left"):
            run(data, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert run(data, tmp_path, resume=True).read_bytes() == whole.read_bytes()


def test_files_that_are_spoilt_in_an_epoch_do_not_stop_it(data, whole, tmp_path, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")

    def spoil():
        for path in copy.rglob("*.png"):
            path.write_bytes(b"no more")

    at_step(monkeypatch, FusionModule, "training_step", 0, 1, spoil)
    assert run(copy, tmp_path / "run").read_bytes() == whole.read_bytes()
    with pytest.raises(InputError, match=r"cannot be read"):
        run(copy, tmp_path / "run", 9, True)


def test_a_run_never_goes_on_with_validation_patients_that_it_was_trained_on(data, whole):
    (trained_on,) = json.loads(whole.with_suffix(".json").read_text())["training_patients"]
    with pytest.raises(InputError, match=rf"trained on {trained_on}, which would be validation patients"):
        run(data, whole.parent, 6, True, f"data.validation=['{trained_on}']")


def test_a_run_goes_on_with_another_rate_and_more_steps(data, tmp_path, caplog):
    run(data, tmp_path, 3)
    run(data, tmp_path, 6, True, "training.lr=1e-5")
    (warning,) = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
    assert "training.lr=1e-05 (was 0.001), training.steps=6 (was 3)" in warning
    state = checkpoint(tmp_path)
    assert state["global_step"] == 6
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-6)
    rates = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("lr-Adam")
    assert rates[-1].step >= 3 and rates[-1].value < 1.1e-5


def test_the_schedule_is_a_warm_up_and_a_cosine():
    module = FusionModule(ModelConfig(channels=(4, 4, 8), mamba_layers=0), LossWeights(), 1e-3, 50, 10)
    optimiser = torch.optim.Adam([torch.zeros(1)], 1e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 40, eta_min=1e-6)
    reference = torch.optim.lr_scheduler.SequentialLR(optimiser, [warm_up, cosine], [10])
    for step in range(51):
        assert module.learning_rate(step) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6), step
        optimiser.step()
        reference.step()
    assert module.learning_rate(60) == pytest.approx(1e-6)


def test_the_exported_weights_are_the_averaged_ones(data, whole, tmp_path):
    def both(out):
        state = checkpoint(out)
        names = [name for name in state["state_dict"] if name.endswith("out_proj.weight")]
        return [torch.cat([state[k][name].flatten() for name in names]) for k in ("state_dict", "current_model_state")]

    averaged, last = both(whole.parent)
    assert not torch.equal(averaged, last)
    exported = load_model(whole)[0].state_dict()
    for name, value in checkpoint(whole.parent)["state_dict"].items():
        if name.startswith("model."):
            assert torch.equal(exported[name.removeprefix("model.")].half(), value.half()), name
    run(data, tmp_path, 3, False, "training.ema=0")
    assert torch.equal(*both(tmp_path))


def test_a_share_of_the_first_weights_is_kept_in_the_exported_ones(data, whole, tmp_path):
    start = load_model(whole)[0].state_dict()
    ends = []
    for keep in (0, 0.25):
        override = (f"training.init={whole}", f"training.keep_init={keep}", "training.ema=0")
        ends.append(load_model(run(data, tmp_path / str(keep), 3, False, *override))[0].state_dict())
    moved = [name for name, value in start.items() if value.is_floating_point() and not value.equal(ends[0][name])]
    assert moved
    for name in moved:
        expected = 0.25 * start[name] + 0.75 * ends[0][name]
        torch.testing.assert_close(ends[1][name], expected, atol=1e-3, rtol=2e-3)  # half precision


def test_symmetry_teaches_the_network_to_forget_the_order(data, tmp_path):
    def asymmetry(out, *overrides):
        override = ("training.lr=0.01", "training.ema=0", "loss.pixel=0", "loss.ssim=0", "loss.edge=0", "loss.scd=0")
        model = load_model(run(data, out, 12, False, *override, *overrides))[0].eval()
        a, b = torch.rand(2, 1, 1, 24, 24, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return (model(a, b) - model(b, a)).abs().mean()

    with_term = asymmetry(tmp_path / "with", "loss.symmetry=100", "loss.gradient=0")
    assert with_term < 0.7 * asymmetry(tmp_path / "without", "loss.gradient=1")


def test_mixed_precision(data, tmp_path):
    run(data, tmp_path, 3, False, "training.precision=bf16-mixed")
    state = checkpoint(tmp_path)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert all(value.dtype != torch.bfloat16 for value in state["state_dict"].values())


def test_a_run_is_not_overwritten(data, whole):
    with pytest.raises(InputError, match="--resume"):
        run(data, whole.parent)


@pytest.mark.parametrize("override", ["model.cmca=false", "model.dilations=[1, 1, 1]"])
def test_a_checkpoint_of_another_architecture_is_refused(data, whole, override):
    with pytest.raises(InputError, match="another architecture"):
        run(data, whole.parent, 6, True, override)


def test_a_damaged_checkpoint_is_refused(data, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK no more")
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        run(data, tmp_path, resume=True)


def test_two_processes_train_one_model(data, whole, tmp_path):
    overrides = [*TINY, "training.steps=6", "data.batch=1", "trainer.devices=2", "trainer.strategy=ddp"]
    command = [sys.executable, "-m", "ClinicalFMambaLib", "train", "mri-ct-2d", "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "-o", str(tmp_path), "trainer.accelerator=cpu", *overrides],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'mri-ct-2d.safetensors'}\n"
    assert json.loads((tmp_path / "mri-ct-2d.json").read_text())["processes"] == 2
    together = load_model(tmp_path / "mri-ct-2d.safetensors")[0].state_dict()
    alone = load_model(whole)[0].state_dict()
    # the same crops from the same start, but for the batch normalisation, which is each process's own on CPUs
    for name, value in alone.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(together[name], value, rtol=0, atol=6 * 1e-3, msg=name)
    assert len(done.stderr.splitlines()) == len(set(done.stderr.splitlines()))


# ------------------------------------------------------------------------------------------------ dry run


def test_dry_run_lists_what_was_found(data):
    text, problems = dry_run(load_preset("mri-ct-2d"), data)
    assert problems == []
    for words in (
        "2 cases of 2 patients",
        "MRI (MR), CT (CT)",
        "training: 1 cases",
        "validation: 1 cases",
        "3500 steps",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("names", "told"), [(("a", "b"), True), (("1001", "2001"), False), (("p1_01", "p2_01"), False)]
)
def test_files_that_name_no_patient_are_pointed_out(write_pairs, tmp_path, names, told):
    text, problems = dry_run(load_preset("mri-ct-2d"), write_pairs(tmp_path, names))
    assert ("counts as a patient of its own" in text) == told and not problems


def test_dry_run_lists_all_that_is_wrong(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (48, 48), dtype=np.uint8)
    for folder in ("MRI", "CT"):
        (tmp_path / folder).mkdir()
        for name in ("1001", "1002", "1003"):
            rows = 40 if (folder, name) == ("CT", "1002") else 48
            sitk.WriteImage(sitk.GetImageFromArray(image[:rows]), str(tmp_path / folder / f"{name}.png"))
    (tmp_path / "MRI" / "1003.png").write_bytes(b"")
    (tmp_path / "CT" / "1004.png").write_bytes(b"")
    text, problems = dry_run(load_preset("mri-ct-2d"), tmp_path)
    for words in ("1004.png has no partner", "do not fit each other", "0 bytes", "at least 2 patients"):
        assert any(words in problem for problem in problems), (words, problems)
        assert words in text
    assert len(problems) == 4


# ------------------------------------------------------------------------------------------------ presets


def test_every_preset_is_complete():
    own = {"mri-ct-2d", "mri-spect-2d", "mri-mri-2d", "mri-mri-3d"}
    paper = {"paper-mri-ct-2d", "paper-mri-spect-2d", "paper-mri-mri-3d"}
    assert set(list_presets()) == own | paper
    for name in list_presets():
        preset = load_preset(name)
        assert set(preset) - {"card"} == {"model", "data", "loss", "training", "trainer"}
        if name in paper:
            assert preset["loss"] == {"pixel": 2, "gradient": 10, "ssim": 5} and preset["data"]["batch"] == 4


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("mri-xy", "loss.ssim=1", "unknown preset"),
        ("mri-ct-2d", "steps=1", "section.key=value"),
        ("mri-ct-2d", "nonsense.steps=1", "section.key=value"),
        ("mri-ct-2d", "training.steps=[", "not valid YAML"),
        ("mri-ct-2d", "loss.sism=1", "unknown option loss.sism"),
        ("mri-ct-2d", "trainer.gpus=2", "trainer.gpus cannot be set; .* devices"),
        ("mri-ct-2d", "trainer.max_epochs=2", "trainer.max_epochs cannot be set"),
        ("mri-ct-2d", "trainer.fast_dev_run=true", "trainer.fast_dev_run cannot be set"),
        ("mri-ct-2d", "training.steps=many", "training.steps='many' should be int"),
        ("mri-ct-2d", "training.lr=fast", "training.lr='fast' should be float"),
        ("mri-ct-2d", "training.lr=0", "must be positive"),
        ("mri-ct-2d", "training.ema=1", "below 1"),
        ("mri-ct-2d", "training.keep_init=0.5", "needs training.init"),
        ("mri-ct-2d", "data.order=MRI", "should be list"),
        ("mri-ct-2d", "data.order=[MRI]", "two sources"),
        ("mri-ct-2d", "data.swap=1", "should be bool"),
        ("mri-ct-2d", "model.dimension=4", "2 or 3"),
        ("mri-ct-2d", "model.scan=tri-plane", "2D model scans"),
    ],
)
def test_bad_presets_and_overrides_are_refused(name, override, message):
    with pytest.raises(InputError, match=message):
        load_preset(name, [override])


def test_numbers_as_yaml_reads_them(data):
    assert load_preset("mri-ct-2d", ["training.lr=1e-3", "training.clip=null", "data.validation=[20, 21]"])


def test_a_preset_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {order: [T1, PET]}\n")
    assert load_preset(str(tmp_path / "mine.yaml"))["data"] == {"order": ["T1", "PET"]}
    (tmp_path / "mine.yaml").write_text("data: {order: [T1, PET]}\nnet: {}\n")
    with pytest.raises(InputError, match="unknown section 'net'"):
        load_preset(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("just words")
    with pytest.raises(InputError, match="should hold the sections"):
        load_preset(str(tmp_path / "mine.yaml"))


def test_lightning_refuses_in_one_line(data, tmp_path):
    with pytest.raises(InputError, match="Lightning refuses"):
        run(data, tmp_path, 3, False, "trainer.strategy=magic")
