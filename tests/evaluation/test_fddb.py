"""The FDDB protocol against pixel sets and brute force, hand-worked cases, and the official evaluator's curves."""

import functools
import importlib.util
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from group_sampling.data.fddb import FDDBImage
from group_sampling.detections import Detections
from group_sampling.evaluation import FDDBResult, FDDBRoc, read_fddb_predictions, write_fddb_predictions
from group_sampling.evaluation.fddb.regions import ellipse_spans, rectangle_spans
from group_sampling.evaluation.fddb.regressor import EllipseRegressor
from group_sampling.files import write_json

TOOL = Path(__file__).parents[2] / "projects/GroupSampling/tools/evaluate_fddb.py"

# --- The oracle: sets of pixels, ellipses by OpenCV, and all matchings tried. Shares no code with the package. ---


def half_even(value):
    return round(float(np.float32(value)))


def draw_rectangle(x1, y1, x2, y2, height, width):
    columns = range(max(0, half_even(x1)), min(width - 1, half_even(x2)) + 1)
    return {(x, y) for y in range(max(0, half_even(y1)), min(height - 1, half_even(y2)) + 1) for x in columns}


def draw_ellipse(ellipse, height, width):
    """OpenCV's ellipse, called as the published evaluation does; a gap that it leaves in a row is filled."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV, which draws the expected ellipses, is not installed")
    mask = np.zeros((height, width), dtype=np.uint8)
    axes = max(0, int(ellipse[0])), max(0, int(ellipse[1]))
    center = half_even(ellipse[3]), half_even(ellipse[4])
    cv2.ellipse(mask, center, axes, 180 - (math.pi - ellipse[2]) * 180 / math.pi, 0, 360, 255, cv2.FILLED)
    rows = ((y, np.flatnonzero(row)) for y, row in enumerate(mask))
    return {(x, y) for y, columns in rows if len(columns) for x in range(columns[0], columns[-1] + 1)}


def best_matchings(iou):
    """Largest sum of IoUs of a one-to-one matching, and the numbers of pairs above 0.5 that it can have."""
    if not iou or not iou[0]:
        return 0.0, {0}
    if len(iou) > len(iou[0]):
        iou = list(zip(*iou))
    options = [
        [iou[row][column] for row, column in enumerate(columns)]
        for columns in itertools.permutations(range(len(iou[0])), len(iou))
    ]
    largest = max(map(sum, options))
    return largest, {sum(value > 0.5 for value in pairs) for pairs in options if sum(pairs) > largest - 1e-9}


def published_protocol(images, detections, to_ellipse=None):
    """Points (threshold, false positives, {possible numbers of true positives}, continuous score) of the curves."""
    overlaps = {}
    for image in images:
        boxes, scores = detections.get(image.image_id, ([], []))
        if to_ellipse is None:
            regions = [draw_rectangle(*box, *image.size) for box in boxes]
        else:
            regions = [draw_ellipse(to_ellipse(box), *image.size) for box in boxes]
        faces = [draw_ellipse(ellipse, *image.size) for ellipse in image.ellipses.tolist()]
        iou = [[len(f & r) / len(f | r) if f | r else 0.0 for r in regions] for f in faces]
        overlaps[image.image_id] = iou, scores
    points = [(math.inf, 0, {0}, 0.0)]
    for threshold in sorted({score for _, scores in overlaps.values() for score in scores}, reverse=True):
        number, hits, continuous = 0, {0}, 0.0
        for iou, scores in overlaps.values():
            valid = [index for index, score in enumerate(scores) if score >= threshold]
            total, possible = best_matchings([[row[index] for index in valid] for row in iou])
            number += len(valid)
            continuous += total
            hits = {a + b for a in hits for b in possible}
        points.append((threshold, number, hits, continuous))
    return points


def random_set(seed):
    """A few small images: crowds, small and cut ellipses, equal scores, images without faces or detections."""
    rng = np.random.default_rng(seed)
    images, detections = [], {}
    for number in range(rng.integers(1, 4)):
        height, width = (int(v) for v in rng.integers(4, 48, 2))
        count = int(rng.integers(0, 4))
        largest = rng.choice([4, 12, 24])
        ellipses = np.column_stack(
            [
                np.sort(rng.uniform(1, largest, (count, 2)))[:, ::-1],
                rng.uniform(-np.pi / 2, np.pi / 2, count),
                rng.uniform(-2, width + 2, count),
                rng.uniform(-2, height + 2, count),
            ]
        )
        image = FDDBImage(f"2002/{number}", int(rng.integers(1, 11)), ellipses, (height, width))
        images.append(image)
        if rng.random() < 0.15:
            continue
        boxes = []
        for _ in range(rng.integers(0, 6)):
            if count and rng.random() < 0.8:
                a, b, _, x, y = ellipses[rng.integers(count)]
                box = np.array([x - b, y - a, x + b, y + a]) + rng.normal(0, largest / 6, 4)
            else:
                box = rng.uniform(-4, 48, 4)
            if rng.random() < 0.5:
                box = np.round(box * 2) / 2  # halves: the rounding of corners
            boxes.append([*np.minimum(box[:2], box[2:]).tolist(), *np.maximum(box[:2], box[2:]).tolist()])
        scores = (
            [float(v) for v in rng.integers(-2, 3, len(boxes)) / 2]
            if seed % 3
            else rng.normal(size=len(boxes)).tolist()
        )
        detections[image.image_id] = boxes, scores
    return images, detections


def compute(images, detections, ellipse="none"):
    evaluator = FDDBRoc(images)
    for image_id, (boxes, scores) in detections.items():
        evaluator.update(image_id, Detections(boxes, scores))
    return evaluator.curves(ellipse)


def assert_equal(result, points, num_faces):
    assert result.thresholds.tolist() == [threshold for threshold, *_ in points]
    if num_faces == 0:
        assert np.isnan(result.discrete).all() and np.isnan(result.continuous).all()
        assert result.false_positives.tolist() == [number for _, number, _, _ in points]
        return
    hits = np.rint(result.discrete * num_faces).astype(int)
    np.testing.assert_allclose(hits, result.discrete * num_faces, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.continuous * num_faces, [sum_ for *_, sum_ in points], rtol=0, atol=1e-9)
    assert all(hit in possible for hit, (_, _, possible, _) in zip(hits, points))
    assert (result.false_positives + hits).tolist() == [number for _, number, _, _ in points]


# A tilted ellipse from a box, for the oracle and as a regressor.
WEIGHTS = np.array([[0, 0, 0.001, 1, 0], [0, 0, -0.002, 0, 1], [0.1, 0.45, 0, 0.5, 0], [0.5, 0.05, 0.003, 0, 0.5]])
BIAS = np.array([0.5, -0.5, 0.05, 0.2, -0.3])


def to_ellipse(box):
    x1, y1, x2, y2 = box
    e = [sum(v * w for v, w in zip((x1, y1, x2 - x1, y2 - y1), column)) + b for column, b in zip(WEIGHTS.T, BIAS)]
    e[2] += -math.pi / 2 if e[2] >= 0 else math.pi / 2
    return e


@pytest.mark.parametrize("start", range(0, 240, 40))
def test_against_the_oracle(start):
    ambiguous = 0
    for seed in range(start, start + 40):
        images, detections = random_set(seed)
        num_faces = sum(len(image.ellipses) for image in images)
        points = published_protocol(images, detections)
        ambiguous += any(len(possible) > 1 for _, _, possible, _ in points)
        assert_equal(compute(images, detections), points, num_faces)
        if seed % 2:
            result = compute(images, detections, EllipseRegressor(WEIGHTS, BIAS))
            assert_equal(result, published_protocol(images, detections, to_ellipse), num_faces)
    assert ambiguous <= 2  # several best matchings are rare, so numbers of true positives were compared


def pixels(spans):
    return [
        {(x, y) for y, (a, b) in enumerate(zip(first, last)) for x in range(a, b + 1)}
        for first, last in zip(spans.first.tolist(), spans.last.tolist())
    ]


@pytest.mark.parametrize("seed", range(3))
def test_masks_pixel_by_pixel(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        height, width = (int(v) for v in rng.integers(1, 60, 2))
        size = rng.choice([2, 9, 14, 40])
        ellipses = np.column_stack([rng.uniform(-1, size, (4, 2)), rng.uniform(-4, 4, 4), rng.uniform(-20, 80, (4, 2))])
        spans = ellipse_spans(ellipses, height, width)
        expected = [draw_ellipse(ellipse, height, width) for ellipse in ellipses.tolist()]
        assert pixels(spans) == expected
        assert spans.areas().tolist() == [len(mask) for mask in expected]
        boxes = np.sort(rng.integers(-40, 160, (4, 2, 2)) / 2, axis=1).reshape(4, 4)
        expected = [draw_rectangle(*box, height, width) for box in boxes.tolist()]
        assert pixels(rectangle_spans(boxes, height, width)) == expected


def test_a_large_ellipse_has_the_area_of_an_ellipse():
    ellipses = np.array([[90, 60, angle, 150, 150] for angle in np.linspace(-1.5, 1.5, 13)])
    outline = 2 * 240  # its pixels belong to the mask, half of each outside the curve
    np.testing.assert_allclose(ellipse_spans(ellipses, 300, 300).areas(), np.pi * 90 * 60 + outline / 2, rtol=0.005)


def test_regions_outside_the_image_are_empty():
    far = np.array([[50.0, 20.0, 1.0, 1e6, 1e6], [50, 20, 1, -500, 10], [50, 20, 1, 10, 500]])
    assert ellipse_spans(far, 30, 40).areas().tolist() == [0, 0, 0]
    assert rectangle_spans(np.array([[50.0, 0, 60, 10], [-9, -9, -1, -1]]), 30, 40).areas().tolist() == [0, 0]
    huge = np.array([[1e6, 1e6, 0.3, 0, 0], [1e6, 0, 0, 20, 10]])
    assert ellipse_spans(huge, 30, 40).areas().tolist() == [30 * 40, 40]


# --- Hand-worked cases. A degenerate ellipse of axes (4, 0.5) is a line of 9 pixels. ---

LINE = [4, 0.5, 0, 10, 10]  # the pixels x = 6..14 of row 10


def line_image(name="a", fold=1, shift=0.0):
    return FDDBImage(name, fold, np.array([LINE]) + [0, 0, 0, shift, 0], (20, 40))


def test_hand_worked():
    # IoUs with the 9 pixels: 9/9, 5/9 and 4/10.
    boxes = [[6, 10, 14, 10], [6, 10, 10, 10], [5, 10, 9, 10]]
    result = compute([line_image()], {"a": (boxes, [0.1, 0.5, 0.9])})
    assert result.thresholds.tolist() == [math.inf, 0.9, 0.5, 0.1]
    assert result.false_positives.tolist() == [0, 1, 1, 2]
    assert result.discrete.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(result.continuous, [0, 4 / 10, 5 / 9, 1])
    assert result.counts == {"images": 1, "faces": 1, "detections": 3, "images_without_predictions": 0}
    assert result.at(1) == (1.0, pytest.approx(5 / 9)) and result.at(0) == (0.0, 0.0)


def test_an_iou_of_exactly_one_half_is_no_hit():
    result = compute([line_image()], {"a": ([[6, 10, 14, 11]], [1.0])})  # 9 of 18 pixels
    assert result.discrete[-1] == 0 and result.continuous[-1] == 0.5 and result.false_positives[-1] == 1


def test_the_sum_of_ious_is_largest_not_the_number_of_hits():
    # The second detection covers both faces; the first one fits one of them.
    image = FDDBImage("a", 1, np.array([LINE, [4, 0.5, 0, 12, 10]]), (20, 40))
    result = compute([image], {"a": ([[6, 10, 14, 10], [6, 10, 16, 10]], [0.9, 0.8])})
    np.testing.assert_allclose(result.continuous, [0, 1 / 2, (1 + 9 / 11) / 2])
    assert result.discrete.tolist() == [0, 0.5, 1]


def test_equal_scores_are_one_point_and_the_order_of_updates_does_not_matter():
    images = [line_image("a"), line_image("b", 2)]
    detections = {"a": ([[6, 10, 14, 10]], [0.5]), "b": ([[0, 0, 5, 5], [6, 10, 14, 10]], [0.5, 0.5])}
    result = compute(images, detections)
    assert result.thresholds.tolist() == [math.inf, 0.5]
    assert (result.discrete[-1], result.false_positives[-1]) == (1.0, 1)
    again = compute(images[::-1], dict(reversed(detections.items())))
    assert again.discrete.tolist() == result.discrete.tolist()


def test_nothing_detected_and_nothing_annotated():
    result = compute([line_image()], {})
    assert result.thresholds.tolist() == [math.inf] and result.at(200) == (0.0, 0.0)
    empty = FDDBImage("a", 1, np.empty((0, 5)), (20, 40))
    result = compute([empty], {"a": ([[0, 0, 5, 5]], [1.0])})
    assert math.isnan(result.at(200)[0]) and result.false_positives.tolist() == [0, 1]
    assert result.to_dict()["final"] == {"discrete": None, "continuous": None, "false_positives": 1}
    assert "n/a" in FDDBResult({"none": result}).table()
    with pytest.raises(ValueError, match="needs at least 5 pairs of a detection and a face, got 0"):
        compute([empty], {"a": ([[0, 0, 5, 5]], [1.0])}, "fitted")


def test_many_detections_on_few_faces():
    """Only the best few of each face are matched; the oracle's permutations are out of reach, scipy's are not."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(0)
    ellipses = np.column_stack([rng.uniform(9, 12, (4, 2)), rng.uniform(-1, 1, 4), rng.uniform(20, 50, (4, 2))])
    image = FDDBImage("a", 1, ellipses, (70, 70))
    boxes = np.tile(ellipses[:, [3, 4, 3, 4]], (40, 1)) + rng.normal(0, 3, (160, 4)) + [-10, -10, 10, 10]
    scores = rng.permutation(160)
    result = compute([image], {"a": (boxes, scores)})
    faces = [draw_ellipse(ellipse, 70, 70) for ellipse in ellipses.tolist()]
    regions = [draw_rectangle(*box, 70, 70) for box in boxes.tolist()]
    iou = np.array([[len(f & r) / len(f | r) for r in regions] for f in faces])[:, np.argsort(-scores)]
    matchings = [linear_sum_assignment(iou[:, :count], maximize=True) for count in range(1, 161)]
    np.testing.assert_allclose(result.continuous[1:], [iou[matching].sum() / 4 for matching in matchings], atol=1e-12)


