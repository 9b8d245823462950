"""``fuse --classify``: what is printed, reported and written, and what is refused before anything is computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from ClinicalFMambaLib.cli import main
from ClinicalFMambaLib.volumes import read_volume, write_volume


@pytest.fixture(scope="module")
def files(make_pair, tmp_path_factory):
    """Paths of T1ce and FLAIR of a head with a tumour, and of a FLAIR without."""
    folder = tmp_path_factory.mktemp("pair")
    for name, volume in make_pair(grade=0.7, spacing=4.0).items():
        write_volume(volume, folder / f"{name}.nii.gz")
    write_volume(make_pair(radius=0, spacing=4.0)["flair"], folder / "healthy_flair.nii.gz")
    return folder


def test_a_reading(files, tmp_path, classifier_file, capsys):
    out, report, where = tmp_path / "f.nrrd", tmp_path / "r.json", tmp_path / "map.nrrd"
    arguments = ["fuse", str(files / "t1ce.nii.gz"), str(files / "flair.nii.gz"), "-o", str(out)]
    arguments += ["--report", str(report), "--classify", classifier_file, "--occlusion-map", str(where)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "reading:  experimental, not a grade reading: LGG" in printed
        and "HGG" in printed
        and "9 LGG and 8 HGG patients" in printed
    )
    found = json.loads(report.read_text(encoding="utf-8"))["classification"]
    assert [row["label"] for row in found["probabilities"]] == ["LGG", "HGG"]
    assert found["probabilities"][1]["probability"] > 0.5 and found["model"] == "toy"
    drawn, fused = read_volume(where), read_volume(out)
    assert drawn.shape == fused.shape and drawn.array.max() > 0


def test_no_reading_is_said_and_the_fusion_is_there(files, tmp_path, classifier_file, capsys):
    out, where = tmp_path / "f.nrrd", tmp_path / "map.nrrd"
    arguments = ["fuse", str(files / "t1ce.nii.gz"), str(files / "healthy_flair.nii.gz"), "-o", str(out)]
    assert main([*arguments, "--classify", classifier_file, "--occlusion-map", str(where)]) == 0
    assert "no reading: no tumour was found" in capsys.readouterr().out
    assert out.is_file() and not where.exists()


def test_stated_sequences_count_more_than_names(files, tmp_path, classifier_file, make_pair, capsys):
    for name, volume in make_pair(grade=0.7, spacing=4.0).items():
        write_volume(replace(volume, name=""), tmp_path / f"series_{'12'[name == 'flair']}.nii.gz")
    arguments = ["fuse", str(tmp_path / "series_1.nii.gz"), str(tmp_path / "series_2.nii.gz")]
    arguments += ["-o", str(tmp_path / "f.nrrd"), "--classify", classifier_file]
    assert main(arguments) == 0
    assert "does not say in its name" in capsys.readouterr().out
    assert main([*arguments, "--sequences", "t1ce,flair"]) == 0
    assert "not a grade reading: LGG" in capsys.readouterr().out


BAD = {
    "no such classifier": (["--classify", "nothing"], "no classifier 'nothing'"),
    "a file that is none": (["--classify", "{}/t1ce.nii.gz"], "no classifier"),
    "a damaged file": (["--classify", "{}/x.safetensors"], "cannot be read as safetensors"),
    "a fusion model": (["--classify", "{model}"], "a fusion model"),
    "map without reading": (["--occlusion-map", "{}/m.nrrd"], "--occlusion-map is for --classify"),
    "mask without reading": (["--tumour-mask", "{}/t1ce.nii.gz"], "--tumour-mask is for --classify"),
    "sequences": (["--classify", "{toy}", "--sequences", "t1,t2"], "should be t1ce,flair or flair,t1ce"),
    "no such mask": (["--classify", "{toy}", "--tumour-mask", "{}/gone.nii.gz"], "no such file"),
    "map as picture": (["--classify", "{toy}", "--occlusion-map", "{}/m.png"], "the map is a volume"),
    "map over an input": (["--classify", "{toy}", "--occlusion-map", "{}/flair.nii.gz"], "one of the inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(files, tmp_path, classifier_file, capsys, case):
    from ClinicalFMambaLib.pretrained import FOLDER

    (files / "x.safetensors").write_bytes(b"nothing")
    options, message = BAD[case]
    words = {"toy": classifier_file, "model": str(FOLDER / "mri-ct-2d.safetensors")}
    options = [option.replace("{}", str(files)).format(**words) for option in options]
    pair = [str(files / f"{name}.nii.gz") for name in ("t1ce", "flair")]
    assert main(["fuse", *pair, "-o", str(tmp_path / "f.nrrd"), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert list(tmp_path.iterdir()) == []
