"""Reading, writing and comparing volumes."""

from __future__ import annotations

import gzip
import itertools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import SimpleITK as sitk

from ClinicalFMambaLib.errors import InputError, OutputError
from ClinicalFMambaLib.volumes import (
    Volume,
    check_registration,
    compare_grids,
    overlap_fraction,
    read_volume,
    resample_onto,
    write_volume,
)


def rotation_z(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0)


OBLIQUE = rotation_z(30)


def ramp(shape=(6, 8, 10), dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def smooth_head(shape=(40, 60, 50), spacing=(1.0, 1.0, 1.0)):
    """An ellipsoid with inner structure, in [0, 1]; and a second contrast of the same."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    structure = 0.5 + 0.3 * np.sin(6 * x + 2 * y) * np.cos(5 * y) * np.cos(4 * z)
    first = np.where(r < 0.8, structure, np.where(r < 0.9, 1.0, 0.0)).astype(np.float32)
    second = np.where(r < 0.8, (1 - structure) ** 2, np.where(r < 0.9, 0.05, 0.0)).astype(np.float32)
    return first, second


def assert_one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and "0x" not in text
    for word in words:
        assert word in text, f"{word!r} not in {text!r}"


def nifti_file(path, array=None):
    sitk.WriteImage(sitk.GetImageFromArray(ramp((12, 40, 40)) if array is None else array), str(path))
    return path


def dicom_series(folder, slices=5, modality="CT", uid="1.2.3.4", z=None, description="axial"):
    """A CT series with a rescale intercept of -1024, slices 3 mm apart, on an oblique grid."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    hounsfield = ramp((slices, 12, 10), np.int16) - 1024
    for k in range(slices):
        image = sitk.GetImageFromArray(hounsfield[k] if modality == "CT" else (hounsfield[k] + 1024).astype(np.uint16))
        image.SetSpacing((0.5, 0.7))
        position = z[k] if z else 3.0 * k
        tags = {
            "0008|0060": modality,
            "0008|103e": description,
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{k + 1}",
            "0020|0013": str(k),
            "0020|0032": f"1\\2\\{position}",
            "0020|0037": "\\".join(f"{v:.9f}" for v in (OBLIQUE[0], OBLIQUE[3], 0, OBLIQUE[1], OBLIQUE[4], 0)),
        }
        if modality == "CT":  # GDCM stores HU + 1024 then
            tags |= {"0028|1052": "-1024", "0028|1053": "1"}
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}_{k}.dcm"))
        writer.Execute(image)
    return hounsfield


# reading


@pytest.mark.parametrize("suffix", [".nrrd", ".nii", ".nii.gz", ".mha", ".mhd", ".NRRD"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_read_returns_voxels_and_geometry(tmp_path, suffix, dtype):
    array = ramp(dtype=dtype)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((-10.0, 20.0, 5.5))
    image.SetDirection(OBLIQUE)
    path = tmp_path / f"head{suffix}"
    sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.spacing, (0.5, 0.75, 3.0), rtol=1e-6)
    np.testing.assert_allclose(volume.origin, (-10.0, 20.0, 5.5), atol=1e-5)
    np.testing.assert_allclose(volume.direction, OBLIQUE, atol=1e-6)
    assert (volume.name, volume.modality, volume.is_image, volume.notes) == ("head", "", False, ())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_read_image_is_one_slice_without_place(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.full((7, 9), 100, np.uint8))
    image.SetSpacing((0.3, 0.3))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    volume = read_volume(tmp_path / f"a{suffix}", modality="mri")
    assert volume.shape == (1, 7, 9) and volume.is_image
    assert volume.spacing == (1.0, 1.0, 1.0) and volume.modality == "MR"
    assert volume.array[0, 3, 3] == 100


def test_read_16_bit_png(tmp_path):
    array = ramp((7, 9), np.uint16) * 300
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.png"))
    volume = read_volume(tmp_path / "a.png")
    assert volume.array.dtype == np.uint16
    np.testing.assert_array_equal(volume.array[0], array)


def colour_cases():
    rgb = ramp((5, 6, 3), np.uint8)
    grey = np.repeat(ramp((5, 6, 1), np.uint8), 3, axis=2)
    alpha = np.full((5, 6, 1), 7, np.uint8)
    wide = rgb.astype(np.uint16) * 257
    return {
        "rgb": (rgb, rgb[None]),
        "rgba": (np.concatenate([rgb, alpha], 2), rgb[None]),
        "equal channels are grey": (grey, grey[None, ..., 0]),
        "equal channels with alpha": (np.concatenate([grey, alpha], 2), grey[None, ..., 0]),
        "16-bit rgb": (wide, rgb[None]),
    }


@pytest.mark.parametrize("case", colour_cases())
def test_read_colour_png(tmp_path, case):
    stored, expected = colour_cases()[case]
    sitk.WriteImage(sitk.GetImageFromArray(stored, isVector=True), str(tmp_path / "a.png"))
    volume = read_volume(tmp_path / "a.png")
    np.testing.assert_array_equal(volume.array, expected)
    assert volume.is_colour == (expected.ndim == 4)
    assert bool(volume.notes) == (stored.dtype == np.uint16)


def test_fourth_axis_of_one_frame_is_dropped(tmp_path):
    array = ramp((1, 6, 8, 10))
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, array[0])


