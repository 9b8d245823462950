"""Pictures of fused volumes and images: one PNG, panels side by side, as a reading room would hang them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import NOTICE
from .errors import InputError, OutputError, require

if TYPE_CHECKING:
    from .inference.engine import FusionResult

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
# Left, posterior, superior shown (down, right) and across: radiological convention, the patient's left on the right.
PLANES = {
    # name: (patient axis across the slices, axis down, its sign, axis to the right, its sign); axes 0 L, 1 P, 2 S
    "axial": (2, 1, 1, 0, 1),
    "coronal": (1, 2, -1, 0, 1),
    "sagittal": (0, 2, -1, 1, 1),
}
MIN_EDGE, MAX_EDGE = 256, 512
GAP = 8


def to_uint8(array01: np.ndarray) -> np.ndarray:
    """[0, 1] to 0..255, rounded; NaN and infinity become 0."""
    return np.rint(np.clip(np.nan_to_num(np.asarray(array01, np.float32), posinf=0, neginf=0), 0, 1) * 255).astype(
        np.uint8
    )


def colourise(array01: np.ndarray, map: str = "hot") -> np.ndarray:
    """Pseudo-colour for counts, as nuclear medicine shows them.

    Args:
        array01: any shape, in [0, 1]; NaN becomes the darkest colour.
        map: ``"hot"`` (black, red, yellow, white; luminance grows with the counts) or ``"rainbow"`` (black, blue,
            green, yellow, red, white).

    Returns:
        uint8 RGB, one axis more than the input.

    Raises:
        InputError: the map is not known.
    """
    knots = {
        "hot": ([0, 3 / 8, 6 / 8, 1], [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]),
        "rainbow": (
            [0, 0.15, 0.35, 0.5, 0.65, 0.85, 1],
            [(0, 0, 0), (0, 0, 0.8), (0, 0.7, 0.9), (0, 0.8, 0), (1, 0.9, 0), (1, 0, 0), (1, 1, 1)],
        ),
    }
    if map not in knots:
        raise InputError(f"the colour map must be {' or '.join(knots)}, not {map!r}")
    positions, colours = knots[map]
    value = np.clip(np.nan_to_num(np.asarray(array01, np.float32), posinf=1, neginf=0), 0, 1)
    channels = [np.interp(value, positions, [colour[c] for colour in colours]) for c in range(3)]
    return to_uint8(np.stack(channels, axis=-1))


def patient_axes(direction: Sequence[float] = IDENTITY) -> tuple[tuple[int, int], ...]:
    """Which array axis runs along each patient axis (left, posterior, superior), and its sign.

    For an oblique grid it is the nearest axis. Source: ITK, whose direction matrix has the image axes x, y, z as
    columns in LPS.

    Raises:
        InputError: not nine finite numbers of an invertible matrix.
    """
    matrix = np.asarray(direction, float)
    if matrix.size != 9 or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix.reshape(3, 3))) < 1e-6:
        raise InputError(f"the direction must be nine numbers of an invertible matrix, not {direction!r}")
    weight = np.abs(matrix.reshape(3, 3))
    found: dict[int, tuple[int, int]] = {}
    for _ in range(3):  # the largest cosine first, so that no image axis is taken twice
        patient, image = np.unravel_index(np.argmax(weight), (3, 3))
        found[int(patient)] = (2 - int(image), 1 if matrix.reshape(3, 3)[patient, image] > 0 else -1)
        weight[patient, :] = weight[:, image] = -1
    return tuple(found[axis] for axis in range(3))


def informative_centre(arrays: Sequence[np.ndarray]) -> tuple[int, int, int]:
    """Index (z, y, x) of the slices with most structure in all arrays, each (D, H, W) or (D, H, W, 3) in [0, 1]."""
    shape = np.asarray(arrays[0]).shape[:3]
    strides = [max(1, n // 80) for n in shape]  # the profile is smooth: a coarse grid shows it as well
    thin = tuple(slice(step // 2, None, step) for step in strides)
    edges = sum(_edges(np.asarray(array)[thin]) for array in arrays)
    centre = []
    for axis in range(3):
        profile = edges.sum(axis=tuple(other for other in range(3) if other != axis))
        width = max(1, len(profile) // 12)
        smooth = np.convolve(np.pad(profile, width, mode="edge"), np.ones(2 * width + 1), mode="valid")
        index = int(np.argmax(smooth)) * strides[axis] + strides[axis] // 2 if profile.max() > 0 else shape[axis] // 2
        centre.append(index)
    return tuple(centre)


def _edges(array):
    grey = np.nan_to_num(np.asarray(array, np.float32), posinf=0, neginf=0)
    if grey.ndim == 4:
        grey = grey.mean(axis=-1)
    total = np.zeros(grey.shape, np.float32)
    for axis in range(3):
        if grey.shape[axis] > 1:
            step = np.abs(np.diff(grey, axis=axis))
            total += np.pad(step, [(0, int(other == axis)) for other in range(3)])
    return total / max(float(total.mean()), 1e-6)


def plane(
    array: np.ndarray,
    name: str,
    index: int,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    direction: Sequence[float] = IDENTITY,
) -> tuple[np.ndarray, tuple[float, float]]:
    """One slice in radiological orientation, with its pixel size.

    Args:
        array: (D, H, W) or (D, H, W, 3).
        name: ``"axial"``, ``"coronal"`` (patient's left on the right of the picture) or ``"sagittal"`` (the face to
            the left).
        index: along the array axis that crosses the plane.
        spacing: mm along x, y, z of the grid.
        direction: ITK direction matrix, row-major, LPS.

    Returns:
        The slice (rows, columns[, 3]) and (mm of a row, mm of a column).
    """
    axes = patient_axes(direction)
    through, down, down_sign, right, right_sign = PLANES[name]
    picture = np.take(array, index, axis=axes[through][0])
    rows, columns = axes[down], axes[right]
    if rows[0] > columns[0]:
        picture = np.swapaxes(picture, 0, 1)
    picture = picture[:: rows[1] * down_sign, :: columns[1] * right_sign]
    return picture, (float(spacing[2 - rows[0]]), float(spacing[2 - columns[0]]))


def save_preview(
    path: str | os.PathLike,
    panels: Sequence[tuple[str, np.ndarray]],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    footer: str = NOTICE,
    *,
    direction: Sequence[float] = IDENTITY,
    centre: Sequence[int] | None = None,
) -> Path:
    """Write panels side by side as a PNG: axial, coronal and sagittal rows for volumes, one row for images.

    Voxels are shown at their physical proportions; a picture is enlarged to at least 256 pixels by whole numbers
    where its pixels are square, so that no value is invented, and interpolated linearly where they are not.

    Args:
        path: the PNG; its folder is made when missing.
        panels: title and array, (D, H, W) or (D, H, W, 3), in [0, 1] or uint8; all on one grid. D = 1 is an image.
        spacing: mm along x, y, z; ignored for images.
        title: a line above.
        footer: a line below.
        direction: ITK direction matrix of the grid, row-major, LPS.
        centre: (z, y, x) index of the three slices; by default where most structure is.

    Returns:
        The path written.

    Raises:
        InputError: no panels, panels of different grids, a spacing or centre that does not fit.
        OutputError: the file cannot be written.
        MissingDependencyError: Pillow is not installed.
    """
    arrays = _checked(panels, spacing)
    shape = arrays[0].shape[:3]
    if shape[0] == 1:
        rows = [[enlarged(array[0]) for array in arrays]]
        names = [""]
    else:
        centre = informative_centre(arrays) if centre is None else tuple(int(c) for c in centre)
        if len(centre) != 3 or any(not 0 <= c < n for c, n in zip(centre, shape, strict=True)):
            raise InputError(f"the centre of the preview must be an index (z, y, x) inside {shape}, not {centre}")
        axes = patient_axes(direction)
        pixel = _pixel(shape, spacing)
        rows, names = [], [name.capitalize() for name in PLANES]
        for name, (through, *_) in PLANES.items():
            index = centre[axes[through][0]]
            cuts = [plane(array, name, index, spacing, direction) for array in arrays]
            rows.append([_resized(picture, mm, pixel) for picture, mm in cuts])
    return save_sheet(path, rows, names, [name for name, _ in panels], title, footer)


def save_sheet(
    path: str | os.PathLike,
    rows: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    titles: Sequence[str],
    title: str = "",
    footer: str = NOTICE,
) -> Path:
    """Write rows of pictures as one PNG, in one step.

    Args:
        rows: uint8 pictures (rows, columns[, 3]); those of a row have one height.
        names: of the rows, ``""`` for none.
        titles: of the columns.

    Raises:
        OutputError: the file cannot be written.
        MissingDependencyError: Pillow is not installed.
    """
    return _write(Path(path), _sheet(rows, names, titles, title, footer), title, footer)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture in [0, 1] or uint8 as uint8, enlarged by a whole number to at least 256 pixels."""
    return _resized(picture, (1.0, 1.0))


