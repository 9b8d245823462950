"""The command line's contract: exit status, one line on stderr, no traceback, no file left behind."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ClinicalFMambaLib import NOTICE, __version__, pretrained
from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.inference import classify
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba
from ClinicalFMambaLib.phantom import make_phantom
from ClinicalFMambaLib.volumes import Volume, read_volume, write_volume


def tiny(path, dimension=2, modalities="MR,CT"):
    torch.manual_seed(0)
    config = ModelConfig(dimension=dimension, channels=(4, 4, 8), mamba_layers=1)
    return pretrained.save_weights(ClinicalFMamba(config), path, {"modalities": modalities})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Inputs good and bad, and weights; read only."""
    folder = tmp_path_factory.mktemp("inputs")
    volumes = make_phantom(16)
    for name in ("CT", "T1", "T2"):
        write_volume(volumes[name], folder / f"{name.lower()}.nii.gz")
    t2 = volumes["T2"]

    def write(name, array, **fields):
        write_volume(
            Volume(array, **{"spacing": t2.spacing, "origin": t2.origin, "modality": "MR", **fields}), folder / name
        )

    write("one-slice.nrrd", t2.array[8:9])
    write("one-slice-ct.nrrd", volumes["CT"].array[8:9])
    write("constant_t2.nrrd", np.full_like(t2.array, 3))
    write("coarse_t2.nrrd", t2.array[::2, ::2, ::2], spacing=(28.0, 28.0, 28.0))
    write("far_t2.nrrd", t2.array, origin=(5000.0, 0.0, 0.0))
    nan = t2.array.astype(np.float32)
    nan[:2, 0, 0] = np.nan, np.inf
    write("nan_t2.nrrd", nan)
    for name in ("CT", "T2"):
        middle = volumes[name].array[8:9].astype(np.float32)
        grey = np.uint8(255 * np.clip(middle / middle.max(), 0, 1))
        write_volume(Volume(grey, is_image=True), folder / f"{name.lower()}.png")
    (folder / "text.nrrd").write_text("This is a letter, not a volume.\n")
    (folder / "truncated_t2.nii.gz").write_bytes((folder / "t2.nii.gz").read_bytes()[:-800])
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((3, 4, 5, 6), np.int16), isVector=False), str(folder / "four_d_t2.nii")
    )
    (folder / "empty-folder").mkdir()
    tiny(folder / "m2.safetensors")
    tiny(folder / "m3.safetensors", 3, "MR,MR")
    (folder / "truncated.safetensors").write_bytes((folder / "m2.safetensors").read_bytes()[:-50])
    from safetensors.torch import save_file

    save_file({"layer": torch.zeros(2)}, folder / "other.safetensors", {"config": ModelConfig().to_json()})
    return folder


