"""The logic: nodes into a request, the worker's answer into nodes. Everything a click does is one call of it."""

import dataclasses
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import slicer
import vtk
from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleLogic

from . import display, result_nodes, volume_nodes
from .library import libraryFolder
from .parameters import ClinicalFMambaParameterNode, forgetUnknownChoices
from .process import TURN_SECONDS, QtProcess, QtTimer, inTurns, pythonExecutable
from .requirements import Requirements
from .signals import Signal
from .words import inThePanel
from .worker_client import WorkerClient

CANCEL_SECONDS = 3.0  # after which a worker that is told to cancel is ended
PREPARED, ANSWERED = 0.04, 0.97  # shares of the progress bar


class FusionError(RuntimeError):
    """A fusion that failed.

    Attributes:
        kind: of the worker (``"InputError"``, ``"OutOfMemory"``, …) or of its client (``"crashed"``, ``"silent"``, …).
        retry: what may help: ``"cpu"``, ``"lessMemory"``, ``"again"`` or ``""``.
        details: for a bug report, many lines.
    """

    def __init__(self, message, kind="Internal", retry="", details=""):
        super().__init__(message)
        self.kind, self.retry, self.details = kind, retry, details


@dataclasses.dataclass
class _Job:
    """A fusion under way.

    Attributes:
        origins: what the provenance says of A and B; as they were at the click, whatever the user does meanwhile.
        awaited: whether the worker has the request and has not answered it.
        outcome: in the end, the fused node or a :class:`FusionError`.
    """

    identity: str
    volumeA: object
    volumeB: object
    output: object
    name: str
    request: dict
    place: result_nodes.Place
    pair: volume_nodes.Pair
    folder: Path
    started: float
    origins: dict
    awaited: bool = False
    outcome: object = None
    steps: object = None
    stage: str = ""
    fraction: float = 0.0
    paceStart: tuple | None = None