@pytest.mark.parametrize(
    "image_id, boxes, scores, message",
    [
        ("b", [], [], "expected an image of the ground truth, got 'b'"),
        ("a", [[0, 0, 1]], [1], r"expected boxes (k, 4) and scores (k,), got (1, 3) and (1,)"),
        ("a", [[0, 0, 1, 1]], [1, 2], "got (1, 4) and (2,)"),
        (
            "a",
            [[0, 0, 1, 1], [2, 0, 1, 1]],
            [1, 1],
            "expected x1 <= x2, y1 <= y2, finite numbers and none beyond any image",
        ),
        ("a", [[0, 0, math.nan, 1]], [1], "got boxes[0] = [0.0, 0.0, nan, 1.0]"),
        ("a", [[0, 0, 1e9, 1]], [1], "got boxes[0]"),
        ("a", [[0, 0, 1, 1]], [math.nan], "scores[0] = nan"),
    ],
)
def test_refused_updates_change_nothing(image_id, boxes, scores, message):
    evaluator = FDDBRoc([line_image()])
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluator.update(image_id, Detections(boxes, scores))
    evaluator.update("a", Detections(torch.tensor([[6.0, 10, 14, 10]]), torch.tensor([0.5])))
    with pytest.raises(ValueError, match="expected one update per image, got a second one for 'a'"):
        evaluator.update("a", Detections([], []))
    assert evaluator.curves().discrete.tolist() == [0, 1]


