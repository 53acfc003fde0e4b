"""FDDB as a data set: the bounding boxes of its ellipses."""

from __future__ import annotations

import os

import numpy as np

from .fddb_annotations import IMAGE_SUFFIX, bounding_boxes, read_annotations
from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes


def read_records(
    folder: str | os.PathLike[str], image_root: str | os.PathLike[str], *, report: DataReport | None = None
) -> list[ImageRecord]:
    """Reads the folds in ``folder`` in ascending order. Opens no image.

    ``image_id`` is the path in the lists, as ``2002/08/11/big/img_591``. Where ``image_sizes.csv`` lies beside the
    folds, sizes are known and boxes clipped to them; else boxes may reach out of their image.

    Args:
        image_root: folder that the paths are relative to; it need not exist.
        report: counts are added to it.

    Raises:
        AnnotationError: with file, line, expectation and finding.
        FileNotFoundError: no fold in ``folder``, or one of the two files of a fold is missing.
    """
    report = report if report is not None else DataReport()
    root = ImageRoot(image_root)
    try:
        images = read_annotations(folder)
    except ValueError as error:
        raise AnnotationError(str(error)) from error
    records = []
    for image in images:
        place = f"{os.fspath(folder)}: {image.image_id}"
        corners = bounding_boxes(image.ellipses)
        xywh = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
        boxes, _ = usable_boxes(xywh, image.size, [place] * len(xywh), report)
        height, width = image.size or (None, None)
        classes, ignore = np.zeros(len(boxes), dtype=np.int64), np.zeros(len(boxes), dtype=bool)
        file_name = root.join(image.image_id + IMAGE_SUFFIX, place)
        records.append(ImageRecord(file_name, image.image_id, height, width, boxes, classes, ignore))
        report.num_images += 1
    return records
