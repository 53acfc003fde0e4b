import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from group_sampling.data.images import read_image
from group_sampling.data.records import (
    CLIPPED,
    FAR,
    INVERTED,
    NON_FINITE,
    OUTSIDE,
    ZERO_AREA,
    DataReport,
    ImageRecord,
    ImageRoot,
    UnreadableImageError,
    far_outside,
    usable_boxes,
)


def record(path, size=None):
    height, width = size if size is not None else (None, None)
    boxes = np.zeros((0, 4), np.float32)
    return ImageRecord(str(path), "x", height, width, boxes, np.zeros(0, np.int64), np.zeros(0, bool))


def gradient(height=6, width=9):
    return (np.arange(height * width * 3, dtype=np.uint8) * 5).reshape(height, width, 3)


def test_read_image_returns_the_pixels(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    image = read_image(record(tmp_path / "a.png", (6, 9)))
    assert image.dtype == np.uint8 and image.flags.writeable
    assert np.array_equal(image, gradient())


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "F"])
def test_read_image_converts_every_mode_to_rgb(tmp_path, mode):
    image = Image.new(mode, (9, 6))
    image.save(tmp_path / ("a.tif" if mode in ("CMYK", "I;16", "F") else "a.png"))
    (path,) = tmp_path.iterdir()
    assert read_image(record(path)).shape == (6, 9, 3)


# EXIF orientation -> where the stored image's top-left corner is shown, as an index of the upright array.
@pytest.mark.parametrize(
    "orientation, corner",
    [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)), (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))],
)
def test_read_image_turns_by_exif(tmp_path, orientation, corner):
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(record(tmp_path / "a.png"))
    assert image.shape == ((9, 6, 3) if orientation >= 5 else (6, 9, 3))
    assert image[corner].tolist() == [255, 255, 255] and image.sum() == 3 * 255


def _write_bad(path, kind):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path, format="PNG")
    content = path.read_bytes()
    if kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "damaged":
        path.write_bytes(content[:60] + bytes(200) + content[260:])
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "damaged", "missing", "folder"])
def test_unreadable_images_name_file_and_reason(tmp_path, kind):
    path = tmp_path / "bad.png"
    _write_bad(path, kind)
    with pytest.raises(UnreadableImageError, match=r"cannot read image .*bad\.png: ") as error:
        read_image(record(path))
    assert error.value.file == str(path) and error.value.reason
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.file, again.reason) == (str(error.value), str(path), error.value.reason)


def test_an_image_of_another_size_than_annotated_is_unreadable(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="expected 6x9 pixels as annotated, got 9x6 when upright"):
        read_image(record(tmp_path / "a.png", (9, 6)))


def _expected(x, y, w, h, size):
    """What becomes of one box, decided number by number."""
    with np.errstate(over="ignore", invalid="ignore"):
        corners = [float(np.float32(v)) for v in (x, y, x + w, y + h)]
    if any(math.isnan(v) or math.isinf(v) for v in corners):
        return NON_FINITE, None
    if w < 0 or h < 0:
        return INVERTED, None
    x1, y1, x2, y2 = corners
    if not (x2 > x1 and y2 > y1):
        return ZERO_AREA, None
    if size is None:
        return (None, corners) if max(map(abs, corners)) <= 2**24 else (FAR, None)
    height, width = size
    inside = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
    if inside[0] == inside[2] or inside[1] == inside[3]:
        return OUTSIDE, None
    left = Fraction(inside[2] - inside[0]) * Fraction(inside[3] - inside[1])
    if left * 20 < (Fraction(x2) - Fraction(x1)) * (Fraction(y2) - Fraction(y1)):
        return FAR, None
    return (CLIPPED if inside != corners else None), inside


_number = st.one_of(
    st.integers(-50, 150).map(float),
    st.floats(-60, 160),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e39, 1e30, 0.0]),
)


@given(st.lists(st.tuples(_number, _number, _number, _number), max_size=8), st.sampled_from([None, (100, 80)]))
def test_usable_boxes_equal_the_scalar_rule(rows, size):
    report = DataReport()
    boxes, kept = usable_boxes(rows, size, [f"file:{i}" for i in range(len(rows))], report)
    expected = [_expected(*row, size) for row in rows]
    assert kept.tolist() == [i for i, (_, box) in enumerate(expected) if box is not None]
    assert boxes.dtype == np.float32 and boxes.shape == (len(kept), 4)
    assert boxes.tolist() == [box for _, box in expected if box is not None]
    assert report.num_boxes == len(rows)
    for kind in (NON_FINITE, INVERTED, ZERO_AREA, OUTSIDE, FAR, CLIPPED):
        places = [f"file:{i}" for i, (found, _) in enumerate(expected) if found == kind]
        assert report.counts[kind] == len(places)
        assert report.examples.get(kind, []) == places[:3]


@pytest.mark.parametrize(
    "xywh, size, kept",
    [
        ((10, 10, 1e9, 20), None, False),
        ((10, 10, 1e8, 20), None, False),
        ((-3e8, 10, 20, 20), None, False),
        ((10, 10, 1e6, 20), None, True),  # the size of the image decides, where there is one
        ((10, 10, 1e6, 20), (80, 100), False),
        ((-900, -900, 2000, 2000), (400, 400), False),
        ((-90, -90, 1000, 1000), (400, 400), True),
        ((-16, 10, 20, 20), (80, 100), True),  # a fifth of a face at the edge
    ],
)
def test_what_remains_after_clipping_decides(xywh, size, kept):
    report = DataReport()
    boxes, _ = usable_boxes([xywh, (1, 2, 3, 4)], size, ["a", "b"], report)
    assert len(boxes) == 1 + kept and boxes[-1].tolist() == [1, 2, 4, 6]
    assert report.counts[FAR] == (not kept)
    x, y, w, h = xywh
    assert size is None or far_outside(np.float32([[x, y, x + w, y + h]]), *size).tolist() == [not kept]


def test_report_summary_lists_counts_and_places():
    report = DataReport(num_images=2)
    usable_boxes([(0, 0, 0, 1)] * 5 + [(-1, 0, 5, 5)], (10, 10), [f"a.txt:{i}" for i in range(6)], report)
    assert report.num_dropped == 5
    assert report.summary().splitlines() == [
        "2 images, 6 boxes (0 to be ignored), 5 dropped, 1 clipped",
        "  dropped, zero area: 5 (a.txt:0, a.txt:1, a.txt:2, ...)",
        "  kept, clipped to the image: 1 (a.txt:5)",
    ]


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "", "a/b\0.jpg", "..", "a\\..\\..\\b.jpg"])
def test_image_root_refuses_paths_that_leave_it(tmp_path, path):
    with pytest.raises(ValueError, match=r"list:3: expected an image path below the image folder"):
        ImageRoot(tmp_path).join(path, "list:3")


def test_image_root_refuses_links_that_leave_it(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "file.jpg").symlink_to(outside / "x.jpg")
    (root / "sibling").symlink_to(tmp_path / "root2")
    (root / "real").mkdir()
    (root / "inner.jpg").symlink_to(root / "real" / "x.jpg")
    for path in ("folder/x.jpg", "file.jpg", "sibling/x.jpg"):
        with pytest.raises(ValueError, match="a link to"):
            ImageRoot(root).join(path, "here")
    assert ImageRoot(root).join("inner.jpg", "here") == str(root / "inner.jpg")
    (tmp_path / "link").symlink_to(root)  # the folder itself may be one
    assert ImageRoot(tmp_path / "link").join("real/x.jpg", "here") == str(tmp_path / "link" / "real" / "x.jpg")
