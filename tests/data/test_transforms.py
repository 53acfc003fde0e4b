import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from group_sampling.data.transforms import Geometry, TestTransform, TrainTransform

SCALES = tuple(0.25 * n for n in range(1, 9))  # the paper's
NO_IGNORE, CLASSES = np.zeros(1, bool), np.zeros(1, np.int64)


@st.composite
def scenes(draw):
    """An image size, a box that stays 10 pixels or more wide at any scale, and a seed."""
    height, width = draw(st.integers(60, 220)), draw(st.integers(60, 220))
    x1, y1 = draw(st.integers(0, width - 44)), draw(st.integers(0, height - 44))
    x2, y2 = draw(st.integers(x1 + 40, width)), draw(st.integers(y1 + 40, height))
    return height, width, (x1, y1, x2, y2), draw(st.integers(0, 10**6))


@given(scenes())
@settings(max_examples=150)
def test_boxes_agree_with_pixels(scene):
    height, width, (x1, y1, x2, y2), seed = scene
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    transform = TrainTransform(SCALES, crop_size=(110, 130), min_visible=0.0)
    box = np.array([[x1, y1, x2, y2]], np.float32)
    sample = transform(image, box, NO_IGNORE, CLASSES, np.random.default_rng(seed))
    rows, columns = np.nonzero(sample.image[..., 0] > 127)
    if len(sample.boxes) == 0 or len(rows) == 0:
        # Less than a pixel of it can be inside without a trace of the other.
        assert len(rows) <= max(sample.image.shape[:2]) and (
            len(sample.boxes) == 0 or (sample.boxes[0, 2:] - sample.boxes[0, :2]).min() <= 1
        )
        return
    painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(sample.boxes[0] - painted).max() <= 1


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_first_gives_the_pixels_of_resize_first(scale, flip):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (151, 203, 3), dtype=np.uint8)
    scaled = round(203 * scale), round(151 * scale)
    whole = np.asarray(Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR))
    for _ in range(5):
        x0, y0 = int(rng.integers(scaled[0] - 20)), int(rng.integers(scaled[1] - 15))
        x1, y1 = int(rng.integers(x0 + 1, scaled[0] + 1)), int(rng.integers(y0 + 1, scaled[1] + 1))
        got = TrainTransform(SCALES).apply_image(image, Geometry(scale, (x0, y0, x1, y1), flip))
        expected = whole[y0:y1, x0:x1][:, :: -1 if flip else 1]
        assert got.shape == expected.shape and got.flags.c_contiguous and got.flags.writeable
        # One gray level: the filter's weights are rounded to fixed point at positions a rounding error apart.
        assert np.abs(got.astype(int) - expected).max() <= 1


def _visible(box, geometry, height, width):
    """(clipped box, visible share), number by number; None for a box without area inside the image."""
    sx, sy = max(1, round(width * geometry.scale)) / width, max(1, round(height * geometry.scale)) / height
    x1, y1, x2, y2 = (float(v) for v in box)
    if not all(np.isfinite([x1, y1, x2, y2])):
        return None
    x1, x2 = (min(max(x, 0), width) * sx for x in (x1, x2))
    y1, y2 = (min(max(y, 0), height) * sy for y in (y1, y2))
    if x2 <= x1 or y2 <= y1:
        return None
    cx0, cy0, cx1, cy1 = geometry.crop
    left, right = max(x1, cx0), min(x2, cx1)
    top, bottom = max(y1, cy0), min(y2, cy1)
    if right <= left or bottom <= top:
        return None
    share = (right - left) * (bottom - top) / ((x2 - x1) * (y2 - y1))
    out = [left - cx0, top - cy0, right - cx0, bottom - cy0]
    if geometry.flip:
        out[0], out[2] = cx1 - cx0 - out[2], cx1 - cx0 - out[0]
    return out, share


def _share_inside(box, height, width):
    x1, y1, x2, y2 = (float(v) for v in box)
    inside = (min(max(x2, 0), width) - min(max(x1, 0), width)) * (min(max(y2, 0), height) - min(max(y1, 0), height))
    return inside / ((x2 - x1) * (y2 - y1))


_coordinate = st.one_of(
    st.floats(-80, 300), st.integers(-20, 200).map(float), st.sampled_from([np.nan, np.inf, -np.inf])
)


