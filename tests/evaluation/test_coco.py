"""COCO average precision against pycocotools' own evaluation, and its detection limit on crowded images."""

import contextlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from group_sampling.data.records import AnnotationError
from group_sampling.detections import Detections
from group_sampling.evaluation.coco import CocoAP, write_coco_detections
from group_sampling.files import write_json

FACE = {1: "face"}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def reference(file, detections, max_dets):
    """pycocotools' figures; ``detections`` are (image id, category id, xywh, score)."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        results = [
            {"image_id": image, "category_id": category, "bbox": list(map(float, box)), "score": score}
            for image, category, box, score in detections
        ]
        found = truth.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"]}
            found.dataset["annotations"] = []
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else math.nan

    precision = evaluation.eval["precision"][..., 0]
    values = [mean(precision[..., 0]), mean(precision[0, ..., 0]), mean(precision[5, ..., 0])]
    values += [mean(precision[..., area]) for area in (1, 2, 3)]
    return dict(zip(METRICS, values)) | {"AR": mean(evaluation.eval["recall"][:, :, 0, 0])}


def random_set(rng, num_classes):
    """A COCO-format file with crowds, ties, odd ids and boxes of all sizes, and detections near its boxes."""
    category_ids = sorted(rng.choice(90, num_classes, replace=False).tolist())
    images, annotations, detections = [], [], []
    image_ids = rng.permutation(50)[: rng.integers(1, 5)].tolist()
    for image in image_ids:
        images.append({"id": image, "file_name": f"{image}.jpg", "height": 300, "width": 300})
        boxes = np.round(rng.uniform(0, 150, (rng.integers(0, 9), 2)) // 12) * 12
        sizes = rng.choice([10, 24, 31, 33, 60, 110], (len(boxes), 2))
        for box in np.hstack([boxes, sizes]).tolist():
            annotation = {"id": len(annotations) + 1, "image_id": image, "bbox": box, "area": box[2] * box[3] * 0.9}
            annotation |= {"category_id": int(rng.choice(category_ids)), "iscrowd": int(rng.random() < 0.2)}
            annotations.append(annotation)
            for _ in range(rng.integers(0, 3)):
                jitter = rng.choice([0, 0, 1, 3, 8], 4)
                near = (np.array(box) + jitter).tolist()
                detections.append((image, int(rng.choice(category_ids)), near, float(rng.integers(1, 6)) / 5))
        for _ in range(rng.integers(0, 4)):
            stray = [*rng.integers(0, 200, 2).tolist(), *rng.integers(5, 120, 2).tolist()]
            detections.append((image, int(rng.choice(category_ids)), stray, float(rng.integers(1, 6)) / 5))
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": f"class {i}"} for i in category_ids]
    return content, detections, category_ids


def evaluate(file, detections, category_ids, max_dets):
    metric = CocoAP.from_file(file, max_dets_per_image=max_dets)
    for image_id, found in by_image(detections, category_ids).items():
        metric.update(image_id, found)
    return metric


def by_image(detections, category_ids):
    found = {}
    for image in dict.fromkeys(d[0] for d in detections):
        mine = [d for d in detections if d[0] == image]
        xywh = np.array([d[2] for d in mine])
        boxes = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
        found[str(image)] = Detections(boxes, [d[3] for d in mine], [category_ids.index(d[1]) for d in mine])
    return found


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([1, 3, 100]))
@settings(max_examples=150)
def test_equals_pycocotools(tmp_path_factory, seed, num_classes, max_dets):
    content, detections, category_ids = random_set(np.random.default_rng(seed), num_classes)
    file = tmp_path_factory.mktemp("coco") / "truth.json"
    file.write_text(json.dumps(content))
    found = evaluate(file, detections, category_ids, max_dets).compute()
    expected = reference(file, detections, max_dets)
    assert found.stats == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert found.stats["AP"] == pytest.approx(np.nanmean([*found.class_ap.values()] or [math.nan]), nan_ok=True)


def crowded(tmp_path, count=2000):
    """One image with ``count`` faces in rows, and its file without area and iscrowd."""
    index = np.arange(count)
    xywh = np.column_stack([index % 50 * 24, index // 50 * 24, np.full(count, 20), np.full(count, 20)])
    annotations = [{"id": i, "image_id": 7, "category_id": 3, "bbox": box} for i, box in enumerate(xywh.tolist())]
    image = {"id": 7, "file_name": "crowd.jpg", "height": 1200, "width": 1300}
    content = {"images": [image], "categories": [{"id": 3, "name": "face"}], "annotations": annotations}
    (tmp_path / "crowd.json").write_text(json.dumps(content))
    return tmp_path / "crowd.json", np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])


@pytest.mark.parametrize("limit, expected", [(2000, 100.0), (100, 5.94)])
def test_crowded_image(tmp_path, limit, expected):
    """Perfect detections of 2,000 faces: a limit of 100 hides 95 % of them."""
    file, boxes = crowded(tmp_path)
    metric = CocoAP.from_file(file, max_dets_per_image=limit)
    metric.update("7", Detections(boxes, np.linspace(0.9, 0.5, len(boxes))))
    metrics = metric.compute().stats
    assert 100 * metrics["AP"] == pytest.approx(expected, abs=0.005)
    assert metrics["AR"] == pytest.approx(limit / 2000)
    assert math.isnan(metrics["APm"]) and math.isnan(metrics["APl"])


def test_results_file(tmp_path):
    """COCO's results format, with the annotation file's ids: pycocotools reads it."""
    content, detections, category_ids = random_set(np.random.default_rng(5), 3)
    (tmp_path / "truth.json").write_text(json.dumps(content))
    categories = {i: f"class {i}" for i in category_ids}
    write_coco_detections(tmp_path / "results.json", categories, by_image(detections, category_ids))
    written = json.loads((tmp_path / "results.json").read_text())
    read = [(row["image_id"], row["category_id"], row["bbox"], row["score"]) for row in written]
    assert sorted(map(repr, read)) == sorted(repr((d[0], d[1], list(map(float, d[2])), d[3])) for d in detections)
    assert reference(tmp_path / "truth.json", read, 100) == pytest.approx(
        reference(tmp_path / "truth.json", detections, 100), nan_ok=True
    )
    result = evaluate(tmp_path / "truth.json", detections, category_ids, 100).compute()
    write_json(tmp_path / "ap.json", result.to_dict())
    saved = json.loads((tmp_path / "ap.json").read_text())
    assert saved["metrics"]["AP50"] == result.stats["AP50"] and saved["max_dets_per_image"] == 100
    assert set(saved["class_ap"]) == {f"class {i}" for i in category_ids}
    table = result.table()
    assert "AP-class" in table and f"{100 * result.stats['AP']:.2f}" in table


def test_unusable_boxes_are_left_out(tmp_path):
    file, boxes = crowded(tmp_path, 4)
    content = json.loads(file.read_text())
    for bbox in ([5, 5, 0, 9], [9, 9, -4, 4]):
        bad = {"id": 100 + len(content["annotations"]), "image_id": 7, "category_id": 3, "bbox": bbox}
        content["annotations"].append(bad)
    file.write_text(json.dumps(content))
    metric = CocoAP.from_file(file, max_dets_per_image=10)
    metric.update("7", Detections(boxes, np.ones(4)))
    assert metric.compute().stats["AP"] == pytest.approx(1)


def test_records_without_a_file():
    record = SimpleNamespace(image_id="a", boxes=[[0, 0, 10, 10]], classes=[0], ignore=[False])
    crowd = SimpleNamespace(image_id="b", boxes=[[0, 0, 50, 50]], classes=[0], ignore=[True])
    metric = CocoAP([record, crowd], FACE, max_dets_per_image=10)
    metric.update("a", Detections([[0, 0, 10, 10]], [0.5]))
    metric.update("b", Detections([[0, 0, 10, 10], [5, 5, 20, 20]], [0.9, 0.8]))  # inside the crowd: no false positives
    result = metric.compute()
    assert result.stats["AP"] == pytest.approx(1) and len(metric) == 2
    assert result.counts == {"images": 2, "objects": 1, "crowds": 1, "detections": 3}


@pytest.mark.parametrize("num_images", [0, 1])
def test_nothing(num_images):
    records = [SimpleNamespace(image_id=str(i), boxes=[], classes=[], ignore=[]) for i in range(num_images)]
    result = CocoAP(records, FACE, max_dets_per_image=10).compute()
    assert all(math.isnan(value) for value in result.stats.values()) and "n/a" in result.table()


def test_classes_of_the_same_name(tmp_path):
    content = {"images": [], "annotations": [], "categories": [{"id": 2, "name": "x"}, {"id": 5, "name": "x"}]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    result = CocoAP.from_file(tmp_path / "t.json", max_dets_per_image=1).compute()
    assert list(result.class_ap) == ["x (2)", "x (5)"]


@pytest.mark.parametrize(
    "image, boxes, scores, classes, message",
    [
        ("b", [], [], None, "expected an image of the ground truth, got 'b'"),
        ("a", [[0, 0, 1, 1]], [], None, "expected 1 scores"),
        ("a", [[0, 0, 1, 1]], [0.5], [1], "class below 1, got .*class 1"),
        ("a", [[0, 0, 1, 1]], [0.5], [-1], "class -1"),
        ("a", [[0, 0, 1, 1]], [math.nan], None, "score nan"),
        ("a", [[0, 0, math.inf, 1]], [0.5], None, "inf"),
        ("a", [[5, 0, 1, 1]], [0.5], None, "x1 <= x2"),
        ("a", [[0, 0, 1]], [0.5], None, r"\(k, 4\)"),
    ],
)
def test_refuses(image, boxes, scores, classes, message):
    record = SimpleNamespace(image_id="a", boxes=[], classes=[], ignore=[])
    metric = CocoAP([record], FACE, max_dets_per_image=10)
    with pytest.raises(ValueError, match=message):
        metric.update(image, Detections(boxes, scores, classes))
    metric.update("a", Detections([], []))  # the refused one left nothing behind
    with pytest.raises(ValueError, match="expected one update per image"):
        metric.update("a", Detections([], []))


def test_refuses_arguments(tmp_path):
    record = SimpleNamespace(image_id="a", boxes=[], classes=[], ignore=[])
    with pytest.raises(ValueError, match="expected each image once, got 'a' again"):
        CocoAP([record, record], FACE, max_dets_per_image=10)
    with pytest.raises(ValueError, match="max_dets_per_image: expected at least 1, got 0"):
        CocoAP([], FACE, max_dets_per_image=0)
    with pytest.raises(ValueError, match="categories: expected at least one"):
        CocoAP([], {}, max_dets_per_image=1)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(AnnotationError, match=r"x\.json"):
        CocoAP.from_file(tmp_path / "x.json", max_dets_per_image=1)


def test_figures_and_curves(tmp_path):
    """Percent, the classes' own AP only where there are several, and curves whose means are the figures."""
    content, detections, category_ids = random_set(np.random.default_rng(5), 3)
    (tmp_path / "truth.json").write_text(json.dumps(content))
    result = evaluate(tmp_path / "truth.json", detections, category_ids, 100).compute()
    metrics = result.metrics()
    assert set(metrics) == {*METRICS, "AR", *(f"AP-class {i}" for i in category_ids)}
    assert metrics["AP50"] == pytest.approx(100 * result.stats["AP50"]) and 0 < metrics["AP50"] < 100
    for label, name in (("0.50", "AP50"), ("0.75", "AP75"), ("0.50:0.95", "AP")):
        recall, precision = result.curves[label]
        assert recall.tolist() == pytest.approx([i / 100 for i in range(101)])
        assert np.mean(precision) == pytest.approx(result.stats[name])
    result.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    one = CocoAP([], FACE, max_dets_per_image=1).compute()
    assert set(one.metrics()) == {*METRICS, "AR"} and all(np.isnan(p).all() for _, p in one.curves.values())


@pytest.mark.parametrize("area", ["nine", True, [9]])
def test_areas_of_the_file_decide(tmp_path, area):
    """The file's area, here that of a medium object, not that of the box; one that is no number is refused."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 5000}
    image = {"id": 1, "file_name": "a.jpg", "height": 90, "width": 90}
    content = {"images": [image], "categories": [{"id": 1, "name": "face"}], "annotations": [annotation]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    stats = CocoAP.from_file(tmp_path / "t.json", max_dets_per_image=1).compute().stats
    assert stats["APm"] == 0 and math.isnan(stats["APs"])
    annotation["area"] = area
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match="annotation 1: expected 'area' as a number of pixels, got"):
        CocoAP.from_file(tmp_path / "t.json", max_dets_per_image=1)
