"""Annotation files in COCO's detection format, for faces of your own (or anything else that has boxes).

They are read with the standard library, not with pycocotools: hand-made files have mistakes, which pycocotools answers
with a bare KeyError or not at all. Here every error names the file and the image or annotation.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes

_MAX_SIDE = 2**24  # float32 holds every pixel up to here


class CocoObjects(NamedTuple):
    """The m annotated objects of an image as COCO's protocol evaluates them: not clipped, crowds among them."""

    xywh: NDArray[np.float64]  # (m, 4) x, y, width, height in pixels; all finite and not empty
    classes: NDArray[np.int64]  # (m,) index into the class names
    areas: NDArray[np.float64]  # (m,) in pixels, decides between small, medium and large
    is_crowd: NDArray[np.bool_]  # (m,)


def read_annotations(
    file: str | os.PathLike[str], image_root: str | os.PathLike[str], *, report: DataReport | None = None
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Parse a COCO-format annotation file. Opens no image.

    Boxes are clipped to their image; those of zero or negative size, outside the image or not finite are dropped and
    counted. ``iscrowd`` annotations become ignore regions. Segmentations and keypoints are not read.

    ``annotation`` of a record are its :class:`CocoObjects`: every finite box that is not empty, as the file has it. A
    missing ``area`` is that of the box, a missing ``iscrowd`` is 0.

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
            raise AnnotationError(f"{place}: expected the id of an image of the file, got image_id {image_id}")
        annotations[image_id].append((annotation_id, annotation))

    records = []
    for image_id, image in images.items():
        place = f"{name}: image {image_id}"
        size = _get(image, "height", int, place), _get(image, "width", int, place)
        if min(size) < 1 or max(size) > _MAX_SIDE:
            got = _describe(list(size))
            raise AnnotationError(f"{place}: expected height and width in [1, {_MAX_SIDE}], got {got}")
        places = [f"{name}: annotation {annotation_id}" for annotation_id, _ in annotations[image_id]]
        rows = [_row(annotation, class_of, p) for p, (_, annotation) in zip(places, annotations[image_id])]
        table = np.array(rows, dtype=np.float64).reshape(-1, 7)
        xywh, classes, areas, is_crowd = table[:, :4], table[:, 4].astype(np.int64), table[:, 5], table[:, 6] != 0
        boxes, kept = usable_boxes(xywh, size, places, report)
        file_name = root.join(_get(image, "file_name", str, place), place)
        evaluated = (xywh[:, 2:] > 0).all(axis=1) & np.isfinite(xywh.sum(axis=1))
        objects = CocoObjects(*(column[evaluated] for column in (xywh, classes, areas, is_crowd)))
        record = ImageRecord(file_name, str(image_id), *size, boxes, classes[kept], is_crowd[kept], objects)
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
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
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
        raise AnnotationError(f"{os.fspath(file)}: expected JSON, got: {error}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{os.fspath(file)}: expected a JSON object, got {_describe(content)}")
    return content


def _by_id(content: dict[str, Any], key: str, name: str) -> dict[int, dict[str, Any]]:
    """Return the list ``content[key]`` as id -> entry, in the file's order."""
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(_get(content, key, list, name)):
        place = f"{name}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise AnnotationError(f"{place}: expected a JSON object, got {_describe(entry)}")
        entry_id = _get(entry, "id", int, place)
        if entry_id in entries:
            raise AnnotationError(f"{place}: expected each id once, got id {entry_id} again")
        entries[entry_id] = entry
    return entries


def _get(entry: dict[str, Any], key: str, kind: type, place: str, default: Any = None) -> Any:
    value = entry.get(key, default)
    # bool is an int to isinstance, and `"id": true` is not an id.
    if not isinstance(value, kind) or isinstance(value, bool):
        got = _describe(value) if key in entry else "no such key"
        raise AnnotationError(f"{place}: expected {key!r} of type {kind.__name__}, got {got}")
    return value


def _row(annotation: dict[str, Any], class_of: dict[int, int], place: str) -> tuple[float, ...]:
    """x, y, width, height, class index, area and iscrowd of one annotation."""
    bbox = _get(annotation, "bbox", list, place)
    if len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise AnnotationError(f"{place}: expected 'bbox' as 4 numbers [x, y, width, height], got {_describe(bbox)}")
    x, y, width, height = map(_to_float, bbox)
    area = annotation.get("area", width * height)
    if not _is_number(area):
        raise AnnotationError(f"{place}: expected 'area' as a number of pixels, got {_describe(area)}")
    is_crowd = _get(annotation, "iscrowd", int, place, default=0) != 0
    return x, y, width, height, _class(annotation, class_of, place), _to_float(area), is_crowd


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond float64: as far out of any image as infinity
        return float("inf")


def _class(annotation: dict[str, Any], class_of: dict[int, int], place: str) -> int:
    category_id = _get(annotation, "category_id", int, place)
    if category_id not in class_of:
        known = ", ".join(map(str, class_of))
        raise AnnotationError(f"{place}: expected 'category_id' to be one of {known}, got {category_id}")
    return class_of[category_id]


def _describe(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