def test_refused_annotations_and_ellipses():
    with pytest.raises(ValueError, match="expected each image once, got 'a' again"):
        FDDBRoc([line_image(), line_image()])
    with pytest.raises(ValueError, match="image 'a': expected a height and width of at most 16384 pixels, got None"):
        FDDBRoc([FDDBImage("a", 1, np.empty((0, 5)), None)])
    with pytest.raises(ValueError, match="ellipse: expected 'none', 'fitted' or an EllipseRegressor, got 'round'"):
        FDDBRoc([line_image()]).curves("round")


# --- Ellipses from rectangles. ---


def faces_of(rng, count, size=(200, 200)):
    """Upright ellipses, and boxes of which they are an affine function."""
    center, width = rng.uniform(60, 140, (count, 2)), rng.uniform(30, 60, count)
    height = width * rng.uniform(1.1, 1.5, count)
    boxes = np.column_stack(
        [center[:, 0] - width / 2, center[:, 1] - height / 2, *(center.T + [width / 2, height / 2])]
    )
    tilt = 0.002 * (height - 45)
    theta = np.where(tilt >= 0, tilt - np.pi / 2, tilt + np.pi / 2)
    ellipses = np.column_stack([0.6 * height, 0.48 * width, theta, center[:, 0], center[:, 1] - 0.1 * height])
    return boxes, ellipses


