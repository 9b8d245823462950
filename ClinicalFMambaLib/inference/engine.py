"""The fusion engine: two volumes in, one fused volume with its history out.

Panel, command line, batch runs and evaluation all go through :meth:`FusionEngine.fuse`, so that what is measured is
what a reader gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .. import NOTICE, __version__
from ..config import FusionOptions, ModelConfig, parse_modality
from ..errors import Cancelled, InputError, WeightsError
from ..pretrained import find_weights, load_model, read_index, sha256
from ..preview import PLANES, patient_axes, to_uint8
from ..volumes import Volume, check_registration, compare_grids, overlap_fraction, resample_onto
from .colour import luma, rgb_to_ycbcr, ycbcr_to_rgb
from .device import GIB, choose_device, free_memory, has_bfloat16, is_out_of_memory
from .intensity import Window, apply_window, choose_window, count_nonfinite, guess_modality
from .plan import MIN_TILE_BYTES, FusionPlan, build_plan, largest_tile, memory_needed, usual_tile

SCALE = 1000  # of scalar results: int16 survives DICOM export and compresses, a thousandth is below what is visible
FUNCTIONAL = ("SPECT", "PET")
# The network's first input is the anatomical one: MR before CT before counts.
_RANK = {"MR": 0, "CT": 1, "SPECT": 2, "PET": 2}
# Pixels of one batch of slices on the CPU. Fixed, so that the same input gives the same bytes however much memory is
# free; larger batches are no faster there.
_CPU_BATCH_PIXELS = 4 * 256 * 256
_GPU_BATCH_PIXELS = 32 * 256 * 256

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class FusionResult:
    """What :meth:`FusionEngine.fuse` returns, all of it on A's grid.

    Attributes:
        volume: the fused volume: int16, 0 to 1000 for 0 to 1; for a grey image A uint8, 0 to 255; for colour uint8
            RGB.
        fused: the network's output, (D, H, W) float32 in [0, 1]; for colour the luma before it is made RGB again.
        a01, b01: the sources in their windows, (D, H, W) float32 in [0, 1], or (D, H, W, 3) uint8 for colour.
        warnings: sentences that the user should read.
        provenance: what was done with what, ready for JSON.
    """

    volume: Volume
    fused: np.ndarray
    a01: np.ndarray
    b01: np.ndarray
    warnings: tuple[str, ...]
    provenance: dict

    def metadata(self) -> dict[str, str]:
        """The part of the provenance that belongs into the file's header; the same for the same input."""
        p = self.provenance
        inputs = p["inputs"]
        return {
            "notice": p["notice"],
            "scale": p["output"]["scale"],
            "software": f"{p['software']['name']} {p['software']['version']}",
            "model": p["model"]["name"],
            "model_sha256": p["model"]["sha256"],
            "input_a": f"{inputs['a']['name']}, {inputs['a']['modality']}, window {inputs['a']['window']['text']}",
            "input_b": f"{inputs['b']['name']}, {inputs['b']['modality']}, window {inputs['b']['window']['text']}",
        }


@dataclass(frozen=True)
class _Loaded:
    """A network on its device, ready to be called."""

    name: str
    path: Path
    sha256: str
    config: ModelConfig
    modalities: tuple[str, ...]
    device: torch.device
    network: FusionPlan


@dataclass(frozen=True)
class _Source:
    """One input on its way to the network."""

    volume: Volume
    window: Window
    modality: str
    nonfinite: int

    @property
    def name(self) -> str:
        return self.volume.name or "unnamed"

    def windowed(self) -> np.ndarray:
        """(D, H, W) float32 in [0, 1], or (D, H, W, 3) uint8."""
        if not self.volume.is_colour:
            return apply_window(self.volume.array, self.window)
        if (self.window.low, self.window.high) == (0, 255):
            return self.volume.array
        return to_uint8(apply_window(self.volume.array, self.window))

    def describe(self) -> dict:
        v = self.volume
        return {
            "name": self.name,
            "path": v.path,
            "modality": self.modality,
            "colour": v.is_colour,
            "size_xyz": [int(n) for n in v.shape[::-1]],
            "spacing_mm_xyz": None if v.is_image else [float(s) for s in v.spacing],
            "window": {
                "low": float(self.window.low),
                "high": float(self.window.high),
                "unit": self.window.unit,
                "origin": self.window.origin,
                "text": str(self.window),
            },
            "nonfinite_voxels": self.nonfinite,
        }


