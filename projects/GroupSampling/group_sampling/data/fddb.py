"""FDDB's annotation files (http://vis-www.cs.umass.edu/fddb/): ten folds of images whose faces are ellipses.

Fold XX has two files. ``FDDB-fold-XX.txt`` lists its images, one path per line without extension;
``FDDB-fold-XX-ellipseList.txt`` has for each of them a block::

    2002/08/11/big/img_591
    1                                                      number of faces
    123.583300 85.549500 1.265839 269.693400 161.781200  1     see FDDBImage.ellipses

The format of detections is the same with other rows. NumPy only; torch is not imported.
"""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files import open_regular, plain_bytes, safe_relative_path
from .images import read_size
from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes

IMAGE_SUFFIX = ".jpg"
SIZES_FILE = "image_sizes.csv"
# Beyond any image, and far from where the rasterization of ellipses overflows.
MAX_COORDINATE = 1e6
MAX_IMAGE_SIDE = 1 << 14

_ELLIPSE_ROW = "semi-major semi-minor angle center-x center-y 1"
COUNT = re.compile(rb"\s*\d{1,9}(\.0*)?\s*")  # of rows; some tools write it as a float
_FOLD_FILE = re.compile(r"FDDB-fold-(\d\d)-ellipseList\.txt")
# About a million rows; FDDB's largest file has 36 kB.
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class FDDBImage:
    """One annotated image.

    Attributes:
        image_id: path below the image folder without extension, as ``2002/08/11/big/img_591``.
        fold: 1 to 10.
        ellipses: (m, 5) float64: semi-major axis, semi-minor axis, angle of the major axis with the x axis in radians
            (y points down), center x, center y; the rest in pixels. m may be 0. They may reach out of the image.
        size: (height, width) in pixels, or None when unknown.
    """

    image_id: str
    fold: int
    ellipses: NDArray[np.float64]
    size: tuple[int, int] | None


class Block(NamedTuple):
    """The rows of one image in an annotation or detection file."""

    image_id: str
    place: str  # file:line of the image's name
    rows: NDArray[np.float64]  # (k, number of columns)


def read_annotations(folder: str | os.PathLike, image_root: str | os.PathLike | None = None) -> list[FDDBImage]:
    """Read the folds in a folder, in ascending order.

    Args:
        folder: has the two files of each fold. A file ``image_sizes.csv`` in it (header ``image,width,height``) gives
            the sizes of the images.
        image_root: where no such file is, folder of the images, whose headers give their sizes. Without it the sizes
            are None.

    Raises:
        FileNotFoundError: no ellipse list in ``folder``, or a fold's list of images is missing.
        UnreadableImageError: the header of an image cannot be read.
        ValueError: a file does not follow its format, the lists of a fold name different images, an image comes twice
            or has no size in ``image_sizes.csv``. The message names file and line, what was expected and found.
    """
    folder = Path(folder)
    folds = {int(match[1]): file for file in sorted(folder.glob("*.txt")) if (match := _FOLD_FILE.fullmatch(file.name))}
    if not folds:
        raise FileNotFoundError(f"{folder}: expected FDDB-fold-01-ellipseList.txt and so on, got none")
    blocks = [(fold, block) for fold, file in folds.items() for block in _read_fold(file)]
    places: dict[str, str] = {}
    for _, block in blocks:
        first = places.setdefault(block.image_id, block.place)
        if first != block.place:
            raise ValueError(f"{block.place}: expected each image once, got {block.image_id!r} again, first at {first}")
    sizes = _read_sizes(folder / SIZES_FILE, image_root, places)
    return [FDDBImage(block.image_id, fold, block.rows[:, :5], sizes.get(block.image_id)) for fold, block in blocks]


def read_records(
    folder: str | os.PathLike[str], image_root: str | os.PathLike[str], *, report: DataReport | None = None
) -> list[ImageRecord]:
    """Read the folds in ``folder`` in ascending order. Opens no image.

    ``image_id`` is the path in the lists, as ``2002/08/11/big/img_591``. Where ``image_sizes.csv`` is in the folder of
    the folds, sizes are known and boxes clipped to them; else boxes may reach out of their image. ``annotation`` of a
    record is its :class:`FDDBImage`.

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
        records.append(ImageRecord(file_name, image.image_id, height, width, boxes, classes, ignore, image))
        report.num_images += 1
    return records


def bounding_boxes(ellipses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The (m, 4) XYXY boxes around (m, 5) ellipses, exact and not rounded."""
    major, minor, angle, x, y = ellipses.T
    half_width = np.hypot(major * np.cos(angle), minor * np.sin(angle))
    half_height = np.hypot(major * np.sin(angle), minor * np.cos(angle))
    return np.column_stack([x - half_width, y - half_height, x + half_width, y + half_height])


