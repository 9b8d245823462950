"""The panel's end of the worker's protocol; see ClinicalFMambaLib/worker.py for the other one.

Free of Qt: the process and the clock are given.
"""

import json
import logging
import os
import time

# A worker that computes still answers pings, in its reading thread: silence is no long forward pass.
PING_SECONDS = 10.0
SILENT_SECONDS = 60.0
# Until it is ready it may say nothing for long: importing torch from a cold disk beside a virus scanner.
STARTING_SECONDS = 180.0
TURN_SECONDS = 5.0  # between two calls of watch() at most, unless the event loop stood still
LOG_LINES = 60


class WorkerClient:
    """Starts the worker when something is to be sent, and turns its lines into calls.

    Args:
        makeProcess: called with (onOutput, onLog, onEnd), returns what :class:`.process.QtProcess` is.
        makeCommand: returns the command as a list.
        libraryFolder: the folder that holds ClinicalFMambaLib.
        onEvent: takes each event of the protocol, a dictionary.
        onLost: called when the worker ends or has to be ended though nobody asked for it, with a kind (``"crashed"``,
            ``"garbage"``, ``"silent"``, ``"notStarted"``, ``"idle"``) and a sentence.
        clock: seconds, monotonic.
    """

    def __init__(self, makeProcess, makeCommand, libraryFolder, onEvent, onLost, clock=time.monotonic):
        self._makeProcess, self._makeCommand, self._libraryFolder = makeProcess, makeCommand, libraryFolder
        self._onEvent, self._onLost, self._clock = onEvent, onLost, clock
        self._process = None
        self._ending = []  # told to end, and not yet gone: a QProcess must outlive its process
        self._gone = []  # ended: a QProcess must also outlive its own signals
        self._pending = b""
        self._log = []
        self._hasSpoken = self._isReady = False
        self._heard = self._pinged = self._watched = 0.0
        self.ready = None  # the last worker's ready event, kept when that worker has ended: the machine is the same

    @property
    def isRunning(self):
        return self._process is not None

    @property
    def isReady(self):
        return self.isRunning and self._isReady

    @property
    def log(self):
        """The last lines that the worker wrote to stderr."""
        return "\n".join(self._log)

    def start(self, scratchFolder):
        """Start the worker unless it runs.

        Raises:
            RuntimeError: there is no Python to start it with.
        """
        if self.isRunning:
            return
        command = [*self._makeCommand(), "--parent", str(os.getpid()), "--scratch", str(scratchFolder)]
        self._gone.clear()
        self._pending, self._log = b"", []
        self._hasSpoken = self._isReady = False
        self.beginWatch()
        process = None

        def mine(function):
            # A worker that was given up may still speak.
            return lambda *args: function(*args) if process is not None and process is self._process else None

        def ended(reason, inOrder):
            if process is self._process:
                self._ended(reason, inOrder)
            elif process in self._ending:
                self._ending.remove(process)
            self._gone.append(process)

        process = self._makeProcess(mine(self._read), mine(self._readLog), ended)
        self._process = process
        paths = [os.environ.get("PYTHONPATH", ""), str(self._libraryFolder)]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process.start(command, environment, str(scratchFolder))

    def send(self, request):
        self._process.write(json.dumps(request) + "\n")

    def watch(self):
        """To be called every second while an answer is waited for: finds out a worker that says nothing."""
        if not self.isRunning:
            return
        now = self._clock()
        stoodStill = now - self._watched
        self._watched = now
        if stoodStill > TURN_SECONDS:
            # Slicer was busy, or the computer slept: what the worker has said meanwhile is still to be read.
            self._heard = min(now, self._heard + stoodStill)
        if now - self._heard > (SILENT_SECONDS if self._isReady else STARTING_SECONDS):
            self._giveUp("silent", f"it has not answered for {now - self._heard:.0f} seconds")
        elif now - max(self._heard, self._pinged) > PING_SECONDS:
            self._pinged = now
            self._process.write('{"command": "ping"}\n')

    def beginWatch(self):
        """Silence counts from now on: nothing was expected before."""
        self._heard = self._pinged = self._watched = self._clock()

    def kill(self):
        """End the worker at once; nobody is told."""
        process, self._process = self._process, None
        if process is not None:
            self._ending.append(process)
            process.kill()

    def stop(self, seconds=2.0):
        """Ask the worker to end, kill it if it takes longer; blocks until it is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.write('{"command": "quit"}\n')
            process.closeInput()
            self._ending.append(process)
        for process in list(self._ending):
            if not process.waitForEnd(seconds):
                process.kill()
                process.waitForEnd(seconds)
        self._ending.clear()

    def _read(self, data):
        self._heard = self._clock()
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            if not self.isRunning:
                return
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                    raise ValueError("no event")
            except ValueError:
                shown = line[:80].decode("utf-8", "replace")
                return self._giveUp("garbage", f"it wrote {shown!r} instead of an event")
            self._hasSpoken = True
            if event["event"] == "starting":
                self._process.setPid(event.get("pid"))
            elif event["event"] == "ready":
                self.ready, self._isReady = event, True
            self._onEvent(event)

    def _readLog(self, data):
        for line in data.decode("utf-8", "replace").splitlines():
            logging.debug(f"ClinicalFMamba worker: {line}")
            self._log.append(line)
        del self._log[:-LOG_LINES]

    def _ended(self, reason, inOrder):
        self._process = None
        if inOrder:
            self._onLost("idle", reason)
        else:
            self._onLost("crashed" if self._hasSpoken else "notStarted", reason)

    def _giveUp(self, kind, reason):
        self.kill()
        self._onLost(kind, reason)
