"""The worker's protocol with a fake engine in this process, and the real one in processes of its own."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ClinicalFMambaLib import worker as worker_module
from ClinicalFMambaLib.errors import Cancelled, DeviceError, InputError, OutputError, WeightsError
from ClinicalFMambaLib.inference.colour import luma
from ClinicalFMambaLib.volumes import IDENTITY, Volume
from ClinicalFMambaLib.worker import Setup, Worker

TIMEOUT = 60  # of a wait for something that takes milliseconds: only a hang gets there
ROOT = Path(__file__).resolve().parents[2]
GEOMETRY = {"spacing": [1, 1.5, 2], "origin": [-3, 4.5, 0], "direction": list(IDENTITY)}


class Result:
    """The fields of a FusionResult."""

    def __init__(self, a, b, seed=0):
        rng = np.random.default_rng(seed)
        self.fused = rng.random(a.shape, np.float32)
        self.a01, self.b01 = (
            v.array if v.is_colour else v.array.astype(np.float32) / max(1, v.array.max()) for v in (a, b)
        )
        colour = a.is_colour or b.is_colour
        array = np.zeros((*a.shape, 3), np.uint8) if colour else np.rint(self.fused * 1000).astype(np.int16)
        self.volume = replace(a, array=array)
        self.warnings = ("look twice",)
        self.provenance = {"model": {"name": "fake"}, "gain": float("nan"), "count": np.int64(3)}


class Engine:
    """Does what the test says: raises, waits, or gives a result; remembers what it was asked."""

    def __init__(self, error=None):
        self.calls = []
        self.error = error
        self.blocks = False
        self.going = threading.Event()

    def fuse(self, a, b, options, progress, cancelled):
        self.calls.append((a, b, options))
        progress("loading the model", 0.02)
        if self.error is not None:
            raise self.error
        progress("fusing", 0.5)
        self.going.set()
        while self.blocks:
            if cancelled():
                raise Cancelled("fusion was cancelled")
            time.sleep(0.002)
        progress("done", 1.0)
        return Result(a, b)


class Panel:
    """The other side of the pipes, with the worker in a thread."""

    def __init__(self, engine, setup=None, **options):
        self._lines, self._events = queue.Queue(), queue.Queue()
        self.seen = []
        setup = setup or Setup(engine, "2.0", {"name": "cpu", "reason": "no CUDA GPU found"})
        self.worker = Worker(self._lines.get, self._events.put, lambda: setup, poll_seconds=0.01, **options)
        self.ended = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        self.ended = self.worker.run()

    def send(self, *requests):
        for request in requests:
            self._lines.put(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")

    def close(self):
        self._lines.put(b"")

    def next(self):
        event = json.loads(self._events.get(timeout=TIMEOUT))
        self.seen.append(event)
        return event

    def wait(self, *names):
        while (event := self.next())["event"] not in names:
            pass
        return event

    def join(self):
        self.thread.join(TIMEOUT)
        while not self._events.empty():
            self.next()
        return self.ended


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def panel(engine):
    panel = Panel(engine)
    yield panel
    engine.blocks = False
    panel.close()
    panel.join()


@pytest.fixture
def fuse(tmp_path):
    """A valid fuse request; keyword arguments replace parts of it."""
    for name, seed in (("a", 0), ("b", 1)):
        values = np.random.default_rng(seed).integers(0, 900, (3, 48, 50)).astype(np.int16)
        np.save(tmp_path / f"{name}.npy", values)

    def make(identity="1", **parts):
        a, b = ({"array": str(tmp_path / f"{k}.npy"), "name": k.upper(), "modality": "MR", **GEOMETRY} for k in "ab")
        output = str(tmp_path / f"fused{identity}.npy")
        return {"command": "fuse", "id": identity, "a": a, "b": b, "options": {}, "output": output, **parts}

    return make


END = ("result", "error", "cancelled")


# ------------------------------------------------------------------------------------------- the protocol


def test_starting_then_ready(panel):
    assert panel.next() == {"event": "starting", "pid": os.getpid()}
    ready = panel.next()
    assert ready == {
        "event": "ready",
        "version": "0.1.0",
        "pid": os.getpid(),
        "torch": "2.0",
        "device": {"name": "cpu", "reason": "no CUDA GPU found"},
        "problem": "",
        "models": [],
        "classifiers": [],
        "classifier_problem": "no tumour classifier is bundled with this version",
    }


def test_classification_is_refused_at_once_without_a_classifier(panel, engine, fuse):
    panel.send(fuse(classify="auto"))
    error = panel.wait(*END)
    assert (error["event"], error["kind"]) == ("error", "InputError")
    assert "no tumour classifier is bundled" in error["message"]
    assert engine.calls == []


@pytest.fixture
def reading(monkeypatch):
    """The classifier replaced; what it was asked, and what it answers or raises."""
    from ClinicalFMambaLib.inference import classify as module

    class Fake:
        calls, error, abstention = [], None, ""

        def __call__(self, engine, a, b, choice, *, device, progress, cancelled):
            self.calls.append((a.name, b.name, choice))
            progress("classifying", 0.7)
            if self.error is not None:
                raise self.error
            if self.abstention:
                return module.Classification("grade", "experimental", abstention=self.abstention, note="a note")
            probabilities = (("LGG", 0.25, 0.1, 0.4), ("HGG", 0.75, 0.6, 0.9))
            drop = replace(a, array=np.full(a.shape, 7, np.int16))
            return module.Classification("grade", "experimental", probabilities, note="a note", occlusion=drop)

    fake = Fake()
    fake.calls = []
    monkeypatch.setattr(module, "classify", fake)
    monkeypatch.setattr(module, "open_classifier", lambda choice: None)
    return fake


@pytest.fixture
def classifying(engine):
    bundled = {"name": "grade", "labels": ["LGG", "HGG"], "verdict": "experimental", "evidence": ""}
    panel = Panel(engine, Setup(engine, "2.0", {"name": "cpu", "reason": ""}, classifiers=(bundled,)))
    yield panel
    panel.close()
    panel.join()


def test_classification(classifying, reading, fuse, tmp_path):
    classifying.send(fuse(classify="auto", metrics=False))
    found = classifying.wait(*END)["classification"]
    assert reading.calls == [("A", "B", "auto")]
    assert found["probabilities"][1] == {"label": "HGG", "probability": 0.75, "low": 0.6, "high": 0.9}
    assert found["text"] == (
        "experimental, not a grade reading: LGG 25 % (10 to 40), HGG 75 % (60 to 90)"
        " if both were equally likely before the scan"
    )
    assert (found["model"], found["note"], found["region"]) == ("grade", "a note", None)
    assert np.load(found["occlusion"]).dtype == np.int16
    fractions = [event["fraction"] for event in classifying.seen if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert any(event.get("stage") == "classifying" for event in classifying.seen)


def test_an_abstention_and_a_failure_leave_the_fusion_as_it_is(classifying, reading, fuse):
    reading.abstention = "no tumour was found"
    classifying.send(fuse("1", classify="auto"))
    found = classifying.wait(*END)
    assert found["event"] == "result" and Path(found["output"]).is_file()
    assert found["classification"]["text"] == "no reading: no tumour was found"
    assert found["classification"]["probabilities"] == [] and found["classification"]["occlusion"] is None
    reading.abstention, reading.error = "", RuntimeError("boom")
    classifying.send(fuse("2", classify="auto"))
    found = classifying.wait(*END)
    assert found["event"] == "result"
    assert "no reading: RuntimeError: boom" in found["classification"]["text"]


def test_a_choice_that_is_no_text_is_refused(classifying, engine, fuse):
    classifying.send(fuse(classify=["auto"]))
    error = classifying.wait(*END)
    assert (error["event"], error["kind"]) == ("error", "InputError")
    classifying.send(fuse("2", classify="gone.safetensors"))
    error = classifying.wait(*END)
    assert (error["event"], error["kind"]) == ("error", "WeightsError")
    assert engine.calls == []


def test_progress_and_result(panel, engine, fuse, tmp_path):
    request = fuse("7", options={"plane": "coronal", "window_a": [0, 800], "max_memory_gib": 2, "resample": True})
    panel.send(request)
    result = panel.wait(*END)

    progress = [event for event in panel.seen if event["event"] == "progress"]
    assert {event["id"] for event in progress} == {"7"}
    stages = ["reading the inputs", "loading the model", "fusing", "writing the result"]
    assert [event["stage"] for event in progress] == stages
    fractions = [event["fraction"] for event in progress]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0 and fractions[-1] < 1

    ((a, b, options),) = engine.calls
    assert (a.name, a.modality, a.spacing, a.origin, a.direction) == ("A", "MR", (1, 1.5, 2), (-3, 4.5, 0), IDENTITY)
    assert np.array_equal(a.array, np.load(tmp_path / "a.npy"))
    assert np.array_equal(b.array, np.load(tmp_path / "b.npy"))
    assert (options.plane, options.window_a, options.max_memory_gib, options.resample) == ("coronal", (0, 800), 2, True)

    written = np.load(tmp_path / "fused7.npy")
    assert written.dtype == np.int16
    assert np.array_equal(written, Result(a, b).volume.array)
    assert result.pop("seconds") >= 0
    assert result == {
        "event": "result",
        "id": "7",
        "output": request["output"],
        "colour": False,
        "display_range": [0, 1000],
        "warnings": ["look twice"],
        "provenance": {"model": {"name": "fake"}, "gain": None, "count": 3},
        "metrics": {},
        "metrics_note": "",
        "classification": None,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npy", "fused7.npy"]


def test_colour(panel, fuse, tmp_path):
    np.save(tmp_path / "b.npy", np.full((3, 48, 50, 3), 90, np.uint8))
    panel.send(fuse())
    result = panel.wait(*END)
    assert (result["colour"], result["display_range"]) == (True, [0, 255])
    assert np.load(result["output"]).shape == (3, 48, 50, 3)


def test_two_requests_share_the_engine_and_keep_their_order(panel, engine, fuse):
    panel.send(fuse("one"), fuse("two"))
    assert [panel.wait(*END)["id"] for _ in range(2)] == ["one", "two"]
    assert len(engine.calls) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"garbage\n", "one JSON object a line"),
        (b"\xff\xfe\x00\n", "one JSON object a line"),
        (b"[" * 100_000 + b"\n", "one JSON object a line"),
        (b"[1, 2]\n", "command"),
        (b'{"command": 3}\n', "command"),
        (b'{"command": "dance"}\n', "'dance' is unknown"),
        (b'{"command": "cancel"}\n', '"id"'),
        (b'{"command": "fuse", "id": 7}\n', '"id"'),
        (b'{"command": "fuse", "id": ""}\n', '"id"'),
    ],
)
def test_a_line_that_is_no_request_is_answered_and_the_worker_goes_on(panel, fuse, line, words):
    panel.send(line, b"\n", {"command": "ping"}, fuse())
    error = panel.wait("error", "pong")
    assert (error["event"], error["id"], error["kind"]) == ("error", None, "InputError")
    assert words in error["message"]
    assert len(error["message"]) < 300 and "\n" not in error["message"]
    assert panel.wait("error", "pong")["event"] == "pong"
    assert panel.wait(*END)["event"] == "result"


def array(values):
    def save(folder):
        np.save(folder / "a.npy", values, allow_pickle=True)

    return save


def several(folder):
    np.savez(folder / "a.npz", np.zeros(3))
    (folder / "a.npz").replace(folder / "a.npy")


def truncate(folder):
    data = (folder / "a.npy").read_bytes()
    (folder / "a.npy").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "a.npy").unlink(), "does not exist"),
        (truncate, "no whole .npy file"),
        (lambda folder: (folder / "a.npy").write_bytes(b""), "no whole .npy file"),
        (lambda folder: (folder / "a.npy").write_text("hello"), "no whole .npy file"),
        (several, "several arrays"),
        (array(np.array([{}, []], object)), "no whole .npy file"),
        (array(np.zeros((3, 4))), "(z, y, x)"),
        (array(np.zeros((2, 3, 4, 3), np.int16)), "(z, y, x, 3) of uint8"),
        (array(np.zeros((2, 3, 4, 4), np.uint8)), "(z, y, x, 3) of uint8"),
        (array(np.zeros((2, 3, 4), bool)), "integers or floats"),
        (array(np.zeros((2, 3, 4), complex)), "integers or floats"),
        (array(np.full((2, 3, 4), "text")), "integers or floats"),
    ],
)
def test_files_that_hold_no_volume(panel, engine, fuse, tmp_path, spoil, words):
    spoil(tmp_path)
    panel.send(fuse())
    error = panel.wait(*END)
    assert (error["event"], error["id"], error["kind"], error["retry"]) == ("error", "1", "InputError", "")
    assert "a (A)" in error["message"] and words in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("a", None, "object"),
        ("a", {"array": 3}, "array"),
        ("a.spacing", [1, 1], "spacing of a (A) must be 3 finite numbers"),
        ("a.spacing", [1, 1, 0], "positive"),
        ("a.spacing", [1, 1, True], "3 finite numbers"),
        ("a.origin", [0, 0, float("nan")], "3 finite numbers"),
        ("b.origin", None, "origin of b (B) must be 3 finite numbers"),
        ("b.direction", [1, 0, 0], "9 finite numbers"),
        ("a.direction", [0] * 9, "three independent axes"),
        ("a.name", 5, "text"),
        ("a.modality", "X-ray", "'X-ray' is unknown"),
        ("options", [], "object"),
        ("options", {"colour": 1}, "'colour' is unknown"),
        ("options", {"model": None}, "model must be a text"),
        ("options", {"device": "tpu"}, "'tpu' is unknown"),
        ("options", {"device": ["cpu"]}, "device must be a text"),
        ("options", {"resample": "no"}, "true or false"),
        ("options", {"window_a": [1, 2, 3]}, "two numbers"),
        ("options", {"max_memory_gib": "2"}, "GiB"),
        ("options", {"max_memory_gib": -1}, "positive"),
        ("options", {"modality_b": "X"}, "unknown"),
        ("output", 4, ".npy"),
        ("output", "fused.nrrd", ".npy"),
        ("output", "no/such/folder/fused.npy", "does not exist"),
        ("metrics", "yes", "true or false"),
    ],
)
def test_requests_that_cannot_be_fused(panel, engine, fuse, part, value, words):
    request = fuse()
    if "." in part:
        volume, field = part.split(".")
        request[volume][field] = value
    else:
        request[part] = value
    panel.send(request)
    error = panel.wait(*END)
    assert (error["event"], error["id"], error["kind"]) == ("error", "1", "InputError")
    assert words in error["message"]
    assert engine.calls == []
    panel.send(fuse("2"))
    assert panel.wait(*END)["event"] == "result"


def test_an_input_is_never_overwritten(panel, fuse, tmp_path):
    before = (tmp_path / "b.npy").read_bytes()
    panel.send(fuse(output=str(tmp_path / "b.npy")))
    assert "own file" in panel.wait(*END)["message"]
    assert (tmp_path / "b.npy").read_bytes() == before


def test_foreign_byte_order_becomes_native(panel, engine, fuse, tmp_path):
    values = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", values)
    panel.send(fuse())
    panel.wait(*END)
    taken = engine.calls[0][0].array
    assert taken.dtype.isnative
    assert np.array_equal(taken, values)


def wrapped(error):
    """As the engine reports what ran out of memory inside it."""
    outer = InputError("fusing needs about 9 GiB")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "device", "kind", "retry", "words"),
    [
        (InputError("two\nlines"), "cpu", "InputError", "", "two lines"),
        (WeightsError("corrupt"), "cpu", "WeightsError", "", "corrupt"),
        (DeviceError("no GPU"), "cuda", "DeviceError", "cpu", "no GPU"),
        (OutputError("disk full"), "cpu", "InputError", "again", "disk full"),
        (MemoryError(), "cpu", "OutOfMemory", "less-memory", "memory ran out"),
        (MemoryError(), "cuda", "OutOfMemory", "less-memory", "memory ran out"),
        (RuntimeError("CUDA out of memory. Tried"), "cuda", "OutOfMemory", "cpu", "CUDA out of memory"),
        (RuntimeError("MPS backend out of memory"), "mps", "OutOfMemory", "cpu", "MPS"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "cuda", "OutOfMemory", "less-memory", "memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"),
            "cpu",
            "OutOfMemory",
            "less-memory",
            "",
        ),
        (wrapped(RuntimeError("can't allocate memory")), "cpu", "OutOfMemory", "less-memory", "needs about 9 GiB"),
        (wrapped(RuntimeError("shape mismatch")), "cpu", "InputError", "", "needs about 9 GiB"),
        (RuntimeError("shape\nmismatch"), "cpu", "Internal", "", "RuntimeError: shape mismatch"),
        (KeyError("x"), "cpu", "Internal", "", "KeyError: 'x'"),
    ],
)
def test_kinds_of_errors(fuse, error, device, kind, retry, words, caplog, tmp_path):
    engine = Engine(error)
    panel = Panel(engine, Setup(engine, "2.0", {"name": device, "reason": ""}))
    panel.send(fuse())
    event = panel.wait(*END)
    assert (event["event"], event["id"], event["kind"], event["retry"]) == ("error", "1", kind, retry)
    assert words in event["message"] and "\n" not in event["message"]
    assert ("Traceback" in caplog.text) == (kind in ("Internal", "OutOfMemory"))
    assert not (tmp_path / "fused1.npy").exists()
    engine.error = None
    panel.send(fuse("2"))
    assert panel.wait(*END)["event"] == "result"
    panel.close()
    panel.join()


def test_a_device_that_was_asked_for_decides_the_retry(panel, engine, fuse):
    engine.error = RuntimeError("CUDA out of memory")
    panel.send(fuse(options={"device": "cuda"}))
    assert panel.wait(*END)["retry"] == "cpu"


def test_what_is_missing_is_said_and_the_worker_stays(fuse):
    panel = Panel(None, Setup(None, problem="fusing needs torch"))
    assert panel.wait("ready")["problem"] == "fusing needs torch"
    for identity in "12":
        panel.send(fuse(identity))
        error = panel.wait(*END)
        assert (error["kind"], error["message"]) == ("MissingDependencyError", "fusing needs torch")
    panel.send({"command": "quit"})
    assert panel.join() == "stopped"


def test_a_factory_that_fails_is_a_problem_too(caplog):
    events = []
    lines = iter([b'{"command": "quit"}\n'])

    def fail():
        raise OSError("libtorch is broken")

    assert Worker(lambda: next(lines), events.append, fail).run() == "stopped"
    assert "libtorch is broken" in json.loads(events[-1])["problem"]


# ---------------------------------------------------------------------------------- cancelling and ending


def test_cancel_in_the_middle_then_fuse_again(panel, engine, fuse, tmp_path):
    engine.blocks = True
    panel.send(fuse("1"))
    assert engine.going.wait(TIMEOUT)
    panel.send({"command": "ping"}, {"command": "cancel", "id": "other"}, {"command": "cancel", "id": "1"})
    assert panel.wait("pong")  # also while it works
    assert panel.wait(*END) == {"event": "cancelled", "id": "1"}
    assert not (tmp_path / "fused1.npy").exists()
    engine.blocks = False
    panel.send({"command": "cancel", "id": "1"}, fuse("1"))  # late, and the id is free again
    assert panel.wait(*END)["event"] == "result"


def test_cancel_of_a_waiting_request(panel, engine, fuse):
    engine.blocks = True
    panel.send(fuse("1"), fuse("2"), {"command": "cancel", "id": "2"}, {"command": "ping"})
    panel.wait("pong")
    engine.blocks = False
    assert panel.wait(*END)["event"] == "result"
    assert panel.wait(*END) == {"event": "cancelled", "id": "2"}
    assert len(engine.calls) == 1


def test_an_id_that_is_in_use(panel, engine, fuse):
    engine.blocks = True
    panel.send(fuse("1"), fuse("1"))
    error = panel.wait(*END)
    assert (error["id"], error["kind"]) == (None, "InputError")
    engine.blocks = False
    assert panel.wait(*END)["event"] == "result"


@pytest.mark.parametrize("way", ["quit", "end of stdin", "stop"])
def test_ending_while_busy_cancels_everything(engine, fuse, way, tmp_path):
    told = []
    panel = Panel(engine, on_stop=lambda: told.append(way))
    engine.blocks = True
    panel.send(fuse("1"), fuse("2"), {"command": "ping"})
    panel.wait("pong")
    assert engine.going.wait(TIMEOUT)
    if way == "quit":
        panel.send({"command": "quit"})
    elif way == "stop":
        panel.worker.stop("the parent process is gone")
    else:
        panel.close()
    assert panel.join() == "stopped"
    assert [event for event in panel.seen if event["event"] in END] == [
        {"event": "cancelled", "id": "1"},
        {"event": "cancelled", "id": "2"},
    ]
    assert told == [way]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_idle_time_counts_from_the_last_finished_request(engine, fuse):
    now = [0.0]
    panel = Panel(engine, clock=lambda: now[0], idle_seconds=600)
    panel.wait("ready")
    now[0] = 599.0
    panel.send(fuse())
    panel.wait(*END)
    now[0] = 1198.0  # 599 s after the request, twice that after the start
    panel.send({"command": "ping"})
    panel.wait("pong")
    time.sleep(0.1)
    assert panel.ended is None
    now[0] = 1199.5
    assert panel.join() == "idle"


def test_a_panel_that_no_longer_reads_does_not_break_the_worker(engine, fuse, tmp_path):
    lines = iter([json.dumps(fuse()).encode() + b"\n"])
    written = threading.Event()

    def read_line():
        try:
            return next(lines)
        except StopIteration:
            assert written.wait(TIMEOUT)
            return b""

    def write_line(line):
        if '"result"' in line:
            written.set()
        raise BrokenPipeError

    assert Worker(read_line, write_line, lambda: Setup(engine)).run() == "stopped"
    assert (tmp_path / "fused1.npy").exists()


# --------------------------------------------------------------------------------------------------- metrics


def measured(panel, request):
    panel.send({**request, "metrics": True})
    return panel.wait(*END)


def test_metrics_are_those_of_the_evaluation(panel, engine, fuse):
    from ClinicalFMambaLib.evaluation.metrics import evaluate_all

    event = measured(panel, fuse())
    stages = [e["stage"] for e in panel.seen if e["event"] == "progress"]
    assert stages[-1] == "writing the result"
    assert stages.count("measuring the result") >= 3
    result = Result(*engine.calls[0][:2])
    expected = evaluate_all(result.fused, result.a01, result.b01, event["metrics"])
    assert list(event["metrics"]) == ["PSNR", "SCD", "EN", "MI", "QABF", "SSIM"]
    for name, value in event["metrics"].items():
        assert value == pytest.approx(expected[name]), name
    assert event["metrics_note"] == "measured on the whole result"


def test_large_volumes_are_sampled(panel, engine, fuse, tmp_path):
    rng = np.random.default_rng(0)
    volume = np.zeros((40, 128, 128), np.uint8)
    volume[10:30] = rng.integers(0, 255, (20, 128, 128))
    np.save(tmp_path / "a.npy", volume)
    np.save(tmp_path / "b.npy", volume)
    event = measured(panel, fuse())
    assert event["metrics_note"] == "measured on 8 of 40 slices"
    assert set(event["metrics"]) == {"PSNR", "SCD", "EN", "MI", "QABF", "SSIM"}

    result = Result(*engine.calls[0][:2])
    (fused, a, _), _ = worker_module._sample(result)
    chosen = [k for k in range(40) if any(np.array_equal(result.fused[k], slice_) for slice_ in fused)]
    assert len(chosen) == 8 and min(chosen) >= 10 and max(chosen) < 30
    assert np.array_equal(a, result.a01[chosen])


def test_large_images_are_cropped_and_colour_is_its_luma():
    rgb = Volume(np.random.default_rng(0).integers(0, 255, (1, 500, 380, 3)).astype(np.uint8))
    result = Result(rgb, Volume(np.ones((1, 500, 380), np.uint8)))
    (fused, a, _), note = worker_module._sample(result)
    assert note == "measured on the central 362x362 pixels of 1 of 1 slices"
    assert np.array_equal(fused, result.fused[:, 69:431, 9:371])
    assert np.array_equal(a, luma(rgb.array[:, 69:431, 9:371]))


def test_metrics_that_do_not_fit_are_left_out(panel, fuse, tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.arange(75, dtype=np.int16).reshape(3, 5, 5))
    event = measured(panel, fuse())
    assert event["event"] == "result"
    assert "SSIM" not in event["metrics"]  # its window has 11 pixels
    assert "EN" in event["metrics"]


def test_metrics_stop_when_they_take_long(engine, fuse):
    ticks = itertools.count(step=0.2)
    panel = Panel(engine, clock=lambda: next(ticks), idle_seconds=1e9)
    event = measured(panel, fuse())
    assert 0 < len(event["metrics"]) < 6
    assert "left out to save time" in event["metrics_note"]
    panel.close()
    panel.join()


def test_metrics_that_fail_do_not_lose_the_fusion(panel, fuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "ClinicalFMambaLib.evaluation.metrics", None)
    event = measured(panel, fuse())
    assert (event["event"], event["metrics"]) == ("result", {})
    assert "no metrics: " in event["metrics_note"]
    assert Path(event["output"]).exists()


# ------------------------------------------------------------------------------------------- the real process


MANY_BATCHES = (48, 128, 256)


class Process:
    """The worker as the panel starts it."""

    def __init__(self, folder, *arguments, **environment):
        self.log = folder / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ClinicalFMambaLib.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment,
            )
        # A hang shall fail the test, not the run.
        self.guard = threading.Timer(TIMEOUT, self.process.kill)
        self.guard.start()

    def send(self, request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, *names):
        """The next event of these names, and all that came before it; every line of stdout is JSON."""
        before = []
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] in names:
                return event, before
            before.append(event)
        raise AssertionError(f"stdout ended before {names}: {self.log.read_text()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.guard.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from ClinicalFMambaLib import pretrained
    from ClinicalFMambaLib.config import ModelConfig
    from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba

    torch.manual_seed(0)
    model = ClinicalFMamba(ModelConfig(channels=(4, 4, 8), mamba_layers=1))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return str(pretrained.save_weights(model, path, {"modalities": "MR,MR"}))


def head(shape, seed):
    """A smooth blob on black."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return ((z**2 + y**2 + x**2 < 0.8) * (500 + 300 * np.sin((5 + seed) * x) * np.cos(4 * y))).astype(np.int16)


