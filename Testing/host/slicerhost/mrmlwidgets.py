"""Stand-ins for the qMRML and qSlicer widgets, after their headers in Slicer's Libs/MRML/Widgets and Base/QTGUI."""

import sys
import weakref

import slicer
import vtk
from PySide6 import QtCore, QtWidgets
from shiboken6 import Shiboken

from .ctkwidgets import (
    ctkComboBox,
    ctkDoubleSpinBox,
    ctkRangeWidget,
    ctkSliderWidget,
    inner,
    only_parent,
    stand_in,
    state,
    stored,
    wire,
)
from .pythonqt import HostSignal, emit

_NODE_ROLE = 0x100  # Qt.UserRole: the node's ID
_ACTION_ROLE = 0x101  # what an extra item does


# (target, tag) -> callback, finalizer. VTK alone does not keep a callback whose target only C++ holds alive.
_observed = {}


def observe(widget, target, event, name, *args):
    """Call the widget's method `name` with the event's node until the widget is gone. Returns the tag."""
    reference = weakref.ref(widget)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def callback(caller, event_name, data=None):
        living = reference()
        if living is not None and Shiboken.isValid(living):
            getattr(living, name)(data, *args)
        else:
            unobserve(target, tag)

    tag = target.AddObserver(event, callback)
    _observed[target, tag] = callback, weakref.finalize(widget, unobserve, target, tag)
    return tag


def unobserve(target, tag):
    target.RemoveObserver(tag)
    _, finalizer = _observed.pop((target, tag), (None, None))
    if finalizer is not None:
        finalizer.detach()


class _SceneWidget:
    """What qMRMLWidget and qSlicerWidget share."""

    def mrmlScene(self):
        return self._d.scene

    def setMRMLScene(self, scene):
        if scene is not self._d.scene:
            self._d.scene = scene
            emit(self, "mrmlSceneChanged(vtkMRMLScene*)", scene)


@stand_in
class qMRMLWidget(QtWidgets.QWidget):
    mrmlSceneChanged = HostSignal("mrmlSceneChanged(vtkMRMLScene*)")

    def __init__(self, *args):
        super().__init__(only_parent("qMRMLWidget", args))
        state(self, scene=None)

    mrmlScene = _SceneWidget.mrmlScene
    setMRMLScene = _SceneWidget.setMRMLScene


@stand_in
class qSlicerWidget(QtWidgets.QWidget):
    mrmlSceneChanged = HostSignal("mrmlSceneChanged(vtkMRMLScene*)")

    def __init__(self, *args):
        super().__init__(only_parent("qSlicerWidget", args))
        state(self, scene=None)

    mrmlScene = _SceneWidget.mrmlScene
    setMRMLScene = _SceneWidget.setMRMLScene


class _Unit:
    """Unit-aware widgets without units: the scene's unit nodes change prefix, suffix and precision in Slicer."""

    def mrmlScene(self):
        return self._d.scene

    def setMRMLScene(self, scene):
        self._d.scene = scene

    def setQuantity(self, quantity):
        self._d.quantity = quantity

    def setUnitAwareProperties(self, flags):
        self._d.unitAwareProperties = flags


@stand_in
class qMRMLSliderWidget(ctkSliderWidget):
    def __init__(self, *args):
        super().__init__(*args)
        self._d.scene, self._d.quantity, self._d.unitAwareProperties = None, "", 0x1F

    mrmlScene, setMRMLScene = _Unit.mrmlScene, _Unit.setMRMLScene
    setQuantity, setUnitAwareProperties = _Unit.setQuantity, _Unit.setUnitAwareProperties
    quantity = QtCore.Property(str, lambda self: self._d.quantity, setQuantity)
    unitAwareProperties = QtCore.Property(int, lambda self: self._d.unitAwareProperties, setUnitAwareProperties)


@stand_in
class qMRMLSpinBox(ctkDoubleSpinBox):
    def __init__(self, *args):
        super().__init__(*args)
        self._d.scene, self._d.quantity, self._d.unitAwareProperties = None, "", 0x1F

    mrmlScene, setMRMLScene = _Unit.mrmlScene, _Unit.setMRMLScene
    setQuantity, setUnitAwareProperties = _Unit.setQuantity, _Unit.setUnitAwareProperties
    quantity = QtCore.Property(str, lambda self: self._d.quantity, setQuantity)
    unitAwareProperties = QtCore.Property(int, lambda self: self._d.unitAwareProperties, setUnitAwareProperties)


