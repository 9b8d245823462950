"""Volume nodes as the engine takes them: an array and a place in space, parent transforms included.

What may take long on a large volume is a generator that yields often, so that the caller can let Qt's event loop run
in between.
"""

import contextlib
import dataclasses
import time

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

CHUNK_BYTES = 4 * 2**20  # copied in about 2 ms
CHUNK_VOXELS = 2**14  # moved through a B-spline transform in about 10 ms
CHUNK_SECONDS = 0.01  # simpler transforms move more in this time
AIR_HU = -1024.0
# What slicer.util.arrayFromVolume reads and holds intensities.
CLASSES = ("vtkMRMLScalarVolumeNode", "vtkMRMLVectorVolumeNode")
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie, in LPS mm, in the frame that both volumes of a pair share.

    Attributes:
        size: voxels along i, j, k.
        ijkToLps: (4, 4).
    """

    size: tuple
    ijkToLps: np.ndarray

    @property
    def spacing(self):
        return np.linalg.norm(self.ijkToLps[:3, :3], axis=0)

    def forWorker(self):
        """The geometry as JSON has it."""
        direction = self.ijkToLps[:3, :3] / self.spacing
        return {
            "spacing": self.spacing.tolist(),
            "origin": self.ijkToLps[:3, 3].tolist(),
            "direction": direction.ravel().tolist(),
        }

    def asVolume(self, name=""):
        """A Volume of the engine without voxels of its own, to compare grids with."""
        from ClinicalFMambaLib.volumes import Volume

        geometry = {key: tuple(value) for key, value in self.forWorker().items()}
        return Volume(np.broadcast_to(np.uint8(0), self.size[::-1]), name=name, **geometry)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two volumes in one frame.

    Attributes:
        a, b: their grids.
        warped: whether a non-linear transform lies between them, which only Slicer can apply; ``b`` is then the grid
            of ``a``, onto which B has to be moved.
        difference: how the grids differ, in words, or ``""``.
    """

    a: Grid
    b: Grid
    warped: bool
    difference: str


def matrixOf(node):
    """IJK to RAS without the parent transform, (4, 4)."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def sizeOf(node):
    return tuple(node.GetImageData().GetDimensions())


def relate(nodeA, nodeB):
    """The :class:`Pair` of two volume nodes; cheap, whatever their size."""
    from ClinicalFMambaLib.volumes import compare_grids

    parentA, parentB = nodeA.GetParentTransformNode(), nodeB.GetParentTransformNode()
    linear = all(parent is None or parent.IsTransformToWorldLinear() for parent in (parentA, parentB))
    if not linear:
        # A stays where it is, and B comes to it.
        a, b = (Grid(sizeOf(node), LPS_FROM_RAS @ matrixOf(node)) for node in (nodeA, nodeB))
        if parentA is not parentB:
            return Pair(a, a, True, _("a non-linear transform lies between them"))
    else:
        a, b = (Grid(sizeOf(node), LPS_FROM_RAS @ _matrixInWorld(node)) for node in (nodeA, nodeB))
    return Pair(a, b, False, compare_grids(a.asVolume(nodeA.GetName()), b.asVolume(nodeB.GetName())))


def _matrixInWorld(node):
    """IJK to RAS in world, (4, 4); without the parent transform where that is not linear."""
    toWorld = vtk.vtkMatrix4x4()
    parent = node.GetParentTransformNode()
    if parent is not None and parent.IsTransformToWorldLinear():
        parent.GetMatrixTransformToWorld(toWorld)
    return slicer.util.arrayFromVTKMatrix(toWorld) @ matrixOf(node)


def _hasExtent(axes):
    """Whether voxels with these edges, the columns of (3, 3), are no mere lines or planes; as the worker sees it."""
    lengths = np.linalg.norm(axes, axis=0)
    return bool(np.isfinite(axes).all() and lengths.min() > 0 and abs(np.linalg.det(axes / lengths)) >= 1e-3)


def isColour(node):
    image = node.GetImageData()
    return image is not None and image.GetNumberOfScalarComponents() >= 3


def problemOf(node, label):
    """Why the node cannot be fused, in words, or ``""``."""
    name = f"{label} ({node.GetName()})"
    if node.GetClassName() not in CLASSES:
        return _("{name} is no image but a {kind}; choose a volume with intensities").format(
            name=name, kind=node.GetNodeTagName()
        )
    image = node.GetImageData()
    if image is None or image.GetPointData().GetScalars() is None or 0 in image.GetDimensions():
        return _("{name} is empty; choose a volume with voxels").format(name=name)
    if not _hasExtent(_matrixInWorld(node)[:3, :3]):
        return _("{name} is flat in space; look at its spacing, its axes and its transforms").format(name=name)
    components = image.GetNumberOfScalarComponents()
    if components == 1:
        return ""
    if node.GetClassName() == "vtkMRMLScalarVolumeNode":
        return _("{name} has {components} values in each voxel but is no vector volume; load it as one").format(
            name=name, components=components
        )
    if components not in (3, 4) or image.GetScalarType() != vtk.VTK_UNSIGNED_CHAR:
        return _("{name} has {components} values of type {type} in each voxel; expected one, or 8-bit colour").format(
            name=name, components=components, type=image.GetScalarTypeAsString()
        )
    return ""


def modalityOf(node):
    """What DICOM says about the volume, ``"CT"`` for example, or ``""``; names and values are left to the engine."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    attribute = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    found = ""
    if hierarchy is not None:
        item = hierarchy.GetItemByDataNode(node)
        found = hierarchy.GetItemAttribute(item, attribute) if item else ""
    found = found or node.GetAttribute(attribute) or ""
    return {"CT": "CT", "MR": "MR", "PT": "PET", "NM": "SPECT", "ST": "SPECT"}.get(found.upper(), "")


