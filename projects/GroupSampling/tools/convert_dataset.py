#!/usr/bin/env python
"""Turn annotations of another format into one that a line of the config trains on.

    python convert_dataset.py --from yolo --annotations my/labels --images my/images --to coco --output my/train.json
    python convert_dataset.py --from voc --annotations my/Annotations --images my/JPEGImages --to wider --output my.txt

--annotations is the folder of label files (yolo), of XML files (voc), or the file (wider, retinaface, coco). Nothing is
copied: the result names the images relative to --images. Before it takes its place it is read back and compared, bit
by bit. What cannot be trained on (boxes of no area, outside the image, ...) is left out, and said.
"""

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from group_sampling.data import coco, formats, wider_face
from group_sampling.data.records import AnnotationError, DataReport, ImageRecord
from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.files import atomic_file

FORMATS = ("yolo", "voc", "wider", "retinaface", "coco")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="format of the annotations")
    parser.add_argument("--annotations", required=True, type=Path, metavar="PATH", help="label folder or file")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="what image paths are relative to")
    parser.add_argument("--to", dest="target", required=True, choices=("coco", "wider"), help="format of the result")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the result, .json or .txt")
    parser.add_argument("--names", type=Path, metavar="FILE", help="yolo: data.yaml or classes.txt with class names")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="keep only boxes of these classes; to wider, they are the faces"
    )
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    if args.names and args.source != "yolo":
        parser.error("--names is for --from yolo; the other formats have the names in their files")
    if args.output.exists() and args.annotations.exists() and args.output.samefile(args.annotations):
        parser.error(f"--output: expected another file than --annotations, got {args.output}")
    return args


def read(args: argparse.Namespace, report: DataReport) -> tuple[list[ImageRecord], dict[int, str]]:
    """The records and categories of ``--annotations``."""
    if args.source == "yolo":
        names = formats.read_yolo_names(args.names) if args.names else None
        return formats.read_yolo(args.annotations, args.images, names=names, report=report)
    if args.source == "voc":
        return formats.read_voc(args.annotations, args.images, report=report)
    if args.source == "retinaface":
        return formats.read_retinaface(args.annotations, args.images, report=report)
    if args.source == "wider":
        return wider_face.read_annotations(args.annotations, args.images, report=report), {1: "face"}
    return coco.read_annotations(args.annotations, args.images, report=report)


def select_classes(
    records: list[ImageRecord], categories: dict[int, str], wanted: Sequence[str]
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Only the boxes of the classes ``wanted``; the images all stay.

    Raises:
        UserError: there is no such class.
    """
    names = list(categories.values())
    for name in wanted:
        if name not in names:
            raise UserError(f"--classes: expected some of {', '.join(names)}, got {name!r}")
    kept = {key: name for key, name in categories.items() if name in wanted}
    index_of = np.array([list(kept).index(key) if key in kept else -1 for key in categories])
    selected = []
    for record in records:
        classes = index_of[record.classes]
        keep = classes >= 0
        selected.append(replace(record, boxes=record.boxes[keep], classes=classes[keep], ignore=record.ignore[keep]))
    return selected, kept


def write(args: argparse.Namespace, records: list[ImageRecord], categories: dict[int, str]) -> None:
    """Write ``--output``, once what it holds reads back as the same.

    Raises:
        UserError: it does not, because the format cannot say it.
    """
    if args.target == "wider":
        content = wider_face.format_annotations(records, args.images)
    else:
        content = coco.format_annotations(records, categories, args.images)
    with atomic_file(args.output) as file:
        file.write(content)
        file.flush()
        try:
            if args.target == "wider":
                again = wider_face.read_annotations(file.name, args.images)
            else:
                again, _ = coco.read_annotations(file.name, args.images)
        except AnnotationError as error:
            raise UserError(f"{args.output}: the result cannot be read back: {error}") from error
        for before, after in zip(records, again, strict=True):
            same_image = os.path.normpath(before.file_name) == os.path.normpath(after.file_name)
            same = (np.array_equal(getattr(before, key), getattr(after, key)) for key in ("boxes", "classes", "ignore"))
            if not (same_image and all(same)):
                raise UserError(f"{args.output}: {before.file_name} does not read back as it was")


def convert(args: argparse.Namespace) -> None:
    report = DataReport()
    records, categories = read(args, report)
    if args.classes:
        records, categories = select_classes(records, categories, args.classes)
    if args.target == "wider":
        if len(categories) > 1 and not args.classes:
            names = ", ".join(categories.values())
            raise UserError(f"--to wider has faces only: expected --classes NAME ... to say which of {names} are faces")
        records = [replace(record, classes=np.zeros_like(record.classes)) for record in records]
        categories = {1: "face"}
    if args.target == "coco":
        records = [formats.fit_to_image(record, report) for record in records]
    write(args, records, categories)
    print(report.summary())
    num_empty = sum(not len(record.boxes) for record in records)
    names = ", ".join(categories.values())
    print(f"{args.output}: {len(records)} images ({num_empty} without a box), classes: {names}")
    name = args.output.stem
    entry = json.dumps([[name, str(args.output.resolve()), str(args.images.resolve())]], ensure_ascii=False)
    key = {"coco": "COCO_FORMAT", "wider": "WIDER_FORMAT"}[args.target]
    print(f"Train on it with\n  DATASETS.{key} {shlex.quote(entry)} DATASETS.TRAIN {shlex.quote(repr((name,)))}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("convert_dataset.py", args):
        convert(args)


if __name__ == "__main__":
    main()
