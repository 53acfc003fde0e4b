"""What a user can cause and mend: one message on the last line of every command, in place of a traceback.

Exit codes: 0, done; 1, an error, which the last line of stderr tells; 2, the command line is wrong (argparse's); 130
and 143, stopped by SIGINT (Ctrl-C) and SIGTERM. A command with others says so in its help.
"""

import argparse
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from . import stop

# Of a DataLoader's worker: its error again, with the traceback in the message.
_OF_WORKER = re.compile(r"^Caught \w+ in .*\nOriginal Traceback.*^[\w.]+: (.*)", re.DOTALL | re.MULTILINE)
_PACKAGE = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """An input that cannot be used; the message says where, what was expected, what was found, and what to do."""


def is_expected(error: BaseException) -> bool:
    """Whether the message of ``error`` is for the user, who can do something about it.

    It is of :class:`UserError` and of what says that a file, the memory, a package or the training is at fault. A
    ``ValueError`` is if this project raised it; one that comes out of another package is a fault of this one.
    """
    if isinstance(error, UserError | OSError | ImportError | MemoryError | FloatingPointError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which not every command imports
        return True
    if not isinstance(error, ValueError):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and os.path.abspath(frames[-1][0].f_code.co_filename).startswith(_PACKAGE + os.sep)


def describe(error: BaseException) -> str:
    """The message of ``error`` for a user; the class is named where the message does not speak for itself."""
    text = str(error).strip()
    of_worker = _OF_WORKER.match(text)
    if of_worker:
        text = of_worker[1]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, UserError | ValueError | OSError | ModuleNotFoundError | FloatingPointError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """``--debug``, for :func:`exit_on_error`."""
    parser.add_argument("--debug", action="store_true", help="let an error end in its traceback")


@contextmanager
def exit_on_error(program: str, args: argparse.Namespace, *, code: int = 1, after_stop: str = "") -> Iterator[None]:
    """End the process with one message on the last line of stderr when the block raises.

    Of an error that is a fault of the program, a file keeps the traceback.

    Args:
        program: name of the command.
        args: with ``debug``: then the error passes.
        code: exit code after an error.
        after_stop: what the user can do after SIGINT or SIGTERM, unless the block knows better.
    """
    try:
        with stop.handler.installed():
            yield
    except stop.Stopped as stopped:
        stopped.note = stopped.note or after_stop
        print(f"{program}: {stopped}", file=sys.stderr)
        raise
    except Exception as error:
        if args.debug:
            raise
        message = f"{program}: error: {describe(error)}"
        if not is_expected(error):
            message = message.split("\n")[0]
            with tempfile.NamedTemporaryFile("w", prefix=f"{program}-", suffix=".log", delete=False) as file:
                traceback.print_exc(file=file)
            message += f" (not expected: {file.name} has the traceback; --debug shows it)"
        if code == 1:
            sys.exit(message)
        print(message, file=sys.stderr)
        sys.exit(code)
