"""The panel in a Slicer that has no torch; skipped where it has. In the host: SLICERHOST_HIDE=torch,safetensors."""

import importlib.metadata
import importlib.util
import sys
import unittest

import slicer
from clinicalfmamba_selftest import addVolume, run, showPanel, snapshot
from ClinicalFMambaPanel.logic import ClinicalFMambaLogic, FusionError


def hasTorch():
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@unittest.skipIf(hasTorch(), "torch is installed")
class WithoutTorch(unittest.TestCase):
    def setUp(self):
        slicer.mrmlScene.Clear()
        self.panel = showPanel()
        self.ui = self.panel.ui
        self.p = self.panel._parameterNode
        self.p.volumeA, self.p.volumeB = addVolume("T1"), addVolume("CT", seed=1)
        self.scene = snapshot()

    def test_panel_says_what_is_missing(self):
        self.assertIn("torch>=2.4", self.ui.engineTextLabel.text)
        self.assertIn("Fuse offers to install it", self.ui.engineTextLabel.text)
        self.assertTrue(self.ui.fuseButton.enabled, self.ui.fuseButton.toolTip)
        self.assertFalse(self.panel.logic.engineRuns)
        self.assertIsNone(sys.modules.get("torch"))

    def test_declined(self):
        """Under --testing every question is answered with no."""
        if not slicer.app.testingEnabled():
            self.skipTest("a dialog would wait for an answer")
        self.ui.fuseButton.click()
        self.assertFalse(self.panel.logic.isBusy)
        self.assertFalse(self.panel.logic.engineRuns)
        # Without the extension PyTorch there is nothing that the user could agree to.
        hasExtension = importlib.util.find_spec("PyTorchUtils") is not None
        said = self.ui.statusLabel.text if hasExtension else self.ui.errorLabel.text
        self.assertIn("torch>=2.4" if hasExtension else "the extension PyTorch", said)
        self.assertTrue(self.ui.fuseButton.enabled)
        self.assertEqual(snapshot(), self.scene)

    def test_scripts_get_an_error(self):
        logic = ClinicalFMambaLogic()
        self.addCleanup(logic.cleanup)
        with self.assertRaisesRegex(FusionError, "torch>=2.4"):
            logic.fuse(self.p.volumeA, self.p.volumeB, waitForCompletion=True)
        self.assertEqual(snapshot(), self.scene)


if __name__ == "__main__":
    run(__name__)
