"""Reading and writing of volumes and images, their grids, and whether two of them lie on each other.

Arrays are numpy in z-y-x order: (D, H, W), colour (D, H, W, 3) as 8-bit RGB. Geometry follows ITK: spacing and
origin in mm in x-y-z order, direction as nine row-major cosines in the LPS patient frame.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import os
import re
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .errors import InputError, OutputError, require

log = logging.getLogger(__name__)

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
VOLUME_SUFFIXES = (".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".dcm")
# .mhd and .nhdr keep their voxels in a second file, which cannot be replaced in one step.
WRITABLE_SUFFIXES = (".nrrd", ".nii", ".nii.gz", ".mha", *IMAGE_SUFFIXES)
MODALITIES = ("CT", "MR", "SPECT", "PET")
AIR_HU = -1024.0

_MODALITY_ALIASES = {"MRI": "MR", "NM": "SPECT", "ST": "SPECT", "PT": "PET"}


@dataclass(frozen=True)
class Volume:
    """A scalar or RGB volume with its place in the patient frame; an image is a volume of one slice.

    Attributes:
        array: (D, H, W), or (D, H, W, 3) uint8 RGB.
        spacing: mm between voxel centres along x, y, z.
        origin: mm, centre of the first voxel (LPS).
        direction: nine cosines, row-major; column k is the patient direction of index axis k.
        name: short name for messages.
        modality: ``"CT"``, ``"MR"``, ``"SPECT"``, ``"PET"`` or ``""`` where unknown.
        path: where it was read from, ``""`` if nowhere.
        is_image: one slice from a png, jpg or tif, which states no place and no size in mm.
        notes: sentences about what the reader found worth a warning.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY
    name: str = ""
    modality: str = ""
    path: str = ""
    is_image: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        shape = self.array.shape
        if not (self.array.ndim == 3 or (self.array.ndim == 4 and shape[3] == 3)) or 0 in shape:
            raise InputError(f"a volume needs an array (D, H, W) or (D, H, W, 3), not {shape}; reshape it")

    @property
    def is_colour(self) -> bool:
        return self.array.ndim == 4

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W), without the colour axis."""
        return self.array.shape[:3]


@dataclass(frozen=True)
class RegistrationCheck:
    """What :func:`check_registration` found.

    Attributes:
        shift_mm: where B fits A best, as an x-y-z displacement of B in mm; zeros when the present place is best.
        gain: mutual information won by that shift, relative to the present place.
        message: one sentence when B looks shifted, else ``""``.
    """

    shift_mm: tuple[float, float, float]
    gain: float
    message: str


# ---------------------------------------------------------------------------------------------- reading


def read_volume(path: str | os.PathLike, modality: str = "") -> Volume:
    """Read a volume (nrrd, nii, nii.gz, mha, mhd, DICOM folder) or an image (png, jpg, tif).

    CT slices of a DICOM series come in HU (ITK applies the rescale). An alpha channel is dropped; colour whose three
    channels are equal becomes grey; 16-bit colour becomes 8-bit.

    Args:
        path: a file, or a folder that holds one DICOM series.
        modality: overrides the modality that the file states.

    Raises:
        InputError: the path is missing, empty, truncated, of an unknown or unsupported kind, has several frames or
            series, or has channels that are no colour.
    """
    modality = _normalise_modality(modality, strict=True)
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        volume = _read_dicom_folder(path)
    else:
        volume = _read_file(path)
    return replace(volume, modality=modality) if modality else volume


def suffix_of(path: str | os.PathLike) -> str:
    """Lower-case extension with its dot; ``.nii.gz`` counts as one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _normalise_modality(text: str, strict: bool = False) -> str:
    upper = text.strip().upper()
    upper = _MODALITY_ALIASES.get(upper, upper)
    if upper and upper not in MODALITIES:
        if strict:
            raise InputError(f"modality {text!r} is unknown; use one of {', '.join(MODALITIES)}")
        return ""
    return upper


