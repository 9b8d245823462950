"""Rules of PythonQt that the recorded tests of Slicer do not touch, read from its source."""

import sys
import unittest

import ctk
import qt
import slicer


class Refused(unittest.TestCase):
    """(object, name, value): setting it raises AttributeError."""

    def test_setting(self):
        cases = {
            "read-only property": (qt.QWidget(), "width", 3),
            "slot": (qt.QPushButton(), "setText", 3),
            "signal": (qt.QPushButton(), "clicked", 3),
            "signal of a stand-in": (ctk.ctkSliderWidget(), "valueChanged", 3),
            "new name on a stand-in": (ctk.ctkSliderWidget(), "valeu", 3),
            "new name on the application": (slicer.app, "fusion", 3),
            "number from text": (qt.QSpinBox(), "value", "many"),
            "number from text, stand-in": (ctk.ctkSliderWidget(), "value", "many"),
        }
        for case, (obj, name, value) in cases.items():
            with self.subTest(case), self.assertRaises(AttributeError):
                setattr(obj, name, value)

    def test_names_of_pyside_only(self):
        for name in ("Signal", "Slot", "Property", "QtWidgets"):
            self.assertFalse(hasattr(qt, name), name)

    def test_constructors_of_ctk(self):
        for cls in (ctk.ctkSliderWidget, ctk.ctkRangeWidget, ctk.ctkPathLineEdit, slicer.qMRMLNodeComboBox):
            with self.subTest(cls.__name__), self.assertRaises(ValueError):
                cls("text")

    def test_methods_that_python_cannot_reach(self):
        cases = {
            ctk.ctkCollapsibleButton: ("setCollapsed", "setFlat", "setContentsFrameShape"),
            ctk.ctkSliderWidget: ("setRange", "setMinimum", "setMaximum", "setSingleStep", "setSuffix", "spinBox"),
            ctk.ctkRangeWidget: ("setMinimum", "setMaximum", "range", "values", "setSuffix"),
            ctk.ctkPathLineEdit: ("setNameFilters", "setFilters", "setSettingKey", "setShowBrowseButton"),
            ctk.ctkComboBox: ("setDefaultText", "setElideMode"),
            slicer.qMRMLNodeComboBox: ("setBaseName", "nodes", "model", "count", "currentText", "clear", "comboBox"),
            slicer.qMRMLWidget: ("currentNode",),
        }
        for cls, names in cases.items():
            for name in names:
                with self.subTest(f"{cls.__name__}.{name}"):
                    self.assertFalse(hasattr(cls(), name))


class Values(unittest.TestCase):
    def test_conversions(self):
        cases = {
            "text from a number": (qt.QLabel(), "text", 5, "5"),
            "text from None": (qt.QLabel(), "text", None, "None"),
            "int from float": (qt.QSpinBox(), "value", 3.7, 3),
            "bool from int": (qt.QCheckBox(), "checked", 1, True),
            "float from int": (ctk.ctkSliderWidget(), "value", 7, 7.0),
        }
        for case, (obj, name, value, expected) in cases.items():
            with self.subTest(case):
                setattr(obj, name, value)
                self.assertEqual(getattr(obj, name), expected)
                self.assertIs(type(getattr(obj, name)), type(expected))

    def test_lists_are_tuples(self):
        s = slicer.qMRMLNodeComboBox()
        s.nodeTypes = ["vtkMRMLModelNode", ""]
        self.assertEqual(s.nodeTypes, ("vtkMRMLModelNode",))
        w = qt.QWidget()
        b = qt.QPushButton(w)
        self.assertEqual(w.findChildren(qt.QPushButton), (b,))
        self.assertEqual(w.findChildren("QAbstractButton"), (b,))
        self.assertEqual(w.findChildren(qt.QLabel), ())

    def test_children_and_dynamic_properties_are_attributes(self):
        w = qt.QWidget()
        b = qt.QPushButton(w)
        b.objectName = "fuse"
        self.assertIs(w.fuse, b)
        w.setProperty("stage", "idle")
        self.assertEqual(w.stage, "idle")
        w.stage = "running"
        self.assertEqual(w.property("stage"), "running")

    def test_enumerators_are_ints(self):
        self.assertEqual(qt.QMessageBox.Ok, 1024)
        self.assertEqual(qt.QMessageBox.Ok | qt.QMessageBox.Cancel, 0x400400)
        self.assertEqual(int(qt.Qt.AlignRight | qt.Qt.AlignVCenter), 0x82)

    def test_isinstance_sees_no_base_class(self):
        b = qt.QPushButton()
        self.assertFalse(isinstance(b, qt.QWidget))
        self.assertTrue(isinstance(b, qt.QPushButton))
        self.assertFalse(isinstance(slicer.qMRMLNodeComboBox(), qt.QWidget))
        self.assertTrue(b.inherits("QWidget"))

    def test_python_subclass(self):
        class Panel(qt.QWidget):
            def __init__(self):
                qt.QWidget.__init__(self)
                self.stage = "idle"

        p = Panel()
        p.windowTitle = "x"
        self.assertEqual((p.stage, p.windowTitle), ("idle", "x"))
        self.assertTrue(isinstance(p, qt.QWidget))
        self.assertFalse(hasattr(p, "noSuchThing"))