def test_a_fit_recovers_an_affine_map():
    boxes, ellipses = faces_of(np.random.default_rng(0), 30)
    regressor = EllipseRegressor.fit(boxes, ellipses)
    np.testing.assert_allclose(regressor(boxes), ellipses, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="at least 5 pairs of a detection and a face, got 4"):
        EllipseRegressor.fit(boxes[:4], ellipses[:4])


def cross_fold_set(rng, num_images=24):
    images, detections = [], {}
    for number in range(num_images):
        boxes, ellipses = faces_of(rng, 1)
        ellipses[:, 3:] += rng.normal(0, 1, (1, 2))
        images.append(FDDBImage(f"i{number}", number % 4 + 1, ellipses, (200, 200)))
        background = [[0.0, 0.0, 9.0, 9.0]]
        detections[f"i{number}"] = np.concatenate([boxes, background]), rng.random(2)
    return images, detections


def test_each_fold_is_fitted_to_the_others():
    images, detections = cross_fold_set(np.random.default_rng(1))
    total = 0.0
    for fold in (1, 2, 3, 4):
        others = [image for image in images if image.fold != fold]
        fitted = EllipseRegressor.fit(
            np.concatenate([detections[image.image_id][0][:1] for image in others]),
            np.concatenate([image.ellipses for image in others]),
        )
        mine = [image for image in images if image.fold == fold]
        result = compute(mine, {image.image_id: detections[image.image_id] for image in mine}, fitted)
        total += result.continuous[-1] * len(mine)
    result = compute(images, detections, "fitted")
    assert result.continuous[-1] * len(images) == pytest.approx(total, abs=1e-9)
    assert result.continuous[-1] > compute(images, detections).continuous[-1] + 0.1

    alone = [image for image in images if image.fold == 1]
    with pytest.raises(ValueError, match="cannot fit ellipses for fold 1 to the other folds: .*got 0"):
        compute(alone, {image.image_id: detections[image.image_id] for image in alone}, "fitted")