@stand_in
class qMRMLRangeWidget(ctkRangeWidget):
    def __init__(self, *args):
        super().__init__(*args)
        self._d.scene, self._d.quantity = None, ""

    setMRMLScene, setQuantity = _Unit.setMRMLScene, _Unit.setQuantity
    quantity = QtCore.Property(str, lambda self: self._d.quantity, setQuantity)


def warn(text):
    """qWarning()."""
    print(text, file=sys.stderr, flush=True)


@stand_in
class qMRMLNodeComboBox(QtWidgets.QWidget):
    """Selector of a node of the scene.

    The rows of the inner combo box are None (where allowed), the nodes in the order of the scene, and the actions.
    """

    currentNodeChanged = HostSignal("currentNodeChanged(vtkMRMLNode*)", "currentNodeChanged(bool)")
    currentNodeIDChanged = HostSignal("currentNodeIDChanged(QString)")
    nodeActivated = HostSignal("nodeActivated(vtkMRMLNode*)")
    nodeAdded = HostSignal("nodeAdded(vtkMRMLNode*)")
    nodeAddedByUser = HostSignal("nodeAddedByUser(vtkMRMLNode*)")
    nodeAddedByUserAction = HostSignal("nodeAddedByUserAction(vtkMRMLNode*)")
    nodeAboutToBeRemoved = HostSignal("nodeAboutToBeRemoved(vtkMRMLNode*)")
    currentNodeRenamed = HostSignal("currentNodeRenamed(QString)")
    nodeAboutToBeEdited = HostSignal("nodeAboutToBeEdited(vtkMRMLNode*)")

    def __init__(self, *args):
        super().__init__(only_parent("qMRMLNodeComboBox", args))
        combo = ctkComboBox()
        combo.elideMode = 2
        d = state(self, combo=combo, scene=None, switching=False, nodeTypes=[], hideChildNodeTypes=[], attributes={})
        d.showHidden, d.showChildNodeTypes, d.selectNodeUponCreation = False, True, True
        d.noneEnabled, d.addEnabled, d.removeEnabled, d.editEnabled, d.renameEnabled = False, True, True, False, False
        d.noneDisplay, d.interactionNodeSingletonTag, d.sizeAdjustPolicy = "None", "Singleton", 0
        d.baseNames, d.labels, d.tags, d.nodeTags, d.actions = {}, {}, [], {}, []
        d.requestedID, d.requestedNode = "", None
        inner(self).addWidget(combo)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Preferred, QtWidgets.QSizePolicy.Policy.Fixed)
        wire(combo, "currentIndexChanged(int)", self, "_emit_current")
        wire(combo, "activated(int)", self, "_activated")
        self._update_text()
        self.setEnabled(False)

    # ---- rows ---

    def _accepts(self, node):
        d = self._d
        if not d.showHidden and node.GetHideFromEditors():
            return False
        if not d.nodeTypes:
            return True
        for kind in d.nodeTypes:
            if not node.IsA(kind) or (not d.showChildNodeTypes and kind != node.GetClassName()):
                continue
            if d.showChildNodeTypes and any(node.IsA(k) for k in d.hideChildNodeTypes):
                return False
            if kind in d.attributes:
                name, wanted = d.attributes[kind]
                value = node.GetAttribute(name)
                if value is None or (wanted is not None and str(wanted) != value):
                    return False
            return True
        return False

    def _accepted(self):
        d = self._d
        if d.scene is None:
            return []
        nodes = [d.scene.GetNthNode(i) for i in range(d.scene.GetNumberOfNodes())]
        return [n for n in nodes if self._accepts(n)]

    def _first(self):
        return 1 if self._d.noneEnabled and self._d.scene is not None else 0

    def _ids(self):
        combo = self._d.combo
        return [combo.itemData(row, _NODE_ROLE) for row in range(combo.count) if combo.itemData(row, _NODE_ROLE)]

    def _rebuild(self, current=None):
        """Fill the rows anew and keep the current node; one signal where it changed."""
        d, combo = self._d, self._d.combo
        # By the row, not by the node: a scene that was closed has no node any more.
        before = (combo.itemData(combo.currentIndex, _NODE_ROLE) or "") if current is None else current
        was, d.switching = d.switching, True
        blocked = combo.blockSignals(True)
        combo.clear()
        if d.scene is not None:
            if d.noneEnabled:
                combo.addItem(d.noneDisplay)
            for node in self._accepted():
                self._add_row(node, combo.count)
        self._add_actions()
        row = self._row(before)
        if row is None:
            row = self._first() - 1 if d.noneEnabled else (0 if self.nodeCount() and d.scene is not None else -1)
        combo.setCurrentIndex(row if d.scene is not None else -1)
        combo.blockSignals(blocked)
        d.switching = was
        self._update_text()
        if not was and self.currentNodeID != before:
            self._emit_current()

    def _add_row(self, node, row):
        d = self._d
        d.combo.insertItem(row, node.GetName() or node.GetID())
        d.combo.setItemData(row, node.GetID(), _NODE_ROLE)
        if node.GetID() not in d.nodeTags:
            tag = observe(self, node, vtk.vtkCommand.ModifiedEvent, "_node_modified", node)
            d.nodeTags[node.GetID()] = (node, tag)

    def _node_modified(self, _, node):
        row = self._row(node.GetID())
        if row is not None and self._d.combo.itemText(row) != node.GetName():
            self._d.combo.setItemText(row, node.GetName() or "")

    def _row(self, node_id):
        combo = self._d.combo
        rows = [r for r in range(combo.count) if node_id and combo.itemData(r, _NODE_ROLE) == node_id]
        return rows[0] if rows else None

    def _add_actions(self):
        d = self._d
        if d.scene is None or not (d.addEnabled or d.removeEnabled or d.editEnabled or d.renameEnabled or d.actions):
            return
        kinds = d.nodeTypes
        label = self.nodeTypeLabel(kinds[0] if len(kinds) == 1 else "")
        items = []
        if d.renameEnabled:
            items.append((f"Rename current {label}", "RENAME"))
        if d.editEnabled:
            items.append((f"Edit current {label}", "EDIT"))
        if d.addEnabled:
            for kind in kinds:
                items.append((f"Create new {self.nodeTypeLabel(kind)}", "CREATE/" + kind))
                if d.renameEnabled:
                    items.append((f"Create new {self.nodeTypeLabel(kind)} as...", "CREATE_AS/" + kind))
        if d.removeEnabled:
            items.append((f"Delete current {label}", "DELETE"))
        items += [(a.text, "ACTION/" + a.text) for a in d.actions]
        index = d.combo.currentIndex
        blocked = d.combo.blockSignals(True)
        d.combo.insertSeparator(d.combo.count)
        for text, what in items:
            d.combo.addItem(text)
            d.combo.setItemData(d.combo.count - 1, what, _ACTION_ROLE)
        d.combo.setCurrentIndex(index)
        d.combo.blockSignals(blocked)

    def _update_text(self):
        kinds = self._d.nodeTypes
        self._d.combo.defaultText = "Select a " + self.nodeTypeLabel(kinds[0] if kinds else "")

    # ---- events of the scene ---

    def _node_added(self, node):
        if node is None or self._d.scene.IsImporting() or not self._accepts(node):
            return
        if self._row(node.GetID()) is None:
            self._add_row(node, self._first() + self.nodeCount())
            emit(self, "nodeAdded(vtkMRMLNode*)", node)

    def _node_removed(self, node):
        if node is None or self._d.scene.IsClosing():
            return
        entry = self._d.nodeTags.pop(node.GetID(), None)
        if entry:
            unobserve(*entry)
        row = self._row(node.GetID())
        if row is not None:
            emit(self, "nodeAboutToBeRemoved(vtkMRMLNode*)", node)
            self._remove_row(row)

    def _remove_row(self, row):
        """As QComboBox of Qt 5: the row above the current one follows it. Qt 6 takes the row below."""
        combo = self._d.combo
        before = combo.currentIndex
        blocked = combo.blockSignals(True)
        combo.removeItem(row)
        combo.setCurrentIndex(before - 1 if row <= before else before)
        combo.blockSignals(blocked)
        if row <= before:
            self._emit_current()

    def _scene_updated(self, _):
        self._drop_node_observers()
        self._rebuild()

    def _scene_imported(self, _):
        """qMRMLSceneModel::updateScene removes the rows of all nodes, the current one's, too, and makes them anew."""
        if self._d.noneEnabled and self.currentNode() is not None:
            self._d.combo.setCurrentIndex(0)
        self._scene_updated(_)

    def _drop_node_observers(self):
        for node, tag in self._d.nodeTags.values():
            unobserve(node, tag)
        self._d.nodeTags = {}

    def setMRMLScene(self, scene):
        d = self._d
        if scene is d.scene:
            return
        before = self.currentNodeID
        had_nodes = self.nodeCount() > 0
        if d.scene is not None:
            self._drop_node_observers()
            for tag in d.tags:
                unobserve(d.scene, tag)
        d.scene, d.tags = scene, []
        if scene is not None:
            kind = slicer.vtkMRMLScene
            d.tags = [
                observe(self, scene, kind.NodeAddedEvent, "_node_added"),
                observe(self, scene, kind.NodeAboutToBeRemovedEvent, "_node_removed"),
                observe(self, scene, kind.EndCloseEvent, "_scene_updated"),
                observe(self, scene, kind.EndImportEvent, "_scene_imported"),
            ]
        wanted = before
        if not had_nodes and d.requestedNode is not None:
            wanted = d.requestedNode.GetID() or ""
        elif not had_nodes and d.requestedID:
            wanted = d.requestedID
        d.switching = True
        self._rebuild(wanted)
        d.switching = False
        d.requestedID, d.requestedNode = "", None
        if self.currentNodeID != before:
            self._emit_current()
        self.setEnabled(scene is not None)

    # ---- current node ---

    def _emit_current(self):
        d = self._d
        if d.switching:
            return
        index = d.combo.currentIndex
        node = self.currentNode()
        if node is None and index != (0 if d.noneEnabled else -1):
            last = self.nodeFromIndex(self.nodeCount() - 1)
            if last is not None:
                self.setCurrentNode(last)
            return
        emit(self, "currentNodeChanged(vtkMRMLNode*)", node)
        emit(self, "currentNodeChanged(bool)", node is not None)
        emit(self, "currentNodeIDChanged(QString)", node.GetID() if node is not None else "")

    def _activated(self, index):
        d = self._d
        what = d.combo.itemData(index, _ACTION_ROLE)
        if not what:
            emit(self, "nodeActivated(vtkMRMLNode*)", self.currentNode())
            return
        command, _, detail = what.partition("/")
        if command in ("CREATE", "CREATE_AS"):
            name = ""
            if command == "CREATE_AS":
                title = f"Create new {self.nodeTypeLabel(detail)}"
                name = QtWidgets.QInputDialog.getText(self, title, "New name:")
                if not name:
                    return
            node = self.addNode(detail)
            if node is not None:
                if name:
                    node.SetName(name)
                self.setCurrentNode(node)
                emit(self, "nodeAddedByUserAction(vtkMRMLNode*)", node)
        elif command == "DELETE":
            self.removeCurrentNode()
        elif command == "EDIT":
            self.editCurrentNode()
        elif command == "RENAME":
            self.renameCurrentNode()
        else:
            next(a for a in d.actions if a.text == detail).trigger()

    def mrmlScene(self):
        return self._d.scene

    def currentNode(self):
        d = self._d
        node_id = d.combo.itemData(d.combo.currentIndex, _NODE_ROLE) if d.combo.currentIndex >= 0 else None
        return d.scene.GetNodeByID(node_id) if node_id and d.scene is not None else None

    def setCurrentNode(self, node):
        if isinstance(node, str):
            warn("This function is deprecated. Use setCurrentNodeID() instead")
            self.setCurrentNodeID(node)
            return
        if node is not None and not isinstance(node, slicer.vtkMRMLNode):
            raise ValueError(f"setCurrentNode: a vtkMRMLNode is needed, not {type(node).__name__}")
        if self._d.scene is None:
            self._d.requestedID, self._d.requestedNode = "", node
            return
        self._select((node.GetID() or "") if node is not None else "")

    def setCurrentNodeID(self, node_id):
        if self._d.scene is None:
            self._d.requestedID, self._d.requestedNode = node_id, None
            return
        self._select(node_id)

    def _select(self, node_id):
        row = self._row(node_id)
        if row is None:
            row = 0 if self._d.noneEnabled else -1
        self._d.combo.setCurrentIndex(row)

    def setCurrentNodeIndex(self, index):
        self._d.combo.setCurrentIndex(index + self._first() if index < self.nodeCount() else self._first() - 1)

    def nodeCount(self):
        return len(self._ids()) if self._d.scene is not None else 0

    def nodeFromIndex(self, index):
        ids = self._ids()
        return self._d.scene.GetNodeByID(ids[index]) if 0 <= index < len(ids) else None

    # ---- creating and changing nodes ---

    def addNode(self, kind=None):
        d = self._d
        if kind is None:
            if not d.nodeTypes:
                return None
            kind = d.nodeTypes[0]
        if kind not in d.nodeTypes:
            warn(f"qMRMLNodeComboBox::addNode() attempted with node type {kind}, which is not among the allowed types")
            return None
        node = d.scene.CreateNodeByClass(kind)
        if node is None:
            warn(f"qMRMLNodeComboBox::addNode() failed with node type {kind}")
            return None
        node.UnRegister(None)
        base = d.baseNames.get(kind) or ("" if node.GetName() else node.GetNodeTagName())
        if base:
            node.SetName(d.scene.GetUniqueNameByString(base))
        for name, value in d.attributes.values():
            node.SetAttribute(name, "" if value is None else str(value))
        node = d.scene.AddNode(node)
        if d.selectNodeUponCreation:
            self.setCurrentNode(node)
        emit(self, "nodeAddedByUser(vtkMRMLNode*)", node)
        return node

    def removeCurrentNode(self):
        self._d.scene.RemoveNode(self.currentNode())

    def editCurrentNode(self):
        emit(self, "nodeAboutToBeEdited(vtkMRMLNode*)", self.currentNode())

    def renameCurrentNode(self):
        node = self.currentNode()
        if node is None:
            return
        name = QtWidgets.QInputDialog.getText(
            self,
            f"Rename {self.nodeTypeLabel(node.GetClassName())}",
            "New name:",
            QtWidgets.QLineEdit.EchoMode.Normal,
            node.GetName(),
        )
        if name:
            node.SetName(name)
            emit(self, "currentNodeRenamed(QString)", name)

    def addMenuAction(self, action):
        self._d.actions.append(action)
        self._rebuild()

    def addAttribute(self, kind, name, value=None):
        self._d.attributes[kind] = (name, value)
        self._rebuild()

    def removeAttribute(self, kind, name):
        if self._d.attributes.get(kind, (None,))[0] == name:
            del self._d.attributes[kind]
            self._rebuild()

    def setNodeTypeLabel(self, label, kind):
        self._d.labels[kind] = label
        self._rebuild()

    def nodeTypeLabel(self, kind):
        d = self._d
        if d.labels.get(kind):
            return d.labels[kind]
        if d.scene is not None and hasattr(d.scene, "GetTypeDisplayNameByClassName"):
            return d.scene.GetTypeDisplayNameByClassName(kind) or "node"
        return "node"

    # ---- properties ---

    def _set_node_types(self, kinds):
        self._d.nodeTypes = [k for k in kinds if k]
        self._rebuild()

    def _set_base_name(self, name):
        if not self._d.nodeTypes:
            warn("qMRMLNodeComboBox::setBaseName failed: no node types have been set yet")
        for kind in self._d.nodeTypes:
            self._d.baseNames[kind] = name

    def _base_name(self):
        if not self._d.nodeTypes:
            warn("qMRMLNodeComboBox::baseName failed: no node types have been set yet")
            return ""
        return self._d.baseNames.get(self._d.nodeTypes[0], "")

    def _current_id(self):
        node = self.currentNode()
        return node.GetID() if node is not None else ""

    currentNodeID = QtCore.Property(str, _current_id, setCurrentNodeID)
    currentNodeId = QtCore.Property(str, _current_id, setCurrentNodeID)
    nodeTypes = QtCore.Property("QStringList", lambda self: tuple(self._d.nodeTypes), _set_node_types)
    baseName = QtCore.Property(str, _base_name, _set_base_name)
    showHidden = stored(bool, "showHidden", _rebuild)
    showChildNodeTypes = stored(bool, "showChildNodeTypes", _rebuild)
    hideChildNodeTypes = stored("QStringList", "hideChildNodeTypes", _rebuild)
    noneEnabled = stored(bool, "noneEnabled", _rebuild)
    addEnabled = stored(bool, "addEnabled", _rebuild)
    removeEnabled = stored(bool, "removeEnabled", _rebuild)
    editEnabled = stored(bool, "editEnabled", _rebuild)
    renameEnabled = stored(bool, "renameEnabled", _rebuild)
    selectNodeUponCreation = stored(bool, "selectNodeUponCreation")
    noneDisplay = stored(str, "noneDisplay", _rebuild)
    interactionNodeSingletonTag = stored(str, "interactionNodeSingletonTag")
    sizeAdjustPolicy = stored(int, "sizeAdjustPolicy")


def install():
    for cls in (qMRMLWidget, qSlicerWidget, qMRMLSliderWidget, qMRMLSpinBox, qMRMLRangeWidget, qMRMLNodeComboBox):
        setattr(slicer, cls.__name__, cls)