class _Run:
    """Progress, cancellation, warnings and the record of one fusion."""

    def __init__(self, progress: Progress | None, cancelled: Callable[[], bool] | None):
        self._progress, self._cancelled = progress, cancelled
        self.steps: list[dict] = []
        self.warnings: list[str] = []

    def at(self, stage: str, fraction: float) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("fusion was cancelled; nothing was written")
        if self._progress is not None:
            self._progress(stage, fraction)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    @contextlib.contextmanager
    def step(self, name: str, fraction: float):
        """Time one stage; what is put into the yielded dictionary is recorded with it."""
        self.at(name, fraction)
        record: dict = {"step": name}
        started = time.perf_counter()
        yield record
        record["seconds"] = round(time.perf_counter() - started, 3)
        self.steps.append(record)


class FusionEngine:
    """Fuses pairs and keeps the networks that it has loaded.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``, for pairs whose options say ``"auto"``.
        clock: the time in the provenance.

    Raises:
        DeviceError: the device cannot be used.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.timezone.utc),
    ):
        choose_device(device)
        self._device = device
        self._clock = clock
        self._loaded: dict[tuple, _Loaded] = {}

    def fuse(
        self,
        a: Volume,
        b: Volume,
        options: FusionOptions | None = None,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> FusionResult:
        """Fuse two registered volumes or images; the result lies on A's grid.

        The networks take the anatomical source first (MR before CT before SPECT and PET), so the two are ordered by
        modality. One of them may be 8-bit RGB: its luma is fused and its chroma kept, as in the paper.

        Args:
            a, b: scalar (D, H, W), or one of them RGB (D, H, W, 3).
            progress: called with the stage in words and the fraction done.
            cancelled: asked between stages and batches.

        Raises:
            InputError: inputs or options that cannot be fused.
            WeightsError, DeviceError: the model or the device cannot be used.
            Cancelled: ``cancelled()`` returned True.
        """
        options = options or FusionOptions()
        run = _Run(progress, cancelled)
        device, reason = choose_device(options.device if options.device != "auto" else self._device)

        with run.step("checking the inputs", 0.0) as record:
            if a.is_colour and b.is_colour:
                raise InputError(
                    f"{a.name or 'A'} and {b.name or 'B'} are both in colour; one must be grey: give one as grey values"
                )
            first = _examine(a, options.modality_a, options.window_a, run)
            second = _examine(b, options.modality_b, options.window_b, run)
            if _same_input(a, b):
                run.warn("both inputs are the same: the result shows nothing that either does not")
            difference = _check_grids(first, second, options.resample)
            record["grid_difference"] = difference

        with run.step("loading the model", 0.02) as record:
            model = self._choose_model(options, first, second, device, run)
            record["model"] = model.name

        if difference:
            with run.step("resampling B onto A", 0.05) as record:
                run.warn(f"the grids differed and {second.name} was interpolated onto {first.name}: {difference}")
                second = replace(second, volume=resample_onto(second.volume, first.volume))
                record["interpolation"] = "linear"

        with run.step("applying the windows", 0.08):
            a01, b01 = first.windowed(), second.windowed()
            grey_a, grey_b = (luma(x) if x.ndim == 4 else x for x in (a01, b01))
            for source, grey in ((first, grey_a), (second, grey_b)):
                if grey.min() == grey.max():
                    run.warn(f"{source.name} is one grey in its window ({source.window}): it adds nothing")

        registration = None
        if options.check_registration:
            with run.step("checking the registration", 0.12) as record:
                registration = self._check_registration(first, second, grey_a, grey_b)
                record["message"] = registration.message
                if registration.message:
                    run.warn(registration.message)

        swapped = _is_second_first(first, second, model.modalities)
        pair = (grey_b, grey_a) if swapped else (grey_a, grey_b)
        axis, plane, why = _cut(first.volume, options.plane)
        with run.step("fusing", 0.2) as record:
            try:
                fused = _apply_network(model, pair, axis, options.max_memory_gib, run)
            except torch.cuda.OutOfMemoryError:
                run.warn(f"{device.type} ran out of memory: the pair was fused on the CPU, which takes longer")
                device, reason = torch.device("cpu"), f"{device.type} ran out of memory"
                model = self._load(str(model.path), device, model.network.precision, model.name)
                fused = _apply_network(model, pair, axis, options.max_memory_gib, run)
            record["network_inputs"] = [second.name, first.name] if swapped else [first.name, second.name]
            record["scan_backend"] = model.network.scan_backend

        with run.step("making the output", 0.97):
            volume, scale = _make_output(first, second, a01, b01, fused)

        if model.config.dimension == 3:
            plane, why = "", "the model takes the whole volume"
        provenance = {
            "notice": NOTICE,
            "software": {"name": "ClinicalFMamba", "version": __version__, "torch": torch.__version__},
            "date_utc": self._clock().isoformat(timespec="seconds"),
            "inputs": {"a": first.describe(), "b": second.describe()},
            "model": {
                "name": model.name,
                "sha256": model.sha256,
                "modalities": list(model.modalities),
                "config": _plain(model.config),
            },
            "device": {"name": str(device), "reason": reason},
            "scan_backend": model.network.scan_backend,
            "precision": model.network.precision,
            "plane": {"name": plane, "reason": why},
            "grid_difference": difference,
            "resampled": bool(difference),
            "registration_check": _plain(registration) if registration else None,
            "output": {"type": str(volume.array.dtype), "colour": volume.is_colour, "scale": scale},
            "settings": _plain(options),
            "steps": run.steps,
            "seconds": round(sum(step["seconds"] for step in run.steps), 3),
            "warnings": list(run.warnings),
        }
        run.at("done", 1.0)
        return FusionResult(volume, fused, a01, b01, tuple(run.warnings), provenance)

    def _check_registration(self, first: _Source, second: _Source, grey_a: np.ndarray, grey_b: np.ndarray):
        pixels = first.volume.is_image
        return check_registration(
            grey_a,
            grey_b,
            (1.0, 1.0, 1.0) if pixels else first.volume.spacing,
            functional=any(s.modality in FUNCTIONAL or s.volume.is_colour for s in (first, second)),
            unit="pixels" if pixels else "mm",
        )

    def _choose_model(self, options: FusionOptions, first: _Source, second: _Source, device, run: _Run) -> _Loaded:
        """Load the model asked for, or the bundled one that fits the pair best; warn where it fits badly."""
        choice, precision = options.model, options.precision
        if precision == "bfloat16" and not has_bfloat16(device):
            run.warn(f"{device.type} has no bfloat16 arithmetic: the network runs in float32")
            precision = "float32"
        flat = first.volume.shape[0] == 1
        colour = first.volume.is_colour or second.volume.is_colour
        pair = (first.modality, second.modality)
        if choice == "auto":
            model = self._load(_best_bundled(pair, flat, colour), device, precision)
        else:
            model = self._load(choice, device, precision)
            if model.config.dimension == 3 and flat:
                model = self._load(_best_bundled(pair, flat, colour, instead_of=model.name), device, precision)
                run.warn(f"{choice} is a 3D model and the input has one slice: {model.name} is used instead")
        if model.modalities and sorted(model.modalities) != sorted(pair):
            run.warn(
                f"{model.name} was trained on {' with '.join(model.modalities)}, not on {' with '.join(pair)}: "
                "no measurement supports this use, compare the result with its sources"
            )
        return model

    def _load(self, choice: str, device: torch.device, precision: str = "float32", name: str = "") -> _Loaded:
        """A model by name or path, from memory where its file has not changed since."""
        found, path = find_weights(choice)
        name = name or found
        status = path.stat()
        key = (str(path.resolve()), status.st_mtime_ns, status.st_size, str(device), precision)
        if key not in self._loaded:
            module, metadata = load_model(path)
            entry = read_index().get(name, metadata)
            self._loaded[key] = _Loaded(
                name,
                path,
                sha256(path),
                module.config,
                _modalities(entry.get("modalities", ())),
                device,
                build_plan(module.to(device), precision),
            )
        return self._loaded[key]


def _plain(settings) -> dict:
    """A dataclass as JSON has it, without tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