def s3fd_values(rng):
    shapes = {"meanX": (4, 1), "stdX": (4, 1), "w": (5, 4), "meanY": (5, 1), "stdY": (5, 1)}
    return {name: rng.uniform(0.5, 2, shape) for name, shape in shapes.items()}


def write_s3fd(path, values):
    h5py = pytest.importorskip("h5py", reason="h5py, which reads S3FD's regressor, is not installed")
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value


def test_s3fd_regressor(tmp_path):
    values = s3fd_values(np.random.default_rng(0))
    write_s3fd(tmp_path / "Fit.mat", values)
    box = np.array([10.0, 20, 40, 70])
    x = (np.array([10.0, 20, 30, 50]) - values["meanX"].T) / values["stdX"].T
    expected = (x @ values["w"].T * values["stdY"].T + values["meanY"].T)[0]
    expected[2] += -np.pi / 2 if expected[2] >= 0 else np.pi / 2
    np.testing.assert_allclose(EllipseRegressor.from_s3fd(tmp_path / "Fit.mat")(box[None])[0], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": None}, "w: expected real numbers of shape (5, 4), got nothing"),
        ({"w": np.ones((4, 5))}, "w: expected real numbers of shape (5, 4), got float64 (4, 5)"),
        ({"meanY": np.ones((5, 1), dtype=np.int64)}, "meanY: expected real numbers of shape (5, 1), got int64 (5, 1)"),
        ({"stdX": np.zeros((4, 1))}, "expected coefficients up to 1e+06, got inf"),
        ({"meanX": np.full((4, 1), np.nan)}, "expected coefficients up to 1e+06, got nan"),
    ],
)
def test_malformed_s3fd_regressor(tmp_path, change, message):
    values = {k: v for k, v in (s3fd_values(np.random.default_rng(0)) | change).items() if v is not None}
    write_s3fd(tmp_path / "Fit.mat", values)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        EllipseRegressor.from_s3fd(tmp_path / "Fit.mat")
    assert str(tmp_path / "Fit.mat") in str(caught.value)