def test_fuse_twice_then_cancel_and_end(tmp_path, fuse, weights):
    from ClinicalFMambaLib.config import FusionOptions
    from ClinicalFMambaLib.inference.engine import FusionEngine

    a, b = head((6, 48, 50), 0), head((6, 48, 50), 1)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    options = {"model": weights, "device": "cpu"}
    with Process(tmp_path, "--parent", str(os.getpid())) as worker:
        ready, before = worker.wait("ready")
        assert [event["event"] for event in before] == ["starting"]
        assert before[0]["pid"] == worker.process.pid
        assert (ready["pid"], ready["problem"]) == (worker.process.pid, "")
        assert ready["torch"] and ready["device"]["name"] and ready["device"]["reason"]

        steps = []
        for identity in ("1", "2"):
            worker.send(fuse(identity, options=options, metrics=identity == "2"))
            result, before = worker.wait(*END)
            assert result["event"] == "result", result
            assert {event["event"] for event in before} == {"progress"}
            steps.append({step["step"]: step["seconds"] for step in result["provenance"]["steps"]})
        assert steps[1]["loading the model"] <= steps[0]["loading the model"]
        assert result["metrics"]["EN"] > 0
        expected = FusionEngine("cpu").fuse(
            Volume(a, modality="MR"), Volume(b, modality="MR"), FusionOptions(model=weights, device="cpu")
        )
        first, second = (np.load(tmp_path / f"fused{k}.npy") for k in "12")
        assert np.array_equal(first, second)
        assert np.array_equal(first, expected.volume.array)

        np.save(tmp_path / "a.npy", head(MANY_BATCHES, 0))
        np.save(tmp_path / "b.npy", head(MANY_BATCHES, 1))
        worker.send(fuse("3", options={**options, "check_registration": False}))
        while worker.wait("progress")[0]["stage"] != "fusing":
            pass
        worker.send({"command": "cancel", "id": "3"})
        assert worker.wait(*END)[0] == {"event": "cancelled", "id": "3"}

        worker.send(fuse("4", options={**options, "check_registration": False}))
        while worker.wait("progress")[0]["stage"] != "fusing":
            pass
        worker.process.stdin.close()
        assert worker.process.wait() == 0
        rest = [json.loads(line) for line in worker.process.stdout]
        assert rest[-1] == {"event": "cancelled", "id": "4"}
    assert sorted(p.name for p in tmp_path.glob("*fused*")) == ["fused1.npy", "fused2.npy"]


