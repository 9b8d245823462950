"""What the self-tests share. They run in Slicer and, unchanged, in the stand-in host of Testing/host."""

import contextlib
import logging
import os
import sys
import time
import unittest
from pathlib import Path

import numpy as np
import slicer
import vtk

FOLDER = Path(__file__).resolve().parent
SECONDS = 180  # of a wait for something that takes far less: only a hang gets there


def run(name):
    """Run the tests of the module ``name``, for ``--python-script``: the exit status tells whether they passed."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[name])
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(suite)
    sys.stdout.flush()
    if not result.wasSuccessful():
        raise SystemExit(1)


def spin(until=lambda: False, seconds=SECONDS):
    """Let the event loop run until ``until()`` is true; fails when it does not become true."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise AssertionError("nothing happened for too long")
        slicer.app.processEvents()
        time.sleep(0.002)


def showPanel():
    """The module's panel, in front; the test is skipped where a Slicer was started without its main window."""
    if slicer.util.mainWindow() is None:
        raise unittest.SkipTest("there is no panel without the main window")
    slicer.util.selectModule("ClinicalFMamba")
    return slicer.util.getModuleWidget("ClinicalFMamba")


def fakeWorker(*arguments):
    """A worker command for the logic: the worker's own protocol, an engine without torch."""
    from ClinicalFMambaPanel.process import pythonExecutable

    return lambda: [pythonExecutable(), str(FOLDER / "clinicalfmamba_fakeworker.py"), *arguments]


class NothingMissing:
    """Requirements that are met."""

    isInstalling = False

    def missing(self):
        return []

    def describeMissing(self):
        return ""

    def ensure(self, onChange=None):
        return True


def makeLogic(*arguments, **options):
    """A logic whose worker needs no torch."""
    from ClinicalFMambaPanel.logic import ClinicalFMambaLogic

    options.setdefault("requirements", NothingMissing())
    return ClinicalFMambaLogic(workerCommand=fakeWorker(*arguments), **options)


class Outcomes:
    """Collects what a logic signals."""

    def __init__(self, logic):
        self.all, self.progress = [], []
        logic.progress.connect(lambda stage, fraction: self.progress.append((stage, fraction)))
        logic.finished.connect(lambda node: self.all.append(("finished", node)))
        logic.failed.connect(lambda error: self.all.append(("failed", error)))
        logic.cancelled.connect(lambda reason: self.all.append(("cancelled", reason)))

    @property
    def stage(self):
        """What is going on now."""
        return self.progress[-1][0] if self.progress else ""

    def next(self):
        """Wait for the next (name, argument)."""
        spin(lambda: self.all)
        return self.all.pop(0)


def smooth(shape, seed=0):
    """A smooth field of int16 between 0 and 1000, (k, j, i); interpolation changes it little."""
    k, j, i = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    phase = 0.7 * seed
    wave = np.sin(3 * i + 2 * j + phase) * np.cos(2 * k - j + phase) * (1 - (k - 0.5) ** 2)
    return np.rint(500 + 490 * wave).astype(np.int16)


def addVolume(name, array=None, spacing=(1.5, 1.0, 2.0), origin=(-20.0, -15.0, -10.0), angle=0.0, seed=0):
    """A volume node; ``angle`` in degrees turns its axes about all three."""
    array = smooth((20, 30, 40), seed) if array is None else array
    colour = array.ndim == 4
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVectorVolumeNode" if colour else "vtkMRMLScalarVolumeNode", name)
    transform = vtk.vtkTransform()
    transform.Translate(*origin)
    transform.RotateX(angle)
    transform.RotateY(0.7 * angle)
    transform.RotateZ(-0.5 * angle)
    transform.Scale(*spacing)
    node.SetIJKToRASMatrix(transform.GetMatrix())
    slicer.util.updateVolumeFromArray(node, array)
    node.CreateDefaultDisplayNodes()
    return node


def addTransform(name, *, shift=(0.0, 0.0, 0.0), angle=0.0):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    transform = vtk.vtkTransform()
    transform.Translate(*shift)
    transform.RotateZ(angle)
    node.SetMatrixTransformToParent(transform.GetMatrix())
    return node


def addWarp(name):
    """A smooth non-linear transform of a few mm."""
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    generator = np.random.default_rng(1)
    for corner in np.array(np.meshgrid((-40, 40), (-40, 40), (-40, 40))).reshape(3, -1).T:
        source.InsertNextPoint(*corner)
        target.InsertNextPoint(*(corner + generator.uniform(-4, 4, 3)))
    spline = vtk.vtkThinPlateSplineTransform()
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", name)
    node.SetAndObserveTransformToParent(spline)
    return node


