"""Metrics against golden values of other implementations, their definitions and their edge cases."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from scipy import ndimage
from torchmetrics.functional.image import peak_signal_noise_ratio

from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.evaluation.metrics import METRICS, _edge_map, evaluate_all, fmi, nabf, qabf, source_shares, vif

# PSNR, SSIM, MS-SSIM, FSIM, VIF: piq 0.8.0 in float64 (ssim with downsample=False, fsim with chromatic=False), mean
# over the two sources, for VIF the sum. SCD, QABF, NABF, FMI-pixel: MetricsLab (github.com/CharlesShan-hub/MetricsLab,
# 777ee54), which follows the authors' MATLAB code. Inputs: images() below; without background for FMI-pixel, as
# MetricsLab does not treat equal windows apart.
GOLDEN = [
    # metric, shape, seed, background, value
    ("FSIM", (96, 120), 1, True, 0.690554224),
    ("VIF", (96, 120), 1, True, 0.148837586),
    ("SSIM", (96, 120), 1, True, 0.385167017),
    ("PSNR", (96, 120), 1, True, 13.7201299),
    ("SCD", (96, 120), 1, True, 1.09651777),
    ("QABF", (96, 120), 1, True, 0.241252199),
    ("NABF", (96, 120), 1, True, 0.0389533161),
    ("FSIM", (97, 111), 2, True, 0.685306593),
    ("VIF", (97, 111), 2, True, 0.175182976),
    ("SSIM", (97, 111), 2, True, 0.388851584),
    ("PSNR", (97, 111), 2, True, 14.2344224),
    ("SCD", (97, 111), 2, True, 1.01229335),
    ("QABF", (97, 111), 2, True, 0.264280893),
    ("NABF", (97, 111), 2, True, 0.0320986378),
    ("FSIM", (192, 208), 3, True, 0.720912185),
    ("VIF", (192, 208), 3, True, 0.173198034),
    ("SSIM", (192, 208), 3, True, 0.393708688),
    ("MS-SSIM", (192, 208), 3, True, 0.500089905),
    ("PSNR", (192, 208), 3, True, 14.5137415),
    ("SCD", (192, 208), 3, True, 1.09956606),
    ("QABF", (192, 208), 3, True, 0.253504636),
    ("NABF", (192, 208), 3, True, 0.0375451677),
    ("FMI-pixel", (48, 52), 4, False, 0.371885952),
    ("SCD", (48, 52), 4, False, 0.803322844),
    ("QABF", (48, 52), 4, False, 0.353143789),
    ("NABF", (48, 52), 4, False, 0.0504697817),
]
# piq adds an epsilon of 1e-8 to the error.
TOLERANCE = {"PSNR": 1e-5, "FSIM": 2e-6, "VIF": 2e-6, "SSIM": 1e-8, "MS-SSIM": 1e-6}


def images(shape=(96, 120), seed=1, background=True):
    """Fused image and two sources, in 256 grey levels; with background each source is empty in one strip."""
    rng = np.random.default_rng(seed)
    smooth = []
    for sigma in (1.0, 2.0, 1.5):
        image = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
        smooth.append((image - image.min()) / (image.max() - image.min()))
    a, b, noise = smooth
    if background:
        b[: shape[0] // 4] = 0
        a[:, : shape[1] // 4] = 0
    fused = np.clip(0.6 * a + 0.3 * b + 0.6 * (noise - 0.5), 0, 1)
    return tuple(np.rint(image * 255) / 255 for image in (fused, a, b))


def volume(slices: int):
    return tuple(np.stack(each) for each in zip(*[images((48, 52), seed) for seed in range(slices)], strict=True))


@pytest.mark.parametrize(("name", "shape", "seed", "background", "expected"), GOLDEN)
def test_golden(name, shape, seed, background, expected):
    value = METRICS[name].function(*images(shape, seed, background))
    assert value == pytest.approx(expected, abs=TOLERANCE.get(name, 1e-7))


def test_grey_level_metrics_by_hand():
    """A 2 x 4 image of the levels 0 and 255; source a the same, source b constant."""
    a = np.array([[0, 1, 0, 1], [0, 1, 0, 1]], float)
    values = evaluate_all(a, a, np.zeros_like(a), ["EN", "MI", "SD", "SF", "AG", "SCD", "PSNR"])
    assert values["EN"] == pytest.approx(1)
    assert values["MI"] == pytest.approx(1)
    assert values["SD"] == pytest.approx(127.5)
    assert values["SF"] == pytest.approx(255)
    # Central differences are 0 inside and 1 at both ends of each row.
    assert values["AG"] == pytest.approx(255 * 4 * np.sqrt(0.5) / 3)
    assert values["SCD"] == pytest.approx(1)
    assert values["PSNR"] == pytest.approx((100 + 10 * np.log10(2)) / 2)


def entropy(counts):
    p = np.array(list(counts)) / sum(counts)
    return -sum(p * np.log2(p))


def reference_en(fused, *_):
    return entropy(Counter(np.rint(fused * 255).ravel().tolist()).values())


def reference_mi(fused, a, b):
    f, *sources = [np.rint(image * 255).ravel().tolist() for image in (fused, a, b)]
    one = [entropy(Counter(x).values()) for x in (f, *sources)]
    return sum(one[0] + own - entropy(Counter(zip(f, x)).values()) for own, x in zip(one[1:], sources))


def reference_sd(fused, *_):
    return statistics.pstdev((fused * 255).ravel().tolist())


def reference_sf(fused, *_):
    h, w = fused.shape
    rows = [(fused[y, x] - fused[y, x - 1]) ** 2 for y in range(h) for x in range(1, w)]
    columns = [(fused[y, x] - fused[y - 1, x]) ** 2 for y in range(1, h) for x in range(w)]
    return 255 * math.sqrt(sum(rows) / len(rows) + sum(columns) / len(columns))


def reference_ag(fused, *_):
    h, w = fused.shape

    def slope(values, k):
        first, last = max(k - 1, 0), min(k + 1, len(values) - 1)
        return (values[last] - values[first]) / (last - first)

    terms = [math.hypot(slope(fused[y], x), slope(fused[:, x], y)) / math.sqrt(2) for y in range(h) for x in range(w)]
    return 255 * sum(terms) / ((h - 1) * (w - 1))


def reference_fmi(fused, a, b):
    """Fast-FMI of MATLAB's Sobel edge maps, from its definition, a window at a time."""
    edges = [reference_edges(np.rint(image * 255)) for image in (fused, a, b)]
    h, w = fused.shape
    values = []
    for source in edges[1:]:
        for y in range(1, h - 1):
            for x in range(1, w - 1):
                p, q = (e[y - 1 : y + 2, x - 1 : x + 2].T.ravel() for e in (edges[0], source))
                values.append(1.0 if (p == q).all() else window_information(p, q))
    return np.mean(values)


