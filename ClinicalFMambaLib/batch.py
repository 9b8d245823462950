"""Many cases: reading, fusing and writing overlap, a case that fails stops no other, and a second call goes on.

Files are read and written in processes of their own, so that a damaged file that crashes a reader costs one case, and
the network never waits for a compressed volume. Each finished case has ``NAME.json`` beside its result: what was done
with what, written last. A case whose record is there is not fused again.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from types import SimpleNamespace

from . import __version__
from .cases import read_rows
from .config import FusionOptions
from .errors import BatchError, Cancelled, ClinicalFMambaError, InputError, OutputError
from .files import replacing, write_text
from .outputs import write_result
from .volumes import Volume, read_volume, suffix_of

log = logging.getLogger(__name__)

FORMATS = ("auto", "nrrd", "nii", "nii.gz", "mha", "png", "tif")
SETTINGS = ("model", "window_a", "window_b", "modality_a", "modality_b", "plane")
COLUMNS = ("a", "b", "name", *SETTINGS)
TABLE = "results.csv"
# They change rounding at most.
_NO_SETTINGS = ("device", "max_memory_gib")
# Cases that are read before the network is free, and results that wait to be written: they are held in memory.
_AHEAD = 2
_NAMES_SHOWN = 5

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BatchCase:
    """One row of the table: the name of its results, both sources, and how to fuse them."""

    name: str
    a: Path
    b: Path
    options: FusionOptions


@dataclass(frozen=True)
class Outcome:
    """What became of a case; a row of ``results.csv``.

    Attributes:
        case: its name.
        status: ``"fused"``, ``"skipped"`` (an earlier call has finished it) or ``"failed"``.
        seconds: reading, fusing and writing together, without waiting.
        output: path of the fused file, ``""`` where there is none.
        error: one line, ``""`` where all went well.
        model: name of the network.
        warnings: of the fusion, separated by ``"; "``.
    """

    case: str
    status: str
    seconds: float = 0.0
    output: str = ""
    error: str = ""
    model: str = ""
    warnings: str = ""


@dataclass(frozen=True)
class Layout:
    """Where and as what the results are written.

    Attributes:
        folder: exists.
        format: one of :data:`FORMATS`; ``"auto"`` writes a .png for an image and a .nrrd for a volume.
        preview: whether ``NAME.preview.png`` is drawn for each case.
    """

    folder: Path
    format: str = "auto"
    preview: bool = False

    def record(self, case: BatchCase) -> Path:
        return self.folder / f"{case.name}.json"

    def output(self, case: BatchCase, a: Volume) -> Path:
        suffix = ("png" if a.is_image else "nrrd") if self.format == "auto" else self.format
        return self.folder / f"{case.name}.{suffix}"

    def picture(self, case: BatchCase) -> Path | None:
        return self.folder / f"{case.name}.preview.png" if self.preview else None


def read_cases(table: Path, options: FusionOptions | None = None) -> list[BatchCase]:
    """The cases of a CSV table.

    Args:
        table: the columns ``a`` and ``b`` are paths, relative to the table; ``name`` is that of the results, by default
            A's path in one word; the others of :data:`COLUMNS` replace what ``options`` says, where they are not empty.
        options: of the cases whose row says nothing else.

    Raises:
        InputError: the table cannot be read, has no row, an unknown column, or a row that makes no sense.
    """
    options = options or FusionOptions()
    columns, rows = read_rows(table)
    columns = [name.lower() for name in columns]
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise InputError(f"{table}: unknown column {unknown[0]!r}; use {', '.join(COLUMNS)}")
    if missing := [name for name in ("a", "b") if name not in columns]:
        raise InputError(f"{table}: there is no column {missing[0]!r}; found {', '.join(columns) or 'nothing'}")
    if not rows:
        raise InputError(f"{table} has no row below its header")
    cases, lines = [], {}
    for line, row in rows:
        where = f"{table}, line {line}"
        if empty := [name for name in ("a", "b") if not row[name]]:
            raise InputError(f"{where}: the path of {empty[0].upper()} is not given")
        given = {name: row[name] for name in SETTINGS if row.get(name)}
        if given.get("model", "").endswith(".safetensors"):
            given["model"] = str(table.parent / given["model"])
        try:
            mine = replace(options, **given)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        name = row.get("name") or _name_of(row["a"])
        if set(name) & set('/\\:*?"<>|') or name.startswith((".", "-")) or name.endswith((".", " ")):
            raise InputError(f"{where}: {name!r} cannot be the name of a file; use letters, digits, - and _")
        if (first := lines.setdefault(name.lower(), line)) != line:
            raise InputError(f"{where}: the name {name!r} is that of line {first}; give each case its own name")
        cases.append(BatchCase(name, table.parent / row["a"], table.parent / row["b"], mine))
    return cases


def _name_of(path: str) -> str:
    """``patient1/t1.nii.gz`` as ``patient1_t1``: it depends on no other row, so that a longer table goes on."""
    pure = PurePath(path.replace("\\", "/"))
    parts = [part for part in pure.parts if part not in (pure.anchor, "..", "/")]
    suffix = suffix_of(parts[-1]) if parts else ""
    return "_".join(parts)[: -len(suffix) or None]


def run_batch(
    engine,
    cases: Sequence[BatchCase],
    layout: Layout,
    *,
    jobs: int = 2,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Fuse all cases with :meth:`.inference.engine.FusionEngine.fuse`, which takes one after the other.

    Args:
        engine: a :class:`.inference.engine.FusionEngine`.
        jobs: processes that read and write.
        overwrite: whether cases that are finished are fused again.
        report: called with each outcome as it is known.

    Returns:
        One outcome for each case, in their order.

    Raises:
        InputError: the folder holds results of other settings (see :func:`check_settings`).
    """
    if not overwrite:
        check_settings(cases, layout)
    outcomes: dict[str, Outcome] = {}

    def done(outcome: Outcome) -> None:
        outcomes[outcome.case] = outcome
        report(outcome)

    todo: deque[BatchCase] = deque()
    for case in cases:
        record = None if overwrite else finished(case, layout)
        if record is None:
            todo.append(case)
        else:
            done(Outcome(case.name, "skipped", output=record["output_file"], model=record["model"]["name"]))
    count = len(todo)
    reading: deque[tuple[BatchCase, _Task]] = deque()
    writing: deque[tuple[Outcome, _Task]] = deque()
    with _processes(jobs if todo else 0) as pool:
        while todo or reading or writing:
            while todo and len(reading) < _AHEAD:
                case = todo.popleft()
                reading.append((case, pool.start(_read, case)))
            while writing and (writing[0][1].done() or len(writing) > _AHEAD or not reading):
                done(_written(*writing.popleft()))
            if reading:
                case, task = reading.popleft()
                number = count - len(todo) - len(reading)
                outcome, result = _fuse(engine, case, layout, task, _inner(progress, case, number, count))
                if result is None:
                    done(outcome)
                else:
                    writing.append(_start_writing(pool, case, layout, outcome, result))
    return [outcomes[case.name] for case in cases]