class Signals(unittest.TestCase):
    def test_argument_counts(self):
        got = []
        s = qt.QSpinBox()
        s.connect("valueChanged(int)", lambda: got.append("none"))
        s.connect("valueChanged(int)", lambda v: got.append(v))
        s.connect("valueChanged(int)", lambda v=8: got.append(("default is overwritten", v)))
        s.connect("valueChanged(int)", lambda *a: got.append(a))
        s.value = 4
        self.assertEqual(got, ["none", 4, ("default is overwritten", 4), (4,)])

    def test_slot_of_another_object(self):
        a, b = qt.QSpinBox(), qt.QSpinBox()
        self.assertTrue(a.connect("valueChanged(int)", b, "setValue(int)"))
        a.value = 6
        self.assertEqual(b.value, 6)
        self.assertFalse(a.connect("valueChanged(int)", b, "noSuchSlot(int)"))

    def test_slot_of_qt_as_target(self):
        b, dialog, bar = qt.QPushButton(), qt.QDialog(), qt.QProgressBar()
        b.clicked.connect(dialog.accept)
        b.clicked.connect(dialog.setVisible)
        s = qt.QSpinBox()
        s.valueChanged.connect(bar.setValue)
        b.click()
        s.value = 7
        self.assertEqual((dialog.result(), bar.value), (1, 7))

    def test_disconnect_all(self):
        got = []
        b = qt.QPushButton()
        b.clicked.connect(lambda: got.append(1))
        b.clicked.disconnect()
        b.click()
        self.assertEqual(got, [])

    def test_disconnected_slot_of_a_stand_in(self):
        got = []
        s = ctk.ctkSliderWidget()
        s.valueChanged.connect(got.append)
        s.value = 3
        s.valueChanged.disconnect(got.append)
        s.value = 4
        self.assertEqual(got, [3])

    def test_destroyed_object_forgets_its_connections(self):
        got = []
        for _ in range(50):
            b = qt.QPushButton()
            b.connect("clicked()", lambda: got.append(1))
            b.delete()
        b = qt.QPushButton()
        b.click()
        self.assertEqual(got, [])

    def test_single_shot_is_function_and_property(self):
        t = qt.QTimer()
        t.singleShot = True
        self.assertTrue(t.isSingleShot())
        self.assertTrue(callable(qt.QTimer.singleShot))


class Widgets(unittest.TestCase):
    def test_collapsed_button_hides_its_contents(self):
        w = qt.QWidget()
        layout = qt.QVBoxLayout(w)
        b = ctk.ctkCollapsibleButton()
        layout.addWidget(b)
        inner = qt.QVBoxLayout(b)
        shown, hidden = qt.QLabel("a"), qt.QLabel("b")
        inner.addWidget(shown)
        inner.addWidget(hidden)
        hidden.hide()
        w.show()
        got = []
        b.connect("contentsCollapsed(bool)", got.append)
        b.collapsed = True
        self.assertFalse(shown.visible)
        self.assertFalse(b.checked)
        b.click()
        self.assertIs(b.collapsed, False)
        self.assertEqual((shown.visible, hidden.visible, got), (True, False, [True, False]))

    def test_slider(self):
        got = []
        s = ctk.ctkSliderWidget()
        self.assertEqual((s.minimum, s.maximum, s.value, s.decimals), (0, 99, 0, 2))
        s.connect("valueChanged(double)", got.append)
        s.value = 12.345
        self.assertEqual(got, [12.35])
        s.maximum = 10
        self.assertEqual((s.value, got), (10, [12.35, 10]))

    def test_range(self):
        got = []
        r = ctk.ctkRangeWidget()
        r.connect("valuesChanged(double,double)", lambda a, b: got.append((a, b)))
        r.setRange(-100, 100)
        r.minimumValue = 120
        self.assertEqual((r.minimumValue, r.maximumValue), (100, 100))
        r.setValues(50, -50)
        self.assertEqual(got[-1], (-50, 50))

    def test_path_line_edit_keeps_a_history(self):
        """ctkPathLineEdit.cpp: the latest path of its key, or of all fields without one, is there from the start."""
        first = ctk.ctkPathLineEdit()
        first.setObjectName("first")
        first.settingKey = "weights"
        self.assertEqual(first.currentPath, "")
        first.currentPath = "/a/one.safetensors"
        first.addCurrentPathToHistory()
        first.currentPath = "/a/two.safetensors"
        first.addCurrentPathToHistory()
        got = []
        second = ctk.ctkPathLineEdit()
        second.connect("currentPathChanged(QString)", got.append)
        second.settingKey = "weights"
        self.assertEqual(second.currentPath, "/a/two.safetensors")
        self.assertEqual(got, [])  # its signals are blocked when the first path gets into the combo box
        self.assertEqual(second.comboBox().count, 2)
        nameless = ctk.ctkPathLineEdit()
        nameless.currentPath = "/b/other.txt"
        nameless.addCurrentPathToHistory()
        self.assertEqual(ctk.ctkPathLineEdit().currentPath, "/b/other.txt")

    def test_path(self):
        got = []
        p = ctk.ctkPathLineEdit()
        p.connect("currentPathChanged(QString)", got.append)
        # Whether there is such a file does not matter, and emptying the field says nothing.
        p.currentPath = "/no/such/file"
        p.currentPath = ""
        self.assertEqual(got, ["/no/such/file"])
        p.nameFilters = ["Weights (*.safetensors *.pt)"]
        for path in ("/a/b.txt", "/a/b.safetensors", "/a/b.pt"):
            p.currentPath = path
        self.assertEqual(got[1:], ["/a/b.safetensors", "/a/b.pt"])

    def test_file_dialog_returns_the_path(self):
        plain = qt.QFileDialog.getSaveFileName
        try:
            qt.QFileDialog.getSaveFileName = staticmethod(lambda *a: "/tmp/x.json")
            self.assertEqual(qt.QFileDialog.getSaveFileName(None, "Save", "", "*.json"), "/tmp/x.json")
        finally:
            qt.QFileDialog.getSaveFileName = plain


sys.exit(not unittest.main(argv=[""], verbosity=2, exit=False).result.wasSuccessful())