def worldOf(node, ijk):
    """RAS coordinates in world of voxel indices (n, 3), through all transforms."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    toWorld = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(node.GetParentTransformNode(), None, toWorld)
    return np.array([toWorld.TransformPoint(matrix.MultiplyPoint((*point, 1.0))[:3]) for point in ijk])


def ijkOf(node, world):
    """Voxel indices (n, 3) of places in world, RAS, through all transforms."""
    matrix = vtk.vtkMatrix4x4()
    node.GetRASToIJKMatrix(matrix)
    fromWorld = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, node.GetParentTransformNode(), fromWorld)
    return np.array([matrix.MultiplyPoint((*fromWorld.TransformPoint(point), 1.0))[:3] for point in world])


def sampled(array, ijk):
    """Linear interpolation of (k, j, i) at indices (n, 3); NaN outside."""
    out = np.full(len(ijk), np.nan)
    for n, point in enumerate(ijk):
        base = np.floor(point).astype(int)
        if (base < 0).any() or (base + 1 > np.array(array.shape[::-1]) - 1).any():
            continue
        i, j, k = base
        di, dj, dk = point - base
        cell = array[k : k + 2, j : j + 2, i : i + 2].astype(float)
        weights = np.einsum("a,b,c->abc", (1 - dk, dk), (1 - dj, dj), (1 - di, di))
        out[n] = (cell * weights).sum()
    return out


def snapshot():
    """What the scene holds, to see that nothing has changed: ids of all nodes that users see."""
    nodes = slicer.util.getNodesByClass("vtkMRMLDisplayableNode") + slicer.util.getNodesByClass("vtkMRMLTableNode")
    nodes += slicer.util.getNodesByClass("vtkMRMLTextNode")
    return sorted(node.GetID() for node in nodes)


def leftovers(logic):
    """Files that a logic has left in its temporary folder."""
    folder = logic._scratch
    return [] if folder is None else sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def isAlive(pid):
    if os.name == "nt":  # where os.kill(pid, 0) kills
        from ClinicalFMambaLib.worker import _watch

        return not _watch(pid)()
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    status = Path(f"/proc/{pid}/stat")
    # A zombie is dead, only its parent has not yet taken notice.
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def reloading():
    """A test may make Slicer read the module's code again; the tests after it find what they have imported."""
    names = ("ClinicalFMambaPanel", "ClinicalFMambaLib")
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(kept)
        slicer.util.reloadScriptedModule("ClinicalFMamba")


class LoggedExceptions(logging.Handler):
    """Tracebacks that were logged, because what raised was called by a signal or by Qt; in ``all``."""

    def __init__(self, test):
        super().__init__()
        self.all = []
        logging.getLogger().addHandler(self)
        test.addCleanup(logging.getLogger().removeHandler, self)

    def emit(self, record):
        if record.exc_info:
            self.all.append(self.format(record))


def bestOf(measure, limit, times=4):
    """The smallest of what ``measure()`` gives, which stops when it is below ``limit``.

    A machine that is busy with something else makes a measurement longer, never shorter.
    """
    best = measure()
    while best >= limit and times > 1:
        best, times = min(best, measure()), times - 1
    return best


LOOP_SECONDS = 0.03  # of slowness() on a laptop of 2020


def slowness():
    """How many times slower than a laptop this processor is, at least 1; limits in seconds are for a laptop."""

    def loop():
        began = time.thread_time()
        sum(i * i % 7 for i in range(400_000))
        return time.thread_time() - began

    return max(1.0, min(loop() for _ in range(3)) / LOOP_SECONDS)


def now():
    """Seconds, without the time in which this thread could have run and other programs had the processor (Linux)."""
    waited = 0.0
    with contextlib.suppress(OSError, IndexError, ValueError):
        # Nanoseconds on the processor and, second, in its queue: Documentation/scheduler/sched-stats.rst.
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.monotonic() - waited


class LongestPause:
    """How long the event loop did not come round: a context manager with the seconds in ``seconds``."""

    def __enter__(self):
        from ClinicalFMambaPanel.process import QtTimer

        self.seconds, self._last = 0.0, now()
        self._timer = QtTimer(self._tick, singleShot=False)
        self._timer.start(5)
        return self

    def _tick(self):
        passed = now()
        self.seconds, self._last = max(self.seconds, passed - self._last), passed

    def __exit__(self, *_exception):
        self._tick()
        self._timer.stop()


def pauseOfShowing(image):
    """The longest pause while Slicer itself takes over and draws a volume, which no module can make shorter."""
    with LongestPause() as pause:
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "shown by Slicer")
        node.CreateDefaultDisplayNodes()
        node.GetDisplayNode().AutoWindowLevelOff()
        node.SetAndObserveImageData(image)
        slicer.util.setSliceViewerLayers(background=node, fit=True)
        end = time.monotonic() + 1
        spin(lambda: time.monotonic() > end)
    slicer.mrmlScene.RemoveNode(node)
    return pause.seconds


class OwnTurns:
    """Makes the timers and processes of a logic such that ``longest`` is the longest of their turns, in seconds.

    That is all that the logic, and the panel that listens to it, do in the event loop; what Slicer draws is not in it.
    """

    def __init__(self):
        self.longest = 0.0

    def makeTimer(self, function, singleShot=True):
        from ClinicalFMambaPanel.process import QtTimer

        return QtTimer(self.timed(function), singleShot)

    def makeProcess(self, *functions):
        from ClinicalFMambaPanel.process import QtProcess

        return QtProcess(*map(self.timed, functions))

    def timed(self, function):
        def turn(*args):
            began = now()
            try:
                return function(*args)
            finally:
                self.longest = max(self.longest, now() - began)

        return turn
