"""The phantom in Slicer's Sample Data module: made on this computer, nothing is downloaded."""

from pathlib import Path

import slicer
import vtk
from slicer.i18n import tr as _

CATEGORY = "ClinicalFMamba"
SAMPLE = "ClinicalFMambaPhantom"
SIZE = 128
SHOWN = ("CT", "T1", "T2", "SPECT")  # FLAIR and labels would only lengthen the list


def register():
    """Add the phantom to the Sample Data module; more than once does no harm."""
    try:
        import SampleData
    except ImportError:  # Slicer was started without this module
        return
    logic = SampleData.SampleDataLogic
    # After a reload, :func:`download` is another function, and Slicer would take it for another source.
    sources = getattr(slicer.modules, "sampleDataSources", {}).get(CATEGORY, [])
    sources[:] = [source for source in sources if source.sampleName != SAMPLE]
    if hasattr(logic, "registerCustomSampleDataCategory"):  # from Slicer 5.12 on
        logic.registerCustomSampleDataCategory(CATEGORY, title=_("ClinicalFMamba"))
    icon = Path(__file__).resolve().parents[1] / "Resources" / "Icons" / "ClinicalFMambaPhantom.png"
    logic.registerCustomSampleDataSource(
        category=CATEGORY,
        sampleName=SAMPLE,
        uris="",
        thumbnailFileName=str(icon),
        customDownloader=download,
    )


def download(source=None):
    """Make the phantom and add it to the scene; returns its volume nodes: CT, MR T1 and T2, SPECT."""
    slicer.util.showStatusMessage(_("Making the ClinicalFMamba phantom …"), 3000)
    with slicer.util.tryWithErrorDisplay(_("The phantom could not be made."), waitCursor=True):
        nodes = addPhantom(SIZE)
    slicer.util.setSliceViewerLayers(background=nodes[0], fit=True)
    return nodes


def addPhantom(size=SIZE):
    """Volume nodes of the phantom's CT, T1, T2 and SPECT in one study, each shown in its own window."""
    from ClinicalFMambaLib.inference.intensity import choose_window
    from ClinicalFMambaLib.phantom import make_phantom

    volumes = make_phantom(size)
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    constants = slicer.vtkMRMLSubjectHierarchyConstants
    patient = hierarchy.CreateSubjectItem(hierarchy.GetSceneItemID(), _("ClinicalFMamba phantom"))
    study = hierarchy.CreateStudyItem(patient, _("Synthetic head with a tumour"))
    nodes = []
    for name in SHOWN:
        volume = volumes[name]
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", f"Phantom {name}")
        node.SetIJKToRASMatrix(_ijkToRas(volume))
        node.CreateDefaultDisplayNodes()
        window = choose_window(volume)
        display = node.GetDisplayNode()
        display.SetAndObserveColorNodeID("vtkMRMLColorTableNodeGrey")
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(window.low, window.high)
        slicer.util.updateVolumeFromArray(node, volume.array)
        item = hierarchy.GetItemByDataNode(node) or hierarchy.CreateItem(study, node)
        hierarchy.SetItemParent(item, study)
        modality = {"SPECT": "NM"}.get(volume.modality, volume.modality)
        hierarchy.SetItemAttribute(item, constants.GetDICOMSeriesModalityAttributeName(), modality)
        nodes.append(node)
    return nodes


def _ijkToRas(volume):
    matrix = vtk.vtkMatrix4x4()
    for column in range(3):
        for row, sign in enumerate((-1, -1, 1)):
            step = volume.direction[3 * row + column] * volume.spacing[column]
            matrix.SetElement(row, column, sign * step)
            matrix.SetElement(row, 3, sign * volume.origin[row])
    return matrix
