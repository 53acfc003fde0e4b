"""SIGTERM and SIGINT: a training ends after the step at hand, with a checkpoint, and everything else at once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # commands that need no torch stop in the same way
    from fvcore.common.checkpoint import Checkpointer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal ends this process with the exit code that shells give it: 143 for SIGTERM, 130 for SIGINT.

    Attributes:
        note: what the user can do next, or "".
    """

    def __init__(self, number: int, note: str = ""):
        super().__init__(128 + number)
        self.number, self.note = number, note

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}" + (f"; {self.note}" if self.note else "")


class _Handler:
    def __init__(self) -> None:
        self.pending = 0  # the number of the first signal, 0: none
        self._since = 0.0  # when it came
        self._is_deferred = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, :data:`SIGNALS` raise :class:`Stopped`. Outside of the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.pending = 0
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            self.pending = 0
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal only sets ``pending``: who runs the block ends it in time; a later one raises."""
        with self._set_deferred(True):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, inside of :meth:`deferred`, a signal raises again, and so does one that is pending."""
        with self._set_deferred(False):
            if self.pending:
                raise Stopped(self.pending)
            yield

    @contextmanager
    def _set_deferred(self, value: bool) -> Iterator[None]:
        previous, self._is_deferred = self._is_deferred, value
        try:
            yield
        finally:
            self._is_deferred = previous

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A terminal sends SIGINT to the launcher and its processes, and the launcher passes it on: the second within
        # moments is not a second wish.
        is_repeated = self.pending and time.monotonic() - self._since > 2
        if not self.pending:
            self.pending, self._since = number, time.monotonic()
        if is_repeated or not self._is_deferred:
            raise Stopped(number)


handler = _Handler()  # a process has one


def save_and_stop(checkpointer: "Checkpointer", iteration: int, number: int) -> NoReturn:
    """End a training after ``iteration`` because of a signal, in every process of it."""
    name = f"model_{iteration:07d}"
    checkpointer.save(name, iteration=iteration)
    raise Stopped(number, f"--resume continues from {name}.pth")