def reference_edges(image):
    padded = np.pad(image, 1, mode="edge")
    smooth, slope = (1, 2, 1), (-1, 0, 1)
    h, w = image.shape
    gx, gy = np.zeros((h, w)), np.zeros((h, w))
    for y, x, i, j in itertools.product(range(h), range(w), range(3), range(3)):
        gx[y, x] += smooth[i] * slope[j] * padded[y + i, x + j] / 8
        gy[y, x] += slope[i] * smooth[j] * padded[y + i, x + j] / 8
    strength = gx**2 + gy**2
    threshold = 4 * strength.mean()
    edges = np.zeros((h, w))
    for y, x in itertools.product(range(h), range(w)):
        left, right = strength[y, max(x - 1, 0)], strength[y, min(x + 1, w - 1)]
        above, below = strength[max(y - 1, 0), x], strength[min(y + 1, h - 1), x]
        here, across, down = strength[y, x], abs(gx[y, x]), abs(gy[y, x])
        peak = (across >= down and left <= here > right) or (down >= across and above <= here > below)
        edges[y, x] = here > threshold and peak
    return edges


def window_information(p, q):
    distributions = []
    for values in (p, q):
        spread = values.max() - values.min()
        values = (values - values.min()) / spread if spread else np.ones(9)
        distributions.append(values / values.sum())
    p, q = distributions
    place = np.arange(1, 10)
    deviation = [math.sqrt(max(sum(d * place**2) - sum(d * place) ** 2, 0)) for d in (p, q)]
    correlation = 0.0 if np.ptp(p) == 0 or np.ptp(q) == 0 else np.corrcoef(p, q)[0, 1]
    if correlation >= 0:
        bound = [[min(p[: i + 1].sum(), q[: j + 1].sum()) for j in range(9)] for i in range(9)]
    else:
        bound = [[max(p[: i + 1].sum() + q[: j + 1].sum() - 1, 0) for j in range(9)] for i in range(9)]
    # Hoeffding: the covariance is the sum of the cumulative distributions' difference
    cells = itertools.product(range(9), range(9))
    covariance = sum(bound[i][j] - p[: i + 1].sum() * q[: j + 1].sum() for i, j in cells)
    usable = deviation[0] * deviation[1] > 1e-12 and abs(covariance) > 1e-12
    mixing = correlation * deviation[0] * deviation[1] / covariance if usable else 0.0
    information = 0.0
    for i, j in itertools.product(range(9), range(9)):
        cell = bound[i][j] - (bound[i - 1][j] if i else 0) - (bound[i][j - 1] if j else 0)
        cell += bound[i - 1][j - 1] if i and j else 0
        joint = mixing * cell + (1 - mixing) * p[i] * q[j]
        information += joint * math.log2(abs(joint)) if joint else 0
    marginal = [-sum(d[d > 0] * np.log2(d[d > 0])) for d in (p, q)]
    return 2 * (sum(marginal) + information) / sum(marginal) if sum(marginal) > 0 else 0.0


