"""A registered head phantom: CT, MR T1, T2, FLAIR and perfusion SPECT of one synthetic patient.

The head is a scene of implicit surfaces (signed distances) in a frame close to MNI space, painted from the inside out;
a voxel cut by a surface mixes both tissues in proportion (partial volume), as a scanner does. The cortex is folded by
band-limited random waves on the surface of each hemisphere: their zero lines, which meander without crossing, are the
sulci. Positions and sizes are those of an average adult; intensities are typical of each modality. It is a test object
and a demonstration, not a model of any person.
"""

from __future__ import annotations

import itertools

import numpy as np

from .errors import InputError
from .volumes import Volume

FIELD_OF_VIEW = 224.0  # mm, each edge
SCALE = 0.93  # mm for each unit of the anatomical frame: MNI space is larger than the average head
CENTRE = (0.0, -15.0, -22.0)  # left, anterior, superior of the middle of the field of view, anatomical frame
SULCAL_WAVELENGTH = 27.0  # anatomical units; neighbouring sulci are half of it apart
OVERSAMPLE_BELOW = 96  # below this size the scene is rendered finer and averaged: thin structures would vanish

LABELS = {
    "background": 0,
    "soft tissue": 1,
    "fat": 2,
    "bone": 3,
    "air cavity": 4,
    "CSF": 5,
    "grey matter": 6,
    "white matter": 7,
    "deep grey matter": 8,
    "cerebellum": 9,
    "brainstem": 10,
    "dura and vessels": 11,
    "eye": 12,
    "calcification": 13,
    "oedema": 14,
    "tumour rim": 15,
    "necrosis": 16,
}

MODALITIES = {"CT": "CT", "T1": "MR", "T2": "MR", "FLAIR": "MR", "SPECT": "SPECT"}

# HU; arbitrary MR units (T1 after contrast medium: rim, sinuses and choroid plexus enhance); relative perfusion.
TISSUES = {
    #                 label               CT     T1    T2  FLAIR SPECT
    "air": ("background", -1000, 0, 0, 0, 0.0),
    "skin": ("soft tissue", 30, 420, 260, 300, 0.25),
    "fat": ("fat", -95, 980, 640, 600, 0.10),
    "muscle": ("soft tissue", 58, 380, 210, 270, 0.30),
    "mucosa": ("soft tissue", 40, 520, 720, 600, 0.45),
    "cortical bone": ("bone", 1250, 45, 30, 40, 0.05),
    "diploe": ("bone", 560, 520, 330, 330, 0.15),
    "petrous bone": ("bone", 1500, 60, 40, 50, 0.05),
    "tooth": ("bone", 2100, 20, 20, 20, 0.0),
    "cavity": ("air cavity", -1000, 5, 5, 5, 0.0),
    "CSF": ("CSF", 7, 150, 1120, 95, 0.08),
    "grey": ("grey matter", 38, 520, 600, 590, 4.0),
    "white": ("white matter", 29, 770, 410, 440, 1.0),
    "nucleus": ("deep grey matter", 38, 600, 520, 530, 4.0),
    "pallidum": ("deep grey matter", 42, 670, 380, 430, 2.6),
    "cerebellar cortex": ("cerebellum", 38, 530, 600, 560, 4.2),
    "cerebellar white": ("cerebellum", 30, 740, 430, 450, 1.4),
    "brainstem": ("brainstem", 32, 710, 450, 470, 1.8),
    "cord": ("brainstem", 34, 690, 450, 470, 0.9),
    "dura": ("dura and vessels", 60, 560, 170, 200, 0.3),
    "vein": ("dura and vessels", 62, 980, 150, 180, 0.9),
    "plexus": ("dura and vessels", 45, 840, 800, 520, 0.9),
    "vitreous": ("eye", 9, 170, 1150, 120, 0.05),
    "lens": ("eye", 85, 420, 200, 250, 0.05),
    "sclera": ("eye", 55, 480, 240, 300, 0.2),
    "calcification": ("calcification", 320, 210, 130, 150, 0.1),
    "oedema": ("oedema", 19, 500, 880, 930, 0.55),
    "rim": ("tumour rim", 43, 960, 690, 790, 6.0),
    "necrosis": ("necrosis", 15, 270, 1010, 430, 0.15),
}

# Tubes with (x, a, s, radius) at each knot; x > 0 and mirrored.
LATERAL_VENTRICLE = [(13, 32, 3, 3.5), (9, 23, 10, 5.5), (7.2, 8, 18, 5.2), (8.5, -10, 22.5, 5.0), (13, -27, 21, 6.0),
                     (23, -41, 11, 7.0), (26, -54, 6, 5.0), (23, -70, 4, 1.6)]  # fmt: skip
TEMPORAL_HORN = [(23, -41, 11, 6.5), (32, -36, -2, 4.0), (35, -24, -13, 2.6), (33, -11, -18, 2.2)]
CALLOSUM = [(12, -5, 2.0), (25, -4, 3.0), (31, 6, 5.0), (24, 19, 4.6), (2, 27, 3.4), (-20, 27, 3.4), (-36, 19, 4.6),
            (-40, 10, 5.6)]  # fmt: skip
CAUDATE = [(12.5, 20, 4, 5.5), (13.5, 12, 11, 6.0), (14.5, 0, 18, 4.2), (17, -14, 22.5, 3.0), (22, -28, 19, 2.2)]


