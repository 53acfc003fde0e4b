"""Annotations of other projects, read for conversion: YOLO, Pascal VOC and RetinaFace label files.

The readers ask every image for its size, from the header alone: YOLO's boxes are shares of it, and an annotation that
was made for another size or orientation is found here instead of while training. Landmarks are not read.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import yaml

from ..files import decode_text, open_regular
from .images import read_size
from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes
from .wider_face import IMAGE_SUFFIXES, retinaface_blocks

_YOLO_DECIMALS = 1e-6  # share of a side: the rounding of the six decimals that YOLO tools write
_NO_LABELS = ("classes.txt", "labels.txt", "README.txt", "README.roboflow.txt", "README.dataset.txt")

PathLike = str | os.PathLike[str]


def read_yolo(
    labels: PathLike, images: PathLike, *, names: Mapping[int, str] | None = None, report: DataReport | None = None
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read YOLO labels: for every image a text file of lines "class x_center y_center width height".

    The four numbers are shares of the upright image's sides; five landmarks after them (yolov5-face) are passed over.
    An image without a file has no faces. A coordinate that leaves the image by no more than the rounding of six
    decimals is put on the border.

    Args:
        labels: folder with the path of an image, its suffix replaced by ".txt".
        images: folder of images, searched with its subfolders.
        names: class id -> name; None: only class 0 may occur, which is "face".
        report: counts are added to it.

    Returns:
        (records, categories): category id -> name, ids being the classes' plus 1.

    Raises:
        AnnotationError: with file, line, expectation and finding; also when no image has labels.
        UnreadableImageError: the header of an image cannot be read.
        OSError: a label file cannot be read.
    """
    report = report if report is not None else DataReport()
    names = dict(sorted(names.items())) if names is not None else {0: "face"}
    class_of = {class_id: index for index, class_id in enumerate(names)}
    folder = Path(labels)
    if not folder.is_dir():
        raise AnnotationError(f"{folder}: expected the folder of the YOLO label files, got no such folder")
    waiting = {file for file in folder.rglob("*.txt") if file.name not in _NO_LABELS}
    records = []
    taken: dict[Path, str] = {}
    for path in _find_images(images):
        file = folder / Path(path).with_suffix(".txt")
        if taken.setdefault(file, path) != path:
            raise AnnotationError(f"{file}: expected the labels of one image, got {taken[file]} and {path}")
        file_name = os.path.join(images, path)
        height, width = read_size(file_name)
        rows, classes, places = [], [], []
        if file in waiting:
            waiting.remove(file)
            for place, line in _lines(file):
                class_id, row = _parse_yolo(place, line, height, width)
                if class_id not in class_of:
                    known = ", ".join(f"{key} ({name})" for key, name in names.items())
                    raise AnnotationError(f"{place}: expected a class of {known}, got {class_id}: --names gives names")
                rows.append(row)
                classes.append(class_of[class_id])
                places.append(place)
        records.append(_record(file_name, path, (height, width), rows, classes, [False] * len(rows), places, report))
    _refuse_strays(waiting, folder, images, num_labels=len(taken))
    return records, {class_id + 1: name for class_id, name in names.items()}


def read_yolo_names(file: PathLike) -> dict[int, str]:
    """Class id -> name from a data set's YAML file (key "names", a list or a mapping), or a text file of one per line.

    Raises:
        AnnotationError: it is neither.
        OSError: it cannot be opened.
    """
    text = _read_text(file)
    found: object
    if Path(file).suffix.lower() not in (".yaml", ".yml"):
        found = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise AnnotationError(f"{file}: expected YAML, got: {error}") from error
        found = content.get("names") if isinstance(content, dict) else None
    if isinstance(found, list):
        found = dict(enumerate(found))
    if not isinstance(found, dict) or not found or not all(type(key) is int and key >= 0 for key in found):
        raise AnnotationError(f'{file}: expected the names of the classes, "names: [face]" or "names: {{0: face}}"')
    return {key: str(name) for key, name in sorted(found.items())}


