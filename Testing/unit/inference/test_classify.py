"""Readings and abstentions: what is wrong with a patient's volumes leads to a sentence, never to a grade."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ClinicalFMambaLib.errors import Cancelled, WeightsError
from ClinicalFMambaLib.inference import classify as module
from ClinicalFMambaLib.inference.classify import classify, find_classifier, open_classifier, sequence_of_name
from ClinicalFMambaLib.models.classifier import save_classifier
from ClinicalFMambaLib.phantom import make_phantom


def pair_of(pair):
    return pair["t1ce"], pair["flair"]


@pytest.mark.parametrize("grade, side", [(0.02, "LGG"), (0.7, "HGG")])
def test_a_reading(make_pair, averaging_engine, classifier_file, grade, side):
    a, b = pair_of(make_pair(grade=grade))
    stages = []
    answer = classify(averaging_engine, a, b, classifier_file, progress=lambda stage, part: stages.append(part))
    assert not answer.abstention
    by_label = {label: (p, low, high) for label, p, low, high in answer.probabilities}
    assert by_label["LGG"][0] + by_label["HGG"][0] == pytest.approx(1)
    assert max(by_label, key=lambda label: by_label[label][0]) == side
    for p, low, high in by_label.values():
        assert 0 <= low <= p <= high <= 1
    assert by_label["LGG"][1] == pytest.approx(1 - by_label["HGG"][2])
    assert "9 LGG and 8 HGG patients of 3 sites" in answer.note and "not for diagnosis" in answer.note
    assert answer.text.startswith("experimental, not a grade reading: LGG")
    assert replace(answer, verdict="grade reading").text.startswith("LGG")
    assert "if both were equally likely before the scan" in answer.text
    assert answer.to_json()["prior"] == {"LGG": 0.5, "HGG": 0.5}
    assert stages == sorted(stages)
    assert json.loads(json.dumps(answer.to_json()))["details"]["region_origin"] == "found"


def test_the_map_shows_what_speaks_for_it(make_pair, averaging_engine, classifier_file):
    pair = make_pair(grade=0.3)
    a, b = pair_of(pair)
    answer = classify(averaging_engine, a, b, classifier_file)
    assert answer.occlusion.array.shape == a.shape == answer.region.array.shape
    assert answer.occlusion.array.dtype == np.float32 and answer.region.array.dtype == np.uint8
    assert (answer.occlusion.spacing, answer.occlusion.origin) == (a.spacing, a.origin)
    enhancing = (a.array > 130) & (answer.region.array > 0)
    rest = (answer.region.array > 0) & ~enhancing
    outside = ~(np.abs(answer.occlusion.array) > 0) | (answer.region.array > 0)
    assert outside.mean() > 0.995
    # Hiding what enhances lowers the probability of HGG, hiding the rest does not.
    assert answer.occlusion.array[enhancing].mean() > 3 * max(0.01, answer.occlusion.array[rest].mean())


def test_the_same_in_either_order_and_each_time(make_pair, averaging_engine, classifier_file):
    a, b = pair_of(make_pair())
    first = classify(averaging_engine, a, b, classifier_file)
    assert classify(averaging_engine, a, b, classifier_file).probabilities == first.probabilities
    assert classify(averaging_engine, b, a, classifier_file).probabilities == first.probabilities


def test_a_mask_takes_the_place_of_the_search(make_pair, averaging_engine, classifier_file):
    a, b = pair_of(make_pair(grade=0.7))
    found = classify(averaging_engine, a, b, classifier_file)
    given = classify(averaging_engine, a, b, classifier_file, mask=replace(found.region))
    assert given.details["region_origin"] == "given"
    np.testing.assert_allclose(
        [p for _, p, *_ in given.probabilities], [p for _, p, *_ in found.probabilities], atol=0.1
    )
    small = replace(found.region, array=np.zeros_like(found.region.array))
    assert "mask" in classify(averaging_engine, a, b, classifier_file, mask=small).abstention


def renamed(volume, name):
    return replace(volume, name=name)


def cut(volume):
    return replace(volume, array=volume.array[34:], origin=(*volume.origin[:2], volume.origin[2] + 68))


def larger(volume):
    return replace(volume, spacing=(2.3,) * 3)


def shifted_grid(volume):
    return replace(volume, array=volume.array[:, :, 2:], origin=(volume.origin[0] + 4, *volume.origin[1:]))


BAD = {
    "no tumour": (lambda make: pair_of(make(radius=0)), "no tumour was found"),
    "CT": (lambda make: (make()["t1ce"], replace(make()["flair"], modality="CT")), "flair is CT"),
    "T2 in place of FLAIR": (lambda make: (make()["t1ce"], renamed(make()["flair"], "x_t2")), "x_t2 is t2"),
    "T1 without contrast agent": (lambda make: (renamed(make()["t1ce"], "T1w"), make()["flair"]), "T1w is t1"),
    "no name": (lambda make: (renamed(make()["t1ce"], "series 7"), make()["flair"]), "does not say in its name"),
    "twice the same": (lambda make: (make()["flair"], make()["flair"]), "both volumes are flair"),
    "empty": (lambda make: (make()["t1ce"], replace(make()["flair"], array=0 * make()["flair"].array)), "constant"),
    "cut": (lambda make: tuple(cut(v) for v in pair_of(make(radius=30))), "cut by the edge of the field of view"),
    "strange": (lambda make: tuple(larger(v) for v in pair_of(make())), "outside what toy has seen"),
}


@pytest.mark.parametrize("case", BAD)
def test_abstention(make_pair, averaging_engine, classifier_file, case):
    volumes, message = BAD[case]
    a, b = volumes(make_pair)
    answer = classify(averaging_engine, a, b, classifier_file)
    assert message in answer.abstention
    assert answer.probabilities == () and answer.occlusion is None
    assert answer.text.startswith("no reading: ")
    assert answer.to_json()["probabilities"] == []


def test_other_grids_are_resampled(make_pair, averaging_engine, classifier_file):
    a, b = pair_of(make_pair(grade=0.7))
    answer = classify(averaging_engine, a, shifted_grid(b), classifier_file)
    expected = classify(averaging_engine, a, b, classifier_file)
    assert answer.occlusion.array.shape == a.shape
    assert answer.probabilities[1][1] == pytest.approx(expected.probabilities[1][1], abs=0.02)


def test_the_phantom_is_no_patient(averaging_engine, classifier_file):
    phantom = make_phantom(64, tumour=False)
    answer = classify(averaging_engine, phantom["T1"], phantom["FLAIR"], classifier_file, sequences=("t1ce", "flair"))
    assert answer.abstention and not answer.probabilities


def test_cancelled(make_pair, averaging_engine, classifier_file):
    with pytest.raises(Cancelled):
        classify(averaging_engine, *pair_of(make_pair()), classifier_file, cancelled=lambda: True)


@pytest.mark.parametrize(
    "name, sequence",
    [
        ("BraTS19_1_t1ce", "t1ce"), ("T1-CE axial", "t1ce"), ("BraTS-GLI-0-000-t1c", "t1ce"), ("T1 Gd", "t1ce"),
        ("t1post", "t1ce"), ("T1w post contrast", "t1ce"), ("flair", "flair"), ("T2_FLAIR", "flair"),
        ("x-t2f", "flair"), ("sub_T2w", "t2"), ("T1w", "t1"), ("MPRAGE", "t1"), ("MRHead", ""), ("", ""),
        ("t1centre", ""), ("Ax T1 MPRAGE +C", "t1ce"), ("T1 AX POST GAD", "t1ce"), ("T1 ax pre contrast", "t1"),
        ("T1 without contrast", "t1"), ("post", ""),
    ],
)  # fmt: skip
def test_sequence_of_name(name, sequence):
    assert sequence_of_name(name) == sequence


def test_which_classifier(classifier_file, tmp_path, monkeypatch):
    assert str(find_classifier(classifier_file)) == classifier_file
    for choice in ("nothing", str(tmp_path / "gone.safetensors")):
        with pytest.raises(WeightsError, match="no classifier"):
            find_classifier(choice)
    monkeypatch.setattr(module, "CLASSIFIERS", tmp_path / "none.json")
    with pytest.raises(WeightsError, match="no tumour classifier is bundled"):
        find_classifier("auto")


def test_one_for_other_fusion_weights_is_refused(classifier_file, tmp_path):
    classifier = open_classifier(classifier_file)
    other = replace(classifier, info=replace(classifier.info, fusion={"name": "mri-mri-3d", "sha256": "0" * 64}))
    path = save_classifier(other, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="fused by other weights"):
        open_classifier(str(path))