def _simpleitk():
    sitk = require("SimpleITK", "reading and writing volumes", "SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@contextlib.contextmanager
def _quiet_stderr():
    """Silence descriptor 2: niftilib, libtiff, libjpeg and MetaIO print there besides raising."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (AttributeError, OSError, ValueError):  # a GUI process may have no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _reason(error: Exception) -> str:
    """The last line of an ITK error without its addresses and source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"^.*?ERROR:\s*", "", lines[-1]) if lines else type(error).__name__
    return re.sub(r"^\w+\(0x[0-9a-f]+\):\s*", "", text).rstrip(".")


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(f"{path}: cannot be read as {suffix_of(path)[1:]} ({why}); check the file or export it again")


def _read_file(path: Path) -> Volume:
    suffix = suffix_of(path)
    if suffix not in VOLUME_SUFFIXES + IMAGE_SUFFIXES:
        known = ", ".join(s[1:] for s in VOLUME_SUFFIXES + IMAGE_SUFFIXES)
        raise InputError(f"{path}: unknown extension {suffix or '(none)'!r}; use one of {known}, or a DICOM folder")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty (0 bytes); export it again")
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); check its permissions") from error

    if suffix == ".png" and _is_grey_alpha_png(path):
        raise InputError(f"{path}: a grey PNG with an alpha channel, which ITK cannot read; save it without alpha")
    sitk = _simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with _quiet_stderr():
            reader.ReadImageInformation()
            _check_header(path, reader, sitk)
            _check_complete(path)
            image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(path, _reason(error)) from error

    array, notes = _array_of(path, image, sitk)
    name = path.name[: -len(suffix)]
    modality = ""
    if suffix == ".dcm" and reader.HasMetaDataKey("0008|0060"):
        modality = _normalise_modality(reader.GetMetaData("0008|0060"))
    if suffix in IMAGE_SUFFIXES:
        # A png or tif may state dots per inch: a printing size, not the patient's.
        if array.shape[0] > 1:
            notes += (f"{path.name} states no spacing: 1 mm is assumed",)
        return Volume(array, name=name, path=str(path), is_image=array.shape[0] == 1, notes=notes)
    return _with_geometry(array, image, name=name, path=str(path), modality=modality, notes=notes)


def _check_header(path: Path, reader, sitk) -> None:
    """Refuse what the header already shows to be unusable; a fourth axis of length one is cut off."""
    size = list(reader.GetSize())
    if reader.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise InputError(f"{path}: complex voxels; expected real ones: save the magnitude and read that")
    if 0 in size:
        raise InputError(f"{path}: the volume is empty, size {'x'.join(map(str, size))}; export it again")
    if len(size) > 3:
        frames = int(np.prod(size[3:]))
        if frames > 1:
            raise InputError(
                f"{path}: {len(size)}D with {frames} frames of {'x'.join(map(str, size[:3]))}; "
                "expected one 3D volume: save one frame (or their mean) as its own file"
            )
        reader.SetExtractSize(size[:3] + [0] * (len(size) - 3))


def _check_complete(path: Path) -> None:
    """Refuse a truncated NIfTI or JPEG: ITK reads both without an error and leaves garbage in the missing part.

    Raises:
        InputError: bytes are missing, or the checksum of a compressed file is wrong.
    """
    suffix = suffix_of(path)
    advice = "the file is truncated or damaged: copy or export it again"
    if suffix in (".nii", ".nii.gz"):
        opener = gzip.open if _is_gzip(path) else open
        try:
            with opener(path, "rb") as stream:
                head = stream.read(544)
                needed, found = _nifti_bytes(head), len(head)
                while chunk := stream.read(1 << 22):
                    found += len(chunk)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: {' '.join(str(error).split())}; {advice}") from error
        if needed is not None and found < needed:
            raise InputError(f"{path}: {needed} bytes expected, {found} found; {advice}")
    elif suffix in (".jpg", ".jpeg"):
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 1024))
            if b"\xff\xd9" not in stream.read():
                raise InputError(f"{path}: the end of the JPEG is missing; {advice}")


