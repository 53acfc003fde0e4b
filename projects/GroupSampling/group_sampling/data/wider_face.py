"""WIDER FACE's annotation files (http://shuoyang1213.me/WIDERFACE/).

The text format is a sequence of::

    0--Parade/0_Parade_marchingband_1_849.jpg      path below the image folder
    1                                              number of boxes
    449 330 122 149 0 0 0 0 0 0                    x y w h blur expression illumination invalid occlusion pose

An image without faces has the count 0 and, nevertheless, one line of ten zeros after it.
"""

import gzip
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, usable_boxes

_COLUMNS = "x y w h blur expression illumination invalid occlusion pose"
_NUM_COLUMNS = 10
_INVALID = 7
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_GZIP_MAGIC = b"\x1f\x8b"


def read_annotations(
    file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    keep: Mapping[str, str] | None = None,
    report: DataReport | None = None,
) -> list[ImageRecord]:
    """Parse ``wider_face_{train,val}_bbx_gt.txt``, plain or gzipped. Opens no image.

    Boxes with w or h <= 0 or a coordinate that is not finite are dropped and counted; ``invalid`` ones become ignore
    regions. Sizes are unknown (the format has none), so boxes outside their image stay: the transforms drop them.

    Args:
        image_root: folder that the paths are relative to; it need not exist.
        keep: the images wanted, as :func:`read_paths` returns them; None: all.
        report: counts are added to it.

    Raises:
        AnnotationError: with file, line, expectation and finding.
        OSError: the file cannot be opened.
    """
    report = report if report is not None else DataReport()
    root = ImageRoot(image_root)
    records: list[ImageRecord] = []
    ids: dict[str, str] = {}
    paths: set[str] = set()
    lines = _Lines(file)
    while not lines.at_end:
        place, path = _take_path(lines, ids)
        paths.add(path)
        count = _parse_count(*lines.take(f"the number of boxes of {path}"))
        rows, places = [], []
        for _ in range(count):
            place_of_box, text = lines.take(f"{count} boxes for {path}")
            rows.append(_parse_box(place_of_box, text))
            places.append(place_of_box)
        if count == 0:
            lines.skip_row_of_zeros()
        if keep is None or path in keep:
            boxes, kept = usable_boxes([row[:4] for row in rows], None, places, report)
            ignore = np.array([row[_INVALID] == 1 for row in rows], dtype=bool)[kept]
            report.num_images += 1
            report.num_ignore += int(ignore.sum())
            records.append(_record(root.join(path, place), path, boxes, ignore))
    for path, place in (keep or {}).items():
        if path not in paths:
            raise AnnotationError(f"{place}: expected an image of {os.fspath(file)}, got {_shorten(path)}")
    return records


def read_file_list(
    file: str | os.PathLike[str], image_root: str | os.PathLike[str], *, report: DataReport | None = None
) -> list[ImageRecord]:
    """Parse ``wider_face_test_filelist.txt``: one relative path per line, no boxes.

    Raises:
        AnnotationError: with file, line, expectation and finding.
    """
    root = ImageRoot(image_root)
    no_boxes, no_ignore = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=bool)
    paths = read_paths(file)
    if report is not None:
        report.num_images += len(paths)
    return [_record(root.join(path, place), path, no_boxes, no_ignore) for path, place in paths.items()]


def read_paths(file: str | os.PathLike[str]) -> dict[str, str]:
    """Read a list of relative image paths, one per line; return path -> "file:line" in the file's order."""
    paths: dict[str, str] = {}
    ids: dict[str, str] = {}
    lines = _Lines(file)
    while not lines.at_end:
        place, path = _take_path(lines, ids)
        paths[path] = place
    return paths


