"""Slicer's Python has no torch at first: import, help and phantom work, and fusing says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def python(code, *blocked):
    text = f"BLOCKED = {set(blocked)!r}\n{BLOCK}\n{code}"
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)


def clinicalfmamba(*arguments, blocked=("torch",)):
    return python(f"from ClinicalFMambaLib.cli import main\nsys.exit(main({[str(a) for a in arguments]!r}))", *blocked)


def test_the_package_imports_the_standard_library_only():
    done = python(
        "import ClinicalFMambaLib, ClinicalFMambaLib.inference; print(ClinicalFMambaLib.NOTICE)", "torch", "numpy"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "not for diagnosis" in done.stdout


@pytest.mark.parametrize(
    "module", ["volumes", "phantom", "preview", "inference.intensity", "inference.colour", "config"]
)
def test_modules_that_need_no_torch(module):
    done = python(f"import ClinicalFMambaLib.{module}", "torch")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_needs_neither_torch_nor_numpy(argument):
    done = clinicalfmamba(argument, blocked=("torch", "numpy", "SimpleITK"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "clinicalfmamba" in done.stdout


def test_phantom_then_fuse(tmp_path):
    made = clinicalfmamba("phantom", "-o", tmp_path, "--size", 16)
    assert (made.returncode, made.stderr) == (0, "")
    out = tmp_path / "fused.nrrd"
    done = clinicalfmamba("fuse", tmp_path / "ct.nrrd", tmp_path / "t2.nrrd", "-o", out)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs torch" in line
    assert "pip install 'torch" in line
    assert not out.exists()


@pytest.mark.parametrize("command", [("demo", "-o", "{}/demo"), ("train", "mri-ct-2d", "--data", "{}", "-o", "{}/run")])
def test_other_commands_say_it_too(tmp_path, command):
    done = clinicalfmamba(*(word.format(tmp_path) for word in command))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'torch" in line
    assert list(tmp_path.iterdir()) == []
