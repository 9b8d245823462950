"""The real worker with an engine that needs no torch and misbehaves when told to; run with Slicer's Python.

What it fuses is the mean of both volumes in their full ranges, so that tests can compute what they expect.
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from ClinicalFMambaLib import NOTICE, worker
from ClinicalFMambaLib.errors import Cancelled
from ClinicalFMambaLib.volumes import compare_grids, resample_onto


@dataclass
class Result:
    """The fields of a FusionResult that the worker reads."""

    volume: object
    fused: np.ndarray
    a01: np.ndarray
    b01: np.ndarray
    warnings: tuple
    provenance: dict


def scaled(array):
    array = np.nan_to_num(array.astype(np.float32))
    low, high = float(array.min()), float(array.max())
    high = max(high, low + 1e-3)  # the engine has no empty window either
    return (array - low) / (high - low), (low, high)


def fillDisk():
    """Let no file that this process writes grow, as it is on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


class Engine:
    def __init__(self, arguments, write):
        self.arguments, self.write = arguments, write

    def fuse(self, a, b, options, progress, cancelled):
        mode = self.arguments.mode
        progress("checking the inputs", 0.0)
        if mode == "memory" and options.device != "cpu" and options.max_memory_gib is None:
            raise MemoryError("cannot allocate 99 GiB")
        difference = compare_grids(a, b)
        if difference:
            b = resample_onto(b, a)
        for step in range(self.arguments.steps):
            progress("fusing", 0.2 + 0.7 * step / self.arguments.steps)
            if cancelled():
                raise Cancelled("cancelled")
            if mode == "garbage":
                self.write("Segmentation fault, said a library")
            elif mode == "crash":
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            elif mode == "silent":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif mode == "disk":
                fillDisk()
            elif mode == "stuck":  # in a forward pass that looks at nothing
                time.sleep(60)
            time.sleep(self.arguments.seconds / self.arguments.steps)
        grey_a, window_a = scaled(a.array if a.array.ndim == 3 else a.array.mean(axis=-1))
        grey_b, window_b = scaled(b.array if b.array.ndim == 3 else b.array.mean(axis=-1))
        fused = (grey_a + grey_b) / 2
        if a.is_colour or b.is_colour:
            array = np.repeat(np.rint(255 * fused).astype(np.uint8)[..., None], 3, axis=-1)
        else:
            array = np.rint(1000 * fused).astype(np.int16)
        provenance = {
            "notice": NOTICE,
            "software": {"name": "ClinicalFMamba", "version": "fake"},
            "date_utc": "2026-01-01T00:00:00+00:00",
            "inputs": {
                key: {
                    "name": volume.name,
                    "modality": options.modality_a if key == "a" else options.modality_b,
                    "size_xyz": list(volume.shape[::-1]),
                    "window": {"low": window[0], "high": window[1], "text": "all values"},
                }
                for key, volume, window in (("a", a, window_a), ("b", b, window_b))
            },
            "model": {"name": "mean", "sha256": "0" * 64},
            "device": {"name": "cpu", "reason": "a test"},
            "grid_difference": difference,
            "output": {"type": str(array.dtype), "scale": "a test"},
            "settings": {"model": options.model, "device": options.device, "max_memory_gib": options.max_memory_gib},
            "seconds": self.arguments.seconds,
            "pid": os.getpid(),
            "warnings": ["a test fused these"],
        }
        return Result(replace(a, array=array), fused, grey_a, grey_b, ("a test fused these",), provenance)


def classify(engine, a, b, choice, *, device, progress, cancelled):
    """High grade on the whole grid; no reading of a volume whose name says that it is healthy."""
    from ClinicalFMambaLib.inference.classify import Classification

    progress("classifying", 0.5)
    if "healthy" in a.name:
        return Classification("grade", "grade reading", abstention="no tumour was found", note=NOTICE)
    region = np.zeros(a.shape, np.uint8)
    region[1:-1, 1:-1, 1:-1] = 1
    drop = 3 * region.astype(np.float32)
    probabilities = (("low", 0.2, 0.1, 0.4), ("high", 0.8, 0.6, 0.9))
    maps = {"occlusion": replace(a, array=drop), "region": replace(a, array=region)}
    return Classification("grade", "grade reading", probabilities, note=f"a guess. {NOTICE}", **maps)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--classifier", action="store_true")
    arguments, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    if arguments.mode == "mute":  # starts, and never says a word
        time.sleep(60)
    if arguments.mode == "bad start":
        sys.exit("this Python is broken")
    make_writer = worker._line_writer
    writers = []

    def line_writer(descriptor):
        writers.append(make_writer(descriptor))
        return writers[-1]

    def make_engine():
        if arguments.mode == "slow start":
            time.sleep(1.5)
        device = {"name": "cpu", "reason": "a test asked for it", "free_gib": 8.0}
        classifiers = ()
        if arguments.classifier:
            from ClinicalFMambaLib.inference import classify as reading

            reading.classify, reading.open_classifier = classify, lambda choice: None
            about = {"verdict": "grade reading", "evidence": "Its AUC is 0.8."}
            classifiers = ({"name": "grade", "labels": ["low", "high"], **about},)
        engine = Engine(arguments, lambda line: writers[-1](line))
        return worker.Setup(engine, "none", device, "", (), classifiers)

    worker._line_writer, worker.make_engine = line_writer, make_engine
    worker.MEASURING_SECONDS = 60  # however busy the machine is
    return worker.main()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
