"""slicer.app.layoutManager() and the slice views.

The layout, its slice nodes and the slices are Slicer's own (vtkMRMLLayoutLogic, vtkMRMLSliceLogic: reslicing,
window/level, blending). The stand-in only arranges widgets and paints the blended image; there is no OpenGL, so that
nothing else that Slicer draws into a view (3D, markups, orientation marker, crosshair) can be seen.
"""

import xml.etree.ElementTree as ET

import numpy as np
import slicer
import vtk
from PySide6 import QtCore, QtGui, QtWidgets
from vtk.util.numpy_support import vtk_to_numpy

from .ctkwidgets import stand_in, state
from .mrmlwidgets import observe
from .pythonqt import HostSignal, emit


@stand_in
class qMRMLSliceView(QtWidgets.QWidget):
    def __init__(self, parent=None):
        super().__init__(parent)
        state(self, logic=None, slice=None)
        self.setMinimumSize(60, 60)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Expanding)

    def mrmlSliceNode(self):
        return self._d.slice

    def resizeEvent(self, event):
        if self._d.logic is not None:
            self._d.logic.ResizeSliceNode(self.width, self.height)

    def scheduleRender(self):
        self.update()

    forceRender = scheduleRender

    def paintEvent(self, event):
        painter = QtGui.QPainter(self)
        painter.fillRect(self.rect, QtCore.Qt.GlobalColor.black)
        image = slice_image(self._d.logic)
        if image is not None:
            painter.drawImage(self.rect, image)
        painter.end()


def slice_image(logic):
    """The blended slice as a QImage, None where the view shows no volume."""
    if logic is None or logic.GetImageDataConnection() is None:
        return None
    port = logic.GetImageDataConnection()
    port.GetProducer().Update()
    data = port.GetProducer().GetOutputDataObject(port.GetIndex())
    scalars = data.GetPointData().GetScalars()
    if scalars is None or 0 in data.GetDimensions():
        return None
    width, height, _ = data.GetDimensions()
    pixels = vtk_to_numpy(scalars).reshape(height, width, -1)[::-1]
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.uint16)
        pixels = (pixels[..., :3] * alpha // 255).astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(pixels[..., :3], (height, width, 3)))
    return QtGui.QImage(pixels.data, width, height, 3 * width, QtGui.QImage.Format.Format_RGB888).copy()


@stand_in
class qMRMLSliceControllerWidget(QtWidgets.QWidget):
    """The bar over a slice view: its name in its colour, and the position of the slice."""

    def __init__(self, parent=None):
        super().__init__(parent)
        label, offset = QtWidgets.QLabel(), QtWidgets.QLabel()
        state(self, logic=None, slice=None, label=label, offset=offset)
        self.setAttribute(QtCore.Qt.WidgetAttribute.WA_StyledBackground)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 6, 0)
        for w in (label, offset):
            layout.addWidget(w)
        layout.addStretch(1)

    def _update(self):
        node = self._d.slice
        style = f"background-color: {QtGui.QColor.fromRgbF(*node.GetLayoutColor()).name()}; color: black;"
        if self.styleSheet != style:
            self.setStyleSheet(style)
        name = node.GetLayoutLabel() or node.GetLayoutName()
        self._d.label.setText(f" {name} ")
        self._d.offset.setText(f"{node.GetOrientation()}: {self._d.logic.GetSliceOffset():.1f} mm")

    def mrmlSliceNode(self):
        return self._d.slice

    def mrmlSliceCompositeNode(self):
        return self._d.logic.GetSliceCompositeNode()

    def sliceLogic(self):
        return self._d.logic

    def fitSliceToBackground(self):
        self._d.logic.FitSliceToBackground()

    def setSliceLink(self, linked):
        for node in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
            node.SetLinkedControl(linked)

    def setSliceOffsetValue(self, offset):
        self._d.logic.SetSliceOffset(offset)


@stand_in
class qMRMLSliceWidget(QtWidgets.QWidget):
    def __init__(self, node, logic):
        super().__init__()
        view, controller = qMRMLSliceView(), qMRMLSliceControllerWidget()
        d = state(self, logic=logic, slice=node, view=view, controller=controller)
        for part in (view, controller):
            part._d.logic, part._d.slice = logic, node
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(controller)
        layout.addWidget(view)
        for target in (d.slice, logic):
            observe(self, target, vtk.vtkCommand.ModifiedEvent, "_modified")
        controller._update()

    def _modified(self, _):
        self._d.controller._update()
        self._d.view.update()

    def sliceLogic(self):
        return self._d.logic

    def mrmlSliceNode(self):
        return self._d.slice

    def mrmlSliceCompositeNode(self):
        return self._d.logic.GetSliceCompositeNode()

    def sliceView(self):
        return self._d.view

    def sliceController(self):
        return self._d.controller

    def fitSliceToBackground(self):
        self._d.logic.FitSliceToBackground()

    sliceViewName = QtCore.Property(str, lambda self: self._d.slice.GetLayoutName())
    sliceViewLabel = QtCore.Property(str, lambda self: self._d.slice.GetLayoutLabel() or "")
    sliceOrientation = QtCore.Property(str, lambda self: self._d.slice.GetOrientation())


