"""Files: read without waiting, written so that a reader sees the old content or the new one; paths that stay inside."""

import codecs
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .errors import UserError

_BYTE_ORDER_MARKS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes.

    Raises:
        OSError: it cannot be opened, or is no regular file: a FIFO or a device might never begin, or never end.
    """
    mode = os.stat(path).st_mode  # before it is opened: to open a FIFO without a writer would wait
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "expected a regular file, got a FIFO, a socket or a device", os.fspath(path))
    return open(path, "rb")


def decode_text(content: bytes) -> str:
    """Text of a file: UTF-8, or what its byte order mark says. The end mark of DOS (Ctrl-Z) is left out.

    Raises:
        UnicodeDecodeError: it is no such text.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8-sig")
    return content.decode(encoding).rstrip("\x1a")


def plain_bytes(content: bytes) -> bytes:
    """Text in UTF-8 without byte order mark, DOS end mark and blanks at the end; what is no text stays as it is."""
    with suppress(UnicodeDecodeError):
        content = decode_text(content.rstrip(b"\x1a")).encode()
    return content.rstrip()


@contextmanager
def atomic_file(path: str | os.PathLike, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends without an error.

    With ``durable`` the content also survives a power failure; that costs milliseconds per file.

    Missing parent folders are made. The temporary file is hidden and has another suffix, so that no reader mistakes
    what an interruption leaves behind for a result.
    """
    path = Path(path)
    if path.is_dir():  # said before anything is made
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    raw: _RawFile | None = None
    try:
        raw = _RawFile(temporary, "wb")
        with io.BufferedWriter(raw) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        cause = error if raw is None else raw.error
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
        raise
    finally:
        with suppress(OSError):  # there is nothing left of it, or an error that says more is on its way
            temporary.unlink()


class _RawFile(io.FileIO):
    """Keeps the error of a write: the library that writes may put it into words of its own, as ``torch.save`` does."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a whole file through :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write ``content`` as JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it holds something else; names the file.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{os.fspath(path)}: expected JSON, got: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{os.fspath(path)}: expected a JSON object, got {json.dumps(content)[:80]}")
    return content


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a Matplotlib figure, atomically; the suffix of ``path`` gives the format (PNG without one).

    Its texts are taken literally, names with "$" among them, which are formulas to Matplotlib; numbers of the axes not.
    """
    kind, known = Path(path).suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(f"{path}: expected a name that ends with one of {', '.join(sorted(known))}, got .{kind}")
    _take_texts_literally(figure)
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    write_atomically(path, content.getvalue())


def _take_texts_literally(figure: Any) -> None:
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    numbers = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):  # writes 10 to a power as a formula
                for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                    numbers |= {tick.label1, tick.label2}
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)


def safe_relative_path(path: str) -> PurePosixPath | None:
    """``path`` if, joined to a folder, it stays below that folder on every system; else None.

    Refused are absolute paths, ".." parts, backslashes and NUL characters. Links are not followed.
    """
    relative = PurePosixPath(path)
    if relative.is_absolute() or os.path.isabs(path) or ".." in relative.parts or "\\" in path or "\0" in path:
        return None
    return relative
