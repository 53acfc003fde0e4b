"""The WIDER FACE protocol against a transcription in plain loops, hand-worked cases and published result sets."""

import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from oracles import published_protocol

from group_sampling.data.wider_face import read_annotations
from group_sampling.detections import Detections
from group_sampling.evaluation import WiderFaceAP, read_predictions
from group_sampling.files import write_json

BOX = [[0.0, 0.0, 9.0, 9.0]]


def xyxy(rows):
    return np.array([[x, y, x + w, y + h] for x, y, w, h in (row[:4] for row in rows)], dtype=float).reshape(-1, 4)


def evaluate(truth, subsets, ignore, detections, sub_detectors=None, **options):
    """``sub_detectors``: scale -> rows by image."""
    evaluator = WiderFaceAP(
        {image: xyxy(faces) for image, faces in truth.items()}, ignore=ignore, subsets=subsets, **options
    )
    for image in detections:
        lists = {scale: as_detections(rows.get(image, [])) for scale, rows in (sub_detectors or {}).items()}
        evaluator.update(image, as_detections(detections[image])._replace(sub_detectors=lists or None))
    return evaluator.compute()


def as_detections(rows):
    return Detections(xyxy(rows), [row[4] for row in rows])


def random_set(seed):
    """A small data set: crowds on a coarse grid (equal IoUs), few distinct scores, missing and empty images."""
    rng = np.random.default_rng(seed)
    kind = ("mixed", "fine", "one score", "mixed", "no detections", "no faces")[seed % 6]
    step = 1 if kind == "fine" else 4
    truth, counted, ignore, detections = {}, {}, {}, {}
    for number in range(rng.integers(1, 6)):
        image = f"{number}--Event/{number}_" + ("big", "face.jpg", "g", "jpg")[number % 4]
        faces = [] if kind == "no faces" or rng.random() < 0.15 else rng.integers(0, 24, (rng.integers(1, 8), 4)) * step
        faces = [tuple(int(v) for v in face) for face in faces]
        truth[image] = faces
        ignore[image] = [bool(v) for v in rng.random(len(faces)) < 0.2]
        counted[image] = [bool(v) and not skip for v, skip in zip(rng.random(len(faces)) < 0.7, ignore[image])]
        if kind == "no detections" or rng.random() < 0.2:
            if rng.random() < 0.5:
                detections[image] = []
            continue
        rows = []
        for _ in range(rng.integers(1, 14)):
            if faces and rng.random() < 0.7:
                box = np.array(faces[rng.integers(len(faces))]) + rng.integers(-2, 3, 4) * (step // 2 or 1)
            else:
                box = rng.integers(0, 24, 4) * step
            score = {"one score": 0.25, "fine": rng.normal()}.get(kind, rng.integers(0, 6) / 5)
            rows.append((int(box[0]), int(box[1]), max(0, int(box[2])), max(0, int(box[3])), float(score)))
        detections[image] = rows
    return truth, counted, ignore, detections, int(rng.choice([1, 7, 50, 100, 1000], p=[0.1, 0.2, 0.3, 0.3, 0.1]))


def is_face(box):
    return box[2] > 0 and box[3] > 0


def nearest_scale(box, scales=(16, 32, 64, 128)):
    size = math.log(math.sqrt(box[2] * box[3]))
    return min(scales, key=lambda s: (round(abs(math.log(s) - size), 9), s))


def assert_equal(result, name, expected, num_faces):
    ap, totals = expected
    np.testing.assert_allclose(result.ap[name], ap, rtol=0, atol=1e-12)
    recall, precision = result.curves[name]
    for i, (proposals, hits) in enumerate(totals):
        assert math.isnan(precision[i]) if proposals == 0 else precision[i] == hits / proposals
        assert math.isnan(recall[i]) if num_faces == 0 else recall[i] == hits / num_faces


@pytest.mark.parametrize("block", range(6))
def test_equals_the_published_protocol(block):
    partial = 0
    for seed in range(block * 100, block * 100 + 100):
        truth, kept, ignore, detections, size = random_set(seed)
        result = evaluate(truth, {"easy": kept}, ignore, detections, num_thresholds=size)
        every = {image: [is_face(f) and not i for f, i in zip(faces, ignore[image])] for image, faces in truth.items()}
        for name, counted, skip in (("easy", kept, True), ("all", every, False)):
            expected = published_protocol(truth, counted, detections, num_thresholds=size, skip_empty_images=skip)
            num_faces = sum(map(sum, counted.values()))
            assert result.num_faces[name] == num_faces, seed
            assert_equal(result, name, expected, num_faces)
            partial += 0 < expected[0] < 1
    assert partial > 60  # of 200: most sets are no trivial ones


def test_sub_detectors_are_result_sets_of_their_own():
    """Each @s is All of the published protocol on its list, normalized over that list, whatever the others are."""
    num_partial = 0
    for seed in range(100):
        truth, _, ignore, detections, size = random_set(seed)
        if not detections:
            continue
        lists = {8 * 2**i: random_list(truth, seed, i) for i in range(3)}
        result = evaluate(truth, None, ignore, detections, lists, num_thresholds=size)
        assert list(result.ap) == ["all", "@8", "@16", "@32"]
        every = {image: [is_face(f) and not i for f, i in zip(faces, ignore[image])] for image, faces in truth.items()}
        num_faces = sum(map(sum, every.values()))
        for name, rows in (("all", detections), *((f"@{scale}", found) for scale, found in lists.items())):
            rows = {image: rows.get(image, []) for image in detections}
            expected = published_protocol(truth, every, rows, num_thresholds=size, skip_empty_images=False)
            assert result.num_faces[name] == num_faces and result.num_detections[name] == sum(map(len, rows.values()))
            assert_equal(result, name, expected, num_faces)
            num_partial += name != "all" and 0 < expected[0] < 1
        alone = evaluate(truth, None, ignore, detections, num_thresholds=size)
        assert list(alone.ap) == ["all"] and alone.counts == result.counts
    assert num_partial > 100


def random_list(truth, seed, index):
    """Rows by image: some faces, moved, with scores of a range that no other list has."""
    rng, rows = np.random.default_rng((seed, index)), {}
    for image, faces in truth.items():
        moved = [np.array(face) + rng.integers(-2, 3, 4) for face in faces for _ in range(rng.integers(0, 3))]
        strays = [rng.integers(0, 96, 4) for _ in range(rng.integers(0, 3))]
        rows[image] = [
            (int(b[0]), int(b[1]), max(0, int(b[2])), max(0, int(b[3])), float(rng.integers(0, 9) - 5 * index))
            for b in (*moved, *strays)
        ]
    return rows


def test_sub_detectors_of_events_keep_the_normalization_of_their_sets():
    evaluator = WiderFaceAP({"a/1": BOX, "b/1": BOX}, num_thresholds=10)
    for image, joint, alone in (("a/1", 0.9, 5.0), ("b/1", 0.1, 1.0)):
        found = Detections(BOX * 2, [joint, joint], sub_detectors={16: Detections(BOX, [alone])})
        evaluator.update(image, found)
    events = evaluator.compute_by(lambda image: image[0])
    assert [events[event].ap["@16"] for event in "ab"] == [1, 1]
    # Found from the threshold on that the score has reached: the first one in a, the last one in b.
    assert [events[event].curves["@16"][0].tolist() for event in "ab"] == [[1] * 10, [0] * 9 + [1]]
    assert evaluator.compute().ap == {"all": 0.5, "@16": 1}


def test_sizes_partition_faces_and_detections():
    for seed in range(60):
        truth, _, ignore, detections, _ = random_set(seed)
        result = evaluate(truth, None, ignore, detections, sizes=(16, 32, 64, 128))
        names = [name for name in result.ap if name.startswith("size")]
        assert names == ["size 16", "size 32", "size 64", "size 128"]
        assert sum(result.num_faces[name] for name in names) == result.num_faces["all"]
        assert sum(result.num_detections[name] for name in names) == result.num_detections["all"]


def test_one_size_for_everything_equals_all():
    for seed in range(60):
        truth, _, ignore, detections, _ = random_set(seed)
        result = evaluate(truth, None, ignore, detections, sizes=[32])
        np.testing.assert_equal(result.ap["size 32"], result.ap["all"])
        np.testing.assert_equal(result.curves["size 32"], result.curves["all"])


@pytest.mark.parametrize("width, height, size", [(16, 32, 16), (23, 23, 32), (22, 22, 16), (32, 64, 32), (64, 128, 64)])
def test_the_nearest_size_is_the_smaller_one_on_a_tie(width, height, size):
    evaluator = WiderFaceAP({"a": [[5, 5, 5 + width, 5 + height]]}, sizes=(16, 32, 64, 128))
    faces = evaluator.compute().num_faces
    assert [name for name in faces if name != "all" and faces[name]] == [f"size {size}"]


def test_hand_worked_case():
    # 10 x 10 faces are 11 x 11 = 121 pixels. Shifted by 3: overlap 88, union 154, IoU 4/7; by 4: 77 / 165 < 0.5.
    evaluator = WiderFaceAP({"a": [[0, 0, 10, 10], [50, 0, 60, 10]], "b": [[0, 0, 10, 10]]}, num_thresholds=10)
    evaluator.update("a", Detections([[3, 0, 13, 10], [0, 0, 10, 10], [54, 0, 64, 10]], [1.0, 0.85, 0.45]))
    evaluator.update("b", Detections([[0, 0, 10, 10]], [0.0]))
    result = evaluator.compute()
    # By falling score: hit, duplicate, miss, hit. Recall 1/3 at precision 1, then 2/3 at precision 2/4.
    assert result.ap["all"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 4, abs=1e-15)
    recall, precision = result.curves["all"]
    assert recall.tolist() == [1 / 3] * 9 + [2 / 3]  # thresholds 0.9, 0.8, ..., 0.0
    assert precision.tolist() == [1] + [1 / 2] * 4 + [1 / 3] * 4 + [2 / 4]


def test_no_detections_and_no_faces():
    evaluator = WiderFaceAP({"a": [[0, 0, 9, 9]]}, subsets={"easy": {"a": [False]}})
    result = evaluator.compute()
    assert len(result.curves["all"][0]) == 1000 and result.iou_thresh == 0.5, "as published"
    assert result.ap["all"] == 0 and math.isnan(result.ap["easy"])
    assert result.counts["images_without_predictions"] == 1
    empty = WiderFaceAP({}).compute()
    assert math.isnan(empty.ap["all"]) and empty.counts["images"] == 0


def test_detections_in_an_image_without_boxes():
    evaluator = WiderFaceAP({"a": [[0, 0, 9, 9]], "b": []}, subsets={"easy": {"a": [True], "b": []}})
    evaluator.update("a", Detections([[0, 0, 9, 9]], [0.5]))
    evaluator.update("b", Detections([[0, 0, 9, 9]], [0.9]))
    result = evaluator.compute()
    assert result.ap == {"easy": 1.0, "all": 0.5}  # the published code passes over image b, All does not
    assert result.counts["images_without_faces"] == result.counts["detections_without_faces"] == 1


def test_an_empty_box_stands_for_an_image_without_faces():
    detections = {"a": [(0, 0, 9, 9, 0.5)], "b": [(30, 30, 9, 9, 0.9)]}
    with_box = evaluate({"a": [(0, 0, 9, 9)], "b": [(0, 0, 0, 0)]}, None, None, detections)
    without = evaluate({"a": [(0, 0, 9, 9)], "b": []}, None, None, detections)
    assert with_box.ap == without.ap == {"all": 0.5} and with_box.num_faces == without.num_faces == {"all": 1}


def test_counts():
    evaluator = WiderFaceAP({"a": BOX * 2, "b": BOX, "c": [], "d": BOX * 3, "e": []})
    evaluator.update("a", Detections([], []))
    evaluator.update("b", Detections(BOX, [0.5]))
    evaluator.update("c", Detections(BOX * 2, [0.5, 0.7]))
    assert len(evaluator) == 5 and list(evaluator.image_ids) == ["a", "b", "c", "d", "e"]
    assert evaluator.compute().counts == {
        "images": 5,
        "faces": 6,
        "detections": 3,
        "images_without_predictions": 3,  # a, d, e
        "images_without_faces": 2,
        "detections_without_faces": 2,
    }


def test_touching_is_no_overlap_and_the_threshold_is_reached_by_equality():
    for other in ([50, 0, 59, 9], [0, 50, 9, 59], [10, 0, 19, 9], [0, 10, 9, 19]):
        evaluator = WiderFaceAP({"a": BOX}, iou_thresh=1e-6)
        evaluator.update("a", Detections([other], [1]))
        assert evaluator.compute().ap["all"] == 0, other
    for box, ap in ((BOX, 1), ([[0, 0, 9, 8.75]], 0)):
        evaluator = WiderFaceAP({"a": BOX}, iou_thresh=1)
        evaluator.update("a", Detections(box, [1]))
        assert evaluator.compute().ap["all"] == ap


@pytest.mark.parametrize("axis", [0, 1])
def test_inverted_faces_take_no_area_away(axis):
    """Face and detection of 10 pixels; the inverted face would have -10, and 0 / 0 would hide the other one."""
    line, inverted = [0, 0, 9, 0], [0, 203, 9, 201]
    if axis == 0:
        line, inverted = [0, 0, 0, 9], [203, 0, 201, 9]
    evaluator = WiderFaceAP({"a": [line, inverted]}, subsets={"easy": {"a": [True, False]}})
    evaluator.update("a", Detections([line], [1]))
    with np.errstate(invalid="raise"):
        assert evaluator.compute().ap["easy"] == 1


def test_equal_scores_are_not_divided_by_their_range():
    evaluator = WiderFaceAP({"a": BOX})
    evaluator.update("a", Detections(BOX * 2, [0.25, 0.25]))
    with np.errstate(all="raise"):
        recall, precision = evaluator.compute().curves["all"]
    assert (recall == 1).all() and (precision == 0.5).all()


def test_ignored_and_odd_faces():
    # The last two are inverted: they overlap nothing and are counted nowhere. The "area" of the last one is -100.
    boxes = [[0, 0, 9, 9], [100, 0, 109, 9], [203, 0, 200, 9], [300, 0, 289, 9]]
    evaluator = WiderFaceAP({"a": boxes}, ignore={"a": [False, True, False, False]})
    evaluator.update("a", Detections([[100, 0, 109, 9], [0, 0, 9, 9], [200, 0, 203, 9]], [0.9, 0.8, 0.1]))
    result = evaluator.compute()
    assert result.num_faces["all"] == 1 and result.ap["all"] == 1
    assert result.curves["all"][1][-1] == 1 / 2  # the first detection is left out, the last one is a false positive


@pytest.mark.parametrize("ignore, ap", [([False, True], 1), ([True, False], 0)])
def test_the_first_face_wins_a_tie(ignore, ap):
    evaluator = WiderFaceAP({"a": [[0, 0, 10, 10], [4, 0, 14, 10]]}, ignore={"a": ignore})
    evaluator.update("a", Detections([[2, 0, 12, 10]], [1]))  # IoU 99 / 143 with both
    assert evaluator.compute().ap["all"] == ap


def test_a_subset_cannot_keep_an_ignored_face():
    evaluator = WiderFaceAP({"a": BOX * 2}, ignore={"a": [True, False]}, subsets={"easy": {"a": [True, False]}})
    assert evaluator.compute().num_faces["easy"] == 0


def test_scores_are_normalized_over_the_whole_set():
    rng = np.random.default_rng(0)
    boxes = {str(i): rng.integers(0, 50, (5, 4)) + [[0, 0, 60, 60]] for i in range(10)}
    results = []
    for scale, offset in ((1, 0), (1024, -512)):  # exact in binary
        evaluator, draw = WiderFaceAP(boxes), np.random.default_rng(1)
        for image, faces in boxes.items():
            scores = draw.integers(0, 1 << 20, 5) / (1 << 20)
            evaluator.update(image, Detections(faces + draw.integers(-9, 9, (5, 1)), scores * scale + offset))
        results.append(evaluator.compute())
    np.testing.assert_equal(results[0].curves, results[1].curves)
    assert 0 < results[0].ap["all"] < 1


def test_tensors_arrays_and_lists_are_the_same_and_copied():
    boxes, scores = [[0, 0, 9, 9], [20, 0, 29, 9]], [0.5, 0.25]
    results = []
    for convert in (list, np.array, torch.tensor, lambda v: torch.tensor(v).double().repeat_interleave(2, dim=0)[::2]):
        evaluator = WiderFaceAP({"a": [[0, 0, 9, 9]]})
        given = convert(boxes), convert(scores)
        evaluator.update("a", Detections(*given))
        if not isinstance(given[1], list):
            given[1][:] = 7
        results.append(evaluator.compute())
    for result in results[1:]:
        np.testing.assert_equal(result.curves, results[0].curves)


def test_compute_can_be_called_in_between():
    evaluator = WiderFaceAP({"a": [[0, 0, 9, 9]], "b": [[0, 0, 9, 9]]})
    evaluator.update("a", Detections([[0, 0, 9, 9]], [1]))
    assert evaluator.compute().ap["all"] == 0.5
    evaluator.update("b", Detections([[0, 0, 9, 9]], [1]))
    assert evaluator.compute().ap["all"] == 1


def test_more_faces_than_a_block_has_pairs():
    left = 10.0 * np.arange(40_000)[:, None]
    evaluator = WiderFaceAP({"a": np.hstack([left, 0 * left, left + 9, 0 * left + 9])}, num_thresholds=1)
    evaluator.update("a", Detections([[0, 0, 9, 9], [399_990, 0, 399_999, 9]], [1, 1]))
    assert evaluator.compute().ap["all"] == 2 / 40_000


def test_crowds_are_matched_in_blocks():
    rng = np.random.default_rng(3)
    corners = rng.integers(0, 3000, (1500, 2)).astype(float)
    faces = np.hstack([corners, corners + rng.integers(8, 60, (1500, 1))])
    detections = np.repeat(faces, 3, axis=0) + rng.integers(-3, 4, (4500, 4)) * [1, 1, 2, 2]
    detections[:, 2:] = np.maximum(detections[:, 2:], detections[:, :2])
    scores = rng.random(4500)
    whole = WiderFaceAP({"a": faces})
    whole.update("a", Detections(detections, scores))
    single = WiderFaceAP({"a": faces[::-1]})  # other blocks and another order
    order = rng.permutation(4500)
    single.update("a", Detections(detections[order], scores[order]))
    assert whole.compute().ap["all"] == pytest.approx(single.compute().ap["all"], abs=2e-3)  # ties go to the first face
    assert whole.compute().ap["all"] > 0.3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nobody", BOX, [1]), "expected an image of the ground truth, got 'nobody'"),
        (("done", BOX, [1]), "expected one update per image, got a second one for 'done'"),
        (("a", [[0, 0, 9]], [1]), r"image 'a': boxes: expected shape \(k, 4\), got \(1, 3\)"),
        (("a", [[0, 0, math.nan, 9]], [1]), r"image 'a': boxes\[0\]: expected numbers finite"),
        (("a", [5.0], [1]), r"image 'a': boxes: expected shape \(k, 4\), got \(1,\)"),
        (("a", [[0, 0, 1e9, 9]], [1]), r"boxes\[0\]: expected numbers finite and below 1e\+09"),
        (
            ("a", BOX + [[9, 0, 3, 9]], [1, 1]),
            r"boxes\[1\]: expected x1 <= x2 and y1 <= y2, got \[9.0, 0.0, 3.0, 9.0\]",
        ),
        (("a", BOX, [math.nan]), r"image 'a': scores: expected finite numbers, got nan at \[0\]"),
        (("a", BOX, [math.inf]), "scores: expected finite numbers, got inf"),
        (("a", BOX, [1, 2]), r"scores: expected shape \(1,\), one per box, got \(2,\)"),
        (("a", BOX, [1], {16: [BOX, [1]]}), r"sub_detectors: expected \[8\] as before, got \[16\]"),
        (("a", BOX, [1], {}), r"image 'a': sub_detectors: expected \[8\] as before, got \[\]"),
        (("a", BOX, [1], {8: [BOX, [1, 2]]}), r"image 'a': sub-detector 8: scores: expected shape \(1,\), one per box"),
    ],
)
def test_refused_updates_change_nothing(arguments, message):
    evaluator = WiderFaceAP({"a": BOX, "done": BOX})
    evaluator.update("done", Detections(BOX, [0.5], sub_detectors={8: Detections(BOX, [0.5])}))
    before = evaluator.compute()
    image, boxes, scores, lists = (*arguments, {8: [[], []]})[:4]
    lists = {scale: Detections(*columns) for scale, columns in lists.items()}
    with pytest.raises(ValueError, match=message):
        evaluator.update(image, Detections(boxes, scores, sub_detectors=lists or None))
    np.testing.assert_equal(evaluator.compute().curves, before.curves)
    evaluator.update("a", Detections(BOX, [1], sub_detectors={8: Detections([], [])}))
    assert evaluator.compute().ap == {"all": 1, "@8": 0.5}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iou_thresh": 0}, "iou_thresh: expected a number in"),
        ({"iou_thresh": 1.5}, "iou_thresh: expected a number in"),
        ({"iou_thresh": math.nan}, "iou_thresh: expected a number in"),
        ({"num_thresholds": 0}, "num_thresholds: expected at least 1, got 0"),
        ({"sizes": [32, 16]}, r"sizes: expected positive ones, ascending, got \[32, 16\]"),
        ({"sizes": [0, 16]}, "sizes: expected positive ones"),
        ({"sizes": [16, 16]}, "sizes: expected positive ones, ascending"),
        ({"sizes": [[16, 32]]}, "sizes: expected positive ones"),
        ({"ignore": {"b": [True]}}, "ignore: expected images of boxes, got 'b'"),
        ({"ignore": {"a": [True, True]}}, r"ignore: image 'a': expected 1 flags, one per box, got shape \(2,\)"),
        ({"subsets": {"easy": {}}}, "subset 'easy': expected flags for every image, got none for 'a'"),
        ({"subsets": {"all": {"a": [True]}}}, "expected names other than .*, got 'all'"),
        ({"subsets": {"@16": {"a": [True]}}}, "expected names other than .*, got '@16'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        WiderFaceAP({"a": BOX}, **options)


def test_the_smallest_sizes_and_the_largest_coordinates():
    largest = [[0, 0, np.nextafter(1e9, 0), 9]]
    evaluator = WiderFaceAP({"a": largest, "b": [[0, 0, 0.75, 0.75]]}, sizes=[0.5, 1.25], num_thresholds=1)
    evaluator.update("a", Detections(largest, [1]))
    result = evaluator.compute()
    assert result.num_faces == {"all": 2, "size 0.5": 1, "size 1.25": 1} and result.ap["size 1.25"] == 1


def test_refused_ground_truth():
    with pytest.raises(ValueError, match=r"ground truth of image 'a': boxes\[0\]: expected numbers finite"):
        WiderFaceAP({"a": [[0, 0, math.inf, 9]]})


def test_scores_that_span_more_than_a_double():
    evaluator = WiderFaceAP({"a": BOX})
    evaluator.update("a", Detections(BOX * 2, [1.7e308, -1.7e308]))
    with pytest.raises(ValueError, match="expected a range that a double holds"):
        evaluator.compute()


def test_records():
    record = types.SimpleNamespace(image_id="a", boxes=torch.tensor(BOX * 2), ignore=torch.tensor([False, True]))
    evaluator = WiderFaceAP.from_records([record], sizes=(8, 16))
    evaluator.update("a", Detections(BOX, [1], sub_detectors={8: Detections(BOX, [1])}))
    assert evaluator.compute().num_faces == {"all": 1, "@8": 1, "size 8": 1, "size 16": 0}
    with pytest.raises(ValueError, match="expected each image once, got 'a' again"):
        WiderFaceAP.from_records([record, record])


def example_result():
    faces = {"a": [[0, 0, 20, 20], [50, 0, 70, 20]]}
    evaluator = WiderFaceAP(faces, subsets={"easy": {"a": [False, False]}}, sizes=(16, 32))
    lists = {16: Detections([[0, 0, 20, 20]], [0.9]), 128: Detections(faces["a"], [1, 2])}
    evaluator.update("a", Detections([[0, 0, 20, 20], [80, 0, 100, 20]], [0.9, 0.1], sub_detectors=lists))
    return evaluator.compute()


def test_table():
    assert example_result().table().split("\n")[:7] == [
        "subset   AP (%)    faces  detections",
        "Easy        n/a        0           2",
        "All       50.00        2           2",
        "@16       50.00        2           1",
        "@128     100.00        2           2",
        "Size 16   50.00        2           2",
        "Size 32     n/a        0           0",
    ]


def test_json(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, example_result().to_dict())
    content = json.loads(path.read_text())
    expected = {"easy": None, "all": 0.5, "@16": 0.5, "@128": 1, "size 16": 0.5, "size 32": None}
    assert content["ap"] == expected
    assert content["iou_thresh"] == 0.5 and content["counts"]["detections"] == 2
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_json_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(path, example_result().to_dict())
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["pr.png", "curves"])
def test_plot(tmp_path, name):
    from matplotlib.image import imread

    example_result().plot(tmp_path / name)  # undefined curves and curves of one point are part of it
    image = imread(tmp_path / name, format="png")
    assert image.shape[0] >= 600 and image.shape[1] >= 600
    assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 10


