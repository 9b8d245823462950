"""Drives the panel with the phantom and writes pictures: idle, settings, running, result, error, the slice views.

Run in Slicer, or outside it with ``make screenshots``:

    Slicer --additional-module-paths ClinicalFMamba --python-script Testing/Python/screenshots.py

The pictures go to Resources/Screenshots, or to the folder in the environment variable SCREENSHOTS. Nothing is faked:
the result is that of the bundled model, and the error is what a worker that was killed gives.
"""

import os
import signal
import time
from pathlib import Path

import slicer
from clinicalfmamba_selftest import spin

FOLDER = Path(os.environ.get("SCREENSHOTS") or Path(__file__).resolve().parents[2] / "Resources" / "Screenshots")
WIDTH = 470  # pixels, of Slicer's module panel on a laptop


def grab(panel, name):
    """A picture of the whole panel at the width that Slicer's module panel has, however high it is."""
    widget = panel.ui.ClinicalFMamba
    # Higher than needed, so that nothing is squeezed; what is empty below is cut off.
    widget.setFixedSize(WIDTH, 1400)
    for _ in range(30):
        slicer.app.processEvents()
    section = panel.ui.resultsCollapsibleButton
    shown = [child for child in section.children() if child.isWidgetType() and child.isVisible()]
    bottom = section.y + max(child.y + child.height for child in shown)
    path = FOLDER / f"{name}.png"
    if not widget.grab().copy(0, 0, WIDTH, bottom + 12).save(str(path)):
        raise RuntimeError(f"{path} could not be written")
    print(path)


def grabWindow(panel, name):
    """A picture of the whole application."""
    panel.ui.ClinicalFMamba.setMinimumSize(0, 0)
    panel.ui.ClinicalFMamba.setMaximumSize(16777215, 16777215)
    window = slicer.util.mainWindow()
    window.resize(1500, 880)
    began = time.monotonic()
    spin(lambda: time.monotonic() - began > 1)
    for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        node.JumpSliceByOffsetting(-31.0, 21.0, 46.0)  # the phantom's tumour, RAS
    slicer.app.processEvents()
    path = FOLDER / f"{name}.png"
    if not window.grab().save(str(path)):
        raise RuntimeError(f"{path} could not be written")
    print(path)


def main():
    from ClinicalFMambaPanel import sample_data
    from ClinicalFMambaPanel.parameters import Window

    FOLDER.mkdir(parents=True, exist_ok=True)
    slicer.mrmlScene.Clear()
    slicer.util.selectModule("ClinicalFMamba")
    panel = slicer.util.getModuleWidget("ClinicalFMamba")
    logic = panel.logic
    if hasattr(panel, "reloadCollapsibleButton"):
        panel.reloadCollapsibleButton.hide()
    lacking = logic.requirements.describeMissing() or ("" if logic.bundledModels() else "no model is bundled")
    model = os.environ.get("SCREENSHOTS_MODEL")
    if lacking and not model:
        raise SystemExit(f"no pictures without a fusion: {lacking}")
    nodes = dict(zip(sample_data.SHOWN, sample_data.addPhantom(128)))
    panel.enter()
    p = panel._parameterNode
    if model:
        p.model, p.modelFile = "file", model
    spin(lambda: logic._client.isReady, 180)
    p.volumeA, p.volumeB = nodes["T2"], nodes["CT"]
    grab(panel, "idle")

    p.windowB, p.windowBLow, p.windowBHigh = Window.CUSTOM, -20, 120
    panel.ui.advancedCollapsibleButton.collapsed = False
    origin = nodes["CT"].GetOrigin()
    nodes["CT"].SetOrigin(origin[0] + 1, origin[1], origin[2] - 2)
    grab(panel, "settings")
    nodes["CT"].SetOrigin(origin)
    panel.ui.advancedCollapsibleButton.collapsed = True
    p.windowB = Window.AUTO

    panel.ui.fuseButton.click()
    spin(lambda: logic.timeLeft() is not None or not logic.isBusy, 300)
    grab(panel, "running")
    spin(lambda: not logic.isBusy, 600)
    if p.fusedVolume is None:
        raise SystemExit(f"the fusion failed: {panel.ui.errorLabel.text}")
    grab(panel, "result")
    panel.ui.compareButton.click()
    grabWindow(panel, "compare")
    panel.ui.differenceButton.click()
    grabWindow(panel, "difference")

    p.fusedVolume = None
    panel.ui.fuseButton.click()
    spin(lambda: logic.stage == "Fusing" or not logic.isBusy, 300)
    os.kill(logic._client.ready["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
    spin(lambda: not logic.isBusy)
    grab(panel, "error")
    logic.stopEngine()


if __name__ == "__main__":
    main()
