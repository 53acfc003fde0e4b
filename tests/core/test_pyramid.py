"""The image pyramid with detectors made for the test: merge, box voting, tiles, flip, scales."""

import functools
import itertools
import math
import runpy
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from group_sampling.data.transforms import TestTransform
from group_sampling.detections import Detections
from group_sampling.experiments.plots import plot_detections
from group_sampling.pyramid import ImagePyramid, merge_detections, tile_spans

KEEP_SIZE = TestTransform(0, 0)


def detections(boxes, scores, classes=None, anchor_scales=None) -> Detections:
    count = len(scores)
    return Detections(
        torch.as_tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4)),
        torch.as_tensor(np.asarray(scores, dtype=np.float32)),
        torch.as_tensor(np.asarray([0] * count if classes is None else classes, dtype=np.int64)),
        torch.as_tensor(np.asarray([16] * count if anchor_scales is None else anchor_scales, dtype=np.float32)),
    )


def make_pyramid(scales=(1.0,), base=KEEP_SIZE, **options) -> ImagePyramid:
    defaults = {"flip": False, "max_side": 3000, "tile_overlap": 256, "nms_thresh": 0.3, "vote_thresh": 0.0}
    return ImagePyramid(base, scales, **{**defaults, "max_detections": 1000, **options})


def as_rows(found: Detections) -> list[tuple]:
    columns = (found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), found.anchor_scales.tolist())
    return [(*box, *rest) for box, *rest in zip(*columns)]


# The merge, against a transcription of its definition in plain Python.


def oracle_iou(a, b) -> float:
    intersection = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def oracle_merge(levels, nms_thresh, vote_thresh, max_detections) -> list[tuple]:
    candidates = [row for level in levels for row in as_rows(level)]
    kept = []
    for row in sorted(candidates, key=lambda row: -row[4]):  # sorted() keeps the order of equal scores
        if all(row[5] != other[5] or oracle_iou(row, other) <= nms_thresh for other in kept):
            kept.append(row)
    kept = kept[:max_detections]
    if vote_thresh == 0:
        return kept
    moved = []
    for row in kept:
        voters = [other for other in candidates if other[5] == row[5] and oracle_iou(row, other) >= vote_thresh]
        total = math.fsum(other[4] for other in voters)
        box = [math.fsum(other[4] * other[i] for other in voters) / total for i in range(4)] if total else row[:4]
        moved.append((*box, *row[4:]))
    return moved


def random_level(rng: np.random.Generator, most: int, side: int, num_classes: int) -> Detections:
    """Whole-number boxes, so that IoUs are exact and coordinates collide, with few different scores."""
    count = int(rng.integers(0, most))
    corners = rng.integers(0, side, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, side, (count, 2))], axis=1)
    if count and rng.random() < 0.5:
        boxes = boxes[rng.integers(0, count, count)]  # duplicates
    kind = rng.integers(3)
    scores = [rng.integers(0, 5, count) / 4, np.full(count, 0.5), rng.random(count)][kind]
    return detections(boxes, scores, rng.integers(0, num_classes, count), rng.choice([16, 32, 64, 128], count))


def test_merge_equals_the_definition():
    kept = merged_away = voted = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        side, num_classes = int(rng.choice([4, 12, 40])), int(rng.choice([1, 1, 3]))
        levels = [random_level(rng, 30, side, num_classes) for _ in range(rng.integers(1, 5))]
        nms_thresh = float(rng.choice([0.0, 0.25, 0.3137, 0.5, 0.75, 1.0]))
        vote_thresh = float(rng.choice([0.0, 0.5, 0.75, 1.0]))
        limit = int(rng.choice([0, 3, 1000]))
        expected = oracle_merge(levels, nms_thresh, vote_thresh, limit)
        merged = merge_detections(levels, nms_thresh=nms_thresh, vote_thresh=vote_thresh, max_detections=limit)
        rows = as_rows(merged)
        assert [row[4:] for row in rows] == [row[4:] for row in expected], seed
        assert np.allclose([row[:4] for row in rows], [row[:4] for row in expected], rtol=1e-5, atol=1e-4), seed
        unvoted = oracle_merge(levels, nms_thresh, 0.0, limit)
        kept += len(rows)
        merged_away += sum(len(level.scores) for level in levels) - len(unvoted)
        voted += any(not np.allclose(a[:4], b[:4]) for a, b in zip(rows, unvoted))
    assert min(kept, merged_away) > 1200 and voted > 20