# ------------------------------------------------------------------------------------------------ inputs


def _examine(volume: Volume, modality: str, window, run: _Run) -> _Source:
    """Modality, window and what is worth a warning; raises InputError for a volume that shows nothing."""
    modality = modality or guess_modality(volume)
    volume = replace(volume, modality=modality)
    name = volume.name or "the volume"
    for note in volume.notes:
        run.warn(note)
    nonfinite = count_nonfinite(volume.array)
    if nonfinite:
        run.warn(f"{name}: {nonfinite} of {volume.array.size} voxels are NaN or Inf; they are treated as background")
    return _Source(volume, choose_window(volume, window), modality, nonfinite)


def _same_input(a: Volume, b: Volume) -> bool:
    if a.path and b.path:
        with contextlib.suppress(OSError):
            if os.path.samefile(a.path, b.path):
                return True
    return a.array.shape == b.array.shape and np.array_equal(a.array, b.array, equal_nan=a.array.dtype.kind == "f")


def _check_grids(first: _Source, second: _Source, resample: bool) -> str:
    """How the grids differ, ``""`` when they do not; raises InputError where that forbids a fusion."""
    a, b = first.volume, second.volume
    difference = compare_grids(a, b)
    if not difference:
        return ""
    if a.is_image != b.is_image:
        raise InputError(f"{first.name} and {second.name} cannot be laid on each other: {difference}; give two volumes")
    if not a.is_image and overlap_fraction(a, b) == 0 and overlap_fraction(b, a) == 0:
        raise InputError(
            f"{first.name} and {second.name} do not overlap in space ({difference}); "
            "register them, or repair the headers"
        )
    if not resample:
        raise InputError(
            f"{first.name} and {second.name} lie on different grids: {difference}; "
            "use --resample to interpolate B onto A's grid"
        )
    return difference