@pytest.fixture
def bundle(files, tmp_path_factory, monkeypatch):
    """Two models as if bundled: 2D and 3D."""
    folder = tmp_path_factory.mktemp("bundle")
    index = {}
    for name, dimension, modalities in (("mri-ct-2d", 2, "MR,CT"), ("mri-mri-3d", 3, "MR,MR")):
        path = tiny(folder / f"{name}.safetensors", dimension, modalities)
        index[name] = {
            "file": path.name,
            "sha256": pretrained.sha256(path),
            "dimension": dimension,
            "modalities": modalities.split(","),
        }
        (folder / f"{name}.md").write_text("a card")
    (folder / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr(pretrained, "FOLDER", folder)
    monkeypatch.setattr(pretrained, "INDEX", folder / "index.json")
    monkeypatch.setattr(classify, "CLASSIFIERS", folder / "classifiers.json")
    return folder


# ------------------------------------------------------------------------------------------------ bad input

BAD_INPUT = {
    "missing file": (["ct.nii.gz", "nowhere.nii.gz"], "no such file"),
    "folder without DICOM": (["ct.nii.gz", "empty-folder"], "without DICOM"),
    "text renamed": (["text.nrrd", "t2.nii.gz"], "cannot be read as nrrd"),
    "truncated": (["ct.nii.gz", "truncated_t2.nii.gz"], "truncated"),
    "4D": (["ct.nii.gz", "four_d_t2.nii"], "4D with 3 frames"),
    "no overlap": (["ct.nii.gz", "far_t2.nrrd"], "do not overlap"),
    "no overlap, resample": (["ct.nii.gz", "far_t2.nrrd", "--resample"], "do not overlap"),
    "other grid": (["ct.nii.gz", "coarse_t2.nrrd"], "--resample"),
    "constant": (["ct.nii.gz", "constant_t2.nrrd"], "constant volume"),
    "window": (["ct.nii.gz", "t2.nii.gz", "--window-a", "80,0"], "LO below HI"),
    "window word": (["ct.nii.gz", "t2.nii.gz", "--window-b", "brain"], "'brain' is for CT"),
    "plane": (["ct.nii.gz", "t2.nii.gz", "--plane", "diagonal"], "axial, coronal, sagittal"),
    "device": (["ct.nii.gz", "t2.nii.gz", "--device", "tpu"], "auto, cpu, cuda, mps"),
    "modality": (["ct.nii.gz", "t2.nii.gz", "--modality-a", "US"], "'US' is unknown"),
    "memory": (["ct.nii.gz", "t2.nii.gz", "--max-memory", "0.0000001"], "--max-memory"),
    "memory no number": (["ct.nii.gz", "t2.nii.gz", "--max-memory", "much"], "--max-memory"),
    "unknown option": (["ct.nii.gz", "t2.nii.gz", "--colour", "red"], "--colour"),
    "one input": (["ct.nii.gz"], "'B'"),
    "unknown model": (["ct.nii.gz", "t2.nii.gz", "--model", "best"], "bundled: mri-ct-2d, mri-mri-3d"),
    "missing weights": (["ct.nii.gz", "t2.nii.gz", "--model", "no.safetensors"], "does not exist"),
    "other weights": (["ct.nii.gz", "t2.nii.gz", "--model", "other.safetensors"], "does not fit"),
    "truncated weights": (["ct.nii.gz", "t2.nii.gz", "--model", "truncated.safetensors"], "damaged"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(run, files, bundle, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(files)
    out, preview, report = tmp_path / "fused.nrrd", tmp_path / "p.png", tmp_path / "r.json"
    model = [] if "--model" in arguments else ["--model", "m2.safetensors"]
    status, stdout, stderr = run("fuse", *arguments, *model, "-o", out, "--preview", preview, "--report", report)
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


BAD_OUTPUT = {
    "unknown extension": (["-o", "{}/fused.vtk"], "cannot write .vtk"),
    "no extension": (["-o", "{}/fused"], "without extension"),
    "volume into a picture": (["-o", "{}/fused.png"], "holds one slice"),
    "missing folder": (["-o", "{}/no/fused.nrrd"], "does not exist; create it"),
    "folder": (["-o", "{}"], "cannot write"),
    "preview is no PNG": (["-o", "{}/f.nrrd", "--preview", "{}/p.jpg"], ".png"),
    "preview into a missing folder": (["-o", "{}/f.nrrd", "--preview", "{}/no/p.png"], "does not exist"),
    "report into a missing folder": (["-o", "{}/f.nrrd", "--report", "{}/no/r.json"], "does not exist"),
    "one name for two": (["-o", "{}/f.nrrd", "--report", "{}/f.nrrd"], "different names"),
    "no output": ([], "'-o'"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_OUTPUT.values(), ids=BAD_OUTPUT)
def test_bad_output_is_found_before_computing(run, files, tmp_path, monkeypatch, arguments, words):
    import ClinicalFMambaLib.inference.engine as engine

    monkeypatch.setattr(engine.FusionEngine, "fuse", lambda *a, **k: pytest.fail("computed"))
    arguments = [a.format(tmp_path) for a in arguments]
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", *arguments)
    assert status == 2
    (line,) = stderr.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(run, files, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write everywhere, but not make files in /proc
        folder = "/proc" if sys.platform == "linux" else pytest.skip("no unwritable folder for this user")
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", "-o", f"{folder}/fused.nrrd")
    assert status == 2
    (line,) = stderr.splitlines()
    assert "cannot write into" in line


def test_output_must_not_be_an_input(run, files):
    before = (files / "ct.nii.gz").read_bytes()
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", "-o", files / "ct.nii.gz")
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert "one of the inputs" in stderr
    assert (files / "ct.nii.gz").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(run, files, tmp_path):
    arguments = ["--model", files / "m2.safetensors", "--device", "cuda", "-o", tmp_path / "f.nrrd"]
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", *arguments)
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert "no CUDA GPU was found" in stderr
    assert "--device cpu" in stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_checksum(run, files, bundle, tmp_path):
    path = bundle / "mri-ct-2d.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", "-o", tmp_path / "f.nrrd")
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert "corrupt" in stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing(run, files, tmp_path, monkeypatch):
    import ClinicalFMambaLib.inference.engine as engine

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_forward", interrupted)
    arguments = ["--model", files / "m2.safetensors", "-o", tmp_path / "f.nrrd"]
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", *arguments)
    assert status == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- what is warned


def test_nan_is_fused_with_a_warning(run, files, tmp_path):
    out = tmp_path / "f.nrrd"
    status, _, stderr = run(
        "fuse", files / "ct.nii.gz", files / "nan_t2.nrrd", "-o", out, "--model", files / "m2.safetensors"
    )
    assert status == 0
    assert "warning: nan_t2: 2 of 4096 voxels are NaN or Inf" in stderr
    assert read_volume(out).array.any()


def test_3d_model_on_one_slice_falls_back(run, files, bundle, tmp_path):
    arguments = ["--model", "mri-mri-3d", "-o", tmp_path / "f.nrrd"]
    status, stdout, stderr = run("fuse", files / "one-slice.nrrd", files / "one-slice.nrrd", *arguments)
    assert status == 0
    assert "warning: mri-mri-3d is a 3D model and the input has one slice: mri-ct-2d is used instead" in stderr
    assert "mri-ct-2d (2D)" in stdout


def test_resample_says_how_far_apart(run, files, tmp_path):
    out = tmp_path / "f.nrrd"
    arguments = ["--resample", "-o", out, "--model", files / "m2.safetensors"]
    status, _, stderr = run("fuse", files / "ct.nii.gz", files / "coarse_t2.nrrd", *arguments)
    assert status == 0
    assert "size 16x16x16 against 8x8x8 voxels" in stderr
    assert read_volume(out).shape == (16, 16, 16)


# ------------------------------------------------------------------------------------------------- good input


@pytest.mark.parametrize("suffix", ["nrrd", "nii", "nii.gz", "mha"])
def test_fuse_volumes(run, files, tmp_path, suffix):
    out, preview, report = tmp_path / f"fused.{suffix}", tmp_path / "p.png", tmp_path / "r.json"
    arguments = ["--model", files / "m2.safetensors", "--preview", preview, "--report", report]
    status, stdout, stderr = run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", "-o", out, *arguments)
    assert (status, stderr) == (0, "")
    for words in (str(out), "m2 (2D)", "cpu (", "-10 to 90 HU", "1000 x network output", NOTICE):
        assert words in stdout
    fused, ct = read_volume(out), read_volume(files / "ct.nii.gz")
    assert fused.array.dtype == np.int16
    assert 0 <= fused.array.min() < fused.array.max() <= 1000
    np.testing.assert_allclose(fused.spacing, ct.spacing)
    np.testing.assert_allclose(fused.origin, ct.origin, atol=1e-4)
    np.testing.assert_allclose(fused.direction, ct.direction)
    provenance = json.loads(report.read_text())
    assert provenance["output_file"] == str(out)
    assert provenance["inputs"]["b"]["path"] == str(files / "t2.nii.gz")
    assert preview.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out.name, "p.png", "r.json"])


def test_header_states_scale_and_notice(run, files, tmp_path):
    for suffix in ("nrrd", "nii.gz"):
        out = tmp_path / f"fused.{suffix}"
        run("fuse", files / "ct.nii.gz", files / "t2.nii.gz", "-o", out, "--model", files / "m2.safetensors")
        image = sitk.ReadImage(str(out))
        header = " ".join(image.GetMetaData(key) for key in image.GetMetaDataKeys())
        assert NOTICE in header
        assert "1000 x network output" in header


def test_fuse_images(run, files, tmp_path):
    out = tmp_path / "fused.png"
    status, stdout, stderr = run(
        "fuse", files / "ct.png", files / "t2.png", "-o", out, "--model", files / "m2.safetensors"
    )
    assert (status, stderr) == (0, "")
    assert "255 x network output" in stdout
    assert (read_volume(out).shape, read_volume(out).array.dtype) == ((1, 16, 16), np.uint8)


def test_one_slice_of_a_volume_into_a_picture(run, files, tmp_path):
    a, b = files / "one-slice-ct.nrrd", files / "one-slice.nrrd"
    status, _, _ = run(
        "fuse", a, b, "-o", tmp_path / "f.png", "--model", files / "m2.safetensors", "--modality-a", "CT"
    )
    run("fuse", a, b, "-o", tmp_path / "f.nrrd", "--model", files / "m2.safetensors", "--modality-a", "CT")
    assert status == 0
    picture, volume = read_volume(tmp_path / "f.png").array, read_volume(tmp_path / "f.nrrd").array
    assert picture.dtype == np.uint8
    assert abs(picture / 255 - volume / 1000).max() < 0.003
    assert b"255 x network output" in (tmp_path / "f.png").read_bytes()


def test_same_input_same_bytes(run, files, tmp_path):
    for name in ("one.nii.gz", "two.nii.gz"):
        run(
            "fuse", files / "t1.nii.gz", files / "t2.nii.gz", "-o", tmp_path / name, "--model", files / "m3.safetensors"
        )
    one, two = (gzip.decompress((tmp_path / name).read_bytes()) for name in ("one.nii.gz", "two.nii.gz"))
    assert one == two


# ------------------------------------------------------------------------------------------------- the rest


def test_version_and_help(run):
    assert run("--version") == (0, f"clinicalfmamba {__version__}\n", "")
    status, stdout, _ = run("--help")
    assert status == 0
    for command in ("demo", "phantom", "fuse", "models", "train"):
        assert command in stdout
    assert run()[0] == 2
    assert run("fusion")[0] == 2


def test_phantom(run, tmp_path):
    status, stdout, stderr = run("phantom", "-o", tmp_path / "new" / "folder", "--size", 16, "--seed", 3)
    assert (status, stderr) == (0, "")
    names = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert names == ["ct.nrrd", "flair.nrrd", "labels.nrrd", "spect.nrrd", "t1.nrrd", "t2.nrrd"]
    assert len(stdout.splitlines()) == 6
    ct = read_volume(tmp_path / "new" / "folder" / "ct.nrrd")
    np.testing.assert_array_equal(ct.array, make_phantom(16, seed=3)["CT"].array)


@pytest.mark.parametrize("arguments", [["--size", "4"], ["--size", "big"], ["--seed", "-1"]])
def test_phantom_refuses(run, tmp_path, arguments):
    status, _, stderr = run("phantom", "-o", tmp_path / "p", *arguments)
    assert (status, len(stderr.splitlines())) == (2, 1)
    assert not (tmp_path / "p").exists()


def test_models(run, bundle):
    status, stdout, stderr = run("models", "--verify")
    assert (status, stderr) == (0, "")
    index = pretrained.read_index()
    for name in index:
        assert name in stdout
        assert index[name]["sha256"] in stdout
        assert str(bundle / f"{name}.md") in stdout
    assert stdout.count("ok") == 2
    for words in ("MR, CT", "2D", "3D", "256x256", "128x128x128", "GFLOP"):
        assert words in stdout


def test_models_finds_damage(run, bundle):
    (bundle / "mri-mri-3d.safetensors").write_bytes(b"rust")
    status, stdout, stderr = run("models", "--verify")
    assert status == 2
    assert "WRONG" in stdout
    (line,) = stderr.splitlines()
    assert "mri-mri-3d" in line
    assert "mri-ct-2d" not in line


def test_demo(run, bundle, tmp_path):
    status, stdout, stderr = run("demo", "-o", tmp_path / "demo", "--size", 32)
    assert status == 0
    assert [line[:9] for line in stderr.splitlines()] == ["warning: "] * len(stderr.splitlines())
    assert NOTICE in stdout
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    for pair in ("ct-t2", "t1-t2", "spect-t2"):
        assert {f"fused-{pair}.nrrd", f"fused-{pair}.png", f"fused-{pair}.json"} <= names
        assert pair in stdout
    assert {"ct.nrrd", "t1.nrrd", "t2.nrrd", "spect.nrrd", "spect-colour.nrrd"} <= names
    assert read_volume(tmp_path / "demo" / "fused-spect-t2.nrrd").is_colour
    pytest.importorskip("skimage")
    rows = json.loads((tmp_path / "demo" / "metrics.json").read_text())["metrics"]
    assert [(row["pair"], row["method"]) for row in rows] == [
        (pair, method) for pair in ("ct-t2", "t1-t2", "spect-t2") for method in ("network", "average")
    ]
    assert all(0 < row["SSIM"] < 1 for row in rows)
    assert (tmp_path / "demo" / "metrics.csv").read_text().splitlines()[0] == "pair,method,PSNR,SSIM,QABF,SCD,EN"


def test_demo_without_the_metrics_packages(run, bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ClinicalFMambaLib.evaluation.metrics", None)
    status, stdout, _ = run("demo", "-o", tmp_path, "--size", 16)
    assert status == 0
    assert "Metrics were skipped" in stdout
    assert "pip install" in stdout
    assert not (tmp_path / "metrics.csv").exists()


def test_installed_entry_points(files, tmp_path):
    command = [sys.executable, "-m", "ClinicalFMambaLib", "fuse", str(files / "ct.nii.gz"), "nowhere.nii"]
    done = subprocess.run([*command, "-o", str(tmp_path / "f.nrrd")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: nowhere.nii: no such file or folder; check the path"]
    assert done.stdout == ""
