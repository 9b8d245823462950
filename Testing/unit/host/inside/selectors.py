"""qMRMLNodeComboBox and parameter nodes, beyond the recorded tests: after Slicer's source."""

import enum
import gc
import pathlib
import sys
import tempfile
import unittest
from typing import Annotated

import ctk
import qt
import slicer
from slicer import vtkMRMLLabelMapVolumeNode, vtkMRMLScalarVolumeNode
from slicer.parameterNodeWrapper import (
    Choice,
    Default,
    FloatRange,
    Maximum,
    Minimum,
    RangeBounds,
    WithinRange,
    parameterNodeWrapper,
)


def volume(name="CT"):
    return slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)


def selector(scene=True, **properties):
    s = slicer.qMRMLNodeComboBox()
    s.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    for name, value in properties.items():
        setattr(s, name, value)
    if scene:
        s.setMRMLScene(slicer.mrmlScene)
    return s


class Selector(unittest.TestCase):
    def setUp(self):
        slicer.mrmlScene.Clear()

    def test_node_set_before_the_scene(self):
        v = volume()
        s = selector(scene=False, noneEnabled=True)
        s.setCurrentNode(v)
        self.assertIsNone(s.currentNode())
        s.setMRMLScene(slicer.mrmlScene)
        self.assertIs(s.currentNode(), v)

    def test_adding_a_scene_forgets_the_current_node(self):
        a = volume("A")
        s = selector(noneEnabled=True)
        s.setCurrentNode(a)
        got = []
        s.currentNodeChanged.connect(got.append)
        with tempfile.TemporaryDirectory() as folder:
            other = slicer.vtkMRMLScene()
            other.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "B")
            other.SetURL(folder + "/other.mrml")
            other.Commit()
            slicer.mrmlScene.SetURL(folder + "/other.mrml")
            slicer.mrmlScene.Import()
        self.assertIsNone(s.currentNode())
        self.assertEqual((got, s.nodeCount()), ([None], 2))

    def test_removing_the_current_node_selects_the_row_above(self):
        a, b = volume("A"), volume("B")
        s = selector(noneEnabled=True)
        s.setCurrentNode(b)
        got = []
        s.currentNodeChanged.connect(got.append)
        slicer.mrmlScene.RemoveNode(b)
        self.assertIs(s.currentNode(), a)
        slicer.mrmlScene.RemoveNode(a)
        self.assertIsNone(s.currentNode())
        self.assertEqual(got, [a, None])

    def test_closing_the_scene(self):
        s = selector(noneEnabled=True)
        s.setCurrentNode(volume())
        got = []
        s.connect("currentNodeChanged(vtkMRMLNode*)", got.append)
        s.connect("currentNodeChanged(bool)", got.append)
        s.connect("currentNodeIDChanged(QString)", got.append)
        slicer.mrmlScene.Clear()
        self.assertEqual((got, s.nodeCount()), ([None, False, ""], 0))

    def test_names_follow(self):
        v = volume("before")
        s = selector()
        v.SetName("after")
        combo = s.findChildren(ctk.ctkComboBox)[0]
        self.assertEqual(combo.itemText(0), "after")

    def test_filters(self):
        labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
        v = volume()
        hidden = volume("hidden")
        hidden.SetHideFromEditors(True)
        v.SetAttribute("role", "fused")
        cases = (
            ({}, [labels, v]),
            ({"showChildNodeTypes": False}, [v]),
            ({"hideChildNodeTypes": ["vtkMRMLLabelMapVolumeNode"]}, [v]),
        )
        for properties, expected in cases:
            with self.subTest(properties):
                s = selector(**properties)
                self.assertEqual([s.nodeFromIndex(i) for i in range(s.nodeCount())], expected)
        s = selector()
        s.addAttribute("vtkMRMLScalarVolumeNode", "role", "fused")
        self.assertEqual(s.nodeCount(), 1)

    def test_actions(self):
        s = selector(noneEnabled=True, addEnabled=True, renameEnabled=True, removeEnabled=False)
        combo = s.findChildren(ctk.ctkComboBox)[0]
        texts = [combo.itemText(i) for i in range(combo.count)]
        self.assertEqual([t.split()[0] for t in texts if t], ["None", "Rename", "Create", "Create"])

    def test_new_nodes(self):
        s = selector(noneEnabled=True, baseName="Fused")
        got = []
        for signal in ("nodeAdded", "nodeAddedByUser"):
            s.connect(f"{signal}(vtkMRMLNode*)", lambda node, signal=signal: got.append((signal, node.GetName())))
        self.assertEqual([s.addNode().GetName(), s.addNode().GetName()], ["Fused", "Fused_1"])
        self.assertEqual(got[:2], [("nodeAdded", "Fused"), ("nodeAddedByUser", "Fused")])
        self.assertIsNone(s.addNode("vtkMRMLModelNode"))

    def test_wrong_node(self):
        with self.assertRaises(ValueError):
            selector().setCurrentNode(3)

    def test_forgotten_selectors_stop_listening(self):
        for _ in range(20):
            s = selector(noneEnabled=True)
            s.connect("nodeAdded(vtkMRMLNode*)", lambda node: 1 / 0)
        del s
        gc.collect()
        volume()