def test_s3fd_regressor_without_h5py_or_without_the_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such file; S3FD's regressor is its Fit\.mat"):
        EllipseRegressor.from_s3fd(tmp_path / "Fit.mat")
    (tmp_path / "Fit.mat").write_bytes(b"no HDF5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"Fit\.mat: reading it needs h5py: pip install h5py"):
        EllipseRegressor.from_s3fd(tmp_path / "Fit.mat")


# --- Files. ---


def test_predictions_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    images = [FDDBImage(f"2002/{number}", number % 3 + 1, np.empty((0, 5)), None) for number in range(9)]
    boxes = np.sort(rng.uniform(0, 400, (9, 5, 2, 2)), axis=2).reshape(9, 5, 4).astype(np.float32)
    scores = rng.random((9, 5), dtype=np.float32)
    detections = {f"2002/{n}": Detections(torch.from_numpy(boxes[n, :n]), scores[n, :n]) for n in range(6)}
    write_fddb_predictions(tmp_path / "out", images, detections)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"fold-0{n}-out.txt" for n in (1, 2, 3)]
    read = dict(read_fddb_predictions(tmp_path / "out"))
    assert len(read) == 9 and read["2002/8"].boxes.shape == (0, 4)
    for n in range(6):
        n = min(n, 4)
        assert np.array_equal(read[f"2002/{n}"].boxes.astype(np.float32), boxes[n, :n])
        assert np.array_equal(read[f"2002/{n}"].scores.astype(np.float32), scores[n, :n])


@pytest.mark.parametrize(
    "detections, message",
    [
        ({"x": ([], [])}, "expected images of the ground truth, got 'x'"),
        ({"a": ([[0, 0, 1, 1]], [])}, "image 'a': expected boxes (k, 4) and scores (k,), got (1, 4) and (0,)"),
        (
            {"a": ([[0, 0, 1, 1]], [math.inf])},
            "image 'a': expected finite numbers, x1 <= x2 and y1 <= y2, got boxes[0]",
        ),
        ({"a": ([[2, 0, 1, 1]], [1])}, "image 'a': expected finite numbers"),
    ],
)
def test_refused_predictions_write_nothing(tmp_path, detections, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_fddb_predictions(tmp_path, [line_image()], {k: Detections(*v) for k, v in detections.items()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "expected files fold-01-out.txt and so on, got none"),
        ({"MTCNNDiscROC.txt": "0 0 1"}, "expected files fold-01-out.txt and so on, got none"),
        ({"fold-01-out.txt": ""}, "expected the detections of at least one image, got none"),
        (
            {"fold-01-out.txt": "a\n1\n1 1 1 1\n"},
            "fold-01-out.txt:3: expected 'x y w h score', finite numbers, got '1 1",
        ),
        ({"fold-01-out.txt": "a\n2\n1 1 1 1 1\n1 1 -1 1 1\n"}, "fold-01-out.txt:4: expected w and h not negative, and"),
        (
            {"fold-01-out.txt": "a\n0\n", "fold-02-out.txt": "b\n0\na\n0\n"},
            "fold-02-out.txt:3: expected each image once, got",
        ),
    ],
)
def test_malformed_predictions(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_fddb_predictions(tmp_path))


def test_one_file_of_all_images(tmp_path):
    (tmp_path / "Dets.txt").write_text("a\n0\nb\n1\n1 2 3 4 0.5\n")
    (first_id, first), (_, second) = read_fddb_predictions(tmp_path / "Dets.txt")
    assert (first_id, len(first.boxes)) == ("a", 0)
    assert second.boxes.tolist() == [[1, 2, 4, 6]] and second.scores.tolist() == [0.5]
    with pytest.raises(FileNotFoundError, match="no such folder or file of predictions"):
        list(read_fddb_predictions(tmp_path / "nothing"))


