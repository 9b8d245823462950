"""The reader study: blinded items, a key that stays outside, and ratings put together again."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from ClinicalFMambaLib import NOTICE
from ClinicalFMambaLib.cases import find_cases
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.evaluation.evaluate import MODEL, summarise
from ClinicalFMambaLib.evaluation.reader_study import QUESTIONS, ReaderStudy, read_ratings
from ClinicalFMambaLib.evaluation.report import evaluate_data, mean_ranks
from ClinicalFMambaLib.inference.engine import FusionEngine


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(pairs, weights, tmp_path_factory):
    out, cases = tmp_path_factory.mktemp("study"), find_cases(pairs)
    arguments = (str(weights), pairs, cases, ["MRI", "CT"], out, ("SSIM", "QABF"))
    rows = evaluate_data(FusionEngine("cpu"), *arguments, readers=5, jobs=1)
    return out, rows


def fill(study, path, rate):
    """A reader's table: what ``rate`` says of each method."""
    key = {row["item"]: row["method"] for row in read(study[0] / "reader-study-key.csv")}
    lines = [",".join(["item", *QUESTIONS])]
    lines += [",".join([item, *[rate(method)] * len(QUESTIONS)]) for item, method in key.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_items_are_the_model_and_the_best_other_fusion_of_each_case(study):
    out, rows = study
    key = read(out / "reader-study-key.csv")
    best = next(method for method in mean_ranks(summarise(rows)) if method != MODEL)
    assert sorted((row["case"], row["method"]) for row in key) == sorted(
        (case, method) for case in {row["case"] for row in key} for method in (MODEL, best)
    )
    assert len({row["case"] for row in key}) == 5 and {row["patient"] for row in key} == {"1", "2", "3", "4"}
    assert {row["case"] for row in key[:5]} == {row["case"] for row in key[5:]}  # never one after the other
    assert all({row["method"] for row in half} == {MODEL, best} for half in (key[:5], key[5:]))


def test_nothing_in_the_readers_folder_tells_the_method(study):
    folder = study[0] / "reader-study"
    names = {path.name for path in folder.iterdir()}
    assert names == {*(f"{k:03d}.png" for k in range(1, 11)), "ratings.csv", "instructions.txt"}
    for path in folder.iterdir():
        content = path.read_bytes().lower()
        assert not any(word in content for word in (b"mamba", b"maximum", b"average", b"pyramid", b"wavelet", b"1001"))
    assert NOTICE in (folder / "instructions.txt").read_text()
    assert [row["item"] for row in read(folder / "ratings.csv")] == [f"{k:03d}" for k in range(1, 11)]
    assert np.ptp(np.asarray(Image.open(folder / "001.png"))) > 200


def test_ratings_are_unblinded(study, tmp_path):
    one = fill(study, tmp_path / "one.csv", lambda method: "4" if method == MODEL else "3")
    two = fill(study, tmp_path / "two.csv", lambda method: "5" if method == MODEL else "1")
    text = read_ratings(study[0] / "reader-study-key.csv", [one, two])
    assert "2 readers, 10 items, 4 patients." in text and NOTICE in text
    assert "| overall | 4.50 | 2.00 | +2.50 | +2.50 to +2.50 |" in text


def test_empty_cells_are_left_out(study, tmp_path):
    table = fill(study, tmp_path / "one.csv", lambda method: "4" if method == MODEL else "")
    assert "| overall | 4.00 |" in read_ratings(study[0] / "reader-study-key.csv", [table])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",".join(["item", *QUESTIONS]) + "\n001,6,1,1,1,1\n", "detail of A is '6'; it should be 1 to 5"),
        (",".join(["item", *QUESTIONS]) + "\n999,1,1,1,1,1\n", "no item '999'"),
        (",".join(["item", *QUESTIONS]) + "\n", "no row"),
        ("item,overall\n001,3\n", "the column 'detail of A' is missing"),
    ],
)
def test_bad_tables_are_refused(study, tmp_path, text, message):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_ratings(study[0] / "reader-study-key.csv", [tmp_path / "r.csv"])


def test_a_study_is_not_overwritten(study, pairs):
    with pytest.raises(InputError, match="already holds a reader study"):
        ReaderStudy(find_cases(pairs), 2, ["MRI", "CT"], study[0])
