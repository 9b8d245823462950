"""Volume nodes as the engine takes them: an array and a place in space, parent transforms included.

What may take long on a large volume is a generator that yields often, so that the caller can let Qt's event loop run
in between.
"""

import contextlib
import dataclasses
import itertools

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

CHUNK_BYTES = 4 * 2**20  # copied in about 2 ms
CHUNK_VOXELS = 2**14  # moved through a B-spline transform in about 10 ms
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
    if not linear and parentA is not parentB:
        # A stays where it is, and B comes to it.
        grid = Grid(sizeOf(nodeA), LPS_FROM_RAS @ matrixOf(nodeA))
        return Pair(grid, grid, True, _("a non-linear transform lies between them"))

    def grid(node, parent):
        toWorld = vtk.vtkMatrix4x4()
        if parent is not None and linear:
            parent.GetMatrixTransformToWorld(toWorld)
        return Grid(sizeOf(node), LPS_FROM_RAS @ slicer.util.arrayFromVTKMatrix(toWorld) @ matrixOf(node))

    a, b = grid(nodeA, parentA), grid(nodeB, parentB)
    return Pair(a, b, False, compare_grids(a.asVolume(nodeA.GetName()), b.asVolume(nodeB.GetName())))


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


def _slabs(shape, bytesPerSlice):
    step = max(1, CHUNK_BYTES // max(1, bytesPerSlice))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


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
        for slab in _slabs(array.shape, array[0].nbytes):
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

    source = slicer.util.arrayFromVolume(node)
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(_atOrigin(node.GetImageData()))
    reslice.SetResliceTransform(transform)
    reslice.SetInterpolationModeToLinear()
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputSpacing(1, 1, 1)
    if source.ndim == 3:
        low = np.inf
        for slab in _slabs(source.shape, source[0].nbytes):
            low = min(low, float(np.fmin.reduce(source[slab], axis=None)))
            yield
        reslice.SetBackgroundLevel(_outside(low, modality))
    columns, rows, slices = sizeOf(reference)
    shape = (slices, rows, columns) + ((3,) if source.ndim == 4 else ())
    step = max(1, CHUNK_VOXELS // columns)
    from vtk.util.numpy_support import vtk_to_numpy

    with _npyFile(path, source.dtype, shape) as write:
        for k, j in itertools.product(range(slices), range(0, rows, step)):
            last = min(j + step, rows) - 1
            reslice.SetOutputExtent(0, columns - 1, j, last, k, k)
            reslice.Update()
            part = vtk_to_numpy(reslice.GetOutput().GetPointData().GetScalars())
            write(part.reshape(last + 1 - j, columns, -1)[..., :3])
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


def readImage(path, image):
    """Fill a new vtkImageData from the .npy file that the worker wrote, (k, j, i) or (k, j, i, 3); a generator."""
    from vtk.util.numpy_support import get_vtk_array_type, vtk_to_numpy

    source = np.load(path, mmap_mode="r", allow_pickle=False)
    components = source.shape[3] if source.ndim == 4 else 1
    image.SetDimensions(*source.shape[2::-1])
    image.AllocateScalars(get_vtk_array_type(source.dtype), components)
    target = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(source.shape)
    for slab in _slabs(source.shape, source[0].nbytes):
        target[slab] = source[slab]
        yield