@stand_in
class qSlicerLayoutManager(QtCore.QObject):
    layoutChanged = HostSignal("layoutChanged(int)")

    def __init__(self, window, app_logic):
        super().__init__()
        viewport = QtWidgets.QFrame()
        window.setCentralWidget(viewport)
        QtWidgets.QVBoxLayout(viewport).setContentsMargins(0, 0, 0, 0)
        logics = vtk.vtkCollection()
        d = state(self, viewport=viewport, app=app_logic, logics=logics, widgets={}, shown=[], last=None)
        app_logic.SetSliceLogics(logics)
        d.logic = slicer.vtkMRMLLayoutLogic()
        d.logic.SetMRMLScene(slicer.mrmlScene)
        observe(self, d.logic.GetLayoutNode(), vtk.vtkCommand.ModifiedEvent, "_layout_modified")
        observe(self, slicer.mrmlScene, slicer.vtkMRMLScene.NodeAddedEvent, "_node_added")
        for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            self._node_added(node)

    def _node_added(self, node):
        if node is None or not node.IsA("vtkMRMLSliceNode") or node.GetLayoutName() in self._d.widgets:
            return
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(self._d.app)
        logic.SetMRMLScene(slicer.mrmlScene)
        logic.SetSliceNode(node)
        self._d.logics.AddItem(logic)
        self._d.widgets[node.GetLayoutName()] = qMRMLSliceWidget(node, logic)

    def _layout_modified(self, _):
        node = self._d.logic.GetLayoutNode()
        now = (node.GetViewArrangement(), node.GetCurrentLayoutDescription())
        if now != self._d.last:
            self._d.last = now
            self._arrange(now[1])
            emit(self, "layoutChanged(int)", now[0])

    def _arrange(self, description):
        """Put the views of the layout's description into the viewport."""
        for widget in self._d.shown:
            widget.setParent(None)
        self._d.shown = []
        outer = self._d.viewport.layout()
        while outer.count():
            item = outer.takeAt(0)
            if item.widget() is not None:
                item.widget().deleteLater()
        if description:
            outer.addWidget(self._build(ET.fromstring(description)))

    def _build(self, element):
        if element.tag == "view":
            name = element.get("singletontag")
            widget = self._d.widgets.get(name) if element.get("class") == "vtkMRMLSliceNode" else None
            if widget is None:
                # A view that needs OpenGL (3D, table, plot).
                widget = QtWidgets.QLabel(
                    f"{element.get('class', '').removeprefix('vtkMRML').removesuffix('Node')} {name}"
                )
                widget.setAlignment(QtCore.Qt.AlignmentFlag.AlignCenter)
                widget.setStyleSheet("background-color: #9C9CCC; color: #404060;")
                widget.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Expanding)
            else:
                self._d.shown.append(widget)
                widget.show()
            return widget
        kind = element.get("type", "horizontal")
        box = QtWidgets.QWidget()
        if kind == "grid":
            layout = QtWidgets.QGridLayout(box)
        else:
            layout = QtWidgets.QVBoxLayout(box) if kind == "vertical" else QtWidgets.QHBoxLayout(box)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        for item in element.findall("item"):
            for child in item:
                widget = self._build(child)
                if kind == "grid":
                    spans = (
                        int(item.get(k, v)) for k, v in (("row", 0), ("column", 0), ("rowspan", 1), ("colspan", 1))
                    )
                    layout.addWidget(widget, *spans)
                else:
                    layout.addWidget(widget)
        return box

    # ---- as in Slicer ---

    def layoutLogic(self):
        return self._d.logic

    def mrmlScene(self):
        return slicer.mrmlScene

    def viewport(self):
        return self._d.viewport

    def setLayout(self, layout):
        self._d.logic.GetLayoutNode().SetViewArrangement(int(layout))

    def mrmlSliceLogics(self):
        return self._d.logics

    def sliceViewNames(self):
        return tuple(self._d.widgets)

    def sliceWidget(self, name):
        return self._d.widgets.get(name)

    def resetSliceViews(self):
        for widget in self._d.widgets.values():
            widget.fitSliceToBackground()

    def resetThreeDViews(self):
        pass

    def pauseRender(self):
        pass

    def resumeRender(self):
        pass

    layout = QtCore.Property(
        int, lambda self: self._d.logic.GetLayoutNode().GetViewArrangement(), lambda self, v: self.setLayout(v)
    )
    # Views that need OpenGL: there are none here.
    threeDViewCount = QtCore.Property(int, lambda self: 0)
    tableViewCount = QtCore.Property(int, lambda self: 0)
    plotViewCount = QtCore.Property(int, lambda self: 0)


def install():
    for cls in (qMRMLSliceView, qMRMLSliceWidget, qMRMLSliceControllerWidget, qSlicerLayoutManager):
        setattr(slicer, cls.__name__, cls)
