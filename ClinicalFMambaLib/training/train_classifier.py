"""Train and judge a tumour classifier: nested cross-validation by patient and site, control, calibration, export."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import expit
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, StratifiedKFold

from ..errors import InputError
from ..files import replacing, write_text
from ..inference.classify import classify
from ..inference.engine import FusionEngine
from ..inference.tumour_features import Reading, domain_features, features
from ..inference.tumour_region import find_region, is_cut
from ..models.classifier import KINDS, Classifier, ClassifierInfo, Domain, FeatureModel, Model, save_classifier
from ..phantom import make_phantom
from ..pretrained import read_index
from ..volumes import read_volume
from . import preset_files
from .classifier_data import Patient, list_patients, load_patient
from .train import rank_zero_only

logger = logging.getLogger(__name__)

DRAWS = 1000
PHANTOMS = 5
# Bins of the expected calibration error.
BINS = 5
# Parts that the sites of the training patients are put into for the calibration, at most.
SITE_FOLDS = 20
# Each source, their plain average and the fused image: whether fusion helps.
BASELINES = (("t1ce",), ("flair",), ("average",), ("fused",))
# Share of the training patients' own left-out distances beyond which a case counts as unknown.
KNOWN = 90.0


@dataclass(frozen=True)
class ModelOptions:
    """Section ``model`` of a preset; see :class:`..models.classifier.ClassifierInfo`.

    Attributes:
        baselines: inputs of the other models that are judged in the same run, lists of images.
    """

    kind: str = "features"
    inputs: list = field(default_factory=lambda: ["t1ce.bright", "t1ce.dark"])
    crop: int = 48
    baselines: list = field(default_factory=lambda: [list(names) for names in BASELINES])

    def __post_init__(self):
        for names in (self.inputs, *self.baselines):
            ClassifierInfo("", self.kind, tuple(names), self.crop)


@dataclass(frozen=True)
class DataOptions:
    """Section ``data`` of a preset.

    Attributes:
        sources: names of T1ce and FLAIR in the case folders, in this order.
        table: CSV with the columns case, grade, site; relative to the data folder, or absolute.
        labels: the two grades.
        segmentation: name of the readers' segmentation in the case folders, ``""`` for none.
        fusion: bundled fusion model that makes the fused images.
        negatives: CSV with the columns name, t1ce, flair of volumes without glioma; ``""`` for none.
    """

    sources: list = field(default_factory=lambda: ["t1ce", "flair"])
    table: str = "patients.csv"
    labels: list = field(default_factory=lambda: ["LGG", "HGG"])
    segmentation: str = "seg"
    fusion: str = "mri-mri-3d"
    negatives: str = ""

    def __post_init__(self):
        if len(self.sources) != 2 or len(self.labels) != 2:
            raise InputError("data.sources and data.labels need two names each")
        if self.fusion not in read_index():
            raise InputError(f"data.fusion={self.fusion} is no bundled model; there are {', '.join(read_index())}")


@dataclass(frozen=True)
class TrainingOptions:
    """Section ``training`` of a preset.

    Attributes:
        seeds: one repetition of the cross-validation for each.
        folds: of the outer and of the inner cross-validation by patient.
        schemes: ``leave-one-site-out`` and ``by-patient``, or one of them.
        members: bootstrap samples, or networks, of the exported classifier.
        penalties: inverse L2 penalties among which the inner folds choose, for ``features``.
        gamma: of the focal loss (Lin et al., ICCV 2017); lr, weight_decay: of AdamW; batch: patients of a step;
            epochs: at most; patience: epochs without a better validation loss before the training stops;
            validation: share of the training patients held back for that; precision: of Lightning.
    """

    seeds: list = field(default_factory=lambda: [0, 1, 2])
    folds: int = 5
    schemes: list = field(default_factory=lambda: ["leave-one-site-out", "by-patient"])
    members: int = 200
    penalties: list = field(default_factory=lambda: [0.01, 0.1, 1.0])
    gamma: float = 2.0
    lr: float = 1e-4
    weight_decay: float = 1e-2
    batch: int = 8
    epochs: int = 60
    patience: int = 10
    validation: float = 0.2
    precision: str = "32-true"

    def __post_init__(self):
        known = ("leave-one-site-out", "by-patient")
        if not self.schemes or any(scheme not in known for scheme in self.schemes):
            raise InputError(f"training.schemes={self.schemes} should name {' and '.join(known)}")
        if self.folds < 2 or self.members < 1 or not self.seeds or not self.penalties:
            raise InputError("training.folds must be 2 or more, members 1 or more, seeds and penalties not empty")
        if min(self.lr, self.batch, self.epochs, self.patience) <= 0 or not 0 < self.validation < 1:
            raise InputError("training.lr, batch, epochs, patience must be positive, validation between 0 and 1")


SECTIONS = {"model": ModelOptions, "data": DataOptions, "training": TrainingOptions}


def list_presets() -> list[str]:
    """Names of the presets that come with the package."""
    return preset_files.list_presets("classifier_presets")


def load_preset(name: str, overrides: Sequence[str] = ()) -> dict:
    """A preset by name, or from a path that ends with .yaml, with ``section.key=value`` overrides.

    Besides :data:`SECTIONS` there is ``trainer``, options of Lightning's Trainer for the networks, and ``card``, what
    the model card says beside what was measured.

    Raises:
        InputError: no such preset, section or key, a value of the wrong kind, or text that is not YAML.
    """
    preset = preset_files.load_sections("classifier_presets", name, overrides, [*SECTIONS, "trainer", "card"])
    read_preset(preset)
    return preset


def read_preset(preset: dict) -> tuple[ModelOptions, DataOptions, TrainingOptions]:
    """The sections of a preset, checked; raises :class:`InputError`."""
    return tuple(preset_files.read_section(cls, section, preset[section]) for section, cls in SECTIONS.items())


# ---------------------------------------------------------------------------------------------- one model


@dataclass(frozen=True)
class Fitted:
    """A model trained on some patients, and its calibration.

    Attributes:
        slope, intercept: of the logit, for even odds of the labels.
    """

    model: Model
    slope: float
    intercept: float

    def score(self, reading: Reading) -> float:
        """Calibrated logit, without the prevalence of the training patients: it says nothing about another site."""
        return self.slope * float(self.model.logits(reading)[0]) + self.intercept


# Of readings, labels, sites, a seed and the number of members.
Fit = Callable[[Sequence[Reading], np.ndarray, np.ndarray, int, int], Fitted]


def fit_features(
    readings: Sequence[Reading], labels: np.ndarray, sites: np.ndarray, inputs: tuple[str, ...],
    settings: TrainingOptions, seed: int, members: int = 1,
) -> Fitted:  # fmt: skip
    """Logistic regression whose penalty and calibration come from inner folds of these patients alone.

    The penalty comes from folds by patient. The calibration comes from folds that leave whole sites out where each
    grade is at several, since a user's hospital is another one, too.

    Args:
        members: the fit on all patients, then this many less one on bootstrap samples of them.
    """
    x = np.array([features(reading, inputs) for reading in readings])
    folds = _folds(labels, settings.folds, seed)
    outside = {penalty: _left_out_logits(x, labels, folds, penalty) for penalty in settings.penalties}
    weights = even_weights(labels)
    losses = {p: log_loss(labels, expit(z), sample_weight=weights) for p, z in outside.items()}
    best = min(losses, key=losses.get)
    mean, scale = _standard(x)
    samples = [np.arange(len(labels))]
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == k) for k in (0, 1)]
    samples += [np.concatenate([rng.choice(g, len(g)) for g in groups]) for _ in range(members - 1)]
    fits = [_logistic(x[s], labels[s], mean, scale, best) for s in samples]
    model = FeatureModel(
        tuple(inputs), mean, scale, np.array([f.coef_[0] for f in fits]), np.array([f.intercept_[0] for f in fits])
    )
    by_site = _site_folds(labels, sites)
    left_out = _left_out_logits(x, labels, by_site, best) if by_site else outside[best]
    return Fitted(model, *calibrate(left_out, labels))


def _left_out_logits(x, labels, folds, penalty: float) -> np.ndarray:
    logits = np.zeros(len(labels))
    for train, test in folds:
        mean, scale = _standard(x[train])
        logits[test] = _logistic(x[train], labels[train], mean, scale, penalty).decision_function(
            (x[test] - mean) / scale
        )
    return logits


def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.maximum(x.std(0), 1e-6)


def _logistic(x, labels, mean, scale, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000).fit((x - mean) / scale, labels)


def calibrate(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept for logits of patients that the model has not seen, both labels weighing the same.

    A slope below zero means that nothing was learned; it becomes 0, and every patient the same.

    Source: Platt, Advances in Large Margin Classifiers, 1999; with a weak L2 penalty, which few patients need.
    """
    spread = max(float(np.std(logits)), 1e-6)
    fit = LogisticRegression(C=1.0, class_weight="balanced").fit(logits[:, None] / spread, labels)
    slope = float(fit.coef_[0, 0]) / spread
    return (slope, float(fit.intercept_[0])) if slope > 0 else (0.0, 0.0)