def _is_grey_alpha_png(path: Path) -> bool:
    """Colour type 4 in the IHDR chunk (PNG specification, 11.2.1)."""
    with path.open("rb") as stream:
        head = stream.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[25:26] == b"\x04"


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _nifti_bytes(head: bytes) -> int | None:
    """Bytes that a single-file NIfTI must have, from its header (nifti1.h, nifti2.h); None if it is no such header."""
    for order in "<>":
        if len(head) >= 348 and struct.unpack(order + "i", head[:4])[0] == 348 and head[344:347] == b"n+1":
            dim = struct.unpack(order + "8h", head[40:56])
            bits = struct.unpack(order + "h", head[72:74])[0]
            offset = int(struct.unpack(order + "f", head[108:112])[0])
        elif len(head) >= 540 and struct.unpack(order + "i", head[:4])[0] == 540 and head[4:7] == b"n+2":
            dim = struct.unpack(order + "8q", head[16:80])
            bits = struct.unpack(order + "h", head[14:16])[0]
            offset = struct.unpack(order + "q", head[168:176])[0]
        else:
            continue
        voxels = 1
        for n in dim[1 : dim[0] + 1]:
            voxels *= max(1, n)
        return offset + voxels * bits // 8
    return None


def _array_of(path: Path, image, sitk) -> tuple[np.ndarray, tuple[str, ...]]:
    """Voxels as (D, H, W) or (D, H, W, 3) uint8, with notes."""
    array = sitk.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    if image.GetDimension() == 2:
        array = array[None]
    if components == 1:
        return array, ()
    is_jpeg = suffix_of(path) in (".jpg", ".jpeg")  # four channels there are CMYK
    if array.dtype not in (np.uint8, np.uint16) or components not in ((3,) if is_jpeg else (3, 4)):
        raise InputError(
            f"{path}: {components} {array.dtype} values in each voxel; expected one, or 8-bit RGB(A): "
            "save the channel you need as its own volume"
        )
    notes: tuple[str, ...] = ()
    array = np.ascontiguousarray(array[..., :3])
    if np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(array[..., 0], array[..., 2]):
        return np.ascontiguousarray(array[..., 0]), notes
    if array.dtype == np.uint16:
        array = np.round(array / np.float32(257)).astype(np.uint8)
        notes = (f"{path.name}: 16-bit colour was reduced to 8 bit",)
    return array, notes


def _with_geometry(array: np.ndarray, image, **fields) -> Volume:
    spacing, origin, direction = image.GetSpacing(), image.GetOrigin(), image.GetDirection()
    if image.GetDimension() == 2:
        spacing, origin = (*spacing, 1.0), (*origin, 0.0)
        direction = (direction[0], direction[1], 0.0, direction[2], direction[3], 0.0, 0.0, 0.0, 1.0)
    if not np.all(np.isfinite([*spacing, *origin, *direction])) or min(spacing) <= 0:
        raise InputError(
            f"{fields.get('path')}: spacing {spacing} or origin {origin} is no place in space; repair the header"
        )
    return Volume(array, tuple(spacing), tuple(origin), tuple(direction), **fields)


def _read_dicom_folder(path: Path) -> Volume:
    sitk = _simpleitk()
    with _quiet_stderr():
        series = [s for s in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path)) if s]
        files = {s: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), s) for s in series}
    files = {s: names for s, names in files.items() if names}
    if not files:
        inner = [d.name for d in sorted(path.iterdir()) if d.is_dir()] if os.access(path, os.R_OK) else []
        hint = f"give one of its folders ({', '.join(inner[:5])})" if inner else "give the folder of the .dcm files"
        raise InputError(f"{path}: a folder without DICOM images; {hint}, or a volume file")
    if len(files) > 1:
        listed = "; ".join(_describe_series(names, sitk) for names in list(files.values())[:8])
        raise InputError(f"{path}: {len(files)} DICOM series, expected one: copy one to its own folder ({listed})")

    (names,) = files.values()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.LoadPrivateTagsOff()
    try:
        with _quiet_stderr():
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{path}: the DICOM series cannot be read ({_reason(error)}); check that its slices belong together"
        ) from error
    if image.GetDimension() > 3:
        raise InputError(f"{path}: {image.GetDimension()}D DICOM; expected one 3D volume: export one frame")
    if image.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise InputError(f"{path}: complex voxels; expected real ones: export the magnitude")

    def tag(index: int, key: str) -> str:
        return reader.GetMetaData(index, key).strip() if reader.HasMetaDataKey(index, key) else ""

    array, notes = _array_of(path, image, sitk)
    gaps = _slice_gaps([tag(i, "0020|0032") for i in range(len(names))])
    if len(gaps) > 1 and gaps.max() - gaps.min() > 0.1 * np.median(gaps):
        notes += (
            f"{path.name}: slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart; a slice may be missing, "
            "and distances along the stack are not to be trusted",
        )
    return _with_geometry(
        array, image, name=path.name, path=str(path), modality=_normalise_modality(tag(0, "0008|0060")), notes=notes
    )


