"""Command line, exit codes and life cycle of the stand-in host."""

import textwrap

import pytest

EXIT_CODES = {
    "passes": ("pass", 0),
    "exception": ("1 / 0", 1),
    "system exit": ("raise SystemExit(3)", 3),
    "system exit with a message": ("raise SystemExit('no')", 1),
    "util.exit": ("import slicer; slicer.util.exit(4)", 4),
    "exception in a slot": ("import qt; b = qt.QPushButton(); b.connect('clicked()', lambda: 1 / 0); b.click()", 1),
    "exception in a timer": (
        "import qt, slicer; qt.QTimer.singleShot(0, lambda: 1 / 0); [slicer.app.processEvents() for _ in range(9)]",
        1,
    ),
    "exception in a slot of a stand-in": (
        "import ctk; s = ctk.ctkSliderWidget(); s.connect('valueChanged(double)', lambda v: 1 / 0); s.value = 5",
        1,
    ),
    "no main window": (
        "import slicer; assert slicer.util.mainWindow() is None is slicer.app.layoutManager()",
        0,
        "--no-main-window",
    ),
}


@pytest.mark.parametrize("case", EXIT_CODES)
def test_exit_codes(host, case):
    code, expected, *options = EXIT_CODES[case]
    result = host(*options, code=code)
    assert result.returncode == expected, result.stdout


def test_missing_package_is_one_line(host, tmp_path):
    (tmp_path / "PySide6.py").write_text("raise ImportError('none here')")
    result = host(code="pass", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stdout.strip().count("\n") == 0 and "pip install" in result.stdout


MODULE = """
from slicer.ScriptedLoadableModule import *

class {name}(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        {body}

class {name}Widget(ScriptedLoadableModuleWidget):
    def setup(self): print("setup"); {setup}
    def enter(self): print("enter")
    def exit(self): print("exit")
    def cleanup(self): print("cleanup")

class {name}Test(ScriptedLoadableModuleTest):
    def setUp(self): print("setUp")
    def tearDown(self): print("tearDown")
    def test_b(self): print("test_b")
    def test_a(self): print("test_a")
"""


def module(folder, name="Sample", body="parent.title = 'x'", setup="pass"):
    (folder / f"{name}.py").write_text(MODULE.format(name=name, body=body, setup=setup))
    return folder


def test_life_cycle_to_the_end(host, tmp_path):
    code = "import slicer; slicer.util.selectModule('Sample'); slicer.selfTests['Sample'](msec=0)"
    result = host("--additional-module-paths", module(tmp_path), code=code)
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if not line.startswith("Running")]
    tests = ["setUp", "test_a", "tearDown", "setUp", "test_b", "tearDown"]
    assert lines == ["setup", "enter", *tests, "exit", "cleanup"]


BAD_MODULES = {
    "import error": "import no_such_package",
    "no class of that name": "x = 1",
    "unknown attribute of the parent": MODULE.format(name="Sample", body="parent.tilte = 'x'", setup="pass"),
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_module_that_cannot_be_loaded(host, tmp_path, case):
    (tmp_path / "Sample.py").write_text(BAD_MODULES[case])
    result = host("--additional-module-paths", tmp_path, code="import slicer; print(hasattr(slicer.modules, 'sample'))")
    assert result.returncode == 1 and "False" in result.stdout.splitlines()


def test_exception_in_setup(host, tmp_path):
    code = "import slicer; slicer.util.selectModule('Sample')"
    result = host("--additional-module-paths", module(tmp_path, setup="1 / 0"), code=code)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stdout


def test_scoped_enumerators_are_refused(host, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import qt\nprint(qt.Qt.AlignmentFlag.AlignLeft)\n")
    result = host("--python-script", script)
    assert result.returncode == 1 and "script.py:2" in result.stdout


def test_script_is_run_as_main(host, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7")
    script = tmp_path / "script.py"
    script.write_text("import beside, sys; print(beside.VALUE, __name__, __file__ == sys.argv[0], sys.argv[1:])")
    result = host("--python-script", script, "more")
    assert result.stdout.strip() == "7 __main__ True ['more']"


def test_hidden_packages(host):
    code = textwrap.dedent(
        """
        import importlib.metadata, shutil, subprocess
        for use in ("import pytest", "import importlib.metadata as m; m.version('pytest')"):
            try:
                exec(use)
                raise SystemExit(5)
            except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
                pass
            assert subprocess.run([shutil.which("PythonSlicer"), "-c", use], stderr=subprocess.DEVNULL).returncode == 1
        """
    )
    result = host(code=code, env={"SLICERHOST_HIDE": "pytest"})
    assert result.returncode == 0, result.stdout


def test_killing_the_launcher_leaves_its_child(host):
    """The trap that a module falls into in Slicer: PythonSlicer is not the interpreter."""
    code = textwrap.dedent(
        """
        import os, qt, signal, slicer, shutil
        p = qt.QProcess()
        p.start(shutil.which("PythonSlicer"), ["-u", "-c", "import os, time; print(os.getpid()); time.sleep(30)"])
        assert p.waitForReadyRead(20000)
        child = int(p.readAllStandardOutput().data())
        p.kill()
        assert p.waitForFinished(10000) and p.exitStatus() == qt.QProcess.CrashExit
        os.kill(child, 0)
        os.kill(child, signal.SIGKILL)
        """
    )
    result = host(code=code)
    assert result.returncode == 0, result.stdout
