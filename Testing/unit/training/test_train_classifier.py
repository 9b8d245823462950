"""Training and judging a classifier: folds, calibration, controls, and the command on synthetic patients."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("lightning")

from sklearn.metrics import brier_score_loss, f1_score, roc_auc_score

from ClinicalFMambaLib.cli import main
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.inference.tumour_features import Reading, domain_names
from ClinicalFMambaLib.inference.tumour_region import find_region, standardise
from ClinicalFMambaLib.models.classifier import load_classifier
from ClinicalFMambaLib.training import train_classifier as trainer
from ClinicalFMambaLib.training.classifier_data import institution, list_patients, paint_out, read_table
from ClinicalFMambaLib.volumes import write_volume


def test_measures_agree_with_scikit_learn_and_torchmetrics():
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(0, 2, 40)
        p = np.round(rng.random(40), 1) * 0.99 + 0.001  # with ties
        assert trainer.area_under_curve(p, labels) == pytest.approx(roc_auc_score(labels, p))
        assert trainer.f1(p >= 0.5, labels) == pytest.approx(f1_score(labels, p >= 0.5))
        # Both labels weigh the same, as if each patient were there as often as there are patients of the other label.
        times = np.where(labels == 1, (labels == 0).sum(), (labels == 1).sum())
        even = [torch.tensor(np.repeat(x, times)) for x in (p, labels)]
        expected = binary_calibration_error(*even, n_bins=trainer.BINS, norm="l1")
        found = trainer.calibration_error(p, labels, trainer.even_weights(labels))
        assert found == pytest.approx(float(expected), abs=1e-5)
        judged = trainer.Judged(np.log(p / (1 - p))[None], labels)
        brier = judged.summary([slice(None)])["brier"]["mean"]
        assert brier == pytest.approx(brier_score_loss(even[1], even[0]), abs=1e-9)


def test_calibration():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    truth = np.where(labels == 1, 1.0, -1.0) + rng.normal(0, 1, 1000)  # log odds are twice this
    slope, intercept = trainer.calibrate(10 * truth + 3, labels)
    np.testing.assert_allclose(slope * (10 * truth + 3) + intercept, 2 * truth, atol=0.4)
    assert trainer.calibrate(-truth, labels) == (0.0, 0.0)


def test_prevalence_of_the_folds_is_no_information():
    """Features without any: leaving sites of one grade out must not look worse, or better, than chance."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [12, 18])
    sites = np.array([str(k // 3) for k in range(30)])
    scores = []
    for seed in range(30):
        x = rng.normal(size=(30, 4))
        settings = trainer.TrainingOptions(seeds=[seed], penalties=[0.1])
        readings = [_Known(values) for values in x]
        fit = fit_of(settings)
        scores.append(trainer.cross_validate(fit, readings, labels, sites, "leave-one-site-out", settings).auc())
    assert np.mean(scores) == pytest.approx(0.5, abs=0.08)


def fit_of(settings):
    return lambda r, y, sites, seed, members: trainer.fit_features(r, y, sites, ("t1ce",), settings, seed, members)


def test_prevalence_of_the_folds_is_not_in_the_probabilities():
    """One site has nearly all of one grade, as in BraTS; probabilities for even odds are right all the same."""
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [90, 180])
    sites = np.array(["a"] * 70 + ["b"] * 10 + ["c"] * 10 + [f"d{k % 8}" for k in range(180)])
    readings = [_Known([label + rng.normal(0, 1), 0, 0, 0]) for label in labels]
    settings = trainer.TrainingOptions(seeds=[0], penalties=[0.1])
    judged = trainer.cross_validate(fit_of(settings), readings, labels, sites, "leave-one-site-out", settings)
    found = judged.summary(trainer.bootstrap(labels, 50))
    assert found["ece"]["mean"] < 0.1 and found["brier"]["mean"] < 0.22
    # As they were while each fold's own prevalence was in them.
    prior = np.array([np.log((labels[sites != s] == 1).sum() / (labels[sites != s] == 0).sum()) for s in sites])
    assert trainer.Judged(judged.scores + prior, labels).summary([slice(None)])["ece"]["mean"] > 0.2


def test_calibration_is_learned_from_sites_left_out():
    labels = np.array([0, 1] * 10)
    sites = np.array([str(k // 5) for k in range(20)])
    folds = trainer._site_folds(labels, sites)
    assert sorted(set(sites[test]).pop() for _, test in folds) == ["0", "1", "2", "3"]
    assert all(not set(sites[train]) & set(sites[test]) for train, test in folds)
    many = trainer._site_folds(np.array([0, 1] * 50), np.arange(100).astype(str))
    assert len(many) == trainer.SITE_FOLDS
    # A grade that is at one site only, or one site alone: folds by patient have to do.
    assert not trainer._site_folds(np.array([0, 0, 1, 1, 1]), np.array(list("aabcd")))
    assert not trainer._site_folds(np.array([0, 1]), np.array(["a", "a"]))


def test_chance_error():
    """Few patients have it though all probabilities are right, many do not."""
    rng = np.random.default_rng(0)
    for count, low, high in ((33, 0.07, 0.16), (6000, 0.0, 0.02)):
        labels = np.arange(count) % 3 // 2
        truth = 2 * (np.where(labels == 1, 1.0, -1.0) + rng.normal(0, 1, (2, count)))  # log odds
        found = trainer.Judged(truth, labels).summary([slice(None)] * 100)["ece"]
        assert low < found["chance"] < high and found["chance"] < found["chance_high"]
        assert found["mean"] < found["chance_high"]
    wrong = trainer.Judged(truth + 1, labels).summary([slice(None)] * 100)["ece"]
    assert wrong["mean"] > 1.5 * wrong["chance_high"]


class _Known:
    """A reading whose features are given."""

    region = np.ones((2, 2, 2), bool)

    def __init__(self, values):
        self.values = [*values, 0.0][:5]

    def features(self, name):
        return self.values


def test_each_patient_is_predicted_by_others():
    """A model that remembers its patients gives itself away."""
    labels, sites = np.repeat([0, 1], 6), np.array(list("aabbccddeeff"))
    readings = [object() for _ in labels]
    asked = []

    class Memory:
        def __init__(self, known):
            self.known = known

        def logits(self, reading, hidden=None):
            asked.append(any(reading is r for r in self.known))
            return np.zeros(1)

    fit = lambda r, y, sites, seed, members: trainer.Fitted(Memory(r), 1.0, 0.0)  # noqa: E731
    for scheme in ("leave-one-site-out", "by-patient"):
        trainer.cross_validate(fit, readings, labels, sites, scheme, trainer.TrainingOptions(seeds=[0]))
    assert len(asked) == 24 and not any(asked)


def test_domain():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, len(domain_names()))) * np.arange(1, 1 + len(domain_names()))
    domain = trainer.fit_domain(values)
    inside = np.mean([domain.distance(v) <= domain.threshold for v in values])
    assert inside >= 0.9
    far = values[0].copy()
    far[3] += 40
    assert domain.distance(far) > domain.threshold and domain.strangest(far) == domain_names()[3]


def results(auc, control, apart, ece=0.05, sites=((3, 2), (0, 4))):
    def value(triple):
        return dict(zip(("mean", "low", "high"), triple))

    scheme = {"x": {"auc": value(auc), "ece": {"mean": ece, "chance": 0.11}}, "control": {"auc": value(control)}}
    differences = {"control": value(apart)}
    sites = {str(k): dict(zip(("LGG", "HGG"), counts)) for k, counts in enumerate(sites)}
    return {"schemes": {"by-patient": scheme}, "differences": {"by-patient": differences}, "sites": sites}


@pytest.mark.parametrize(
    "given, reason",
    [
        (((0.9, 0.7, 1.0), (0.5, 0.3, 0.7), (0.4, 0.1, 0.7)), ""),
        (((0.9, 0.7, 1.0), (0.9, 0.7, 1.0), (0.0, -0.2, 0.2)), "with the tumour painted out"),
        (((0.6, 0.4, 0.8), (0.2, 0.1, 0.3), (0.4, 0.1, 0.7)), "chance is not excluded"),
        (((0.9, 0.7, 1.0), (0.5, 0.3, 0.7), (0.4, 0.1, 0.7), 0.2), "off by 0.20"),
        (((0.9, 0.7, 1.0), (0.5, 0.3, 0.7), (0.4, 0.1, 0.7), 0.05, ((3, 0), (0, 4))), "may tell hospitals apart"),
    ],
)
def test_verdict(given, reason):
    verdict, evidence = trainer.judge(results(*given), "by-patient", "x")
    assert verdict == ("experimental" if reason else "grade reading")
    assert reason in evidence.partition("Not a grade reading:")[2]
    assert f"{given[1][0]:.2f}" in evidence


def test_painting_out_leaves_no_tumour(make_pair):
    brain = standardise(make_pair())
    region = find_region(brain)
    painted = paint_out(brain, region, "x")
    from dataclasses import replace

    healthy = replace(brain, images=painted)
    assert not find_region(healthy).any()
    for name, image in painted.items():
        np.testing.assert_array_equal(image == 0, brain.images[name] == 0)
    scores = Reading.of(healthy, painted["t1ce"], region).features("t1ce")
    assert abs(scores[0]) < 0.3 and scores[2] < 0.05  # mean, bright fraction


# ------------------------------------------------------------------------------------------------ tables


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_tables(tmp_path):
    own = write(tmp_path / "a.csv", "case,grade,site\np1,LGG,x\np2,HGG,y\nms,,\n")
    assert read_table(own, ("LGG", "HGG")) == {"p1": (0, "x"), "p2": (1, "y"), "ms": (-1, "ms")}
    brats = write(
        tmp_path / "b.csv",
        "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID\n"
        "HGG,,,NA,BraTS19_CBICA_AAB_1\nLGG,,,NA,BraTS19_TCIA10_628_1\n",
    )
    assert read_table(brats, ("LGG", "HGG")) == {
        "BraTS19_CBICA_AAB_1": (1, "CBICA"),
        "BraTS19_TCIA10_628_1": (0, "TCIA10"),
    }
    assert institution("BraTS-GLI-00012-000") == "BraTS-GLI-00012-000"


@pytest.mark.parametrize(
    "text, message",
    [("case,grade\np1,WHO 2\n", "'WHO 2' is none of"), ("name,kind\np1,LGG\n", "case, grade, site"), (None, "cannot")],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    path = write(tmp_path / "t.csv", text) if text else tmp_path / "gone.csv"
    with pytest.raises(InputError, match=message):
        read_table(path, ("LGG", "HGG"))


# ------------------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_pair):
    """Twelve patients of four hospitals; high grade enhances. One without glioma."""
    folder = tmp_path_factory.mktemp("gliomas")
    rows = ["case,grade,site"]
    for k in range(12):
        side = 30 if k % 4 < 2 else -30
        pair = make_pair(seed=k, grade=(0.05, 0.6)[k % 2], radius=20 + k % 3, side=side, spacing=3.0)
        for name, volume in pair.items():
            (folder / f"p{k}").mkdir(exist_ok=True)
            write_volume(volume, folder / f"p{k}" / f"{name}.nii.gz")
        rows.append(f"p{k},{('LGG', 'HGG')[k % 2]},{'abcd'[k // 3]}")
    for name, volume in make_pair(seed=20, radius=0, spacing=3.0).items():
        (folder / "healthy").mkdir(exist_ok=True)
        write_volume(volume, folder / "healthy" / f"{name}.nii.gz")
    write(folder / "patients.csv", "\n".join([*rows, "healthy,,"]) + "\n")
    return folder


QUICK = ["training.seeds=[0]", "training.folds=3", "training.members=20", "model.inputs=[t1ce,fused]"]
QUICK += ["model.baselines=[[t1ce],[fused]]"]


@pytest.fixture
def quick(monkeypatch, averaging_engine):
    monkeypatch.setattr(trainer, "FusionEngine", lambda: averaging_engine)
    monkeypatch.setattr(trainer, "DRAWS", 100)
    monkeypatch.setattr(trainer, "PHANTOMS", 1)


def test_train_classifier(data, tmp_path, quick, capsys):
    for run in ("one", "two"):
        arguments = ["train-classifier", "glioma-grade", "--data", str(data), "-o", str(tmp_path / run), *QUICK]
        assert main(arguments) == 0, capsys.readouterr().err
    names = ("results.json", "predictions.csv", *(f"glioma-grade{end}" for end in (".safetensors", ".md", "-roc.png")))
    for file in names:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file

    found = json.loads((tmp_path / "one" / "results.json").read_text(encoding="utf-8"))
    assert found["patients"] == {"LGG": 6, "HGG": 6} and len(found["sites"]) == 4
    for scheme in ("leave-one-site-out", "by-patient"):
        models = found["schemes"][scheme]
        assert set(models) == {"t1ce+fused", "t1ce", "fused", "control"}
        assert models["t1ce+fused"]["auc"]["mean"] == 1.0
        assert models["control"]["auc"]["mean"] < 0.95
    assert {row["kind"] for row in found["negatives"]} == {"patient without glioma", "tumour painted out", "phantom"}
    assert all(row["abstention"] for row in found["negatives"])

    classifier = load_classifier(tmp_path / "one" / "glioma-grade.safetensors")
    assert classifier.info.verdict == found["verdict"] and classifier.info.evidence == found["evidence"]
    assert classifier.model.weights.shape[0] == 20
    with open(tmp_path / "one" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 12
    card = (tmp_path / "one" / "glioma-grade.md").read_text(encoding="utf-8")
    for words in ("Research use only", "control: tumour painted out", "Leave one site out", "0.790", "equally likely"):
        assert words in card


BAD = {
    "no such preset": (["nothing"], "unknown preset"),
    "unknown option": (["glioma-grade", "training.trees=3"], "unknown option training.trees"),
    "no such kind": (["glioma-grade", "model.kind=forest"], "not 'forest'"),
    "no such image": (["glioma-grade", "model.inputs=[t2]"], "not t2"),
    "no such fusion": (["glioma-grade", "data.fusion=nothing"], "no bundled model"),
    "no table": (["glioma-grade", "data.table=gone.csv"], "gone.csv: cannot be read"),
    "a grade nobody has": (["glioma-grade", "data.labels=[LGG, WHO4]"], "is none of LGG, WHO4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(data, tmp_path, capsys, case):
    arguments, message = BAD[case]
    assert main(["train-classifier", arguments[0], "--data", str(data), "-o", str(tmp_path), *arguments[1:]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("error: ")


def test_too_few_patients(data, tmp_path):
    table = write(tmp_path / "few.csv", "case,grade,site\np0,LGG,a\np1,HGG,a\n")
    with pytest.raises(InputError, match="fewer than 3 patients"):
        list_patients(data, ["t1ce", "flair"], table, ["LGG", "HGG"])


@pytest.mark.parametrize("kind", ["resnet50-2d", "resnet50-3d"])
def test_networks(make_pair, kind):
    """One short training: the loss falls, the seed decides, and what comes out is a model of the interface."""
    pytest.importorskip("monai")
    from ClinicalFMambaLib.training.classifier_networks import fit_networks

    labels = np.array([0, 1] * 4)
    readings = []
    for k, label in enumerate(labels):
        brain = standardise(make_pair(seed=k, grade=(0.05, 0.7)[label], spacing=3.0))
        readings.append(Reading.of(brain, brain.images["t1ce"], find_region(brain)))
    settings = trainer.TrainingOptions(epochs=1, batch=3, validation=0.25)
    dimension = int(kind[-2])
    fits = [fit_networks(readings, labels, dimension, "fused", 16, settings, {"accelerator": "cpu"}, 0) for _ in (0, 1)]
    logits = [fit.model.logits(readings[0]) for fit in fits]
    assert np.isfinite(logits[0]).all() and logits[0].shape == (1,)
    np.testing.assert_array_equal(logits[0], logits[1])
