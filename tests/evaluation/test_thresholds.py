"""The table of thresholds: against counts by hand and by loops, in every protocol."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from group_sampling.data.coco import CocoObjects
from group_sampling.data.records import ImageRecord
from group_sampling.detections import Detections
from group_sampling.evaluation import CocoAP, FDDBResult, WiderFaceAP
from group_sampling.evaluation.fddb.result import RocCurves
from group_sampling.evaluation.thresholds import SCORES, ScoreCurve

detections = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]), st.booleans()), max_size=12)


@given(detections, st.integers(0, 4), st.sampled_from([-1.0, 0.0, 0.25, 0.3, 0.5, 1.0, 1.5]))
def test_counts_by_loops(found, missed, score):
    num_objects, num_images = sum(is_true for _, is_true in found) + missed, 3
    curve = ScoreCurve.from_detections(*zip(*found) if found else ((), ()), num_objects=num_objects, num_images=3)

    def count(score):
        kept = [is_true for s, is_true in found if s >= score]
        return kept.count(True), kept.count(False)

    true, false = count(score)
    point = curve.at(score)
    assert point.score == score and point.false_positives_per_image == false / num_images
    expected = (true / (true + false) if true + false else math.nan, true / num_objects if num_objects else math.nan)
    assert point[1:3] == pytest.approx(expected, nan_ok=True)
    assert curve.scores.tolist() == sorted({s for s, _ in found}, reverse=True)
    if not found:
        assert curve.best() is None
        return
    f1 = {s: 2 * t / (t + f + num_objects) for s, _ in found for t, f in [count(s)]}
    best = curve.best()
    assert best.f1 == pytest.approx(max(f1.values()))
    assert best.score == max(s for s, value in f1.items() if value == pytest.approx(best.f1))


# One scene for WIDER FACE and COCO: two faces and one to ignore in the first image, none in the second.
FACES = [[0, 0, 20, 20], [50, 0, 70, 20], [100, 0, 120, 20]]
IGNORE = [False, False, True]
FOUND = {  # score -> box; a hit, the same face again, background, the ignored face, the second face
    "a": {0.9: [0, 0, 20, 20], 0.8: [1, 0, 21, 20], 0.6: [200, 0, 220, 20], 0.55: FACES[2], 0.2: FACES[1]},
    "b": {0.4: [0, 0, 9, 9]},
}
# score: precision, recall, false positives per image
EXPECTED = {
    0.1: (2 / 5, 1.0, 3 / 2),
    0.3: (1 / 4, 0.5, 3 / 2),
    0.5: (1 / 3, 0.5, 2 / 2),
    0.7: (1 / 2, 0.5, 1 / 2),
    0.9: (1.0, 0.5, 0.0),
}


def records():
    def make(image_id, boxes, ignore):
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)
        classes = np.zeros(len(boxes), dtype=np.int64)
        objects = CocoObjects(xywh, classes, xywh[:, 2] * xywh[:, 3], np.asarray(ignore, dtype=bool))
        fields = {"file_name": image_id, "image_id": image_id, "height": 300, "width": 300, "boxes": boxes}
        return ImageRecord(**fields, classes=classes, ignore=np.asarray(ignore, dtype=bool), annotation=objects)

    return [make("a", FACES, IGNORE), make("b", [], [])]


def evaluate(metric):
    for image_id, found in FOUND.items():
        boxes, scores = np.array(list(found.values()), dtype=float), np.array(list(found))
        order = [len(scores) - 1, *range(len(scores) - 1)]  # not by score
        metric.update(image_id, Detections(boxes[order], scores[order], np.zeros(len(scores), dtype=int), None))
    return metric.compute()


METRICS = {
    "wider_face": lambda: WiderFaceAP.from_records(records()),
    "coco": lambda: CocoAP(records(), {1: "face"}, max_dets_per_image=100),
}


@pytest.mark.parametrize("protocol", METRICS)
def test_protocols_by_hand(protocol):
    result = evaluate(METRICS[protocol]())
    content = json.loads(json.dumps(result.to_dict()))["by_score"]
    rows = {
        row["score"]: (row["precision"], row["recall"], row["false_positives_per_image"]) for row in content["scores"]
    }
    assert rows.keys() == set(SCORES)
    for score, expected in EXPECTED.items():
        assert rows[score] == pytest.approx(expected), score
    best = content["best_f1"]
    assert (best["score"], best["f1"]) == (0.9, pytest.approx(2 * 1 / (1 + 0 + 2)))
    lines = result.table().splitlines()
    assert "0.5                33.33       50.00   40.00                      1.000" in lines
    assert lines[-1].endswith("0.000  best F1")
    other = result.reporting([0.25])
    assert [row["score"] for row in other.to_dict()["by_score"]["scores"]] == [0.25]
    assert other.metrics() == pytest.approx(result.metrics(), nan_ok=True)


@pytest.mark.parametrize("protocol", METRICS)
def test_nothing_detected(protocol):
    result = METRICS[protocol]().compute()
    content = result.to_dict()["by_score"]
    assert content["best_f1"] is None and content["scores"][0]["precision"] is None
    assert content["scores"][0]["recall"] == 0 and "n/a" in result.table()


def test_fddb():
    """The discrete curve: 4 faces in 2 images."""
    counts = {"images": 2, "faces": 4, "detections": 6, "images_without_predictions": 0}
    thresholds, discrete = np.array([np.inf, 0.9, 0.5, 0.1]), np.array([0, 0.25, 0.75, 0.75])
    curves = RocCurves(thresholds, np.array([0, 0, 1, 3]), discrete, discrete / 2, counts, 0.5)
    result = FDDBResult({"rectangles": curves}).reporting([0.95, 0.9, 0.4, 0.1])
    content = result.to_dict()["results"]["rectangles"]["by_score"]
    rows = [(row["precision"], row["recall"], row["false_positives_per_image"]) for row in content["scores"]]
    assert rows == [(None, 0, 0), (1, 0.25, 0), (0.75, 0.75, 0.5), (0.5, 0.75, 1.5)]
    assert content["best_f1"]["score"] == 0.5 and content["best_f1"]["f1"] == 0.75
    assert "best F1" in result.table()
