"""Writing a file so that a reader sees the old content or the new one, never half of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends without an error.

    ``durable`` also outlasts a power failure, at the price of milliseconds for each file.

    Missing parent folders are made. The temporary file lies beside ``path``, hidden and without its suffix, so that no
    reader takes what an interruption leaves behind for a result.
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