def save_fusion(
    path: str | os.PathLike, result: FusionResult, title: str = "", names: Sequence[str] | None = None
) -> Path:
    """:func:`save_preview` of A, B and what was fused from them.

    Args:
        title: ``"ClinicalFMamba"`` and the model's name by default.
        names: headings of the sources; their files and modalities by default.
    """
    inputs = result.provenance["inputs"].values()
    names = names or [f"{i['name']} ({i['modality']})" for i in inputs]
    volume = result.volume
    shown = volume.array if volume.is_colour else result.fused
    return save_preview(
        path,
        [(names[0], result.a01), (names[1], result.b01), ("fused", shown)],
        volume.spacing,
        title or f"ClinicalFMamba, {result.provenance['model']['name']}",
        direction=volume.direction,
    )


def _checked(panels, spacing):
    if not panels:
        raise InputError("a preview needs at least one panel, none was given")
    arrays = []
    for name, array in panels:
        array = np.asarray(array)
        if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3) or 0 in array.shape:
            raise InputError(f"panel {name!r} must be (D, H, W) or (D, H, W, 3), not {array.shape}")
        if arrays and array.shape[:3] != arrays[0].shape[:3]:
            raise InputError(f"panel {name!r} is {array.shape[:3]}, but {panels[0][0]!r} is {arrays[0].shape[:3]}")
        arrays.append(array)
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise InputError(f"the spacing must be three positive numbers in mm, not {spacing!r}")
    return arrays