def expected_ap(reference_data):
    """By result set; of the real ones computed with the published evaluation, of the tiny one with that above."""
    expected = json.loads((reference_data.folder / "wider/predictions/expected_ap.json").read_text())
    return {name: value for name, value in expected.items() if name != "note"}


def assert_expected_ap(reference_data, name):
    folder = reference_data.folder / "wider"
    evaluator = WiderFaceAP.from_official(folder / "ground_truth_mat")
    shuffled = WiderFaceAP.from_official(folder / "ground_truth_mat")
    rng = np.random.default_rng(0)
    for image, found in read_predictions(folder / f"predictions/{name}.tar.xz"):
        evaluator.update(image, found)
        shuffled.update(image, found.select(rng.permutation(len(found.scores))))
    result, expected = evaluator.compute(), expected_ap(reference_data)[name]
    assert result.counts["detections"] == expected["detections"]
    assert result.num_faces == reference_data.numbers["num_faces"]
    for subset in ("easy", "medium", "hard"):
        assert result.ap[subset] == pytest.approx(expected[subset], abs=1e-6)
    np.testing.assert_equal(shuffled.compute().curves, result.curves)


def test_a_published_result_set(reference_data):
    assert_expected_ap(reference_data, reference_data.numbers["result_sets"]["published"])