def test_merge_of_many():
    """More boxes than torchvision's batched_nms takes in one go, and more than voting holds at a time."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 300, (1500, 2))
    boxes = np.concatenate([corners, corners + rng.integers(5, 40, (1500, 2))], axis=1)
    level = detections(boxes, rng.integers(0, 50, 1500) / 50, rng.integers(0, 2, 1500))
    merged = merge_detections([level], nms_thresh=0.5, vote_thresh=0.5, max_detections=400)
    expected = oracle_merge([level], 0.5, 0.5, 400)
    assert len(expected) == 400
    assert [row[4:] for row in as_rows(merged)] == [row[4:] for row in expected]
    assert np.allclose(merged.boxes, [row[:4] for row in expected], rtol=1e-5, atol=1e-4)


def test_box_voting():
    """Voters are weighted by their scores; boxes below the threshold, or of another class, have no vote."""
    level = detections(
        [[0, 0, 10, 10], [2, 0, 12, 10], [0, 0, 10, 4], [0, 0, 10, 10]], [0.75, 0.25, 0.9, 0.5], [0, 0, 0, 1]
    )
    merged = merge_detections([level], nms_thresh=0.5, vote_thresh=0.6, max_detections=10)
    assert as_rows(merged) == [
        (0, 0, 10, 4, pytest.approx(0.9), 0, 16),
        (0.5, 0, 10.5, 10, 0.75, 0, 16),
        (0, 0, 10, 10, 0.5, 1, 16),
    ]


def test_equal_scores_keep_the_earlier_level():
    levels = [detections([[0, 0, 10, 10]], [0.5], anchor_scales=[scale]) for scale in (64, 16, 32)]
    assert merge_detections(levels, nms_thresh=0.3, max_detections=5).anchor_scales.tolist() == [64]


def test_no_voting_unless_asked_for():
    level = detections([[0, 0, 10, 10], [1, 0, 11, 10]], [0.75, 0.25])
    assert merge_detections([level], nms_thresh=0.5, max_detections=5).boxes.tolist() == [[0, 0, 10, 10]]
    with_one = merge_detections([level], nms_thresh=0.5, vote_thresh=1.0, max_detections=5)
    assert with_one.boxes.tolist() == [[0, 0, 10, 10]]


# Detectors: rectangles of known colors, each found as the bounding box of what is seen of it.


def find_colors(image: np.ndarray) -> Detections:
    """The bounding box of every color in the red channel; what it finds depends on nothing outside of the box."""
    found = []
    for index, area in enumerate(ndimage.find_objects(image[..., 0]), start=1):
        if area is not None:
            (rows, columns) = area
            found.append(([columns.start, rows.start, columns.stop, rows.stop], index))
    return detections(
        [box for box, _ in found],
        [1 - index / 512 for _, index in found],
        [index % 2 for _, index in found],
        [16 * 2 ** (index % 4) for _, index in found],
    )


def paint_rectangles(height, width, sizes, rng) -> np.ndarray:
    """Rectangles of these (height, width) that do not touch, each of its own color."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    color = 0
    for rectangle_height, rectangle_width in sizes:
        y, x = rng.integers(0, height - rectangle_height), rng.integers(0, width - rectangle_width)
        if not image[max(0, y - 1) : y + rectangle_height + 1, max(0, x - 1) : x + rectangle_width + 1].any():
            color += 1
            image[y : y + rectangle_height, x : x + rectangle_width] = color
    return image


