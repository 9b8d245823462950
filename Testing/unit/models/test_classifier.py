"""The three kinds of classifier behind one interface, and their files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ClinicalFMambaLib.errors import InputError, WeightsError
from ClinicalFMambaLib.inference.tumour_features import Reading, domain_names, feature_names, features
from ClinicalFMambaLib.inference.tumour_region import find_region, standardise
from ClinicalFMambaLib.models.classifier import (
    SLICES,
    Classifier,
    ClassifierInfo,
    Domain,
    FeatureModel,
    NetworkModel,
    build_network,
    load_classifier,
    network_input,
    save_classifier,
)

INPUTS = ("t1ce", "fused")


@pytest.fixture(scope="module")
def reading(make_pair):
    brain = standardise(make_pair())
    return Reading.of(brain, np.maximum(*brain.images.values()), find_region(brain))


def domain():
    size = len(domain_names())
    return Domain(np.zeros(size), np.eye(size), 30.0)


def feature_classifier():
    rng = np.random.default_rng(0)
    size = len(feature_names(INPUTS))
    model = FeatureModel(INPUTS, np.zeros(size), np.ones(size), rng.normal(size=(4, size)), rng.normal(size=4))
    info = ClassifierInfo(
        "grade", "features", INPUTS, slope=0.5, intercept=-0.1, patients={"LGG": 3, "HGG": 4}, sites=2
    )
    return Classifier(info, model, domain())


def network_classifier(dimension):
    import torch

    torch.manual_seed(0)
    model = NetworkModel(dimension, "fused", 16, [build_network(dimension).eval() for _ in range(2)])
    return Classifier(ClassifierInfo("net", f"resnet50-{dimension}d", ("fused",), 16), model, domain())


MAKERS = {
    "features": feature_classifier,
    "resnet50-2d": lambda: network_classifier(2),
    "resnet50-3d": lambda: network_classifier(3),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_gives_the_same_classifier_and_the_same_bytes(reading, tmp_path, kind):
    if kind != "features":
        pytest.importorskip("monai")
    classifier = MAKERS[kind]()
    first = save_classifier(classifier, tmp_path / "a.safetensors")
    loaded = load_classifier(first)
    assert loaded.info == classifier.info
    expected = classifier.probabilities(reading)
    assert len(expected) == (4 if kind == "features" else 2)
    np.testing.assert_allclose(loaded.probabilities(reading), expected, atol=1e-6)
    assert loaded.distance(reading) == classifier.distance(reading)
    second = save_classifier(loaded, tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert b"torch" not in first.read_bytes()[:200]


@pytest.mark.parametrize("kind", MAKERS)
def test_hiding_the_tumour_changes_the_logit(reading, kind):
    if kind != "features":
        pytest.importorskip("monai")
    model = MAKERS[kind]().model
    nothing = np.zeros_like(reading.region)
    np.testing.assert_allclose(model.logits(reading, nothing), model.logits(reading), atol=1e-6)
    assert np.abs(model.logits(reading, reading.region) - model.logits(reading)).max() > 1e-3


def test_features_of_known_scores(reading):
    values = features(reading, ("t1ce",))
    assert len(values) == len(feature_names(("t1ce",)))
    by_name = dict(zip(feature_names(("t1ce",)), values))
    # Half of the ball enhances; what is found is a little larger than the ball.
    assert 0.25 < by_name["t1ce.bright"] < 0.6
    assert by_name["t1ce.peak"] > 5
    hidden = features(reading, ("t1ce",), reading.region)
    np.testing.assert_array_equal(hidden, 0)


def test_single_features(reading):
    whole = dict(zip(feature_names(INPUTS), features(reading, INPUTS)))
    some = ("fused.dark", "t1ce.bright")
    assert feature_names(some) == some
    np.testing.assert_array_equal(features(reading, some), [whole[name] for name in some])


def test_features_do_not_see_the_scale_of_the_scanner(make_pair):
    def read(pair):
        brain = standardise(pair)
        return features(Reading.of(brain, brain.images["t1ce"], find_region(brain)), INPUTS)

    pair = make_pair()
    darker = {name: replace(v, array=(v.array * 0.6).astype(np.float32)) for name, v in pair.items()}
    np.testing.assert_allclose(read(darker), read(pair), rtol=0.1, atol=0.1)


def test_network_input(reading):
    cube = network_input(reading, "fused", 3, 24)
    assert cube.shape == (1, 1, 24, 24, 24) and cube.dtype == np.float32
    slices = network_input(reading, "fused", 2, 24)
    assert slices.shape == (SLICES, 1, 24, 24)
    assert np.abs(cube).max() <= 3
    assert cube[0, 0, 8:16, 8:16, 8:16].mean() > 1  # the tumour is in the middle
    moved = network_input(reading, "fused", 3, 24, shift=(0, 0, 5))
    np.testing.assert_array_equal(moved[..., :-5], cube[..., 5:])
    # A crop larger than the brain is filled with background.
    assert network_input(reading, "fused", 3, 160)[0, 0, 0, 0, 0] == -3


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "forest"},
        {"inputs": ()},
        {"inputs": ("t2",)},
        {"inputs": ("t1ce.colour",)},
        {"kind": "resnet50-2d", "inputs": ("t1ce.bright",), "crop": 32},
        {"kind": "resnet50-3d", "inputs": ("t1ce", "flair"), "crop": 32},
        {"kind": "resnet50-3d", "inputs": ("fused",), "crop": 8},
        {"sequences": ("t1", "t2")},
        {"labels": ("HGG",)},
    ],
)
def test_what_is_no_classifier_is_refused(options):
    with pytest.raises(InputError):
        ClassifierInfo(**{"name": "x", "kind": "features", "inputs": ("t1ce",), **options})


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_classifier(path)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, path, {"config": "{}"})
    with pytest.raises(WeightsError, match="a fusion model"):
        load_classifier(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(WeightsError, match="no classifier"):
        load_classifier(path)
    save_file({"a": np.zeros(3)}, path, {"classifier": '{"name": "x", "kind": "features", "inputs": ["t1ce"]}'})
    with pytest.raises(WeightsError, match="does not fit"):
        load_classifier(path)
    classifier = feature_classifier()
    other = replace(classifier, info=replace(classifier.info, inputs=("t1ce",)))
    with pytest.raises(WeightsError, match="features"):
        load_classifier(save_classifier(other, path))