def _folds(labels: np.ndarray, count: int, seed: int):
    count = min(count, int(np.bincount(labels, minlength=2).min()))
    if count < 2:
        raise InputError("a fold has a single patient of one grade; use more patients or fewer folds")
    return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels))


def _site_folds(labels: np.ndarray, sites: np.ndarray) -> list:
    """Each leaves one site out, or several of many; empty where a grade would be left out altogether."""
    count = min(len(set(sites)), SITE_FOLDS)
    folds = list(GroupKFold(count).split(labels, labels, sites)) if count > 1 else []
    return folds if all(len(set(labels[train])) == 2 for train, _ in folds) else []


# --------------------------------------------------------------------------------------- cross-validation


@dataclass(frozen=True)
class Judged:
    """Held-out predictions of one model under one scheme.

    Attributes:
        scores: (seeds, patients), logits for even odds of the labels.
    """

    scores: np.ndarray
    labels: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """(seeds, patients) of the second label, for even odds."""
        return expit(self.scores)

    def auc(self, sample=slice(None)) -> float:
        """Mean over the seeds."""
        return float(np.mean([area_under_curve(s[sample], self.labels[sample]) for s in self.scores]))

    def summary(self, draws: Sequence[np.ndarray]) -> dict:
        """AUC, F1, ECE and Brier score, means over the seeds, each with a 95 % bootstrap interval over patients."""
        found = {}
        for name, measure in (("auc", self.auc), ("f1", self._f1), ("ece", self._ece), ("brier", self._brier)):
            low, high = np.percentile([measure(sample) for sample in draws], (2.5, 97.5))
            found[name] = {"mean": measure(slice(None)), "low": float(low), "high": float(high)}
        found["ece"] |= self.chance_error(len(draws))
        return found

    def chance_error(self, draws: int) -> dict[str, float]:
        """ECE that a model with these probabilities has by chance where all of them are right: mean and 95 % limit.

        Labels are drawn from the probabilities at the prevalence of these patients, as many times, and weighed evenly.
        """
        rng = np.random.default_rng(0)
        odds = np.log((self.labels == 1).sum() / (self.labels == 0).sum())
        errors = []
        for _ in range(draws):
            draw = rng.random(len(self.labels))
            labels = (draw < expit(self.scores + odds)).astype(int)
            errors.append(
                np.mean([calibration_error(p, y, even_weights(y)) for p, y in zip(self.probabilities, labels)])
            )
        return {"chance": float(np.mean(errors)), "chance_high": float(np.percentile(errors, 95))}

    def _f1(self, sample) -> float:
        return float(np.mean([f1(p[sample] >= 0.5, self.labels[sample]) for p in self.probabilities]))

    def _ece(self, sample) -> float:
        labels = self.labels[sample]
        weights = even_weights(labels)
        return float(np.mean([calibration_error(p[sample], labels, weights) for p in self.probabilities]))

    def _brier(self, sample) -> float:
        errors = np.mean((self.probabilities[:, sample] - self.labels[sample]) ** 2, axis=0)
        return float(errors @ even_weights(self.labels[sample]))


