"""The demonstration: a head phantom, three fusions, pictures and metrics in one folder."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import NOTICE
from .config import FusionOptions
from .errors import MissingDependencyError
from .files import write_text
from .inference.colour import luma
from .inference.engine import FusionEngine, FusionResult
from .inference.intensity import apply_window, choose_window
from .phantom import make_phantom
from .preview import colourise, save_fusion
from .volumes import Volume, write_volume

# The quick ones: FSIM, FMI and VIF of a volume take longer than its fusion.
METRICS = ("PSNR", "SSIM", "QABF", "SCD", "EN")
# Name of the fused file, A, B.
PAIRS = (("ct-t2", "CT", "T2"), ("t1-t2", "T1", "T2"), ("spect-t2", "SPECT colour", "T2"))


@dataclass(frozen=True)
class DemoSummary:
    """What the demonstration made.

    Attributes:
        rows: one for each pair and method: pair, method, metrics.
        models: name of the network for each pair.
        skipped: why there are no metrics, or ``""``.
        warnings: of all fusions.
        seconds: for everything.
    """

    rows: list[dict]
    models: dict[str, str]
    skipped: str
    warnings: tuple[str, ...]
    seconds: float

    def text(self) -> str:
        """A table for people."""
        lines = [f"{pair:10}{model}" for pair, model in self.models.items()]
        if self.skipped:
            lines.append(f"Metrics were skipped: {self.skipped}")
        else:
            names = [key for key in self.rows[0] if key not in ("pair", "method")]
            lines.append(f"{'pair':10}{'method':10}" + "".join(f"{name:>8}" for name in names))
            for row in self.rows:
                values = "".join(f"{row[name]:8.3f}" for name in names)
                lines.append(f"{row['pair']:10}{row['method']:10}{values}")
        lines.append(f"{self.seconds:.0f} s")
        return "\n".join(lines)


def run_demo(
    folder: Path,
    size: int = 128,
    engine: FusionEngine | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> DemoSummary:
    """Make the phantom, fuse CT with T2, T1 with T2 and coloured SPECT with T2, and write everything to ``folder``.

    Files: ``ct.nrrd`` and so on, ``fused-ct-t2.nrrd`` with ``.png`` (A, B and fused in three planes) and ``.json``
    (provenance) beside it, ``metrics.csv`` and ``metrics.json``: the network against the mean of the sources.

    Args:
        folder: exists.
        size: voxels along each edge of the phantom.

    Raises:
        WeightsError: no model is bundled for a pair.
        OutputError: a file cannot be written.
    """
    started = time.perf_counter()
    engine = engine or FusionEngine()
    report = progress or (lambda stage, fraction: None)
    report("making the phantom", 0.0)
    volumes = make_phantom(size)
    volumes["SPECT colour"] = coloured(volumes["SPECT"])
    for name, volume in volumes.items():
        write_volume(volume, folder / f"{name.lower().replace(' ', '-')}.nrrd", {"content": "synthetic, no patient"})

    rows, models, warnings, skipped = [], {}, [], ""
    for k, (pair, a, b) in enumerate(PAIRS):
        share = 0.9 / len(PAIRS)

        def inner(stage: str, fraction: float, start=0.1 + k * share, width=0.8 * share, pair=pair) -> None:
            report(f"{pair}: {stage}", start + width * fraction)

        result = engine.fuse(volumes[a], volumes[b], FusionOptions(), inner)
        models[pair] = f"{result.provenance['model']['name']}, {result.provenance['seconds']:.1f} s"
        warnings += [f"{pair}: {warning}" for warning in result.warnings]
        _write(result, folder / f"fused-{pair}", (a, b))
        if not skipped:
            try:
                rows += _measure(pair, result)
            except MissingDependencyError as error:
                skipped = str(error)
    if not skipped:
        write_text(folder / "metrics.json", json.dumps({"notice": NOTICE, "metrics": rows}, indent=2) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write_text(folder / "metrics.csv", table.getvalue())
    report("done", 1.0)
    return DemoSummary(rows, models, skipped, tuple(warnings), time.perf_counter() - started)


def coloured(spect: Volume) -> Volume:
    """The counts in the colours of nuclear medicine, as SPECT comes out of an archive."""
    counts = apply_window(spect.array, choose_window(spect))
    return replace(spect, array=colourise(counts, "rainbow"), name="SPECT colour")


def _write(result: FusionResult, stem: Path, names: tuple[str, str]) -> None:
    write_volume(result.volume, stem.with_suffix(".nrrd"), result.metadata())
    write_text(stem.with_suffix(".json"), json.dumps(result.provenance, indent=2) + "\n")
    save_fusion(stem.with_suffix(".png"), result, f"Phantom, {result.provenance['model']['name']}", names)


def _measure(pair: str, result: FusionResult) -> list[dict]:
    """Metrics of the result and of the mean of its sources, which any fusion should beat."""
    try:
        from .evaluation.metrics import evaluate_all
    except ImportError as error:
        raise MissingDependencyError(
            f"{error}; install the metrics with: pip install 'ClinicalFMambaLib[train]'"
        ) from None
    a, b = (luma(x) if x.ndim == 4 else x for x in (result.a01, result.b01))
    rows = []
    for method, image in (("network", result.fused), ("average", (a + b) / 2)):
        rows.append({"pair": pair, "method": method, **evaluate_all(image, a, b, METRICS)})
    return rows