@given(
    st.lists(st.tuples(_coordinate, _coordinate, _coordinate, _coordinate), max_size=6),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_apply_boxes_equals_the_scalar_rule(boxes, height, width, seed, min_visible):
    transform = TrainTransform(SCALES, crop_size=(60, 70), min_visible=min_visible)
    geometry = transform.sample(height, width, np.random.default_rng(seed))
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    moved, keep = transform.apply_boxes(boxes, geometry, height, width)
    assert moved.dtype == np.float32 and moved.shape == boxes.shape and keep.dtype == bool
    for box, got, kept in zip(boxes, moved, keep):
        expected = _visible(box, geometry, height, width)
        if expected is None:
            assert not kept and not got.any()
            continue
        out, share = expected
        if _share_inside(box, height, width) < 0.0499:
            assert not kept and not got.any()
            continue
        if _share_inside(box, height, width) < 0.0501:
            continue
        if abs(share - min_visible) > 1e-6 and min(out[2] - out[0], out[3] - out[1]) > 1e-3:
            assert kept == (share >= min_visible)
        if kept:
            assert np.allclose(got, out, atol=1e-4)
            assert got[0] < got[2] and got[1] < got[3]


def test_a_fully_visible_box_is_kept_at_min_visible_1():
    boxes = np.random.default_rng(0).uniform(0, 50, (500, 2)).astype(np.float32)
    boxes = np.concatenate([boxes, boxes + np.float32(7.3)], axis=1)
    for scale in (0.25, 0.75, 1.75):
        transform = TrainTransform(scales=(scale,), min_visible=1.0)
        geometry = transform.sample(77, 91, np.random.default_rng(0))
        assert transform.apply_boxes(boxes, geometry, 77, 91)[1].all()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
def test_no_crop_is_empty_or_too_large(height, width, seed):
    transform = TrainTransform(SCALES)
    geometry = transform.sample(height, width, np.random.default_rng(seed))
    x0, y0, x1, y1 = geometry.crop
    scaled_height, scaled_width = max(1, round(height * geometry.scale)), max(1, round(width * geometry.scale))
    assert 0 <= x0 < x1 <= scaled_width and 0 <= y0 < y1 <= scaled_height
    assert (y1 - y0, x1 - x0) == (min(1200, scaled_height), min(1200, scaled_width))
    assert geometry.scale in [0.25 * n for n in range(1, 9)]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_tiny_images(size):
    image = np.full((*size, 3), 9, np.uint8)
    for seed in range(20):
        sample = TrainTransform(SCALES)(image, np.zeros((0, 4), np.float32), np.zeros(0, bool), np.zeros(0, np.int64),
                                  np.random.default_rng(seed))  # fmt: skip
        assert sample.image.size > 0 and (sample.image == 9).all()
        assert sample.boxes.shape == sample.ignore_boxes.shape == (0, 4)


def test_scales_flips_and_crops_are_uniform():
    """Chi-square statistics of 8,000 draws; the bounds are the 1e-4 quantiles."""
    transform, rng = TrainTransform(SCALES, crop_size=(20, 1200)), np.random.default_rng(1)
    draws = [transform.sample(24, 40, rng) for _ in range(8000)]
    counts = np.array([sum(g.scale == 0.25 * n for g in draws) for n in range(1, 9)])
    assert ((counts - 1000) ** 2 / 1000).sum() < 29.9  # 7 degrees of freedom
    flips = sum(g.flip for g in draws)
    assert (flips - 4000) ** 2 / 2000 < 15.2  # 1 degree
    tops = np.bincount([g.crop[1] for g in draws if g.scale == 1.0], minlength=5)
    assert len(tops) == 5  # 24 rows, crop of 20
    assert ((tops - tops.mean()) ** 2 / tops.mean()).sum() < 23.5  # 4 degrees


def test_call_separates_ignore_regions_and_keeps_any_part_of_them():
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array([[0, 0, 20, 20], [85, 0, 105, 20], [50, 50, 60, 60], [110, 0, 120, 9]], np.float32)
    transform = TrainTransform(scales=(1.0,), crop_size=(100, 90), flip_prob=0.0)
    geometry = Geometry(1.0, (0, 0, 90, 100), False)
    transform.sample = lambda *args: geometry
    ignore, classes = np.array([False, True, False, True]), np.array([3, 0, 5, 0])
    sample = transform(image, boxes, ignore, classes, np.random.default_rng(0))
    assert sample.boxes.tolist() == [[0, 0, 20, 20], [50, 50, 60, 60]] and sample.classes.tolist() == [3, 5]
    assert sample.ignore_boxes.tolist() == [[85, 0, 90, 20]]  # a third of it, and enough


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scales": ()}, "scales: expected positive finite factors"),
        ({"scales": (0.0,)}, "scales: expected positive finite factors"),
        ({"scales": (float("nan"),)}, "scales: expected positive finite factors"),
        ({"crop_size": (0, 5)}, "crop_size: expected"),
        ({"flip_prob": 1.5}, "flip_prob: expected a probability"),
        ({"min_visible": -0.1}, "min_visible: expected a share"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**{"scales": SCALES, **arguments})
    with pytest.raises(ValueError, match="expected min_size >= 0"):
        TestTransform(-1, 5)


@pytest.mark.parametrize("min_size, max_size", [(800, 1333), (100, 120), (37, 10_000), (0, 50)])
def test_test_transform_equals_detectron2(min_size, max_size):
    transforms = pytest.importorskip("detectron2.data.transforms", reason="Detectron2 is not installed")
    rng = np.random.default_rng(0)
    for _ in range(6):
        image = rng.integers(0, 256, (*rng.integers(60, 300, size=2), 3), dtype=np.uint8)
        expected = transforms.ResizeShortestEdge(min_size, max_size).get_transform(image)
        boxes = rng.uniform(0, 20, (3, 2))
        boxes = np.concatenate([boxes, boxes + 5], axis=1).astype(np.float32)
        sample = TestTransform(min_size, max_size)(image, boxes, np.zeros(3, bool), np.zeros(3, np.int64))
        assert np.array_equal(sample.image, expected.apply_image(image))
        # float32 rounding of a coordinate below 2,000
        assert np.allclose(sample.boxes, expected.apply_box(boxes), atol=1e-3)


def test_test_transform_sizes_equal_detectron2():
    transforms = pytest.importorskip("detectron2.data.transforms", reason="Detectron2 is not installed")
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        height, width = map(int, rng.integers(10, 5000, size=2))
        min_size, max_size = map(int, rng.integers(10, 3000, size=2))
        expected = transforms.ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
        expected = tuple(max(1, side) for side in expected)  # Detectron2 has sizes of 0 for extreme shapes
        assert TestTransform(min_size, max_size).output_size(height, width) == expected
