"""The process that the panel talks to: ``python -m ClinicalFMambaLib.worker``.

Requests come on stdin and events leave on stdout, one JSON object a line in UTF-8; logs go to stderr. Volumes travel in
.npy files. The engine, and with it the model, stays in memory from one request to the next.

Requests: ``fuse`` (id, a, b, options, output, metrics, classify), ``cancel`` (id), ``ping``, ``quit``. Events:
``starting`` at once, ``ready`` when torch has been imported, ``pong``, and for each fuse request ``progress`` and then
exactly one of ``result``, ``error`` and ``cancelled``. ``ready`` says what there is: models, classifiers (or why there
is none), the device. The worker ends when stdin ends, on ``quit``, when its parent is gone, or after some idle minutes.

``classify`` is ``""``, ``"auto"``, the name of a bundled classifier or the path of one. ``classification`` of a result
is null, or what :meth:`.inference.classify.Classification.to_json` gives, with ``occlusion`` and ``region``: paths of
.npy files on A's grid, or null. Where no reading is possible, its ``probabilities`` are empty and ``text`` says why.

This module itself imports the standard library only: without torch it still starts, and says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .allocator import keep_freed_memory
from .config import FusionOptions
from .errors import Cancelled, ClinicalFMambaError, InputError, MissingDependencyError, OutputError, require
from .files import replacing

log = logging.getLogger("ClinicalFMambaLib.worker")

IDLE_MINUTES = 10.0
GRACE_SECONDS = 5.0
KINDS = ("InputError", "MissingDependencyError", "WeightsError", "DeviceError", "OutOfMemory", "Internal")
NEEDED = {"numpy": "numpy", "SimpleITK": "SimpleITK", "safetensors": "safetensors", "torch": "torch>=2.4"}
DISPLAY_RANGES = {"int16": [0, 1000], "uint8": [0, 255]}
# What VTK volumes hold and SimpleITK takes.
SCALARS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")

# Cheap ones; the first four need no neighbours, so that a sample of slices stands for the volume.
SAMPLED_METRICS = ("PSNR", "SCD", "EN", "MI")
SLICE_METRICS = ("QABF", "SSIM")
# All metrics together take about 2 µs a pixel; the whole volume would keep the user waiting for no better number.
MEASURED_PIXELS = (2**17, 2**19)
MEASURING_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an engine factory returns.

    Attributes:
        engine: has ``fuse`` of :class:`.inference.engine.FusionEngine`; None when something is missing.
        torch: version, or None.
        device: ``{"name", "reason", "free_gib"}``, or None; free_gib is None where the system does not say.
        problem: what is missing and what to do, one sentence, or ``""``.
        models: bundled models, ``{"name", "modalities", "dimension"}`` each.
        classifiers: bundled tumour classifiers, ``{"name", "labels", "verdict", "evidence"}`` each.
        classifier_problem: why there is no classifier, one sentence, or ``""``.
    """

    engine: Any = None
    torch: str | None = None
    device: dict | None = None
    problem: str = ""
    models: tuple[dict, ...] = ()
    classifiers: tuple[dict, ...] = ()
    classifier_problem: str = "no tumour classifier is bundled with this version"