def even_weights(labels: np.ndarray) -> np.ndarray:
    """Weights of the patients, of sum 1, that make both labels weigh the same, as probabilities for even odds need."""
    weights = 1 / np.bincount(labels)[labels]
    return weights / weights.sum()


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC: how often a patient with the second label has the higher score, ties counting half.

    Scikit-learn's takes fifty times longer, which the bootstrap cannot afford; checked against it in a test.
    """
    others, own = np.sort(scores[labels == 0]), scores[labels == 1]
    below, not_above = (np.searchsorted(others, own, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(others))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 score of the second label; checked against scikit-learn in a test."""
    right = int((predicted & (labels == 1)).sum())
    return 2 * right / max(1, int(predicted.sum()) + int((labels == 1).sum()))


def reliability(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(3, bins): mean probability, observed share of the second label and weight of :data:`BINS` bins of equal width.

    Empty bins are left out.

    Args:
        weights: of the patients, of sum 1, see :func:`even_weights`.
    """
    index = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    sums = np.array([np.bincount(index, weights * x, BINS) for x in (probabilities, labels, np.ones(len(labels)))])
    predicted, observed, weight = sums[:, sums[2] > 0]
    return np.array([predicted / weight, observed / weight, weight])


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error (Guo et al., ICML 2017); checked against torchmetrics. See :func:`reliability`."""
    predicted, observed, weight = reliability(probabilities, labels, weights)
    return float(weight @ np.abs(predicted - observed))


def cross_validate(fit: Fit, readings, labels, sites, scheme: str, settings: TrainingOptions) -> Judged:
    """Predict each patient by a model that has not seen it, nor, leaving sites out, any of its hospital."""
    scores = []
    for seed in settings.seeds:
        if scheme == "leave-one-site-out":
            folds = list(LeaveOneGroupOut().split(labels, labels, sites))
        else:
            folds = _folds(labels, settings.folds, seed)
        score = np.zeros(len(labels))
        for train, test in folds:
            fitted = fit([readings[k] for k in train], labels[train], sites[train], seed, 1)
            score[test] = [fitted.score(readings[k]) for k in test]
        scores.append(score)
    return Judged(np.array(scores), labels)


def bootstrap(labels: np.ndarray, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Indices of patients drawn with replacement, each label as often as it is there."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == k) for k in (0, 1)]
    return [np.concatenate([rng.choice(group, len(group)) for group in groups]) for _ in range(draws)]


def difference(a: Judged, b: Judged, draws: Sequence[np.ndarray]) -> dict:
    """AUC of ``a`` minus that of ``b`` on the same patients, with a 95 % bootstrap interval."""
    low, high = np.percentile([a.auc(sample) - b.auc(sample) for sample in draws], (2.5, 97.5))
    return {"mean": a.auc() - b.auc(), "low": float(low), "high": float(high)}


# ------------------------------------------------------------------------------------------------ domain


def fit_domain(values: np.ndarray) -> Domain:
    """Mean and shrunk covariance (Ledoit and Wolf 2004) of domain features (N, 7), and the distance limit."""
    return Domain(*_gaussian(values), float(np.percentile(left_out_distances(values), KNOWN)))


def left_out_distances(values: np.ndarray) -> np.ndarray:
    """(N,) squared distance of each patient from the others."""
    others = ~np.eye(len(values), dtype=bool)
    return np.array([Domain(*_gaussian(values[keep]), 0.0).distance(v) for keep, v in zip(others, values)])


def _gaussian(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, scale = _standard(values)
    precision = LedoitWolf(assume_centered=True).fit((values - mean) / scale).precision_
    return mean, precision / np.outer(scale, scale)


# --------------------------------------------------------------------------------------------------- run


def train_classifier(preset: dict, name: str, data: Path, out: Path) -> Path:
    """Judge the preset's model and its baselines and controls, then train it on all patients and export it.

    Writes to ``out``: NAME.safetensors, results.json, predictions.csv, the card NAME.md with its plots, and a cache of
    the prepared patients. The same call on the same data gives the same files.

    Raises:
        InputError: data or settings that cannot be used.
    """
    from .classifier_report import write_report

    model, source, settings = read_preset(preset)
    fusion = {"name": source.fusion, "sha256": read_index()[source.fusion]["sha256"]}
    entries = list_patients(data, source.sources, Path(data) / source.table, source.labels)
    engine = FusionEngine()
    if rank_zero_only.rank:  # one process speaks for all
        logging.getLogger("ClinicalFMambaLib").setLevel(logging.ERROR)
    everybody = []
    for k, entry in enumerate(entries):
        logger.info("preparing %s (%d of %d)", entry.case.name, k + 1, len(entries))
        everybody.append(load_patient(entry, engine, fusion, source.segmentation, out / "cache"))
    unfound = [p.name for p in everybody if p.label >= 0 and not p.reading.region.any()]
    patients = [p for p in everybody if p.label >= 0 and p.reading.region.any()]
    labels, sites = np.array([p.label for p in patients]), np.array([p.site for p in patients])
    readings, controls = [p.reading for p in patients], [p.control for p in patients]
    draws = bootstrap(labels, DRAWS)

    main = tuple(model.inputs)
    sets = [main, *(tuple(names) for names in model.baselines if tuple(names) != main)]
    judged: dict[str, dict[str, Judged]] = {}
    for scheme in settings.schemes:
        judged[scheme] = {}
        for inputs in sets:
            logger.info("%s: %s", scheme, "+".join(inputs))
            judged[scheme]["+".join(inputs)] = cross_validate(
                _fitter(model, inputs, settings, preset["trainer"]), readings, labels, sites, scheme, settings
            )
        logger.info("%s: control, tumour painted out", scheme)
        fit = _fitter(model, main, settings, preset["trainer"])
        judged[scheme]["control"] = cross_validate(fit, controls, labels, sites, scheme, settings)

    domain_values = np.array([domain_features(r) for r in readings])
    domain = fit_domain(domain_values)
    fit = _fitter(model, main, settings, preset["trainer"])
    fitted = fit(readings, labels, sites, settings.seeds[0], settings.members)
    path = out / f"{name}.safetensors"
    if rank_zero_only.rank:
        return path
    results = {
        "name": name,
        "preset": preset,
        "fusion": fusion,
        "patients": {label: int((labels == k).sum()) for k, label in enumerate(source.labels)},
        "sites": {site: _count_labels(labels[sites == site], source.labels) for site in sorted(set(sites))},
        "unfound": unfound,
        "dice": {p.name: p.dice for p in patients},
        "schemes": {s: {m: j.summary(draws) for m, j in by.items()} for s, by in judged.items()},
        "differences": {
            scheme: {m: difference(by["+".join(main)], j, draws) for m, j in by.items() if m != "+".join(main)}
            for scheme, by in judged.items()
        },
        "known": _known(domain_values, sites),
        "right": _right(judged[settings.schemes[0]]["+".join(main)], sites),
    }
    first = settings.schemes[0]
    verdict, evidence = judge(results, first, "+".join(main))
    info = ClassifierInfo(
        name=name,
        kind=model.kind,
        inputs=main,
        crop=0 if model.kind == "features" else model.crop,
        labels=tuple(source.labels),
        fusion=fusion if any(name.startswith("fused") for name in main) else {},
        slope=fitted.slope,
        intercept=fitted.intercept,
        patients=results["patients"],
        sites=len(results["sites"]),
        verdict=verdict,
        evidence=evidence,
    )
    classifier = Classifier(info, fitted.model, domain)
    save_classifier(classifier, path)
    results["negatives"] = _negatives(classifier, path, engine, everybody, source, Path(data))
    results |= {"verdict": verdict, "evidence": evidence, "main": "+".join(main), "scheme": first}
    _write_predictions(out / "predictions.csv", patients, judged)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_report(out, results, judged)
    return path


def _fitter(model: ModelOptions, inputs: tuple[str, ...], settings: TrainingOptions, trainer: dict) -> Fit:
    if model.kind == "features":
        return lambda readings, labels, sites, seed, members: fit_features(
            readings, labels, sites, inputs, settings, seed, members
        )
    from .classifier_networks import fit_networks

    dimension = 2 if model.kind == KINDS[1] else 3
    return lambda readings, labels, sites, seed, members: fit_networks(
        readings, labels, dimension, inputs[0], model.crop, settings, trainer, seed, members
    )


def judge(results: dict, scheme: str, main: str) -> tuple[str, str]:
    """The verdict on a classifier and the sentences that support it.

    It is a grade reading only if, however the patients were held out, its AUC is above chance and above the control's
    with 95 % confidence, and its probabilities on held-out patients are right within 0.1 (expected calibration error);
    and if some site has patients of both grades, without which nothing shows that it does not tell the sites apart.

    Args:
        scheme: the one that the evidence quotes.
    """
    auc, control = (results["schemes"][scheme][m]["auc"] for m in (main, "control"))
    words = {"leave-one-site-out": "hospitals it never saw", "by-patient": "patients it never saw"}
    evidence = (
        f"On {words[scheme]} its AUC is {_value(auc)}; with the tumour painted out the same method reaches"
        f" {_value(control)}."
    )
    reasons = []
    for name, by in results["schemes"].items():
        where = f"on {words[name]}"
        if by[main]["auc"]["low"] <= 0.5:
            reasons.append(f"chance is not excluded {where}")
        if results["differences"][name]["control"]["low"] <= 0:
            reasons.append(f"it is not clearly better than with the tumour painted out {where}")
        if (ece := by[main]["ece"])["mean"] > 0.1:
            reasons.append(
                f"its probabilities are off by {ece['mean']:.2f} {where} ({ece['chance']:.2f} would be chance)"
            )
    if not any(min(counts.values()) for counts in results["sites"].values()):
        reasons.append("no hospital has patients of both grades, so it may tell hospitals apart and not grades")
    if not reasons:
        return "grade reading", evidence
    return "experimental", f"{evidence} Not a grade reading: {'; '.join(reasons)}."


def _value(x: dict) -> str:
    return f"{x['mean']:.2f} ({x['low']:.2f} to {x['high']:.2f})"


def _count_labels(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    return {name: int((labels == k).sum()) for k, name in enumerate(names)}


def _known(values: np.ndarray, sites: np.ndarray) -> dict:
    """How many glioma patients of hospitals that were left out count as known."""
    known = 0
    for train, test in LeaveOneGroupOut().split(values, groups=sites):
        domain = fit_domain(values[train])
        known += sum(domain.distance(v) <= domain.threshold for v in values[test])
    return {"known": int(known), "patients": len(values)}


def _right(judged: Judged, sites: np.ndarray) -> dict[str, str]:
    """For each site how many of its held-out patients fall on the right side of one half, in the first seed."""
    right = (judged.probabilities[0] >= 0.5) == judged.labels
    return {site: f"{int(right[sites == site].sum())} of {int((sites == site).sum())}" for site in sorted(set(sites))}


def _negatives(classifier: Classifier, path: Path, engine, everybody: Sequence[Patient], source, data: Path) -> list:
    """What the classifier says to volumes without glioma: name, kind and abstention, ``""`` where it gave a reading."""
    found = []
    for patient in everybody:
        if patient.label < 0:
            found.append((patient.name, "patient without glioma", _abstention(classifier, patient.reading)))
        else:
            brain = patient.control.brain
            reading = Reading(brain, patient.control.images, find_region(brain))
            found.append((patient.name, "tumour painted out", _abstention(classifier, reading)))
    for seed in range(PHANTOMS):
        phantom = make_phantom(96, seed=seed, tumour=False)
        answer = classify(engine, phantom["T1"], phantom["FLAIR"], str(path), sequences=("t1ce", "flair"))
        found.append((f"phantom without tumour, seed {seed}", "phantom", answer.abstention))
    if source.negatives:
        with open(data / source.negatives, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                pair = (read_volume(data / row["t1ce"], "MR"), read_volume(data / row["flair"], "MR"))
                answer = classify(engine, *pair, str(path), sequences=("t1ce", "flair"))
                found.append((row["name"], "other volume", answer.abstention))
    return [{"name": n, "kind": k, "abstention": a} for n, k, a in found]


def _abstention(classifier: Classifier, reading: Reading) -> str:
    if not reading.region.any():
        return "no tumour was found"
    if is_cut(reading.brain, reading.region):
        return "cut by the field of view"
    distance, strangest = classifier.distance(reading)
    return "" if distance <= classifier.domain.threshold else f"outside what it has seen, most by {strangest}"


def _write_predictions(path: Path, patients: Sequence[Patient], judged: dict) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["scheme", "model", "seed", "case", "site", "label", "score", "probability"])
        for scheme, models in judged.items():
            for model, j in models.items():
                for seed, (scores, probabilities) in enumerate(zip(j.scores, j.probabilities)):
                    for patient, s, p in zip(patients, scores, probabilities):
                        row = [scheme, model, seed, patient.name, patient.site, patient.label]
                        writer.writerow([*row, f"{s:.6f}", f"{p:.6f}"])