def _describe_series(names: tuple[str, ...], sitk) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(names[0])
    words = []
    with _quiet_stderr(), contextlib.suppress(RuntimeError):
        reader.ReadImageInformation()
        for key in ("0008|0060", "0008|103e", "0020|000e"):
            if reader.HasMetaDataKey(key):
                words.append(" ".join(reader.GetMetaData(key).split()))
    count = f"{len(names)} image{'s' if len(names) > 1 else ''}"
    return " ".join([w for w in words if w] + [count, "from", Path(names[0]).name])


def _slice_gaps(positions: list[str]) -> np.ndarray:
    """Distances in mm between neighbouring slices from ImagePositionPatient; empty where a slice states none."""
    try:
        points = np.array([[float(v) for v in p.split("\\")] for p in positions])
    except ValueError:
        return np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 3:
        return np.zeros(0)
    return np.linalg.norm(np.diff(points, axis=0), axis=1)


# ---------------------------------------------------------------------------------------------- writing


def write_volume(volume: Volume, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write a volume in one step: to a temporary file beside ``path``, checked, then renamed onto it.

    Args:
        volume: voxels keep their type. png, jpg and tif take one slice; png and jpg take 8 bit (png also 16 bit) only.
        path: its extension chooses the format: nrrd, nii, nii.gz, mha, png, jpg, tif.
        metadata: goes into the header of nrrd and mha, into text chunks of png, and, cut to the 79 characters that
            the field holds, into NIfTI's ``descrip``. jpg and tif keep none.

    Raises:
        InputError: the format is unknown or cannot hold this volume.
        OutputError: the folder is missing or unwritable, or the disk is full; nothing is left behind.
    """
    path = Path(path).expanduser()
    suffix = suffix_of(path)
    metadata = {str(k): " ".join(str(v).split()) for k, v in (metadata or {}).items()}
    _check_writable_as(volume, path, suffix)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first")

    sitk = _simpleitk()
    image = _to_itk(volume, sitk)
    if suffix in (".nii", ".nii.gz"):
        if metadata:
            text = "; ".join(f"{k}={v}" for k, v in metadata.items())
            image.SetMetaData("ITK_FileNotes", text.encode("ascii", "replace")[:79].decode())
    elif suffix in (".nrrd", ".mha"):
        for key, value in metadata.items():
            image.SetMetaData(re.sub(r"[^\w.-]", "_", key), value)

    temporary = path.with_name(f".{path.name[: -len(suffix)]}.{os.getpid()}.part{suffix}")
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(temporary))
    writer.SetUseCompression(suffix != ".nii")
    # Level 1 writes 512x512x160 float32 twice as fast as the default, for files a sixth larger.
    writer.SetCompressionLevel(95 if suffix in (".jpg", ".jpeg") else 1)
    try:
        # Says permission denied or disk full in the system's words, as ITK does not. An image's space is taken before:
        # on a full disk libtiff's last flush fails unheard, and libjpeg ends the whole process.
        with open(temporary, "wb") as stream:
            stream.write(bytes(2 * volume.array.nbytes + 65536 if suffix in IMAGE_SUFFIXES else 0))
        with _quiet_stderr():
            writer.Execute(image)
        if suffix == ".png" and metadata:
            _add_png_text(temporary, metadata)
        _check_complete(temporary)  # ITK reports no error when a NIfTI did not fit on the disk
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({why}); choose a folder you may write to, with space") from error
    except RuntimeError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); check the disk's free space") from error
    except InputError as error:
        raise OutputError(f"{path}: was cut short while writing; check the disk's free space") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    log.debug("wrote %s", path)


def _check_writable_as(volume: Volume, path: Path, suffix: str) -> None:
    if suffix not in WRITABLE_SUFFIXES:
        known = ", ".join(s[1:] for s in WRITABLE_SUFFIXES)
        raise InputError(f"{path}: cannot write {suffix or 'a file without extension'}; use one of {known}")
    if suffix not in IMAGE_SUFFIXES:
        return
    if volume.shape[0] != 1:
        raise InputError(f"{path}: {suffix[1:]} holds one slice, the volume has {volume.shape[0]}; write a .nrrd")
    allowed = {".png": ("uint8", "uint16"), ".tif": ("uint8", "uint16", "float32"), ".jpg": ("uint8",)}
    kinds = allowed[{".tiff": ".tif", ".jpeg": ".jpg"}.get(suffix, suffix)]
    if volume.array.dtype.name not in kinds:
        raise InputError(
            f"{path}: {suffix[1:]} holds {' or '.join(kinds)}, not {volume.array.dtype}; "
            "scale to 8 bit or write a .nrrd"
        )


def _to_itk(volume: Volume, sitk):
    array = volume.array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    if volume.is_image:  # 2D writers of ITK want a 2D image
        return sitk.GetImageFromArray(array[0], isVector=volume.is_colour)
    image = sitk.GetImageFromArray(array, isVector=volume.is_colour)
    image.SetSpacing(tuple(map(float, volume.spacing)))
    image.SetOrigin(tuple(map(float, volume.origin)))
    image.SetDirection(tuple(map(float, volume.direction)))
    return image


def _add_png_text(path: Path, metadata: dict[str, str]) -> None:
    """Insert iTXt chunks behind IHDR (PNG specification, 11.3.3.4), which ITK does not write."""
    data = path.read_bytes()
    end_of_ihdr = 8 + 4 + 4 + 13 + 4
    chunks = b""
    for key, value in metadata.items():
        keyword = key.encode("latin-1", "replace")[:79]
        body = b"iTXt" + keyword + b"\0\0\0\0\0" + value.encode("utf-8")
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:end_of_ihdr] + chunks + data[end_of_ihdr:])


# ------------------------------------------------------------------------------------------------ grids


def _axes(volume: Volume) -> np.ndarray:
    """3x3: column k is the step in mm of index axis k (x, y, z)."""
    return np.reshape(volume.direction, (3, 3)) * np.asarray(volume.spacing)


def _size(volume: Volume) -> np.ndarray:
    return np.array(volume.shape[::-1])


def _words(values, digits: int = 0) -> str:
    return "x".join(f"{v:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{v:d}" for v in values)


def compare_grids(a: Volume, b: Volume) -> str:
    """``""`` when both volumes share one grid, else a sentence that says how they differ.

    The grids are the same when the sizes are and no corner voxel is further than a tenth of the smallest spacing from
    its counterpart: headers round (a NIfTI quaternion holds single precision). Images (png, jpg, tif) have no place:
    only their size counts.
    """
    same_size = a.shape == b.shape
    if a.is_image or b.is_image:
        if same_size:
            return ""
        return (
            f"size {_words(_size(a)[:2])} against {_words(_size(b)[:2])} pixels"
            if a.is_image and b.is_image
            else (f"size {_words(_size(a))} against {_words(_size(b))}, and an image has no place in space")
        )
    if same_size:
        corners = np.array(list(itertools.product((0, 1), repeat=3))) * (_size(a) - 1)
        apart = corners @ (_axes(a) - _axes(b)).T + np.subtract(a.origin, b.origin)
        if np.linalg.norm(apart, axis=1).max() <= 0.1 * min(*a.spacing, *b.spacing):
            return ""
    differences = []
    if not same_size:
        differences.append(f"size {_words(_size(a))} against {_words(_size(b))} voxels")
    if not np.allclose(a.spacing, b.spacing, rtol=5e-4):
        differences.append(f"spacing {_words(a.spacing, 3)} against {_words(b.spacing, 3)} mm")
    distance = float(np.linalg.norm(np.subtract(a.origin, b.origin)))
    if distance >= 0.05 or not differences:
        differences.append(f"origins {distance:.1f} mm apart")
    differences += _rotation_words(a, b)
    differences.append(f"{100 * overlap_fraction(a, b):.0f} % of the first lies inside the second")
    return ", ".join(differences)


def _rotation_words(a: Volume, b: Volume) -> list[str]:
    """Angle between the axes, and how they are permuted or mirrored, as separate things; those that there are."""
    between = np.linalg.solve(np.reshape(a.direction, (3, 3)), np.reshape(b.direction, (3, 3)))
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(between[p[k], k]) for k in range(3)))
    sign = [1 if between[order[k], k] >= 0 else -1 for k in range(3)]
    nearest = np.zeros((3, 3))
    for k in range(3):
        nearest[order[k], k] = sign[k]
    angle = np.degrees(np.arccos(np.clip((np.trace(between @ nearest.T) - 1) / 2, -1, 1)))
    words = [f"axes rotated by {angle:.1f} degrees"] if angle >= 0.05 else []
    if order != (0, 1, 2):
        words.append("axes in another order")
    if -1 in sign:
        words.append(f"{' and '.join('xyz'[k] for k in range(3) if sign[k] < 0)} running the other way")
    return words


def overlap_fraction(a: Volume, b: Volume) -> float:
    """Fraction of the volume of ``a`` that lies inside the box of ``b``, 0 to 1, sampled on a lattice of 24³ points.

    Images have no place in space: 1 for two images or equal sizes, else 0.
    """
    if a.is_image or b.is_image:
        return float((a.is_image and b.is_image) or a.shape == b.shape)
    size = _size(a)
    # Midpoints of equal cells of the box that the voxels fill, which reaches half a voxel beyond their centres.
    lattice = [(np.arange(k) + 0.5) * n / k - 0.5 for n, k in zip(size, np.minimum(size, 24), strict=True)]
    index = np.stack(np.meshgrid(*lattice, indexing="ij"), axis=-1).reshape(-1, 3)
    points = index @ _axes(a).T + a.origin
    inside = np.linalg.solve(_axes(b), (points - b.origin).T).T
    tolerance = 1e-4
    return float(np.mean(np.all((inside >= -0.5 - tolerance) & (inside <= _size(b) - 0.5 + tolerance), axis=1)))


def resample_onto(moving: Volume, reference: Volume, background: float | None = None) -> Volume:
    """``moving`` on the grid of ``reference``, linearly interpolated; the voxel type is kept.

    Two images of different size are stretched onto each other if their proportions agree within 2 %.

    Args:
        background: value outside ``moving`` and in place of NaN and Inf; by default air (-1024) for a CT in HU, else
            the smallest value. Colour is black there.

    Raises:
        InputError: the two do not overlap, or one is an image and the other a volume.
    """
    if moving.is_image != reference.is_image:
        raise InputError(
            f"{moving.name or 'B'} and {reference.name or 'A'}: one is an image, the other a volume; "
            "an image has no place in space: give two images or two volumes"
        )
    sitk = _simpleitk()
    array = moving.array
    if not moving.is_colour:
        array, background = _without_nonfinite(moving, background)
    if moving.is_image:
        (height, width), (h, w) = reference.shape[1:], moving.shape[1:]
        if abs(h * width / (w * height) - 1) > 0.02:
            raise InputError(
                f"{moving.name or 'B'} is {w}x{h} pixels, {reference.name or 'A'} {width}x{height}: "
                "stretching would distort; crop or pad them to the same proportions"
            )
        # Equal fields of view: pixel edges, not pixel centres, are laid on each other.
        spacing = (width / w, height / h, 1.0)
        place = replace(moving, spacing=spacing, origin=(spacing[0] / 2 - 0.5, spacing[1] / 2 - 0.5, 0.0))
    else:
        place = moving
        if overlap_fraction(reference, moving) == 0 and overlap_fraction(moving, reference) == 0:
            raise InputError(
                f"{moving.name or 'B'} and {reference.name or 'A'} do not overlap in space "
                f"({compare_grids(reference, moving)}); register them first, or repair the headers"
            )
    # Interpolated in float32, because ITK cuts integers off instead of rounding them.
    source = _to_itk(replace(place, array=array.astype(np.float32), is_image=False), sitk)
    target = reference if not reference.is_image else replace(reference, spacing=(1.0,) * 3, origin=(0.0,) * 3)
    resample = sitk.ResampleImageFilter()
    resample.SetSize([int(n) for n in _size(target)])
    resample.SetOutputSpacing(tuple(map(float, target.spacing)))
    resample.SetOutputOrigin(tuple(map(float, target.origin)))
    resample.SetOutputDirection(tuple(map(float, target.direction)))
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetDefaultPixelValue(0.0 if moving.is_colour else float(background))
    result = sitk.GetArrayFromImage(resample.Execute(source))
    if np.issubdtype(moving.array.dtype, np.integer):
        limits = np.iinfo(moving.array.dtype)
        result = np.clip(np.rint(result), limits.min, limits.max)
    return replace(
        moving,
        array=result.astype(moving.array.dtype),
        spacing=reference.spacing,
        origin=reference.origin,
        direction=reference.direction,
    )


def _without_nonfinite(volume: Volume, background: float | None) -> tuple[np.ndarray, float]:
    """The array with NaN and Inf replaced by the background, which interpolation would smear; and the background."""
    array = volume.array
    finite = np.isfinite(array) if np.issubdtype(array.dtype, np.floating) else None
    whole = finite is None or bool(finite.all())
    values = array if whole else array[finite]
    if values.size == 0:
        raise InputError(f"{volume.name or 'the volume'}: every voxel is NaN or Inf; export it again")
    if background is None:
        low = float(values.min())
        # Below -200 HU there is air: such a CT is in HU and its surroundings are air.
        background = AIR_HU if volume.modality == "CT" and low < -200 else low
    return (array if whole else np.where(finite, array, np.float32(background))), background


# ----------------------------------------------------------------------------------------- registration

_BINS = 64
_SAMPLES = 400_000
# Relative gain of mutual information above which a shift is reported, measured with steps of 2, 4, 6, 8 mm along each
# axis. Registered pairs gain 0 (BraTS t1ce/flair, T1/FLAIR, T1/SPECT templates), 0.03 (CT/T2 templates), 0.06 (T1/PET
# templates), and of 135 AANLIB CT/MR slices 0.062 at most. The same pairs moved by 6 mm gain 0.28 or more (BraTS), 0.39
# (T1/FLAIR), 0.11 (T1/SPECT), 0.17 (CT/T2, but 0.03 along -z, back over the templates' own offset), 0.15 (T1/PET), and
# 84 % of the slices pass (97 % when moved by 12 pixels).
_GAIN = 0.07
# One SPECT slice of 10 mm resolution fits its MR as well a few pixels away: registered AANLIB slices gain 0.12 in
# 1 of 100 (steps of 4 to 16 pixels), and a shift of 6 pixels mostly brings no more: 0.2 finds 14 %, and 65 % of 12.
_GAIN_FUNCTIONAL_SLICE = 0.2


def check_registration(
    a: np.ndarray,
    b: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    functional: bool = False,
    unit: str = "mm",
) -> RegistrationCheck:
    """Compare the mutual information of A and B in place with that of small shifts of B along the array axes.

    A warning, not a registration: rotations, and shifts of a few mm, may pass unseen. Mutual information of
    64 bins (Viola and Wells, IJCV 1997; Maes et al., IEEE TMI 1997) on a lattice of at most 400 000 voxels.

    Args:
        a, b: (D, H, W) or (H, W) in [0, 1], one grid; colour (D, H, W, 3) is averaged over its channels.
        spacing: mm along x, y, z.
        functional: one is a SPECT or PET (implied by colour); of a single slice, only gross shifts are then reported.
        unit: word for the message; ``"pixels"`` for images, which have no size in mm.

    Raises:
        InputError: the shapes differ.
    """
    functional = functional or a.ndim == 4 or b.ndim == 4
    a, b = _grey_stack(a), _grey_stack(b)
    coarse = functional and a.shape[0] == 1
    if a.shape != b.shape:
        raise InputError(f"the registration check needs equal shapes, not {a.shape} and {b.shape}; resample B onto A")
    if a.shape[0] == 1:
        # One slice has too few voxels for 64x64 bins: without smoothing 6 mm shows in 7 of 10 CT/MR slices, not 9.
        a, b = _smooth_slice(a), _smooth_slice(b)

    steps_mm = (4, 8, 12, 16) if coarse else (2, 4, 6, 8)
    shifts = []
    for length, mm in zip(a.shape, spacing[::-1], strict=True):
        voxels = {max(1, round(step / mm)) for step in steps_mm}
        shifts.append(sorted(v for v in voxels if v <= length // 8))
    margin = [max(v, default=0) for v in shifts]
    inner = [length - 2 * m for length, m in zip(a.shape, margin, strict=True)]
    stride = [1, 1, 1]
    while np.prod([-(-n // s) for n, s in zip(inner, stride, strict=True)]) > _SAMPLES:
        axis = int(np.argmax([n / s for n, s in zip(inner, stride, strict=True)]))
        stride[axis] += 1

    def sample(array: np.ndarray, offset: tuple[int, ...]) -> np.ndarray:
        where = tuple(slice(m + o, m + o + n, s) for m, o, n, s in zip(margin, offset, inner, stride, strict=True))
        values = np.nan_to_num(array[where], nan=0.0, posinf=0.0, neginf=0.0)
        return (np.clip(values, 0, 1) * (_BINS - 1) + 0.5).astype(np.intp).ravel()

    fixed = sample(a, (0, 0, 0)) * _BINS

    def information(offset: tuple[int, ...]) -> float:
        return _mutual_information(np.bincount(fixed + sample(b, offset), minlength=_BINS**2).reshape(_BINS, _BINS))

    here = information((0, 0, 0))
    if here <= 0:  # one of them is constant
        return RegistrationCheck((0.0, 0.0, 0.0), 0.0, "")
    best, offset, along = here, (0, 0, 0), [0, 0, 0]
    for axis in range(3):
        best_here = here
        for step in shifts[axis]:
            for signed in (step, -step):
                candidate = tuple(signed if k == axis else 0 for k in range(3))
                value = information(candidate)
                if value > best_here:
                    best_here, along[axis] = value, signed
                if value > best:
                    best, offset = value, candidate
    if sum(v != 0 for v in along) > 1:
        value = information(tuple(along))
        if value > best:
            best, offset = value, tuple(along)

    gain = best / here - 1
    shift = tuple(float(o * mm) for o, mm in zip(offset[::-1], spacing, strict=True))
    message = ""
    if gain > (_GAIN_FUNCTIONAL_SLICE if coarse else _GAIN):
        where = ", ".join(f"{v:+.0f} {unit} along {k}" for k, v in zip("xyz", shift, strict=True) if v)
        message = (
            f"the second input looks shifted by about {where} ({100 * gain:.0f} % more mutual information there): "
            "check that the two are registered"
        )
    return RegistrationCheck(shift, float(gain), message)


def _grey_stack(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.mean(axis=-1, dtype=np.float32)
    return array[None] if array.ndim == 2 else array


def _smooth_slice(array: np.ndarray) -> np.ndarray:
    """Binomial filter of 5x5 taps (standard deviation 1 pixel) on (1, H, W)."""
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (2, 2)
        padded, n = np.pad(array, pad, mode="edge"), array.shape[axis]
        taps = zip((1, 4, 6, 4, 1), range(5), strict=True)
        array = sum(np.float32(w / 16) * np.take(padded, range(k, k + n), axis=axis) for w, k in taps)
    return array


def _mutual_information(joint: np.ndarray) -> float:
    """In nats, from counts (bins of A, bins of B)."""
    p = joint / joint.sum()

    def entropy(q: np.ndarray) -> float:
        q = q[q > 0]
        return float(-(q * np.log(q)).sum())

    return entropy(p.sum(axis=1)) + entropy(p.sum(axis=0)) - entropy(p.ravel())