def displayedWindow(node):
    """Low and high of the window in which Slicer shows the volume, or None."""
    display = node.GetDisplayNode()
    if display is None or not hasattr(display, "GetWindowLevelMin"):
        return None
    low, high = display.GetWindowLevelMin(), display.GetWindowLevelMax()
    return (low, high) if low < high else None


# ------------------------------------------------------------------------------------------- to the worker


def slabsOf(array):
    """Slices of the first axis, each of a size that is copied in a moment."""
    step = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


@contextlib.contextmanager
def _npyFile(path, dtype, shape):
    """A .npy file that is written piece by piece; not mapped, because on a full disk that would be Slicer's end."""
    with open(path, "wb") as file:
        # vtk's long long and Python's int64 may differ in name only; the worker knows the plain ones.
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda part: file.write(np.ascontiguousarray(part))


def writeArray(node, path):
    """Write the voxels to a .npy file, (k, j, i) or (k, j, i, 3); a generator."""
    array = slicer.util.arrayFromVolume(node)
    if array.ndim == 4:
        array = array[..., :3]
    with _npyFile(path, array.dtype, array.shape) as write:
        for slab in slabsOf(array):
            write(array[slab])
            yield


def writeMovedArray(node, reference, path, modality=""):
    """Write the voxels of ``node`` at the places of the voxels of ``reference``, through all transforms; a generator.

    ``vtkSlicerVolumesLogic::ResampleVolumeToReferenceVolume`` is wrong under parent transforms.
    """
    ijkToRas, rasToIjk = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
    reference.GetIJKToRASMatrix(ijkToRas)
    node.GetRASToIJKMatrix(rasToIjk)
    between = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(
        reference.GetParentTransformNode(), node.GetParentTransformNode(), between
    )
    transform = vtk.vtkGeneralTransform()
    transform.PostMultiply()
    transform.Concatenate(ijkToRas)
    transform.Concatenate(between)
    transform.Concatenate(rasToIjk)
    while True:
        began = transform.GetMTime()
        yield from _writeResliced(node, reference, transform, path, modality)
        # It holds the nodes' own transforms: somebody who drags one meanwhile would leave some slices here, some there.
        if transform.GetMTime() == began:
            return


def _writeResliced(node, reference, transform, path, modality):
    source = slicer.util.arrayFromVolume(node)
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(_atOrigin(node.GetImageData()))
    reslice.SetResliceTransform(transform)
    reslice.SetInterpolationModeToLinear()
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputSpacing(1, 1, 1)
    if source.ndim == 3:
        low = np.inf
        for slab in slabsOf(source):
            low = min(low, float(np.fmin.reduce(source[slab], axis=None)))
            yield
        reslice.SetBackgroundLevel(_outside(low, modality))
    columns, rows, slices = sizeOf(reference)
    shape = (slices, rows, columns) + ((3,) if source.ndim == 4 else ())
    step = smallest = max(1, CHUNK_VOXELS // columns)
    from vtk.util.numpy_support import vtk_to_numpy

    with _npyFile(path, source.dtype, shape) as write:
        for k in range(slices):
            j = 0
            while j < rows:
                end = min(j + step, rows)
                began = time.monotonic()
                reslice.SetOutputExtent(0, columns - 1, j, end - 1, k, k)
                reslice.Update()
                part = vtk_to_numpy(reslice.GetOutput().GetPointData().GetScalars())
                write(part.reshape(end - j, columns, -1)[..., :3])
                seconds, j = time.monotonic() - began, end
                if seconds < CHUNK_SECONDS / 2:
                    step = min(2 * step, rows)
                elif seconds > CHUNK_SECONDS:
                    step = smallest
                yield


def _atOrigin(image):
    """The image with its voxels at whole coordinates, which the matrices of its node assume."""
    copy = vtk.vtkImageData()
    copy.ShallowCopy(image)
    copy.SetOrigin(0, 0, 0)
    copy.SetSpacing(1, 1, 1)
    return copy


def _outside(low, modality):
    """What the engine's resample_onto takes: air around a CT in HU, else the smallest value."""
    return AIR_HU if modality == "CT" and low < -200 else low


# ----------------------------------------------------------------------------------------- from the worker


def readImage(path):
    """A vtkImageData of the .npy file that the worker wrote, (k, j, i) or (k, j, i, 3); a generator that returns it."""
    source = np.load(path, mmap_mode="r", allow_pickle=False)
    image, target = newImage(source.shape, source.dtype)
    for slab in slabsOf(source):
        target[slab] = source[slab]
        yield
    return image


def newImage(shape, dtype):
    """A vtkImageData and its voxels, (k, j, i) or (k, j, i, components), which are still to be written."""
    from vtk.util.numpy_support import get_vtk_array_type, vtk_to_numpy

    image = vtk.vtkImageData()
    image.SetDimensions(*shape[2::-1])
    image.AllocateScalars(get_vtk_array_type(np.dtype(dtype)), shape[3] if len(shape) == 4 else 1)
    return image, vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape)


def greatestOf(image):
    """The largest absolute value; a generator that returns it."""
    from vtk.util.numpy_support import vtk_to_numpy

    columns, rows, slices = image.GetDimensions()
    array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(slices, rows, columns)
    greatest = 0.0
    for slab in slabsOf(array):
        greatest = max(greatest, abs(float(array[slab].min())), abs(float(array[slab].max())))
        yield
    return greatest
