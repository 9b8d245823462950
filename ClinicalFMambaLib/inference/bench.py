"""Time and memory of the inference plan against the plain network, in one run.

The plain path is what a direct implementation does: eager modules, contiguous layout, the reference scan loop. Each
path runs in a process of its own, so that one's memory is not the other's, and the two take turns, so that what else
the machine does meets both.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..allocator import keep_freed_memory
from ..errors import InputError
from ..files import write_text

# name: dimension of the model, size of one pair, number of slices
CASES = {
    "2d-256": (2, (256, 256), 1),
    "2d-512": (2, (512, 512), 1),
    "2d-slices": (2, (512, 512), 40),
    "3d-128": (3, (128, 128, 128), 1),
    "3d-brats": (3, (155, 240, 240), 1),
    "3d-clinical": (3, (160, 512, 512), 1),
}
DEFAULT_CASES = ("2d-256", "3d-128")
SCAN_LENGTHS = tuple(1024 * 2**k for k in range(7))
SCAN_SIZES = {"channels": 256, "states": 8}  # of one direction of one Mamba layer
# Beyond these the plain path takes minutes and tens of GiB.
_PLAIN_VOXELS = {2: 512 * 512, 3: 128**3}
_MIB = 2**20


@dataclass(frozen=True)
class BenchRow:
    """One case.

    Attributes:
        case: its name.
        fast_s, plain_s: median seconds of the plan and of the plain path; None where that was not run.
        ratio: plain_s / fast_s.
        fast_cpu_s, plain_cpu_s, cpu_ratio: the same in processor seconds of all threads, which other programs on the
            machine disturb less.
        peak_mib, plain_peak_mib: growth of the process's resident memory, in MiB, from after the import and the
            loading of the weights to the highest point; the inputs and the result are part of it.
        max_abs_diff: largest difference of the outputs, in [0, 1]; for a scan relative to the largest output.
        voxels: of one source; for a scan, tokens. voxels_per_s: of the plan.
        shares: each stage's share of the plan's time.
        weights: whose weights, ``device``, ``precision``, ``scan_backend``, ``threads``: what was measured.
        floors: on a GPU the least seconds by memory (both sources and the result once, over the measured
            bandwidth) and by arithmetic (the plan's operations over the measured peak of a matrix product); else empty.
        note: why a number is missing, or ``""``.
    """

    case: str
    fast_s: float
    plain_s: float | None
    ratio: float | None
    peak_mib: float
    plain_peak_mib: float | None
    max_abs_diff: float | None
    voxels: int
    voxels_per_s: float
    shares: dict[str, float]
    weights: str
    device: str
    precision: str
    scan_backend: str
    threads: int
    fast_cpu_s: float
    plain_cpu_s: float | None
    cpu_ratio: float | None
    floors: dict[str, float] = field(default_factory=dict)
    note: str = ""


def run_bench(
    cases=DEFAULT_CASES,
    *,
    precision: str = "float32",
    device: str = "auto",
    max_memory_gib: float | None = None,
    rounds: int = 3,
    report=lambda row: None,
) -> list[BenchRow]:
    """Measure.

    Args:
        cases: names of :data:`CASES`, ``"scan"``, or ``"all"``.
        rounds: how often the two paths take turns.
        report: called with each row as it is ready.

    Raises:
        InputError: an unknown case.
    """
    if "all" in cases:
        cases = (*CASES, "scan")
    for case in cases:
        if case != "scan" and case not in CASES:
            raise InputError(f"bench case {case!r} is unknown; use {', '.join(CASES)}, scan or all")
    rows = []
    for case in cases:
        names = [f"scan-{n // 1024}k" for n in SCAN_LENGTHS] if case == "scan" else [case]
        for name in names:
            rows.append(_measure(name, precision, device, max_memory_gib, rounds))
            report(rows[-1])
    return rows


def to_json(rows: list[BenchRow], path: Path) -> None:
    """Write rows as a list of objects; raises OutputError."""
    write_text(path, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def table(rows: list[BenchRow]) -> str:
    """The rows for people."""
    lines = [
        f"{'case':12}{'fast s':>9}{'plain s':>9}{'ratio':>7}{'cpu':>7}{'Mvox/s':>8}{'MiB':>7}{'plain MiB':>10}"
        f"{'max diff':>9}  share of time"
    ]
    for row in rows:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row.shares.items())
        lines.append(
            f"{row.case:12}{row.fast_s:9.3f}{_cell(row.plain_s, '9.2f')}{_cell(row.ratio, '7.1f')}"
            f"{_cell(row.cpu_ratio, '7.1f')}{row.voxels_per_s / 1e6:8.2f}{row.peak_mib:7.0f}"
            f"{_cell(row.plain_peak_mib, '10.0f')}{_cell(row.max_abs_diff, '9.1e')}"
            f"  {shares}{'; ' if shares and row.note else ''}{row.note}"
        )
    first = rows[0]
    for row in rows:
        if row.floors:
            words = ", ".join(
                f"{name} {1000 * s:.1f} ms ({s / row.fast_s:.0%} of it)" for name, s in row.floors.items()
            )
            lines.append(f"{row.case}: {1000 * row.fast_s:.1f} ms; floors: {words}")
    cube = next((row for row in rows if row.case == "3d-128"), None)
    for row in rows if cube else ():
        if row.case.startswith("3d-") and row is not cube:
            wall, cpu = ((t / row.voxels) / (c / cube.voxels) for t, c in _times(row, cube))
            lines.append(f"{row.case}: time a voxel {wall:.2f} of that of 3d-128 ({cpu:.2f} in processor seconds)")
    lines.append(
        f"{first.threads} threads on {first.device}, {first.precision}, scan {first.scan_backend}, "
        f"{', '.join(sorted({row.weights for row in rows}))}; cpu: the ratio in processor seconds; MiB beyond a "
        "process with the weights loaded"
    )
    return "\n".join(lines)


def _times(row: BenchRow, other: BenchRow):
    return (row.fast_s, other.fast_s), (row.fast_cpu_s, other.fast_cpu_s)


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>{form.split('.')[0]}}" if value is None else format(value, form)


def _measure(case: str, precision: str, device: str, max_memory_gib: float | None, rounds: int) -> BenchRow:
    dimension, size, slices = CASES.get(case, (0, (), 0))
    voxels = _tokens(case) if case.startswith("scan") else math.prod(size) * slices
    plain = case.startswith("scan") or voxels <= _PLAIN_VOXELS[dimension]
    task = {"case": case, "precision": precision, "device": device, "max_memory_gib": max_memory_gib}
    runs: dict[str, list[dict]] = {"fast": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds if plain else 1):
            for path in ("fast", "plain") if plain else ("fast",):
                runs[path].append(_run_child({**task, "path": path, "output": str(Path(folder) / path)}))
        difference = None
        if plain:
            fast, slow = (np.load(Path(folder) / f"{path}.npy") for path in ("fast", "plain"))
            difference = float(np.abs(fast - slow).max())
            if case.startswith("scan"):
                difference /= float(np.abs(slow).max())

    def median(path: str, kind: str) -> float | None:
        values = [s for run in runs[path] for s in run[kind]]
        return statistics.median(values) if values else None

    fast_s, plain_s = median("fast", "seconds"), median("plain", "seconds")
    fast_cpu_s, plain_cpu_s = median("fast", "cpu"), median("plain", "cpu")
    last = runs["fast"][-1]
    total = sum(last["stages"].values())
    return BenchRow(
        case=case,
        fast_s=fast_s,
        plain_s=plain_s,
        ratio=plain_s / fast_s if plain else None,
        peak_mib=max(run["peak"] for run in runs["fast"]) / _MIB,
        plain_peak_mib=max(run["peak"] for run in runs["plain"]) / _MIB if plain else None,
        max_abs_diff=difference,
        voxels=voxels,
        voxels_per_s=voxels / fast_s,
        shares={name: round(value / total, 3) for name, value in last["stages"].items()} if total else {},
        weights=last["weights"],
        device=last["device"],
        precision=last["precision"],
        scan_backend=last["scan_backend"],
        threads=last["threads"],
        fast_cpu_s=fast_cpu_s,
        plain_cpu_s=plain_cpu_s,
        cpu_ratio=plain_cpu_s / fast_cpu_s if plain else None,
        floors=last["floors"],
        note="" if plain else "the plain path does not fit in memory or time",
    )


def _tokens(case: str) -> int:
    return int(case.removeprefix("scan-").removesuffix("k")) * 1024


def _run_child(task: dict) -> dict:
    child = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(task)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    if child.returncode != 0:
        message = child.stderr.decode(errors="replace").strip().splitlines()
        raise InputError(f"bench case {task['case']}, {task['path']} path: {message[-1] if message else 'killed'}")
    return pickle.loads(child.stdout)


# ------------------------------------------------------------------------------------------- in the child


def _resident(key: str) -> float:
    """Bytes of ``VmRSS`` or ``VmHWM``; elsewhere than on Linux the peak of the process for both."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # then the peak counts from the start, which is at most too much
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _child(task: dict) -> dict:
    import torch

    if task["case"].startswith("scan"):
        run, info = _scan_case(task)
    else:
        run, info = _network_case(task)
    device = torch.device(info["device"])
    _reset_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    baseline, floors = info.pop("baseline"), info.pop("floors", {})
    seconds, cpu, output, stages = [], [], None, {}
    started = time.perf_counter()
    # the plain path once a round, the fast one at least that long but for large volumes
    while len(seconds) < (1 if task["path"] == "plain" else 5):
        output = None
        before, before_cpu = time.perf_counter(), time.process_time()
        output, stages = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
        cpu.append(time.process_time() - before_cpu)
        if time.perf_counter() - started > 20:
            break
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM") - baseline
    np.save(task["output"], output)
    return {
        **info,
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak,
        "stages": stages,
        "floors": floors,
        "threads": torch.get_num_threads(),
    }


def _network_case(task: dict):
    import torch

    from .device import GIB, choose_device
    from .plan import build_plan, largest_tile

    dimension, size, slices = CASES[task["case"]]
    device, _ = choose_device(task["device"])
    model, weights = _model(dimension)
    model = model.to(device)
    if task["path"] == "plain":
        network, backend, precision = model, "reference", "float32"
        model.set_scan_backend("reference")
    else:
        network = build_plan(model, task["precision"])
        if task["max_memory_gib"]:
            tile = largest_tile(network.config, size, task["max_memory_gib"] * GIB, network.tile_bytes)
            if tile is None:
                raise InputError(f"{task['max_memory_gib']} GiB do not hold {task['case']}")
            network.tile_bytes = tile
        del model
        backend, precision = network.scan_backend, network.precision
    small = torch.rand(1, 1, *[32] * dimension, device=device)
    with torch.inference_mode():
        network(small, small)  # compiles what is compiled at the first use
    baseline = _resident("VmRSS")
    a, b = _pair(slices, size, device)

    def run():
        stages: dict[str, float] = {}
        fused = np.empty(a.shape, np.float32)
        with torch.inference_mode():
            for k in range(slices):
                fused[k] = network(a[k : k + 1], b[k : k + 1])[0].cpu().numpy()
                for name, seconds in getattr(network, "seconds", {}).items():
                    stages[name] = stages.get(name, 0) + seconds
        return fused, stages

    floors = _floors(network, a, b) if device.type == "cuda" and task["path"] == "fast" else {}
    return run, {
        "baseline": baseline,
        "floors": floors,
        "weights": weights,
        "device": str(device),
        "scan_backend": backend,
        "precision": precision,
    }


def _floors(network, a, b) -> dict[str, float]:
    """See :class:`BenchRow`; on a CUDA device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def seconds(work, times=10) -> float:
        work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / times

    with torch.inference_mode():
        source = torch.empty(2**28, dtype=torch.uint8, device=a.device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source))
        square = torch.empty((4096, 4096), dtype=network.dtype, device=a.device).normal_()
        peak = 2 * 4096**3 / seconds(lambda: square @ square)
        with FlopCounterMode(display=False) as counter:
            network(a[:1], b[:1])
    return {
        "memory": 3 * 4 * a.numel() / bandwidth,
        "arithmetic": counter.get_total_flops() * len(a) / peak,
    }


def _model(dimension: int):
    """The bundled network of this dimension, or one with random weights of a fixed seed; and which."""
    import torch

    from ..config import ModelConfig
    from ..models.clinicalfmamba import ClinicalFMamba
    from ..pretrained import find_weights, load_model, read_index

    for name, entry in read_index().items():
        if entry["dimension"] == dimension:
            return load_model(find_weights(name)[1])[0], name
    torch.manual_seed(0)
    return ClinicalFMamba(ModelConfig(dimension=dimension)).eval(), f"random {dimension}D weights (seed 0)"


def _pair(slices: int, size: tuple[int, ...], device):
    """Smooth structures and noise inside an ellipsoid, black outside, as in a head; (slices, 1, ...) each."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    inside = (sum(axis**2 for axis in axes) < 0.8).float()
    pair = []
    for _ in range(2):
        coarse = torch.rand(slices, 1, *(max(2, n // 16) for n in size), generator=generator)
        smooth = F.interpolate(coarse, size, mode=mode)
        smooth += 0.1 * torch.rand(smooth.shape, generator=generator)
        pair.append((smooth.mul_(inside).clamp_(0, 1)).to(device))
    return pair


def _scan_case(task: dict):
    """The scan of one direction: as the plan runs it, on tokens in chunks, against the loop over all tokens."""
    import torch

    from ..ops.selective_scan import available_backends, selective_scan
    from ..ops.token_scan import scan_tokens
    from .device import choose_device
    from .plan import CHUNK

    device, _ = choose_device(task["device"])
    length, channels, states = _tokens(task["case"]), SCAN_SIZES["channels"], SCAN_SIZES["states"]
    backend = "reference" if task["path"] == "plain" else available_backends(device)[0]
    generator = torch.Generator().manual_seed(0)

    def inputs(tokens):
        u, x = torch.randn(2, 1, channels, tokens, generator=generator)
        B, C = torch.randn(2, 1, 1, states, tokens, generator=generator)
        A = -torch.arange(1.0, states + 1).expand(channels, states)
        delta = torch.nn.functional.softplus(x - 4)  # about 0.02, as in a fresh Mamba layer
        return [v.to(device) for v in (u, delta, A, B, C, torch.ones(channels))]

    def tokens_last(u, delta, A, B, C, D):
        u, delta = (v.mT[None].contiguous() for v in (u, delta))
        B, C = (v.mT.contiguous() for v in (B, C))
        return u, delta, A.mT[None].contiguous(), B, C, D[None]

    def scan(u, delta, A, B, C, D):
        if backend in ("reference", "mamba-ssm"):
            return selective_scan(u, delta, A, B, C, D, backend=backend)
        state = torch.zeros((1, 1, states, channels), device=device)
        y = torch.empty(u.shape, device=device)
        for start in range(0, u.shape[2], CHUNK):
            at = slice(start, start + CHUNK)
            inputs = (u[:, :, at], delta[:, :, at], A, B[:, :, at], C[:, :, at], D, state)
            scan_tokens(*inputs, out=y[:, :, at], backend=backend)
        return y[0].mT

    arrange = tokens_last if backend not in ("reference", "mamba-ssm") else lambda *x: x
    with torch.inference_mode():
        scan(*arrange(*inputs(64)))
    baseline = _resident("VmRSS")
    case = arrange(*inputs(length))

    def run():
        with torch.inference_mode():
            return scan(*case).cpu().numpy(), {}

    return run, {
        "baseline": baseline,
        "weights": "scan of random values",
        "device": str(device),
        "scan_backend": backend,
        "precision": "float32",
    }


if __name__ == "__main__":
    keep_freed_memory()
    result = pickle.dumps(_child(json.loads(sys.argv[1])))
    sys.stdout.buffer.write(result)