def _inner(progress: Progress | None, case: BatchCase, number: int, count: int) -> Progress | None:
    if progress is None:
        return None
    words = f"{case.name} ({number} of {count})"
    return lambda stage, fraction: progress(f"{words}: {stage}", (number - 1 + fraction) / count)


def _fuse(engine, case: BatchCase, layout: Layout, task: _Task, progress: Progress | None):
    """An outcome and the engine's result, or None where it failed."""
    try:
        a, b, sources, seconds = task.result()
        if (out := layout.output(case, a)).resolve() in (case.a.resolve(), case.b.resolve()):
            raise OutputError(f"{out} is one of the inputs; give the case another name")
        started = time.perf_counter()
        result = engine.fuse(a, b, case.options, progress)
    except Cancelled:
        raise
    except ClinicalFMambaError as error:
        return _failed(case, error), None
    except Exception as error:  # whatever it is, the other cases are worth doing
        log.debug("%s failed", case.name, exc_info=True)
        return _failed(case, error), None
    seconds += time.perf_counter() - started
    outcome = Outcome(
        case.name,
        "fused",
        seconds,
        model=result.provenance["model"]["name"],
        warnings="; ".join(result.warnings),
    )
    return outcome, (result, sources)


def _failed(case: BatchCase, error: Exception) -> Outcome:
    words = " ".join(str(error).split())
    expected = isinstance(error, ClinicalFMambaError)
    return Outcome(case.name, "failed", error=words if expected else f"{type(error).__name__}: {words}")


