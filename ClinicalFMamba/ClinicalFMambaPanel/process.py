"""The worker's process and the clock of the logic, in Qt; the logic receives both, so that tests can replace them."""

import contextlib
import os
import shutil
import signal
import sys
import time

import qt
import slicer

TURN_SECONDS = 0.02  # of work between two turns of Qt's event loop


def pythonExecutable():
    """The Python that has Slicer's packages.

    Raises:
        RuntimeError: it is not where Slicer puts it.
    """
    # Slicer puts its folder on PATH; sys.executable is Slicer itself.
    python = shutil.which("PythonSlicer")
    if python is None and os.path.basename(sys.executable).lower().startswith("python"):
        python = sys.executable
    if python is None:
        raise RuntimeError("PythonSlicer was not found beside Slicer; install Slicer again")
    return python


def inTurns(steps):
    """What the generator ``steps`` returns; in between Slicer draws and hears its processes, but takes no clicks."""
    until = time.monotonic() + TURN_SECONDS
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        if time.monotonic() >= until:
            slicer.app.processEvents(qt.QEventLoop.ExcludeUserInputEvents)
            until = time.monotonic() + TURN_SECONDS


class QtProcess:
    """A child process whose output arrives through Qt's event loop.

    Python threads starve while Slicer's main thread sits in that loop, so nothing here reads in a thread.

    Args:
        onOutput, onLog: take bytes from stdout and stderr.
        onEnd: takes a sentence that says how the process ended, and whether that was in order.
    """

    def __init__(self, onOutput, onLog, onEnd):
        self._onOutput, self._onLog, self._onEnd = onOutput, onLog, onEnd
        self._process = qt.QProcess()
        self._pid = None
        self._hasStarted = False
        for signature, slot in (
            ("started()", self._started),
            ("readyReadStandardOutput()", self._readOutput),
            ("readyReadStandardError()", self._readLog),
            ("finished(int,QProcess::ExitStatus)", self._finished),
            ("errorOccurred(QProcess::ProcessError)", self._error),
        ):
            if self._process.connect(signature, slot) is False:
                raise RuntimeError(f"QProcess has no signal {signature}")

    def start(self, command, environment, folder):
        """Start ``command``, a list, with further variables of the environment."""
        variables = qt.QProcessEnvironment.systemEnvironment()
        for name, value in environment.items():
            variables.insert(name, value)
        self._process.setProcessEnvironment(variables)
        # -m puts the working folder on sys.path: a torch.py in the user's own must not be taken for torch.
        self._process.setWorkingDirectory(folder)
        self._process.start(command[0], command[1:])

    def setPid(self, pid):
        """The child to end besides the process started, which may be no more than its launcher."""
        self._pid = pid

    def isRunning(self):
        return self._process.state() != qt.QProcess.NotRunning

    def write(self, text):
        self._process.write(text)

    def closeInput(self):
        self._process.closeWriteChannel()

    def kill(self):
        """End the process and its child at once."""
        # While the launcher lives its child does, so that the pid is not yet another process's.
        if self._pid is not None and self.isRunning():
            with contextlib.suppress(OSError):  # it has ended by itself
                os.kill(self._pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        self._process.kill()

    def waitForEnd(self, seconds):
        """Block until the process has ended; whether it has."""
        return not self.isRunning() or bool(self._process.waitForFinished(int(1000 * seconds)))

    def _readOutput(self):
        self._onOutput(self._process.readAllStandardOutput().data())

    def _readLog(self):
        self._onLog(self._process.readAllStandardError().data())

    def _started(self):
        self._hasStarted = True

    def _finished(self, exitCode, exitStatus):
        self._readLog()
        self._readOutput()
        crashed = self._process.exitStatus() == qt.QProcess.CrashExit
        reason = "it crashed or was killed" if crashed else f"exit status {exitCode}"
        self._onEnd(reason, exitCode == 0 and not crashed)

    def _error(self, error):
        # What fails to start is the only thing that finished() does not follow.
        if not self._hasStarted:
            self._onEnd(f"it could not be started: {self._process.errorString()}", False)


class QtTimer:
    """Calls a function once after some milliseconds, or again and again; started again, it begins anew."""

    def __init__(self, function, singleShot=True):
        self._timer = qt.QTimer()
        self._timer.setSingleShot(singleShot)
        if self._timer.connect("timeout()", function) is False:
            raise RuntimeError("QTimer has no signal timeout()")

    def start(self, milliseconds):
        self._timer.start(milliseconds)

    def stop(self):
        self._timer.stop()
