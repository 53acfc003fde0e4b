"""Annotation files as other tools write them: understood where they can only mean one thing, and said."""

import json
import os
import threading

import numpy as np
import pytest

from group_sampling.data import coco, wider_face
from group_sampling.data.catalog import Catalog
from group_sampling.data.records import AnnotationError, DataReport, ImageRoot, usable_boxes

BOXES = {"0--Street/a_0.jpg": [[93, 9, 48, 48], [9, 26, 36, 36]], "0--Street/a_1.jpg": [[128, 72, 24, 24]]}
EXPECTED = [[[x, y, x + w, y + h] for x, y, w, h in boxes] for boxes in BOXES.values()]


def content():
    """A correct file in COCO's format."""
    images = [{"id": i, "file_name": name, "height": 128, "width": 160} for i, name in enumerate(BOXES, 1)]
    annotations = [
        {"image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0}
        for i, name in enumerate(BOXES, 1)
        for box in BOXES[name]
    ]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    categories = [{"id": 1, "name": "face", "supercategory": "none"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def read(tmp_path, changed):
    """Records, categories and report of a file in COCO's format."""
    (tmp_path / "gt.json").write_text(json.dumps(changed))
    report = DataReport()
    return *coco.read_annotations(tmp_path / "gt.json", tmp_path / "images", report=report), report


def change_all(key, entries, value):
    changed = content()
    for entry in changed[entries]:
        entry[key] = value(entry[key]) if callable(value) else value
    return changed


@pytest.mark.parametrize(
    "changed, kind",
    [
        (change_all("category_id", "annotations", str), "'category_id' that is written as text"),
        (change_all("image_id", "annotations", float), "'image_id' that is written as text or with a fraction"),
        (change_all("id", "images", str), "'id' that is written as text"),
        (change_all("id", "annotations", 7), "annotations without an id of their own"),
        (change_all("id", "annotations", None), "annotations without an id of their own"),
        (change_all("iscrowd", "annotations", None), None),
        (change_all("iscrowd", "annotations", "0"), None),
        (change_all("iscrowd", "annotations", False), None),
        (change_all("bbox", "annotations", lambda box: [f"{value}.0" for value in box]), None),
        (change_all("height", "images", "128"), None),
        (change_all("file_name", "images", lambda name: name.replace("/", "\\")), '"\\" in paths, taken for "/"'),
        (change_all("file_name", "images", lambda name: f"../images/{name}"), None),
        (change_all("file_name", "images", lambda name: f"./x/../{name}"), None),
    ],
)
def test_what_can_only_mean_one_thing_is_read_as_a_correct_file(tmp_path, changed, kind):
    records, categories, report = read(tmp_path, changed)
    assert [record.boxes.tolist() for record in records] == EXPECTED and categories == {1: "face"}
    assert [record.file_name for record in records] == [str(tmp_path / "images" / name) for name in BOXES]
    assert not any(record.ignore.any() for record in records)
    assert [(record.image_id, record.height, record.width) for record in records] == [("1", 128, 160), ("2", 128, 160)]
    assert report.num_dropped == 0
    if kind:
        assert f"understood, {kind}" in report.summary()


def test_crowds_of_any_spelling(tmp_path):
    for value in (1, "1", True):
        records, _, _ = read(tmp_path, change_all("iscrowd", "annotations", value))
        assert all(record.ignore.all() for record in records)
    for value in ("no", 0.5, []):
        with pytest.raises(AnnotationError, match="annotation 1: expected 'iscrowd' of type int"):
            read(tmp_path, change_all("iscrowd", "annotations", value))


@pytest.mark.parametrize("size", [-1, 0, None, "-1"])
def test_sizes_that_are_not_known(tmp_path, size):
    changed = content()
    changed["images"][1]["height"] = size
    changed["annotations"][2]["bbox"] = [150, 100, 50, 50]
    records, _, report = read(tmp_path, changed)
    assert (records[0].height, records[1].height, records[1].width) == (128, None, None)
    assert records[1].boxes.tolist() == [[150, 100, 200, 150]]  # not clipped: who knows
    assert "understood, sizes of images that are not known, such as -1: 1" in report.summary()


def test_boxes_around_polygons(tmp_path):
    changed = content()
    for annotation in changed["annotations"]:
        x, y, w, h = annotation.pop("bbox")
        annotation["segmentation"] = [
            [x, y + h / 2, x + w / 2, y, x + w / 2, y + h],
            [x + w, y, x, y + h, x + w, y + h],
        ]
    records, _, report = read(tmp_path, changed)
    assert [record.boxes.tolist() for record in records] == EXPECTED
    assert "understood, boxes around polygons, where an annotation has no 'bbox': 3" in report.summary()
    for broken in ([[1, 2, 3]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, "x"]], ["x"]):
        changed["annotations"][0]["segmentation"] = broken
        with pytest.raises(AnnotationError, match="annotation 1: expected 'bbox', or polygons"):
            read(tmp_path, changed)
    changed["annotations"][0]["segmentation"] = {"counts": "abc", "size": [1, 2]}
    with pytest.raises(AnnotationError, match="annotation 1: expected 'bbox' of type list, got no such key"):
        read(tmp_path, changed)


def test_a_file_without_annotations_has_images_without_boxes(tmp_path):
    changed = content()
    del changed["annotations"]
    records, categories, report = read(tmp_path, changed)
    assert [len(record.boxes) for record in records] == [0, 0] and categories == {1: "face"}
    assert "no 'annotations'" in report.summary()


# Roboflow's exports have a category above all others, without boxes.
ROOT = {"id": 0, "name": "people", "supercategory": "none"}


def test_the_root_of_the_categories_is_no_class(tmp_path):
    changed = content()
    changed["categories"] = [ROOT, {"id": 1, "name": "face", "supercategory": "people"}]
    records, categories, report = read(tmp_path, changed)
    assert categories == {1: "face"} and [record.classes.tolist() for record in records] == [[0, 0], [0]]
    assert "category 'people', which is above all others and has no boxes" in report.summary()


@pytest.mark.parametrize(
    "categories",
    [
        [ROOT, {"id": 1, "name": "face", "supercategory": "none"}],  # above none
        [{"id": 0, "name": "person", "supercategory": "person"}, {"id": 1, "name": "face", "supercategory": "x"}],
        [ROOT, {"id": 1, "name": "face", "supercategory": "people"}, {"id": 2, "name": "cat"}],  # not above all
    ],
)
def test_other_categories_without_boxes_stay(tmp_path, categories):
    """A class that one split lacks must not shift the others."""
    changed = content()
    changed["categories"] = categories
    records, found, _ = read(tmp_path, changed)
    assert found == {category["id"]: category["name"] for category in categories}
    assert records[0].classes.tolist() == [1, 1]


def test_a_root_with_boxes_is_a_class(tmp_path):
    changed = content()
    changed["categories"] = [ROOT, {"id": 1, "name": "face", "supercategory": "people"}]
    changed["annotations"][0]["category_id"] = 0
    records, categories, _ = read(tmp_path, changed)
    assert list(categories) == [0, 1] and records[0].classes.tolist() == [0, 1]


# -- hints -------------------------------------------------------------------------------------------------------------


def hints(xywh, size=(128, 160)):
    report = DataReport()
    usable_boxes(xywh, size, ["x"] * len(xywh), report)
    return report.hints()


def test_shares_of_the_sides_and_corners_are_suspected():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 100, 40), rng.uniform(0, 80, 40)
    pixels = np.stack([x, y, np.full(40, 30.0), np.full(40, 20.0)], axis=1)
    assert hints(pixels) == []
    (shares,) = hints(pixels / [160, 128, 160, 128])
    assert shares.startswith("most boxes (40 of 40) are under two pixels: are they shares of the image's sides?")
    corners = np.concatenate([pixels[:, :2] + 60, pixels[:, :2] + 60 + pixels[:, 2:]], axis=1)
    (outside,) = hints(corners)
    assert "reach out of their image: are they x1 y1 x2 y2" in outside
    assert hints(corners[:3]) == []  # of so few, nobody knows


def test_hints_are_in_the_log(tmp_path, caplog):
    changed = content()
    changed["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [0.1, 0.1, 0.2, 0.3]} for i in range(8)
    ]
    (tmp_path / "gt.json").write_text(json.dumps(changed))
    source = Catalog({"COCO_FORMAT": [["mine", str(tmp_path / "gt.json"), str(tmp_path)]]})["mine"]
    with caplog.at_level("WARNING"):
        assert len(source.records) == 2
    assert "are they shares of the image's sides? Expected are pixels" in caplog.text


# -- WIDER FACE's text ---------------------------------------------------------------------------------------------


def lines_of(rows):
    """A text of WIDER FACE's form, ``rows`` giving that of a box."""
    lines = []
    for path, boxes in BOXES.items():
        lines += [path, str(len(boxes)), *map(rows, boxes)]
    return "\n".join(lines) + "\n"


LANDMARKS = " ".join(["12.5 13.5 0.0"] * 5)
ORIGINAL = lines_of(lambda box: " ".join(map(str, box)) + " 0 0 0 0 0 0")
FOREIGN = {
    "four columns": lines_of(lambda box: " ".join(map(str, box))),
    "a count as a float": ORIGINAL.replace("\n2\n", "\n2.0\n").replace("\n1\n", "\n1.0\n"),
    "RetinaFace": "\n".join(
        f"# {path}\n" + "\n".join(f"{x} {y} {w} {h} {LANDMARKS} 0.8" for x, y, w, h in boxes)
        for path, boxes in BOXES.items()
    ),
    "RetinaFace without landmarks": "\n".join(
        f"# {path}\n" + "\n".join(f"{x} {y} {w} {h}" for x, y, w, h in boxes) for path, boxes in BOXES.items()
    ),
    "SCRFD": "\n".join(
        f"# {path} 160 128\n" + "\n".join(f"{x}.0 {y}.0 {x + w}.0 {y + h}.0 {LANDMARKS}" for x, y, w, h in boxes)
        for path, boxes in BOXES.items()
    ),
    "backslashes": ORIGINAL.replace("0--Street/", "0--Street\\"),
    "a path that comes back": ORIGINAL.replace("0--Street/", "../images/0--Street/"),
    "the end mark of DOS": ORIGINAL + "\x1a",
}


@pytest.mark.parametrize("form", FOREIGN)
def test_other_forms_of_the_text_read_the_same(tmp_path, form):
    (tmp_path / "gt.txt").write_text(FOREIGN[form])
    records = wider_face.read_annotations(tmp_path / "gt.txt", tmp_path / "images")
    assert [record.boxes.tolist() for record in records] == EXPECTED
    assert [record.image_id for record in records] == ["0--Street/a_0", "0--Street/a_1"]
    assert [record.file_name for record in records] == [str(tmp_path / "images" / path) for path in BOXES]
    assert {(record.height, record.width) for record in records} == {(128, 160) if form == "SCRFD" else (None, None)}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
def test_encodings(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "gt.txt").write_bytes((mark + ORIGINAL).encode(encoding))
    (tmp_path / "list.txt").write_bytes((mark + "0--Street/a_1.jpg\r\n").encode(encoding))
    keep = wider_face.read_paths(tmp_path / "list.txt")
    (record,) = wider_face.read_annotations(tmp_path / "gt.txt", tmp_path, keep=keep)
    assert record.boxes.tolist() == EXPECTED[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 2 3 4\n# a.jpg\n", r"gt\.txt:1: expected an image path"),
        (
            "# a.jpg\n1 2 3\n",
            r"gt\.txt:2: expected 'x y width height' and landmarks \(4 or 19 or 20 numbers\), got '1 2 3'",
        ),
        ("# a.jpg 20 30\n1 2 3 x\n", r"gt\.txt:2: expected 'x1 y1 x2 y2' and landmarks"),
        ("# a.jpg\n# a.jpg\n", r"gt\.txt:2: expected each image once, got 'a\.jpg' again, first at .*gt\.txt:1"),
        ("# a\n", r"gt\.txt:1: expected an image path \(\.jpg"),
        ("# ../a.jpg\n", r"gt\.txt:1: expected an image path below the image folder, got '\.\./a\.jpg': it leaves"),
    ],
)
def test_errors_of_the_other_form_name_the_line(tmp_path, text, message):
    (tmp_path / "gt.txt").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        wider_face.read_annotations(tmp_path / "gt.txt", tmp_path / "images")


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, problem",
    [
        ("", "it is empty"),
        (".", "it leaves "),
        ("a\0.jpg", "it has a NUL character"),
        ("/etc/a.jpg", "it is absolute; expected it relative to the image folder"),
        ("C:\\data\\a.jpg", "it is absolute"),
        ("\\\\server\\a.jpg", "it is absolute"),
        ("C:a.jpg", "it is absolute"),
        ("../a.jpg", "it leaves "),
        ("..\\a.jpg", "it leaves "),
        ("x/../../a.jpg", "it leaves "),
        ("../images2/a.jpg", "it leaves "),
    ],
)
def test_paths_that_leave_the_folder_say_how(tmp_path, path, problem):
    with pytest.raises(AnnotationError, match="gt: expected an image path below the image folder, got ") as error:
        ImageRoot(tmp_path / "images").join(path, "gt")
    assert f": {problem}" in str(error.value)


def test_a_link_out_of_the_folder_stays_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/link").symlink_to(tmp_path)
    for path in ("link/a.jpg", "link\\a.jpg", "x/../link/a.jpg"):
        with pytest.raises(AnnotationError, match="a link to"):
            ImageRoot(tmp_path / "images").join(path, "gt")


def test_a_fifo_as_annotation_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "gt")
    found = []

    def run():
        for read_file in (coco.read_annotations, wider_face.read_annotations):
            with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
                read_file(tmp_path / "gt", tmp_path)
        found.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert found