def _start_writing(pool, case: BatchCase, layout: Layout, outcome: Outcome, made) -> tuple[Outcome, _Task]:
    result, sources = made
    out = layout.output(case, result.volume)
    record = {
        "output_file": str(out),
        **result.provenance,
        "batch": {"sources": sources},
    }
    # not the result itself: its class would be imported there, and torch with it
    plain = SimpleNamespace(
        volume=result.volume,
        fused=result.fused,
        a01=result.a01 if layout.preview else None,
        b01=result.b01 if layout.preview else None,
        provenance=result.provenance,
        header=result.metadata(),
    )
    task = pool.start(_write, plain, out, layout.picture(case), layout.record(case), record)
    return replace(outcome, output=str(out)), task


def _written(outcome: Outcome, task: _Task) -> Outcome:
    try:
        return replace(outcome, seconds=outcome.seconds + task.result())
    except Exception as error:
        words = " ".join(str(error).split())
        return replace(outcome, status="failed", output="", error=words)


# ------------------------------------------------------------------------------------- finished by an earlier call


def check_settings(cases: Sequence[BatchCase], layout: Layout) -> None:
    """Raise InputError where ``layout`` holds finished results that were made with other settings."""
    from .pretrained import find_weights, sha256

    checksum = functools.cache(lambda model: sha256(find_weights(model)[1]))
    changed = [(case.name, words) for case in cases if (words := _changes(case, layout, checksum))]
    if changed:
        name, words = changed[0]
        others = f" (and of {len(changed) - 1} more cases)" if len(changed) > 1 else ""
        raise InputError(
            f"{layout.folder} holds a result of {name}{others} that was made with other settings: {words}; "
            "choose another folder, or --overwrite to make all cases again"
        )


def _record(case: BatchCase, layout: Layout) -> dict | None:
    """The record of a complete earlier result."""
    try:
        record = json.loads(layout.record(case).read_text(encoding="utf-8"))
        complete = "sources" in record["batch"] and Path(record["output_file"]).name.startswith(f"{case.name}.")
        files = [layout.folder / Path(record["output_file"]).name, *filter(None, [layout.picture(case)])]
        record["output_file"] = str(files[0])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if complete and all(path.is_file() for path in files) else None


def _changes(case: BatchCase, layout: Layout, checksum: Callable[[str], str]) -> str:
    """What a finished result was made with, where that differs from what is asked for; ``""`` where it does not."""
    record = _record(case, layout)
    if record is None:
        return ""
    now = json.loads(json.dumps(asdict(case.options)))
    was = record["settings"]
    for key in (f.name for f in fields(FusionOptions) if f.name not in _NO_SETTINGS):
        if was.get(key) != now[key]:
            return f"{key} was {was.get(key)}, is {now[key]} now"
    if layout.format not in ("auto", suffix_of(record["output_file"])[1:]):
        return f"the format was {suffix_of(record['output_file'])[1:]}, is {layout.format} now"
    if (version := record["software"]["version"]) != __version__:
        return f"the version was {version}, is {__version__} now"
    model = record["model"]["name"] if case.options.model == "auto" else case.options.model
    if checksum(model) != record["model"]["sha256"]:
        return f"the weights of {model} were other ones"
    return ""


def finished(case: BatchCase, layout: Layout) -> dict | None:
    """The record of a case that need not be fused: complete, and made from the files that are there now."""
    record = _record(case, layout)
    if record is None:
        return None
    for side, path in (("a", case.a), ("b", case.b)):
        # a source that has gone (archived, say) changes nothing
        if path.exists() and _identity(path) != record["batch"]["sources"][side]:
            log.info("%s: %s has changed since; it is fused again", case.name, path)
            return None
    return record