# --- The command. ---


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_fddb", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_folds(folder, images):
    folder.mkdir()
    sizes = ["image,width,height"]
    for fold in sorted({image.fold for image in images}):
        mine = [image for image in images if image.fold == fold]
        lines = [
            line
            for image in mine
            for line in (
                image.image_id,
                str(len(image.ellipses)),
                *(f"{' '.join(map(repr, e))}  1" for e in image.ellipses.tolist()),
            )
        ]
        (folder / f"FDDB-fold-{fold:02d}-ellipseList.txt").write_text("\n".join(lines) + "\n")
        (folder / f"FDDB-fold-{fold:02d}.txt").write_text("\n".join(image.image_id for image in mine) + "\n")
        sizes += [f"{image.image_id},{image.size[1]},{image.size[0]}" for image in mine]
    (folder / "image_sizes.csv").write_text("\n".join(sizes) + "\n")


@pytest.fixture
def small(tmp_path):
    """Folders of annotations and predictions: four folds of a few faces."""
    images, detections = cross_fold_set(np.random.default_rng(2), num_images=12)
    write_folds(tmp_path / "folds", images)
    found = {image_id: Detections(*columns) for image_id, columns in detections.items()}
    write_fddb_predictions(tmp_path / "predictions", images, found)
    return tmp_path


