"""Annotation files in COCO's detection format, for anyone's own faces (or anything else that has boxes).

Read with the standard library, not with pycocotools: a file of one's own is where the mistakes are, and pycocotools
answers them with a bare KeyError or not at all. Here every error names the file and the image or annotation.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes

_MAX_SIDE = 2**24  # float32 holds every pixel up to here


def read_annotations(
    file: str | os.PathLike[str], image_root: str | os.PathLike[str], *, report: DataReport | None = None
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Parses a COCO-format annotation file. Opens no image.

    Boxes are clipped to their image; those of zero or negative size, outside the image or not finite are dropped and
    counted. ``iscrowd`` annotations become ignore regions. Segmentations and keypoints are not read.

    Args:
        image_root: folder that each ``file_name`` is relative to; it need not exist.
        report: counts are added to it.

    Returns:
        (records, categories): category id -> name in ascending id, the order of the class indices; ``image_id`` is
        the id as a string.

    Raises:
        AnnotationError: with file, id, expectation and finding.
        OSError: the file cannot be opened.
    """
    report = report if report is not None else DataReport()
    root = ImageRoot(image_root)
    content = _load(file)
    name = os.fspath(file)

    categories = {
        category_id: _get(category, "name", str, f"{name}: category {category_id}")
        for category_id, category in sorted(_by_id(content, "categories", name).items())
    }
    class_of = {category_id: index for index, category_id in enumerate(categories)}

    images = _by_id(content, "images", name)
    annotations: dict[int, list[tuple[int, dict[str, Any]]]] = {image_id: [] for image_id in images}
    for annotation_id, annotation in _by_id(content, "annotations", name).items():
        place = f"{name}: annotation {annotation_id}"
        image_id = _get(annotation, "image_id", int, place)
        if image_id not in images:
            raise AnnotationError(f"{place}: expected the id of an image of the file, found image_id {image_id}")
        annotations[image_id].append((annotation_id, annotation))

    records = []
    for image_id, image in images.items():
        place = f"{name}: image {image_id}"
        size = _get(image, "height", int, place), _get(image, "width", int, place)
        if min(size) < 1 or max(size) > _MAX_SIDE:
            found = _describe(list(size))
            raise AnnotationError(f"{place}: expected height and width in [1, {_MAX_SIDE}], found {found}")
        places = [f"{name}: annotation {annotation_id}" for annotation_id, _ in annotations[image_id]]
        xywh, classes, ignore = [], [], []
        for place_of_box, (_, annotation) in zip(places, annotations[image_id]):
            xywh.append(_bbox(annotation, place_of_box))
            classes.append(_class(annotation, class_of, place_of_box))
            ignore.append(_get(annotation, "iscrowd", int, place_of_box, default=0) != 0)
        boxes, kept = usable_boxes(xywh, size, places, report)
        file_name = root.join(_get(image, "file_name", str, place), place)
        record = ImageRecord(
            file_name, str(image_id), *size, boxes, np.int64(classes)[kept], np.array(ignore, dtype=bool)[kept]
        )
        report.num_images += 1
        report.num_ignore += int(record.ignore.sum())
        records.append(record)
    return records, categories


def format_annotations(
    records: Sequence[ImageRecord], categories: Mapping[int, str], image_root: str | os.PathLike[str]
) -> bytes:
    """The JSON that :func:`read_annotations` reads back as the same boxes, classes and ignore regions, to the last bit.

    Images are numbered from 1, unless every ``image_id`` is a number of its own already.

    Args:
        records: with sizes; ignore regions become "iscrowd" annotations.
        categories: category id -> name in ascending id, the order of the class indices.
        image_root: folder that each ``file_name`` becomes relative to.
    """
    category_ids = list(categories)
    keep_ids = all(record.image_id.isdecimal() for record in records)
    keep_ids = keep_ids and len({int(record.image_id) for record in records}) == len(records)  # not "1" and "01"
    images, annotations = [], []
    for number, record in enumerate(records, 1):
        image_id = int(record.image_id) if keep_ids else number
        path = PurePath(os.path.relpath(record.file_name, image_root)).as_posix()
        images.append({"id": image_id, "file_name": path, "height": record.height, "width": record.width})
        boxes = record.boxes.astype(np.float64).tolist()  # float64: x1 + (x2 - x1) is x2 again after rounding
        for (x1, y1, x2, y2), label, ignored in zip(boxes, record.classes.tolist(), record.ignore.tolist()):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_ids[label]}
            annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(ignored)}
            annotations.append(annotation)
    named = [{"id": category_id, "name": name} for category_id, name in categories.items()]
    return (json.dumps({"images": images, "annotations": annotations, "categories": named}) + "\n").encode()


def _load(file: str | os.PathLike[str]) -> dict[str, Any]:
    with open(file, "rb") as stream:
        text = stream.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{os.fspath(file)}: expected JSON, found: {error}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{os.fspath(file)}: expected a JSON object, found {_describe(content)}")
    return content


def _by_id(content: dict[str, Any], key: str, name: str) -> dict[int, dict[str, Any]]:
    """Returns the list ``content[key]`` as id -> entry, in the file's order."""
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(_get(content, key, list, name)):
        place = f"{name}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise AnnotationError(f"{place}: expected a JSON object, found {_describe(entry)}")
        entry_id = _get(entry, "id", int, place)
        if entry_id in entries:
            raise AnnotationError(f"{place}: expected each id once, found id {entry_id} again")
        entries[entry_id] = entry
    return entries


def _get(entry: dict[str, Any], key: str, kind: type, place: str, default: Any = None) -> Any:
    value = entry.get(key, default)
    # bool is an int to isinstance, and `"id": true` is not an id.
    if not isinstance(value, kind) or isinstance(value, bool):
        found = _describe(value) if key in entry else "no such key"
        raise AnnotationError(f"{place}: expected {key!r} of type {kind.__name__}, found {found}")
    return value


def _bbox(annotation: dict[str, Any], place: str) -> list[float]:
    bbox = _get(annotation, "bbox", list, place)
    if len(bbox) != 4 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in bbox):
        raise AnnotationError(f"{place}: expected 'bbox' as 4 numbers [x, y, width, height], found {_describe(bbox)}")
    try:
        return [float(value) for value in bbox]
    except OverflowError:  # an integer beyond float64: as much out of any image as infinity
        return [float("inf")] * 4


def _class(annotation: dict[str, Any], class_of: dict[int, int], place: str) -> int:
    category_id = _get(annotation, "category_id", int, place)
    if category_id not in class_of:
        known = ", ".join(map(str, class_of))
        raise AnnotationError(f"{place}: expected 'category_id' to be one of {known}, found {category_id}")
    return class_of[category_id]


def _describe(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