def read_blocks(path: Path, columns: str) -> Iterator[Block]:
    """Read a file of blocks: the name of an image, the number of rows, and the rows.

    Args:
        columns: names of a row's numbers, in a text with blanks between them.

    Raises:
        ValueError: names file and line, what was expected and what was found.
    """
    with open_regular(path) as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_FILE_BYTES >> 20} MiB, got more")
    content = plain_bytes(content)
    lines = content.split(b"\n") if content else []
    at = 0
    while at < len(lines):
        place = f"{path}:{at + 1}"
        name = lines[at].decode("utf-8", "replace").strip()
        if not name or len(name.split()) != 1:
            raise ValueError(f"{place}: expected the name of an image, got {_quote(lines[at])}")
        if at + 1 == len(lines) or not COUNT.fullmatch(lines[at + 1]):
            found = _quote(lines[at + 1]) if at + 1 < len(lines) else "the end of the file"
            raise ValueError(f"{path}:{at + 2}: expected a number of rows, got {found}")
        begin, end = at + 2, at + 2 + int(float(lines[at + 1]))
        if end > len(lines):
            raise ValueError(
                f"{path}:{at + 2}: expected as many rows as it says, {end - begin}, got the end of the file"
            )
        table = np.empty((end - begin, len(columns.split())))
        for row, line in enumerate(lines[begin:end]):
            numbers = _numbers(line)
            if numbers is None or len(numbers) != table.shape[1]:
                raise ValueError(f"{path}:{begin + row + 1}: expected {columns!r}, finite numbers, got {_quote(line)}")
            table[row] = numbers
        yield Block(name, place, table)
        at = end


def check_rows(block: Block, bad: NDArray[np.bool_], expected: str) -> None:
    """Raise a ValueError that names the line of the first row marked in ``bad``, if there is one."""
    if bad.any():
        row = int(bad.argmax())
        path, line = block.place.rsplit(":", 1)
        raise ValueError(f"{path}:{int(line) + 2 + row}: expected {expected}, got {block.rows[row].tolist()}")


def _read_fold(file: Path) -> list[Block]:
    blocks = list(read_blocks(file, _ELLIPSE_ROW))
    for block in blocks:
        bad = np.any(block.rows[:, :2] <= 0, axis=1) | np.any(np.abs(block.rows) > MAX_COORDINATE, axis=1)
        check_rows(block, bad, f"axes above 0 and numbers up to {MAX_COORDINATE:g}")
    image_list = file.with_name(file.name.replace("-ellipseList", ""))
    if not image_list.is_file():
        raise FileNotFoundError(f"{image_list}: no such file; it lists the images of {file.name}")
    with open_regular(image_list) as stream:
        names = plain_bytes(stream.read()).decode("utf-8", "replace").split()
    for number in range(max(len(names), len(blocks))):
        expected = repr(blocks[number].image_id) if number < len(blocks) else "no further image"
        found = repr(names[number])[:80] if number < len(names) else "the end of the file"
        if expected != found:
            raise ValueError(
                f"{image_list}: expected the images of {file.name}; number {number + 1} {expected}, got {found}"
            )
    return blocks


def _read_sizes(file: Path, image_root: str | os.PathLike | None, images: dict[str, str]) -> dict[str, tuple[int, int]]:
    """(height, width) by image id; empty when nothing tells them."""
    if file.is_file():
        sizes = _parse_sizes(file)
        missing = next((image for image in images if image not in sizes), None)
        if missing is not None:
            raise ValueError(f"{file}: expected the size of every image, got none for {missing!r}")
        return sizes
    if image_root is None:
        return {}
    return {image: _size_of_image(Path(image_root), image, place) for image, place in images.items()}


def _parse_sizes(file: Path) -> dict[str, tuple[int, int]]:
    sizes = {}
    try:
        rows = list(csv.reader(file.read_text("utf-8").splitlines()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected text with commas, cannot read it: {error}") from error
    if not rows or rows[0] != ["image", "width", "height"]:
        raise ValueError(f"{file}:1: expected the header image,width,height, got {str(rows[0] if rows else '')[:80]}")
    for line, row in enumerate(rows[1:], 2):
        numbers = [int(word) for word in row[1:] if re.fullmatch(r"[0-9]{1,5}", word)]
        if len(row) != 3 or len(numbers) != 2 or not all(0 < side <= MAX_IMAGE_SIDE for side in numbers):
            expected = f"an image, and sides from 1 to {MAX_IMAGE_SIDE}"
            raise ValueError(f"{file}:{line}: expected {expected}, got {','.join(row)!r:.80}")
        sizes[row[0]] = (numbers[1], numbers[0])
    return sizes


def _size_of_image(root: Path, image: str, place: str) -> tuple[int, int]:
    relative = safe_relative_path(image)
    if relative is None:
        raise ValueError(f"{place}: expected a path below the image folder, got {image!r:.80}")
    path = root / f"{relative}{IMAGE_SUFFIX}"
    height, width = read_size(str(path))
    if max(height, width) > MAX_IMAGE_SIDE:
        raise ValueError(f"{path}: expected sides up to {MAX_IMAGE_SIDE} pixels, got {width}x{height}")
    return height, width


def _numbers(line: bytes) -> list[float] | None:
    if b"_" in line:  # float() reads 1_0, no other reader does
        return None
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _quote(line: bytes) -> str:
    return repr(line.decode("utf-8", "replace"))[:80]
