"""Modality guesses and intensity windows."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.inference.intensity import (
    CT_AUTO_HU,
    CT_WINDOWS,
    Window,
    apply_window,
    choose_window,
    count_nonfinite,
    guess_modality,
)
from ClinicalFMambaLib.volumes import Volume, read_volume


def head_ct(shape=(24, 48, 48), seed=0):
    """HU: air, skull of 300 to 1700, brain of 25 to 40, ventricles of 8."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 2, shape)
    hu = np.where(r < 0.9, rng.uniform(300, 1700, shape), -1000.0)
    hu[r < 0.8] = 32
    hu[r < 0.2] = 8
    return (hu + np.where(hu > -900, noise, 0)).astype(np.float32)


def head_mr(shape=(24, 48, 48), seed=0):
    """Rayleigh noise of about 10 around a head of 300 to 900 and a few bright vessels."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    mr = rng.rayleigh(8, shape)
    mr[r < 0.8] += 300 + 600 * rng.random((r < 0.8).sum())
    mr[12, 24, :4] = 20000
    return mr.astype(np.float32)


def cormack(hu):
    stored = np.maximum(hu, -1000) + 1000
    return stored + 10 * np.clip(stored - 900, 0, 200)


# modality


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/ct.nii.gz", "CT"),
        ("/data/case_CT.nrrd", "CT"),
        ("/data/CTA_head.nrrd", "CT"),
        ("/data/sub-01_T1w.nii.gz", "MR"),
        ("/data/t1ce.nii.gz", "MR"),
        ("/data/Brats_flair.nii.gz", "MR"),
        ("/data/SPECT/20013.png", "SPECT"),
        ("/data/CT-MRI/CT/20013.png", "CT"),
        ("/data/CT-MRI/MRI/20013.png", "MR"),
        ("/data/spect.nii.gz", "SPECT"),
        ("/data/FDG_PET.nii", "PET"),
        ("/data/ct_to_t1.nii.gz", "CT"),
        ("/data/spect-on-mri.nrrd", "SPECT"),
        ("/data/ct2.nrrd", "CT"),
        # no modality in these
        ("/data/doctor/section.nrrd", "MR"),
        ("/data/petersen/inspect.nrrd", "MR"),
        ("/data/carpet/actor.nrrd", "MR"),
        ("/data/ct_pet.nrrd", "MR"),
        ("/spect/case/1.nrrd", "MR"),
    ],
)
def test_modality_from_name(path, expected):
    name = path.rsplit("/", 1)[-1].split(".")[0]
    assert guess_modality(Volume(np.zeros((2, 2, 2), np.int16), name=name, path=path)) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("MRHead", "MR"), ("CTChest", "CT"), ("CTACardio", "CT"), ("Node", "MR")]
)
def test_modality_from_node_name(name, expected):
    assert guess_modality(Volume(np.zeros((2, 2, 2), np.int16), name=name)) == expected


def test_modality_order_header_name_values():
    ct = head_ct()
    assert guess_modality(Volume(ct)) == "CT"
    assert guess_modality(Volume(ct, name="t1")) == "MR"
    assert guess_modality(Volume(ct, name="t1", modality="CT")) == "CT"
    assert guess_modality(Volume(np.zeros((2, 4, 4, 3), np.uint8))) == "SPECT"
    assert guess_modality(Volume(head_mr())) == "MR"
    spike = head_mr()
    spike[0, 0, 0] = -700
    assert guess_modality(Volume(spike)) == "MR", "single dark voxels make no CT"


# CT


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("HU", lambda hu: hu),
        ("HU int16", lambda hu: np.rint(hu).astype(np.int16)),
        ("offset 1024", lambda hu: np.rint(hu + 1024).astype(np.uint16)),
        ("offset 1000", lambda hu: hu + 1000),
        ("Cormack", cormack),
        ("clipped at 0", lambda hu: np.maximum(hu, 0)),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "brain"])
def test_ct_windows_agree_on_every_scale(name, store, choice):
    hu = head_ct()
    low, high = CT_AUTO_HU if choice == "auto" else CT_WINDOWS[choice]
    expected = np.clip((hu - low) / (high - low), 0, 1)
    stored = store(hu)
    volume = Volume(stored, modality="CT")
    result = apply_window(stored, choose_window(volume, choice))
    visible = hu > 0 if name == "clipped at 0" else np.ones_like(hu, bool)
    np.testing.assert_allclose(result[visible], expected[visible], atol=0.01)


def test_ct_auto_resembles_the_training_pictures():
    hu = head_ct()
    shown = apply_window(hu, choose_window(Volume(hu, modality="CT")))
    assert shown[hu > 200].min() == 1.0, "bone is white"
    assert shown[hu < -500].max() == 0.0, "air is black"
    brain = shown[(hu > 20) & (hu < 45)]
    assert 0.35 < np.median(brain) < 0.55, "brain is mid grey"
    assert shown[(hu > 0) & (hu < 14)].mean() < np.median(brain) - 0.15, "ventricles are darker"


@pytest.mark.parametrize("choice", list(CT_WINDOWS))
def test_presets_state_hu(choice):
    window = choose_window(Volume(head_ct(), modality="CT"), choice)
    assert (window.low, window.high, window.unit) == (*CT_WINDOWS[choice], "HU") and choice in window.origin


def test_ct_without_known_scale_falls_back():
    unit = (head_ct() + 1000) / 2100
    window = choose_window(Volume(unit, modality="CT"))
    assert window.unit == "stored values" and 0 <= window.low < 0.1 and 1.0 < window.high < 1.3
    with pytest.raises(InputError, match="not in HU"):
        choose_window(Volume(unit, modality="CT"), "brain")


# MR, SPECT, 8 bit


def test_mr_background_black_and_outliers_clipped():
    mr = head_mr()
    window = choose_window(Volume(mr, modality="MR"))
    shown = apply_window(mr, window)
    assert np.median(shown[mr < 50]) < 0.01, "noise is black"
    assert 850 < window.high < 1000, "vessels do not set the scale"
    assert np.percentile(shown[mr > 250], 1) > 0.2, "the head is not"


def test_skull_stripped_mr_starts_at_zero():
    mr = head_mr()
    mr[mr < 100] = 0
    assert choose_window(Volume(mr)).low == 0


def test_crop_without_air_keeps_its_dark_tissue():
    rng = np.random.default_rng(0)
    crop = np.where(rng.random((16, 16, 16)) < 0.5, 300.0, 600.0) + rng.normal(0, 60, (16, 16, 16))
    shown = apply_window(crop, choose_window(Volume(crop)))
    assert (shown == 0).mean() < 0.01


@pytest.mark.parametrize("modality", ["SPECT", "PET"])
def test_counts(modality):
    counts = np.random.default_rng(0).poisson(50, (20, 32, 32)).astype(np.uint16)
    counts[:, :8] = 0
    window = choose_window(Volume(counts, modality=modality))
    assert window.low == 0 and window.high == np.percentile(counts, 99.9)
    haze = np.full((20, 32, 32), 3.0)
    haze[5:15, 8:24, 8:24] = 100 + np.random.default_rng(0).random((10, 16, 16))
    assert choose_window(Volume(haze, modality=modality)).low == 3, "no veil around the head"


@pytest.mark.parametrize(
    "volume",
    [
        Volume(np.arange(32, dtype=np.uint8).reshape(1, 4, 8), is_image=True),
        Volume(np.arange(32, dtype=np.uint8).reshape(1, 4, 8), is_image=True, modality="CT"),
        Volume(np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3), is_image=True),
        Volume((np.arange(64) * 3).astype(np.uint8).reshape(4, 4, 4)),
    ],
)
def test_8_bit_is_taken_as_it_is(volume):
    window = choose_window(volume)
    assert (window.low, window.high, window.unit) == (0, 255, "8-bit")


def test_8_bit_volume_in_a_corner_of_its_range_is_stretched():
    assert choose_window(Volume(np.random.default_rng(0).integers(0, 40, (8, 8, 8)).astype(np.uint8))).high < 41


# choices


@pytest.mark.parametrize("choice", ["10,50", " 10 , 50 ", (10, 50), [10.0, 50.0], Window(10, 50)])
def test_given_window(choice):
    window = choose_window(Volume(head_ct(), modality="CT"), choice)
    assert (window.low, window.high, window.unit, window.origin) == (10.0, 50.0, "HU", "given")
    assert choose_window(Volume(head_mr(), modality="MR"), choice).unit == "stored values"


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ("50,10", "LO below HI"),
        ("10,10", "LO below HI"),
        ("nan,10", "finite"),
        ("0,inf", "finite"),
        ("a,b", "two numbers"),
        ("1,2,3", "two numbers"),
        ((1,), "two numbers"),
        (None, "two numbers"),
        ("lung", "brain"),
        ("", "unknown"),
    ],
)
def test_bad_choice(choice, word):
    with pytest.raises(InputError, match=word) as error:
        choose_window(Volume(head_ct(), modality="CT"), choice)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("volume", "word"),
    [
        (Volume(head_mr(), modality="MR", name="mr"), "mr is MR"),
        (Volume(np.arange(64, dtype=np.uint8).reshape(1, 8, 8), modality="CT", name="c", is_image=True), "c is 8-bit"),
    ],
)
def test_ct_preset_for_something_else(volume, word):
    with pytest.raises(InputError, match=word):
        choose_window(volume, "bone")


@pytest.mark.parametrize("choice", ["auto", "0,80"])
@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.full((4, 4, 4), 7, np.int16), "constant"),
        (np.zeros((1, 8, 8), np.uint8), "constant"),
        (np.full((4, 4, 4), np.nan), "NaN"),
        (np.where(np.eye(4)[None] > 0, 5.0, np.inf), "constant"),
    ],
)
def test_nothing_to_show(array, word, choice):
    with pytest.raises(InputError, match=word) as error:
        choose_window(Volume(array, name="badscan"), choice)
    assert "badscan" in str(error.value)


def test_one_odd_voxel_in_a_large_volume_is_found():
    array = np.zeros((64, 256, 256), np.float32)
    array[10, 20, 31] = 5
    window = choose_window(Volume(array))
    assert (window.low, window.high) == (0, 5)


# applying


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_apply_window(dtype):
    array = np.array([[[0, 10, 20, 30, 40]]], dtype)
    before = array.copy()
    result = apply_window(array, Window(10, 30))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 0], [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(array, before)


def test_nonfinite_is_background_and_counted():
    array = np.array([[[np.nan, np.inf, -np.inf, 5.0]]])
    np.testing.assert_array_equal(apply_window(array, Window(0, 10))[0, 0], [0, 0, 0, 0.5])
    assert count_nonfinite(array) == 3
    assert count_nonfinite(np.zeros((2, 2), np.int16)) == 0
    mr = head_mr()
    clean = choose_window(Volume(mr))
    mr[0, 0, ::7] = np.nan
    dirty = choose_window(Volume(mr))
    assert dirty.high == pytest.approx(clean.high, rel=0.01)


def test_clinical_size_is_fast_and_deterministic():
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(-1000, 2000, (160, 512, 512), dtype=np.int16), modality="MR")
    start = time.perf_counter()
    window = choose_window(volume)
    apply_window(volume.array, window)
    # 0.2 s on two idle cores; the bound leaves room for a loaded machine.
    assert time.perf_counter() - start < 3
    assert choose_window(volume) == window


def test_import_needs_no_torch():
    code = "import sys, ClinicalFMambaLib.inference.intensity, ClinicalFMambaLib.volumes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# real data


def test_real_ct_template_is_recognised(shared_data):
    ct = read_volume(shared_data / "volumes/mni/ct.nii.gz")
    window = choose_window(ct)
    assert "Cormack" in window.origin
    shown = apply_window(ct.array, window)[45]
    assert 0.35 < np.median(shown[(shown > 0.05) & (shown < 0.95)]) < 0.65
    assert (shown == 1).mean() > 0.05 and (shown == 0).mean() > 0.2


@pytest.mark.parametrize(
    "name",
    ["mni/t1", "mni/t2", "mni/pet", "mni/spect", "brainix/t2", "brainix/flair", "kirby21/t1", "kirby21/flair"],
)
def test_real_windows_leave_background_black(shared_data, name):
    volume = read_volume(shared_data / f"volumes/{name}.nii.gz")
    assert guess_modality(volume) == {"pet": "PET", "spect": "SPECT"}.get(name.split("/")[1], "MR")
    shown = apply_window(volume.array, choose_window(volume))
    assert np.percentile(shown, 10) < 0.01
    assert 0.0001 < (shown == 1).mean() < 0.01
