"""Annotation files in COCO's detection format, for faces of your own (or anything else that has boxes).

They are read with the standard library, not with pycocotools: hand-made files have mistakes, which pycocotools answers
with a bare KeyError or not at all. Here every error names the file and the image or annotation. What is not as COCO has
it, but can only mean one thing, is understood, and counted in the report.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import read_json
from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes

_MAX_SIDE = 2**24  # float32 holds every pixel up to here
_NUMBER = re.compile(r"\s*[-+]?(\d{1,20}(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?\s*", re.ASCII)


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
    counted. ``iscrowd`` annotations become ignore regions. Segmentations and keypoints are not read, but where an
    annotation has no box, that of its polygons takes its place.

    ``annotation`` of a record are its :class:`CocoObjects`: every finite box that is not empty, as the file has it. A
    missing ``area`` is that of the box, a missing ``iscrowd`` is 0.

    Also read are ids and numbers as text, sizes of images of -1, 0 or null (unknown), annotations without an id or with
    the same, and files without "annotations" (images without boxes). A category without boxes that the others name as
    their "supercategory" (Roboflow's root) is not a class.

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
        for category_id, category in sorted(_by_id(content, "categories", name, report).items())
    }
    images = _by_id(content, "images", name, report)
    annotations: dict[int, list[tuple[str, dict[str, Any]]]] = {image_id: [] for image_id in images}
    used = set()
    for place, annotation in _annotations(content, name, report):
        image_id = _get_id(annotation, "image_id", place, report)
        if image_id not in images:
            raise AnnotationError(f"{place}: expected the id of an image of the file, got image_id {image_id}")
        annotations[image_id].append((place, annotation))
        used.add(_get_id(annotation, "category_id", place, report, count=False))
    root_id = _find_root(content["categories"], used)
    if root_id is not None:
        report.note(f"category {categories[root_id]!r}, which is above all others and has no boxes", name)
        del categories[root_id]
    class_of = {category_id: index for index, category_id in enumerate(categories)}

    records = []
    for image_id, image in images.items():
        place = f"{name}: image {image_id}"
        size = _size(image, place, report)
        places = [place_of_box for place_of_box, _ in annotations[image_id]]
        rows = [_row(annotation, class_of, place_of_box, report) for place_of_box, annotation in annotations[image_id]]
        table = np.array(rows, dtype=np.float64).reshape(-1, 7)
        xywh, classes, areas, is_crowd = table[:, :4], table[:, 4].astype(np.int64), table[:, 5], table[:, 6] != 0
        boxes, kept = usable_boxes(xywh, size, places, report)
        path = _get(image, "file_name", str, place)
        file_name = root.join(path, place)
        if "\\" in path:
            report.note('"\\" in paths, taken for "/"', place)
        evaluated = (xywh[:, 2:] > 0).all(axis=1) & np.isfinite(xywh.sum(axis=1))
        objects = CocoObjects(*(column[evaluated] for column in (xywh, classes, areas, is_crowd)))
        height, width = size or (None, None)
        record = ImageRecord(file_name, str(image_id), height, width, boxes, classes[kept], is_crowd[kept], objects)
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
    try:
        return read_json(file)
    except UserError as error:
        raise AnnotationError(str(error)) from error


def _entries(content: dict[str, Any], key: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: key[index]", entry) of the list ``content[key]``."""
    for index, entry in enumerate(_get(content, key, list, name)):
        place = f"{name}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise AnnotationError(f"{place}: expected a JSON object, got {_describe(entry)}")
        yield place, entry


def _annotations(content: dict[str, Any], name: str, report: DataReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, annotation) in the file's order. Nothing refers to their ids, which only name the places."""
    if "annotations" not in content:
        report.note("no 'annotations', as in files of a test: images without boxes", name)
        return
    taken: set[Any] = set()
    for place, entry in _entries(content, "annotations", name):
        entry_id = entry.get("id")
        if not isinstance(entry_id, int | str) or entry_id in taken:
            report.note("annotations without an id of their own", place)
        else:
            taken.add(entry_id)
            place = f"{name}: annotation {entry_id}"
        yield place, entry


def _by_id(content: dict[str, Any], key: str, name: str, report: DataReport) -> dict[int, dict[str, Any]]:
    """Return the list ``content[key]`` as id -> entry, in the file's order."""
    entries: dict[int, dict[str, Any]] = {}
    for place, entry in _entries(content, key, name):
        entry_id = _get_id(entry, "id", place, report)
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


