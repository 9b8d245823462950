"""The worker's answer as nodes: the fused volume and, tied to it by references, tables and the provenance."""

import dataclasses
import json

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from .volume_nodes import isColour, matrixOf, newImage, slabsOf

VOLUME_A, VOLUME_B = "clinicalFMambaVolumeA", "clinicalFMambaVolumeB"
PROVENANCE, METRICS = "clinicalFMambaProvenance", "clinicalFMambaMetrics"
CLASSIFICATION, DIFFERENCE = "clinicalFMambaClassification", "clinicalFMambaDifference"
# With it, what belongs to a result says whose it is: a copy of a result refers to the original's.
RESULT = "clinicalFMambaResult"
AUTOMATIC_NAME, NAMED_FOR = "ClinicalFMamba.automaticName", "ClinicalFMamba.namedFor"
OCCLUSION, REGION = "clinicalFMambaOcclusionMap", "clinicalFMambaTumourRegion"
GREY = "vtkMRMLColorTableNodeGrey"
DIFFERENCE_COLOURS = "ClinicalFMambaDifference"
DIFFERENCE_RANGE = 500  # thousandths of black to white


@dataclasses.dataclass(frozen=True)
class Place:
    """Where A was when the fusion began: the result belongs there, wherever A has gone since."""

    ijkToRas: np.ndarray
    parentId: str

    @classmethod
    def of(cls, node):
        return cls(matrixOf(node), node.GetTransformNodeID() or "")


@dataclasses.dataclass(frozen=True)
class Results:
    """What belongs to a fused volume; None where there is none.

    Attributes:
        provenance: dictionary, or None where the node is no result of this module.
        metrics: (name, value) pairs.
        classification: (label, probability) pairs.
        intervals: (low, high) of these probabilities, 95 %; empty where the classifier states none.
        metricsNote, classificationNote: how they came about, in words.
    """

    provenance: dict | None = None
    metrics: tuple = ()
    metricsNote: str = ""
    classification: tuple = ()
    classificationNote: str = ""
    intervals: tuple = ()


# ------------------------------------------------------------------------------------------------ writing


def putVolume(output, image, place, nodeA, event, name):
    """Create or update the fused volume; returns it. Nothing of the scene is changed before it cannot fail any more."""
    scene = slicer.mrmlScene
    if output is None:
        output = _addNode("vtkMRMLVectorVolumeNode" if event["colour"] else "vtkMRMLScalarVolumeNode", name)
    wasModifying = output.StartModify()
    _nameFor(output, name)
    if event["colour"]:
        # So that Slicer and the formats that tell them apart know colours from vectors in space.
        output.SetVoxelVectorType(output.VoxelVectorTypeColorRGB)
    output.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(place.ijkToRas))
    parent = scene.GetNodeByID(place.parentId) if place.parentId else None
    output.SetAndObserveTransformNodeID(parent.GetID() if parent is not None else None)
    _showAt(output, *event["display_range"])
    output.SetAndObserveImageData(image)
    for key, value in _headerOf(event["provenance"]).items():
        output.SetAttribute(f"ClinicalFMamba.{key}", value)
    output.EndModify(wasModifying)
    _placeBeside(output, nodeA)
    return output


def _addNode(className, name):
    """A new node whose name no other node has, and which :func:`_nameFor` may change."""
    node = slicer.mrmlScene.AddNewNodeByClass(className, _unused(name))
    node.SetAttribute(NAMED_FOR, name)
    node.SetAttribute(AUTOMATIC_NAME, node.GetName())
    return node


def _nameFor(node, name):
    """Another pair in the same volume gives it another name, unless the user has named it."""
    if node.GetAttribute(NAMED_FOR) == name or node.GetAttribute(AUTOMATIC_NAME) != node.GetName():
        return
    node.SetName(_unused(name))
    node.SetAttribute(NAMED_FOR, name)
    node.SetAttribute(AUTOMATIC_NAME, node.GetName())


def _unused(name):
    scene = slicer.mrmlScene
    return name if scene.GetFirstNodeByName(name) is None else scene.GenerateUniqueName(name)


