"""The engine with tiny random weights: order of the inputs, grids, planes, colour, devices, memory, history."""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ClinicalFMambaLib import NOTICE, pretrained
from ClinicalFMambaLib.config import FusionOptions, ModelConfig
from ClinicalFMambaLib.errors import Cancelled, DeviceError, InputError, WeightsError
from ClinicalFMambaLib.inference import engine as engine_module
from ClinicalFMambaLib.inference import plan as plan_module
from ClinicalFMambaLib.inference.colour import rgb_to_ycbcr
from ClinicalFMambaLib.inference.device import choose_device
from ClinicalFMambaLib.inference.engine import FusionEngine
from ClinicalFMambaLib.inference.plan import memory_needed
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba
from ClinicalFMambaLib.volumes import Volume

NOW = datetime.datetime(2025, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)


def tiny(path, dimension, modalities, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(dimension=dimension, channels=(4, 4, 8), mamba_layers=1)
    return pretrained.save_weights(ClinicalFMamba(config), path, {"modalities": modalities})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    kinds = {"ct": (2, "MR,CT"), "spect": (2, "MR,SPECT"), "mr": (3, "MR,MR"), "silent": (2, "")}
    return {name: str(tiny(folder / f"{name}.safetensors", *kind)) for name, kind in kinds.items()}


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """Make an index of tiny weights the bundled one."""

    def make(*names):
        kinds = {
            "mri-ct-2d": (2, "MR,CT"),
            "mri-spect-2d": (2, "MR,SPECT"),
            "mri-mri-2d": (2, "MR,MR"),
            "mri-mri-3d": (3, "MR,MR"),
        }
        index = {}
        for name in names:
            dimension, modalities = kinds[name]
            path = tiny(tmp_path / f"{name}.safetensors", dimension, modalities)
            index[name] = {
                "file": path.name,
                "sha256": pretrained.sha256(path),
                "dimension": dimension,
                "modalities": modalities.split(","),
            }
        (tmp_path / "index.json").write_text(json.dumps(index))
        monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
        monkeypatch.setattr(pretrained, "INDEX", tmp_path / "index.json")

    return make


@pytest.fixture(scope="module")
def engine():
    return FusionEngine("cpu", clock=lambda: NOW)


def blob(shape=(6, 24, 20), seed=0, modality="MR", **fields):
    """A smooth random head on black, int16."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    inside = z**2 + y**2 + x**2 < 0.8
    values = 400 + 300 * np.sin(5 * x + seed) * np.cos(4 * y) + rng.normal(0, 20, shape)
    fields = {"name": f"{modality.lower()}{seed}", "spacing": (1.0, 1.0, 1.0), **fields}
    return Volume((inside * values).astype(np.int16), modality=modality, **fields)


def ct(shape=(6, 24, 20), seed=7, **fields):
    volume = blob(shape, seed, "CT", **fields)
    array = np.where(volume.array > 0, volume.array // 8 - 20, -1000).astype(np.int16)
    return replace(volume, array=array)


def picture(seed=0, colour=False, modality="MR", shape=(24, 20)):
    array = np.clip(blob((1, *shape), seed).array // 3, 0, 255).astype(np.uint8)
    if colour:
        array = np.stack([array, array[:, ::-1], 255 - array], -1) * (array > 0)[..., None]
        array = array.astype(np.uint8)
    return Volume(array, name=f"p{seed}", modality=modality, is_image=True)


def fuse(engine, a, b, **options):
    options = {"check_registration": False, **options}
    return engine.fuse(a, b, FusionOptions(**options))


# ---------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize(
    ("a", "b", "model", "dtype", "top"),
    [
        (blob(), ct(), "ct", "int16", 1000),
        (ct(), blob(), "ct", "int16", 1000),
        (blob(), blob(seed=1), "mr", "int16", 1000),
        (picture(), picture(1, modality="CT"), "ct", "uint8", 255),
    ],
    ids=["mr-ct", "ct-mr", "mr-mr-3d", "images"],
)
def test_result_has_a_grid_and_a_stated_scale(engine, weights, a, b, model, dtype, top):
    a = replace(a, origin=(3.0, -4.0, 5.0), direction=(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    b = replace(b, origin=a.origin, direction=a.direction)
    result = fuse(engine, a, b, model=weights[model])
    volume = result.volume
    assert (volume.spacing, volume.origin, volume.direction) == (a.spacing, a.origin, a.direction)
    assert (volume.shape, volume.is_image, volume.array.dtype) == (a.shape, a.is_image, dtype)
    assert result.fused.dtype == np.float32
    assert result.fused.shape == a.shape
    assert 0 <= result.fused.min() < result.fused.max() <= 1
    np.testing.assert_allclose(volume.array / top, result.fused, atol=0.51 / top)
    assert result.provenance["output"]["scale"].startswith(str(top))
    assert str(top) in result.metadata()["scale"]
    assert result.warnings == ()


def test_result_is_what_the_network_gives(engine, weights):
    a, b = ct((1, 24, 24)), blob((1, 24, 24))
    result = fuse(engine, a, b, model=weights["ct"], window_a="0,80", window_b="0,700")
    network, _ = pretrained.load_model(weights["ct"])
    mr = torch.from_numpy(np.clip(b.array / np.float32(700), 0, 1))[:, None].float()
    hu = torch.from_numpy(np.clip(a.array / np.float32(80), 0, 1))[:, None].float()
    with torch.no_grad():
        expected = network(mr, hu)[0].numpy()
        other_order = network(hu, mr)[0].numpy()
    np.testing.assert_allclose(result.fused, expected, atol=2e-5)
    assert abs(result.fused - other_order).max() > 1e-3


def test_order_follows_the_modality_not_the_arguments(engine, weights):
    a, b = ct(), blob()
    np.testing.assert_array_equal(
        fuse(engine, a, b, model=weights["ct"]).fused, fuse(engine, b, a, model=weights["ct"]).fused
    )


def test_weights_that_state_nothing_take_the_anatomical_input_first(engine, weights):
    inputs = fuse(engine, ct(), blob(), model=weights["silent"]).provenance["steps"]
    (step,) = [s for s in inputs if s["step"] == "fusing"]
    assert step["network_inputs"] == ["mr0", "ct7"]


def test_slices_do_not_depend_on_the_batch(engine, weights, monkeypatch):
    together = fuse(engine, ct(), blob(), model=weights["ct"]).fused
    monkeypatch.setattr(engine_module, "_CPU_BATCH_PIXELS", 1)
    np.testing.assert_allclose(together, fuse(engine, ct(), blob(), model=weights["ct"]).fused, atol=1e-5)


def test_slices_without_content_stay_black(engine, weights):
    a, b = blob(), blob(seed=1)
    a.array[0] = b.array[0] = 0
    result = fuse(engine, a, b, model=weights["ct"])
    assert not result.fused[0].any()
    assert result.fused[1].any()


def test_same_input_same_bytes(weights):
    def once():
        result = FusionEngine("cpu", clock=lambda: NOW).fuse(ct(), blob(), FusionOptions(model=weights["ct"]))
        return result.volume.array.tobytes() + result.fused.tobytes() + json.dumps(result.metadata()).encode()

    assert once() == once()


# -------------------------------------------------------------------------------------------------- planes

# Columns are the patient directions (LPS) of x, y, z.
SAGITTAL_STACK = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)  # x to P, y to I, z to L
OBLIQUE = (0.9, 0.0, 0.436, 0.0, 1.0, 0.0, -0.436, 0.0, 0.9)


@pytest.mark.parametrize(
    ("direction", "spacing", "plane", "axis", "name"),
    [
        (None, (1, 1, 1), "auto", 0, "axial"),
        (None, (1, 1, 5), "auto", 0, "axial"),
        (None, (1, 5, 1), "auto", 1, "coronal"),
        (None, (5, 1, 1), "auto", 2, "sagittal"),
        (None, (1, 5, 1), "axial", 0, "axial"),
        (None, (1, 1, 1), "sagittal", 2, "sagittal"),
        (SAGITTAL_STACK, (1, 1, 1), "auto", 1, "axial"),
        (SAGITTAL_STACK, (1, 1, 4), "auto", 0, "sagittal"),
        (SAGITTAL_STACK, (1, 1, 4), "coronal", 2, "coronal"),
        (OBLIQUE, (1, 1, 1), "auto", 0, "axial"),
        (None, (1, 1, 1.01), "auto", 0, "axial"),
    ],
)
def test_plane_of_a_2d_model(engine, weights, monkeypatch, direction, spacing, plane, axis, name):
    fields = {"spacing": tuple(map(float, spacing)), **({"direction": direction} if direction else {})}
    shape = (16, 20, 24)
    seen = []
    original = engine_module._forward
    monkeypatch.setattr(engine_module, "_forward", lambda m, x, y, t: seen.append(x.shape[1:]) or original(m, x, y, t))
    result = fuse(engine, ct(shape, **fields), blob(shape, **fields), model=weights["ct"], plane=plane)
    assert set(seen) == {tuple(n for k, n in enumerate(shape) if k != axis)}
    assert result.provenance["plane"]["name"] == name
    assert result.fused.shape == shape


# -------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("colour_first", [True, False])
@pytest.mark.parametrize("volume", [False, True])
def test_colour_is_kept(engine, weights, colour_first, volume):
    spect, mr = picture(3, colour=True, modality="SPECT"), picture(0)
    if volume:
        spect, mr = (replace(v, array=np.repeat(v.array, 4, axis=0), is_image=False) for v in (spect, mr))
    pair = (spect, mr) if colour_first else (mr, spect)
    result = fuse(engine, *pair, model=weights["spect"])
    assert result.volume.array.dtype == np.uint8
    assert result.volume.array.shape == spect.array.shape
    assert (result.a01 if colour_first else result.b01).dtype == np.uint8
    expected = rgb_to_ycbcr(spect.array)[..., 1:]
    got = rgb_to_ycbcr(result.volume.array)
    inside = np.all((result.volume.array > 0) & (result.volume.array < 255), axis=-1)  # not clipped to the gamut
    assert inside.sum() > 50
    np.testing.assert_allclose(got[..., 1:][inside], expected[inside], atol=0.006)
    np.testing.assert_allclose(got[..., 0][inside], result.fused[inside], atol=0.006)


def test_two_colour_inputs_are_refused(engine, weights):
    with pytest.raises(InputError, match="both in colour"):
        fuse(engine, picture(1, colour=True), picture(2, colour=True), model=weights["spect"])


# ---------------------------------------------------------------------------------------- choice of the model


@pytest.mark.parametrize(
    ("bundled", "a", "b", "chosen", "warning"),
    [
        (("mri-ct-2d", "mri-mri-3d"), ct(), blob(), "mri-ct-2d", ""),
        (("mri-ct-2d", "mri-mri-3d"), blob(), blob(seed=1), "mri-mri-3d", ""),
        (("mri-ct-2d",), blob(), blob(seed=1), "mri-ct-2d", "trained on MR with CT, not on MR with MR"),
        (("mri-ct-2d", "mri-mri-3d"), blob((1, 24, 20)), blob((1, 24, 20), 1), "mri-ct-2d", "not on MR with MR"),
        (("mri-ct-2d", "mri-mri-2d"), blob((1, 24, 20)), blob((1, 24, 20), 1), "mri-mri-2d", ""),
        (("mri-ct-2d", "mri-spect-2d"), blob(), blob(seed=1, modality="SPECT"), "mri-spect-2d", ""),
        (("mri-ct-2d", "mri-spect-2d"), blob(), blob(seed=1, modality="PET"), "mri-spect-2d", "not on MR with PET"),
        (("mri-ct-2d",), blob(), blob(seed=1, modality="SPECT"), "mri-ct-2d", "not on MR with SPECT"),
        (("mri-ct-2d",), picture(3, True, "SPECT"), picture(0), "mri-ct-2d", "not on SPECT with MR"),
        (("mri-ct-2d", "mri-mri-3d"), ct(), ct(seed=3), "mri-ct-2d", "not on CT with CT"),
    ],
)
def test_automatic_model(bundle, engine, bundled, a, b, chosen, warning):
    bundle(*bundled)
    result = fuse(engine, a, b)
    assert result.provenance["model"]["name"] == chosen
    assert [warning in w for w in result.warnings] == ([True] if warning else [])


def test_3d_model_on_one_slice_falls_back(bundle, engine, weights):
    bundle("mri-ct-2d", "mri-mri-2d")
    result = fuse(engine, blob((1, 24, 20)), blob((1, 24, 20), 1), model=weights["mr"])
    assert result.provenance["model"]["name"] == "mri-mri-2d"
    assert "3D model and the input has one slice: mri-mri-2d is used instead" in result.warnings[0]


def test_3d_model_on_one_slice_without_any_2d_model(bundle, engine, weights):
    bundle()
    with pytest.raises(WeightsError, match="give a 2D model"):
        fuse(engine, blob((1, 24, 20)), blob((1, 24, 20), 1), model=weights["mr"])


def test_nothing_bundled_says_what_to_give(bundle, engine):
    bundle()
    with pytest.raises(WeightsError, match=r"no model for MR with MR is bundled.*--model"):
        fuse(engine, blob(), blob(seed=1))


def test_networks_stay_loaded_until_their_file_changes(weights, tmp_path, monkeypatch):
    engine, loads = FusionEngine("cpu"), []
    monkeypatch.setattr(engine_module, "load_model", lambda p: loads.append(p) or pretrained.load_model(p))
    path = tiny(tmp_path / "m.safetensors", 2, "MR,CT")
    before = fuse(engine, ct(), blob(), model=str(path)).fused
    fuse(engine, ct(), blob(seed=1), model=str(path))
    assert len(loads) == 1
    tiny(path, 2, "MR,CT", seed=5)
    after = fuse(engine, ct(), blob(), model=str(path)).fused
    assert len(loads) == 2
    assert abs(after - before).max() > 1e-3


def test_weights_that_give_nan_are_refused(engine, tmp_path):
    network = ClinicalFMamba(ModelConfig(channels=(4, 4, 8), mamba_layers=1))
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    path = pretrained.save_weights(network, tmp_path / "nan.safetensors", {})
    with pytest.raises(WeightsError, match="damaged"):
        fuse(engine, ct(), blob(), model=str(path))


# ---------------------------------------------------------------------------------------------------- grids


def test_other_grid_is_refused_with_its_difference(engine, weights):
    with pytest.raises(InputError, match=r"size 20x24x6 against 20x24x8 voxels.*--resample"):
        fuse(engine, ct(), blob((8, 24, 20)), model=weights["ct"])


def test_other_grid_is_resampled_onto_a(engine, weights):
    a = ct((6, 24, 20))
    b = blob((6, 24, 20))
    fine = Volume(np.repeat(b.array, 2, axis=2), (0.5, 1.0, 1.0), (-0.25, 0.0, 0.0), name="fine", modality="MR")
    result = fuse(engine, a, fine, model=weights["ct"], resample=True)
    same = fuse(engine, a, b, model=weights["ct"])
    # Between two equal columns of the finer grid lies the column of the coarser one.
    np.testing.assert_allclose(result.b01[..., 1:-1], same.b01[..., 1:-1], atol=0.02)
    assert result.volume.spacing == a.spacing
    assert result.provenance["resampled"]
    assert "spacing 1x1x1 against 0.5x1x1 mm" in result.provenance["grid_difference"]
    assert any("interpolated onto" in w for w in result.warnings)
    assert [s["step"] for s in result.provenance["steps"]].count("resampling B onto A") == 1


@pytest.mark.parametrize("resample", [True, False])
def test_grids_without_overlap_are_always_refused(engine, weights, resample):
    with pytest.raises(InputError, match="do not overlap"):
        fuse(engine, ct(), blob(origin=(500.0, 0.0, 0.0)), model=weights["ct"], resample=resample)


def test_image_and_volume_of_other_size_are_refused(engine, weights):
    with pytest.raises(InputError, match="an image has no place in space"):
        fuse(engine, picture(), blob(), model=weights["ct"], resample=True)


# ------------------------------------------------------------------------------------------------- warnings


def test_nan_and_inf_are_background_and_warned_of(engine, weights):
    b = blob()
    b = replace(b, array=b.array.astype(np.float32))
    clean = fuse(engine, ct(), b, model=weights["ct"], window_b="0,700")
    dirty = b.array.copy()
    dirty[0, 0, :3] = np.nan, np.inf, -np.inf  # in the background
    result = fuse(engine, ct(), replace(b, array=dirty), model=weights["ct"], window_b="0,700")
    assert "3 of 2880 voxels are NaN or Inf" in result.warnings[0]
    assert result.provenance["inputs"]["b"]["nonfinite_voxels"] == 3
    np.testing.assert_array_equal(result.fused, clean.fused)


def test_constant_volume_is_refused(engine, weights):
    with pytest.raises(InputError, match="constant volume"):
        fuse(engine, ct(), replace(blob(), array=np.full((6, 24, 20), 7, np.int16)), model=weights["ct"])


@pytest.mark.parametrize(
    ("a", "b", "options", "warning"),
    [
        (blob(), blob(), {}, "both inputs are the same"),
        (ct(), blob(), {"window_b": "5000,6000"}, "is one grey in its window"),
        (ct(), replace(blob(), notes=("a slice may be missing",)), {}, "a slice may be missing"),
    ],
)
def test_warnings(engine, weights, a, b, options, warning):
    model = weights["mr"] if a.modality == b.modality else weights["ct"]
    result = fuse(engine, a, b, model=model, **options)
    assert [warning in w for w in result.warnings] == [True]
    assert result.provenance["warnings"] == list(result.warnings)


def test_shifted_pair_is_warned_of(engine, weights):
    shape = (40, 48, 44)
    a = blob(shape)
    b = replace(a, array=np.roll((900 - a.array) * (a.array > 0), 4, axis=2).astype(np.int16), name="b")
    result = fuse(engine, a, b, model=weights["mr"], check_registration=True)
    assert any("looks shifted" in w and "along x" in w for w in result.warnings)
    assert abs(result.provenance["registration_check"]["shift_mm"][0]) == 4


# ------------------------------------------------------------------------------- device, memory, cancelling


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: fusing on CUDA is NOT TESTED")
@pytest.mark.parametrize("model", ["mri-ct-2d", "mri-mri-2d", "mri-mri-3d"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_gives_what_the_cpu_gives(engine, model, precision):
    a, b = blob((24, 72, 64)), (ct if "ct" in model else blob)((24, 72, 64), 3)
    expected = fuse(engine, a, b, model=model).volume.array
    result = fuse(FusionEngine("cuda"), a, b, model=model, precision=precision).volume.array
    # thousandths; on an H200 1 in float32 and 7 in bfloat16 were seen
    assert np.abs(result.astype(float) - expected).max() <= (3 if precision == "float32" else 20)


@pytest.mark.parametrize(
    ("choice", "cuda", "expected", "words"),
    [
        ("auto", False, "cpu", "no CUDA GPU found"),
        ("cpu", True, "cpu", "asked for"),
        ("cuda", False, DeviceError, "no CUDA GPU was found"),
        ("mps", False, DeviceError, "Apple GPU"),
        ("auto", True, "cuda", "some GPU"),
        ("tpu", False, DeviceError, "unknown"),
    ],
)
def test_choice_of_the_device(monkeypatch, choice, cuda, expected, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if expected is DeviceError:
        with pytest.raises(DeviceError, match=words):
            choose_device(choice)
    else:
        device, reason = choose_device(choice)
        assert device.type == expected
        assert words in reason


@pytest.mark.parametrize("choice", ["cpu", "auto"])
def test_the_cpu_without_numba_says_what_is_missing(monkeypatch, choice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for hidden in (False, True):
        if hidden:
            monkeypatch.setitem(sys.modules, "numba", None)
        elif importlib.util.find_spec("numba") is None:
            continue
        assert ("numba is not installed" in choose_device(choice)[1]) == hidden


@pytest.mark.parametrize("model", ["ct", "mr"])
def test_too_little_memory_is_said_before_computing(engine, weights, model):
    with pytest.raises(InputError, match=r"needs about .* GiB.*--max-memory"):
        fuse(engine, ct() if model == "ct" else blob(seed=1), blob(), model=weights[model], max_memory_gib=1e-6)


def test_memory_bound_limits_the_batch(engine, weights, monkeypatch):
    sizes = []
    original = engine_module._forward
    monkeypatch.setattr(engine_module, "_forward", lambda m, x, y, t: sizes.append(len(x)) or original(m, x, y, t))
    config = ModelConfig(channels=(4, 4, 8), mamba_layers=1)
    two = memory_needed(config, (24, 20), 2.5) / 2**30
    fuse(engine, ct(), blob(), model=weights["ct"], max_memory_gib=two)
    assert max(sizes) == 2


def test_memory_bound_makes_the_tiles_smaller_and_changes_nothing(weights, monkeypatch):
    monkeypatch.setattr(plan_module, "TILE_BYTES", 2**16)
    monkeypatch.setattr(plan_module, "MIN_TILE_BYTES", 2**10)
    engine = FusionEngine("cpu")
    a, b = blob((24, 40, 32)), blob((24, 40, 32), seed=1)
    free = fuse(engine, a, b, model=weights["mr"])
    (model,) = engine._loaded.values()
    usual = model.network.tile_bytes
    least = memory_needed(model.config, a.shape, 1, usual // 16) / 2**30
    bounded = fuse(engine, a, b, model=weights["mr"], max_memory_gib=least)
    assert model.network.tile_bytes <= usual // 16
    np.testing.assert_allclose(bounded.fused, free.fused, atol=1e-5)
    fuse(engine, a, b, model=weights["mr"])
    assert model.network.tile_bytes == usual


def test_progress_and_cancelling_after_each_tile_of_a_volume(engine, weights, monkeypatch):
    monkeypatch.setattr(plan_module, "TILE_BYTES", 20_000)
    seen, asked = [], []
    options = FusionOptions(model=weights["mr"], check_registration=False)
    pair = blob((24, 40, 32)), blob((24, 40, 32), seed=1)
    engine.fuse(*pair, options, lambda stage, x: seen.append(x) if stage == "fusing" else None)
    assert len(seen) > 20 and seen == sorted(seen)
    with pytest.raises(Cancelled):
        engine.fuse(*pair, options, None, lambda: asked.append(1) or len(asked) > 12)
    assert len(asked) == 13


def test_failed_allocation_becomes_one_line(engine, weights, monkeypatch):
    def fail(model, x, y, tick):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(engine_module, "_forward", fail)
    with pytest.raises(InputError, match="needs about"):
        fuse(engine, ct(), blob(), model=weights["ct"])


def test_other_failures_are_not_disguised(engine, weights, monkeypatch):
    def fail(model, x, y, tick):
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine_module, "_forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        fuse(engine, ct(), blob(), model=weights["ct"])


def test_full_gpu_falls_back_to_the_cpu(engine, weights, monkeypatch):
    original, calls = engine_module._forward, []

    def full_at_first(model, x, y, tick):
        calls.append(model.device.type)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(model, x, y, tick)

    monkeypatch.setattr(engine_module, "_forward", full_at_first)
    result = fuse(engine, ct(), blob(), model=weights["ct"])
    assert "ran out of memory: the pair was fused on the CPU" in result.warnings[0]
    assert result.provenance["device"]["name"] == "cpu"
    assert calls[-1] == "cpu"


def test_progress_grows_to_one(engine, weights):
    seen = []
    engine.fuse(ct(), blob(), FusionOptions(model=weights["ct"]), lambda stage, x: seen.append((stage, x)))
    fractions = [x for _, x in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert seen[-1] == ("done", 1.0)
    assert "fusing" in [stage for stage, _ in seen]


@pytest.mark.parametrize("after", [0, 3, 7])
def test_cancelling_between_batches(engine, weights, monkeypatch, after):
    monkeypatch.setattr(engine_module, "_CPU_BATCH_PIXELS", 1)
    asked = []
    with pytest.raises(Cancelled):
        engine.fuse(
            ct(),
            blob(),
            FusionOptions(model=weights["ct"]),
            cancelled=lambda: asked.append(1) or len(asked) > after,
        )
    assert len(asked) == after + 1


# ----------------------------------------------------------------------------------------------- provenance


def test_provenance_is_complete_json(engine, weights):
    options = FusionOptions(model=weights["ct"], window_a="brain")
    p = engine.fuse(ct(), blob(), options).provenance
    assert json.loads(json.dumps(p)) == p
    assert p["notice"] == NOTICE
    assert p["date_utc"] == "2025-01-02T03:04:05+00:00"
    assert p["model"]["sha256"] == pretrained.sha256(weights["ct"])
    assert p["model"]["config"]["channels"] == [4, 4, 8]
    assert p["inputs"]["a"]["window"]["low"] == 0.0
    assert p["inputs"]["a"]["window"]["high"] == 80.0
    assert "brain" in p["inputs"]["a"]["window"]["origin"]
    assert p["inputs"]["a"]["size_xyz"] == [20, 24, 6]
    assert p["settings"]["window_a"] == "brain"
    assert p["scan_backend"] in ("numba", "chunked", "mamba-ssm")
    assert p["precision"] == "float32"
    assert [step["step"] for step in p["steps"]] == [
        "checking the inputs",
        "loading the model",
        "applying the windows",
        "checking the registration",
        "fusing",
        "making the output",
    ]
    assert all(step["seconds"] >= 0 for step in p["steps"])


def test_bfloat16_is_near_and_said(engine, weights):
    exact, fast = (
        fuse(engine, blob(seed=1), blob(), model=weights["mr"], precision=name) for name in ("float32", "bfloat16")
    )
    assert fast.provenance["precision"] == "bfloat16" and exact.provenance["precision"] == "float32"
    assert 0 < np.abs(fast.fused - exact.fused).max() < 1e-2


def test_no_bfloat16_is_a_warning(engine, weights, monkeypatch):
    monkeypatch.setattr(engine_module, "has_bfloat16", lambda device: False)
    result = fuse(engine, blob(seed=1), blob(), model=weights["mr"], precision="bfloat16")
    assert result.provenance["precision"] == "float32"
    assert "no bfloat16 arithmetic" in result.warnings[0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("device", "tpu", "auto, cpu, cuda, mps"),
        ("plane", "diagonal", "axial, coronal, sagittal"),
        ("modality_a", "US", "CT, MR"),
        ("precision", "float8", "float32, bfloat16"),
        ("max_memory_gib", 0, "positive"),
        ("max_memory_gib", float("nan"), "positive"),
    ],
)
def test_options_are_checked(field, value, words):
    with pytest.raises(InputError, match=words):
        FusionOptions(**{field: value})


def test_options_accept_mri():
    assert FusionOptions(modality_a="mri").modality_a == "MR"