@pytest.mark.slow
@pytest.mark.parametrize("reference_data", ["real"], indirect=True)
def test_all_published_result_sets(reference_data):
    names = list(expected_ap(reference_data))
    assert len(names) == 5
    for name in names:
        assert_expected_ap(reference_data, name)


@pytest.mark.parametrize("reference_data", ["tiny", pytest.param("real", marks=pytest.mark.slow)], indirect=True)
def test_the_text_annotation_gives_the_same_as_the_official_files(reference_data):
    folder, numbers = reference_data.folder / "wider", reference_data.numbers
    records = read_annotations(folder / "annotations/wider_face_val_bbx_gt.txt.gz", "images")
    # The parser drops empty boxes, so some images are left without any; their detections still count as false.
    from_text = WiderFaceAP.from_records(records, sizes=(16, 32, 64, 128))
    official = WiderFaceAP.from_official(folder / "ground_truth_mat", sizes=(16, 32, 64, 128))
    for image, found in read_predictions(folder / f"predictions/{numbers['result_sets']['smallest']}.tar.xz"):
        found = found._replace(sub_detectors={16: found.select(slice(len(image) % 4, None))})
        from_text.update(image, found)
        official.update(image, found)
    expected, result = official.compute(), from_text.compute()
    assert result.counts["images_without_faces"] == numbers["images_without_faces"]
    assert result.counts["detections_without_faces"] > 0
    for name in result.ap:
        np.testing.assert_equal(result.curves[name], expected.curves[name])


def test_neither_torch_nor_scipy_is_imported():
    code = "import sys, group_sampling.evaluation; sys.exit(str({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "set()"
