import json
from pathlib import Path

import numpy as np
import pytest

from group_sampling.data.coco import read_annotations
from group_sampling.data.records import (
    CLIPPED,
    INVERTED,
    NON_FINITE,
    OUTSIDE,
    ZERO_AREA,
    AnnotationError,
    DataReport,
)

SAMPLE = Path(__file__).with_name("coco_sample.json")


def test_sample_file():
    report = DataReport()
    records, categories = read_annotations(SAMPLE, "/images", report=report)
    assert list(categories.items()) == [(3, "face"), (7, "mask")]  # ascending category id
    assert [(r.file_name, r.image_id, r.height, r.width) for r in records] == [
        ("/images/a/one.jpg", "1", 100, 200),
        ("/images/two.png", "2", 50, 60),
        ("/images/empty.png", "9", 50, 60),
    ]
    assert [record.boxes.tolist() for record in records] == [
        [[10, 20, 40, 60], [150, 50, 200, 80]],
        [[5.5, 6, 12.5, 14.25]],
        [],
    ]
    assert [record.classes.tolist() for record in records] == [[0, 1], [1], []]
    assert [record.ignore.tolist() for record in records] == [[False, True], [False], []]
    for record in records:
        assert record.boxes.dtype == np.float32 and record.boxes.shape[1:] == (4,)
        assert record.classes.dtype == np.int64 and record.ignore.dtype == bool
    assert (report.num_images, report.num_boxes, report.num_ignore, report.num_dropped) == (3, 7, 1, 4)
    assert report.examples == {
        CLIPPED: [f"{SAMPLE}: annotation 13"],
        OUTSIDE: [f"{SAMPLE}: annotation 14"],
        ZERO_AREA: [f"{SAMPLE}: annotation 15"],
        INVERTED: [f"{SAMPLE}: annotation 16"],
        NON_FINITE: [f"{SAMPLE}: annotation 17"],
    }


def test_agrees_with_pycocotools(capsys):
    coco = pytest.importorskip("pycocotools.coco").COCO(SAMPLE)
    records, categories = read_annotations(SAMPLE, "/images")
    class_names = list(categories.values())
    assert [coco.cats[i]["name"] for i in sorted(coco.cats)] == class_names
    for record in records:
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=int(record.image_id)))
        whole = {tuple(a["bbox"]): a for a in annotations}
        for box, label, ignore in zip(record.boxes, record.classes, record.ignore):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            found = whole.get((x, y, w, h))
            if found is not None:  # the clipped one has another width here
                assert coco.cats[found["category_id"]]["name"] == class_names[label]
                assert bool(found.get("iscrowd", 0)) == ignore


def _changed(change):
    content = json.loads(SAMPLE.read_text())
    change(content)
    return content


def _set(*path, to):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def _delete(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_delete("images"), r"gt\.json: expected 'images' of type list, got no such key"),
        (_set("annotations", to={}), r"gt\.json: expected 'annotations' of type list, got \{\}"),
        (_set("images", 0, to=5), r"images\[0\]: expected a JSON object, got 5"),
        (_delete("images", 1, "id"), r"images\[1\]: expected 'id' of type int, got no such key"),
        (_set("images", 1, "id", to=True), r"images\[1\]: expected 'id' of type int, got true"),
        (_set("images", 1, "id", to=1), r"images\[1\]: expected each id once, got id 1 again"),
        (
            _set("images", 1, "height", to=2**25),
            r"image 2: expected height and width in \[1, 16777216\], got \[33554432, 60\]",
        ),
        (_set("images", 1, "width", to="wide"), r"image 2: expected 'width' of type int, got \"wide\""),
        (_set("images", 1, "width", to=60.5), r"image 2: expected 'width' of type int, got 60\.5"),
        (_set("images", 1, "file_name", to="../a.jpg"), r"image 2: expected an image path below the image folder"),
        (_set("images", 1, "file_name", to=None), r"image 2: expected 'file_name' of type str, got null"),
        (_set("annotations", 1, "image_id", to=5), r"annotation 12: expected the id of an image .*got image_id 5"),
        (
            _set("annotations", 1, "category_id", to=4),
            r"annotation 12: expected 'category_id' to be one of 3, 7, got 4",
        ),
        (_delete("annotations", 1, "bbox"), r"annotation 12: expected 'bbox' of type list, got no such key"),
        (
            _set("annotations", 1, "bbox", to=[1, 2, 3]),
            r"annotation 12: expected 'bbox' as 4 numbers .*got \[1, 2, 3\]",
        ),
        (_set("annotations", 1, "bbox", to=[1, 2, 3, None]), r"annotation 12: expected 'bbox' as 4 numbers"),
        (_set("annotations", 1, "bbox", to=[1, 2, 3, True]), r"annotation 12: expected 'bbox' as 4 numbers"),
        (_set("annotations", 1, "iscrowd", to="no"), r"annotation 12: expected 'iscrowd' of type int, got \"no\""),
        (_set("categories", 0, "name", to=3), r"category 7: expected 'name' of type str, got 3"),
    ],
)
def test_errors_name_the_entry_the_expectation_and_the_finding(tmp_path, change, message):
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(_changed(change)))
    with pytest.raises(AnnotationError, match=message):
        read_annotations(path, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", "null", b"\xff\xfe\xfa"])
def test_a_file_that_is_no_json_object(tmp_path, content):
    path = tmp_path / "gt.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(AnnotationError, match=r"gt\.json: expected (JSON|a JSON object), got"):
        read_annotations(path, tmp_path)


def test_an_integer_beyond_floating_point_is_not_finite(tmp_path):
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(_changed(_set("annotations", 0, "bbox", to=[10**400, 1, 1, 1]))))
    report = DataReport()
    read_annotations(path, tmp_path, report=report)
    assert report.counts[NON_FINITE] == 2  # with the one that the sample has


_VALUES = [None, True, -1, 0, 10**400, 1.5, float("nan"), float("inf"), "", "x", "/x.jpg", "../x", [], {}, [1, 2, 3, 4]]


def test_mutated_files_give_documented_errors_only(tmp_path):
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "gt.json", 0
    for _ in range(600):
        text = SAMPLE.read_text()
        if rng.random() < 0.5:  # a value somewhere is another one, or gone
            content = json.loads(text)
            node = content[list(content)[rng.integers(3)]]
            while isinstance(node, list | dict) and len(node):
                keys = list(node) if isinstance(node, dict) else range(len(node))
                key = keys[rng.integers(len(keys))]
                if rng.random() < 0.5 or not isinstance(node[key], list | dict):
                    if rng.random() < 0.2:
                        del node[key]
                    else:
                        node[key] = _VALUES[rng.integers(len(_VALUES))]
                    break
                node = node[key]
            text = json.dumps(content)
        else:
            characters = list(text)
            for place in rng.integers(len(characters), size=rng.integers(1, 4)):
                characters[place] = chr(rng.integers(1, 256))
            text = "".join(characters[: rng.integers(len(characters))] if rng.random() < 0.1 else characters)
        path.write_text(text, encoding="utf-8")
        try:
            records, categories = read_annotations(path, tmp_path)
        except AnnotationError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        for record in records:
            assert Path(record.file_name).resolve().is_relative_to(tmp_path.resolve())
            assert np.isfinite(record.boxes).all() and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
            if record.height is not None:
                assert (record.boxes >= 0).all()
                assert (record.boxes <= [record.width, record.height] * 2).all()
            assert (record.classes < len(categories)).all()
            assert len(record.boxes) == len(record.ignore) == len(record.classes)
    assert 200 < refused < 600