def make_phantom(size: int = 128, *, seed: int = 0, tumour: bool = True) -> dict[str, Volume]:
    """One synthetic patient in five modalities on one grid.

    Args:
        size: voxels along each edge, 16 or more; the field of view is 224 mm, so the spacing is 224 / size mm.
        seed: varies the sulci, the asymmetry, the tumour's shape and the noise.
        tumour: a glioma-like mass in the left frontal lobe with oedema; ``False`` for a healthy head.

    Returns:
        ``"CT"`` (int16, HU), ``"T1"`` (after contrast), ``"T2"``, ``"FLAIR"`` (int16), ``"SPECT"`` (uint16, counts of
        a perfusion tracer) and ``"labels"`` (uint8, see :data:`LABELS`), each (size, size, size), axes in LPS with
        the middle of the field of view at the origin. The same arguments give the same bytes.

    Raises:
        InputError: ``size`` is not an integer of 16 or more, or ``seed`` is negative.
    """
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 16:
        raise InputError(f"the size of the phantom must be an integer of 16 or more, not {size!r}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"the seed of the phantom must be an integer of 0 or more, not {seed!r}")
    size, seed = int(size), int(seed)
    factor = -(-OVERSAMPLE_BELOW // size) if size < OVERSAMPLE_BELOW else 1
    scene = _Scene(size * factor)
    _paint_head(scene, np.random.default_rng([seed, 1]), tumour)
    ideal = dict(zip(MODALITIES, (_average(image, factor) for image in scene.images), strict=True))
    labels = np.ascontiguousarray(scene.labels[factor // 2 :: factor, factor // 2 :: factor, factor // 2 :: factor])
    arrays = _acquire(ideal, FIELD_OF_VIEW / size, np.random.default_rng([seed, 2]))
    spacing = (FIELD_OF_VIEW / size,) * 3
    origin = (-(FIELD_OF_VIEW - spacing[0]) / 2,) * 3
    volumes = {
        name: Volume(array, spacing=spacing, origin=origin, name=name, modality=MODALITIES[name])
        for name, array in arrays.items()
    }
    volumes["labels"] = Volume(labels, spacing=spacing, origin=origin, name="labels")
    return volumes


# --- signed distances: negative inside, anatomical units --------------------------------------------------------------


def _ellipsoid(p, centre, radii, turn=0.0):
    """First-order distance to an ellipsoid; ``turn`` rotates it in the axial plane, degrees."""
    x, a, s = (q - c for q, c in zip(p, centre, strict=True))
    if turn:
        cos, sin = np.float32(np.cos(np.deg2rad(turn))), np.float32(np.sin(np.deg2rad(turn)))
        x, a = cos * x + sin * a, cos * a - sin * x
    rx, ra, rs = (np.float32(r) for r in radii)
    u, v, w = x / rx, a / ra, s / rs
    level = np.sqrt(u * u + v * v + w * w)
    slope = np.sqrt((u / rx) ** 2 + (v / ra) ** 2 + (w / rs) ** 2)
    return level * (level - 1) / np.maximum(slope, 1e-6)


def _tube(p, knots):
    """Distance to a chain of cones with rounded ends; each knot is a position and a radius."""
    nearest = None
    for first, last in itertools.pairwise(np.asarray(knots, np.float32)):
        start, radius = first[:-1], first[-1]
        axis = last[:-1] - start
        offset = [q - c for q, c in zip(p, start, strict=True)]
        along = sum(o * k for o, k in zip(offset, axis, strict=True)) / float(axis @ axis)
        along = np.clip(along, 0, 1)
        square = sum((o - along * k) ** 2 for o, k in zip(offset, axis, strict=True))
        distance = np.sqrt(square) - (radius + along * (last[-1] - radius))
        nearest = distance if nearest is None else np.minimum(nearest, distance)
    return nearest


def _box(p, centre, half, rounding=2.0):
    q = [np.abs(v - c) - (h - rounding) for v, c, h in zip(p, centre, half, strict=True)]
    outside = np.sqrt(sum(np.maximum(v, 0) ** 2 for v in q))
    return outside + np.minimum(np.maximum(np.maximum(q[0], q[1]), q[2]), 0) - rounding


def _union(a, b, blend):
    """Smooth minimum: the union of two solids with a fillet of about ``blend``."""
    h = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return b + h * (a - b) - blend * h * (1 - h)


def _intersection(a, b, blend):
    return -_union(-a, -b, blend)


def _step(value, width):
    """0 below, 1 above, smooth over ``width`` around 0."""
    t = np.clip(value / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _bump(p, centre, width):
    square = sum(((q - c) / w) ** 2 for q, c, w in zip(p, centre, width, strict=True))
    return np.exp(-0.5 * square)


class _Waves:
    """Sum of plane waves of one wavelength in random directions: smooth band-limited noise of variance 1."""

    def __init__(self, rng, count, wavelength):
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = wavelength * rng.uniform(0.85, 1.2, size=(count, 1))
        self.k = (2 * np.pi * direction / length).astype(np.float32)
        self.phase = rng.uniform(0, 2 * np.pi, count).astype(np.float32)
        self.amplitude = np.float32(np.sqrt(2 / count))

    def value(self, p):
        return self.amplitude * sum(np.cos(self._angle(p, i)) for i in range(len(self.phase)))

    def value_and_gradient(self, p):
        value, gradient = 0.0, [0.0, 0.0, 0.0]
        for i, k in enumerate(self.k):
            angle = self._angle(p, i)
            value = value + np.cos(angle)
            slope = np.sin(angle)
            for axis in range(3):
                gradient[axis] = gradient[axis] - k[axis] * slope
        return self.amplitude * value, [self.amplitude * g for g in gradient]

    def _angle(self, p, i):
        return self.k[i, 0] * p[0] + self.k[i, 1] * p[1] + self.k[i, 2] * p[2] + self.phase[i]


# --- the scene --------------------------------------------------------------------------------------------------------


class _Scene:
    """Noise-free images of all modalities and the label map, painted structure after structure."""

    def __init__(self, size):
        self.size = size
        self.step = np.float32(FIELD_OF_VIEW / SCALE / size)
        grid = ((np.arange(size) + 0.5) / size - 0.5) * (FIELD_OF_VIEW / SCALE)
        # Axis 2 runs to the patient's left, axis 1 to the back (LPS), axis 0 up.
        self.axes = [(sign * grid + c).astype(np.float32) for sign, c in zip((1, -1, 1), CENTRE, strict=True)]
        self.images = np.empty((len(MODALITIES), size, size, size), np.float32)
        self.labels = np.zeros((size, size, size), np.uint8)
        self.white = np.zeros((size, size, size), np.float32)  # share of white matter, where oedema can spread
        self.everywhere = (slice(0, size),) * 3
        for image, value in zip(self.images, TISSUES["air"][1:], strict=True):
            image[...] = value

    def region(self, low, high):
        """Slices of the voxels between two corners (x, a, s)."""
        slices = []
        for axis, first, last in zip(self.axes, low, high, strict=True):
            inside = np.flatnonzero((axis >= first - self.step) & (axis <= last + self.step))
            slices.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0))
        return tuple(slices[::-1])

    def points(self, region=None):
        """Coordinates x (left), a (anterior), s (superior) of a region, as arrays that broadcast."""
        region = region or self.everywhere
        x, a, s = (axis[part] for axis, part in zip(self.axes, region[::-1], strict=True))
        return x[None, None, :], a[None, :, None], s[:, None, None]

    def coverage(self, distance):
        return np.clip(0.5 - distance / self.step, 0, 1)

    def paint(self, tissue, distance, region=None, weight=None):
        """Lay a tissue over what is there: where ``distance`` < 0, times ``weight`` (0 to 1)."""
        self.lay(tissue, self.coverage(distance) if weight is None else self.coverage(distance) * weight, region)

    def lay(self, tissue, cover, region=None):
        region = region or self.everywhere
        if min(part.stop - part.start for part in region) == 0:
            return
        label, *values = TISSUES[tissue]
        for image, value in zip(self.images, values, strict=True):
            part = image[region]
            part += cover * (np.float32(value) - part)
        share = self.white[region]
        share += cover * (np.float32(tissue == "white") - share)
        self.labels[region][np.broadcast_to(cover >= 0.5, self.labels[region].shape)] = LABELS[label]

    def both(self, tissue, shape, centre, reach, *args, weight=None):
        """Paint a structure of the left side and its mirror image; ``reach`` bounds it around ``centre``."""
        for side in (1, -1):
            middle = (side * centre[0], *centre[1:])
            region = self.region([c - r for c, r in zip(middle, reach, strict=True)],
                                 [c + r for c, r in zip(middle, reach, strict=True)])  # fmt: skip
            if min(part.stop - part.start for part in region) == 0:
                continue
            x, a, s = self.points(region)
            p = (side * x, a, s)
            self.paint(tissue, shape(p, *args), region, None if weight is None else weight(p))

    def ellipsoids(self, tissue, centre, radii, turn=0.0):
        reach = [max(radii[:2]) + 2] * 2 + [radii[2] + 2] if turn else [r + 2 for r in radii]
        self.both(tissue, _ellipsoid, centre, reach, centre, radii, turn)

    def tubes(self, tissue, knots):
        knots = np.asarray(knots, float)
        low, high = (knots[:, :3] - knots[:, 3:]).min(0), (knots[:, :3] + knots[:, 3:]).max(0)
        self.both(tissue, _tube, (low + high) / 2, (high - low) / 2 + 2, knots)


def _cranium(p):
    """Distance to the inner table of the skull and the spinal canal."""
    x, a, s = p
    side = (np.abs(x), a, s)
    vault = _ellipsoid(p, (0, -17, 19), (70.5, 91, 62))
    vault = _intersection(vault, -23.5 - s + 0 * x + 0 * a, 8)
    fossa = _ellipsoid(side, (42, -8, -20), (27, 44, 22))
    back = _ellipsoid(p, (0, -58, -33), (54, 44, 32.5))
    canal = _tube(p, [(0, -42, -50, 15), (0, -46, -75, 10), (0, -52, -160, 9)])
    return _union(_union(_union(vault, fossa, 12), back, 14), canal, 8)


def _paint_head(scene, rng, tumour):
    p = scene.points()
    x, a, s = p
    side = (np.abs(x), a, s)
    cranium = _cranium(p)
    low_waves = _Waves(rng, 6, 90.0)
    thickness = (
        5.6
        + 0.7 * low_waves.value(p)
        + 2.0 * _bump(p, (0, 75, 5), (35, 30, 25))
        + 3.5 * _bump(p, (0, -105, -15), (14, 20, 14))
        - 2.6 * _bump(side, (66, 0, -5), (20, 32, 22))
    )
    # Rings around the spinal canal, one for each vertebra.
    thickness -= _step(-76 - s, 16) * (2.2 + 2.6 * _step(np.abs(np.mod(s + 96, 18) - 9) - 5.5, 3) * _step(-84 - s, 8))
    skull = cranium - thickness

    face = _ellipsoid(p, (0, 27, -66), (60, 62, 66))
    chin = _ellipsoid(p, (0, 62, -114), (26, 27, 20))
    front = _union(_ellipsoid(p, (0, 58, -58), (50, 33, 40)), _ellipsoid(p, (0, 62, -92), (28, 33, 24)), 10)
    brow = _ellipsoid(p, (0, 68, -10), (46, 23, 20))
    neck = _tube(p, [(0, -32, -40, 48), (0, -40, -190, 50)])
    nose = _tube(p, [(0, 84, -22, 6), (0, 99, -53, 8), (0, 88, -64, 13)])
    scalp = 5.5 + 3.5 * _bump(side, (68, 18, -12), (20, 24, 26))
    head = _union(skull - scalp, _union(_union(_union(face, neck, 30), chin, 18), front, 14), 22)
    head = _union(head, brow, 12)
    head = _union(head, nose, 7)
    scene.paint("skin", head)
    subcutaneous = 2.2 + 0.6 * low_waves.value((a, s, x))
    scene.paint("fat", head + 1.8)
    deep = head + 1.8 + subcutaneous + 3.0 * _step(-40 - s, 60)
    scene.paint("muscle", deep)
    # Fat between the muscles of face and neck.
    planes = _Waves(rng, 9, 30.0)
    below = scene.region((-120, -140, -150), (120, 110, -38))
    x, a, s = scene.points(below)
    cover = scene.coverage(np.abs(planes.value((np.abs(x), a, 0.35 * s))) / 0.2 - 0.6) * _step(-44 - s, 10)
    scene.lay("fat", 0.6 * cover * scene.coverage(deep[below] + 1), below)
    del face, chin, front, brow, neck, nose, scalp, head, subcutaneous, deep
    _paint_ears(scene)
    _paint_face(scene)
    scene.paint("cortical bone", skull)
    # Diploe lies between two tables of cortical bone; where the skull is thin the tables meet.
    marrow = np.abs(cranium - 0.47 * thickness) - (0.5 * thickness - 1.75)
    scene.paint("diploe", marrow)
    del marrow, skull, thickness
    _paint_skull_base(scene, rng)
    scene.paint("dura", cranium)
    scene.paint("CSF", cranium + 1.0)
    del cranium
    _paint_brain(scene, rng, tumour)


def _paint_ears(scene):
    def pinna(p):
        shell = np.abs(_ellipsoid(p, (77, -27, -38), (10, 17, 28))) - 1.9
        return np.maximum(shell, 76 - p[0] + 0.25 * (p[1] + 27))

    scene.both("skin", pinna, (78, -27, -38), (16, 22, 34))


def _paint_face(scene):
    # Jaws, teeth, tongue, airway, vertebrae.
    def arch(p, middle, half_width, length, half_height, thick):
        x, a, s = p
        ring = _ellipsoid((x, a, 0 * s), (0, middle[0], 0), (half_width, length, 1e3))
        wall = (np.sqrt((ring / thick) ** 2 + ((s - middle[1]) / half_height) ** 2) - 1) * thick
        return np.maximum(wall, middle[0] - a)

    def teeth(p):
        x, a, _ = p
        angle = np.arctan2(x, a - 34)
        gap = 0.8 * np.abs(np.cos(9 * angle)) - 0.35
        return arch(p, (34, -93), 25, 39, 9, 3.3) - gap

    whole = (0, 40, -95)
    scene.both("fat", _ellipsoid, (45, 40, -75), (14, 20, 18), (45, 40, -75), (12, 18, 16))
    scene.both("cortical bone", arch, (22, 40, -114), (25, 46, 18), (22, -114), 40, 50, 12, 5.0)
    scene.both("diploe", arch, (22, 40, -114), (25, 46, 18), (22, -114), 40, 50, 9.5, 2.8)
    scene.tubes("cortical bone", [(42, 16, -118, 5), (49, 4, -92, 4.5), (51, 0, -56, 4)])
    scene.tubes("diploe", [(42, 16, -116, 2.8), (49, 4, -92, 2.2), (51, 0, -62, 1.6)])
    scene.both("cortical bone", arch, (12, 40, -84), (18, 42, 12), (34, -82), 25, 39, 6, 4.5)
    scene.both("tooth", teeth, (14, 45, -93), (20, 40, 13))
    region = scene.region([whole[0] - 26, 4, -118], [26, 76, -82])
    scene.paint("muscle", _ellipsoid(scene.points(region), (0, 38, -101), (20, 30, 14)), region)
    scene.tubes("cavity", [(0, 8, -62, 8), (0, 0, -88, 7), (0, -3, -160, 7.5)])
    scene.both("cortical bone", _box, (0, 48, -79), (26, 34, 6), (0, 48, -79), (22, 30, 2.4), 1.0)

    low, high = [-20, -42, -150], [20, -14, -80]
    region = scene.region(low, high)
    x, a, s = scene.points(region)
    level = np.mod(s + 96, 18) - 9 + 0 * s
    body = _box((x, a, level), (0, -30, 0), (13, 9, 7.5), 3.0)
    body = np.maximum(body, s + 84)
    scene.paint("cortical bone", body, region)
    scene.paint("diploe", body + 1.6, region)
    scene.tubes("cortical bone", [(0, -66, -92, 4), (0, -84, -97, 5)])
    scene.tubes("cortical bone", [(0, -66, -112, 4), (0, -86, -118, 5)])
    scene.tubes("cortical bone", [(16, -40, -80, 7), (25, -42, -80, 6)])  # lateral mass of the atlas

    scene.tubes("dura", [(26, -16, -48, 2.6), (33, -10, -90, 3.4), (30, -18, -160, 3.6)])
    scene.tubes("dura", [(22, -8, -48, 2.0), (26, -2, -90, 2.6), (23, -10, -160, 2.8)])

    # Cheek bone, nasal cavity, sinuses, orbits.
    scene.tubes("cortical bone", [(40, 66, -54, 5), (58, 48, -50, 4), (67, 24, -47, 2.8), (67, 4, -45, 3)])
    scene.tubes("cortical bone", [(20, 78, -18, 4), (38, 74, -19, 4), (48, 62, -30, 3.6), (46, 62, -46, 4)])
    scene.ellipsoids("cortical bone", (27, 52, -66), (16, 21, 18))
    scene.ellipsoids("mucosa", (27, 52, -66), (14.4, 19.4, 16.4))
    scene.ellipsoids("cavity", (27, 52, -66), (13.4, 18.4, 15.4))
    scene.tubes("cortical bone", [(4, 80, -24, 3.5), (5, 88, -40, 2.6)])
    scene.both("mucosa", _box, (0, 53, -60), (16, 34, 20), (0, 53, -60), (13, 31, 17), 6.0)

    def passage(p):
        hollow = _box(p, (0, 55, -60), (11.5, 31, 16), 6.0)
        septum = 1.4 - np.abs(p[0])
        turbinates = [3.0 - np.hypot(p[0] - q[0], (p[2] - q[1]) * 0.75) + 0 * p[1] for q in ((7.2, -69), (6.6, -58))]
        return np.maximum(np.maximum(hollow, septum), np.maximum(*turbinates))

    scene.both("cavity", passage, (0, 53, -60), (16, 36, 20))

    def ethmoid(p):
        block = _box(p, (0, 44, -36), (12.5, 24, 12), 4.0)
        cells = 0.75 - 2.2 * np.abs(np.sin(p[0] * 0.5 + 0.3) * np.sin(p[1] * 0.42) * np.cos(p[2] * 0.3 + 10.8)) ** 0.5
        return block, np.maximum(block + 1.5, cells)

    scene.both("cortical bone", lambda p: ethmoid(p)[0], (0, 44, -36), (15, 27, 15))
    scene.both("cavity", lambda p: ethmoid(p)[1], (0, 44, -36), (15, 27, 15))

    def orbit(p):
        return _tube(p, [(11, 16, -30, 4), (26, 46, -36, 15), (31, 60, -37, 17)])

    box = ((25, 45, -36), (27, 42, 24))
    scene.both("cortical bone", lambda p: np.maximum(orbit(p) - 2.2, p[1] - 68), *box)
    scene.both("fat", lambda p: np.maximum(orbit(p), p[1] - 76), *box)
    scene.both("skin", lambda p: np.maximum(np.maximum(orbit(p) + 1.0, p[1] - 80), 73 - p[1]), *box)
    apex = (14, 22, -31)
    for end, bulge in (((19, 56, -37), 2.4), ((44, 55, -37), 2.0), ((31, 56, -25), 2.0), ((31, 56, -49), 2.0)):
        middle = [(u + v) / 2 for u, v in zip(apex, end, strict=True)]
        scene.tubes("muscle", [(*apex, 1.2), (*middle, bulge), (*end, 1.0)])
    scene.tubes("white", [(31, 48, -37, 1.9), (22, 34, -34, 1.9), (11, 16, -29, 2.0)])
    scene.ellipsoids("sclera", (31.5, 62, -37), (13, 13, 13))
    scene.ellipsoids("vitreous", (31.5, 62, -37), (11.9, 11.9, 11.9))
    scene.ellipsoids("lens", (31.7, 70.5, -37), (4.6, 2.3, 4.6))


def _paint_skull_base(scene, rng):
    scene.ellipsoids("cortical bone", (22, 63, -15), (28, 14, 6))  # roof of the orbit
    scene.ellipsoids("diploe", (22, 63, -15), (26, 12, 4))
    scene.ellipsoids("cortical bone", (11, 77, -8), (18, 8.5, 19))
    scene.ellipsoids("cavity", (10, 77.5, -9), (9.5, 4.4, 12.5))
    scene.ellipsoids("cavity", (22, 75, -13), (6, 3.2, 6))
    scene.tubes("cortical bone", [(0, 22, -38, 13), (0, 2, -40, 10), (0, -12, -52, 6), (0, -26, -66, 4.5)])
    scene.tubes("diploe", [(0, -2, -42, 6), (0, -12, -52, 4), (0, -25, -65, 2.5)])
    scene.ellipsoids("cavity", (7.2, 17, -38), (6.3, 11, 9))
    scene.tubes("cortical bone", [(10, 20, -24, 3), (30, 28, -21, 3), (48, 26, -16, 3)])  # sphenoid ridge
    scene.tubes("petrous bone", [(14, -8, -43, 4), (30, -22, -38, 8.5), (52, -36, -36, 11)])
    scene.tubes("CSF", [(19, -24, -36, 2.2), (29, -26, -36, 2.0)])  # internal auditory canal
    scene.ellipsoids("cavity", (46, -24, -41), (3, 5, 5))  # middle ear
    scene.tubes("cavity", [(48, -25, -42, 3), (84, -27, -42, 3.6)])
    scene.ellipsoids("cortical bone", (57, -44, -48), (12, 16, 20))
    cells = _Waves(rng, 12, 6.5)

    def air(p):
        return np.maximum(_ellipsoid(p, (57, -44, -48), (10, 13, 17)), 1.1 - 2.6 * np.abs(cells.value(p)))

    scene.both("cavity", air, (57, -44, -48), (13, 17, 21))
    scene.ellipsoids("vein", (0, 2, -31), (6, 5, 4))  # pituitary gland in its fossa


# --- the brain --------------------------------------------------------------------------------------------------------


def _cerebrum(p):
    """Distance to the envelope of the cerebral hemispheres, without the fissures."""
    x, a, s = p
    side = (np.abs(x), a, s)
    hull = _ellipsoid(p, (0, -17, 19), (67.5, 88, 59))
    tent = 3 - 0.34 * np.abs(x)
    floor = -21 + (tent + 21) * _step(-36 - a, 22)
    hull = _intersection(hull, floor - s, 7)
    temporal = _ellipsoid(side, (43, -11, -20), (23.5, 43, 20.5))
    return _union(hull, temporal, 7)


def _deform(p, depth, rng, centre):
    """The brain's own coordinates: slightly asymmetric, and pushed aside around a tumour at ``centre``."""
    waves = [_Waves(rng, 4, 75.0) for _ in range(3)]
    fade = _step(depth - 9, 18)
    moved = [q + 1.3 * fade * wave.value(p) for q, wave in zip(p, waves, strict=True)]
    if centre is None:
        return moved
    offset = [q - c for q, c in zip(p, centre, strict=True)]
    radius = np.sqrt(sum(o * o for o in offset))
    # The mass came from a point: what lies at distance r in the patient lay nearer to it before.
    push = fade * 6.5 * np.exp(-(((radius - 14) / 17) ** 2)) / np.maximum(radius, 6)
    return [m - o * push for m, o in zip(moved, offset, strict=True)]


def _sulci(p, side, rng):
    """Distance to the sheets of the sulci of one hemisphere, in anatomical units, at points ``p``."""
    waves, warp = _Waves(rng, 28, SULCAL_WAVELENGTH), _Waves(rng, 8, 38.0)
    centre, radii = (side * 29.0, -17.0, 12.0), (36.0, 84.0, 58.0)
    unit = [(q - c) / r for q, c, r in zip(p, centre, radii, strict=True)]
    length = np.maximum(np.sqrt(sum(u * u for u in unit)), 0.05)
    offset = [q - c for q, c in zip(p, centre, strict=True)]
    # Along a ray from the middle of the hemisphere the pattern hardly changes: the sheets stand upright.
    lift = np.float32(0.75)
    shrink = length**-lift
    surface = [o * shrink for o in offset]
    bend = 3.0 * warp.value(surface)
    value, slope = waves.value_and_gradient([surface[0] + bend, surface[1] - bend, surface[2] + bend])
    norm = np.maximum(sum(o * o for o in offset), 1e-3)
    radial = sum(g * o for g, o in zip(slope, offset, strict=True)) / norm
    steepness = np.sqrt(sum((g - lift * radial * o) ** 2 for g, o in zip(slope, offset, strict=True))) * shrink
    # Exact for a sine of this wave number; the plain quotient of value and slope is not bounded at a saddle.
    number = 2 * np.pi / SULCAL_WAVELENGTH * np.sqrt(2 / 3) * shrink
    return np.arctan2(np.abs(value), steepness / number) / number


def _paint_brain(scene, rng, tumour):
    region = scene.region((-72, -110, -75), (72, 76, 84))
    plain = scene.points(region)
    dura = _cranium(plain)
    depth = np.minimum(-_cerebrum(plain), -2.2 - dura)
    centre = (34.0 + rng.uniform(-2, 2), 12.0 + rng.uniform(-6, 6), 27.0 + rng.uniform(-3, 3)) if tumour else None
    shape_rng, fold_rng, tumour_rng = rng.spawn(3)
    p = x, a, s = _deform(plain, depth, shape_rng, centre)
    side = (np.abs(x), a, s)

    # Interhemispheric fissure: the midline, except where callosum and diencephalon join the hemispheres.
    core = -_ellipsoid((0 * x, a, s), (0, -4, 3), (1e3, 37, 25))
    core = np.maximum(core, -_box((0 * x, a, s), (0, -14, -10), (1e3, 24, 20), 8.0))
    fissure = np.hypot(x, np.maximum(core, 0))
    # Sylvian fissure: from below the frontal lobe backwards and upwards, as deep as the insula.
    plane = (s - (-9 + 0.55 * np.clip(22 - a, 0, 62)) + 2.5 * np.sin(0.16 * a)) * 0.9
    lateral = np.hypot(np.maximum(39 - side[0], 0), np.maximum(-42 - a, 0))
    lateral = np.hypot(lateral, np.maximum(a - 30, 0))
    sylvian = np.sqrt(plane * plane + lateral * lateral) - 0.9
    insula = np.hypot(np.maximum(np.abs(s - 2 - 0.1 * a) - 11, 0), np.maximum(np.abs(a - 2) - 18, 0))
    sylvian = np.minimum(sylvian, np.hypot(insula, side[0] - 40.5 + 0.011 * (a - 2) ** 2) - 0.6)

    crown = np.minimum(depth, fissure - 0.6)
    envelope = _union(crown, sylvian, 2.5)
    inside = depth > -2 * scene.step
    sheets = np.full(depth.shape, 50, np.float32)
    for half in (1, -1):
        chosen = inside & (x * half >= 0) & (crown < 26)
        sheets[chosen] = _sulci([q[chosen] for q in np.broadcast_arrays(*p)], half, fold_rng)
    variation = _Waves(fold_rng, 5, 45.0)
    reach = np.full(depth.shape, 17, np.float32)
    reach[inside] += 3.5 * variation.value([q[inside] for q in np.broadcast_arrays(*p)])
    bottom = np.maximum(np.minimum(depth - reach, fissure - 0.6 * reach), 0)
    half_width = np.clip(1.0 - 0.035 * crown, 0.3, 1)
    pial = _union(envelope, np.hypot(sheets, bottom) - half_width, 2.4)
    # A sulcus thinner than a voxel fills no more of it than its width.
    fluid = np.minimum(scene.coverage(pial + 0.2), np.maximum(2 * half_width / scene.step, scene.coverage(envelope)))
    cortex = (1 - fluid) * scene.coverage(-depth)
    white = scene.coverage(2.8 - pial)
    del sheets, bottom, half_width, fluid, variation, plane, lateral, insula
    scene.lay("grey", cortex, region)
    scene.lay("white", white * cortex, region)
    del cortex, white

    _paint_falx(scene, region, plain, dura, x, core)
    _paint_centre(scene, region, p)
    _paint_hindbrain(scene, region, p, dura, fold_rng)
    _paint_ventricles(scene, region, p)
    if tumour:
        _paint_tumour(scene, region, centre, crown, tumour_rng)


def _paint_falx(scene, region, plain, dura, x, core):
    cranium = -dura
    _, a, s = plain
    upper = _step(s - 0.25 * (-a - 40), 8) * _step(s + 12, 8)
    sheet = np.maximum(np.abs(x) - 0.7, core + 7)
    scene.paint("dura", np.maximum(sheet, -cranium), region, weight=upper)
    sinus = np.hypot(plain[0] * 0.8, cranium - 1.5) - 3.2
    scene.paint("vein", np.maximum(sinus, a - 60), region, weight=upper)
    # Tentorium, with the straight sinus in its ridge.
    tent = s - (1.5 - 0.34 * np.abs(plain[0])) + 0 * a
    leaf = np.maximum(np.abs(tent) - 0.6, -cranium)
    edge = np.hypot(plain[0] / 24, (a + 26) / 24)
    scene.paint("dura", np.maximum(leaf, (1 - edge) * 20), region, weight=_step(-30 - a, 6))


def _paint_centre(scene, region, p):
    """Corpus callosum, basal ganglia, thalamus and the cisterns below them."""
    x, a, s = p
    side = (np.abs(x), a, s)
    scene.paint("CSF", _ellipsoid(p, (0, 2, -19), (14, 13, 8)), region)
    scene.paint("CSF", _ellipsoid(p, (0, -26, -13), (20.5, 20, 14)), region)
    scene.paint("CSF", _ellipsoid(p, (0, -44, 0), (8, 7, 8)), region)
    arch = _tube((a, s - 0.02 * x * x), CALLOSUM)
    scene.paint("white", np.maximum(arch, side[0] - 17), region)
    scene.paint("nucleus", _ellipsoid(side, (11, -18, 7), (8.5, 15, 9.5), -18), region)
    scene.paint("nucleus", _tube(side, CAUDATE), region)
    scene.paint("nucleus", _ellipsoid(side, (27, 2, 2), (5.5, 16, 9.5), 12), region)
    scene.paint("pallidum", _ellipsoid(side, (20, -2, 0), (4.2, 9, 6.5), 20), region)
    scene.paint("nucleus", _tube(side, [(28, -10, -20, 6), (32, -26, -13, 4.5), (27, -36, -4, 3)]), region)
    scene.paint("white", _tube((a, s, x), [(8, -16, 0, 3), (0, -15, 0, 3)]), region)


def _paint_hindbrain(scene, region, p, dura, rng):
    x, a, s = p
    side = (np.abs(x), a, s)
    scene.paint("brainstem", _tube(side, [(8, -14, -8, 6), (7, -20, -20, 7)]), region)
    scene.paint("brainstem", _tube(p, [(0, -27, -4, 10), (0, -28, -20, 11)]), region)
    scene.paint("nucleus", _ellipsoid(side, (5, -20, -10), (2.8, 3.0, 4)), region)
    scene.paint("brainstem", _ellipsoid(p, (0, -25, -32), (17, 12, 13.5)), region)
    scene.paint("brainstem", _tube(side, [(8, -30, -34, 9), (22, -46, -36, 8)]), region)
    stem = [(0, -33, -40, 10), (0, -39, -56, 7.5), (0, -45, -78, 6), (0, -52, -160, 5.5)]
    scene.tubes("brainstem", stem[:3])
    scene.tubes("cord", stem[2:])

    lobes = _ellipsoid(side, (23, -64, -34), (30, 35, 28))
    lobes = _union(lobes, _ellipsoid(p, (0, -61, -29), (14, 30, 29)), 5)
    lobes = _intersection(lobes, s - (-1.0 - 0.34 * side[0]), 3)
    lobes = _intersection(lobes, dura + 2.2, 3)
    inner = -lobes
    # Folia: fissures that fan out from the middle, finer than the grid of a small phantom and fading there.
    up, back = s + 36 - 0.4 * side[0], 43 - 0.35 * side[0] + a
    angle, reach = np.arctan2(up, -back), np.hypot(up, back)
    waver = _Waves(rng, 5, 30.0)
    inside = inner > -2 * scene.step
    phase = 15 * angle
    phase[inside] += 1.2 * waver.value([q[inside] for q in np.broadcast_arrays(*p)])
    folia = np.abs(np.sin(phase)) * np.maximum(reach, 3) / 15
    scene.paint("cerebellar cortex", lobes, region)
    groove = scene.coverage(folia - 0.35) * _step(12 - inner, 8) * scene.coverage(-inner)
    scene.lay("CSF", 0.75 * groove, region)
    white = np.minimum(folia - 1.5 + 0.10 * np.maximum(inner - 6, 0), inner - 3.2)
    scene.paint("cerebellar white", -white, region)
    scene.paint("nucleus", _ellipsoid(side, (14, -56, -37), (6, 4, 3.5), 25), region, weight=np.float32(0.6))


def _paint_ventricles(scene, region, p):
    x, a, s = p
    side = (np.abs(x), a, s)
    lateral = np.minimum(_tube(side, LATERAL_VENTRICLE), _tube(side, TEMPORAL_HORN))
    scene.paint("CSF", np.maximum(lateral, 1.0 - side[0]), region)
    third = _ellipsoid(p, (0, -12, 0), (2.6, 15, 11))
    third = np.maximum(third, 3.6 - np.hypot(a + 14, s - 4) + 0 * x)  # interthalamic adhesion
    scene.paint("CSF", third, region)
    scene.paint("CSF", _tube(p, [(0, -27, -2, 1.3), (0, -34, -20, 1.3), (0, -40, -27, 1.6)]), region)
    scene.paint("CSF", _ellipsoid(p, (0, -42, -34), (7, 4.5, 9)), region)
    scene.paint("plexus", _tube(side, [(12, -24, 18, 1.2), (22, -41, 11, 3.2), (29, -37, 1, 1.2)]), region)
    scene.paint("calcification", _ellipsoid(side, (22, -42, 11), (2.4, 3.0, 2.4)), region)
    scene.paint("nucleus", _ellipsoid(p, (0, -33, 2), (3.4, 4.6, 3.2)), region)
    scene.paint("calcification", _ellipsoid(p, (0, -33.5, 2), (1.9, 2.6, 1.8)), region)


def _paint_tumour(scene, region, centre, crown, rng):
    """A ring-enhancing mass; its oedema spreads through white matter and spares the cortex."""
    low, high = [c - 46 for c in centre], [c + 46 for c in centre]
    box = scene.region(low, high)
    # The neighbourhood in coordinates of the brain's region, whose arrays are cut to it.
    cut = tuple(slice(max(b.start - r.start, 0), min(b.stop, r.stop) - r.start)
                for b, r in zip(box, region, strict=True))  # fmt: skip
    box = tuple(slice(r.start + c.start, r.start + c.stop) for c, r in zip(cut, region, strict=True))
    p = scene.points(box)
    white, crown = scene.white[box].copy(), crown[cut]
    coarse, fine, spread = _Waves(rng, 10, 22.0), _Waves(rng, 12, 9.0), _Waves(rng, 8, 30.0)
    lobes = coarse.value(p)
    ball = _ellipsoid(p, centre, (15.5, 18.5, 16), 20)
    mass = ball + 2.2 * lobes + 0.6 * fine.value(p)
    oedema = ball - 15 + 6.0 * spread.value(p)
    cover = _step(-oedema, 9) * white * 0.95
    scene.lay("oedema", cover, box)
    mass = np.maximum(mass, 1.5 - crown)
    scene.paint("rim", mass, box)
    wall = 3.8 + 1.1 * spread.value((p[2], p[0], p[1]))
    core = mass + np.maximum(wall, 1.6)
    scene.paint("necrosis", core, box)
    speck = (centre[0] + 6, centre[1] - 9, centre[2] + 1)
    grain = np.minimum(_ellipsoid(p, speck, (2.6, 3.4, 2.6)),
                       _ellipsoid(p, (speck[0] - 7, speck[1] - 3, speck[2] + 3), (1.5, 1.5, 1.5)))  # fmt: skip
    scene.paint("calcification", grain, box)


# --- the scanners -----------------------------------------------------------------------------------------------------


def _average(image, factor):
    if factor == 1:
        return image
    n = image.shape[0] // factor
    return image.reshape(n, factor, n, factor, n, factor).mean(axis=(1, 3, 5), dtype=np.float32)


def _blur(image, fwhm, spacing):
    """Gaussian of full width at half maximum ``fwhm`` mm."""
    import SimpleITK as sitk

    picture = sitk.GetImageFromArray(image)
    picture.SetSpacing((spacing,) * 3)
    return sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(picture, fwhm / 2.3548))


def _normal(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _acquire(ideal, spacing, rng):
    """Measured images: CT noise, MR bias field and Rician noise, SPECT blur and Poisson counts."""
    shape = ideal["CT"].shape
    noise = _normal(rng, shape) * 4
    arrays = {"CT": np.clip(np.rint(ideal["CT"] + noise), -1024, 3071).astype(np.int16)}
    u = np.linspace(-1, 1, shape[0], dtype=np.float32)
    for name in ("T1", "T2", "FLAIR"):
        tilt = rng.uniform(-0.05, 0.05, 3).astype(np.float32)
        bias = 1 + tilt[0] * u[None, None, :] + tilt[1] * u[None, :, None] + tilt[2] * u[:, None, None]
        bias = bias - 0.06 * (u[None, None, :] ** 2 + u[None, :, None] ** 2 + u[:, None, None] ** 2)
        # Rician: the magnitude of a complex signal with Gaussian noise in both channels.
        signal = np.hypot(ideal[name] * bias + 13 * _normal(rng, shape), 13 * _normal(rng, shape))
        arrays[name] = np.clip(np.rint(signal), 0, 4095).astype(np.int16)
    counts = np.maximum(_blur(ideal["SPECT"], 8.0, spacing), 0) * 60 + 0.4
    arrays["SPECT"] = np.minimum(rng.poisson(counts), 65535).astype(np.uint16)
    return arrays