def test_killed_in_the_middle(tmp_path, fuse, weights):
    np.save(tmp_path / "a.npy", head(MANY_BATCHES, 0))
    np.save(tmp_path / "b.npy", head(MANY_BATCHES, 1))
    with Process(tmp_path) as worker:
        worker.send(fuse(options={"model": weights, "device": "cpu", "check_registration": False}))
        while worker.wait("progress")[0]["stage"] != "fusing":
            pass
        worker.process.kill()
        assert worker.process.wait() != 0
        for line in worker.process.stdout.read().splitlines()[:-1]:  # the last one may be cut
            assert json.loads(line)["event"] == "progress"
    assert list(tmp_path.glob("*fused*")) == []


def test_without_torch(tmp_path, fuse):
    hook = (
        "import os, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'safetensors'):\n"
        "            print('noise', flush=True)\n"
        "            os.write(1, b'noise, as C libraries make it')\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "sitecustomize.py").write_text(hook)
    with Process(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path / "module"), str(ROOT)])) as worker:
        ready, _ = worker.wait("ready")
        assert (ready["torch"], ready["device"]) == (None, None)
        assert "torch>=2.4" in ready["problem"] and "pip install safetensors 'torch>=2.4'" in ready["problem"]
        worker.send(fuse())
        error, _ = worker.wait(*END)
        assert (error["kind"], error["message"]) == ("MissingDependencyError", ready["problem"])
        worker.send({"command": "ping"})
        worker.wait("pong")
        worker.send({"command": "quit"})
        assert worker.process.wait() == 0
        assert worker.process.stdout.read() == b""
    assert worker.log.read_text().count("noise, as C libraries make it") == 2


def test_ends_when_idle_or_without_its_parent(tmp_path):
    brief = subprocess.Popen([sys.executable, "-c", "pass"])
    brief.wait()
    blocked = tmp_path / "sitecustomize.py"  # without torch it starts in no time
    blocked.write_text("import sys\nsys.modules['torch'] = None\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for arguments, words in (
        (("--parent", str(brief.pid)), "parent process is gone"),
        (("--idle-minutes", "0.001"), "ended: idle"),
    ):
        with Process(tmp_path, *arguments, PYTHONPATH=path) as worker:
            assert worker.process.wait() == 0
            assert words in worker.log.read_text()