class Worker:
    """Answers requests until it is told to stop; see the module's docstring for the protocol.

    Args:
        read_line: the next line as bytes, ``b""`` at the end; called in a thread of its own.
        write_line: takes one line without its end.
        engine_factory: called once, in the thread of :meth:`run`.
        clock: seconds, monotonic.
        idle_seconds: how long after the last finished request the worker ends.
        poll_seconds: how often the clock is looked at while idle.
        on_stop: called when the worker has been told to stop.
    """

    def __init__(
        self,
        read_line: Callable[[], bytes],
        write_line: Callable[[str], None],
        engine_factory: Callable[[], Setup],
        clock: Callable[[], float] = time.monotonic,
        *,
        idle_seconds: float = 60 * IDLE_MINUTES,
        poll_seconds: float = 0.5,
        on_stop: Callable[[], None] = lambda: None,
    ):
        self._read_line, self._write_line = read_line, write_line
        self._engine_factory, self._clock = engine_factory, clock
        self._idle_seconds, self._poll_seconds, self._on_stop = idle_seconds, poll_seconds, on_stop
        self._setup = Setup()
        self._requests: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._cancel: dict[str, threading.Event] = {}  # of the requests that are waiting or under way
        self._writing = threading.Lock()

    def run(self) -> str:
        """Serve; returns why it ended: ``"stopped"`` or ``"idle"``."""
        # The process that starts the worker may be a launcher, whose end would leave this one running.
        self._send({"event": "starting", "pid": os.getpid()})
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        self._setup = self._set_up()
        described = {field.name: getattr(self._setup, field.name) for field in dataclasses.fields(Setup)}
        del described["engine"]
        self._send({"event": "ready", "version": __version__, "pid": os.getpid(), **described})
        finished = self._clock()
        while True:
            try:
                request = self._requests.get(timeout=self._poll_seconds)
            except queue.Empty:
                if self._clock() - finished >= self._idle_seconds:
                    log.info("nothing to do for %g minutes", self._idle_seconds / 60)
                    return "idle"
                continue
            if request is None:
                return "stopped"
            # No frame that holds the mapped inputs is left here: Windows deletes no file that is mapped.
            event = self._answer(request)
            del self._cancel[request["id"]]
            self._send(event)
            finished = self._clock()

    def stop(self, why: str) -> None:
        """Cancel what is under way or waiting, then end; may be called from any thread, more than once."""
        log.info("stopping: %s", why)
        for event in list(self._cancel.values()):
            event.set()
        self._requests.put(None)
        self._on_stop()

    # ------------------------------------------------------------------------------------ reading thread

    def _read(self) -> None:
        while True:
            try:
                line = self._read_line()
            except (OSError, ValueError):
                line = b""
            if not line:
                return self.stop("stdin has ended")
            if not line.strip():
                continue
            try:
                if self._take(_parse(line)) == "quit":
                    return self.stop("asked to quit")
            except InputError as error:
                self._send({"event": "error", "id": None, "kind": "InputError", "message": str(error), "retry": ""})

    def _take(self, request: dict) -> str:
        """Do at once what needs no engine, queue the rest; returns the command."""
        command = request["command"]
        if command == "ping":
            self._send({"event": "pong"})
        elif command == "cancel":
            # A request that has just finished is no longer there, and that is no error.
            event = self._cancel.get(_id_of(request))
            if event is not None:
                event.set()
        elif command == "fuse":
            identity = _id_of(request)
            if identity in self._cancel:
                raise InputError(f"request {identity!r} is not finished yet; give each request an id of its own")
            self._cancel[identity] = threading.Event()
            self._requests.put(request)
        elif command != "quit":
            raise InputError(f"command {_short(command)} is unknown; use fuse, cancel, ping or quit")
        return command

    # --------------------------------------------------------------------------------------- main thread

    def _send(self, event: dict) -> None:
        line = json.dumps(_plain(event))
        try:
            with self._writing:
                self._write_line(line)
        except (OSError, ValueError) as error:
            # Nobody listens any more; the end of stdin or the watch on the parent ends the worker.
            log.warning("an event could not be sent: %s", error)

    def _set_up(self) -> Setup:
        try:
            return self._engine_factory()
        except Exception as error:
            log.exception("the engine cannot be made")
            return Setup(problem=f"the engine cannot be started: {_one_line(error)}")

    def _answer(self, request: dict) -> dict:
        """The last event of a fuse request."""
        identity = request["id"]
        try:
            return {"event": "result", "id": identity, **self._fuse(request)}
        except Cancelled:
            return {"event": "cancelled", "id": identity}
        except Exception as error:
            kind = _kind(error)
            if kind in ("OutOfMemory", "Internal"):
                log.exception("request %s failed", identity)
            retry = _retry(error, kind, self._device_of(request))
            return {"event": "error", "id": identity, "kind": kind, "message": _message(error, kind), "retry": retry}

    def _device_of(self, request: dict) -> str:
        options = request.get("options")
        asked = options.get("device", "auto") if isinstance(options, dict) else "auto"
        return asked if asked != "auto" else (self._setup.device or {}).get("name", "cpu")

    def _fuse(self, request: dict) -> dict:
        cancelled = self._cancel[request["id"]].is_set
        started = self._clock()
        furthest = 0.0

        def report(stage: str, fraction: float) -> None:
            nonlocal furthest
            if cancelled():
                raise Cancelled("cancelled; nothing was written")
            furthest = max(furthest, min(fraction, 1.0))
            fraction = round(furthest, 4)
            self._send({"event": "progress", "id": request["id"], "stage": stage, "fraction": fraction})

        report("reading the inputs", 0.0)
        if self._setup.engine is None:
            raise MissingDependencyError(self._setup.problem or "the engine is missing")
        options, output, measure = _options(request.get("options")), _output(request), request.get("metrics", False)
        if not isinstance(measure, bool):
            raise InputError(f"metrics must be true or false, not {_short(measure)}")
        classifier = self._classifier(request.get("classify") or "")
        a, b = (_read_volume(request.get(key), key, output) for key in ("a", "b"))

        end = 0.8 if classifier else 0.98
        share = end - 0.08 if measure else end

        def forward(stage: str, fraction: float) -> None:
            if stage != "done":
                report(stage, share * fraction)

        result = self._setup.engine.fuse(a, b, options, forward, cancelled)
        fused_after = self._clock() - started
        metrics, note = {}, ""
        if measure:
            deadline = self._clock() + max(MEASURING_SECONDS, 0.1 * fused_after)
            try:
                metrics, note = _measure(
                    result,
                    lambda part: report("measuring the result", share + (end - share) * part),
                    lambda: self._clock() > deadline,
                )
            except Cancelled:
                raise
            except Exception as error:  # the fusion itself has succeeded
                log.exception("the metrics failed")
                note = f"no metrics: {_one_line(error)}"
        classification = None
        if classifier:
            classification = _classify(
                self._setup.engine, a, b, classifier, options, output, lambda s, f: report(s, end + 0.18 * f), cancelled
            )
        report("writing the result", 0.98)
        _write_array(output, result.volume.array)
        return {
            "output": str(output),
            "colour": bool(result.volume.is_colour),
            "display_range": DISPLAY_RANGES[result.volume.array.dtype.name],
            "warnings": list(result.warnings),
            "provenance": result.provenance,
            "metrics": metrics,
            "metrics_note": note,
            "classification": classification,
            "seconds": round(self._clock() - started, 3),
        }

    def _classifier(self, choice) -> str:
        """The classifier asked for, ``""`` for none; refused here, and not after minutes of fusing."""
        if not isinstance(choice, str):
            raise InputError(f"classify must be a text, not {_short(choice)}")
        if choice and not choice.endswith(".safetensors") and not self._setup.classifiers:
            raise InputError(f"a classification was asked for, but {self._setup.classifier_problem}")
        if choice:
            from .inference.classify import open_classifier

            open_classifier(choice)
        return choice


