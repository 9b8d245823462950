import logging
import re
import sys
from pathlib import Path

import ctk
import qt
import slicer
import vtk
from ClinicalFMambaPanel import display, result_nodes, sample_data
from ClinicalFMambaPanel.logic import ClinicalFMambaLogic, FusionError
from ClinicalFMambaPanel.parameters import ClinicalFMambaParameterNode, Device, Window
from ClinicalFMambaPanel.process import QtTimer
from ClinicalFMambaPanel.requirements import InstallationError
from ClinicalFMambaPanel.words import METRIC_WORDS, durationInWords
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

__all__ = [
    "ClinicalFMamba",
    "ClinicalFMambaLogic",
    "ClinicalFMambaParameterNode",
    "ClinicalFMambaTest",
    "ClinicalFMambaWidget",
]


class ClinicalFMamba(ScriptedLoadableModule):
    """The module; see https://github.com/ClinicalFMamba/ClinicalFMamba."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("ClinicalFMamba")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Image Synthesis")]
        self.parent.dependencies = []
        self.parent.contributors = ["ClinicalFMamba contributors"]
        self.parent.helpText = _(
            "Fuses two registered volumes of one head (MR with CT, MR with MR, MR with SPECT or PET) into one, with a "
            "network that joins convolutions and Mamba state-space layers. Choose A and B and click Fuse. "
            'Sample data: module Sample Data, section ClinicalFMamba. More in the <a href="{url}">tutorial</a>.'
            "<p><b>Research use only, not for diagnosis.</b></p>"
        ).format(url="https://github.com/ClinicalFMamba/ClinicalFMamba#readme")
        self.parent.acknowledgementText = _(
            "The method is that of M. Zhou and F. Khalvati, ClinicalFMamba: Advancing Clinical Assessment using "
            "Mamba-based Multimodal Neuroimaging Fusion, arXiv 2508.03008."
        )
        slicer.app.connect("startupCompleted()", sample_data.register)
        slicer.app.connect("startupCompleted()", display.registerLayout)


class ClinicalFMambaWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: shows the parameter node and what the logic reports, and calls the logic."""

    def __init__(self, parent=None):
        # First, because the base class calls setup() where there is no parent.
        self.logic = None
        self._clock = None
        self._parameterNode = None
        self._parameterNodeGuiTag = None
        self._observedVolumes = {}  # volume to the tags of its observers
        self._orphans = []
        self._updating = False
        self._error = None
        self._message = self._problemShown = ""
        # It calls that of VTKObservationMixin; once more would forget what setup() observes.
        ScriptedLoadableModuleWidget.__init__(self, parent)

    # ------------------------------------------------------------------------------------------ life cycle

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/ClinicalFMamba.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)

        self.ui.noticeLabel.setStyleSheet(
            "background: #8a5a00; color: white; font-weight: bold; padding: 4px; border-radius: 3px;"
        )
        self.ui.errorFrame.setStyleSheet(
            "#errorFrame { background: #9b1c1c; border-radius: 3px; } #errorLabel { color: white; }"
        )
        for label in (self.ui.resultLabel, self.ui.classificationTitleLabel, self.ui.metricsTitleLabel):
            label.setStyleSheet("font-weight: bold;")
        self.ui.fuseButton.setStyleSheet("font-weight: bold;")
        self.ui.modelFileEdit.filters = ctk.ctkPathLineEdit.Files
        self.ui.modelFileEdit.nameFilters = [_("Weights (*.safetensors)")]
        # Else it shows the paths that other nameless fields of Slicer have kept.
        self.ui.modelFileEdit.settingKey = "ClinicalFMambaModelFile"
        for table in (self.ui.metricsTable, self.ui.classificationTable):
            table.setColumnCount(2)
            table.horizontalHeader().setStretchLastSection(True)
            table.verticalHeader().setVisible(False)

        for widget, signal, slot in (
            (self.ui.fuseButton, "clicked(bool)", self.onFuseButton),
            (self.ui.retryButton, "clicked(bool)", self.onRetryButton),
            (self.ui.errorDetailsButton, "clicked(bool)", self.onErrorDetailsButton),
            (self.ui.stopEngineButton, "clicked(bool)", self.onStopEngineButton),
            (self.ui.compareButton, "clicked(bool)", self.onCompareButton),
            (self.ui.differenceButton, "clicked(bool)", self.onDifferenceButton),
            (self.ui.reportButton, "clicked(bool)", self.onReportButton),
            (self.ui.modelComboBox, "currentIndexChanged(int)", self.onModelChanged),
            (self.ui.modelFileEdit, "currentPathChanged(QString)", self.onModelFileChanged),
            # Of a path that does not exist, nothing else is told.
            (self.ui.modelFileEdit, "validInputChanged(bool)", self.onModelFileChanged),
        ):
            if widget.connect(signal, slot) is False:
                raise RuntimeError(f"{widget.name} has no signal {signal}")

        self._clock = QtTimer(self._showTime, singleShot=False)
        self.setLogic(ClinicalFMambaLogic())
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartImportEvent, self.onSceneStartImport)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndImport)
        # Before the selectors, which take the next volume for one that is removed: it would be overwritten.
        self.addObserver(
            slicer.mrmlScene, slicer.mrmlScene.NodeAboutToBeRemovedEvent, self.onNodeAboutToBeRemoved, priority=10.0
        )
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.NodeRemovedEvent, self.onNodeRemoved)
        self._showError(None)
        # Also after a reload, which does not call enter().
        self.initializeParameterNode()

    def setLogic(self, logic):
        """Take a logic, of which this panel is the only user; the one before is ended."""
        if self.logic is not None:
            self.logic.cleanup()
        self.logic = logic
        logic.progress.connect(self._onProgress)
        logic.finished.connect(self._onFinished)
        logic.failed.connect(self._onFailed)
        logic.cancelled.connect(self._onCancelled)
        logic.engineChanged.connect(self._showEngine)
        self._fillModels()
        self._update()

    def cleanup(self):
        self.removeObservers()
        self._forgetVolumes()
        self.exit()
        self._parameterNode = None
        if self._clock is not None:
            self._clock.stop()
        if self.logic is not None:
            self.logic.cleanup()

    def enter(self):
        self.initializeParameterNode()
        if not self.logic.requirements.missing():
            try:
                # So that the device is known and the first fusion need not wait for torch.
                self.logic.startEngine()
            except (RuntimeError, OSError) as error:
                logging.warning(f"ClinicalFMamba: {error}")

    def exit(self):
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._parameterNodeGuiTag)
            self._parameterNodeGuiTag = None

    def onReload(self):
        # The reload of Slicer reads the module's own file only.
        for name in list(sys.modules):
            if name.split(".")[0] in ("ClinicalFMambaPanel", "ClinicalFMambaLib"):
                del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)
        # What Slicer has of these is the code before.
        sys.modules[sample_data.__name__].register()

    def onSceneStartClose(self, caller, event):
        self.setParameterNode(None)

    def onSceneEndClose(self, caller, event):
        self._message = ""
        self._showError(None)
        self._update()
        if self._isEntered:
            self.initializeParameterNode()

    def onSceneStartImport(self, caller, event):
        # Node selectors forget their node when a scene is added, and would have the parameter node forget it, too.
        self.setParameterNode(None)

    def onSceneEndImport(self, caller, event):
        if self._isEntered:
            self.initializeParameterNode()

    @property
    def _isEntered(self):
        # A panel of its own, which a script has made, is always in front.
        return getattr(self.parent, "isEntered", True)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAboutToBeRemoved(self, caller, event, node):
        if slicer.mrmlScene.IsClosing():
            return
        self._orphans += [companion.GetID() for companion in result_nodes.companionsOf(node)]
        p = self._parameterNode
        for name in ("volumeA", "volumeB", "fusedVolume") if p else ():
            if p.getValue(name) is node:
                p.setValue(name, None)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeRemoved(self, caller, event, node):
        """Deleting the fused volume undoes the fusion: its tables, text and difference go with it."""
        orphans, self._orphans = self._orphans, []
        for identity in orphans:
            orphan = slicer.mrmlScene.GetNodeByID(identity)
            if orphan is not None:
                slicer.mrmlScene.RemoveNode(orphan)

    def initializeParameterNode(self):
        self.setParameterNode(self.logic.getParameterNode())
        if not self._parameterNode.volumeA and not self._parameterNode.volumeB:
            self._parameterNode.volumeA, self._parameterNode.volumeB = self.logic.suggestPair()

    def setParameterNode(self, parameterNode):
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._parameterNodeGuiTag)
            self.removeObserver(self._parameterNode.parameterNode, vtk.vtkCommand.ModifiedEvent, self._update)
        self._parameterNode = parameterNode
        self._parameterNodeGuiTag = None
        if parameterNode:
            self._parameterNodeGuiTag = parameterNode.connectGui(self.ui)
            # The node: what is observed Slicer's mixin holds for ever, and a wrapper would listen as long.
            self.addObserver(parameterNode.parameterNode, vtk.vtkCommand.ModifiedEvent, self._update)
        self._update()

    # ---------------------------------------------------------------------------------------------- clicks

    def onFuseButton(self, checked=False):
        if self.logic.requirements.isInstalling:
            return
        if self.logic.isBusy:
            self.logic.cancel()
            return
        with slicer.util.tryWithErrorDisplay(_("The fusion could not be started.")):
            self._start()

    def _start(self):
        self._showError(None)
        requirements = self.logic.requirements
        try:
            if requirements.missing():
                if not requirements.ensure(self._update):
                    self._say(requirements.describeMissing())
                    return
                # Meanwhile the scene may have changed.
                problem = self._problem()
                if problem:
                    raise ValueError(problem)
            if self._parameterNode.model == "file":
                self.ui.modelFileEdit.addCurrentPathToHistory()
            self.logic.fuse(**self.fuseArguments())
        except (ValueError, OSError, FusionError, InstallationError) as error:
            self._showError(error)
        self._update()

    def fuseArguments(self):
        """What :meth:`ClinicalFMambaLogic.fuse` is called with."""
        p = self._parameterNode
        return {
            "volumeA": p.volumeA,
            "volumeB": p.volumeB,
            "outputVolume": p.fusedVolume,
            "model": p.modelFile if p.model == "file" else p.model,
            "device": p.device.value,
            "windowA": (p.windowALow, p.windowAHigh) if p.windowA is Window.CUSTOM else p.windowA.value,
            "windowB": (p.windowBLow, p.windowBHigh) if p.windowB is Window.CUSTOM else p.windowB.value,
            "modalityA": p.modalityA.value,
            "modalityB": p.modalityB.value,
            "resample": p.resample,
            "plane": p.plane.value,
            "maxMemoryGib": p.maxMemoryGib or None,
            "classify": "auto" if p.classify and self.logic.mayClassify else "",
            "metrics": p.measure,
            "checkRegistration": p.checkRegistration,
        }

    def onRetryButton(self, checked=False):
        retry = getattr(self._error, "retry", "")
        if retry == "cpu":
            self._parameterNode.device = Device.CPU
        elif retry == "lessMemory":
            self._parameterNode.maxMemoryGib = self._lessMemory()
        self.onFuseButton()

    def _lessMemory(self):
        return max(0.5, round((self._parameterNode.maxMemoryGib or self.logic.freeMemoryGib or 8.0) / 2, 1))

    def onErrorDetailsButton(self, checked=False):
        slicer.util.errorDisplay(str(self._error), detailedText=getattr(self._error, "details", ""))

    def onStopEngineButton(self, checked=False):
        self.logic.stopEngine()

    def onCompareButton(self, checked=False):
        self._onResult(self.logic.compare)

    def onDifferenceButton(self, checked=False):
        self._onResult(self.logic.showDifference)

    def onReportButton(self, checked=False):
        name = re.sub(r"[^\w]+", "-", self._parameterNode.fusedVolume.GetName()).strip("-")
        path = self.askReportPath(name)
        if path and self._onResult(lambda node: self.logic.saveReport(node, path)):
            self._say(_("Report saved: {path}").format(path=path))

    @staticmethod
    def askReportPath(name):
        """Ask where the report goes; ``""`` when that was cancelled."""
        suggestion = Path(slicer.app.defaultScenePath or Path.home()) / f"{name}.html"
        kinds = _("Web page (*.html);;JSON (*.json)")
        return qt.QFileDialog.getSaveFileName(slicer.util.mainWindow(), _("Save report"), str(suggestion), kinds)

    def _onResult(self, function):
        """Call ``function`` with the result; whether it worked. What the user can act on is shown in the panel."""
        self._showError(None)
        with slicer.util.tryWithErrorDisplay(_("This could not be done."), waitCursor=True):
            try:
                function(self._parameterNode.fusedVolume)
            except (ValueError, OSError) as error:
                self._showError(error)
                return False
        return True

    # --------------------------------------------------------------------------------------- the model list

    def _fillModels(self):
        combo = self.ui.modelComboBox
        wasBlocked = combo.blockSignals(True)
        combo.clear()
        combo.addItem(_("Automatic (by modality)"), "auto")
        for name, description in self.logic.bundledModels().items():
            combo.addItem(name, name)
            combo.setItemData(combo.count - 1, description, qt.Qt.ToolTipRole)
        combo.addItem(_("From a file …"), "file")
        combo.blockSignals(wasBlocked)

    def onModelChanged(self, index):
        if self._parameterNode and not self._updating:
            self._parameterNode.model = self.ui.modelComboBox.itemData(index)

    def onModelFileChanged(self, change):
        if self._parameterNode and not self._updating:
            self._parameterNode.modelFile = self.ui.modelFileEdit.currentPath

    # ------------------------------------------------------------------------------------ what is shown

    def _update(self, caller=None, event=None):
        """Bring everything that the parameter node does not bind itself in line with it."""
        if self._updating or self.logic is None:
            return
        self._updating = True
        try:
            self._observeVolumes()
            self._showModel()
            p = self._parameterNode
            for suffix, window in (("A", p.windowA if p else None), ("B", p.windowB if p else None)):
                for name in (f"window{suffix}RangeLabel", f"window{suffix}RangeWidget"):
                    getattr(self.ui, name).setVisible(window is Window.CUSTOM)
            self._showState()
            self._showEngine()
            self._showResults()
        finally:
            self._updating = False

    def _observeVolumes(self):
        """The grids and voxels of the inputs decide whether they can be fused."""
        p = self._parameterNode
        volumes = {node: [] for node in (p.volumeA, p.volumeB) if node} if p else {}
        if volumes.keys() == self._observedVolumes.keys():
            return
        events = (
            vtk.vtkCommand.ModifiedEvent,  # spacing, origin, directions
            slicer.vtkMRMLVolumeNode.ImageDataModifiedEvent,
            slicer.vtkMRMLTransformableNode.TransformModifiedEvent,
        )
        self._forgetVolumes()
        # Not by Slicer's mixin, which would hold on to the voxels of every patient of the day.
        for node, tags in volumes.items():
            tags += [node.AddObserver(event, self._update) for event in events]
        self._observedVolumes = volumes

    def _forgetVolumes(self):
        for node, tags in self._observedVolumes.items():
            for tag in tags:
                node.RemoveObserver(tag)
        self._observedVolumes = {}

    def _showModel(self):
        p = self._parameterNode
        model = p.model if p else "auto"
        combo = self.ui.modelComboBox
        if combo.findData(model) < 0:
            # From a scene of another version.
            combo.addItem(_("{name} (not bundled)").format(name=model), model)
        combo.setCurrentIndex(combo.findData(model))
        path = p.modelFile if p else ""
        if self.ui.modelFileEdit.currentPath != path:  # else the cursor of who types there jumps to the end
            self.ui.modelFileEdit.currentPath = path
        for widget in (self.ui.modelFileLabel, self.ui.modelFileEdit):
            widget.setVisible(model == "file")

    def _showState(self):
        """The Fuse button and what is around it."""
        busy, p = self.logic.isBusy, self._parameterNode
        problem, difference = self._problem(), ""
        if p and p.volumeA and p.volumeB and p.volumeA is not p.volumeB and not problem:
            difference = self.logic.gridDifference(p.volumeA, p.volumeB)
        resampled = _("B will be resampled: {difference}.").format(difference=difference)
        self.ui.gridLabel.text = resampled if difference else ""
        self.ui.gridLabel.setVisible(bool(difference))
        button = self.ui.fuseButton
        button.text = _("Cancel") if busy else _("Fuse")
        button.enabled = busy or not problem
        if busy:
            button.toolTip = _("Stop the fusion; the scene stays as it is")
        else:
            button.toolTip = problem or _("Fuse A and B into one volume")
        self.ui.progressBar.setVisible(busy)
        for name in ("inputs", "fusion", "advanced"):
            # What is in the section, so that its title stays readable and can be opened.
            for child in getattr(self.ui, f"{name}CollapsibleButton").children():
                if child.isWidgetType():
                    child.setEnabled(not busy)
        if busy:
            self._clock.start(500)
            self._showTime()
        else:
            self._clock.stop()
        self._problemShown = "" if busy else problem
        self._showStatus()

    def _problem(self):
        p = self._parameterNode
        if not p:
            return _("The scene is being closed or loaded")
        if self.logic.requirements.isInstalling:
            return _("Packages are being installed, which may take minutes")
        for label, window, low, high in (
            ("A", p.windowA, p.windowALow, p.windowAHigh),
            ("B", p.windowB, p.windowBLow, p.windowBHigh),
        ):
            if window is Window.CUSTOM and not low < high:
                return _("The window of {label} must go from a lower to a higher intensity").format(label=label)
        model = p.modelFile if p.model == "file" else p.model
        return self.logic.problemWith(p.volumeA, p.volumeB, p.fusedVolume, model=model, resample=p.resample)

    def _showEngine(self):
        self.ui.engineTextLabel.text = self.logic.engineText
        self.ui.stopEngineButton.enabled = self.logic.engineRuns
        problem = self.logic.classifierProblem
        self.ui.classifyCheckBox.enabled = not problem and not self.logic.isBusy
        self.ui.classifyCheckBox.toolTip = (
            _("Not available: {problem}").format(problem=problem)
            if problem
            else _("Read the grade of a glioma from T1ce with FLAIR, or say why not. {hint}").format(
                hint=self.logic.classifierHint
            )
        )

    def _onProgress(self, stage, fraction):
        self.ui.progressBar.value = int(1000 * fraction)
        self._showTime()

    def _showTime(self):
        stage, elapsed, left = self.logic.stage, self.logic.elapsed(), self.logic.timeLeft()
        if elapsed is None:
            return
        if left is None:
            self._say(_("{stage} … {elapsed}").format(stage=stage, elapsed=durationInWords(elapsed)))
        else:
            self._say(_("{stage} … about {left} left").format(stage=stage, left=durationInWords(left)))

    def _onFinished(self, node):
        # Of its own where the panel is hidden and shows no scene.
        p = self._parameterNode or self.logic.getParameterNode()
        p.fusedVolume = node
        if not p.keepSourcesVisible:
            self.logic.show(node)
        self._update()
        provenance = self.logic.results(node).provenance
        self._say(
            _("Done: {name}, {seconds}, {model} on {device}").format(
                name=node.GetName(),
                seconds=durationInWords(provenance.get("seconds", 0)),
                model=provenance.get("model", {}).get("name", "?"),
                device=provenance.get("device", {}).get("name", "?").upper(),
            )
        )

    def _onFailed(self, error):
        self._showError(error)
        self._update()
        self._say(_("The fusion failed; the scene is as it was"))

    def _onCancelled(self, reason):
        self._update()
        self._say(reason)

    def _say(self, text):
        """What happened last, until something else does."""
        self._message = text
        self._showStatus()

    def _showStatus(self):
        lines = [text for text in (self._message, self._problemShown) if text]
        self.ui.statusLabel.text = "\n".join(lines) or _("Ready to fuse")

    def _showError(self, error):
        """Show what went wrong and what may help, until the next click; None hides it."""
        self._error = error
        self.ui.errorFrame.setVisible(error is not None)
        if error is None:
            return
        retry = getattr(error, "retry", "")
        self.ui.errorLabel.text = str(error)
        self.ui.retryButton.setVisible(bool(retry))
        self.ui.retryButton.text = {
            "cpu": _("Try again on the CPU"),
            "lessMemory": _("Try again with less memory"),
        }.get(retry, _("Try again"))
        if retry == "lessMemory" and self._parameterNode:
            self.ui.retryButton.toolTip = _("Fuse with at most {gib:g} GiB of memory").format(gib=self._lessMemory())
        self.ui.errorDetailsButton.setVisible(bool(getattr(error, "details", "")))

    def _showResults(self):
        node = self._parameterNode.fusedVolume if self._parameterNode else None
        results = self.logic.results(node)
        has = results.provenance is not None
        for button in (self.ui.compareButton, self.ui.differenceButton, self.ui.reportButton):
            button.enabled = has
        if has:
            # A long name without spaces breaks where its words end.
            self.ui.resultLabel.text = node.GetName().replace("_", "_\u200b")
            self.ui.resultDetailLabel.text = _(
                "{model} on {device}, {modalityA} with {modalityB}, scale {scale}"
            ).format(
                model=results.provenance.get("model", {}).get("name", "?"),
                device=results.provenance.get("device", {}).get("name", "?").upper(),
                modalityA=results.provenance.get("inputs", {}).get("a", {}).get("modality", "?"),
                modalityB=results.provenance.get("inputs", {}).get("b", {}).get("modality", "?"),
                scale=results.provenance.get("output", {}).get("scale", "?"),
            )
        else:
            self.ui.resultDetailLabel.text = _("What the fusion gives is shown here.")
        self.ui.resultLabel.setVisible(has)
        warnings = results.provenance.get("warnings", ()) if has else ()
        self.ui.warningsLabel.text = "\n".join(f"⚠ {warning}" for warning in warnings)
        self.ui.warningsLabel.setVisible(bool(warnings))
        percent = [(label, text, "") for label, text in result_nodes.inPercent(results)]
        self._fill(self.ui.classificationTable, percent, (_("Class"), _("Probability")))
        self.ui.classificationTitleLabel.setVisible(has)
        note = results.classificationNote
        if has and not note:
            problem = self.logic.classifierProblem
            note = _("Not classified: {problem}").format(problem=problem) if problem else _("Not asked for")
        self.ui.classificationNoteLabel.text = note
        self.ui.classificationNoteLabel.setVisible(bool(note))
        metrics = [(name, f"{value:.4g}", METRIC_WORDS.get(name, "")) for name, value in results.metrics]
        self._fill(self.ui.metricsTable, metrics, (_("Metric"), _("Value")))
        self.ui.metricsTitleLabel.setVisible(bool(metrics))
        self.ui.metricsNoteLabel.text = results.metricsNote
        self.ui.metricsNoteLabel.setVisible(bool(results.metricsNote))

    @staticmethod
    def _fill(table, rows, titles):
        table.setVisible(bool(rows))
        table.setRowCount(len(rows))
        table.setHorizontalHeaderLabels(list(titles))
        for index, (name, value, toolTip) in enumerate(rows):
            for column, text in enumerate((name, value)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(toolTip)
                table.setItem(index, column, item)
        table.resizeRowsToContents()
        # As high as its rows: a table that scrolls inside a panel that scrolls is hard to read.
        height = table.horizontalHeader().height + 2 * table.frameWidth
        table.setFixedHeight(height + sum(table.rowHeight(index) for index in range(len(rows))))


class ClinicalFMambaTest(ScriptedLoadableModuleTest):
    """The self-tests of Testing/Python; an installed extension has no such folder and runs the smoke test alone."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self, **kwargs):
        import unittest

        folder = Path(__file__).resolve().parents[1] / "Testing" / "Python"
        suite = unittest.TestSuite([type(self)("test_fusePhantom")])
        if folder.is_dir():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            names = sorted(path.stem for path in folder.glob("ClinicalFMamba*Test.py"))
            for name in (*names, "clinicalfmamba_selftest"):
                # They hold on to the classes of before a reload.
                sys.modules.pop(name, None)
            suite.addTests(unittest.defaultTestLoader.loadTestsFromNames(names))
        result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(suite)
        if not result.wasSuccessful():
            raise AssertionError(f"{len(result.failures) + len(result.errors)} self-tests failed; see the log")

    def test_fusePhantom(self):
        """The phantom's T1 and CT through the bundled model, as a script does it."""
        logic = ClinicalFMambaLogic()
        try:
            lacking = logic.requirements.describeMissing() or ("" if logic.bundledModels() else "no model is bundled")
            if lacking:
                self.skipTest(f"nothing was fused: {lacking}")
            ct, t1, *_others = sample_data.addPhantom(48)
            before = slicer.util.arrayFromVolume(t1).copy()
            fused = logic.fuse(t1, ct, waitForCompletion=True)
            self.assertEqual(fused.GetImageData().GetDimensions(), t1.GetImageData().GetDimensions())
            self.assertTrue((slicer.util.arrayFromVolume(t1) == before).all())
            self.assertGreater(slicer.util.arrayFromVolume(fused).std(), 0)
        finally:
            logic.cleanup()