@pytest.mark.parametrize("name", ["EN", "MI", "SD", "SF", "AG", "FMI"])
@pytest.mark.parametrize(("seed", "background"), [(6, True), (7, False)])
def test_plain_loops_give_the_same(name, seed, background):
    arrays = images((24, 31), seed, background)
    expected = globals()[f"reference_{name.lower()}"](*arrays)
    assert METRICS[name].function(*arrays) == pytest.approx(expected, abs=1e-9)


def test_volumes_agree_with_other_packages():
    """MONAI in float32; torchmetrics 1.9 gives other values for volumes than the definition does."""
    fused, a, b = (ndimage.gaussian_filter(array[:, :44, :44], (1.5, 0, 0)) for array in volume(44))
    tensors = [torch.from_numpy(array)[None, None].float() for array in (fused, a, b)]
    window = {"spatial_dims": 3, "data_range": 1.0}
    weights = np.array([0.0448, 0.2856, 0.3001])
    ssim = SSIMMetric(win_size=11, kernel_sigma=1.5, **window)
    ms_ssim = MultiScaleSSIMMetric(kernel_size=11, kernel_sigma=1.5, weights=tuple(weights / weights.sum()), **window)
    expected = {
        "PSNR": [float(peak_signal_noise_ratio(tensors[0], source, data_range=1.0)) for source in tensors[1:]],
        "SSIM": [float(ssim(tensors[0], source)) for source in tensors[1:]],
        "MS-SSIM": [float(ms_ssim(tensors[0], source)) for source in tensors[1:]],
    }
    for name, values in expected.items():
        assert METRICS[name].function(fused, a, b) == pytest.approx(np.mean(values), abs=1e-4), name
    correlations = [np.corrcoef((fused - x).ravel(), y.ravel())[0, 1] for x, y in ((b, a), (a, b))]
    assert METRICS["SCD"].function(fused, a, b) == pytest.approx(sum(correlations), abs=1e-9)
    assert METRICS["MI"].function(fused, a, b) == pytest.approx(reference_mi(fused, a, b), abs=1e-9)


def test_edges_for_fmi_are_thin():
    step = np.zeros((20, 20), np.int64)
    step[:, 10:] = 200
    edges = _edge_map(step)
    assert edges.sum(axis=1).tolist() == [1] * 20
    assert not _edge_map(np.full((8, 8), 7)).any()