def _pixel(shape, spacing):
    """mm of a picture's pixel, the same for all three planes."""
    extent = max(n * s for n, s in zip(shape, spacing[::-1], strict=True))
    finest = min(spacing)
    pixels = extent / finest
    if pixels < MIN_EDGE:
        return finest / np.ceil(MIN_EDGE / pixels)
    return max(finest, extent / MAX_EDGE)


def _resized(picture, mm, pixel=None):
    """uint8 picture at the wanted pixel size (mm)."""
    picture = picture if picture.dtype == np.uint8 else to_uint8(picture)
    rows, columns = picture.shape[:2]
    if pixel is None:
        pixel = mm[0] / np.ceil(MIN_EDGE / max(rows, columns))
    scale = [mm[0] / pixel, mm[1] / pixel]
    whole = [round(s) for s in scale]
    if np.allclose(scale, whole, rtol=1e-3) and whole[0] == whole[1] >= 1:
        return np.repeat(np.repeat(picture, whole[0], axis=0), whole[1], axis=1)
    from PIL import Image

    size = (max(1, round(columns * scale[1])), max(1, round(rows * scale[0])))
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BILINEAR))


def _sheet(rows, names, titles, title, footer):
    require("PIL.Image", "the preview picture", "pillow")
    from PIL import Image, ImageDraw, ImageFont

    width = max(picture.shape[1] for row in rows for picture in row)
    heights = [row[0].shape[0] for row in rows]
    size = int(np.clip(width / 18, 13, 22))
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(12, size - 4))
    line = size + 10
    top = line * (1 + bool(title))
    margin = GAP + size * any(names)
    total_width = margin + len(titles) * (width + GAP)
    total_width = max(total_width, *(int(font.getlength(text)) + 2 * GAP for text in (title, footer)))
    sheet = Image.new("RGB", (total_width, top + sum(heights) + GAP * len(heights) + line * bool(footer)))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 4), title, fill=(255, 255, 255), font=font)
    for column, text in enumerate(titles):
        middle = margin + column * (width + GAP) + width // 2
        draw.text((middle, top - line + 4), _fitted(text, font, width), fill=(235, 235, 235), font=font, anchor="ma")
    y = top
    for row, name, height in zip(rows, names, heights, strict=True):
        if name:
            label = Image.new("RGB", (height, margin))
            ImageDraw.Draw(label).text((height // 2, 1), name, fill=(170, 170, 170), font=small, anchor="ma")
            sheet.paste(label.rotate(90, expand=True), (0, y))
        for column, picture in enumerate(row):
            x = margin + column * (width + GAP) + (width - picture.shape[1]) // 2
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)).convert("RGB"), (x, y))
        y += height + GAP
    draw.text((GAP, y), footer, fill=(170, 170, 170), font=small)
    return sheet


def _fitted(text, font, width):
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _write(path, sheet, title, footer):
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    for key, text in (("Title", title), ("Disclaimer", footer)):
        if text:
            notes.add_itxt(key, text)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            sheet.save(file, format="PNG", pnginfo=notes)
        # mkstemp is private to the user; a picture gets the rights of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write the preview {path}: {reason}; choose another place") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path