@given(st.integers(1, 5000), st.integers(0, 300), st.integers(0, 600))
def test_tile_spans(side, overlap, extra):
    max_side = overlap + 32 + extra
    spans = tile_spans(side, max_side, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == side
    assert all(0 < end - start <= max_side and start % 32 == 0 for start, end in spans)
    assert all(end - start == overlap for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(end < side for _, end in spans[:-1]), "the last tile lies within the one before it"
    step = (max_side - overlap) // 32 * 32
    fewest = next(count for count in range(1, 5000) if side <= max_side or (count * step + overlap) >= side)
    assert len(spans) == fewest


def test_a_side_as_long_as_a_tile_is_not_cut():
    assert tile_spans(100, 100, 10) == [(0, 100)]
    assert tile_spans(101, 100, 10) == [(0, 74), (64, 101)]


def test_limits_are_accepted():
    make_pyramid(tile_overlap=0, max_side=32, vote_thresh=1.0)
    make_pyramid(tile_overlap=100, max_side=132, vote_thresh=0.0)


def test_tiles_find_what_the_whole_image_has():
    """Faces smaller than the overlap, many of them across tile edges: the same detections as without tiles."""
    across_edges = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        overlap = int(rng.integers(8, 70))
        max_side = overlap + int(rng.integers(32, 160))
        sizes = rng.integers(2, overlap - 2, (120, 2))
        image = paint_rectangles(int(rng.integers(60, 420)), int(rng.integers(60, 420)), sizes.clip(max=59), rng)
        whole = find_colors(image)
        seen = []

        def detect(tile, seen=seen, max_side=max_side):
            assert max(tile.shape[:2]) <= max_side and tile.flags.c_contiguous
            seen.append(find_colors(tile))
            return seen[-1]

        found = make_pyramid(max_side=max_side, tile_overlap=overlap)(image, detect)
        assert sorted(as_rows(found)) == sorted(as_rows(whole)), seed
        across_edges += sum(len(part.scores) for part in seen) - len(whole.scores)
    assert across_edges > 400


def test_a_face_larger_than_the_overlap_comes_in_parts():
    """Nothing of it is dropped: the parts cover it."""
    image = np.zeros((100, 400, 3), dtype=np.uint8)
    image[10:90, 30:390] = 7
    found = make_pyramid(max_side=160, tile_overlap=40, nms_thresh=0.9)(image, find_colors)
    covered = np.zeros((100, 400), dtype=bool)
    for x1, y1, x2, y2 in found.boxes.int().tolist():
        covered[y1:y2, x1:x2] = True
    assert len(found.scores) > 1 and np.array_equal(covered, image[..., 0] > 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_counts_as_cut(axis):
    """Two tiles, [0, 96) and [64, 160). A box that ends within a pixel of the inner edge was cut; it is dropped where
    the other tile holds more than it, that is, where it lies inside the overlap by more than a pixel."""
    left = [(66, 94.5), (66, 95), (65, 96), (65.5, 95.5), (0, 20), (66, 96)]
    right = [(64, 90), (65, 90), (65.5, 90), (64, 95), (64, 94.5), (140, 160), (1000, 1001)]  # the last one is outside
    tiles = iter([[(a, b) for a, b in left], [(a - 64, b - 64) for a, b in right]])

    def detect(tile):
        spans = next(tiles)
        rows = [(a, 5, b, 9) if axis == 1 else (5, a, 9, b) for a, b in spans]
        return detections(rows, np.linspace(0.9, 0.5, len(rows)))

    image = np.zeros((160, 20, 3) if axis == 0 else (20, 160, 3), dtype=np.uint8)
    found = make_pyramid(max_side=96, tile_overlap=32, nms_thresh=1.0)(image, detect)
    kept = {tuple(box[1 - axis :: 2]) for box in found.boxes.tolist()}
    assert kept == {(66, 94.5), (65, 96), (0, 20)} | {(65.5, 90), (64, 95), (140, 160)}


def test_boxes_without_area_inside_the_image_are_left_out():
    outside = [[-50, 20, -10, 60], [120, 20, 160, 60], [20, -50, 60, -10], [20, 120, 60, 160]]
    found = make_pyramid()(np.zeros((100, 100, 3), np.uint8), lambda tile: detections(outside, [0.5] * 4))
    assert len(found.scores) == 0


def test_no_level_is_empty():
    image, seen = np.zeros((50, 100, 3), dtype=np.uint8), []

    def detect(tile):
        seen.append(tile.shape[:2])
        return find_colors(tile)

    make_pyramid((0.001, 0.015))(image, detect)
    assert seen == [(1, 1), (1, 2)]


def find_bright(image: np.ndarray, sizes=(0, math.inf)) -> Detections:
    """Connected bright areas whose longer side is within ``sizes``. Scores favor the left, and no two images have the
    same ones."""
    areas = ndimage.find_objects(ndimage.label(image[..., 0] > 127)[0])
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in areas]
    boxes = [box for box in boxes if sizes[0] <= max(box[2] - box[0], box[3] - box[1]) <= sizes[1]]
    best = 0.9 + 0.1 * zlib.crc32(image.tobytes()) / 2**32
    return detections(boxes, [best - box[0] / 4000 - box[1] / 50000 for box in boxes])


@pytest.mark.parametrize("options", [{}, {"max_side": 120, "tile_overlap": 60}], ids=["whole", "tiles"])
def test_mirrored_image_gives_mirrored_detections(options):
    rng = np.random.default_rng(0)
    pyramid = make_pyramid((0.5, 1.0, 1.7), flip=True, nms_thresh=0.3, vote_thresh=0.5, **options)
    for _ in range(3):
        image = np.where(paint_rectangles(180, 240, rng.integers(10, 30, (15, 2)), rng) > 0, 255, 0).astype(np.uint8)
        found, mirrored = pyramid(image, find_bright), pyramid(np.ascontiguousarray(image[:, ::-1]), find_bright)
        x1, y1, x2, y2 = mirrored.boxes.unbind(1)
        assert len(found.scores) > 5
        assert torch.equal(found.scores, mirrored.scores)
        assert torch.allclose(found.boxes, torch.stack([240 - x2, y1, 240 - x1, y2], dim=1), atol=1e-4)
        plain = make_pyramid((0.5, 1.0, 1.7), **options)(image, find_bright)
        assert not torch.equal(plain.scores, found.scores), "the mirror images changed nothing"


def test_one_scale_is_the_single_scale_test():
    rng = np.random.default_rng(1)
    image = paint_rectangles(300, 400, rng.integers(5, 60, (80, 2)), rng)
    assert as_rows(make_pyramid()(image, find_colors)) == as_rows(find_colors(image))


def test_lists_of_sub_detectors_go_by_themselves():
    """Levels, tiles, mirror images, merge and limits of each list are those of a detector that returns it alone."""
    rng = np.random.default_rng(2)
    image = np.where(paint_rectangles(180, 240, rng.integers(10, 40, (30, 2)), rng) > 0, 255, 0).astype(np.uint8)
    finders = [find_bright, *(functools.partial(find_bright, sizes=sizes) for sizes in ((0, 20), (15, 30), (0, 60)))]
    pyramid = make_pyramid(
        (1.0, 0.5, 1.7), flip=True, vote_thresh=0.5, max_side=150, tile_overlap=60, max_detections=12
    )

    def detect(tile):
        joint, *alone = (finder(tile) for finder in finders)
        return joint._replace(sub_detectors=dict(zip((16.0, 32.0, 64.0), alone)))

    found = pyramid(image, detect)
    assert list(found.sub_detectors) == [16, 32, 64]
    lists = [as_rows(alone) for alone in (found, *found.sub_detectors.values())]
    assert lists == [as_rows(pyramid(image, finder)) for finder in finders]
    assert len(set(map(tuple, lists))) == 4 and list(map(len, lists)) == [12] * 4
    assert all(alone.sub_detectors is None for alone in found.sub_detectors.values())


@pytest.mark.parametrize("shape", [(97, 240), (240, 97), (480, 480)])
def test_levels_are_multiples_of_the_single_scale_size(shape):
    """Scale 1 is the single-scale test's size, and every level is one resize from the pixels given."""
    base = TestTransform(100, 200)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    seen = []

    def detect(tile):
        seen.append(tile)
        height, width = tile.shape[:2]
        return detections([[0, 0, width, height], [width / 4, 0, width / 2, height / 2]], [0.5, 0.4])

    found = make_pyramid((1.0, 0.5, 2.0), base, nms_thresh=0.5, vote_thresh=0.9)(image, detect)
    assert np.array_equal(seen[0], base.apply_image(image))
    height, width = base.output_size(*shape)
    assert [tile.shape[:2] for tile in seen[1:]] == [(round(height * s), round(width * s)) for s in (0.5, 2.0)]
    assert found.boxes[0].tolist() == pytest.approx([0, 0, shape[1], shape[0]], rel=1e-6)
    assert found.boxes[1].tolist() == pytest.approx([shape[1] / 4, 0, shape[1] / 2, shape[0] / 2], rel=1e-6)
    assert len(found.scores) == 2

    resized = make_pyramid((1.0, 0.5))(image, detect, size=(10 * shape[0], 10 * shape[1]))
    assert resized.boxes[0].tolist() == pytest.approx([0, 0, 10 * shape[1], 10 * shape[0]], rel=1e-6)


def test_large_faces_found_at_a_reduced_scale_only():
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    image[20:40, 10:30] = image[100:260, 150:330] = 255  # 20 and 180 pixels

    def detect(tile):
        return find_bright(tile, sizes=(12, 50))

    assert make_pyramid()(image, detect).boxes.tolist() == [[10, 20, 30, 40]]
    found = make_pyramid((1.0, 0.25))(image, detect)
    assert sorted(found.boxes.tolist()) == [
        [10, 20, 30, 40],
        [pytest.approx(150, abs=4), pytest.approx(100, abs=4), pytest.approx(330, abs=4), pytest.approx(260, abs=4)],
    ]


def test_picture_of_large_faces_found_at_a_reduced_scale(repository, tmp_path):
    """A detector that knows small bright squares only: the large one is in the pyramid's panel alone."""
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    image[20:40, 10:30] = image[100:260, 150:330] = 255
    faces = np.float32([[10, 20, 30, 40], [150, 100, 330, 260]])
    tool = runpy.run_path(str(repository / "projects/GroupSampling/tools/show_detections.py"))
    panels, found = {}, {}
    for title, scales in (("single scale", (1.0,)), ("pyramid", (1.0, 0.25))):
        result = make_pyramid(scales)(image, lambda tile: find_bright(tile, sizes=(12, 50)))
        panels[title] = result.numpy()
        found[title] = tool["count_found"](faces, panels[title].boxes)
    assert found == {"single scale": 1, "pyramid": 2}
    plot_detections(image, faces, panels, tmp_path / "pyramid.png", panel_size=5.0)
    with Image.open(tmp_path / "pyramid.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)
    middle = red.shape[1] // 2
    assert red[:, middle:].sum() > 2 * red[:, :middle].sum() > 0


def test_what_a_level_keeps_is_limited_and_inside_the_image():
    def detect(tile):
        return detections(
            [[-50, -50, 10, 10], [90, 90, 500, 500], [200, 200, 300, 300], [40, 40, 60, 60]], [0.2, 0.9, 0.8, 0.7]
        )

    image = np.zeros((100, 100, 3), dtype=np.uint8)
    found = make_pyramid(max_detections=2)(image, detect)
    assert as_rows(found) == [
        (90, 90, 100, 100, pytest.approx(0.9), 0, 16),
        (40, 40, 60, 60, pytest.approx(0.7), 0, 16),
    ]

    merged = []

    def count(levels, **options):
        merged.extend(len(level.scores) for level in levels)
        return merge_detections(levels, **options)

    pyramid = make_pyramid((0.5, 1.0, 2.0), flip=True, max_detections=3, max_side=100, tile_overlap=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("group_sampling.pyramid.merge_detections", count)
        pyramid(image, detect)
    assert len(merged) == 6 and max(merged) == 3


def test_nothing_found():
    found = make_pyramid((0.5, 2.0), flip=True, vote_thresh=0.5, max_side=64, tile_overlap=8)(
        np.zeros((50, 70, 3), dtype=np.uint8), find_bright
    )
    assert found.boxes.shape == (0, 4) and all(len(tensor) == 0 for tensor in found[:-1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": ()}, "scales: expected distinct positive factors"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"scales": (1.0, math.nan)}, "scales"),
        ({"scales": (1.0, math.inf)}, "scales"),
        ({"scales": (1.0, 1)}, "scales"),
        ({"scales": ("1",)}, "scales"),
        ({"tile_overlap": -1}, "tile_overlap: expected at least 0"),
        ({"tile_overlap": 100, "max_side": 131}, r"max_side: expected at least tile_overlap \+ 32 = 132"),
        ({"vote_thresh": 1.5}, "vote_thresh"),
        ({"vote_thresh": -0.5}, "vote_thresh"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_pyramid(**options)