def test_2d_nrrd_keeps_its_spacing(tmp_path):
    image = sitk.GetImageFromArray(ramp((8, 10)))
    image.SetSpacing((0.4, 0.6))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.shape == (1, 8, 10) and volume.spacing == (0.4, 0.6, 1.0) and not volume.is_image


def test_read_dicom_folder(tmp_path):
    hounsfield = dicom_series(tmp_path / "series")
    stored = sitk.ReadImage(next(map(str, (tmp_path / "series").iterdir())))
    assert float(stored.GetMetaData("0028|1052")) == -1024
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.array, hounsfield)
    assert (volume.modality, volume.name, volume.notes) == ("CT", "series", ())
    np.testing.assert_allclose(volume.spacing, (0.5, 0.7, 3.0), atol=1e-6)
    np.testing.assert_allclose(volume.origin, (1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(volume.direction, OBLIQUE, atol=1e-6)


@pytest.mark.parametrize(("tag", "modality"), [("NM", "SPECT"), ("PT", "PET"), ("MR", "MR"), ("OT", "")])
def test_dicom_modality(tmp_path, tag, modality):
    dicom_series(tmp_path, modality=tag)
    assert read_volume(tmp_path).modality == modality
    assert read_volume(tmp_path, "CT").modality == "CT"


def test_missing_dicom_slice_is_noted(tmp_path):
    dicom_series(tmp_path, z=[0, 3, 6, 12, 15])
    (note,) = read_volume(tmp_path).notes
    assert "3.00 to 6.00 mm" in note


def bad_files(tmp):
    """name -> (path, words that the message must hold)"""
    cases = {}

    def add(name, filename, words, content=None, array=None, is_vector=False):
        path = tmp / filename
        if content is not None:
            path.write_bytes(content)
        elif array is not None:
            sitk.WriteImage(sitk.GetImageFromArray(array, isVector=is_vector), str(path))
        cases[name] = (path, words)
        return path

    text = b"hello, this is no volume\n" * 40
    add("missing", "nowhere.nrrd", ["no such file"])
    for suffix in ("nrrd", "nii", "mha", "png", "tif", "jpg"):
        add(f"text as {suffix}", f"text.{suffix}", ["cannot be read", "text." + suffix], content=text)
    add("text as nii.gz", "text.nii.gz", ["cannot be read"], content=gzip.compress(text))
    add("empty", "empty.nrrd", ["empty"], content=b"")
    add("unknown extension", "a.docx", ["unknown extension", ".docx", "nrrd"], content=text)
    add("no extension", "a", ["unknown extension"], content=text)
    add("4D", "four.nii.gz", ["4D", "5 frames", "one 3D volume"], array=ramp((5, 4, 6, 7)))
    add("two channels", "two.nrrd", ["2 uint8 values"], array=ramp((4, 6, 7, 2), np.uint8), is_vector=True)
    add("float vectors", "field.nrrd", ["3 float32 values"], array=ramp((4, 6, 7, 3), np.float32), is_vector=True)
    add("grey with alpha", "la.png", ["without alpha"], array=ramp((6, 7, 2), np.uint8), is_vector=True)
    add("complex", "k.nrrd", ["complex"], array=ramp((4, 6, 7)).astype(np.complex64))
    for suffix, keep in itertools.product(("nii", "nii.gz", "nrrd", "mha"), (0.5, 0.98)):
        whole = nifti_file(tmp / f"whole.{suffix}").read_bytes()
        name = f"cut{int(100 * keep)}.{suffix}"
        add(f"truncated {suffix} {keep}", name, [name], content=whole[: int(len(whole) * keep)])
    whole = (tmp / "whole.nii.gz").read_bytes()
    add("gzip without its last bytes", "tail.nii.gz", ["truncated"], content=whole[:-4])
    add("gzip with a wrong byte", "flip.nii.gz", ["damaged"], content=whole[:-20] + bytes(8) + whole[-12:])
    sitk.WriteImage(sitk.GetImageFromArray(ramp((40, 40), np.uint8)), str(tmp / "whole.jpg"))
    add("truncated jpg", "cut.jpg", ["truncated"], content=(tmp / "whole.jpg").read_bytes()[:-300])
    nifti_file(tmp / "lost.mhd")
    (tmp / "lost.raw").unlink()
    add("mhd without its raw", "lost.mhd", ["cannot be read"])
    (tmp / "folder" / "inner").mkdir(parents=True)
    (tmp / "folder" / "notes.txt").write_text("x")
    add("folder without DICOM", "folder", ["without DICOM", "inner"])
    dicom_series(tmp / "several", uid="1.2.3.4", description="axial")
    dicom_series(tmp / "several", uid="1.2.3.5", slices=3, modality="MR", description="scout")
    add("several series", "several", ["2 DICOM series", "CT axial", "MR scout", "5 images", "3 images"])
    return cases


def test_bad_input_gives_one_line(tmp_path, capfd):
    wrong = []
    for name, (path, words) in bad_files(tmp_path).items():
        try:
            read_volume(path)
        except InputError as error:
            text = str(error)
            if "\n" in text or "0x" in text or not all(word in text for word in (*words, str(path))):
                wrong.append(f"{name}: {text}")
        else:
            wrong.append(f"{name}: was read")
    assert not wrong, "\n".join(wrong)
    assert capfd.readouterr().err == "", "a C++ reader wrote to stderr"


def test_unknown_modality_is_refused(tmp_path):
    with pytest.raises(InputError, match="xray"):
        read_volume(nifti_file(tmp_path / "a.nii"), modality="xray")


def test_volume_refuses_other_shapes():
    for shape in ((4, 4), (2, 4, 4, 4), (0, 4, 4)):
        with pytest.raises(InputError, match="needs an array"):
            Volume(np.zeros(shape))


# writing


@pytest.mark.parametrize("suffix", [".nrrd", ".nii", ".nii.gz", ".mha"])
@pytest.mark.parametrize("shape", [(6, 8, 10), (1, 8, 10), (6, 8, 10, 3)])
def test_write_then_read_is_the_same(tmp_path, suffix, shape):
    colour = len(shape) == 4
    array = ramp(shape, np.uint8 if colour else np.float32)
    volume = Volume(array, (0.5, 0.75, 3.0), (-10.0, 20.0, 5.5), OBLIQUE)
    path = tmp_path / f"out{suffix}"
    write_volume(volume, path, {"model": "mri-ct-2d"})
    again = read_volume(path)
    np.testing.assert_array_equal(again.array, array)
    assert compare_grids(volume, again) == ""
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_write_is_deterministic(tmp_path):
    volume = Volume(ramp(dtype=np.float32))
    for name in ("a.nrrd", "b.nrrd", "a.nii.gz", "b.nii.gz"):
        write_volume(volume, tmp_path / name, {"model": "x"})
    assert (tmp_path / "a.nrrd").read_bytes() == (tmp_path / "b.nrrd").read_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == gzip.decompress(
        (tmp_path / "b.nii.gz").read_bytes()
    )


def test_metadata_is_in_the_header(tmp_path):
    volume, metadata = Volume(ramp()), {"model": "mri-ct-2d", "notice": "research\nuse " + "x" * 100}
    for suffix in ("nrrd", "mha", "nii.gz"):
        write_volume(volume, tmp_path / f"a.{suffix}", metadata)
    for suffix in ("nrrd", "mha"):
        image = sitk.ReadImage(str(tmp_path / f"a.{suffix}"))
        assert image.GetMetaData("model") == "mri-ct-2d"
        assert image.GetMetaData("notice").startswith("research use x")
    descrip = sitk.ReadImage(str(tmp_path / "a.nii.gz")).GetMetaData("descrip")
    assert descrip.startswith("model=mri-ct-2d; notice=research use")


def test_png_keeps_pixels_and_text(tmp_path):
    from PIL import Image

    rgb = ramp((1, 8, 10, 3), np.uint8)
    write_volume(Volume(rgb, is_image=True), tmp_path / "a.png", {"model": "mri-spect-2d", "µ": "größer"})
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.text == {"model": "mri-spect-2d", "µ": "größer"}
    np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array, rgb)


@pytest.mark.parametrize(
    ("volume", "name", "word"),
    [
        (Volume(ramp()), "a.xyz", "use one of"),
        (Volume(ramp()), "a.mhd", "use one of"),
        (Volume(ramp(dtype=np.uint8)), "a.png", "holds one slice"),
        (Volume(ramp((1, 8, 10), np.float32), is_image=True), "a.png", "8 bit"),
        (Volume(ramp((1, 8, 10), np.uint16), is_image=True), "a.jpg", "8 bit"),
    ],
)
def test_write_refuses_what_the_format_cannot_hold(tmp_path, volume, name, word):
    with pytest.raises(InputError, match=word):
        write_volume(volume, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_write_into_bad_places(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.nrrd").mkdir()
    for path, word in [
        (tmp_path / "nowhere" / "a.nrrd", "does not exist"),
        (tmp_path / "file" / "a.nrrd", "does not exist"),
        (tmp_path / "taken.nrrd", "is a folder"),
    ]:
        with pytest.raises(OutputError, match=word) as error:
            write_volume(Volume(ramp()), path)
        assert_one_line(error, str(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.nrrd"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where even root cannot create a file")
def test_write_into_an_unwritable_folder():
    with pytest.raises(OutputError, match="cannot be written") as error:
        write_volume(Volume(ramp()), "/proc/self/a.nrrd")
    assert_one_line(error)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the file size with setrlimit to play a full disk")
def test_full_disk_leaves_the_old_file_alone(tmp_path):
    """Each format in one process whose files cannot grow beyond 2000 bytes."""
    code = textwrap.dedent(
        """
        import resource, signal, sys
        import numpy as np
        from ClinicalFMambaLib.errors import OutputError
        from ClinicalFMambaLib.volumes import Volume, write_volume
        noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64)).astype(np.uint8)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for suffix in ("nrrd", "nii", "nii.gz", "mha", "png", "tif", "jpg"):
            image = suffix in ("png", "tif", "jpg")
            volume = Volume(noise[:1] if image else noise, is_image=image)
            try:
                write_volume(volume, f"{sys.argv[1]}/a.{suffix}")
            except OutputError as error:
                assert len(str(error).splitlines()) == 1, error
                print(suffix)
        """
    )
    suffixes = ["nrrd", "nii", "nii.gz", "mha", "png", "tif", "jpg"]
    for suffix in suffixes:
        (tmp_path / f"a.{suffix}").write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == suffixes, done.stderr
    assert done.stderr == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"a.{s}" for s in suffixes)
    assert {p.read_text() for p in tmp_path.iterdir()} == {"old"}


# grids


def grid(shape=(20, 24, 30), **fields):
    return Volume(np.zeros(shape, np.uint8), **fields)


MIRRORED = (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (grid(), grid(), None),
        (grid(direction=OBLIQUE), grid(direction=tuple(np.float32(OBLIQUE))), None),
        (grid(), grid(origin=(0.02, 0, 0)), None),
        (grid(), grid(origin=(0.5, 0, 0)), ["origins 0.5 mm"]),
        (grid(), grid(spacing=(1.0004, 1, 1), shape=(20, 24, 600)), ["600x24x20"]),
        (grid((20, 24, 600)), grid((20, 24, 600), spacing=(1.0004, 1, 1)), ["origins 0.0 mm apart"]),
        (grid(), grid(spacing=(1.01, 1, 1)), ["spacing 1x1x1 against 1.01x1x1"]),
        (grid(), grid((20, 24, 29)), ["30x24x20 against 29x24x20"]),
        (grid(), grid(direction=OBLIQUE), ["rotated by 30.0 degrees"]),
        (
            grid(),
            grid(direction=MIRRORED, origin=(29.0, 0, 0)),
            ["x running the other way", "100 %"],
        ),
        (grid(), grid(origin=(1000, 0, 0)), ["1000.0 mm", " 0 % of the first"]),
        (grid(), grid(direction=(0, 1, 0, 1, 0, 0, 0, 0, 1)), ["axes in another order"]),
        (grid((1, 8, 8), is_image=True), grid((1, 8, 8), is_image=True), None),
        (grid((1, 8, 8), is_image=True), grid((1, 8, 9), is_image=True), ["8x8 against 9x8 pixels"]),
        (grid((1, 8, 8), is_image=True), grid(), ["no place in space"]),
    ],
)
def test_compare_grids(a, b, words):
    sentence = compare_grids(a, b)
    assert bool(sentence) == (words is not None)
    for word in words or ():
        assert word in sentence
    assert "\n" not in sentence


def test_compare_grids_says_no_more_than_what_differs():
    assert compare_grids(grid(), grid(origin=(15, 0, 0))) == (
        "origins 15.0 mm apart, 50 % of the first lies inside the second"
    )
    assert compare_grids(grid(), grid((20, 24, 15))) == (
        "size 30x24x20 against 15x24x20 voxels, 50 % of the first lies inside the second"
    )


@pytest.mark.parametrize(
    ("b", "fraction"),
    [
        (grid(), 1.0),
        (grid(spacing=(2, 2, 2), origin=(0.5, 0.5, 0.5), shape=(10, 12, 15)), 1.0),
        (grid(origin=(15, 0, 0)), 0.5),
        (grid(origin=(15, 12, 10)), 0.125),
        (grid(origin=(30, 0, 0)), 0.0),
        (grid(direction=MIRRORED, origin=(29, 0, 0)), 1.0),
        (grid(direction=MIRRORED), 1 / 30),
    ],
)
def test_overlap_fraction(b, fraction):
    assert overlap_fraction(grid(), b) == pytest.approx(fraction, abs=0.03)


def linear_field(volume):
    """2x + 3y - z + 100 of the patient position at each voxel."""
    index = np.indices(volume.shape)[::-1].reshape(3, -1)
    axes = np.reshape(volume.direction, (3, 3)) * np.asarray(volume.spacing)
    x, y, z = axes @ index + np.reshape(volume.origin, (3, 1))
    return (2 * x + 3 * y - z + 100).reshape(volume.shape).astype(np.float32)


@pytest.mark.parametrize(
    "moving",
    [
        grid((30, 40, 40), origin=(-5, -5, -5)),
        grid((10, 60, 50), spacing=(0.7, 0.6, 4.0), origin=(-3, -4, -6)),
        grid((30, 60, 60), direction=OBLIQUE, origin=(10, -25, -5)),
        grid((30, 40, 40), direction=MIRRORED, origin=(32, -5, -5)),
    ],
)
def test_resample_is_exact_for_a_linear_field(moving):
    from dataclasses import replace

    moving = replace(moving, array=linear_field(moving))
    reference = grid((8, 9, 10), origin=(4, 4, 4), direction=rotation_z(-10))
    result = resample_onto(moving, reference, background=-1)
    assert compare_grids(result, reference) == ""
    np.testing.assert_allclose(result.array, linear_field(reference), atol=1e-2)


def test_resample_background_type_and_nonfinite():
    air = Volume(np.full((4, 4, 4), -1000, np.int16), modality="CT")
    wide = grid((4, 4, 12))
    assert resample_onto(air, wide).array[0, 0].tolist() == [-1000] * 4 + [-1024] * 8
    mr = Volume(np.arange(5, 69, dtype=np.uint8).reshape(4, 4, 4))
    assert resample_onto(mr, wide).array[0, 0, -1] == 5
    assert resample_onto(mr, wide).array.dtype == np.uint8
    half = resample_onto(Volume(np.array([[[0, 3]]], np.uint8)), grid((1, 1, 2), origin=(0.5, 0, 0)))
    assert half.array[0, 0, 0] == 2, "1.5 is rounded, not cut off"
    hole = np.ones((4, 4, 4), np.float32)
    hole[1, 1, 1] = np.nan
    assert np.isfinite(resample_onto(Volume(hole), wide, background=0).array).all()


def test_resample_colour():
    rgb = ramp((4, 6, 8, 3), np.uint8)
    result = resample_onto(Volume(rgb), grid((4, 6, 10), origin=(-1, 0, 0)))
    np.testing.assert_array_equal(result.array[:, :, 1:9], rgb)
    assert not result.array[:, :, 0].any() and not result.array[:, :, 9].any()


def test_resample_images_stretches_the_same_field_of_view():
    array = np.repeat(np.repeat(ramp((1, 8, 8), np.uint8), 4, axis=1), 4, axis=2)
    small = resample_onto(Volume(array, is_image=True), Volume(np.zeros((1, 8, 8), np.uint8), is_image=True))
    np.testing.assert_array_equal(small.array, array[:, ::4, ::4])
    assert small.is_image


def test_resample_refuses():
    with pytest.raises(InputError, match="do not overlap"):
        resample_onto(grid(), grid(origin=(500, 0, 0)))
    with pytest.raises(InputError, match="image"):
        resample_onto(grid((1, 8, 8), is_image=True), grid())
    with pytest.raises(InputError, match="proportions"):
        resample_onto(grid((1, 8, 8), is_image=True), grid((1, 8, 12), is_image=True))


# registration


def test_registration_is_silent_in_place():
    first, second = smooth_head()
    check = check_registration(first, second)
    assert check.message == "" and check.shift_mm == (0.0, 0.0, 0.0) and check.gain == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_registration_finds_6_mm(axis, sign):
    first, second = smooth_head((64, 64, 64))
    spacing = (1.0, 1.5, 2.0)  # x, y, z
    voxels = round(6 / spacing[::-1][axis])
    check = check_registration(first, np.roll(second, sign * voxels, axis), spacing)
    expected = [0.0, 0.0, 0.0]
    expected[2 - axis] = sign * 6.0
    assert check.shift_mm == pytest.approx(expected)
    assert f"{sign * 6:+d} mm along {'zyx'[axis]}" in check.message


def test_registration_of_images_colour_and_constants():
    first, second = smooth_head((40, 128, 128))
    first, second = first[20], second[20]
    moved = np.roll(second, 6, axis=1)
    assert "pixels along x" in check_registration(first, moved, unit="pixels").message
    colour = np.repeat(np.roll(second, 16, axis=1)[None, ..., None], 3, axis=3)
    assert check_registration(first[None], colour).shift_mm[0] > 8
    assert check_registration(first, np.zeros_like(first)).message == ""
    with pytest.raises(InputError, match="equal shapes"):
        check_registration(first, second[1:])


def test_registration_survives_tiny_and_nonfinite():
    assert check_registration(np.eye(3)[None], np.eye(3)[None]).message == ""
    first, second = smooth_head((24, 24, 24))
    second[0, 0, 0] = np.nan
    assert check_registration(first, second).message == ""


# real data


def test_registration_on_real_pairs(shared_data):
    from ClinicalFMambaLib.inference.intensity import apply_window, choose_window

    def load(name):
        volume = read_volume(shared_data / name)
        return volume, apply_window(volume.array, choose_window(volume))

    pairs = [
        ("volumes/mni/ct.nii.gz", "volumes/mni/t2.nii.gz"),
        ("volumes/kirby21/t1.nii.gz", "volumes/kirby21/flair.nii.gz"),
    ]
    case = next((shared_data / "brats").glob("*/t1ce.nii.gz")).parent
    pairs.append((case / "t1ce.nii.gz", case / "flair.nii.gz"))
    for first, second in pairs:
        (volume, a), (_, b) = load(first), load(second)
        assert check_registration(a, b, volume.spacing).message == ""
        moved = np.roll(b, round(6 / volume.spacing[0]), axis=2)
        assert "along x" in check_registration(a, moved, volume.spacing).message


def test_registration_on_real_slices(shared_data):
    seen = missed = 0
    for path in sorted((shared_data / "aanlib/CT-MRI/CT").glob("*.png"))[::5]:
        a = read_volume(path).array / np.float32(255)
        b = read_volume(path.parent.parent / "MRI" / path.name).array / np.float32(255)
        assert check_registration(a, b).message == "", path.name
        seen += 1
        missed += check_registration(a, np.roll(b, 6, axis=1)).message == ""
    assert seen > 20 and missed / seen < 0.3


def test_real_grids(shared_data):
    ct, spect, t2 = (read_volume(shared_data / f"volumes/mni/{n}.nii.gz") for n in ("ct", "spect", "t2"))
    assert compare_grids(ct, t2) == ""
    assert "x running the other way" in compare_grids(ct, spect)
    assert overlap_fraction(ct, spect) == pytest.approx(1.0)
    placed = resample_onto(spect, ct)
    np.testing.assert_array_equal(placed.array, spect.array[:, :, ::-1])
    t2, flair = (read_volume(shared_data / f"volumes/brainix/{n}.nii.gz") for n in ("t2", "flair"))
    assert "512x512x22 against 288x288x22" in compare_grids(t2, flair)
    assert compare_grids(t2, resample_onto(flair, t2)) == ""
