"""Batches: the table, failures that cost one case, going on where an earlier call stopped, several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ClinicalFMambaLib import NOTICE, cli, pretrained
from ClinicalFMambaLib.batch import BatchCase, Layout, Outcome, _Pool, finished, read_cases, run_batch, write_table
from ClinicalFMambaLib.config import FusionOptions, ModelConfig
from ClinicalFMambaLib.errors import Cancelled, InputError
from ClinicalFMambaLib.inference.engine import FusionEngine
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba
from ClinicalFMambaLib.phantom import make_phantom
from ClinicalFMambaLib.volumes import Volume, read_volume, write_volume


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Volumes, images, a damaged file and weights; read only."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, volume in make_phantom(16).items():
        write_volume(volume, folder / f"{name.lower()}.nrrd")
        if name in ("CT", "T2"):
            middle = volume.array[8:9].astype(np.float32)
            grey = np.uint8(255 * np.clip(middle / middle.max(), 0, 1))
            write_volume(Volume(grey, is_image=True), folder / f"{name.lower()}.png")
    (folder / "broken.nrrd").write_bytes((folder / "t1.nrrd").read_bytes()[:600])
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = ClinicalFMamba(ModelConfig(channels=(4, 4, 8), mamba_layers=1))
        pretrained.save_weights(network, folder / f"m{seed}.safetensors", {"modalities": "MR,CT"})
    return folder


@pytest.fixture
def options(files):
    return FusionOptions(model=str(files / "m0.safetensors"))


@pytest.fixture(scope="module")
def engine():
    return FusionEngine("cpu")


class NoEngine:
    def fuse(self, *arguments):
        raise AssertionError("a finished case was fused again")


def table(folder, text):
    path = folder / "cases.csv"
    path.write_text(text, encoding="utf-8")
    return path


def cases_of(files, options, *rows):
    return [BatchCase(name, files / a, files / b, options) for name, a, b in rows]


# --------------------------------------------------------------------------------------------------- table


def test_rows_and_defaults(tmp_path):
    text = (
        'Name,A,b,window_b,modality_b,model\none,t1.nii.gz,../ct.nii,"0,80",CT,\n\n'
        ",p2/t1.nii.gz,/data/p2/ct.nrrd,,,mine.safetensors\nthree,a.png,b.png\n"
    )
    options = FusionOptions(model="mri-ct-2d", window_b="bone", resample=True)
    one, two, three = read_cases(table(tmp_path, text), options)
    assert (one.name, one.a, one.b) == ("one", tmp_path / "t1.nii.gz", tmp_path / ".." / "ct.nii")
    assert one.options == replace(options, window_b="0,80", modality_b="CT")
    assert (two.name, str(two.b)) == ("p2_t1", "/data/p2/ct.nrrd")
    assert two.options == replace(options, model=str(tmp_path / "mine.safetensors"))
    assert three.options == options


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators(tmp_path, separator):
    rows = [["a", "b", "window_a"], ["x.nii", "y.nii", "0,80"]]
    text = "\ufeff" + "\n".join(separator.join(row) for row in rows)
    (case,) = read_cases(table(tmp_path, text))
    assert case.options.window_a == "0,80"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'a'"),
        ("a,c\n", "unknown column 'c'; use a, b, name"),
        ("a,name\nx,y\n", "no column 'b'; found a, name"),
        ("a,b,A\nx,y,z\n", "column 'a' is there twice"),
        ("a,b\n\n", "has no row"),
        ("a,b\nx.nii,y.nii\n,y.nii\n", "line 3: the path of A is not given"),
        ("a,b,window_a\nx.nii,y.nii,0,80\n", "line 2: 4 cells for 3 columns; put quotes"),
        ("a,b,modality_a\nx.nii,y.nii,US\n", "line 2: modality 'US' is unknown"),
        ("a,b,name\nx.nii,y.nii,p/1\n", "line 2: 'p/1' cannot be the name of a file"),
        ("a,b,name\nx.nii,y.nii,../p\n", "cannot be the name"),
        ("a,b,name\nx.nii,y.nii,P1\nz.nii,y.nii,p1\n", "line 3: the name 'p1' is that of line 2"),
        ('a,b\n"x.nii,y.nii\n', "cannot be read as a CSV table"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read_cases(table(tmp_path, text))
    assert words in str(error.value)


def test_no_table(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_cases(tmp_path / "nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="UTF-8"):
        read_cases(tmp_path / "binary.csv")


# ----------------------------------------------------------------------------------------------------- runs


def test_failed_cases_are_reported_and_the_rest_done(files, options, engine, tmp_path):
    cases = cases_of(
        files,
        options,
        ("good", "t2.nrrd", "ct.nrrd"),
        ("absent", "t2.nrrd", "no.nrrd"),
        ("damaged", "broken.nrrd", "ct.nrrd"),
        ("picture", "t2.png", "ct.png"),
        ("unlike", "t2.nrrd", "ct.png"),
        ("colour", "t2.nrrd", "spect.nrrd"),
    )
    seen, stages = [], []
    layout = Layout(tmp_path, preview=True)
    outcomes = run_batch(
        engine, cases, layout, report=seen.append, progress=lambda stage, fraction: stages.append((stage, fraction))
    )
    assert [o.case for o in outcomes] == [c.name for c in cases]
    assert sorted(seen, key=lambda o: o.case) == sorted(outcomes, key=lambda o: o.case)
    status = {o.case: o.status for o in outcomes}
    assert status == {
        "good": "fused",
        "absent": "failed",
        "damaged": "failed",
        "picture": "fused",
        "unlike": "failed",
        "colour": "fused",
    }
    errors = {o.case: o.error for o in outcomes}
    assert "no.nrrd: no such file" in errors["absent"] and "broken.nrrd" in errors["damaged"]
    assert "different grids" in errors["unlike"] or "cannot be laid" in errors["unlike"]
    assert all("\n" not in error for error in errors.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.{end}"
        for name, kind in (("good", "nrrd"), ("picture", "png"), ("colour", "nrrd"))
        for end in (kind, "json", "preview.png")
    )
    record = json.loads((tmp_path / "good.json").read_text())
    assert record["notice"] == NOTICE and record["output_file"] == str(tmp_path / "good.nrrd")
    alone = engine.fuse(read_volume(cases[0].a), read_volume(cases[0].b), options)
    np.testing.assert_array_equal(read_volume(tmp_path / "good.nrrd").array, alone.volume.array)
    assert outcomes[0].model == "m0" and outcomes[0].seconds > 0
    fractions = [fraction for _, fraction in stages]
    assert fractions == sorted(fractions) and any("good (1 of 6): fusing" in stage for stage, _ in stages)

    path = write_table(outcomes, tmp_path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == list(status.values())
    assert rows[1]["error"] == errors["absent"] and rows[0]["output"] == str(tmp_path / "good.nrrd")


def test_a_second_call_does_what_is_left(files, options, engine, tmp_path):
    first, second = cases_of(files, options, ("one", "t2.nrrd", "ct.nrrd"), ("two", "t1.nrrd", "ct.nrrd"))
    layout = Layout(tmp_path)
    run_batch(engine, [first], layout, jobs=1)
    before = (tmp_path / "one.nrrd").read_bytes()
    outcomes = run_batch(engine, [first, second], layout, jobs=1)
    assert [o.status for o in outcomes] == ["skipped", "fused"]
    assert [o.output for o in outcomes] == [str(tmp_path / "one.nrrd"), str(tmp_path / "two.nrrd")]
    # other memory and another device change no setting
    elsewhere = replace(first, options=replace(options, device="cpu", max_memory_gib=3))
    assert run_batch(NoEngine(), [elsewhere], layout)[0].status == "skipped"

    with pytest.raises(InputError, match=r"window_b was auto, is bone now.*--overwrite"):
        run_batch(NoEngine(), [replace(first, options=replace(options, window_b="bone"))], layout)
    with pytest.raises(InputError, match="other settings: model was"):
        other = replace(options, model=str(files / "m1.safetensors"))
        run_batch(NoEngine(), [first, replace(second, options=other)], layout)
    with pytest.raises(InputError, match="the format was nrrd, is mha now"):
        run_batch(NoEngine(), [first], Layout(tmp_path, "mha"))
    assert (tmp_path / "one.nrrd").read_bytes() == before
    assert run_batch(engine, [first], layout, jobs=1, overwrite=True)[0].status == "fused"
    assert (tmp_path / "one.nrrd").read_bytes() == before, "the same input gives the same bytes"


def test_what_is_no_longer_right_is_made_again(files, engine, tmp_path):
    for name in ("t2.nrrd", "ct.nrrd", "m0.safetensors"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    layout = Layout(tmp_path / "out")
    layout.folder.mkdir()
    options = FusionOptions(model=str(tmp_path / "m0.safetensors"))
    case = BatchCase("one", tmp_path / "t2.nrrd", tmp_path / "ct.nrrd", options)
    assert finished(case, layout) is None
    run_batch(engine, [case], layout, jobs=1)
    assert finished(case, layout)["model"]["name"] == "m0"
    assert finished(case, replace(layout, preview=True)) is None
    for name, content in (("one.nrrd", None), ("one.json", None), ("one.json", b'{"half')):
        path = layout.folder / name
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        assert finished(case, layout) is None, name
        path.write_bytes(before)
    (tmp_path / "ct.nrrd").rename(tmp_path / "archived.nrrd")
    assert finished(case, layout)
    (tmp_path / "ct.nrrd").write_bytes((files / "t1.nrrd").read_bytes())
    assert finished(case, layout) is None
    assert run_batch(engine, [case], layout, jobs=1)[0].status == "fused"
    assert finished(case, layout)
    (tmp_path / "m0.safetensors").write_bytes((files / "m1.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"the weights of .* were other ones"):
        run_batch(NoEngine(), [case], layout)


def test_an_unexpected_error_costs_one_case(files, options, engine, tmp_path):
    class Moody:
        def fuse(self, a, b, options, progress):
            if a.name == "t1":
                raise RuntimeError("a bug\nin two lines")
            return engine.fuse(a, b, options, progress)

    cases = cases_of(files, options, ("bad", "t1.nrrd", "ct.nrrd"), ("good", "t2.nrrd", "ct.nrrd"))
    bad, good = run_batch(Moody(), cases, Layout(tmp_path), jobs=1)
    assert (bad.status, bad.error) == ("failed", "RuntimeError: a bug in two lines")
    assert good.status == "fused"


def test_cancelling_ends_the_batch(files, options, tmp_path):
    class Stopped:
        def fuse(self, *arguments):
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        run_batch(Stopped(), cases_of(files, options, ("one", "t2.nrrd", "ct.nrrd")), Layout(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_never_overwritten(files, options, tmp_path):
    (tmp_path / "t2.nrrd").write_bytes((files / "t2.nrrd").read_bytes())
    case = BatchCase("t2", tmp_path / "t2.nrrd", files / "ct.nrrd", options)
    (outcome,) = run_batch(NoEngine(), [case], Layout(tmp_path))
    assert outcome.status == "failed" and "one of the inputs" in outcome.error


# ------------------------------------------------------------------------------------------------ processes


def test_a_process_that_dies_costs_its_own_call():
    pool = _Pool(2)
    tasks = [pool.start(len, "ab"), pool.start(os._exit, 3), pool.start(len, "abc")]
    assert tasks[0].result() == 2
    with pytest.raises(InputError, match="ended unexpectedly"):
        tasks[1].result()
    assert tasks[2].result() == 3
    assert pool.start(len, "abcd").result() == 4
    assert pool.start(len, "abcde").result() == 5
    pool.close()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_processes_end_with_a_parent_that_was_killed():
    code = (
        "import os, time\nfrom ClinicalFMambaLib.batch import _Pool\n"
        "if __name__ == '__main__':\n    print(_Pool(1).start(os.getpid).result(), flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process outlived its parent")


# ---------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(capfd):
    def call(*arguments):
        capfd.readouterr()
        status = cli.main(["batch", *(str(a) for a in arguments)])
        return (status, *capfd.readouterr())

    return call


def listed(files, tmp_path, *rows):
    lines = ["name,a,b", *(f"{name},{files / a},{files / b}" for name, a, b in rows)]
    return table(tmp_path, "\n".join(lines))


def test_command(run, files, tmp_path):
    cases = listed(files, tmp_path, ("one", "t2.nrrd", "ct.nrrd"), ("two", "t2.nrrd", "no.nrrd"))
    arguments = [cases, "-o", tmp_path / "new" / "out", "--model", files / "m0.safetensors", "--format", "nii.gz"]
    status, stdout, stderr = run(*arguments)
    assert status == 2
    out = tmp_path / "new" / "out"
    assert stdout == f"1 fused, 1 failed: {out / 'results.csv'}\n{NOTICE}\n"
    *_, last = stderr.splitlines()
    assert last == f"error: 1 of 2 cases failed: two; {out / 'results.csv'} says why"
    assert "info: one" in stderr and "FAILED" in stderr and "Traceback" not in stderr
    assert sorted(p.name for p in out.iterdir()) == ["one.json", "one.nii.gz", "results.csv"]
    cases.write_text("\n".join(cases.read_text().splitlines()[:2]))
    status, stdout, _ = run(*arguments)
    assert status == 0 and stdout.startswith("1 skipped: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "vtk"], "format 'vtk' is unknown"),
        (["--model", "no.safetensors"], "does not exist"),
        (["--device", "tpu"], "auto, cpu, cuda, mps"),
        (["--max-memory", "-1"], "positive number of GiB"),
        (["--devices", "0"], "Lightning refuses"),
        (["--devices", "2", "--strategy", "magic"], "Lightning refuses"),
    ],
)
def test_bad_options_are_one_line(run, files, tmp_path, arguments, words):
    cases = listed(files, tmp_path, ("one", "t2.nrrd", "ct.nrrd"))
    model = [] if "--model" in arguments else ["--model", files / "m0.safetensors"]
    status, stdout, stderr = run(cases, "-o", tmp_path / "out", *model, *arguments)
    (line,) = stderr.splitlines()
    assert (status, stdout) == (2, "") and words in line
    assert not (tmp_path / "out" / "results.csv").exists()


def test_two_processes_give_the_same(run, files, tmp_path):
    rows = [(f"c{k}", a, b) for k, (a, b) in enumerate([("t2.nrrd", "ct.nrrd"), ("t1.nrrd", "ct.nrrd")] * 2)]
    cases = listed(files, tmp_path, *rows, ("bad", "no.nrrd", "ct.nrrd"))
    model = ["--model", str(files / "m0.safetensors"), "--device", "cpu"]
    assert run(cases, "-o", tmp_path / "alone", *model)[0] == 2
    command = [sys.executable, "-m", "ClinicalFMambaLib", "batch", str(cases), "-o", str(tmp_path / "both"), *model]
    done = subprocess.run(
        [*command, "--devices", "2", "--strategy", "ddp"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == f"4 fused, 1 failed: {tmp_path / 'both' / 'results.csv'}\n{NOTICE}\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("error: 1 of 5 cases failed: bad;")
    assert sum("of 3)" in line for line in lines) == 3 and sum("of 2)" in line for line in lines) == 2
    for name, *_ in rows:
        assert (tmp_path / "both" / f"{name}.nrrd").read_bytes() == (tmp_path / "alone" / f"{name}.nrrd").read_bytes()
    with open(tmp_path / "both" / "results.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [name for name, *_ in rows] + ["bad"]


def test_outcomes_are_rows(tmp_path):
    path = write_table([Outcome("p, 1", "failed", error='no "file"')], tmp_path)
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["case"], row["error"]) == ("p, 1", 'no "file"')