def _showAt(node, low, high):
    """Window and colours before the voxels: else Slicer computes an automatic window of its own."""
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    if display is None:
        return
    if hasattr(display, "SetAndObserveColorNodeID") and not node.IsA("vtkMRMLVectorVolumeNode"):
        display.SetAndObserveColorNodeID(GREY)
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(low, high)


def _headerOf(provenance):
    """What is worth a line in the header of a file."""
    inputs = provenance.get("inputs", {})
    return {
        "notice": str(provenance.get("notice", "")),
        "model": str(provenance.get("model", {}).get("name", "")),
        "modelSha256": str(provenance.get("model", {}).get("sha256", "")),
        "scale": str(provenance.get("output", {}).get("scale", "")),
        "inputA": str(inputs.get("a", {}).get("name", "")),
        "inputB": str(inputs.get("b", {}).get("name", "")),
    }


def _placeBeside(output, nodeA):
    """Beside A in the subject hierarchy; the series' own tags that DICOM export would otherwise invent are A's."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    if hierarchy is None or nodeA is None or nodeA.GetScene() is None:
        return
    itemA = hierarchy.GetItemByDataNode(nodeA)
    item = hierarchy.GetItemByDataNode(output) or hierarchy.CreateItem(hierarchy.GetSceneItemID(), output)
    if not itemA or not item:
        return
    hierarchy.SetItemParent(item, hierarchy.GetItemParent(itemA))
    constants = slicer.vtkMRMLSubjectHierarchyConstants
    for attribute in (
        constants.GetDICOMSeriesModalityAttributeName(),
        constants.GetDICOMFrameOfReferenceUIDAttributeName(),
    ):
        value = hierarchy.GetItemAttribute(itemA, attribute)
        if value:
            hierarchy.SetItemAttribute(item, attribute, value)
    prefix = constants.GetDICOMAttributePrefix()
    hierarchy.SetItemAttribute(item, prefix + "SeriesDescription", f"{output.GetName()} (ClinicalFMamba)")


def putResults(output, nodeA, nodeB, event):
    """Create or update what belongs to ``output``: provenance, metrics, classification, references to the sources."""
    output.SetNodeReferenceID(VOLUME_A, nodeA.GetID())
    output.SetNodeReferenceID(VOLUME_B, nodeB.GetID())
    text = _companion(output, PROVENANCE, "vtkMRMLTextNode", _("{name} provenance"))
    text.SetText(json.dumps(event["provenance"], indent=2, ensure_ascii=False))
    metrics = event.get("metrics") or {}
    note = event.get("metrics_note") or ""
    if metrics or note:
        table = _companion(output, METRICS, "vtkMRMLTableNode", _("{name} metrics"))
        _fill(table, _("Metric"), _("Value"), metrics.items(), note)
    else:
        _removeCompanion(output, METRICS)
    classification = event.get("classification")
    if classification:
        table = _companion(output, CLASSIFICATION, "vtkMRMLTableNode", _("{name} tumour classification"))
        probabilities = classification["probabilities"]
        rows = [(row["label"], row["probability"]) for row in probabilities]
        notes = (classification.get(key) for key in ("model", "text", "note"))
        _fill(table, _("Class"), _("Probability"), rows, "; ".join(filter(None, notes)))
        for key, title in (("low", _("95 % from")), ("high", _("95 % to"))):
            if rows and all(key in row for row in probabilities):
                _addColumn(table, title, [row[key] for row in probabilities])
    else:
        _removeCompanion(output, CLASSIFICATION)
    # They show another result.
    _removeCompanion(output, OCCLUSION)
    _removeCompanion(output, REGION)
    # It shows another result.
    _removeCompanion(output, DIFFERENCE)


def putReading(output, image, role, most):
    """Create or update a volume on the fused volume's grid that shows where the classifier's reading comes from.

    Args:
        role: :data:`OCCLUSION`, percentage points of the probability, or :data:`REGION`, a label map.
        most: the largest absolute value in ``image``.
    """
    isMap = role == OCCLUSION
    className = "vtkMRMLScalarVolumeNode" if isMap else "vtkMRMLLabelMapVolumeNode"
    node = _companion(output, role, className, _("{name} occlusion map") if isMap else _("{name} tumour region"))
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrixOf(output)))
    node.SetAndObserveTransformNodeID(output.GetTransformNodeID())
    if isMap:
        _showAt(node, -(most or 1), most or 1)
        node.GetDisplayNode().SetAndObserveColorNodeID(_differenceColours().GetID())
    else:
        node.CreateDefaultDisplayNodes()
    node.SetAndObserveImageData(image)
    return node


def _companion(output, role, className, name):
    """The node of this role that belongs to ``output``, below it in the subject hierarchy; made when there is none."""
    name = name.format(name=output.GetName())
    node = output.GetNodeReference(role)
    if node is None or node.GetNodeReferenceID(RESULT) != output.GetID():
        node = _addNode(className, name)
        node.SetNodeReferenceID(RESULT, output.GetID())
        output.SetNodeReferenceID(role, node.GetID())
    _nameFor(node, name)
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    if hierarchy is not None:
        item, itemOfOutput = hierarchy.GetItemByDataNode(node), hierarchy.GetItemByDataNode(output)
        if item and itemOfOutput:
            hierarchy.SetItemParent(item, itemOfOutput)
    return node


def relativesOf(node):
    """The nodes that this one refers to: of a result its sources and companions, of a companion the result."""
    roles = [node.GetNthNodeReferenceRole(index) for index in range(node.GetNumberOfNodeReferenceRoles())]
    nodes = [node.GetNodeReference(role) for role in roles if role.startswith("clinicalFMamba")]
    return [relative for relative in nodes if relative is not None]


def companionsOf(node):
    """The nodes that have no meaning without this one; none where it is no result."""
    return [relative for relative in relativesOf(node) if relative.GetNodeReferenceID(RESULT) == node.GetID()]


def _removeCompanion(output, role):
    node = output.GetNodeReference(role)
    output.SetNodeReferenceID(role, None)
    if node is not None and node.GetNodeReferenceID(RESULT) == output.GetID():
        slicer.mrmlScene.RemoveNode(node)


def _fill(table, first, second, rows, note):
    names, values = vtk.vtkStringArray(), vtk.vtkDoubleArray()
    names.SetName(first)
    values.SetName(second)
    for name, value in rows:
        names.InsertNextValue(str(name))
        values.InsertNextValue(float(value))
    wasModifying = table.StartModify()
    table.RemoveAllColumns()
    table.AddColumn(names)
    table.AddColumn(values)
    table.SetAttribute("ClinicalFMamba.note", note)
    table.EndModify(wasModifying)


def _addColumn(table, title, values):
    column = vtk.vtkDoubleArray()
    column.SetName(title)
    for value in values:
        column.InsertNextValue(float(value))
    table.AddColumn(column)


def putDifference(output):
    """Create or update the volume of the fused intensities minus A's in its window, both from 0 to 1.

    A generator that returns it.

    Raises:
        ValueError: the node is no result, or A is gone or has changed its grid.
    """
    results = resultsOf(output)
    nodeA = output.GetNodeReference(VOLUME_A)
    if results.provenance is None:
        raise ValueError(_("{name} is no result of ClinicalFMamba").format(name=output.GetName()))
    if nodeA is None or nodeA.GetImageData() is None:
        raise ValueError(_("volume A of {name} is no longer in the scene").format(name=output.GetName()))
    imageA, imageFused = nodeA.GetImageData(), output.GetImageData()
    if imageA.GetDimensions() != imageFused.GetDimensions():
        raise ValueError(_("{name} has changed since the fusion; fuse again").format(name=nodeA.GetName()))
    window = results.provenance["inputs"]["a"]["window"]
    low, high = float(window["low"]), float(window["high"])
    fused, a = slicer.util.arrayFromVolume(output), slicer.util.arrayFromVolume(nodeA)
    full = np.float32(255 if isColour(output) else 1000)
    image, difference = newImage(a.shape[:3], np.int16)
    for slab in slabsOf(np.broadcast_to(np.float32(0), a.shape[:3])):
        windowed = np.clip((_grey(a[slab]) - np.float32(low)) / np.float32(high - low), 0, 1)
        difference[slab] = np.rint(1000 * (_grey(fused[slab]) / full - np.nan_to_num(windowed)))
        yield
    # Not ==, with which VTK compares all voxels.
    if any(n.GetScene() is None or n.GetImageData() is not i for n, i in ((nodeA, imageA), (output, imageFused))):
        raise ValueError(_("{name} has changed meanwhile; try again").format(name=output.GetName()))

    node = _companion(output, DIFFERENCE, "vtkMRMLScalarVolumeNode", _("{name} minus A"))
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrixOf(output)))
    node.SetAndObserveTransformNodeID(output.GetTransformNodeID())
    _showAt(node, -DIFFERENCE_RANGE, DIFFERENCE_RANGE)
    node.GetDisplayNode().SetAndObserveColorNodeID(_differenceColours().GetID())
    node.SetAndObserveImageData(image)
    return node


def _differenceColours():
    """Blue over black to red; black and not clear, because slice views take a colour's opacity as all or nothing."""
    # No singleton: it would stay in every scene that is opened afterwards.
    node = slicer.mrmlScene.GetFirstNode(DIFFERENCE_COLOURS, "vtkMRMLColorTableNode")
    if node is not None:
        return node
    node = slicer.vtkMRMLColorTableNode()
    node.SetName(DIFFERENCE_COLOURS)
    node.SetTypeToUser()
    node.SetNumberOfColors(256)
    for index in range(256):
        value = (index - 127.5) / 127.5
        strength = abs(value) ** 0.7  # small differences are to be seen, too
        red, green, blue = (1.0, 0.3, 0.2) if value > 0 else (0.2, 0.5, 1.0)
        node.SetColor(index, f"{value:+.2f}", strength * red, strength * green, strength * blue, 1.0)
    return slicer.mrmlScene.AddNode(node)


