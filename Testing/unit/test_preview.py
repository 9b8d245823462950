"""The preview picture: exact pixels, orientation, proportions, atomic writing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ClinicalFMambaLib import NOTICE
from ClinicalFMambaLib.errors import InputError, OutputError
from ClinicalFMambaLib.preview import (
    IDENTITY,
    colourise,
    informative_centre,
    patient_axes,
    plane,
    save_preview,
    to_uint8,
)

FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)  # RAS
SAGITTAL = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)  # image x to the back, y down, z to the left


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape).astype(np.uint8)


def read(path):
    return np.asarray(Image.open(path))


def find(sheet, picture):
    """Upper left corner of ``picture`` in ``sheet``, or None."""
    height, width = picture.shape[:2]
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    rows, columns = sheet.shape[0] - height + 1, sheet.shape[1] - width + 1
    starts = np.argwhere((sheet[:rows, :columns] == picture[0, 0]).all(-1))
    for y, x in starts:
        if np.array_equal(sheet[y : y + height, x : x + width], picture):
            return y, x
    return None


def enlarged(picture, factor):
    return np.repeat(np.repeat(picture, factor, 0), factor, 1)


def test_volume_shows_the_exact_slices_in_three_rows(tmp_path):
    a, b = noise((64, 64, 64), 1), noise((64, 64, 64), 2)
    path = save_preview(tmp_path / "new" / "p.png", [("A", a / 255), ("B", b)], centre=(10, 20, 30), title="T")
    sheet = read(path)
    corners = {}
    for name, volume in (("A", a), ("B", b)):
        cuts = volume[10], volume[::-1, 20], volume[::-1, :, 30]
        corners[name] = [find(sheet, enlarged(cut, 4)) for cut in cuts]
        assert None not in corners[name]
    for left, right in zip(corners["A"], corners["B"], strict=True):
        assert left[0] == right[0]
        assert right[1] >= left[1] + 256
    assert corners["A"][0][0] + 256 <= corners["A"][1][0]
    assert corners["A"][1][0] + 256 <= corners["A"][2][0]
    assert (sheet[corners["A"][0][0] - 2] == 0).all()


def test_colour_panel(tmp_path):
    colour = noise((64, 64, 64, 3))
    sheet = read(save_preview(tmp_path / "p.png", [("C", colour)], centre=(5, 6, 7)))
    assert find(sheet, enlarged(colour[5], 4)) is not None
    assert find(sheet, enlarged(colour[::-1, 6], 4)) is not None


@pytest.mark.parametrize("direction", [IDENTITY, FLIPPED, SAGITTAL])
@pytest.mark.parametrize("name", ["axial", "coronal", "sagittal"])
def test_orientation_does_not_depend_on_the_storage(direction, name):
    # One voxel each at the patient's left, back and top; seen at the same places whatever the array's order.
    size = 9
    matrix = np.reshape(direction, (3, 3))
    array = np.zeros((size,) * 3, np.float32)
    for value, towards in ((1.0, (1, 0, 0)), (0.7, (0, 1, 0)), (0.4, (0, 0, 1))):
        index = 4 + 3 * (matrix.T @ towards)
        array[tuple(int(i) for i in index[::-1])] = value
    picture, _ = plane(array, name, 4, (1, 1, 1), direction)
    expected = {
        "axial": {(4, 7): 1.0, (7, 4): 0.7},
        "coronal": {(4, 7): 1.0, (1, 4): 0.4},
        "sagittal": {(4, 7): 0.7, (1, 4): 0.4},
    }[name]
    assert {tuple(map(int, p)): round(float(picture[tuple(p)]), 1) for p in np.argwhere(picture)} == expected


def test_flipped_grid_gives_the_same_picture(tmp_path):
    array = noise((40, 40, 40))
    first = read(save_preview(tmp_path / "a.png", [("A", array)], centre=(10, 12, 14)))
    mirrored = array[:, ::-1, ::-1]
    second = read(save_preview(tmp_path / "b.png", [("A", mirrored)], centre=(10, 27, 25), direction=FLIPPED))
    np.testing.assert_array_equal(first, second)


def test_oblique_direction_uses_each_axis_once():
    angle = np.deg2rad(46)
    matrix = [np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1]
    assert sorted(axis for axis, _ in patient_axes(matrix)) == [0, 1, 2]


def test_anisotropic_voxels_keep_their_proportions(tmp_path):
    # 300 mm x 240 mm x 120 mm in slices of 6 mm.
    array = np.full((20, 240, 300), 255, np.uint8)
    sheet = read(save_preview(tmp_path / "p.png", [("A", array)], (1.0, 1.0, 6.0), footer="", centre=(9, 100, 100)))
    white = (sheet == 255).all(-1)
    full = np.array([np.sum(row) for row in white])
    runs = [(int(n), int((full == n).sum())) for n in (300, 240)]
    assert runs == [(300, 240 + 120), (240, 120)]


@pytest.mark.parametrize(("shape", "factor"), [((1, 256, 256), 1), ((1, 100, 60), 3), ((1, 300, 400), 1)])
def test_image_is_one_row_at_full_resolution(tmp_path, shape, factor):
    a, b = noise(shape, 1), noise((*shape, 3), 2)
    sheet = read(save_preview(tmp_path / "p.png", [("A", a), ("B", b)], (0.3, 9.0, 2.0)))
    assert find(sheet, enlarged(a[0], factor)) is not None
    assert find(sheet, enlarged(b[0], factor)) is not None
    assert sheet.shape[0] < shape[1] * factor + 120


def test_footer_and_titles_are_drawn(tmp_path):
    array = np.zeros((1, 256, 256), np.uint8)
    bare = read(save_preview(tmp_path / "a.png", [("", array)], footer=""))
    full = save_preview(tmp_path / "b.png", [("CT", array)], title="Patient")
    assert bare.max() == 0
    sheet = read(full)
    assert sheet[:70].max() > 150
    assert sheet[-28:].max() > 100
    assert Image.open(full).text["Disclaimer"] == NOTICE


def test_same_input_same_bytes(tmp_path):
    panels = [("A", noise((12, 13, 14)))]
    first, second = (save_preview(tmp_path / name, panels).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


def test_informative_centre_finds_the_structure():
    array = np.zeros((40, 50, 60), np.float32)
    array[8:14, 30:36, 44:50] = noise((6, 6, 6)) / 255
    assert np.abs(np.subtract(informative_centre([array]), (11, 33, 47))).max() <= 4
    assert informative_centre([np.zeros((4, 6, 8))]) == (2, 3, 4)


def test_to_uint8():
    np.testing.assert_array_equal(to_uint8([-1, 0, 0.5, 1, 2, np.nan, np.inf]), [0, 0, 128, 255, 255, 0, 0])


def test_colourise():
    hot = colourise(np.linspace(0, 1, 256))
    assert hot.shape == (256, 3) and hot.dtype == np.uint8
    assert hot[0].tolist() == [0, 0, 0] and hot[-1].tolist() == [255, 255, 255]
    luma = hot @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) >= 0).all()
    assert hot[96][0] == 255 and hot[96][2] == 0
    rainbow = colourise(np.array([[0.15, 0.5, 0.85]]), "rainbow")
    assert rainbow.shape == (1, 3, 3)
    assert rainbow.argmax(-1).tolist() == [[2, 1, 0]]
    assert colourise(np.nan).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="hot or rainbow"):
        colourise(np.zeros(2), "jet")


@pytest.mark.parametrize(
    ("panels", "options", "message"),
    [
        ([], {}, "at least one panel"),
        ([("A", np.zeros((4, 4)))], {}, "must be"),
        ([("A", np.zeros((4, 4, 4, 2)))], {}, "must be"),
        ([("A", np.zeros((4, 4, 4))), ("B", np.zeros((4, 4, 5)))], {}, "'B'"),
        ([("A", np.zeros((4, 4, 4)))], {"spacing": (1, 0, 1)}, "spacing"),
        ([("A", np.zeros((4, 4, 4)))], {"centre": (4, 0, 0)}, "centre"),
        ([("A", np.zeros((4, 4, 4)))], {"direction": (0,) * 9}, "direction"),
    ],
)
def test_bad_input_leaves_no_file(tmp_path, panels, options, message):
    with pytest.raises(InputError, match=message):
        save_preview(tmp_path / "p.png", panels, **options)
    assert not list(tmp_path.iterdir())


def test_unwritable_place_leaves_no_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "p.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot write the preview"):
            save_preview(path, [("A", np.zeros((1, 8, 8)))])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