def test_command(tool, small, capsys):
    write_s3fd(small / "Fit.mat", s3fd_values(np.random.default_rng(0)))
    out = small / "out"
    tool.main(
        ["--predictions", str(small / "predictions"), "--annotations", str(small / "folds")]
        + ["--ellipse", "none", "fitted", "s3fd", "--regressor", str(small / "Fit.mat")]
        + ["--json", str(out / "roc.json"), "--plot", str(out / "roc.png")]
    )
    printed = capsys.readouterr().out
    assert re.search(r"^none +100.00 .* 12$", printed, re.M) and re.search(r"^fitted +100.00 .* 12$", printed, re.M)
    assert "12 images, 0 of them without predictions; 12 faces" in printed
    results = json.loads((out / "roc.json").read_text())["results"]
    assert list(results) == ["none", "fitted", "s3fd"] and results["none"]["discrete"]["200"] == 1.0
    assert results["fitted"]["continuous"]["200"] > results["none"]["continuous"]["200"]
    assert (out / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["roc.json", "roc.png"]


@pytest.mark.parametrize(
    "arguments, change, message",
    [
        (["--ellipse", "s3fd"], None, "--ellipse s3fd: expected --regressor, S3FD's Fit.mat, got none"),
        ([], "image_sizes.csv", "expected image_sizes.csv, or the folder of the images, got neither"),
        ([], "FDDB-fold-03.txt", "FDDB-fold-03.txt: no such file"),
    ],
)
def test_command_refuses_and_writes_nothing(tool, small, arguments, change, message):
    if change:
        (small / "folds" / change).unlink()
    inputs = ["--predictions", str(small / "predictions"), "--annotations", str(small / "folds")]
    with pytest.raises(SystemExit) as caught:
        tool.main([*inputs, *arguments, "--json", str(small / "out" / "roc.json")])
    assert message in str(caught.value) and not (small / "out").exists()


def damage(content, rng):
    content = bytearray(content)
    for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(len(content)))
        kind = rng.integers(8)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at : at + 1] = bytes(rng.choice(list(b"0123456789.-+ \nenaif,_\0"), 1).astype(np.uint8))
        elif kind >= 5:  # most numbers stay numbers
            content[at] = rng.choice(list(b"0123456789")) if content[at] in b"0123456789" else content[at]
        elif kind == 2:
            del content[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            content[at:at] = rng.bytes(int(rng.integers(1, 16)))
        else:
            content[at : at + 8] = rng.bytes(8)
        content = content or bytearray(b"\0")
    return bytes(content)


@pytest.mark.parametrize("count", [600, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_text_files(tool, small, capsys, count):
    """Damage a file; the command gives a result or a documented error, and in that case no output."""
    out = small / "out"
    out.mkdir()
    files = sorted([*(small / "folds").iterdir(), *(small / "predictions").iterdir()])
    outcome = Counter()
    for seed in range(count):
        rng = np.random.default_rng(seed)
        file = files[rng.integers(len(files))]
        sound = file.read_bytes()
        file.write_bytes(damage(sound, rng))
        ellipse = ("none", "fitted")[seed % 2]
        arguments = ["--predictions", str(small / "predictions"), "--annotations", str(small / "folds")]
        try:
            tool.main([*arguments, "--ellipse", ellipse, "--json", str(out / "roc.json")])
            (out / "roc.json").unlink()
            outcome["result"] += 1
        except SystemExit as error:
            assert re.search(r"error: .*(expected|no such file)", str(error)), seed
            outcome["refused"] += 1
        finally:
            file.write_bytes(sound)
        assert list(out.iterdir()) == [], seed
        capsys.readouterr()
    assert outcome["refused"] > count / 3 and outcome["result"] > count / 10


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_regressors(tmp_path, count):
    path = tmp_path / "Fit.mat"
    write_s3fd(path, s3fd_values(np.random.default_rng(0)))
    sound, boxes, refused = path.read_bytes(), np.array([[0.0, 0, 30, 40], [-1e6, -1e6, 1e6, 1e6]]), 0
    for seed in range(count):
        path.write_bytes(damage(sound, np.random.default_rng(seed)))
        try:
            ellipses = EllipseRegressor.from_s3fd(path)(boxes)
            assert np.isfinite(ellipses).all(), seed
            ellipse_spans(ellipses, 40, 40)
        except ValueError as error:
            assert re.match(rf"{re.escape(str(path))}: expected ", str(error)), seed
            refused += 1
    assert refused > count / 10


# --- The official evaluator's curves. ---


@functools.cache
def evaluator_of(folder, detector):
    evaluator = FDDBRoc.from_folder(folder / "annotations")
    for image_id, found in read_fddb_predictions(folder / "detections_with_roc" / detector):
        evaluator.update(image_id, found)
    return evaluator


def test_equals_the_official_curves(reference_data):
    """The tiny set's curves are those of the oracle above."""
    for detector, last in reference_data.numbers["fddb_detectors"].items():
        assert_curves(reference_data.folder / "fddb", detector, last)


def assert_curves(fddb, detector, last):
    result = evaluator_of(fddb, detector).curves()
    folder = fddb / "detections_with_roc" / detector
    rate, false_positives, threshold = np.loadtxt(folder / f"{detector}DiscROC.txt")[::-1].T  # from the origin on
    assert result.false_positives.tolist() == false_positives.tolist()
    np.testing.assert_allclose(result.discrete, rate, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.thresholds[1:], threshold[1:], rtol=1e-5)
    rate, false_positives = np.loadtxt(folder / f"{detector}ContROC.txt")[::-1].T
    assert result.false_positives.tolist() == false_positives.tolist()
    np.testing.assert_allclose(result.continuous, rate, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        [result.discrete[-1], result.continuous[-1], result.false_positives[-1]], last, atol=1e-6
    )


@pytest.mark.slow
def test_real_regressors(shared_data, tmp_path):
    pytest.importorskip("h5py", reason="h5py, which reads S3FD's regressor, is not installed")
    evaluator = evaluator_of(shared_data / "fddb", "MTCNN")
    s3fd = EllipseRegressor.from_s3fd(shared_data / "fddb" / "sfd_regressor" / "Fit.mat")
    result = evaluator.compute({"none": "none", "s3fd": s3fd, "fitted": "fitted"})
    rounded = {name: tuple(round(rate, 3) for rate in curves.at(200)) for name, curves in result.curves.items()}
    assert rounded["none"] == (0.894, 0.673) and rounded["s3fd"] == (0.897, 0.757)
    assert rounded["fitted"][0] >= 0.896 and rounded["fitted"][1] >= 0.765
    write_json(tmp_path / "roc.json", result.to_dict())
    result.plot(tmp_path / "roc.pdf")
    assert (tmp_path / "roc.pdf").read_bytes().startswith(b"%PDF")
