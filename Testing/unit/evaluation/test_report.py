"""The report: what it says is computed from its table, and it is one file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ClinicalFMambaLib import NOTICE, pretrained
from ClinicalFMambaLib.cases import find_cases
from ClinicalFMambaLib.evaluation.evaluate import MODEL, Row, summarise
from ClinicalFMambaLib.evaluation.pictures import _framed, detail_box, difference_colours
from ClinicalFMambaLib.evaluation.report import evaluate_data, findings, mean_ranks, trivial_winners
from ClinicalFMambaLib.inference.engine import FusionEngine


def rows(**methods):
    """Three patients with equal values; SSIM, SCD, NABF and EN of each method."""
    names = ("SSIM", "SCD", "NABF", "EN")
    return [Row(m, p, p, dict(zip(names, values))) for m, values in methods.items() for p in "123"]


TABLE = rows(
    ClinicalFMamba=(0.8, 1.5, 0.01, 5),
    wavelet=(0.7, 1.0, 0.02, 6),
    maximum=(0.7, 1.6, 0.03, 4),
    average=(0.75, 0.9, 0.001, 4),
    source_a=(0.9, 0.1, 0.0, 3),
)


def test_trivial_winners_are_found():
    assert trivial_winners(summarise(TABLE)) == {"SSIM": "source_a", "SCD": "maximum", "NABF": "source_a"}
    honest = rows(ClinicalFMamba=(0.9, 1.9, 0.0, 5), average=(0.75, 0.9, 0.001, 9), source_b=(0.8, 0.1, 0.1, 3))
    assert trivial_winners(summarise(honest)) == {}


def test_mean_ranks_leave_the_sources_out_and_share_ties():
    assert mean_ranks(summarise(TABLE)) == {
        MODEL: pytest.approx(1.5),
        "maximum": pytest.approx((3.5 + 1) / 2),
        "average": pytest.approx((2 + 4) / 2),
        "wavelet": pytest.approx((3.5 + 3) / 2),
    }


def test_ranks_are_over_what_is_defined_for_all():
    undefined = [replace(row, values={**row.values, "SCD": math.nan}) for row in TABLE]
    assert mean_ranks(summarise(undefined))[MODEL] == 1
    assert "Mean rank over SSIM among the 4 fusions" in " ".join(findings(undefined, summarise(undefined)))


def test_findings_say_it_in_words():
    texts = " ".join(findings(TABLE, summarise(TABLE)))
    assert "Mean rank over SSIM, SCD among the 4 fusions: ClinicalFMamba 1.5" in texts
    assert "ClinicalFMamba is the best fusion on SSIM." in texts
    assert "A trivial answer wins 3 of the metrics" in texts
    assert "SSIM, NABF: source A alone; SCD: maximum" in texts
    assert "EN have no better direction" in texts


def test_a_copy_of_one_source_is_called_so():
    for share, said in ((0.19, True), (0.3, False), (math.nan, False)):
        table = [replace(row, values={**row.values, "SHARE": share}) for row in TABLE]
        texts = " ".join(findings(table, summarise(table)))
        assert ("nearly copies one source: the other one makes up 19% of" in texts) == said


class Page(HTMLParser):
    """Tags that are left open, images, and visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        self.links += [v for k, v in attributes if k in ("href", "src") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def report(pairs, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    weights.with_suffix(".json").write_text(json.dumps({"training_patients": ["2", "9"]}))
    try:
        cases = find_cases(pairs)
        evaluate_data(FusionEngine("cpu"), str(weights), pairs, cases, ["MRI", "CT"], out, ("SSIM", "QABF", "EN"))
    finally:
        weights.with_suffix(".json").unlink()
    return out


def test_the_report_is_one_whole_file(report):
    page = Page((report / "report.html").read_text())
    assert page.open == [] and page.links == []
    assert len(page.images) == 5 and all(src.startswith("data:image/png;base64,") for src in page.images)
    text = " ".join(" ".join(page.words).split())
    for words in (NOTICE, "6 of 4 patients", "laplacian pyramid", "source A alone", "95 % bootstrap", "tiny, SHA-256"):
        assert words in text
    assert re.search(r"trained on 1 of these patients.*\(2\)", text)


def test_patients_that_a_bundled_model_was_trained_on_are_named(pairs, weights, tmp_path, monkeypatch):
    entry = {
        "file": weights.name,
        "sha256": pretrained.sha256(weights),
        "modalities": ["MR", "CT"],
        "training_patients": ["3", "4"],
    }
    (tmp_path / "index.json").write_text(json.dumps({"bundled": entry}))
    monkeypatch.setattr(pretrained, "FOLDER", weights.parent)
    monkeypatch.setattr(pretrained, "INDEX", tmp_path / "index.json")
    cases = find_cases(pairs)
    evaluate_data(FusionEngine("cpu"), "bundled", pairs, cases, ["MRI", "CT"], tmp_path / "out", ("SSIM",))
    assert (
        "trained on 2 of these patients, or on others of that name (3, 4)"
        in (tmp_path / "out" / "report.html").read_text()
    )


def test_files_of_the_report(report):
    names = {path.name for path in report.iterdir()}
    assert names == {
        *("fused", "metrics.csv", "summary.json", "metrics.png", "report.html"),
        *(f"example-{k}.png" for k in (1, 2, 3, 4)),
    }
    assert {p.name for p in (report / "fused").iterdir()} == {f"{n}.png" for n in (1001, 1002, 1003, 2001, 3001, 4001)}
    picture = Image.open(report / "example-1.png")
    assert picture.text["Disclaimer"].endswith(NOTICE)
    assert picture.width > 8 * 256 and picture.height > 4 * 256


def test_best_and_second_best_are_marked(report):
    html = (report / "report.html").read_text()
    table = html[html.index("<table class=metrics>") : html.index("</table></div>")]
    assert table.count("<b>") == 2 and table.count("<u>") == 2
    summary = json.loads((report / "summary.json").read_text())
    fusions = [m for m in summary if not m.startswith("source")]
    best = max(fusions, key=lambda m: summary[m]["SSIM"]["mean"])
    assert f"<b>{summary[best]['SSIM']['mean']:.3f}</b>" in table


def test_same_input_same_report(report, pairs, weights, tmp_path):
    cases = find_cases(pairs)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        evaluate_data(
            FusionEngine("cpu"), str(weights), pairs, cases, ["MRI", "CT"], tmp_path / folder, ("SSIM", "QABF", "EN")
        )
    one, two = ((tmp_path / folder / "report.html").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_colour_volumes_and_few_patients(colour_pairs, volumes, weights, tmp_path):
    for name, data, sources in (("c", colour_pairs, ["MRI", "PET"]), ("v", volumes, ["t2", "flair"])):
        cases = find_cases(data)
        evaluate_data(FusionEngine("cpu"), str(weights), data, cases, sources, tmp_path / name, ("SSIM", "QABF"))
    rgb = np.asarray(Image.open(tmp_path / "c" / "example-1.png").convert("RGB")).astype(int)
    top = rgb[60:300, 300:560]  # the panel of the PET
    assert np.abs(top[..., 0] - top[..., 2]).max() > 50
    page = (tmp_path / "v" / "report.html").read_text()
    assert "2 patients are too few" in page
    assert "QABF: of volumes on every 4th axial slice" in page
    assert "axial slice" not in (tmp_path / "c" / "report.html").read_text()
    assert "was trained on MR with CT, not on MR with MR" in page
    assert {p.name for p in (tmp_path / "v" / "fused").iterdir()} == {"p1.nii.gz", "p2.nii.gz"}


def test_the_detail_lies_where_both_sources_have_structure():
    rng = np.random.default_rng(0)
    a, b = np.zeros((64, 64)), np.zeros((64, 64))
    a[:, 40:] = rng.random((64, 24))
    b[40:] = rng.random((24, 64))
    rows_, columns = detail_box(a, b)
    assert rows_.start >= 36 and columns.start >= 36 and rows_.stop <= 64 and columns.stop <= 64


def test_difference_colours():
    orange, black, blue = difference_colours(np.array([0.5, 0.0, -0.5]))
    assert orange[0] == 255 and orange[2] == 0 and not black.any() and blue[2] == 255 and blue[0] == 0


@pytest.mark.parametrize(
    "box", [(slice(0, 4), slice(12, 16)), (slice(5, 9), slice(3, 7)), (slice(12, 16), slice(0, 4))]
)
@pytest.mark.parametrize("grey", [0, 255])
def test_the_frame_shows_on_any_picture(box, grey):
    framed = _framed(np.full((32, 32), grey, np.uint8), (16, 16), box).astype(int)
    yellow = (framed == (255, 210, 0)).all(-1)
    rows_, columns = np.nonzero(yellow)
    assert (rows_.min(), rows_.max() + 1) == (2 * box[0].start, 2 * box[0].stop)
    assert (columns.min(), columns.max() + 1) == (2 * box[1].start, 2 * box[1].stop)
    assert yellow.sum() == 4 * 7 and (framed[~yellow] == 0).any()