# ------------------------------------------------------------------------------------------------ models


def _modalities(stated: str | Sequence[str]) -> tuple[str, ...]:
    """What a model was trained on, in the order of its inputs; empty where its file does not say it."""
    words = stated.split(",") if isinstance(stated, str) else stated
    try:
        return tuple(parse_modality(word) for word in words if word.strip())
    except InputError:
        return ()


def _best_bundled(pair: tuple[str, str], flat: bool, colour: bool, instead_of: str = "") -> str:
    """Name of the bundled model for a pair of modalities; raises WeightsError where none can be used."""
    if colour or set(pair) & set(FUNCTIONAL):
        wanted = ["mri-spect-2d", "mri-ct-2d"]
    elif "CT" in pair:
        wanted = ["mri-ct-2d"]
    elif flat:
        wanted = ["mri-mri-2d", "mri-ct-2d"]
    else:
        wanted = ["mri-mri-3d", "mri-mri-2d", "mri-ct-2d"]
    index = read_index()
    for name in wanted:
        if name in index:
            return name
    if instead_of:
        raise WeightsError(f"{instead_of} is a 3D model and the input has one slice; give a 2D model with --model")
    raise WeightsError(
        f"no model for {' with '.join(pair)} is bundled (looked for {', '.join(wanted)}); "
        "give one with --model NAME or the path of a .safetensors file"
    )


def _is_second_first(first: _Source, second: _Source, modalities: tuple[str, ...]) -> bool:
    """Whether B is the network's first input."""
    pair = (first.modality, second.modality)
    if first.volume.is_colour != second.volume.is_colour:
        return first.volume.is_colour
    if len(modalities) == 2 and sorted(modalities) == sorted(pair):
        return pair != modalities
    return _RANK[first.modality] > _RANK[second.modality]


# ------------------------------------------------------------------------------------------- the network


def _cut(volume: Volume, plane: str) -> tuple[int, str, str]:
    """Array axis across the slices of a 2D model, the plane's name and why it was taken."""
    if volume.shape[0] == 1:
        return 0, "", "the input is one slice"
    through = {name: patient_axes(volume.direction)[spec[0]][0] for name, spec in PLANES.items()}
    if plane != "auto":
        return through[plane], plane, "asked for"
    thickness = volume.spacing[::-1]  # along the array axes
    name = max(PLANES, key=lambda n: thickness[through[n]])  # the first of equals is axial
    if thickness[through[name]] <= 1.02 * thickness[through["axial"]]:
        name = "axial"
    why = "isotropic voxels" if max(thickness) <= 1.02 * min(thickness) else "its pixels are the finest"
    return through[name], name, why


def _apply_network(
    model: _Loaded, pair: tuple[np.ndarray, np.ndarray], axis: int, max_memory_gib: float | None, run: _Run
) -> np.ndarray:
    """(D, H, W) float32 in [0, 1] from two of them."""
    shape = pair[0].shape
    whole = model.config.dimension == 3
    one = shape if whole else tuple(n for k, n in enumerate(shape) if k != axis)
    batch, model.network.tile_bytes = _fit(model, one, max_memory_gib)
    try:
        if whole:
            fused = _forward(model, pair[0][None], pair[1][None], lambda f: run.at("fusing", 0.2 + 0.75 * f))[0]
        else:
            fused = _fuse_slices(model, pair, axis, batch, run)
    except torch.cuda.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(_too_large(model, one, "more than this machine has free")) from error
    if not np.isfinite(fused).all():
        raise WeightsError(f"{model.name} gave values that are no numbers; its weights are damaged")
    return fused