def _grey(array):
    """(k, j, i) float32; of colour its luma, which is what the network fused."""
    if array.ndim == 3:
        return array.astype(np.float32)
    from ClinicalFMambaLib.inference.colour import luma

    return 255 * luma(array[..., :3])


# ------------------------------------------------------------------------------------------------ reading


def isResult(node):
    """Whether a fusion has made this volume; also of a copy."""
    return node.GetAttribute("ClinicalFMamba.notice") is not None


def isCompanion(node):
    """Whether this node belongs to a result, such as the difference to A."""
    return node.GetNodeReferenceID(RESULT) is not None


def resultsOf(output):
    """The :class:`Results` that belong to a volume node, also after the scene was saved and loaded."""
    text = output.GetNodeReference(PROVENANCE) if output is not None else None
    if text is None:
        return Results()
    try:
        provenance = json.loads(text.GetText() or "")
    except ValueError:
        return Results()
    metrics, metricsNote = _read(output.GetNodeReference(METRICS))
    table = output.GetNodeReference(CLASSIFICATION)
    classification, classificationNote = _read(table)
    intervals = ()
    if classification and table.GetNumberOfColumns() >= 4:
        intervals = tuple(
            tuple(float(table.GetCellText(row, column)) for column in (2, 3)) for row in range(len(classification))
        )
    return Results(provenance, metrics, metricsNote, classification, classificationNote, intervals)


def inPercent(results):
    """(label, text) for each class, the text with the interval where there is one."""
    texts = [f"{100 * value:.1f} %" for _label, value in results.classification]
    if results.intervals:
        texts = [f"{t} ({100 * low:.0f} to {100 * high:.0f} %)" for t, (low, high) in zip(texts, results.intervals)]
    return [(label, text) for (label, _value), text in zip(results.classification, texts)]


def _read(table):
    if table is None or table.GetNumberOfColumns() < 2:
        return (), ""
    rows = range(table.GetNumberOfRows())
    pairs = tuple((table.GetCellText(row, 0), float(table.GetCellText(row, 1))) for row in rows)
    return pairs, table.GetAttribute("ClinicalFMamba.note") or ""