class Plane(enum.Enum):
    AXIAL = 1
    SAGITTAL = 2

    def label(self):
        return self.name.capitalize()


@parameterNodeWrapper
class Parameters:
    volume: vtkMRMLScalarVolumeNode
    either: vtkMRMLScalarVolumeNode | vtkMRMLLabelMapVolumeNode | None
    plane: Plane = Plane.AXIAL
    weights: pathlib.Path = pathlib.Path("x")
    window: Annotated[FloatRange, RangeBounds(-1000, 3000)] = FloatRange(0, 80)
    memory: Annotated[float, Minimum(0.5), Maximum(64), Default(4.0)]
    mode: Annotated[int, Choice([2, 3])] = 3
    share: Annotated[float, WithinRange(0, 1)] = 0.5


class ParameterNode(unittest.TestCase):
    def setUp(self):
        slicer.mrmlScene.Clear()
        self.node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")
        self.p = Parameters(self.node)

    def test_defaults(self):
        p = self.p
        self.assertEqual(
            (p.volume, p.plane, p.weights, p.memory, p.mode), (None, Plane.AXIAL, pathlib.Path("x"), 4.0, 3)
        )
        self.assertEqual((p.window.minimum, p.window.maximum), (0, 80))

    def test_what_is_stored(self):
        v = volume()
        self.p.volume, self.p.plane, self.p.window = v, Plane.SAGITTAL, FloatRange(-5, 5)
        self.assertEqual(self.node.GetNodeReferenceID("volume"), v.GetID())
        self.assertEqual(self.node.GetParameter("plane"), "SAGITTAL")
        again = Parameters(self.node)
        self.assertEqual((again.volume, again.plane, again.window), (v, Plane.SAGITTAL, FloatRange(-5, 5)))

    def test_refused(self):
        label = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode")
        cases = (
            ("volume", label, TypeError),
            ("volume", "CT", TypeError),
            ("plane", 1, TypeError),
            ("weights", "x", TypeError),
            ("window", FloatRange(-2000, 0), ValueError),
            ("memory", 0.1, ValueError),
            ("memory", 65, ValueError),
            ("memory", None, ValueError),
            ("mode", 4, ValueError),
            ("share", 1.5, ValueError),
        )
        for name, value, error in cases:
            with self.subTest(name=name, value=value), self.assertRaises(error):
                setattr(self.p, name, value)
        with self.assertRaises(ValueError):
            FloatRange(2, 1)

    def test_part_of_a_range(self):
        self.p.window.minimum = -7
        self.assertEqual(self.p.window, FloatRange(-7, 80))

    def test_widgets(self):
        ui = type("", (), {})()
        widgets = {
            "volume": slicer.qMRMLNodeComboBox(),
            "plane": qt.QComboBox(),
            "weights": ctk.ctkPathLineEdit(),
            "window": ctk.ctkRangeWidget(),
            "memory": qt.QDoubleSpinBox(),
            "mode": ctk.ctkComboBox(),
            "share": ctk.ctkSliderWidget(),
        }
        for name, w in widgets.items():
            w.setProperty("SlicerParameterName", name)
            setattr(ui, name, w)
        ui.volume.noneEnabled = True
        ui.volume.setMRMLScene(slicer.mrmlScene)
        tag = self.p.connectGui(ui)
        self.assertEqual([ui.plane.itemText(i) for i in range(2)], ["Axial", "Sagittal"])
        self.assertEqual((ui.window.minimum, ui.window.maximum, ui.memory.minimum), (-1000, 3000, 0.5))
        v = volume()
        ui.volume.setCurrentNode(v)
        ui.plane.currentIndex = 1
        ui.weights.currentPath = __file__
        ui.window.setValues(10, 20)
        ui.memory.value, ui.share.value = 8, 0.25
        ui.mode.currentIndex = 0
        p = self.p
        self.assertEqual((p.volume, p.plane, p.weights), (v, Plane.SAGITTAL, pathlib.Path(__file__)))
        self.assertEqual((p.window, p.memory, p.mode, p.share), (FloatRange(10, 20), 8, 2, 0.25))
        slicer.mrmlScene.RemoveNode(v)
        self.assertIsNone(p.volume)
        p.disconnectGui(tag)
        p.memory = 2
        self.assertEqual(ui.memory.value, 8)

    def test_widgets_that_do_not_fit(self):
        cases = {"memory": qt.QLineEdit(), "volume": qt.QComboBox(), "plane": qt.QCheckBox()}
        for name, w in cases.items():
            with self.subTest(name), self.assertRaises(RuntimeError):
                self.p.connectParametersToGui({name: w})
        with self.assertRaises(ValueError):
            self.p.connectParametersToGui({"nosuch": qt.QCheckBox()})

    def test_types_and_names_that_are_refused(self):
        with self.assertRaises(Exception):  # noqa: B017 - Slicer raises a plain Exception
            parameterNodeWrapper(type("A", (), {"__annotations__": {"x": object}, "__module__": __name__}))
        with self.assertRaises(ValueError):
            parameterNodeWrapper(type("B", (), {"__annotations__": {"default": int}, "__module__": __name__}))


sys.exit(not unittest.main(argv=[""], verbosity=2, exit=False).result.wasSuccessful())
