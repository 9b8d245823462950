"""Views, files, subject hierarchy, sample data, packages: the parts of the application around a module."""

import os
import sys
import unittest

import numpy as np
import qt
import SampleData
import slicer

LAYOUT = """<layout type="horizontal">{}</layout>""".format(
    "".join(
        f'<item><view class="vtkMRMLSliceNode" singletontag="{name}">'
        f'<property name="orientation" action="default">Axial</property>'
        f'<property name="viewlabel" action="default">{name}</property>'
        f'<property name="viewcolor" action="default">#777777</property></view></item>'
        for name in ("CompareA", "CompareFused", "CompareB")
    )
)


def ramp(name="ramp"):
    """Brighter from the patient's right to the left, which is the right side of an axial view."""
    array = np.broadcast_to(np.linspace(0, 1000, 40, dtype=np.float32), (30, 50, 40))
    v = slicer.util.addVolumeFromArray(np.ascontiguousarray(array), name=name)
    v.SetIJKToRASDirections(-1, 0, 0, 0, 1, 0, 0, 0, 1)
    v.GetDisplayNode().AutoWindowLevelOff()
    v.GetDisplayNode().SetWindowLevel(1000, 500)
    return v


def pixels(name):
    """The grey levels that a slice view shows, top row first."""
    view = slicer.app.layoutManager().sliceWidget(name).sliceView()
    image = view.grab().toImage()
    return np.array([[qt.QColor(image.pixel(x, y)).red() for x in range(image.width())] for y in range(image.height())])


class Views(unittest.TestCase):
    def setUp(self):
        slicer.mrmlScene.Clear()
        self.manager = slicer.app.layoutManager()
        self.manager.setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutConventionalView)

    def test_layout_of_ones_own(self):
        node = self.manager.layoutLogic().GetLayoutNode()
        if not node.IsLayoutDescription(901):
            node.AddLayoutDescription(901, LAYOUT)
        got = []
        self.manager.layoutChanged.connect(got.append)
        self.manager.setLayout(901)
        self.manager.layoutChanged.disconnect(got.append)
        self.assertEqual((self.manager.layout, got), (901, [901]))
        for name in ("CompareA", "CompareFused", "CompareB"):
            self.assertIn(name, self.manager.sliceViewNames())
            widget = self.manager.sliceWidget(name)
            self.assertEqual(widget.mrmlSliceNode().GetOrientation(), "Axial")
            self.assertIsNotNone(widget.mrmlSliceCompositeNode())
        slicer.app.processEvents()
        self.assertTrue(self.manager.sliceWidget("CompareB").visible)
        self.assertFalse(self.manager.sliceWidget("Red").visible)
        self.assertIsNone(self.manager.sliceWidget("NoSuchView"))

    def test_slice_is_drawn_with_window_and_level(self):
        v = ramp()
        slicer.util.setSliceViewerLayers(background=v, fit=True)
        slicer.app.processEvents()
        shown = pixels("Red")
        middle = shown[shown.shape[0] // 2]
        inside = middle[middle > 0]
        self.assertGreater(inside[-1], 200)
        self.assertTrue((np.diff(inside[1:-1].astype(int)) >= 0).all())
        v.GetDisplayNode().SetWindowLevel(1000, 5000)
        self.assertEqual(pixels("Red").max(), 0)

    def test_foreground_is_blended(self):
        a, b = ramp("a"), ramp("b")
        slicer.util.arrayFromVolume(b)[:] = 1000
        slicer.util.arrayFromVolumeModified(b)
        slicer.util.setSliceViewerLayers(background=a, foreground=b, foregroundOpacity=1.0, fit=True)
        slicer.app.processEvents()
        shown = pixels("Red")
        self.assertEqual(shown[shown.shape[0] // 2, shown.shape[1] // 2], 255)

    def test_views_survive_closing_the_scene(self):
        before = self.manager.sliceViewNames()
        slicer.mrmlScene.Clear()
        self.assertEqual(self.manager.sliceViewNames(), before)
        slicer.util.setSliceViewerLayers(background=ramp(), fit=True)
        slicer.app.processEvents()
        self.assertGreater(pixels("Red").max(), 0)

    def test_text_is_drawn(self):
        label = qt.QLabel("Research use only")
        label.resize(200, 40)
        image = label.grab().toImage()
        colours = {image.pixel(x, y) for x in range(image.width()) for y in range(image.height())}
        self.assertGreater(len(colours), 2)


class Files(unittest.TestCase):
    def setUp(self):
        slicer.mrmlScene.Clear()

    def path(self, name):
        return os.path.join(slicer.util.tempDirectory(), name)

    def test_bundle(self):
        v = ramp("CT")
        v.SetAttribute("ClinicalFMamba.role", "A")
        path = self.path("scene.mrb")
        self.assertTrue(slicer.util.saveScene(path))
        slicer.mrmlScene.Clear()
        slicer.util.loadScene(path)
        again = slicer.util.getNode("CT")
        self.assertEqual(again.GetAttribute("ClinicalFMamba.role"), "A")
        self.assertEqual(slicer.util.arrayFromVolume(again).shape, (30, 50, 40))
        sh = slicer.mrmlScene.GetSubjectHierarchyNode()
        self.assertNotEqual(sh.GetItemByDataNode(again), 0)

    def test_table_and_text(self):
        table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "metrics")
        slicer.util.updateTableFromArray(table, np.arange(6.0).reshape(3, 2), ["a", "b"])
        self.assertTrue(slicer.util.saveNode(table, self.path("t.csv")))
        text = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode", "report")
        text.SetText("abc")
        # Short texts stay in the scene file: without this Slicer saves nothing and says so by returning False.
        self.assertFalse(slicer.util.saveNode(text, self.path("short.txt")))
        text.SetForceCreateStorageNode(text.CreateStorageNodeAlways)
        path = self.path("t.txt")
        self.assertTrue(slicer.util.saveNode(text, path))
        with open(path) as f:
            self.assertEqual(f.read().strip(), "abc")

    def test_what_cannot_be_read(self):
        path = self.path("garbage.nrrd")
        with open(path, "w") as f:
            f.write("no image")
        before = slicer.mrmlScene.GetNumberOfNodes()
        with self.assertRaises(RuntimeError):
            slicer.util.loadVolume(path)
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), before)


