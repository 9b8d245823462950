"""The choices that the panel keeps in the scene."""

import enum
import typing
from typing import Annotated

from slicer import vtkMRMLScalarVolumeNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper


class Window(enum.Enum):
    """Which intensities become black and white; the value is the logic's word for it."""

    AUTO = "auto"
    BRAIN = "brain"
    SOFT = "soft"
    BONE = "bone"
    FULL = "full"
    DISPLAYED = "displayed"
    CUSTOM = "custom"

    def label(self):
        return {
            "auto": _("Automatic"),
            "brain": _("CT brain (0 to 80 HU)"),
            "soft": _("CT soft tissue (-160 to 240 HU)"),
            "bone": _("CT bone (-500 to 1500 HU)"),
            "full": _("CT full (-1000 to 2000 HU)"),
            "displayed": _("As displayed now"),
            "custom": _("From … to …"),
        }[self.value]


class Modality(enum.Enum):
    """What a volume is; the value is the logic's word for it."""

    AUTO = ""
    MR = "MR"
    CT = "CT"
    SPECT = "SPECT"
    PET = "PET"

    def label(self):
        return self.value or _("Automatic")


class Device(enum.Enum):
    """Where the network runs; the value is the logic's word for it."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"

    def label(self):
        return {
            "auto": _("Automatic"),
            "cpu": _("CPU"),
            "cuda": _("NVIDIA GPU (CUDA)"),
            "mps": _("Apple GPU (MPS)"),
        }[self.value]


class Plane(enum.Enum):
    """The slices that a 2D model sees; the value is the logic's word for it."""

    AUTO = "auto"
    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"

    def label(self):
        return {
            "auto": _("Automatic (finest pixels)"),
            "axial": _("Axial"),
            "coronal": _("Coronal"),
            "sagittal": _("Sagittal"),
        }[self.value]


@parameterNodeWrapper
class ClinicalFMambaParameterNode:
    """
    volumeA, volumeB - the anatomical volume and the other one.
    fusedVolume - the output; None makes a new volume.
    model - "auto", the name of a bundled model, or "file".
    modelFile - path of a .safetensors file, used where model is "file".
    windowA, windowB - which intensities become black and white; the bounds count where they are CUSTOM.
    resample - whether B may be interpolated onto A's grid.
    maxMemoryGib - bound on the network's memory; 0 takes what is free.
    keepSourcesVisible - whether the slice views stay as they are after a fusion.
    """

    volumeA: vtkMRMLScalarVolumeNode
    volumeB: vtkMRMLScalarVolumeNode
    fusedVolume: vtkMRMLScalarVolumeNode
    model: str = "auto"
    modelFile: str = ""
    windowA: Window = Window.AUTO
    windowALow: Annotated[float, WithinRange(-100000, 100000)] = 0
    windowAHigh: Annotated[float, WithinRange(-100000, 100000)] = 1000
    windowB: Window = Window.AUTO
    windowBLow: Annotated[float, WithinRange(-100000, 100000)] = 0
    windowBHigh: Annotated[float, WithinRange(-100000, 100000)] = 1000
    resample: bool = True
    device: Device = Device.AUTO
    classify: bool = False
    modalityA: Modality = Modality.AUTO
    modalityB: Modality = Modality.AUTO
    plane: Plane = Plane.AUTO
    maxMemoryGib: Annotated[float, WithinRange(0, 1024)] = 0
    checkRegistration: bool = True
    measure: bool = True
    keepSourcesVisible: bool = False


def forgetUnknownChoices(node):
    """Back to the default where a scene of another version holds a choice that this one does not know."""
    for name, kind in typing.get_type_hints(ClinicalFMambaParameterNode).items():
        known = getattr(kind, "__members__", None)  # of an enumeration
        if known is not None and node.HasParameter(name) and node.GetParameter(name) not in known:
            node.UnsetParameter(name)