def test_fmi_of_windows():
    """Equal windows count 1; a fused image without structure shares nothing with a structured window."""
    _, a, b = images((40, 40), 5, background=False)
    assert fmi(a, a, a) == fmi(a, a, a, feature="pixel") == 1
    assert fmi(a, a, b, feature="pixel") == fmi(a, b, a, feature="pixel")
    flat = np.full_like(a, 0.5)
    assert fmi(flat, a, b, feature="pixel") < 1e-9


@pytest.mark.parametrize("name", METRICS)
def test_symmetric_in_the_sources(name):
    fused, a, b = images()
    assert METRICS[name].function(fused, a, b) == pytest.approx(METRICS[name].function(fused, b, a), rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_data_range_scales(name):
    fused, a, b = images()
    scaled = METRICS[name].function(*(np.rint(image * 255).astype(np.uint8) for image in (fused, a, b)), data_range=255)
    assert scaled == pytest.approx(METRICS[name].function(fused, a, b), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.higher_is_better and name != "MI"])
def test_both_sources_beat_noise(name):
    """A mean of the two sources scores better than the same with strong noise."""
    _, a, b = images()
    good = (a + b) / 2
    bad = np.clip(good + np.random.default_rng(0).normal(0, 0.2, good.shape), 0, 1)
    assert METRICS[name].function(good, a, b) > METRICS[name].function(bad, a, b)


def test_artefacts():
    _, a, b = images()
    assert nabf(a, a, b) == 0
    rounding = np.nextafter(a.astype(np.float32), 1)
    assert nabf(rounding, a, b) == 0
    noisy = np.clip(a + np.random.default_rng(0).normal(0, 0.2, a.shape), 0, 1)
    assert nabf(noisy, a, b) > 0.05


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if not metric.native_3d])
def test_slice_wise(name):
    """The mean over the slices with content; an empty slice changes nothing."""
    fused, a, b = volume(3)
    function = METRICS[name].function
    expected = np.mean([function(*slices) for slices in zip(fused, a, b, strict=True)])
    padded = [np.concatenate([array, np.zeros((1, *array.shape[1:]))]) for array in (fused, a, b)]
    assert function(fused, a, b) == pytest.approx(expected)
    assert function(*padded) == pytest.approx(expected)
    assert np.isnan(function(*(np.zeros((2, 48, 52)),) * 3))


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.native_3d])
def test_native_3d_ignores_the_order_of_the_axes(name):
    cube = tuple(array[:, :48, :48] for array in volume(48))
    turned = (np.ascontiguousarray(array.transpose(2, 0, 1)) for array in cube)
    assert METRICS[name].function(*turned) == pytest.approx(METRICS[name].function(*cube), rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_one_slice_is_an_image(name):
    function = METRICS[name].function
    assert function(*(image[None] for image in images())) == function(*images())


@pytest.mark.parametrize("shape", [(64, 80), (11, 11), (16, 24, 20)])
def test_ssim_is_that_of_scikit_image(shape):
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    fused, a, b = np.random.default_rng(0).random((3, *shape))
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = np.mean([similarity(source, fused, **options) for source in (a, b)])
    assert METRICS["SSIM"].function(fused, a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["SSIM", "MS-SSIM"])
def test_few_slices(name):
    fused, a, b = volume(4)
    expected = np.mean([METRICS[name].function(*slices) for slices in zip(fused, a, b, strict=True)])
    assert METRICS[name].function(fused, a, b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PSNR", 100), ("SSIM", 1), ("MS-SSIM", 1), ("FSIM", 1), ("FMI", 1), ("FMI-pixel", 1), ("EN", 0), ("MI", 0),
        ("SD", 0), ("SF", 0), ("AG", 0), ("SCD", 0), ("SHARE", np.nan), ("VIF", np.nan), ("NABF", 0),
    ],
)  # fmt: skip
def test_constant_images(name, expected):
    image = np.full((64, 64), 0.5)
    assert METRICS[name].function(image, image, image) == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_shares_are_those_of_the_mixture():
    _, a, b = images()
    assert source_shares(0.7 * a + 0.2 * b + 0.1, a, b) == pytest.approx((0.7, 0.2), abs=1e-3)
    assert METRICS["SHARE"].function(0.7 * a + 0.2 * b, a, b) == pytest.approx(0.2, abs=1e-3)
    assert METRICS["SHARE"].function(a, a, b) == pytest.approx(0, abs=1e-9)
    assert METRICS["SHARE"].function((a + b) / 2, a, b) == pytest.approx(0.5)