def _get_id(entry: dict[str, Any], key: str, place: str, report: DataReport, *, count: bool = True) -> int:
    """A whole number, which may be written as text or with a fraction of 0."""
    value = entry.get(key)
    number = _number(value)
    if isinstance(value, str | float) and number is not None and number == int(number):
        if count:
            report.note(f"{key!r} that is written as text or with a fraction", place)
        return int(number)
    return _get(entry, key, int, place)


def _find_root(categories: Sequence[dict[str, Any]], used: Collection[int]) -> int | None:
    """The id of the category that all others name as their "supercategory", if it is not among those ``used``."""
    for index, category in enumerate(categories):
        parents = {other.get("supercategory") for other in (*categories[:index], *categories[index + 1 :])}
        category_id = _number(category["id"])
        if parents == {category["name"]} and category_id is not None and category_id not in used:
            return int(category_id)
    return None


def _size(image: dict[str, Any], place: str, report: DataReport) -> tuple[int, int] | None:
    """(height, width), or None where the file does not know them."""
    sides = []
    for key in ("height", "width"):
        value = image.get(key)
        number = _number(value)
        if value is None or (number is not None and number <= 0):
            report.note("sizes of images that are not known, such as -1", place)
            return None
        sides.append(int(number) if number is not None and number == int(number) else _get(image, key, int, place))
    if max(sides) > _MAX_SIDE:
        raise AnnotationError(f"{place}: expected height and width in [1, {_MAX_SIDE}], got {_describe(sides)}")
    return sides[0], sides[1]


def _row(
    annotation: dict[str, Any], class_of: dict[int, int], place: str, report: DataReport
) -> tuple[float, float, float, float, int, float, bool]:
    """x, y, width, height, class index, area and iscrowd of one annotation."""
    bbox = annotation.get("bbox") or _bbox_of_polygons(annotation, place, report)
    if bbox is None:
        bbox = _get(annotation, "bbox", list, place)
    numbers = _to_floats(bbox) if isinstance(bbox, list) and len(bbox) == 4 else None
    if numbers is None:
        raise AnnotationError(f"{place}: expected 'bbox' as 4 numbers [x, y, width, height], got {_describe(bbox)}")
    x, y, width, height = numbers
    area = annotation.get("area")
    area = width * height if area is None else _to_float(area)
    if area is None:
        found = _describe(annotation["area"])
        raise AnnotationError(f"{place}: expected 'area' as a number of pixels, got {found}")
    return x, y, width, height, _class(annotation, class_of, place, report), area, _is_crowd(annotation, place)


def _bbox_of_polygons(annotation: dict[str, Any], place: str, report: DataReport) -> list[float] | None:
    """x, y, width and height of the polygons of an annotation; None if it has none."""
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or not polygons:
        return None
    points = [polygons] if not isinstance(polygons[0], list) else polygons
    rows = [_to_floats(polygon) if isinstance(polygon, list) else None for polygon in points]
    numbers = [row for row in rows if row is not None and len(row) % 2 == 0 and len(row) >= 6]
    if len(numbers) < len(points):
        raise AnnotationError(
            f"{place}: expected 'bbox', or polygons [x1, y1, x2, y2, x3, y3, ...] in 'segmentation', got "
            f"{_describe(polygons)}"
        )
    report.note("boxes around polygons, where an annotation has no 'bbox'", place)
    x, y = ([value for row in numbers for value in row[axis::2]] for axis in (0, 1))
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _is_crowd(annotation: dict[str, Any], place: str) -> bool:
    value = annotation.get("iscrowd")
    if value is None or value in ("", "0", "1", False, True):
        return value in ("1", True)
    return _get(annotation, "iscrowd", int, place) != 0


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as text; else None."""
    number = _to_float(value)
    return number if number is not None and math.isfinite(number) else None


def _to_floats(values: list[Any]) -> list[float] | None:
    """Numbers as :func:`_to_float` reads them; None if one is none."""
    numbers = [number for number in map(_to_float, values) if number is not None]
    return numbers if len(numbers) == len(values) else None


def _to_float(value: Any) -> float | None:
    """A number, also one that is written as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond float64: as far out of any image as infinity
        return math.inf


def _class(annotation: dict[str, Any], class_of: dict[int, int], place: str, report: DataReport) -> int:
    category_id = _get_id(annotation, "category_id", place, report)
    if category_id not in class_of:
        known = ", ".join(map(str, class_of))
        raise AnnotationError(f"{place}: expected 'category_id' to be one of {known}, got {category_id}")
    return class_of[category_id]


def _describe(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
