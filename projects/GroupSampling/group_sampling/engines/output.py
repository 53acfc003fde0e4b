"""``OUTPUT_DIR`` of a run: one run at a time, and nothing that a killed one left half done."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import ConfigError

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not noticed
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # see files.atomic_file


@contextmanager
def own_output(folder: str) -> Iterator[None]:
    """Make ``folder`` this run's until the block ends; the end of the process, however it comes, ends it as well.

    Temporary files of killed runs are deleted, and a line of ``metrics.json`` that one of them left unfinished is cut.

    Raises:
        ConfigError: another process, which the message names, runs in the folder, or it cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"OUTPUT_DIR: expected a folder that can be written to, got {folder!r}: {reason}") from error
    with lock:
        if _HAS_LOCKS:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                raise ConfigError(
                    f"OUTPUT_DIR {folder!r}: {owner} runs in it; wait for its end, or give this run another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        _clean(path)
        yield


def _clean(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            Path(parent, name).unlink(missing_ok=True)
    metrics = folder / "metrics.json"
    if not metrics.exists():
        return
    with metrics.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
