"""Files: written so that a reader sees the old content or the new one, and paths that stay in their folder."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends without an error.

    With ``durable`` the content also survives a power failure; that costs milliseconds per file.

    Missing parent folders are made. The temporary file is hidden and has another suffix, so that no reader mistakes
    what an interruption leaves behind for a result.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a whole file through :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write ``content`` as JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a Matplotlib figure, atomically; the suffix of ``path`` gives the format (PNG without one)."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or "png")
    write_atomically(path, content.getvalue())


def safe_relative_path(path: str) -> PurePosixPath | None:
    """``path`` if, joined to a folder, it stays below that folder on every system; else None.

    Refused are absolute paths, ".." parts, backslashes and NUL characters. Links are not followed.
    """
    relative = PurePosixPath(path)
    if relative.is_absolute() or os.path.isabs(path) or ".." in relative.parts or "\\" in path or "\0" in path:
        return None
    return relative