def _identity(path: Path) -> dict:
    """What tells whether a file or DICOM folder has changed, without reading it."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = [file.stat() for file in files]
    return {
        "path": str(path.resolve()),
        "files": len(files),
        "bytes": sum(s.st_size for s in states),
        "modified_ns": max((s.st_mtime_ns for s in states), default=0),
    }


# -------------------------------------------------------------------------------------- in processes of their own


def _read(case: BatchCase) -> tuple[Volume, Volume, dict, float]:
    started = time.perf_counter()
    for side, path in (("A", case.a), ("B", case.b)):
        if not path.exists():
            raise InputError(f"{side}, {path}: no such file or folder; check the table")
    sources = {"a": _identity(case.a), "b": _identity(case.b)}
    a = read_volume(case.a, case.options.modality_a)
    b = read_volume(case.b, case.options.modality_b)
    return a, b, sources, time.perf_counter() - started


def _write(result, out: Path, picture: Path | None, record_path: Path, record: dict) -> float:
    started = time.perf_counter()
    record_path.unlink(missing_ok=True)  # of an earlier result, which is about to be replaced
    write_result(result.volume, result.fused, result.header, out)
    if picture is not None:
        from .preview import save_fusion

        save_fusion(picture, result)
    write_text(record_path, json.dumps(record, indent=2) + "\n")
    return time.perf_counter() - started


class _Task:
    """A call in a process of the pool; where that process dies, the call is tried once more, alone."""

    def __init__(self, future: Future | None, call: tuple):
        self._future, self._call = future, call

    def done(self) -> bool:
        return self._future is not None and self._future.done()

    def result(self):
        try:
            if self._future is not None:
                return self._future.result()
        except BrokenProcessPool:
            pass  # by this call, or by another one that ran beside it
        with ProcessPoolExecutor(1, _context(), _start_process) as alone:
            try:
                return alone.submit(*self._call).result()
            except BrokenProcessPool as error:
                raise InputError(
                    "the process that read or wrote its files ended unexpectedly; a file is damaged, or memory ran out"
                ) from error


class _Pool:
    def __init__(self, jobs: int):
        self._jobs, self._pool = jobs, None

    def start(self, function, *arguments) -> _Task:
        call = (function, *arguments)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._jobs, _context(), _start_process)
        try:
            return _Task(self._pool.submit(*call), call)
        except BrokenProcessPool:
            self.close()
            return _Task(None, call)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@contextlib.contextmanager
def _processes(jobs: int) -> Iterator[_Pool]:
    pool = _Pool(jobs)
    try:
        yield pool
    finally:
        pool.close()


def _context():
    # fork would copy torch's threads in whatever state they are
    return multiprocessing.get_context("spawn")


def _start_process() -> None:
    """Finish a file that is being written when Ctrl-C comes, and end when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------- several devices


def run_on_devices(
    run: Callable[[list[BatchCase]], list[Outcome]],
    cases: Sequence[BatchCase],
    accelerator: str,
    devices: str,
    num_nodes: int,
    strategy: str,
) -> list[Outcome] | None:
    """Call ``run`` for a part of the cases in each process that Lightning Fabric starts, or that SLURM has started.

    Args:
        accelerator, devices, num_nodes, strategy: of :class:`lightning.fabric.Fabric`.

    Returns:
        All outcomes in the order of the cases, in the first process; None in the others.

    Raises:
        InputError: Lightning refuses the settings.
    """
    import torch.distributed
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    for name in ("fabric", "pytorch"):  # whichever of the two was imported last speaks
        logging.getLogger(f"lightning.{name}").setLevel(logging.ERROR)
    chosen = int(devices) if devices.lstrip("-").isdigit() else devices
    try:
        fabric = Fabric(accelerator=accelerator, devices=chosen, num_nodes=num_nodes, strategy=strategy)
        fabric.launch()
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(f"Lightning refuses these devices: {' '.join(str(error).split())}") from error
    mine = run(list(cases[fabric.global_rank :: fabric.world_size]))
    gathered = [mine]
    if fabric.world_size > 1:
        gathered = [None] * fabric.world_size
        torch.distributed.all_gather_object(gathered, mine)
        torch.distributed.destroy_process_group()
    if fabric.global_rank:
        return None
    found = {outcome.case: outcome for part in gathered for outcome in part}
    return [found[case.name] for case in cases]


# ------------------------------------------------------------------------------------------------------- table


def write_table(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """``results.csv``, a line for each case; raises OutputError."""
    path = folder / TABLE
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Outcome)])
        writer.writerows([*asdict(replace(o, seconds=round(o.seconds, 2))).values()] for o in outcomes)
    return path


def raise_failures(outcomes: Sequence[Outcome], table: Path) -> None:
    """Raise BatchError that names the failed cases, where there are any."""
    failed = [outcome.case for outcome in outcomes if outcome.status == "failed"]
    if failed:
        names = ", ".join(failed[:_NAMES_SHOWN]) + (" ..." if len(failed) > _NAMES_SHOWN else "")
        raise BatchError(f"{len(failed)} of {len(outcomes)} cases failed: {names}; {table} says why")