# -------------------------------------------------------------------------------------------- requests


def _parse(line: bytes) -> dict:
    try:
        request = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected one JSON object a line, got {_short(line)}: {_one_line(error)}") from None
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise InputError(f'expected a JSON object with a "command", got {_short(line)}')
    return request


def _id_of(request: dict) -> str:
    identity = request.get("id")
    if not isinstance(identity, str) or not identity:
        raise InputError(f'"{request["command"]}" needs an "id" that is a text, got {_short(identity)}')
    return identity


def _options(given) -> FusionOptions:
    """FusionOptions from JSON, each value of the type of its default."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise InputError(f"options must be an object, not {_short(given)}")
    fields = {field.name: field.default for field in dataclasses.fields(FusionOptions)}
    values = {}
    for name, value in given.items():
        if name not in fields:
            raise InputError(f"option {name!r} is unknown; known are {', '.join(fields)}")
        if name == "max_memory_gib":
            fits, expected = value is None or _is_number(value), "a number of GiB or null"
        elif name in ("window_a", "window_b"):
            pair = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
            fits, expected = isinstance(value, str) or pair, "a text or two numbers"
            value = tuple(value) if pair else value
        elif isinstance(fields[name], bool):
            fits, expected = isinstance(value, bool), "true or false"
        else:
            fits, expected = isinstance(value, str), "a text"
        if not fits:
            raise InputError(f"option {name} must be {expected}, not {_short(value)}")
        values[name] = value
    return FusionOptions(**values)


def _output(request: dict) -> Path:
    given = request.get("output")
    if not isinstance(given, str) or Path(given).suffix != ".npy":
        raise InputError(f"output must be the path of a .npy file, not {_short(given)}")
    path = Path(given)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist; create it first")
    return path


def _read_volume(given, key: str, output: Path):
    """A Volume whose array is mapped from its file; raises InputError."""
    import numpy as np

    from .config import parse_modality
    from .volumes import Volume

    if not isinstance(given, dict) or not isinstance(given.get("array"), str):
        raise InputError(f'{key} must be an object with the path of a .npy file as its "array", not {_short(given)}')
    text = {name: given.get(name, "") for name in ("name", "modality")}
    for name, value in text.items():
        if not isinstance(value, str):
            raise InputError(f"{name} of {key} must be a text, not {_short(value)}")
    label = f"{key} ({text['name']})" if text["name"] else key
    spacing, origin, direction = (
        _numbers(given.get(name), n, f"{name} of {label}")
        for name, n in (("spacing", 3), ("origin", 3), ("direction", 9))
    )
    if min(spacing) <= 0:
        raise InputError(f"spacing of {label} must be positive, not {list(spacing)}")
    if abs(np.linalg.det(np.reshape(direction, (3, 3)))) < 1e-3:
        raise InputError(f"direction of {label} must be three independent axes, not {list(direction)}")

    path = Path(given["array"])
    if not path.is_file():
        raise InputError(f"{label}: {path} does not exist; send the volume again")
    if output.exists() and output.samefile(path):
        raise InputError(f"{label}: the output {output} is this input's own file; choose another name")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{label}: {path} is no whole .npy file ({_one_line(error)}); send the volume again"
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{label}: {path} holds several arrays; expected one .npy array")
    array = np.asarray(array)
    colour = array.ndim == 4 and array.shape[-1] == 3 and array.dtype == np.uint8
    if not colour and array.ndim != 3:
        raise InputError(
            f"{label}: expected an array (z, y, x), or (z, y, x, 3) of uint8, got {array.shape} of {array.dtype}"
        )
    if array.dtype.name not in SCALARS:
        raise InputError(f"{label}: expected integers or floats, got {array.dtype}; convert the volume")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Volume(array, spacing, origin, direction, text["name"], parse_modality(text["modality"]))


def _numbers(given, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(given, list) or len(given) != count or not all(map(_is_number, given)):
        raise InputError(f"{what} must be {count} finite numbers, not {_short(given)}")
    return tuple(float(value) for value in given)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _write_array(path: Path, array) -> None:
    import numpy as np

    array = np.ascontiguousarray(array)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            # Not np.save, which does not say that the disk is full.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)
    except OutputError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise OutputError(f"the result cannot be written to {path.parent} ({reason}); free space there") from error


def _classify(engine, a, b, choice: str, options: FusionOptions, output: Path, report, cancelled) -> dict:
    """The classification as JSON, its volumes in files beside ``output``; a failure is no failure of the fusion."""
    try:
        from .inference.classify import classify

        answer = classify(engine, a, b, choice, device=options.device, progress=report, cancelled=cancelled)
    except Cancelled:
        raise
    except Exception as error:
        log.exception("the classification failed")
        words = " ".join(str(error).split()) if isinstance(error, ClinicalFMambaError) else _one_line(error)
        return {
            "model": "",
            "probabilities": [],
            "text": f"no reading: {words}",
            "note": "",
            "occlusion": None,
            "region": None,
        }
    volumes = {"occlusion": answer.occlusion, "region": answer.region}
    paths = {}
    for name, volume in volumes.items():
        paths[name] = None
        if volume is not None:
            path = output.with_name(f"{output.stem}-{name}.npy")
            _write_array(path, volume.array)
            paths[name] = str(path)
    return {**answer.to_json(), **paths}


# --------------------------------------------------------------------------------------------- metrics


def _measure(result, report: Callable[[float], None], is_late: Callable[[], bool]) -> tuple[dict[str, float], str]:
    """Metrics of a sample of the result, and what was measured in words.

    Args:
        report: called with the fraction done.
        is_late: whether the metrics that are left are to be left out.
    """
    report(0.0)
    from .evaluation.metrics import evaluate_all

    (fused, a, b), note = _sample(result)
    metrics, late = {}, []
    names = (*SAMPLED_METRICS, *SLICE_METRICS)
    for k, name in enumerate(names):
        report(k / len(names))
        if is_late():
            late.append(name)
            continue
        parts = [(fused, a, b)] if name in SAMPLED_METRICS else list(zip(fused, a, b))
        values = [evaluate_all(*part, [name])[name] for part in parts]
        value = sum(values) / len(values)
        if math.isfinite(value):
            metrics[name] = value
    if late:
        note += f"; left out to save time: {', '.join(late)}"
    return metrics, note


def _sample(result) -> tuple[list, str]:
    """Fused and sources, (slices, H, W) in [0, 1], spread evenly over the slices that show something; in words."""
    import numpy as np

    from .inference.colour import luma

    depth, height, width = result.fused.shape
    limit = min(max(MEASURED_PIXELS[0], result.fused.size // 64), MEASURED_PIXELS[1])
    side = math.isqrt(limit)
    rows, columns = (slice(max(0, (n - side) // 2), max(0, (n - side) // 2) + side) for n in (height, width))
    shown = [k for k in range(depth) if result.a01[k].any() or result.b01[k].any()] or list(range(depth))
    count = min(len(shown), max(1, limit // (min(height, side) * min(width, side))))
    chosen = [shown[(2 * k + 1) * len(shown) // (2 * count)] for k in range(count)]
    arrays = []
    for source in (result.fused, result.a01, result.b01):
        picked = np.stack([source[k][rows, columns] for k in chosen])
        arrays.append(luma(picked) if picked.ndim == 4 else picked)
    note = f"measured on {count} of {depth} slices" if count < depth else "measured on the whole result"
    if arrays[0].shape[1:] != (height, width):
        note = f"measured on the central {arrays[0].shape[2]}x{arrays[0].shape[1]} pixels of {count} of {depth} slices"
    return arrays, note


# ---------------------------------------------------------------------------------------------- errors


def _kind(error: Exception) -> str:
    """One of :data:`KINDS`."""
    if _memory_error(error) is not None:
        return "OutOfMemory"
    for cls in type(error).__mro__:
        if cls.__name__ in KINDS and issubclass(cls, ClinicalFMambaError):
            return cls.__name__
    # Which file is written is the caller's choice, and another place is the way out.
    return "InputError" if isinstance(error, OutputError) else "Internal"


def _memory_error(error: BaseException | None) -> BaseException | None:
    """The exception in the chain of causes that says that memory ran out."""
    # PyTorch, CUDA's libraries, ITK and the operating systems say it in RuntimeErrors of these words.
    words = ("out of memory", "not enough memory", "allocate memory", "alloc_failed")
    while error is not None:
        if isinstance(error, MemoryError):
            return error
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words):
            return error
        error = error.__cause__
    return None


def _message(error: Exception, kind: str) -> str:
    if isinstance(error, ClinicalFMambaError):
        return " ".join(str(error).split())
    if kind == "OutOfMemory":
        return (
            f"memory ran out ({_one_line(error)}); close other programs, crop the volumes or set a lower memory limit"
        )
    return _one_line(error)


def _retry(error: Exception, kind: str, device: str) -> str:
    """What may help: ``"again"``, ``"cpu"`` (also where the GPU's memory ran out), ``"less-memory"``, or ``""``."""
    if kind == "DeviceError":
        return "cpu"
    if kind != "OutOfMemory":
        return "again" if isinstance(error, OutputError) else ""
    source = _memory_error(error)
    of_the_host = isinstance(source, MemoryError) or "DefaultCPUAllocator" in str(source)
    return "less-memory" if device == "cpu" or of_the_host else "cpu"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value):
    """``value`` as JSON has it: no tuples, no numpy scalars, null for NaN and infinity, text for what else there is."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


# --------------------------------------------------------------------------------------------- process


def make_engine() -> Setup:
    """Import what a fusion needs and make the engine; what is missing is said in :attr:`Setup.problem`."""
    missing, reasons = [], []
    for module, package in NEEDED.items():
        try:
            require(module, "fusing volumes", package)
        except Exception as error:  # a torch whose libraries do not load raises OSError
            log.warning("%s", error)
            missing.append(package)
            reasons.append(_one_line(error.__cause__ or error))
    from .pretrained import read_index

    models = tuple(
        {"name": name, "modalities": list(entry.get("modalities", ())), "dimension": entry.get("dimension")}
        for name, entry in read_index().items()
    )
    torch, device, problem = None, None, ""
    if NEEDED["torch"] not in missing:
        from .inference.device import GIB, choose_device, free_memory

        torch = str(sys.modules["torch"].__version__)
        chosen, reason = choose_device()
        free = free_memory(chosen)
        device = {"name": str(chosen), "reason": reason, "free_gib": None if free is None else round(free / GIB, 1)}
    if missing:
        wanted = " ".join(f"'{package}'" if ">" in package else package for package in missing)
        problem = f"fusing needs {', '.join(missing)}, which cannot be imported ({'; '.join(reasons)}); "
        problem += f"install with: pip install {wanted}"
        return Setup(None, torch, device, problem, models)
    from .inference.classify import read_classifiers
    from .inference.engine import FusionEngine

    classifiers = tuple(
        {"name": name, **{key: entry[key] for key in ("labels", "verdict", "evidence")}}
        for name, entry in read_classifiers().items()
    )
    with contextlib.suppress(ImportError):
        # Now and not with the first result, whose user is waiting.
        from .evaluation import metrics  # noqa: F401

    return Setup(
        FusionEngine(), torch, device, "", models, classifiers, "" if classifiers else Setup.classifier_problem
    )


def _take_over_pipes() -> tuple[int, int]:
    """Private copies of stdin and stdout; what else uses them gets nothing, and writes to stderr.

    So a print, also one in C++, stays out of the protocol. On Windows a DLL that asks for the type of stdin while a
    thread reads it would hang (https://github.com/python/cpython/issues/78961).
    """
    requests, events = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # started without stderr
        os.dup2(nothing, 1)
    os.close(nothing)
    return requests, events


def _line_reader(descriptor: int) -> Callable[[], bytes]:
    """Without a buffered file, whose lock the reading thread would hold when the interpreter ends."""
    pending = b""

    def read_line() -> bytes:
        nonlocal pending
        while b"\n" not in pending:
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return b""  # half a line is no request
            pending += chunk
        line, pending = pending.split(b"\n", 1)
        return line + b"\n"

    return read_line


def _line_writer(descriptor: int) -> Callable[[str], None]:
    def write_line(line: str) -> None:
        data = line.encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]

    return write_line


def _watch(pid: int) -> Callable[[], bool]:
    """A function that tells whether process ``pid`` is gone."""
    if os.name != "nt":

        def is_gone() -> bool:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
            return False

        return is_gone

    import ctypes
    from ctypes import wintypes

    kernel = ctypes.WinDLL("kernel32")
    kernel.OpenProcess.restype = wintypes.HANDLE
    kernel.OpenProcess.argtypes = (wintypes.DWORD, wintypes.BOOL, wintypes.DWORD)
    kernel.WaitForSingleObject.argtypes = (wintypes.HANDLE, wintypes.DWORD)
    handle = kernel.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE
    return lambda: not handle or kernel.WaitForSingleObject(handle, 0) == 0  # WAIT_OBJECT_0: it has ended


def _lower_priority() -> None:
    """Leave the processor to Slicer where both want it."""
    with contextlib.suppress(OSError, AttributeError):
        if os.name == "nt":
            import ctypes

            kernel = ctypes.WinDLL("kernel32")
            kernel.GetCurrentProcess.restype = ctypes.c_void_p
            kernel.SetPriorityClass.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
            kernel.SetPriorityClass(kernel.GetCurrentProcess(), 0x00004000)  # BELOW_NORMAL_PRIORITY_CLASS
        else:
            os.nice(5)


def _exit_soon() -> None:
    """End even when the network cannot be interrupted: nobody waits for its result."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve on stdin and stdout until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ClinicalFMambaLib.worker", description=__doc__.split("\n")[0])
    parser.add_argument("--idle-minutes", type=float, default=IDLE_MINUTES, help="end after this time without requests")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process is gone")
    parser.add_argument("--scratch", metavar="DIR", help="folder of the parent's volumes, deleted when it is gone")
    arguments = parser.parse_args(argv)

    requests, events = _take_over_pipes()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for Slicer, whose end ends the worker
    _lower_priority()
    keep_freed_memory()
    worker = Worker(
        _line_reader(requests),
        _line_writer(events),
        make_engine,
        idle_seconds=60 * arguments.idle_minutes,
        on_stop=_exit_soon,
    )
    if arguments.parent is not None:
        is_gone = _watch(arguments.parent)

        def watch() -> None:
            while not is_gone():
                time.sleep(1)
            if arguments.scratch:
                # A crash of Slicer leaves no patient's volumes behind.
                shutil.rmtree(arguments.scratch, ignore_errors=True)
            worker.stop("the parent process is gone")

        threading.Thread(target=watch, name="parent", daemon=True).start()
    log.info("ended: %s", worker.run())
    return 0


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # Not sys.exit: it would wait for a DLL of torch, or for the thread that reads stdin on Windows.
    os._exit(status)
