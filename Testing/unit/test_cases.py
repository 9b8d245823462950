"""Finding cases: folders of pairs, case folders, tables; and saying what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from ClinicalFMambaLib.cases import check_cases, find_cases, list_cases, load_case
from ClinicalFMambaLib.errors import InputError


def write(path, shape=(40, 36), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return path


@pytest.fixture
def pairs(tmp_path):
    for folder in ("MRI", "CT"):
        for name in ("2005", "2006", "20005", "21007"):
            write(tmp_path / folder / f"{name}.png")
    return tmp_path


@pytest.fixture
def cases(tmp_path):
    for patient in ("p1", "p2", "p10"):
        for name in ("t1ce", "t2", "flair", "seg"):
            write(tmp_path / patient / f"{patient}_{name}.nii.gz", (12, 20, 18))
    return tmp_path


def table(folder, text):
    (folder / "cases.csv").write_text(text)
    return folder / "cases.csv"


# --------------------------------------------------------------------------------------------------- found


def test_patients_come_from_the_slice_names(pairs):
    found = list_cases(pairs)
    assert [(c.patient, c.name) for c in found.cases] == [
        ("2", "2005"),
        ("2", "2006"),
        ("20", "20005"),
        ("21", "21007"),
    ]
    assert found.sources == ("MRI", "CT") and not found.problems and found.patients == ["2", "20", "21"]


@pytest.mark.parametrize(
    ("stem", "patient"),
    [("20013", "20"), ("13", "13"), ("p01_s003", "p01"), ("sub-7-12", "sub-7"), ("case_12", "case_12"), ("a", "a")],
)
def test_patient_of_a_file_name(tmp_path, stem, patient):
    for folder in ("MRI", "PET"):
        write(tmp_path / folder / f"{stem}.png")
    (case,) = find_cases(tmp_path)
    assert case.patient == patient and list(case.paths) == ["MRI", "PET"]


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        (("MRI", "SPECT"), (), ["MRI", "SPECT"]),
        (("MRI", "CT", "PET"), ("MRI", "PET"), ["MRI", "PET"]),
        (("T1", "T2"), (), ["T1", "T2"]),
        (("T1", "T2"), ("T2", "T1"), ["T2", "T1"]),
    ],
)
def test_folders_of_pairs(tmp_path, names, order, expected):
    for name in names:
        write(tmp_path / name / "7001.png")
    (case,) = find_cases(tmp_path, order)
    assert list(case.paths) == expected


def test_case_folders(cases):
    assert list_cases(cases).sources == ("t2", "flair")
    found = list_cases(cases, ["t1ce", "flair"])
    assert [c.patient for c in found.cases] == ["p1", "p2", "p10"]
    assert found.cases[0].paths["flair"].name == "p1_flair.nii.gz"


def test_a_case_without_a_source_is_left_out_and_named(cases):
    (cases / "p2" / "p2_t2.nii.gz").unlink()
    found = list_cases(cases, ["t1ce", "t2"])
    assert [c.patient for c in found.cases] == ["p1", "p10"]
    (sentence,) = found.left_out
    assert "p2 has no t2" in sentence
    assert len(find_cases(cases, ["t1ce", "t2"])) == 2


def test_two_files_of_other_names_are_a_pair(tmp_path):
    for patient in ("a", "b"):
        for name in ("ct", "zt1", "mask"):
            write(tmp_path / patient / f"{name}.nii.gz", (12, 20, 18))
    assert list_cases(tmp_path).sources == ("zt1", "ct")


def test_table(tmp_path):
    for name in ("x", "y", "z"):
        write(tmp_path / f"{name}.png")
    path = table(tmp_path, "Patient,case,MRI,CT\np1,one,x.png,y.png\np2,two,y.png,z.png\n")
    first, second = find_cases(path, ["MRI", "CT"])
    assert (first.patient, first.name, first.paths["CT"].name) == ("p1", "one", "y.png")
    assert (second.patient, second.paths["CT"].name) == ("p2", "z.png")
    assert list_cases(path).sources == ("MRI", "CT")


# --------------------------------------------------------------------------------------------------- wrong


def test_every_pair_without_partner_is_a_problem(pairs):
    (pairs / "MRI" / "2005.png").unlink()
    (pairs / "CT" / "21007.png").unlink()
    found = list_cases(pairs)
    assert len(found.problems) == 2 and len(found.cases) == 2
    with pytest.raises(InputError, match=r"2005.png has no partner.*MRI.*\(and 1 more"):
        find_cases(pairs)


@pytest.mark.parametrize(
    ("make", "order", "message"),
    [
        (lambda p: p / "nowhere", (), "no such file or folder"),
        (lambda p: p, (), "no pairs and no cases"),
        (lambda p: write(p / "a.png"), (), "ends with .csv"),
        (lambda p: write(p / "MRI" / "1.png").parents[1], ("MRI", "CT"), "none called CT"),
        (lambda p: [write(p / n / "1.png") for n in ("MRI", "CT", "PET")] and p, (), "CT and PET beside MRI"),
        (lambda p: [write(p / "c" / f"{n}.nii.gz", (4, 9, 9)) for n in "abc"] and p, (), "a, b, c in common"),
        (lambda p: write(p / "c" / "t1.nii.gz", (4, 9, 9)).parents[1], ("t1", "t2"), "holds all of t1, t2"),
        (lambda p: table(p, "MRI,CT\n"), ("MRI", "CT"), "expected the columns patient, MRI, CT"),
        (lambda p: table(p, "patient,MRI\nx,y\n"), ("MRI", "CT"), "expected the columns patient, MRI, CT"),
        (lambda p: table(p, "patient,MRI,CT\n"), ("MRI", "CT"), "no row"),
        (lambda p: table(p, "patient,MRI,CT\np,no.png,no.png\n"), ("MRI", "CT"), "line 2: .*no.png does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, make, order, message):
    with pytest.raises(InputError, match=message):
        find_cases(make(tmp_path), order)


def test_every_bad_file_is_named(pairs):
    write(pairs / "CT" / "2006.png", (40, 35))
    (pairs / "MRI" / "21007.png").write_bytes(b"no picture")
    problems = check_cases(find_cases(pairs))
    assert len(problems) == 2
    assert "2006.png" in problems[0] and "do not fit" in problems[0] and "36x40" in problems[0]
    assert "21007.png" in problems[1] and "cannot be read" in problems[1]


def test_sources_come_in_order_and_range(pairs):
    case = find_cases(pairs)[0]
    stack = load_case(case, ["CT", "MRI"])
    assert stack.shape == (2, 40, 36) and stack.dtype == np.float32 and 0 <= stack.min() < stack.max() <= 1
    np.testing.assert_array_equal(stack[::-1], load_case(case))