class Hierarchy(unittest.TestCase):
    def test_item_comes_and_goes_with_its_node(self):
        slicer.mrmlScene.Clear()
        sh = slicer.mrmlScene.GetSubjectHierarchyNode()
        v = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
        table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode")
        item = sh.GetItemByDataNode(v)
        self.assertTrue(item and sh.GetItemByDataNode(table))
        slicer.mrmlScene.RemoveNode(v)
        self.assertIsNone(sh.GetItemDataNode(item))


class Application(unittest.TestCase):
    def test_nothing_is_installed(self):
        for call in (slicer.util.pip_install, slicer.util.pip_uninstall):
            with self.assertRaises(RuntimeError):
                call("torch")
        self.assertFalse(slicer.app.extensionsManagerModel().isExtensionInstalled("PyTorch"))
        self.assertTrue(slicer.packaging.pip_check("numpy>=1.20"))
        self.assertFalse(slicer.packaging.pip_check(["numpy", "no-such-package-at-all"]))

    def test_settings_are_those_of_this_run(self):
        self.assertIsNone(slicer.app.userSettings().value("Test/key"))
        qt.QSettings().setValue("Test/key", "x")
        self.assertEqual(slicer.util.settingsValue("Test/key", ""), "x")
        self.assertTrue(slicer.app.slicerUserSettingsFilePath.startswith(slicer.app.slicerHome))

    def test_modules(self):
        self.assertEqual(slicer.modules.volumes.name, "Volumes")
        self.assertIs(slicer.util.getModuleLogic("Volumes"), slicer.modules.volumes.logic())
        with self.assertRaises(RuntimeError):
            slicer.util.getModule("NoSuchModule")
        self.assertFalse(hasattr(slicer.modules, "nosuchmodule"))

    def test_sample_data(self):
        loaded = []
        SampleData.SampleDataLogic.registerCustomSampleDataSource(
            category="Test", sampleName="phantom", uris="", fileNames="", nodeNames="", customDownloader=loaded.append
        )
        logic = SampleData.SampleDataLogic()
        source = logic.sourceForSampleName("phantom")
        with self.assertRaises(RuntimeError):
            logic.downloadSample("phantom")
        source.customDownloader(source)
        self.assertEqual(loaded, [source])
        self.assertEqual(logic.downloadSamples("nothing of that name"), [])
        with self.assertRaises(ValueError):
            SampleData.SampleDataSource(uris=["a", "b"], fileNames=["a"])


sys.exit(not unittest.main(argv=[""], verbosity=2, exit=False).result.wasSuccessful())
