"""Pictures of the report: each method on one case side by side, and a chart of the metrics."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from .. import NOTICE
from ..errors import require
from ..files import replacing
from ..inference.colour import rgb_to_ycbcr, ycbcr_to_rgb
from ..preview import enlarged, informative_centre, plane, save_sheet, to_uint8
from .evaluate import MODEL, SOURCES, Measured, Row, interval, method_title, patient_means
from .metrics import METRICS

# Difference that is shown in full colour, of a grey range of 1.
FULL_COLOUR = 0.5


@dataclass(frozen=True)
class Example:
    """One case as it is shown: an axial slice of both sources and of each method.

    Attributes:
        pictures: title -> (rows, columns) or (rows, columns, 3), in [0, 1]; A and B first.
        greys: title -> (rows, columns) in [0, 1], what was measured.
    """

    case: str
    patient: str
    why: str
    pictures: dict[str, np.ndarray]
    greys: dict[str, np.ndarray]


def make_example(measured: Measured, names: Sequence[str], why: str) -> Example:
    """Cut the slice with most structure out of a measured case.

    Args:
        names: of the two sources.
    """
    result, volume = measured.result, measured.result.volume
    greys = {names[0]: measured.a, names[1]: measured.b}
    greys.update({m: f for m, f in measured.fused.items() if m not in SOURCES})
    greys = {title: grey if grey.ndim == 3 else grey[None] for title, grey in greys.items()}
    rgb = next((x for x in (result.a01, result.b01) if x.ndim == 4), None)
    if len(volume.array) == 1:
        cut = {title: grey[0] for title, grey in greys.items()}
        colour = None if rgb is None else rgb[0]
    else:
        place = (volume.spacing, volume.direction)
        centre = informative_centre([greys[names[0]], greys[names[1]]])[0]
        cut = {title: _square(*plane(grey, "axial", centre, *place)) for title, grey in greys.items()}
        colour = None
        if rgb is not None:
            colour = _square(*plane(rgb[measured.box], "axial", centre, *place))
    pictures = dict(cut)
    if colour is not None:
        ycbcr = rgb_to_ycbcr(colour)
        for title in cut:
            if title != (names[0] if result.b01.ndim == 4 else names[1]):
                pictures[title] = ycbcr_to_rgb(np.concatenate([cut[title][..., None], ycbcr[..., 1:]], axis=-1))
    return Example(measured.case.name, measured.case.patient, why, pictures, cut)


def _square(picture: np.ndarray, mm: tuple[float, float]) -> np.ndarray:
    """A slice whose pixels are not square, interpolated so that they are."""
    fine = min(mm)
    if max(mm) < 1.01 * fine:
        return np.ascontiguousarray(picture)
    zoom = (mm[0] / fine, mm[1] / fine, *[1] * (picture.ndim - 2))
    out = ndimage.zoom(picture.astype(np.float32), zoom, order=1)
    return out.astype(np.uint8) if picture.dtype == np.uint8 else np.clip(out, 0, 1)


def detail_box(a: np.ndarray, b: np.ndarray) -> tuple[slice, slice]:
    """The quarter-size square in which both sources have most structure."""
    side = max(8, min(a.shape) // 4)
    density = np.ones(a.shape)
    for image in (a, b):
        # bounded: a gyrus is worth as much as the edge of the skull
        strength = np.minimum(ndimage.gaussian_gradient_magnitude(image.astype(np.float64), 1), 0.03)
        density *= ndimage.uniform_filter(strength, side, mode="constant")
    inside = density[side // 2 : a.shape[0] - side + side // 2 + 1, side // 2 : a.shape[1] - side + side // 2 + 1]
    row, column = np.unravel_index(np.argmax(inside), inside.shape)
    return slice(int(row), int(row) + side), slice(int(column), int(column) + side)


def difference_colours(difference: np.ndarray) -> np.ndarray:
    """Orange where positive, blue where negative, black where zero; full colour at +-0.5. uint8 RGB."""
    strength = np.clip(difference / FULL_COLOUR, -1, 1)
    up, down = np.maximum(strength, 0), np.maximum(-strength, 0)
    return to_uint8(np.stack([up, 0.45 * up**2 + 0.55 * down, down], axis=-1))


def save_example(path: Path, example: Example) -> Path:
    """Each method on one case: picture, enlarged detail, and what it changed of either source."""
    titles = list(example.pictures)
    first, second = titles[:2]
    box = detail_box(example.greys[first], example.greys[second])
    whole, detail = [], []
    for picture in example.pictures.values():
        picture = picture if picture.dtype == np.uint8 else to_uint8(picture)
        framed = _framed(enlarged(picture), picture.shape, box)
        whole.append(framed)
        detail.append(_to_height(picture[box], framed.shape[0]))
    differences = [
        [enlarged(difference_colours(grey - example.greys[source])) for grey in example.greys.values()]
        for source in (first, second)
    ]
    names = ["window as measured", "detail (frame above)", f"minus {first}", f"minus {second}"]
    footer = (
        f"Orange: brighter than the source, blue: darker, black: equal; full colour at {FULL_COLOUR:g}."
        f" All panels in the same window. {NOTICE}"
    )
    shown = [*titles[:2], *(method_title(title) for title in titles[2:])]
    return save_sheet(path, [whole, detail, *differences], names, shown, f"Case {example.case}: {example.why}", footer)


def _framed(picture: np.ndarray, shape: tuple[int, ...], box: tuple[slice, slice]) -> np.ndarray:
    """RGB with a thin yellow frame, lined with black, around the box, which is given in pixels of ``shape``."""
    rgb = np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture.copy()
    factor = rgb.shape[0] / shape[0]
    starts, stops = ([round(getattr(side, end) * factor) for side in box] for end in ("start", "stop"))
    for inset, colour in ((-1, 0), (1, 0), (0, (255, 210, 0))):
        top, left = (max(0, start + inset) for start in starts)
        bottom, right = (min(n, stop - inset) - 1 for n, stop in zip(rgb.shape, stops))
        for line in ((slice(top, bottom + 1), [left, right]), ([top, bottom], slice(left, right + 1))):
            rgb[line] = colour
    return rgb


def _to_height(picture: np.ndarray, height: int) -> np.ndarray:
    """Enlarged by the largest whole number that fits, pixel by pixel, with a black border."""
    factor = max(1, height // picture.shape[0])
    large = np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)
    missing = height - large.shape[0]
    return np.pad(large, [(missing // 2, missing - missing // 2), *[(0, 0)] * (large.ndim - 1)])


def save_chart(
    path: Path,
    rows: Sequence[Row],
    interval: Callable[[np.ndarray], tuple[float, float]] = interval,
    highlighted: str = MODEL,
    differences_from: str = "",
) -> Path:
    """A panel for each metric: a dot for each patient (or seed), their mean and its 95 % interval.

    Args:
        interval: lowest and highest value of the interval, from the values of the dots.
        highlighted: the method that is drawn in red.
        differences_from: what the values are differences from, if they are.
    """
    matplotlib = require("matplotlib", "the chart of the metrics", "matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    metrics, methods = list(rows[0].values), list(dict.fromkeys(row.method for row in rows))
    columns = min(4, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.6 * columns, (0.27 * len(methods) + 1.0) * lines), layout="constrained")
    for k, metric in enumerate(metrics):
        axes = figure.add_subplot(lines, columns, k + 1)
        for y, method in enumerate(methods):
            means = np.array(list(patient_means(rows, method, metric).values()))
            low, high = interval(means)
            colour = "#c0392b" if method == highlighted else "#8a8a8a" if method in SOURCES else "#2c5f8a"
            axes.plot([low, high], [y, y], color=colour, linewidth=2)
            axes.plot(means.mean(), y, "o", color=colour, markersize=8)
            dots = {"markersize": 5, "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 0.8}
            axes.plot(means, np.full(len(means), y), "o", **dots)
        if differences_from:
            axes.axvline(0, color="#555555", linewidth=0.8)
        _limit(axes, {m: list(patient_means(rows, m, metric).values()) for m in methods})
        labels = [method_title(method) if k % columns == 0 else "" for method in methods]
        axes.set_yticks(range(len(methods)), labels, fontsize=8)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[METRICS[metric].higher_is_better]
        axes.set_title(metric + arrow, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.3)
    if differences_from:
        figure.suptitle(f"Difference from {differences_from}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def _limit(axes, values: dict[str, list[float]]) -> None:
    """Show the range of the fusions; what lies far outside (the PSNR of a copy) is written as a number."""
    inside = [v for method, list_ in values.items() if method not in SOURCES for v in list_ if not math.isnan(v)]
    if not inside:
        return
    margin = 1.5 * (max(inside) - min(inside)) or 0.1 * abs(inside[0]) or 1.0
    low, high = min(inside) - margin, max(inside) + margin
    far = {y: float(np.mean(v)) for y, v in enumerate(values.values()) if not low <= np.mean(v) <= high}
    if not far:
        return
    axes.set_xlim(low, high)
    for y, mean in far.items():
        right = mean > high
        text, x = (f"{mean:.3g} →", high) if right else (f"← {mean:.3g}", low)
        axes.text(x, y, text, fontsize=7, color="#8a8a8a", va="center", ha="right" if right else "left")