class ClinicalFMambaLogic(ScriptedLoadableModuleLogic):
    """Fuses pairs of volume nodes in a process of its own.

    ``fuse(a, b, waitForCompletion=True)`` returns the fused node. Without waiting, listen to the signals:
    ``progress(stage, fraction)``, ``finished(node)``, ``failed(FusionError)``, ``cancelled(reason)``, and
    ``engineChanged()`` when :attr:`engineText` has changed.

    Args:
        makeProcess, makeTimer: see :mod:`.process`.
        requirements: what has to be installed, see :class:`.requirements.Requirements`.
        workerCommand: returns how the worker is started.
        clock: seconds, monotonic; decides how long a worker may be silent.
    """

    def __init__(
        self,
        makeProcess=QtProcess,
        makeTimer=QtTimer,
        requirements=None,
        workerCommand=None,
        clock=time.monotonic,
    ):
        ScriptedLoadableModuleLogic.__init__(self)
        self.requirements = requirements or Requirements()
        self.progress, self.finished = Signal("progress"), Signal("finished")
        self.failed, self.cancelled = Signal("failed"), Signal("cancelled")
        self.engineChanged = Signal("engineChanged")
        self._client = WorkerClient(
            makeProcess, workerCommand or _workerCommand, libraryFolder(), self._onEvent, self._onLost, clock
        )
        self._stepper = makeTimer(self._step)
        self._watcher = makeTimer(self._watch, singleShot=False)
        self._abandonment = makeTimer(self._endAbandoned)
        self._scratch = None
        self._job = None
        self._count = 0
        self._abandoned = {}  # folders by identity of requests that the worker has not yet given up
        self._observers = []

    def getParameterNode(self):
        node = super().getParameterNode()
        forgetUnknownChoices(node)
        return ClinicalFMambaParameterNode(node)

    # ---------------------------------------------------------------------------------------------- fusing

    @property
    def isBusy(self):
        return self._job is not None

    def fuse(
        self,
        volumeA,
        volumeB,
        outputVolume=None,
        *,
        model="auto",
        device="auto",
        windowA="auto",
        windowB="auto",
        modalityA="",
        modalityB="",
        resample=True,
        plane="auto",
        maxMemoryGib=None,
        classify="",
        metrics=True,
        checkRegistration=True,
        waitForCompletion=False,
    ):
        """Fuse two registered volume nodes; the inputs are never changed.

        Args:
            volumeA: the anatomical volume, whose grid, parent transform and study the result takes.
            volumeB: the other one.
            outputVolume: a result, which is updated in place, or an empty volume; one that cannot hold what comes,
                colour or grey, is replaced by one of its name that can. None makes a new node.
            model: ``"auto"``, the name of a bundled model, or the path of a .safetensors file.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
            windowA, windowB: ``"auto"``, ``"brain"``, ``"bone"``, ``"soft"``, ``"full"`` (CT), ``"displayed"``, or
                (low, high) in the volume's own units.
            modalityA, modalityB: ``"CT"``, ``"MR"``, ``"SPECT"``, ``"PET"``; ``""`` reads or guesses it.
            resample: whether B may be interpolated onto A's grid.
            plane: of the slices that a 2D model sees: ``"auto"``, ``"axial"``, ``"coronal"`` or ``"sagittal"``.
            maxMemoryGib: bound on the network's memory; None takes what is free.
            classify: name of a tumour classifier, the path of one, or ``"auto"``; ``""`` for none. It reads T1ce with
                FLAIR, and takes which is which from the names of the nodes.
            metrics: whether the result is measured.
            checkRegistration: whether the engine warns when B looks shifted.
            waitForCompletion: return the fused node when it is there, instead of None at once.

        Raises:
            ValueError: the inputs do not fit; see :meth:`problemWith`.
            FusionError: another fusion is under way, packages are missing, or (when waiting) the fusion failed or
                was cancelled.
        """
        problem = self.problemWith(volumeA, volumeB, outputVolume, model=model, resample=resample)
        if problem:
            raise ValueError(problem)
        if self.isBusy:
            raise FusionError(_("a fusion is under way; wait for it or cancel it"), "Busy")
        missing = self.requirements.describeMissing()
        if missing:
            raise FusionError(missing, "MissingDependencyError")
        options = {
            "model": model,
            "device": device,
            "window_a": self._windowOption(volumeA, windowA),
            "window_b": self._windowOption(volumeB, windowB),
            "modality_a": modalityA or volume_nodes.modalityOf(volumeA),
            "modality_b": modalityB or volume_nodes.modalityOf(volumeB),
            "plane": plane,
            "resample": bool(resample),
            "max_memory_gib": maxMemoryGib,
            "check_registration": bool(checkRegistration),
        }
        if self._client.isReady and self._client.ready.get("problem"):
            # What it missed may have been installed since.
            self._client.kill()
            self._abandonment.stop()
            self._abandoned.clear()
        self._count += 1
        identity = f"{os.getpid()}-{self._count}"
        folder = self._scratchFolder() / identity
        folder.mkdir(parents=True)  # some systems clean the temporary folder of a Slicer that runs for days
        pair = volume_nodes.relate(volumeA, volumeB)
        request = {
            "command": "fuse",
            "id": identity,
            "a": self._describe(volumeA, pair.a, folder / "a.npy", options["modality_a"]),
            "b": self._describe(volumeB, pair.b, folder / "b.npy", options["modality_b"]),
            "options": options,
            "output": str(folder / "fused.npy"),
            "metrics": bool(metrics),
            "classify": classify,
        }
        name = _("{a} + {b} fused").format(a=volumeA.GetName(), b=volumeB.GetName())
        place = result_nodes.Place.of(volumeA)
        origins = {"volume_a": self._origin(volumeA), "volume_b": self._origin(volumeB)}
        job = _Job(
            identity, volumeA, volumeB, outputVolume, name, request, place, pair, folder, time.monotonic(), origins
        )
        self._job = job
        self._observeScene()
        try:
            self.startEngine()
        except (RuntimeError, OSError) as error:
            self._dropJob()
            raise FusionError(str(error), "notStarted") from error
        self._client.beginWatch()
        self._watcher.start(1000)
        self._run(self._prepare(job))
        if waitForCompletion:
            return self._wait(job)
        return None

    def problemWith(self, volumeA, volumeB, outputVolume=None, *, model="auto", resample=True):
        """Why these cannot be fused, one sentence for the user, or ``""``."""
        for node, label in ((volumeA, "A"), (volumeB, "B")):
            if node is None:
                return _("Choose volume {label}").format(label=label)
        if volumeA is volumeB:
            return _("A and B are the same volume; choose two different ones")
        for node, label in ((volumeA, "A"), (volumeB, "B")):
            problem = volume_nodes.problemOf(node, label)
            if problem:
                return problem
        colours = [volume_nodes.isColour(node) for node in (volumeA, volumeB)]
        if all(colours):
            return _("A and B are both in colour; at least one must be a grey anatomical volume")
        if outputVolume is not None:
            if outputVolume is volumeA or outputVolume is volumeB:
                return _("The output is one of the inputs, which are never changed; choose another output")
            isEmpty = outputVolume.GetImageData() is None
            if outputVolume.IsA("vtkMRMLVectorVolumeNode") != any(colours) and not isEmpty:
                return _("The result will be {kind}, which {name} cannot hold; choose to create a new volume").format(
                    kind=_("in colour") if any(colours) else _("grey"), name=outputVolume.GetName()
                )
            if not isEmpty and not result_nodes.isResult(outputVolume):
                return _("{name} is no fused volume, and its voxels would be lost; choose another output").format(
                    name=outputVolume.GetName()
                )
        problem = self._problemWithModel(model)
        if problem:
            return problem
        difference = self.gridDifference(volumeA, volumeB)
        if difference and not resample:
            return _('B lies on another grid than A ({difference}); switch on "Resample B onto A"').format(
                difference=difference
            )
        return ""

    def gridDifference(self, volumeA, volumeB):
        """How the grids differ with all parent transforms applied, in words, or ``""``."""
        return volume_nodes.relate(volumeA, volumeB).difference

    def suggestPair(self):
        """An anatomical volume of the scene and another one, to save the user's clicks; None for what there is not."""
        from ClinicalFMambaLib.inference.intensity import guess_modality

        def modality(node):
            grid = volume_nodes.Grid(volume_nodes.sizeOf(node), volume_nodes.LPS_FROM_RAS)
            return volume_nodes.modalityOf(node) or guess_modality(grid.asVolume(node.GetName()))

        nodes = [
            node
            for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
            if node.GetClassName() in ("vtkMRMLScalarVolumeNode", "vtkMRMLVectorVolumeNode")
            and not volume_nodes.problemOf(node, "")
            and not result_nodes.isResult(node)
            and not result_nodes.isCompanion(node)
        ]
        anatomical = [node for node in nodes if modality(node) == "MR" and not volume_nodes.isColour(node)]
        a = next(iter(anatomical + nodes), None)
        b = next((node for node in nodes if node is not a), None)
        return a, b

    def bundledModels(self):
        """Name and one line of description of each bundled model."""
        from ClinicalFMambaLib.pretrained import read_index

        return {name: entry.get("description", "") for name, entry in read_index().items()}

    def _problemWithModel(self, model):
        if model == "auto" or model in self.bundledModels():
            return ""
        if not model:
            return _("Choose the file of the model")
        path = Path(model)
        if path.suffix != ".safetensors":
            return _("{model} is neither a bundled model nor a .safetensors file").format(model=model)
        return "" if path.is_file() else _("The model file {path} does not exist").format(path=path)

    def cancel(self, reason=""):
        """Give up the fusion under way, if any; the scene stays as it is."""
        job = self._job
        if job is None:
            return
        job.outcome = FusionError(reason or _("Cancelled"), "Cancelled")
        self._abandon(job)
        self.cancelled.emit(reason or _("Cancelled; nothing was changed"))

    @property
    def stage(self):
        """What the fusion under way is doing, in words, or ``""``."""
        return "" if self._job is None else self._job.stage

    def timeLeft(self):
        """Seconds until the fusion under way is done, or None where that is not known yet."""
        job = self._job
        if job is None or job.paceStart is None:
            return None
        began, from_ = job.paceStart
        done = job.fraction - from_
        return None if done < 0.03 else (1 - job.fraction) * (time.monotonic() - began) / done

    def elapsed(self):
        """Seconds since the fusion under way began, or None."""
        return None if self._job is None else time.monotonic() - self._job.started

    # ------------------------------------------------------------------------------------- after a fusion

    def results(self, fusedVolume):
        """The :class:`.result_nodes.Results` of a fused volume, also of one from a saved scene."""
        return result_nodes.resultsOf(fusedVolume)

    def sources(self, fusedVolume):
        """Volumes A and B of a fused volume, None for what is no longer in the scene."""
        return tuple(fusedVolume.GetNodeReference(role) for role in (result_nodes.VOLUME_A, result_nodes.VOLUME_B))

    def show(self, fusedVolume):
        """Show the fused volume in the slice views; beside its sources where these are being compared."""
        if display.isComparing() and all(self.sources(fusedVolume)):
            self.compare(fusedVolume)
        else:
            display.showAlone(fusedVolume)

    def compare(self, fusedVolume):
        """Show A, the fused volume and B side by side in three linked slice views.

        Raises:
            ValueError: A or B is no longer in the scene.
        """
        a, b = self.sources(fusedVolume)
        if a is None or b is None:
            raise ValueError(_("volume A or B of {name} is no longer in the scene").format(name=fusedVolume.GetName()))
        display.compare(a, fusedVolume, b)

    def showDifference(self, fusedVolume):
        """Show what the fusion added to A or took from it, over A; returns the difference volume.

        Raises:
            ValueError: the node is no result, or A is gone or has changed.
        """
        difference = inTurns(result_nodes.putDifference(fusedVolume))
        display.leaveComparison()
        display.showOver(fusedVolume.GetNodeReference(result_nodes.VOLUME_A), difference, 0.6)
        return difference

    def saveReport(self, fusedVolume, path):
        """Write the report of a result: a page with pictures (.html) or the provenance alone (.json).

        Raises:
            ValueError: the node is no result.
            OSError: the file cannot be written.
        """
        from .report import writeReport

        writeReport(fusedVolume, self.results(fusedVolume), Path(path))

    # ---------------------------------------------------------------------------------------- the engine

    def startEngine(self):
        """Start the worker unless it runs, so that the first fusion need not wait for torch.

        Raises:
            RuntimeError: there is no Python to start it with.
        """
        if not self._client.isRunning:
            self._client.start(self._scratchFolder())
            self.engineChanged.emit()

    def stopEngine(self):
        """End the worker and free its memory; cancels the fusion under way."""
        self.cancel()
        self._endWorker()
        self.engineChanged.emit()

    def _endWorker(self):
        """Blocks until it is gone: some ten milliseconds where it idles; one that is busy is not waited for."""
        if self._abandoned or not self._client.isReady:
            self._client.kill()
        self._client.stop()
        self._abandonment.stop()
        self._abandoned.clear()

    @property
    def engineRuns(self):
        return self._client.isRunning

    @property
    def engineText(self):
        """What the fusion runs on and why, for the user."""
        missing = self.requirements.describeMissing()
        if missing:
            return missing + ". " + _("Fuse offers to install it.")
        ready = self._client.ready
        if ready is None:
            return _("Looking for a GPU …") if self._client.isRunning else _("Not started yet")
        if ready.get("problem"):
            return inThePanel(ready["problem"])
        device = ready.get("device") or {}
        return f"{(device.get('name') or '?').upper()}: {device.get('reason') or '?'}"

    @property
    def classifiers(self):
        """Names of the classifiers that the worker offers."""
        return [entry["name"] for entry in (self._client.ready or {}).get("classifiers", ())]

    @property
    def mayClassify(self):
        """Whether a classification can be asked for; yes as long as the worker has not said what it offers."""
        return self._client.ready is None or bool(self.classifiers)

    @property
    def classifierHint(self):
        """What the classifier is and what was measured of it, in words, or ``""``."""
        entries = (self._client.ready or {}).get("classifiers", ())
        words = [(entry.get("verdict"), entry.get("evidence")) for entry in entries[:1]]
        return " ".join(f"{verdict[:1].upper()}{verdict[1:]}. {text}" for verdict, text in words if verdict and text)

    @property
    def classifierProblem(self):
        """Why no classifier can be used, or ``""``."""
        ready = self._client.ready
        if ready is None:
            return _("Known once the fusion engine has started")
        return "" if ready.get("classifiers") else ready.get("classifier_problem") or _("none is bundled")

    @property
    def freeMemoryGib(self):
        """Free memory of the device when the worker started, or None."""
        return ((self._client.ready or {}).get("device") or {}).get("free_gib")

    def cleanup(self):
        """End the worker and delete all temporary files; the logic is of no use afterwards."""
        for signal in (self.progress, self.finished, self.failed, self.cancelled, self.engineChanged):
            signal.disconnectAll()
        if self._job is not None:
            self._abandon(self._job)
        self._endWorker()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    # ------------------------------------------------------------------------------------------ inside

    def _scratchFolder(self):
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="ClinicalFMamba-", dir=slicer.app.temporaryPath))
        return self._scratch

    @staticmethod
    def _describe(node, grid, path, modality):
        return {"array": str(path), "name": node.GetName(), "modality": modality, **grid.forWorker()}

    @staticmethod
    def _windowOption(node, window):
        if window == "displayed":
            return list(volume_nodes.displayedWindow(node) or ()) or "auto"
        return window if isinstance(window, str) else [float(value) for value in window]

    def _prepare(self, job):
        """Write the inputs and send the request; a generator."""
        self._report(job, _("Handing over the volumes"), 0.0)
        a, b = Path(job.request["a"]["array"]), Path(job.request["b"]["array"])
        yield from volume_nodes.writeArray(job.volumeA, a)
        if job.pair.warped:
            self._report(job, _("Moving B through its transforms"), 0.01)
            modality = job.request["options"]["modality_b"]
            yield from volume_nodes.writeMovedArray(job.volumeB, job.volumeA, b, modality)
        else:
            yield from volume_nodes.writeArray(job.volumeB, b)
        self._client.send(job.request)
        job.awaited = True
        if not self._client.isReady:
            self._report(job, _("Starting the fusion engine"), PREPARED)

    def _finish(self, job, event):
        """Turn the worker's result into nodes; a generator."""
        self._report(job, _("Taking over the result"), ANSWERED)
        image = yield from volume_nodes.readImage(job.request["output"])
        readings = {}
        for key, role in (("occlusion", result_nodes.OCCLUSION), ("region", result_nodes.REGION)):
            path = (event.get("classification") or {}).get(key)
            if path:
                reading = yield from volume_nodes.readImage(path)
                readings[role] = reading, (yield from volume_nodes.greatestOf(reading))
        event["provenance"]["slicer"] = {
            "version": slicer.app.applicationVersion,
            **job.origins,
            "moved_by_slicer": job.pair.difference if job.pair.warped else "",
        }
        if job.output is not None and job.output.IsA("vtkMRMLVectorVolumeNode") != event["colour"]:
            # No longer of this job, which would be cancelled by its removal.
            empty, job.output, job.name = job.output, None, job.output.GetName()
            slicer.mrmlScene.RemoveNode(empty)
        output = result_nodes.putVolume(job.output, image, job.place, job.volumeA, event, job.name)
        result_nodes.putResults(output, job.volumeA, job.volumeB, event)
        for role, (reading, most) in readings.items():
            result_nodes.putReading(output, reading, role, most)
        job.outcome = output
        self._dropJob()
        self.finished.emit(output)

    @staticmethod
    def _origin(node):
        parent = node.GetParentTransformNode()
        storage = node.GetStorageNode()
        return {
            "name": node.GetName(),
            "id": node.GetID(),
            "file": (storage.GetFileName() or "") if storage is not None else "",
            "transform": parent.GetName() if parent is not None else "",
        }

    def _run(self, steps):
        self._job.steps = steps
        self._stepper.start(0)

    def _step(self):
        """Work for a moment, then let the event loop run."""
        job = self._job
        if job is None or job.steps is None:
            return
        until = time.monotonic() + TURN_SECONDS
        try:
            while time.monotonic() < until:
                next(job.steps)
                if self._job is not job:
                    return
        except StopIteration:
            job.steps = None
            return
        except OSError as error:
            if self._job is not job:  # cancelled by somebody who listens to its progress
                return
            reason = _("The volumes could not be handed over to the fusion process or back: {reason}")
            self._fail(FusionError(reason.format(reason=error.strerror or error), "Internal", "again"))
            return
        except Exception as error:
            logging.exception("ClinicalFMamba: the fusion failed inside Slicer")
            if self._job is job:
                self._fail(FusionError(_inWords(error), "Internal"))
            return
        self._stepper.start(0)

    def _report(self, job, stage, fraction):
        job.stage, job.fraction = stage, max(job.fraction, fraction)
        self.progress.emit(job.stage, job.fraction)

    def _onEvent(self, event):
        name, identity = event["event"], event.get("id")
        if name == "ready":
            self.engineChanged.emit()
            if self._abandoned:
                self._abandonment.start(int(1000 * CANCEL_SECONDS))
        job = self._job
        if identity in self._abandoned and name in ("result", "error", "cancelled"):
            shutil.rmtree(self._abandoned.pop(identity), ignore_errors=True)
            if not self._abandoned:
                self._abandonment.stop()
            return
        if job is None or (identity != job.identity and not (name == "error" and identity is None)):
            return
        if name == "progress":
            fraction = PREPARED + (ANSWERED - PREPARED) * float(event.get("fraction") or 0)
            stage = event.get("stage") or ""
            if stage == "fusing" and job.paceStart is None:
                job.paceStart = (time.monotonic(), fraction)
            self._report(job, stageInWords(stage), fraction)
        elif name == "result":
            for warning in event.get("warnings") or ():
                logging.warning(f"ClinicalFMamba: {warning}")
            self._watcher.stop()
            job.awaited = False
            self._run(self._finish(job, event))
        elif name == "error":
            message = inThePanel(event.get("message") or "?")
            retry = {"less-memory": "lessMemory"}.get(event.get("retry"), event.get("retry") or "")
            self._fail(FusionError(message, event.get("kind") or "?", retry, self._client.log))
        elif name == "cancelled":
            job.outcome = FusionError(_("Cancelled"), "Cancelled")
            self._dropJob()
            self.cancelled.emit(_("Cancelled; nothing was changed"))

    def _onLost(self, kind, reason):
        log = self._client.log
        for folder in self._abandoned.values():
            shutil.rmtree(folder, ignore_errors=True)
        self._abandoned.clear()
        self._abandonment.stop()
        job = self._job
        if job is not None:
            # An end in order, as a launcher may report it, is none for a fusion under way.
            kind = "crashed" if kind == "idle" else kind
            onGpu = self._deviceOf(job) not in ("cpu", "")
            message, retry = {
                "silent": (_("The fusion process does not answer any more and was ended."), "again"),
                "garbage": (_("The fusion process answered with something unreadable and was ended."), "again"),
                "notStarted": (_("The fusion process could not be started."), "again"),
            }.get(
                kind,
                (
                    _("The fusion process ended unexpectedly; mostly that means that memory ran out."),
                    "cpu" if onGpu else "lessMemory",
                ),
            )
            self._fail(FusionError(message, kind, retry, f"{reason}\n{log}".strip()))
        elif kind != "idle":
            logging.warning(f"ClinicalFMamba: the fusion process has ended: {reason}")
        self.engineChanged.emit()

    def _deviceOf(self, job):
        device = job.request["options"]["device"]
        return device if device != "auto" else ((self._client.ready or {}).get("device") or {}).get("name", "")

    def _fail(self, error):
        if self._job is not None:
            self._job.outcome = error
        self._dropJob()
        logging.error(f"ClinicalFMamba: {error}")
        self.failed.emit(error)

    def _watch(self):
        self._client.watch()

    def _dropJob(self):
        """Forget the job and delete its files."""
        job, self._job = self._job, None
        self._stepper.stop()
        self._watcher.stop()
        self._unobserveScene()
        if job is not None:
            if job.steps is not None:
                # Not from inside itself: the generator that ends its own job is still running.
                job.steps = None
            shutil.rmtree(job.folder, ignore_errors=True)

    def _abandon(self, job):
        """Forget the job; the worker may take a moment to let go of it."""
        self._dropJob()
        if job.awaited and self._client.isRunning:
            self._abandoned[job.identity] = job.folder
            self._client.send({"command": "cancel", "id": job.identity})
            # One that is still importing torch answers when it is ready; ended, the next one would begin anew.
            if self._client.isReady:
                self._abandonment.start(int(1000 * CANCEL_SECONDS))

    def _endAbandoned(self):
        """It may be in the middle of minutes of computing for a request that nobody wants any more."""
        if not self._abandoned:
            return
        self._client.kill()
        self._abandoned.clear()
        job = self._job
        if job is not None:
            # The next fusion, which has waited for it.
            try:
                self.startEngine()
            except (RuntimeError, OSError) as error:
                return self._fail(FusionError(str(error), "notStarted", "again"))
            self._client.beginWatch()
            if job.awaited:
                self._client.send(job.request)
        self.engineChanged.emit()

    def _wait(self, job):
        while self._job is job:
            slicer.app.processEvents()
            time.sleep(0.005)
        if isinstance(job.outcome, FusionError):
            raise job.outcome
        return job.outcome

    # ------------------------------------------------------------------------------------------ the scene

    def _observeScene(self):
        scene = slicer.mrmlScene
        self._observers = [
            (scene, scene.AddObserver(scene.StartCloseEvent, self._onSceneClose)),
            (scene, scene.AddObserver(scene.NodeAboutToBeRemovedEvent, self._onNodeRemoved)),
        ]

    def _unobserveScene(self):
        for object_, tag in self._observers:
            object_.RemoveObserver(tag)
        self._observers = []

    def _onSceneClose(self, caller, event):
        self.cancel(_("Cancelled: the scene was closed"))

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeRemoved(self, caller, event, node):
        job = self._job
        if job is not None and any(node is used for used in (job.volumeA, job.volumeB, job.output)):
            self.cancel(_("Cancelled: {name} was removed from the scene").format(name=node.GetName()))


def _workerCommand():
    return [pythonExecutable(), "-m", "ClinicalFMambaLib.worker"]


def _inWords(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def stageInWords(stage):
    """The worker's stage in the user's language."""
    words = {
        "reading the inputs": _("Reading the volumes"),
        "checking the inputs": _("Checking the volumes"),
        "loading the model": _("Loading the model"),
        "resampling B onto A": _("Resampling B onto A"),
        "applying the windows": _("Applying the intensity windows"),
        "checking the registration": _("Checking the registration"),
        "fusing": _("Fusing"),
        "making the output": _("Making the result"),
        "measuring the result": _("Measuring the result"),
        "loading the classifier": _("Loading the classifier"),
        "finding the brain": _("Finding the brain"),
        "finding the tumour": _("Finding the tumour"),
        "fusing for the classifier": _("Fusing for the classifier"),
        "classifying": _("Classifying"),
        "mapping what speaks for it": _("Mapping where the reading comes from"),
        "writing the result": _("Writing the result"),
    }
    return words.get(stage) or stage[:1].upper() + stage[1:]