@pytest.mark.parametrize("other", [lambda a: a, lambda a: 0 * a, lambda a: a / 2], ids=["equal", "black", "a half"])
def test_shares_of_sources_that_cannot_be_told_apart(other):
    _, a, _ = images()
    assert np.isnan(source_shares(a, a, other(a))).all()
    assert np.isnan(source_shares(0 * a, 0 * a, 0 * a)).all()


@pytest.mark.parametrize("name", [name for name in METRICS if name != "SHARE"])
def test_one_constant_source_or_fused(name):
    _, a, b = images()
    empty = np.zeros_like(a)
    for arrays in ((a, a, empty), (empty, a, b), (a, empty, b)):
        assert np.isfinite(METRICS[name].function(*arrays))


def test_vif_leaves_out_an_empty_source():
    _, a, _ = images()
    assert vif(a, a, np.zeros_like(a)) == pytest.approx(1, abs=1e-4)


def test_qabf_of_a_source():
    """One source alone keeps nearly all of its own edges."""
    _, a, _ = images()
    assert 0.97 < qabf(a, a, a) < 1


def test_qabf_of_constants():
    """No edge in black images; zero padding makes an edge of the frame of others."""
    black, grey = np.zeros((64, 64)), np.full((64, 64), 0.5)
    assert qabf(black, black, black) == 0
    assert 0.97 < qabf(grey, grey, grey) < 1


def bad_nan():
    fused, a, b = images()
    return fused, np.where(a > 0.5, np.nan, a), b


BAD = [
    (bad_nan, "source a has NaN"),
    (lambda: (np.full((64, 64), np.inf), np.zeros((64, 64)), np.zeros((64, 64))), "fused image has NaN or infinite"),
    (lambda: (np.zeros((64, 64)), np.zeros((64, 60)), np.zeros((64, 64))), "must have one shape"),
    (lambda: (np.zeros((4, 64, 64, 3)),) * 3, "expected arrays"),
    (lambda: (np.zeros(64),) * 3, "expected arrays"),
    (lambda: (np.zeros((0, 64)),) * 3, "expected at least"),
]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input(name, make, message):
    with pytest.raises(InputError, match=message) as caught:
        METRICS[name].function(*make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METRICS)
def test_too_small(name):
    side = METRICS[name].minimum_side
    smallest = [image[:side, :side] for image in images()]
    assert isinstance(METRICS[name].function(*smallest), float)
    if side > 1:
        with pytest.raises(InputError, match=f"at least {side} x {side}"):
            METRICS[name].function(*(image[:, : side - 1] for image in images()))


def test_data_range_must_be_positive():
    with pytest.raises(InputError, match="data_range"):
        evaluate_all(*images(), data_range=0)


def test_unknown_feature():
    with pytest.raises(InputError, match="unknown FMI feature"):
        fmi(*images(), feature="dct")


def test_evaluate_all():
    values = evaluate_all(*images())
    assert list(values) == list(METRICS)
    assert all(isinstance(value, float) and np.isfinite(value) for value in values.values())
    assert evaluate_all(*images(), ["SCD", "EN"]) == {"SCD": values["SCD"], "EN": values["EN"]}
    assert evaluate_all(*images()) == values


def test_evaluate_all_of_a_tiny_image():
    values = evaluate_all(*(image[:12, :12] for image in images()))  # black in both sources
    assert {name for name, value in values.items() if np.isnan(value)} == {"FSIM", "SHARE", "VIF"}


def test_evaluate_all_unknown_name():
    with pytest.raises(InputError, match="unknown metric 'psnr'; known are PSNR"):
        evaluate_all(*images(), ["psnr"])


def test_fast_enough():
    arrays = images((256, 256))
    evaluate_all(*(array[:48, :48] for array in arrays))
    # Idle threads spin, and process_time counts it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    evaluate_all(*arrays)
    torch.set_num_threads(threads)
    # About 0.5 s on an idle core.
    assert time.process_time() - start < 4