def _fit(model: _Loaded, shape: tuple[int, ...], max_memory_gib: float | None) -> tuple[int, int]:
    """How many pairs of ``shape`` go into one batch, and the size of the plan's tiles.

    Raises:
        InputError: the memory does not hold one pair in the smallest tiles.
    """
    usual = 1
    if model.config.dimension == 2:
        pixels = _CPU_BATCH_PIXELS if model.device.type == "cpu" else _GPU_BATCH_PIXELS
        usual = max(1, pixels // int(np.prod(shape)))
    budget = max_memory_gib * GIB if max_memory_gib else free_memory(model.device)
    tile = usual_tile(model.device)
    if budget is None:
        return usual, tile
    for batch in range(usual, 0, -1):
        if memory_needed(model.config, shape, batch, tile) <= budget:
            return batch, tile
    tile = largest_tile(model.config, shape, budget, tile)
    if tile is not None:
        return 1, tile
    # A GPU's shortage shows by itself and is answered by the CPU.
    if model.device.type != "cpu" and not max_memory_gib:
        return 1, MIN_TILE_BYTES
    raise InputError(_too_large(model, shape, f"{budget / GIB:.2g} GiB may be used"))


def _too_large(model: _Loaded, shape: tuple[int, ...], limit: str) -> str:
    size = "x".join(str(n) for n in reversed(shape))
    least = memory_needed(model.config, shape, 1, MIN_TILE_BYTES) / GIB
    way_out = "a 2D model (--model mri-ct-2d)" if len(shape) == 3 else "smaller images"
    return (
        f"fusing {size} voxels with {model.name} needs about {least:.2g} GiB, "
        f"{limit}: raise --max-memory, crop the volumes, or use {way_out}"
    )


def _fuse_slices(model: _Loaded, pair: tuple[np.ndarray, np.ndarray], axis: int, batch: int, run: _Run) -> np.ndarray:
    """Slice after slice in batches; a slice that is black in both sources stays black."""
    x, y = (np.moveaxis(source, axis, 0) for source in pair)
    fused = np.zeros(x.shape, np.float32)
    filled = [k for k in range(len(x)) if x[k].any() or y[k].any()]
    for start in range(0, len(filled), batch):
        part = filled[start : start + batch]

        def tick(fraction: float, start=start, part=part) -> None:
            run.at("fusing", 0.2 + 0.75 * (start + fraction * len(part)) / len(filled))

        fused[part] = _forward(model, x[part], y[part], tick)
    return np.ascontiguousarray(np.moveaxis(fused, 0, axis))


def _forward(model: _Loaded, x: np.ndarray, y: np.ndarray, tick: Callable[[float], None]) -> np.ndarray:
    """(B, ...) float32 from two of them; ``tick`` is called with the fraction done after each tile."""
    a, b = (torch.from_numpy(np.ascontiguousarray(v))[:, None] for v in (x, y))
    return model.network(a, b, tick)[:, 0].cpu().numpy()


# ------------------------------------------------------------------------------------------------ output


def _make_output(
    first: _Source, second: _Source, a01: np.ndarray, b01: np.ndarray, fused: np.ndarray
) -> tuple[Volume, str]:
    """The fused volume on A's grid and its intensity scale in words."""
    place = replace(first.volume, name=f"{first.name}+{second.name}", modality="", path="", notes=())
    rgb = next((x for x in (a01, b01) if x.ndim == 4), None)
    if rgb is not None:
        out = np.empty(rgb.shape, np.uint8)
        for k, picture in enumerate(rgb):  # slice by slice: float32 YCbCr takes four times the memory of RGB
            ycbcr = rgb_to_ycbcr(picture)
            ycbcr[..., 0] = fused[k]
            out[k] = ycbcr_to_rgb(ycbcr)
        return replace(place, array=out), "8-bit RGB, luma from the network"
    if first.volume.is_image:
        return replace(place, array=to_uint8(fused)), "255 x network output"
    return replace(place, array=np.rint(fused * SCALE).astype(np.int16)), f"{SCALE} x network output"
