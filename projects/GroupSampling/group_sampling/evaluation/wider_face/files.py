"""Prediction files of the WIDER FACE format: a folder per event with a text file per image.

``<event>/<image name without extension>.txt`` holds the image name, the number of detections and one line ``x y w h
score`` for each: top-left corner, width and height in pixels. A data set without events has its files in one folder.
"""

import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...data.fddb import COUNT
from ...detections import Detections
from ...files import open_regular, plain_bytes, safe_relative_path, write_atomically

# Hidden files, which readers skip, control characters, and the empty name.
_UNUSABLE = re.compile(r"(^|/)\.|[\x00-\x1f\x7f]|^$")
_IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|bmp|webp)$", re.IGNORECASE)
# About a million detections in one image; a file beyond it is damaged, or an archive made to exhaust memory.
_MAX_FILE_BYTES = 64 << 20
_MAX_ARCHIVE_BYTES = 4 << 30  # unpacked; a result set of the validation images has some 100 MB
_ARCHIVE_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,  # encrypted member, unknown compression
    ValueError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)


def read_predictions(path: str | os.PathLike, *, images: Container[str] = ()) -> Iterator[tuple[str, Detections]]:
    """Read a result set image by image, in the order of the folder (sorted) or archive.

    Nothing is unpacked to disk. Files without the suffix ``.txt`` and hidden ones (``__MACOSX`` as well) are
    ignored. In an archive, folders above the events do not matter.

    Other projects' files are read as well: without name and number, empty (no detections), with five landmarks after
    the score, with the number as "3.0", in UTF-16 or with a byte order mark.

    Args:
        path: folder with a folder per event, or a ZIP or tar archive (also .gz, .bz2, .xz) of one.
        images: the ids that are expected. A file "<image>.jpg.txt" is then that of <image>, if there is no other.

    Yields:
        The image id, ``<event>/<image name without extension>`` or the name alone, and its detections in float64.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: the archive is damaged or has an unsafe member (absolute path, ``..``, link), a file does not follow
            the format, an image comes twice, or there is no prediction file at all. The message names file and line,
            what was expected and what was found.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or archive of predictions")
    members = _folder_files(path) if path.is_dir() else _archive_files(path)
    seen: dict[str, str] = {}
    for name, content in members:
        source = f"{path}/{name}"
        image_id = "/".join(PurePosixPath(name).parts[-2:]).removesuffix(".txt")
        without_suffix = _IMAGE_SUFFIX.sub("", image_id)
        if image_id not in images and without_suffix in images:
            image_id = without_suffix
        if image_id in seen:
            raise ValueError(f"{source}: expected each image once, got {image_id!r} again, first in {seen[image_id]}")
        seen[image_id] = source
        yield image_id, Detections(*_parse(content, PurePosixPath(name).name.removesuffix(".txt"), source))
    if not seen:
        raise ValueError(f"{path}: expected files <event>/<image>.txt, got none")


def write_predictions(
    root: str | os.PathLike, image_id: str, boxes: ArrayLike, scores: ArrayLike, *, is_stem: bool = False
) -> Path:
    """Write the file of one image, atomically; :func:`read_predictions` and the published evaluations read it.

    Detections are written by descending score, which the common Python evaluation relies on. Numbers have all their
    digits: float32 boxes and scores come back bit for bit.

    Args:
        root: folder of the result set; made when missing.
        image_id: ``<event>/<image name>``, or an image name alone; the extension of an image file is dropped.
        boxes: (k, 4) XYXY in pixels, arrays or CPU tensors; k may be 0.
        scores: (k,).
        is_stem: ``image_id`` has no extension; "a.jpg" is then the stem of "a.jpg.jpg", and keeps its own file.

    Returns:
        Path of the file.

    Raises:
        ValueError: ``image_id`` is not of that form or would leave ``root``, a shape is wrong, a number is not finite,
            or a box is inverted. Nothing is written then.
    """
    relative = safe_relative_path(image_id)
    if relative is None or str(relative) != image_id or len(relative.parts) > 2 or _UNUSABLE.search(image_id):
        raise ValueError(f"image_id: expected [<event>/]<image name>, no leading dot or '\\', got {image_id!r}")
    stem = relative.name if is_stem else _IMAGE_SUFFIX.sub("", relative.name)
    rows = result_rows(image_id, boxes, scores)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    lines = [stem, str(len(rows)), *(" ".join(map(repr, row)) for row in rows.tolist())]
    path = Path(root, relative.with_name(f"{stem}.txt"))
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def result_rows(image_id: str, boxes: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """The lines of a result file: (k, 5) x, y, width, height and score.

    Args:
        boxes: (k, 4) XYXY in pixels, arrays or CPU tensors; k may be 0.
        scores: (k,).

    Raises:
        ValueError: a shape is wrong, a number is not finite, or a box is inverted.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    boxes = boxes if boxes.size else np.empty((0, 4))
    scores = np.asarray(scores, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        shapes = f"{boxes.shape} and {scores.shape}"
        raise ValueError(f"image {image_id!r}: expected boxes (k, 4) and scores (k,), got {shapes}")
    rows = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores])
    bad = ~np.isfinite(rows).all(axis=1) | (rows[:, 2:4] < 0).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"image {image_id!r}: expected finite numbers, x1 <= x2 and y1 <= y2, "
            f"got boxes[{row}] = {boxes[row].tolist()}, scores[{row}] = {scores[row]}"
        )
    return rows


