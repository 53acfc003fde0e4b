"""Timing a part of the training step without slowing it down."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_PENDING = 64  # measurements that the device has not finished; older ones are given up


class PartTimer:
    """Seconds that a part of every iteration takes on its device. The host never waits for a GPU.

    On a GPU the part lies between two events of the current stream, and :attr:`seconds` is that of the last part that
    the GPU has finished: of an earlier iteration, while it lags behind the host. A copy starts without measurements.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MAX_PENDING)
        self._seconds: float | None = None

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Measure what runs on ``device`` within the ``with`` block."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds = time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self._pending.append((begin, end))

    @property
    def seconds(self) -> float | None:
        """Of the last measurement that is complete; None before there is one."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._seconds = begin.elapsed_time(end) / 1e3
        return self._seconds

    def __reduce__(self):
        return type(self), ()  # events cannot be copied