def read_voc(
    annotations: PathLike, images: PathLike, *, report: DataReport | None = None
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read Pascal VOC annotations: an XML file for every image, in one folder or its subfolders.

    Corners are 1-based and inclusive, as VOC's development kit has them: xmin 1 is the left border, xmax = width the
    right one. Objects marked "difficult" become ignore regions. The image is "filename", or the one with the XML file's
    name where there is no such file.

    Args:
        annotations: folder of XML files.
        images: folder that "filename" is relative to.
        report: counts are added to it.

    Returns:
        (records, categories): category id -> name, in alphabetical order from 1.

    Raises:
        AnnotationError: with file, object, expectation and finding.
        UnreadableImageError: the header of an image cannot be read.
        OSError: a file cannot be read.
    """
    report = report if report is not None else DataReport()
    files = sorted(Path(annotations).rglob("*.xml"))
    if not files:
        raise AnnotationError(f"{os.fspath(annotations)}: expected a folder of XML files, got none")
    root, known = ImageRoot(images), None
    parsed: list[tuple] = []
    taken: dict[str, Path] = {}
    for file in files:
        try:
            tree = ElementTree.fromstring(file.read_bytes())
        except ElementTree.ParseError as error:
            raise AnnotationError(f"{file}: expected XML, got: {error}") from error
        path = (tree.findtext("filename") or "").strip()
        relative = file.relative_to(annotations).with_suffix("")
        if not path or not os.path.isfile(root.join(path, str(file))):
            if known is None:
                known = {os.path.splitext(image)[0]: image for image in _find_images(images)}
            if str(relative) not in known:
                raise AnnotationError(
                    f"{file}: expected its image below {os.fspath(images)}, got neither {path!r} nor {relative}.*"
                )
            path = known[str(relative)]
        if taken.setdefault(path, file) != file:
            raise AnnotationError(f"{file}: expected each image once, got {path} again, first in {taken[path]}")
        size = read_size(root.join(path, str(file)))
        declared = [tree.findtext(f"size/{side}", "0").strip() for side in ("height", "width")]
        if declared not in (["0", "0"], [str(side) for side in size]):  # zeros: some tools leave the size out
            raise AnnotationError(
                f"{file}: expected the size of the upright image, {size[1]}x{size[0]}, got "
                f"{declared[1]}x{declared[0]}: its boxes belong to another picture or orientation"
            )
        rows, names, difficult, places = [], [], [], []
        for index, entry in enumerate(tree.iter("object"), 1):
            place = f"{file}: object {index}"
            name = (entry.findtext("name") or "").strip()
            if not name:
                raise AnnotationError(f"{place}: expected <name>, got none")
            x1, y1, x2, y2 = (_number(entry, f"bndbox/{side}", place) for side in ("xmin", "ymin", "xmax", "ymax"))
            rows.append([x1 - 1, y1 - 1, x2 - (x1 - 1), y2 - (y1 - 1)])
            names.append(name)
            difficult.append((entry.findtext("difficult") or "0").strip() == "1")
            places.append(place)
        parsed.append((root.join(path, str(file)), path, size, rows, names, difficult, places))
    class_names = sorted({name for entry in parsed for name in entry[4]})
    class_of = {name: index for index, name in enumerate(class_names)}
    records = [
        _record(file_name, path, size, rows, [class_of[name] for name in names], difficult, places, report)
        for file_name, path, size, rows, names, difficult, places in parsed
    ]
    return records, dict(enumerate(class_names, 1))


def read_retinaface(
    file: PathLike, images: PathLike, *, report: DataReport | None = None
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read RetinaFace's label.txt, or SCRFD's labelv2.txt.

    :func:`~group_sampling.data.wider_face.retinaface_blocks` has the formats.

    Args:
        images: folder that the paths are relative to.
        report: counts are added to it.

    Returns:
        (records, categories): the one category is "face".

    Raises:
        AnnotationError: with file, line, expectation and finding.
        UnreadableImageError: the header of an image cannot be read.
        OSError: the file cannot be read.
    """
    report = report if report is not None else DataReport()
    root = ImageRoot(images)
    records: list[ImageRecord] = []
    taken: set[str] = set()
    for block in retinaface_blocks(_lines(Path(file))):
        file_name = root.join(block.path, block.place)
        if block.path in taken:
            raise AnnotationError(f"{block.place}: expected each image once, got {block.path} again")
        taken.add(block.path)
        size = read_size(file_name)
        if block.size not in (None, size):
            raise AnnotationError(
                f"{block.place}: expected the size of the upright image, {size[1]}x{size[0]}, got "
                f"{block.size[1]}x{block.size[0]}"
            )
        classes, places = [0] * len(block.xywh), list(block.places)
        records.append(_record(file_name, block.path, size, block.xywh, classes, block.invalid, places, report))
    return records, {1: "face"}


def fit_to_image(record: ImageRecord, report: DataReport) -> ImageRecord:
    """``record`` with its image's size, read from the header, and its boxes clipped to it.

    What is clipped or lies outside is added to the findings of ``report``, which has counted the boxes already.

    Raises:
        UnreadableImageError: the header cannot be read.
    """
    if record.height is not None:
        return record
    size = read_size(record.file_name)
    corners = record.boxes.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    findings = DataReport()
    boxes, kept = usable_boxes(xywh, size, [record.image_id] * len(xywh), findings)
    for kind, count in findings.counts.items():
        for _ in range(count):
            report.note(kind, record.image_id)
    report.num_ignore -= int(record.ignore.sum()) - int(record.ignore[kept].sum())
    return ImageRecord(record.file_name, record.image_id, *size, boxes, record.classes[kept], record.ignore[kept])


def _find_images(folder: PathLike) -> list[str]:
    """Relative paths of the images below ``folder``, sorted."""
    paths = sorted(
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not paths:
        raise AnnotationError(f"{os.fspath(folder)}: expected a folder of images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def _refuse_strays(strays: Iterable[Path], folder: Path, images: PathLike, *, num_labels: int) -> None:
    strays = sorted(strays)
    if strays:
        raise AnnotationError(
            f"{folder}: expected an image below {os.fspath(images)} for every label file, got none for "
            f"{len(strays)} of them, the first {strays[0]}"
        )
    if not any(folder.rglob("*.txt")):
        raise AnnotationError(f"{folder}: expected label files for the {num_labels} images, got none")


def _record(
    file_name: str,
    path: str,
    size: tuple[int, int],
    rows: list[list[float]],
    classes: list[int],
    ignore: list[bool],
    places: list[str],
    report: DataReport,
) -> ImageRecord:
    boxes, kept = usable_boxes(rows, size, places, report)
    record = ImageRecord(
        file_name, path, *size, boxes, np.array(classes, dtype=np.int64)[kept], np.array(ignore, dtype=bool)[kept]
    )
    report.num_images += 1
    report.num_ignore += int(record.ignore.sum())
    return record


def _parse_yolo(place: str, line: str, height: int, width: int) -> tuple[int, list[float]]:
    class_id, *shares = _floats(place, line, "class x_center y_center width height", (5, 15))
    if not (class_id >= 0 and class_id == int(class_id)):
        raise AnnotationError(f"{place}: expected a class number, got {class_id:g}")
    x, y, w, h = shares[:4]
    if not max(map(abs, shares[:4])) <= 2:
        raise AnnotationError(f"{place}: expected shares of the image's sides, got {line[:80]!r}: are these pixels?")
    corners = [_snap(x - w / 2), _snap(y - h / 2), _snap(x + w / 2), _snap(y + h / 2)]
    if w < 0 or h < 0:  # left as they are, for the report
        corners = [x, y, x + w, y + h]
    x1, y1, x2, y2 = (corner * side for corner, side in zip(corners, (width, height) * 2))
    return int(class_id), [x1, y1, x2 - x1, y2 - y1]


def _snap(share: float) -> float:
    if -_YOLO_DECIMALS <= share < 0:
        return 0.0
    return 1.0 if 1 < share <= 1 + _YOLO_DECIMALS else share


def _floats(place: str, line: str, expectation: str, counts: tuple[int, ...]) -> list[float]:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise AnnotationError(
            f"{place}: expected {expectation!r} ({' or '.join(map(str, counts))} numbers), got {line[:80]!r}"
        )
    return values


def _number(entry: ElementTree.Element, path: str, place: str) -> float:
    text = entry.findtext(path)
    try:
        return float(text or "")
    except ValueError:
        raise AnnotationError(f"{place}: expected a number in <{path}>, got {text!r}") from None


def _read_text(file: PathLike) -> str:
    with open_regular(file) as stream:
        try:
            return decode_text(stream.read())
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{os.fspath(file)}: expected text, got: {error}") from error


def _lines(file: Path) -> list[tuple[str, str]]:
    """("file:line", text) of every line that is not empty."""
    text = _read_text(file).split("\n")
    return [(f"{file}:{number}", line.strip()) for number, line in enumerate(text, 1) if line.strip()]
