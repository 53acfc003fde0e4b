"""The image files of a data set before they are needed: their headers, read by many threads, and remembered."""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ..errors import UserError
from ..files import read_json, write_json
from .images import Header, check_size, read_header
from .records import ImageRecord, UnreadableImageError, far_outside, fit_exchanged_sides
from .synthetic import is_address

logger = logging.getLogger(__name__)

_NUM_THREADS = 16  # they wait for the disk or the network more than for the processor
_CHUNK = 64  # files of a thread's turn
_PROGRESS_SECONDS = 5.0
_VERSION = 1  # of the file of a HeaderCache


@dataclass
class ImageCheck:
    """What was found in the image files of a data set.

    Attributes:
        num_images: all of them, also those without a file.
        unreadable: file -> reason.
        outside: file -> number of boxes that are outside the image, or nearly. Boxes of images whose size the
            annotations have are not among them: the parser has dropped those.
        exchanged: files whose boxes fit the image in its other orientation alone.
    """

    num_images: int
    unreadable: dict[str, str] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    exchanged: list[str] = field(default_factory=list)


class HeaderCache:
    """Headers of image files, kept in a JSON file. Each holds as long as the image has the same size and time.

    Args:
        path: of the JSON file. One that cannot be used is started anew.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._known: dict[str, Any] = {}  # file -> bytes, time of the last change in ns, and the header
        self._used: dict[str, list[int]] = {}
        try:
            content = read_json(path)
        except FileNotFoundError:
            return
        except (UserError, OSError) as error:
            logger.warning("the headers of all images are read again: %s", error)
            return
        if content.get("version") == _VERSION and isinstance(content.get("files"), dict):
            self._known = content["files"]

    def read(self, file: str) -> Header:
        """The header of an image file; threads may call it at the same time.

        Raises:
            UnreadableImageError: it cannot be read.
        """
        path = os.path.abspath(file)
        try:
            state = os.stat(path)
        except (OSError, ValueError):  # ValueError: a NUL character
            return read_header(file)  # says what is wrong
        key = [state.st_size, state.st_mtime_ns]
        entry = self._known.get(path)
        if _is_entry(entry) and entry[:2] == key:
            height, width, is_turned = entry[2:]
            header = Header(height, width, bool(is_turned))
        else:
            header = read_header(file)
        self._used[path] = [*key, header.height, header.width, int(header.is_turned)]
        return header

    def save(self) -> None:
        """Write the headers that were asked for, if they are not those of the file."""
        if self._used != self._known:
            write_json(self._path, {"version": _VERSION, "files": self._used}, indent=None)


def check_images(name: str, records: Sequence[ImageRecord], cache: HeaderCache) -> ImageCheck:
    """Read the header of every image file: format, pixels that can be read, size as annotated, boxes inside.

    Pixels are not read, so a file that is cut short passes. A line in the log tells the progress every few seconds.

    Args:
        name: of the data set.
    """
    found = ImageCheck(len(records))
    files = [record for record in records if not is_address(record.file_name)]
    last_report, done = time.monotonic(), 0
    threads = ThreadPoolExecutor(_NUM_THREADS)
    try:
        chunks = (files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK))
        for headers in threads.map(lambda chunk: [_read(record, cache) for record in chunk], chunks):
            for record, header in zip(files[done:], headers):
                _judge(record, header, found)
            done += len(headers)
            if time.monotonic() - last_report > _PROGRESS_SECONDS:
                last_report = time.monotonic()
                logger.info("data set %s: checked %s of %s images", name, f"{done:,}", f"{len(files):,}")
    finally:
        threads.shutdown(cancel_futures=True)  # after a signal nobody waits for the rest
    return found


def _read(record: ImageRecord, cache: HeaderCache) -> Header | str:
    """Of an image file: its header, or the reason why it cannot be read."""
    try:
        header = cache.read(record.file_name)
        check_size(record, *header.size(record.is_raw))
    except UnreadableImageError as error:
        return error.reason
    return header


def _judge(record: ImageRecord, header: Header | str, found: ImageCheck) -> None:
    if isinstance(header, str):
        found.unreadable[record.file_name] = header
        return
    height, width = header.size(record.is_raw)
    num_outside = int(far_outside(record.boxes, height, width).sum())
    if num_outside:
        found.outside[record.file_name] = num_outside
    if fit_exchanged_sides(record.boxes, height, width):
        found.exchanged.append(record.file_name)


def _is_entry(entry: Any) -> TypeGuard[list[int]]:
    return isinstance(entry, list) and len(entry) == 5 and all(type(number) is int for number in entry)
