"""Command line and life of the stand-in: start, modules, script, end, exit code."""

import argparse
import importlib
import logging
import os
import shutil
import stat
import sys
import tempfile

HIDDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hidden")
MISSING = "The stand-in host needs slicer-core and PySide6-Essentials: pip install -e '.[test]' ({})"


def _parser():
    parser = argparse.ArgumentParser(prog="python Testing/host", description="Stand-in for the Slicer application.")
    parser.add_argument(
        "--testing", action="store_true", help="no dialogs, end after the script, exit code 1 on errors"
    )
    parser.add_argument("--additional-module-path", dest="paths", action="append", default=[], metavar="DIR")
    parser.add_argument("--additional-module-paths", dest="paths", action="extend", nargs="+", metavar="DIR")
    parser.add_argument("--python-script", metavar="FILE")
    parser.add_argument("--python-code", metavar="CODE")
    parser.add_argument("-c", dest="code", metavar="CODE", help="run the code and end")
    parser.add_argument("--no-main-window", action="store_true")
    parser.add_argument("--exit-after-startup", action="store_true")
    for ignored in ("no-splash", "disable-cli-modules", "disable-settings", "ignore-slicerrc", "disable-tooltips"):
        parser.add_argument("--" + ignored, action="store_true")
    return parser


def _python_slicer(folder):
    """PythonSlicer: a launcher with the interpreter as its child, so that killing it leaves the child, as in Slicer."""
    path = os.path.join(folder, "PythonSlicer")
    hide = f'PYTHONPATH="{HIDDEN}:$PYTHONPATH"; export PYTHONPATH\n' if os.environ.get("SLICERHOST_HIDE") else ""
    with open(path, "w", encoding="utf-8") as f:
        f.write(f'#!/bin/sh\n{hide}"{sys.executable}" "$@"\nexit $?\n')
    os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)


def _fonts(app, qt):
    """The offscreen platform has no fonts of its own: matplotlib's DejaVu serves where the system has none."""
    if qt.QFontDatabase.families():
        return
    spec = importlib.util.find_spec("matplotlib")
    folder = os.path.join(os.path.dirname(spec.origin), "mpl-data", "fonts", "ttf") if spec else ""
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf"):
        if os.path.isfile(os.path.join(folder, name)):
            qt.QFontDatabase.addApplicationFont(os.path.join(folder, name))
    app.setFont(qt.QFont("DejaVu Sans", 9))


def _message(kind, context, text):
    # The offscreen platform says this for each window.
    if "propagateSizeHints" not in text:
        print(text, file=sys.stderr, flush=True)


def main(argv=None):
    options, rest = _parser().parse_known_args(argv)
    sys.argv = [options.python_script or "", *rest]
    options.program = "Slicer"
    for path in options.paths:
        if not os.path.isdir(path):
            print(f"Additional module path does not exist: {path}", file=sys.stderr)
            return 1
    home = tempfile.mkdtemp(prefix="SlicerStandIn-")
    try:
        return _run(options, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _run(options, home):
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    if os.environ.get("SLICERHOST_HIDE"):
        from .hidden import sitecustomize  # noqa: F401
    environment = dict(os.environ)
    for name in ("bin", "tmp", "settings", "share/Slicer-5.12/ColorFiles"):
        os.makedirs(os.path.join(home, name))
    _python_slicer(os.path.join(home, "bin"))
    os.environ["PATH"] = os.path.join(home, "bin") + os.pathsep + os.environ.get("PATH", "")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        from . import pythonqt

        qt = pythonqt.install()
        import slicer
    except ImportError as e:
        print(MISSING.format(e), file=sys.stderr)
        return 1
    from PySide6.QtCore import qInstallMessageHandler

    qInstallMessageHandler(_message)
    qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
    qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, os.path.join(home, "settings"))

    from . import ctkwidgets

    ctkwidgets.install()
    from . import application, files, layout, mrmlwidgets, packages, parameternode, sampledata, scripted

    for part in (mrmlwidgets, application, layout):
        part.install()
    app = application.qSlicerApplication(options, home, os.path.join(home, "tmp"))
    app._d.startupEnvironment = environment
    slicer.app = app
    parameternode.install()
    scripted.install()
    packages.install()
    _fonts(app, qt)
    app._start(files.CoreIOManager(), layout.qSlicerLayoutManager)
    sampledata.install()
    app.moduleManager()._load_scripted(options.paths)
    if app._d.window is not None:
        app._d.window.show()
    code = _script(options, app, application, pythonqt)
    _end(app)
    if app._d.exiting:
        code = app._d.exitCode or code
    return 1 if options.testing and pythonqt.errors else code


def _script(options, app, application, pythonqt):
    """Startup is complete once the event loop runs; the script is run from it, as in Slicer."""
    codes = []

    def run():
        pythonqt.emit(app, "startupCompleted()")
        if options.python_script and not os.path.isfile(options.python_script):
            print(f"Specified python script doesn't exist: {options.python_script}", file=sys.stderr)
        elif options.python_script:
            codes.append(application.run_script(options.python_script))
        if options.python_code or options.code:
            codes.append(application.run_code(options.python_code or options.code))
        if app._d.options.runPythonAndExit or options.exit_after_startup:
            app.exit(app._d.exitCode)

    from PySide6.QtCore import QTimer

    timer = QTimer(app)
    timer.setSingleShot(True)
    timer.connect("timeout()", run)
    timer.start(0)
    app.exec_()
    return next((code for code in codes if code), 0)


def _end(app):
    """Leave the module that is shown, then clean up all: the order of Slicer's end."""
    if app._d.window is not None:
        app._d.window.moduleSelector()._leave()
    app.moduleManager()._unload_all()
    app.processEvents()
    if app._d.window is not None:
        app._d.window.close()
    sys.stdout.flush()
