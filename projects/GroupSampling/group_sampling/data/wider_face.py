"""WIDER FACE's annotation files (http://shuoyang1213.me/WIDERFACE/).

The text format is a sequence of::

    0--Parade/0_Parade_marchingband_1_849.jpg      path below the image folder
    1                                              number of boxes
    449 330 122 149 0 0 0 0 0 0                    x y w h blur expression illumination invalid occlusion pose

An image without faces has the count 0 and, nevertheless, one line of ten zeros after it. Files of four columns, "x y w
h", are read as well, and those that others have made of WIDER FACE: see :func:`retinaface_blocks`.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from ..files import decode_text, open_regular
from .records import AnnotationError, DataReport, ImageRecord, ImageRoot, clean_path, usable_boxes

_COLUMNS = "x y w h blur expression illumination invalid occlusion pose"
_NUM_COLUMNS = (4, 10)
_RETINAFACE_COLUMNS = (4, 19, 20)  # with five landmarks of three numbers, and their blur
_MAX_UNPACKED_BYTES = 1 << 30
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
    """Parse ``wider_face_{train,val}_bbx_gt.txt``, plain or gzipped, or RetinaFace's or SCRFD's file. Opens no image.

    Boxes with w or h <= 0 or a coordinate that is not finite are dropped and counted; ``invalid`` ones become ignore
    regions. Sizes are unknown (only SCRFD's format has them), so boxes outside their image stay: the transforms drop
    them.

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
    for block in retinaface_blocks(lines.rest()) if lines.begins_with("#") else _own_blocks(lines):
        _check_once(block.path, block.place, ids)
        paths.add(block.path)
        if keep is None or block.path in keep:
            boxes, kept = usable_boxes(block.xywh, block.size, block.places, report)
            ignore = np.array(block.invalid, dtype=bool)[kept]
            report.num_images += 1
            report.num_ignore += int(ignore.sum())
            records.append(_record(root, block, boxes, ignore))
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
    return [_record(root, Block(place, path, None, [], [], []), no_boxes, no_ignore) for path, place in paths.items()]


def read_paths(file: str | os.PathLike[str]) -> dict[str, str]:
    """Read a list of relative image paths, one per line; return path -> "file:line" in the file's order."""
    paths: dict[str, str] = {}
    ids: dict[str, str] = {}
    lines = _Lines(file)
    while not lines.at_end:
        place, path = _take_path(lines)
        _check_once(path, place, ids)
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
            lines.append(" ".join(["0"] * _NUM_COLUMNS[-1]))
    return "".join(f"{line}\n" for line in lines).encode()


def image_id(path: str) -> str:
    """``"<event>/<stem>"`` of a relative path, as the result files of the benchmark name an image."""
    return str(PurePosixPath(path).with_suffix(""))


class Block(NamedTuple):
    """What a file says of an image."""

    place: str  # file:line of its path
    path: str
    size: tuple[int, int] | None  # (height, width), where the format has it
    xywh: list[list[float]]
    invalid: list[bool]
    places: list[str]  # file:line of every box


def retinaface_blocks(lines: Iterable[tuple[str, str]]) -> Iterator[Block]:
    """Parse RetinaFace's label.txt, or SCRFD's labelv2.txt.

    A line "# path" opens an image; a line for each face follows, "x y width height" first. Where the line has the size
    as well, "# path width height" (labelv2), the corners "x1 y1 x2 y2" come first. Landmarks are passed over.

    Args:
        lines: ("file:line", text) of those that are not empty.

    Raises:
        AnnotationError: with file, line, expectation and finding.
    """
    block: Block | None = None
    for place, text in lines:
        if text.startswith("#"):
            if block is not None:
                yield block
            words, size = text[1:].split(), None
            if len(words) > 2 and words[-1].isdecimal() and words[-2].isdecimal():
                *words, width, height = words
                size = int(height), int(width)
            path = clean_path(" ".join(words))
            _check_suffix(place, path)
            block = Block(place, path, size, [], [], [])
            continue
        if block is None:
            raise AnnotationError(f'{place}: expected "# path of an image", got {_shorten(text)}')
        row = _floats(text)
        if len(row) not in _RETINAFACE_COLUMNS:
            expected = "x y width height" if block.size is None else "x1 y1 x2 y2"
            counts = " or ".join(map(str, _RETINAFACE_COLUMNS))
            raise AnnotationError(
                f"{place}: expected '{expected}' and landmarks ({counts} numbers), got {_shorten(text)}"
            )
        x, y, *corner = row[:4]
        block.xywh.append([x, y, *corner] if block.size is None else [x, y, corner[0] - x, corner[1] - y])
        block.invalid.append(False)
        block.places.append(place)
    if block is not None:
        yield block


def _own_blocks(lines: "_Lines") -> Iterator[Block]:
    while not lines.at_end:
        place, path = _take_path(lines)
        count = _parse_count(*lines.take(f"the number of boxes of {path}"))
        block = Block(place, path, None, [], [], [])
        for _ in range(count):
            place_of_box, text = lines.take(f"{count} boxes for {path}")
            row = _parse_box(place_of_box, text)
            block.xywh.append(row[:4])
            block.invalid.append(len(row) > _INVALID and row[_INVALID] == 1)
            block.places.append(place_of_box)
        if count == 0:
            lines.skip_row_of_zeros()
        yield block


def _record(root: ImageRoot, block: Block, boxes: np.ndarray, ignore: np.ndarray) -> ImageRecord:
    file_name, path = root.join(block.path, block.place), str(root.relative(block.path, block.place))
    classes = np.zeros(len(boxes), dtype=np.int64)
    height, width = block.size or (None, None)
    return ImageRecord(file_name, image_id(path), height, width, boxes, classes, ignore)


class _Lines:
    """The stripped, non-empty lines of a text file, each with its place ("file:line")."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._file = os.fspath(file)
        with open_regular(self._file) as stream:
            content = stream.read()
        try:
            if content.startswith(_GZIP_MAGIC):
                content = _unpack(content)
            text = decode_text(content)
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

    def rest(self) -> Iterator[tuple[str, str]]:
        """(place, text) of the lines that were not taken, which it takes."""
        while not self.at_end:
            yield self.take("a line")

    def begins_with(self, prefix: str) -> bool:
        """Whether the next line does."""
        return not self.at_end and self._lines[self._next][1].startswith(prefix)

    def skip_row_of_zeros(self) -> None:
        """Step over the line of zeros that follows the count 0, if it is there."""
        if not self.at_end and self._lines[self._next][1].split() in (["0"] * count for count in _NUM_COLUMNS):
            self._next += 1


def _unpack(content: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        unpacked = stream.read(_MAX_UNPACKED_BYTES + 1)
    if len(unpacked) > _MAX_UNPACKED_BYTES:
        raise OSError(f"more than {_MAX_UNPACKED_BYTES >> 20} MiB when unpacked")
    return unpacked


def _take_path(lines: _Lines) -> tuple[str, str]:
    """Return (place, path) of the image that the next line names."""
    place, text = lines.take("an image path")
    path = clean_path(text)
    _check_suffix(place, path)
    return place, path


def _check_suffix(place: str, path: str) -> None:
    if PurePosixPath(path).suffix.lower() not in IMAGE_SUFFIXES:
        raise AnnotationError(f"{place}: expected an image path ({', '.join(IMAGE_SUFFIXES)}), got {_shorten(path)}")


def _check_once(path: str, place: str, ids: dict[str, str]) -> None:
    """Refuse an image that came before; ``ids``: image id -> place of those."""
    first = ids.setdefault(image_id(path), place)
    if first != place:
        raise AnnotationError(f"{place}: expected each image once, got {_shorten(path)} again, first at {first}")


def _parse_count(place: str, text: str) -> int:
    if text.endswith(".0"):  # some tools write all numbers as floats
        text = text[:-2]
    # The length limit keeps int() out of reach of absurd digit strings.
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise AnnotationError(f"{place}: expected a number of boxes, got {_shorten(text)}")
    return int(text)


def _parse_box(place: str, text: str) -> list[float]:
    row = _floats(text)
    if len(row) not in _NUM_COLUMNS:
        counts = " or ".join(map(str, reversed(_NUM_COLUMNS)))
        raise AnnotationError(f"{place}: expected {_COLUMNS!r} ({counts} numbers), got {_shorten(text)}")
    if len(row) > _INVALID and row[_INVALID] not in (0, 1):
        raise AnnotationError(f"{place}: expected 0 or 1 for 'invalid', got {row[_INVALID]:g} in {_shorten(text)}")
    return row


def _floats(text: str) -> list[float]:
    """The numbers of a line; none if a word is no number."""
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        return []


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
