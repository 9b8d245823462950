"""Intensity windows: from what a scanner stores to the [0, 1] that the network was trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..volumes import Volume

# Low and high in HU. "brain", "bone" and "soft" are the usual reading windows (width 80 level 40, width 2000 level 500,
# width 400 level 40); "full" spans air to dense bone.
CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (0.0, 80.0),
    "bone": (-500.0, 1500.0),
    "soft": (-160.0, 240.0),
    "full": (-1000.0, 2000.0),
}
# What the CT-MR networks were trained on: AANLIB shows bone saturated white and brain (about 33 HU) at a median grey of
# 111 of 255, the middle half of its pixels from 96 to 127, CSF (about 8 HU) near 50. Width 100 level 40 gives 110 and
# 46. Calcification and blood stay visible, bone keeps its outline.
CT_AUTO_HU = (-10.0, 90.0)

# Enough for a 99.9th percentile within a fraction of a grey level, and read in milliseconds.
_SAMPLES = 500_000

_WORDS = {
    "CT": re.compile(r"n?cct|cect|cta?"),
    "SPECT": re.compile(r"spect|datscan|hmpao"),
    "PET": re.compile(r"pet|fdg|suv"),
    "MR": re.compile(
        r"mri?|t[12](w|wi|c|ce|gd|n|f|fs|km|post|pre|mprage|flair|star|tse|ax|sag|cor)?|flair|mprage|spgr|dwi|adc|swi|tof"
    ),
}


@dataclass(frozen=True)
class Window:
    """Values from ``low`` to ``high`` become 0 to 1.

    Attributes:
        low, high: in the volume's own units.
        unit: ``"HU"``, ``"8-bit"`` or ``"stored values"``.
        origin: how it was chosen, in words.
    """

    low: float
    high: float
    unit: str = "stored values"
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} {self.unit} ({self.origin})"


# ---------------------------------------------------------------------------------------------- modality


def guess_modality(volume: Volume) -> str:
    """``"CT"``, ``"MR"``, ``"SPECT"`` or ``"PET"``: what the file states, else its name, else its values, else MR.

    Names are read word by word (``ct.nii.gz``, ``sub-1_T1w``, ``MRHead``); the folder counts where the file's name says
    nothing. A name with words of two modalities says nothing, except before "to", "on" or "in" (``ct_to_t1``).
    """
    if volume.modality:
        return volume.modality
    path = Path(volume.path) if volume.path else None
    names = [volume.name, *([path.name, path.parent.name] if path else [])]
    for name in names:
        found = modality_of_name(name)
        if found:
            return found
    if volume.is_colour:
        return "SPECT"
    if volume.array.dtype != np.uint8:
        values = _sample(volume)
        # Air at -1000 HU fills a good part of a CT; a noisy or filtered MR dips below zero in single voxels only.
        if values.size and np.percentile(values, 2) <= -500 and values.max() > 100:
            return "CT"
    return "MR"


def modality_of_name(name: str) -> str:
    """The modality that the words of a name state, ``""`` where they state none or several."""
    stem = re.sub(r"(\.nii)?\.[A-Za-z]+$", "", name) if "." in name else name
    # MRHead -> MR Head; sub_T1w stays whole
    split = re.sub(r"(?<=[A-Z])(?=[A-Z][a-z]{2})|(?<=[a-z])(?=[A-Z])", " ", stem)
    words = [w.lower() for w in re.split(r"[^A-Za-z0-9]+", split) if w]
    for k, word in enumerate(words):
        if word in ("to", "on", "onto", "in", "2") and k:
            words = words[:k]
            break
    words += [word.rstrip("0123456789") for word in words]  # ct2, mr01
    found = {m for word in words for m, pattern in _WORDS.items() if pattern.fullmatch(word)}
    return found.pop() if len(found) == 1 else ""


# --------------------------------------------------------------------------------------------- windowing


def choose_window(volume: Volume, choice: str | tuple[float, float] | Window = "auto") -> Window:
    """The window for a volume.

    ``"auto"``: 8-bit data 0 to 255; CT in HU -10 to 90 HU (see ``CT_AUTO_HU``); MR from the background's level to the
    99.5th percentile of the head; SPECT and PET counts to the 99.9th percentile. A CT stored with an offset of 1000
    or 1024, or in Cormack units (Rorden et al., NeuroImage 2012: SPM's CT template), is recognised and its window
    converted.

    Args:
        choice: ``"auto"``, a name in :data:`CT_WINDOWS` (CT with a known HU scale only), or ``"LO,HI"`` / ``(lo, hi)``
            in the volume's own units.

    Raises:
        InputError: unknown choice, LO not below HI, a CT window for something else, a constant volume, no finite voxel.
    """
    name = volume.name or "the volume"
    if isinstance(choice, Window):
        choice = (choice.low, choice.high)
    if not isinstance(choice, str) or "," in choice:
        limits = parse_limits(choice)
        _check_values(volume, name)
        return Window(*limits, _unit(volume), "given")
    word = choice.strip().lower()
    if word != "auto" and word not in CT_WINDOWS:
        raise InputError(f"window {choice!r} is unknown; use auto, {', '.join(CT_WINDOWS)} (CT in HU), or LO,HI")

    values = _check_values(volume, name)
    modality = guess_modality(volume)
    scale = _ct_scale(values) if modality == "CT" and volume.array.dtype != np.uint8 else None
    if word != "auto":
        if scale is None:
            what = "8-bit" if volume.array.dtype == np.uint8 else "not in HU" if modality == "CT" else modality
            raise InputError(f"window {word!r} is for CT in HU, and {name} is {what}; use auto, or LO,HI in its values")
        return _hu_window(CT_WINDOWS[word], scale, f"CT {word} window")
    if scale is not None:
        return _hu_window(CT_AUTO_HU, scale, "CT window that shows brain, bone in white")
    # An 8-bit picture was windowed by whoever made it; an 8-bit volume that fills less than half of its range was not.
    if volume.array.dtype == np.uint8 and (volume.is_image or volume.is_colour or values.max() >= 128):
        return Window(0.0, 255.0, "8-bit", "8-bit data as it is")
    if modality in ("SPECT", "PET"):
        return _counts_window(values, modality)
    return _percentile_window(values, modality)


def apply_window(array: np.ndarray, window: Window) -> np.ndarray:
    """``array`` of any shape as float32 in [0, 1]; NaN and Inf become 0, the background."""
    out = array.astype(np.float32)
    finite = np.isfinite(out) if np.issubdtype(array.dtype, np.floating) else None
    out -= np.float32(window.low)
    out *= np.float32(1.0 / (window.high - window.low))
    np.clip(out, 0.0, 1.0, out=out)
    if finite is not None and not finite.all():
        out[~finite] = 0.0
    return out


def count_nonfinite(array: np.ndarray) -> int:
    """Voxels that are NaN or Inf."""
    if not np.issubdtype(array.dtype, np.floating):
        return 0
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def parse_limits(choice) -> tuple[float, float]:
    parts = choice.split(",") if isinstance(choice, str) else choice
    try:
        low, high = (float(p) for p in parts)
    except (TypeError, ValueError) as error:
        raise InputError(f"window {choice!r} is not two numbers; give LO,HI such as 0,80") from error
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise InputError(f"window {low:g},{high:g} needs two finite numbers with LO below HI, such as 0,80")
    return low, high


def _unit(volume: Volume) -> str:
    if volume.array.dtype == np.uint8:
        return "8-bit"
    if guess_modality(volume) == "CT":
        scale = _ct_scale(_sample(volume))
        return "HU" if scale is not None and scale.name == "HU" else "stored values"
    return "stored values"


def _sample(volume: Volume) -> np.ndarray:
    """Finite voxels, float32; a regular subset of a large volume (the same one each time)."""
    flat = volume.array.reshape(-1)
    # A prime stride does not stay in step with the rows.
    stride = 1 if flat.size <= 2 * _SAMPLES else _next_prime(flat.size // _SAMPLES)
    values = flat[::stride].astype(np.float32)
    return values[np.isfinite(values)]


def _next_prime(n: int) -> int:
    while any(n % k == 0 for k in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def _check_values(volume: Volume, name: str) -> np.ndarray:
    """The sample, or an error for a volume that has nothing to show."""
    values = _sample(volume)
    if values.size == 0 or values.min() == values.max():  # the sample may have missed what there is
        everything = volume.array.reshape(-1)
        everything = everything[np.isfinite(everything)].astype(np.float32)
        if everything.size == 0:
            raise InputError(f"{name}: every voxel is NaN or Inf; expected numbers: export it again")
        if everything.min() == everything.max():
            raise InputError(f"{name}: constant volume, every voxel is {everything[0]:g}: check the file")
        values = everything
    return values


# -------------------------------------------------------------------------------------------- CT scales


@dataclass(frozen=True)
class _CtScale:
    """A monotonic map from HU to stored values, by its knots (HU, stored)."""

    name: str
    hu: tuple[float, ...]
    stored: tuple[float, ...]

    def to_stored(self, hu: float) -> float:
        if hu <= self.hu[0]:
            return self.stored[0] + (hu - self.hu[0])
        if hu >= self.hu[-1]:
            return self.stored[-1] + (hu - self.hu[-1])
        return float(np.interp(hu, self.hu, self.stored))


_HU = _CtScale("HU", (0.0,), (0.0,))
_OFFSET_1000 = _CtScale("HU + 1000", (0.0,), (1000.0,))
_OFFSET_1024 = _CtScale("HU + 1024", (0.0,), (1024.0,))
_CORMACK = _CtScale("Cormack units", (-1000.0, -100.0, 100.0), (0.0, 900.0, 3100.0))


def _ct_scale(values: np.ndarray) -> _CtScale | None:
    """Which scale a CT is stored in, from where its soft tissue lies; None when no scale explains the values."""
    low, high = np.percentile(values, 0.5), np.percentile(values, 99.95)
    if low <= -200:
        return _HU
    if low < -50 or high < 300:
        return None

    def share(first: float, last: float) -> float:
        return float(np.mean((values >= first) & (values <= last)))

    # 2000 to 2880 is brain (0 to 80 HU) in Cormack units, but dense bone, always rare, in HU + 1000.
    if share(2000, 2880) >= 0.1 and share(2000, 2880) > share(960, 1120) and high <= 6200:
        return _CORMACK
    if share(960, 1120) >= 0.1:
        tissue = float(np.median(values[(values >= 960) & (values <= 1120)]))
        return _OFFSET_1024 if tissue > 1045 else _OFFSET_1000
    # Air and fat clipped to zero.
    if share(1, 80) >= 0.1 and share(1, 80) > 3 * share(80, 200) and high <= 4100:
        return _HU
    return None


def _hu_window(hu: tuple[float, float], scale: _CtScale, origin: str) -> Window:
    low, high = (scale.to_stored(v) for v in hu)
    if scale.name == "HU":
        return Window(low, high, "HU", origin)
    return Window(low, high, "stored values", f"{origin}, {hu[0]:g} to {hu[1]:g} HU, stored as {scale.name}")


# ----------------------------------------------------------------------------------------- percentiles


def _percentile_window(values: np.ndarray, modality: str) -> Window:
    """Background black, the brightest 0.5 % of the foreground white."""
    least, most = (float(v) for v in np.percentile(values, (0.1, 99.9)))
    if most <= least:
        return Window(float(values.min()), float(values.max()), "stored values", "smallest to largest value")
    low, threshold = _floor(values, least, most)
    foreground = values[values > threshold]
    high = float(np.percentile(foreground, 99.5)) if foreground.size else most
    if high <= low:
        low, high = least, most
    return Window(low, high, "stored values", f"{modality}: background to 99.5th percentile of the foreground")


def _counts_window(values: np.ndarray, modality: str) -> Window:
    """No counts black, a haze of scatter around the head as well."""
    least, most = (float(v) for v in np.percentile(values, (0.1, 99.9)))
    if most <= max(least, 0.0):
        return Window(float(values.min()), float(values.max()), "stored values", "smallest to largest value")
    low = max(0.0, _floor(values, max(least, 0.0), most)[0])
    return Window(low, most, "stored values", f"{modality}: background to 99.9th percentile")


def _floor(values: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """The background's level, and the threshold above which the foreground starts."""
    threshold = _otsu(values[(values >= least) & (values <= most)])
    background = values[values <= threshold]
    # The darker class is background only where it lies at the bottom of the range; a crop without air keeps its floor.
    level = float(np.median(background)) if background.size else least
    return (level if least <= level <= least + 0.1 * (most - least) else least), threshold


def _otsu(values: np.ndarray, bins: int = 256) -> float:
    """Threshold between background and head (Otsu, IEEE Trans. SMC 1979)."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)
    total, mass = weight[-1], np.cumsum(counts * centres)
    below, above = weight[:-1], total - weight[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    return float(edges[1:-1][np.nanargmax(between)])
