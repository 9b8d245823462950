"""What the slice views show."""

import qt
import slicer

from .result_nodes import relativesOf

COMPARE_LAYOUT = 52508  # Slicer's own are below 1000
COMPARE_VIEWS = ("ClinicalFMambaA", "ClinicalFMambaFused", "ClinicalFMambaB")
_LAYOUT_BEFORE = "ClinicalFMamba.layoutBefore"
_COLOURS = ("#4c8bd6", "#e0a030", "#58a55c")


def _layout():
    items = "".join(
        f"""
  <item><view class="vtkMRMLSliceNode" singletontag="{name}">
    <property name="orientation" action="default">Axial</property>
    <property name="viewlabel" action="default">{label}</property>
    <property name="viewcolor" action="default">{colour}</property>
    <property name="viewgroup" action="default">1</property>
  </view></item>"""
        for name, label, colour in zip(COMPARE_VIEWS, ("A", "A+B", "B"), _COLOURS)
    )
    return f'<layout type="horizontal" split="true">{items}\n</layout>'


def registerLayout():
    """Make the side-by-side layout known: a scene that was saved in it would else open with no views at all."""
    manager = slicer.app.layoutManager()
    if manager is None:  # started without a main window
        return
    layoutNode = manager.layoutLogic().GetLayoutNode()
    if not layoutNode.IsLayoutDescription(COMPARE_LAYOUT):
        layoutNode.AddLayoutDescription(COMPARE_LAYOUT, _layout())


def isComparing():
    """Whether the side-by-side views are shown."""
    manager = slicer.app.layoutManager()
    return manager is not None and manager.layoutLogic().GetLayoutNode().GetViewArrangement() == COMPARE_LAYOUT


def showAlone(node):
    """Nothing but this volume in the slice views, except for those that compare."""
    _show(node, None, 1.0)


def showOver(background, foreground, opacity):
    """One volume over another; by alpha blending, which is the only mode that is right for all volumes."""
    _show(background, foreground, opacity)


def _show(background, foreground, opacity):
    # A view that shows one of these or what they were made of keeps its zoom and its slice.
    nodes = [node for node in (background, foreground) if node is not None]
    related = {node.GetID() for node in (*nodes, *(r for node in nodes for r in relativesOf(node)))}
    elsewhere = []
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if composite.GetLayoutName() in COMPARE_VIEWS:
            continue
        if composite.GetBackgroundVolumeID() not in related:
            elsewhere.append(composite.GetLayoutName())
        composite.SetBackgroundVolumeID(background.GetID())
        composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
        composite.SetForegroundOpacity(opacity)
        composite.SetLabelVolumeID(None)
        composite.SetCompositing(composite.Alpha)
    _fit(elsewhere)


def _fit(names):
    """Show the whole background volume in these slice views, those of them that the layout has."""
    manager = slicer.app.layoutManager()
    for name in names if manager is not None else ():
        widget = manager.sliceWidget(name)
        if widget is not None:
            widget.sliceLogic().FitSliceToBackground()


def leaveComparison():
    """Back to the layout that the user had before the side-by-side views."""
    if isComparing():
        manager = slicer.app.layoutManager()
        before = manager.layoutLogic().GetLayoutNode().GetAttribute(_LAYOUT_BEFORE)
        manager.setLayout(int(before or slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView))


def compare(*nodes):
    """One slice view for each volume, side by side and linked; the user's own views keep what they show."""
    manager = slicer.app.layoutManager()
    if manager is None:  # started without a main window
        return
    layoutNode = manager.layoutLogic().GetLayoutNode()
    if not isComparing():
        layoutNode.SetAttribute(_LAYOUT_BEFORE, str(layoutNode.GetViewArrangement()))
    registerLayout()
    manager.setLayout(COMPARE_LAYOUT)
    composites = [slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLSliceCompositeNode") for name in COMPARE_VIEWS]
    if [composite.GetBackgroundVolumeID() for composite in composites] == [node.GetID() for node in nodes]:
        return  # a new result in the same volume: zoom and slice stay
    for composite, node in zip(composites, nodes):
        # Linked already, each volume put into one view would go into all of them.
        composite.SetLinkedControl(0)
        composite.SetBackgroundVolumeID(node.GetID())
        composite.SetForegroundVolumeID(None)
        composite.SetLabelVolumeID(None)
    for name in COMPARE_VIEWS:
        # Slices along A's own axes, however it lies.
        manager.sliceWidget(name).mrmlSliceNode().RotateToVolumePlane(nodes[0])
    for composite in composites:
        composite.SetLinkedControl(1)
        composite.SetHotLinkedControl(1)
    _fitCompared()
    # And when the views have got their place on the screen.
    qt.QTimer.singleShot(100, _fitCompared)


def _fitCompared():
    if isComparing():
        _fit(COMPARE_VIEWS)