def format_annotations(records: Sequence[ImageRecord], image_root: str | os.PathLike[str]) -> bytes:
    """The text that :func:`read_annotations` reads back as the same boxes and ignore regions, to the last bit.

    Classes are not in the format: every box is a face. Of the six attributes, "invalid" is the ignore flag and the
    others are 0.

    Raises:
        ValueError: the path of an image cannot stand in the file.
    """
    lines = []
    for record in records:
        path = os.path.relpath(record.file_name, image_root)
        if PurePosixPath(path).suffix.lower() not in IMAGE_SUFFIXES or path != path.strip() or "\n" in path:
            raise ValueError(f"WIDER FACE's format: expected an image path ({', '.join(IMAGE_SUFFIXES)}), got {path!r}")
        lines += [path, str(len(record.boxes))]
        for (x1, y1, x2, y2), ignored in zip(record.boxes.astype(np.float64).tolist(), record.ignore.tolist()):
            numbers = (repr(value).removesuffix(".0") for value in (x1, y1, x2 - x1, y2 - y1))
            lines.append(f"{' '.join(numbers)} 0 0 0 {int(ignored)} 0 0")
        if not len(record.boxes):
            lines.append(" ".join(["0"] * _NUM_COLUMNS))
    return "".join(f"{line}\n" for line in lines).encode()


def image_id(path: str) -> str:
    """``"<event>/<stem>"`` of a relative path, as the result files of the benchmark name an image."""
    return str(PurePosixPath(path).with_suffix(""))


def _record(file_name: str, path: str, boxes: np.ndarray, ignore: np.ndarray) -> ImageRecord:
    return ImageRecord(file_name, image_id(path), None, None, boxes, np.zeros(len(boxes), dtype=np.int64), ignore)


class _Lines:
    """The stripped, non-empty lines of a text file, each with its place ("file:line")."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._file = os.fspath(file)
        with open(self._file, "rb") as stream:
            content = stream.read()
        try:
            if content.startswith(_GZIP_MAGIC):
                content = gzip.decompress(content)
            text = content.decode("utf-8-sig")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise AnnotationError(f"{self._file}: expected text, plain or gzipped, got: {error}") from error
        # Not splitlines(): its further separators (form feed, U+2028, ...) would shift the numbers an editor shows.
        self._lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        self._next = 0

    @property
    def at_end(self) -> bool:
        return self._next == len(self._lines)

    def take(self, expectation: str) -> tuple[str, str]:
        """Return (place, text) of the next line; the end of the file is an error that names ``expectation``."""
        if self.at_end:
            raise AnnotationError(f"{self._file}: expected {expectation}, got the end of the file")
        number, text = self._lines[self._next]
        self._next += 1
        return f"{self._file}:{number}", text

    def skip_row_of_zeros(self) -> None:
        """Step over the line of ten zeros that follows the count 0, if it is there."""
        if not self.at_end and self._lines[self._next][1].split() == ["0"] * _NUM_COLUMNS:
            self._next += 1


def _take_path(lines: _Lines, ids: dict[str, str]) -> tuple[str, str]:
    """Return (place, path) of the image that the next line names; ``ids``: image id -> place of those before."""
    place, text = lines.take("an image path")
    path = PurePosixPath(text)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise AnnotationError(f"{place}: expected an image path ({', '.join(IMAGE_SUFFIXES)}), got {_shorten(text)}")
    first = ids.setdefault(image_id(text), place)
    if first != place:
        raise AnnotationError(f"{place}: expected each image once, got {_shorten(text)} again, first at {first}")
    return place, str(path)


def _parse_count(place: str, text: str) -> int:
    # The length limit keeps int() out of reach of absurd digit strings.
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise AnnotationError(f"{place}: expected a number of boxes, got {_shorten(text)}")
    return int(text)


def _parse_box(place: str, text: str) -> list[float]:
    try:
        row = [float(word) for word in text.split()]
    except ValueError:
        row = []
    if len(row) != _NUM_COLUMNS:
        raise AnnotationError(f"{place}: expected {_COLUMNS!r} ({_NUM_COLUMNS} numbers), got {_shorten(text)}")
    if row[_INVALID] not in (0, 1):
        raise AnnotationError(f"{place}: expected 0 or 1 for 'invalid', got {row[_INVALID]:g} in {_shorten(text)}")
    return row


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