def _parse(content: bytes, stem: str, source: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """XYXY boxes and scores of one prediction file."""
    content = plain_bytes(content)
    lines = content.split(b"\n")
    name = lines[0].decode("utf-8", "replace").strip()
    base = _IMAGE_SUFFIX.sub("", name.replace("\\", "/").rsplit("/", 1)[-1])
    header = 2
    if not content or _numbers(lines[:1]) is not None:  # nothing found, or the rows alone
        header = 0
    elif base != _IMAGE_SUFFIX.sub("", stem):
        raise ValueError(f"{source}:1: expected the image name {stem!r}, got {name!r:.80}")
    elif len(lines) < 2 or not COUNT.fullmatch(lines[1]):
        found = _quote(lines[1]) if len(lines) > 1 else "the end of the file"
        raise ValueError(f"{source}:2: expected the number of detections, got {found}")
    elif int(float(lines[1])) != len(lines) - 2:
        count = int(float(lines[1]))
        raise ValueError(f"{source}:2: expected as many lines as it says, {count}, got {len(lines) - 2}")
    rows = lines[header:] if content else []
    table = _numbers(rows)
    if table is None:
        row = next(
            row for row in range(header, len(lines)) if _numbers(lines[row : row + 1], len(rows[0].split())) is None
        )
        expected = "'x y w h score', finite numbers with w and h not negative"
        raise ValueError(f"{source}:{row + 1}: expected {expected}, got {_quote(lines[row])}")
    return np.hstack([table[:, :2], table[:, :2] + table[:, 2:4]]), table[:, 4].copy()


def _numbers(rows: list[bytes], columns: int | None = None) -> NDArray[np.float64] | None:
    """(k, 5) numbers of the rows ``x y w h score``, or None when one of them is malformed.

    Args:
        columns: of every row, 5 or with landmarks 15; None: as the first row has them.
    """
    columns = (len(rows[0].split()) if rows else 5) if columns is None else columns
    if columns not in (5, 15):
        return None
    text = b" | ".join(rows)
    words = text.split()  # as many as columns a row, and a bar between rows
    bars = words[columns :: columns + 1]
    if rows and (len(words) != (columns + 1) * len(rows) - 1 or bars.count(b"|") != len(bars)):
        return None
    del words[columns :: columns + 1]
    if b"_" in text:  # float() reads 1_0, no other reader does
        return None
    try:
        table = np.fromiter(map(float, words), dtype=np.float64, count=len(words)).reshape(-1, columns)[:, :5]
    except ValueError:
        return None
    return table if np.isfinite(table).all() and (table[:, 2:4] >= 0).all() else None


def _quote(line: bytes) -> str:
    return repr(line.decode("utf-8", "replace"))[:80]


def _is_prediction(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.endswith(".txt") and not any(part[0] == "." or part == "__MACOSX" for part in parts)


def _folder_files(root: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted([*root.glob("*.txt"), *root.glob("*/*.txt")]):
        name = file.relative_to(root).as_posix()
        if _is_prediction(name):
            with open_regular(file) as stream:
                content = stream.read(_MAX_FILE_BYTES + 1)
            _check_size(len(content), f"{root}/{name}")
            yield name, content


def _archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_regular(path) as stream:
        is_zip = stream.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    return _zip_files(path) if is_zip else _tar_files(path)


def _zip_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with _errors_of_archive(path):
        archive = zipfile.ZipFile(path)
    total = 0
    with archive:
        for member in archive.infolist():
            _check_member(path, member.filename, is_link=stat.S_ISLNK(member.external_attr >> 16))
            if _is_prediction(member.filename):
                total = _check_total(path, total + min(member.file_size, _MAX_FILE_BYTES))
                with _errors_of_archive(path), archive.open(member) as stream:
                    content = stream.read(_MAX_FILE_BYTES + 1)
                _check_size(len(content), f"{path}/{member.filename}")
                yield member.filename, content


def _tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as stream:
        with _errors_of_archive(path):
            archive = tarfile.open(fileobj=stream)  # noqa: SIM115 (``stream`` closes the file)
        total = 0
        while True:
            with _errors_of_archive(path):
                member = archive.next()
            if member is None:
                break
            _check_member(path, member.name, is_link=not (member.isfile() or member.isdir()))
            # To step over a member is to unpack it.
            _check_size(member.size, f"{path}/{member.name}")
            total = _check_total(path, total + member.size)
            if member.isfile() and _is_prediction(member.name):
                with _errors_of_archive(path):
                    file = archive.extractfile(member)  # None: a folder
                    content = None if file is None else file.read(_MAX_FILE_BYTES + 1)
                if content is not None:
                    _check_size(len(content), f"{path}/{member.name}")
                    yield member.name, content
        # tarfile takes a damaged header, or the end of a file that was cut off, for the end of the archive.
        with _errors_of_archive(path):
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end mark at byte {archive.offset} of its content")


@contextmanager
def _errors_of_archive(path: Path) -> Iterator[None]:
    try:
        yield
    except _ARCHIVE_ERRORS as error:
        raise ValueError(f"{path}: expected a ZIP or tar archive, cannot read it: {error}") from error


def _check_member(path: Path, name: str, *, is_link: bool) -> None:
    """Refuse what an honest archive of text files never holds, although nothing is unpacked."""
    if is_link or safe_relative_path(name) is None:
        raise ValueError(f"{path}: expected files and folders under relative paths, got the unsafe member {name!r}")


def _check_total(path: Path, size: int) -> int:
    if size > _MAX_ARCHIVE_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_ARCHIVE_BYTES >> 30} GiB of files, got more")
    return size


def _check_size(size: int, source: str) -> None:
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"{source}: expected at most {_MAX_FILE_BYTES >> 20} MiB for one image, got more")
