"""``OUTPUT_DIR`` of a run: one run at a time, and nothing that a killed one left half done."""

import errno
import functools
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypeGuard

from .. import distributed
from ..config import ConfigError
from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not noticed
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

# A disk that is full or fails, not a name that is wrong.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OWNER = re.compile(r"process (\d{1,9}) on (.*)")
_GONE_SECONDS = 20.0
_VISIBLE_SECONDS = 5.0  # network file systems remember for a while that a file is not there
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
            _wait_for(lock, folder)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        _clean(path)
        yield


def _wait_for(lock: TextIO, folder: str) -> None:
    """Take the lock. Workers of a loader may hold that of a killed run for the seconds until they notice."""
    limit = time.monotonic() + _GONE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            if time.monotonic() > limit or not _is_gone(owner):
                raise ConfigError(
                    f"OUTPUT_DIR {folder!r}: {owner or 'another process'} runs in it; wait for its end, or give this "
                    "run another folder"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
        else:
            return


def _is_gone(owner: str) -> bool:
    """Whether the process that the lock names was one of this machine and has ended."""
    found = _OWNER.fullmatch(owner)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


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


def check_shared(folder: str, *, resume: bool) -> None:
    """Find out whether all processes of a run see the same folder; they call it together.

    Without that a run can train and evaluate. It cannot be continued: the main process alone has the checkpoints.

    Raises:
        ConfigError: in every process; they do not, and ``resume``. Else it is said.
    """
    if distributed.world_size() == 1:
        return
    # A name that the next run cleans up, should this one be killed now.
    marker = Path(folder, f".machine-{distributed.broadcast(secrets.token_hex(8))}.0.tmp")
    if distributed.rank() == 0:
        marker.touch()
    distributed.broadcast(None)  # the marker is there
    limit = time.monotonic() + _VISIBLE_SECONDS
    while not marker.exists() and time.monotonic() < limit:
        time.sleep(0.1)
    views = distributed.all_gather((socket.gethostname(), os.path.abspath(folder), marker.exists()))
    if distributed.rank() == 0:
        marker.unlink()
    blind = sorted({f"{path} on {host}" for host, path, sees in views if not sees})
    if not blind:
        return
    host, path, _ = views[0]
    what = f"OUTPUT_DIR: expected a folder that all machines share, {path} on {host}, got another one: {blind[0]}"
    if resume:
        raise ConfigError(f"{what}; --resume needs the checkpoints and finished images in every process")
    if distributed.rank() == 0:
        consequence = f"Checkpoints and results will be on {host} alone, and --resume needs them everywhere"
        print(f"{what}. {consequence}", file=sys.stderr, flush=True)


@contextmanager
def saying_what_is_safe(folder: str) -> Iterator[None]:
    """Within, an error of the disk ends the run, and tells from where ``--resume`` goes on.

    Also that of a log, for which ``logging`` prints a traceback for every line and goes on.

    Raises:
        UserError: in its place.
    """
    handle, hook = logging.Handler.handleError, threading.excepthook
    logging.Handler.handleError = functools.partialmethod(_handle_log_error, handle)  # type: ignore[assignment]
    threading.excepthook = functools.partial(_handle_thread_error, hook)
    try:
        yield
    except OSError as error:
        if not _is_of_disk(error):
            raise
        where = folder if error.filename is None else os.fsdecode(error.filename)
        _give_up_logs(folder)
        raise UserError(f"{where}: {os.strerror(error.errno or 0)}. {_what_is_safe(folder)}") from error
    finally:
        logging.Handler.handleError = handle  # type: ignore[method-assign]
        threading.excepthook = hook


def _is_of_disk(error: BaseException | None) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def _handle_log_error(handler: logging.Handler, handle: Callable, entry: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if _is_of_disk(error):
        raise error
    handle(handler, entry)


def _handle_thread_error(hook: Callable, error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, and raises its error again in the next call."""
    if not _is_of_disk(error.exc_value):
        hook(error)


def _give_up_logs(folder: str) -> None:
    """Close the logs in a folder: else Python fails to write the rest of them at its exit, and says so last."""
    for log in [logging.getLogger(name) for name in logging.root.manager.loggerDict]:
        for handler in list(log.handlers):
            stream = getattr(handler, "stream", None)
            path = os.path.abspath(str(getattr(stream, "name", "")))
            if stream is not None and os.path.isfile(path) and os.path.samefile(os.path.dirname(path), folder):
                log.removeHandler(handler)
                with suppress(OSError):
                    stream.close()


def _what_is_safe(folder: str) -> str:
    try:
        name = Path(folder, "last_checkpoint").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return f"{folder} has no checkpoint yet: start again where there is space"
    return f"{Path(folder, name)} is whole: make space, and --resume continues from it"
