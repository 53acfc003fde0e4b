"""PartTimer: the CPU's clock, and on a GPU two events that nobody waits for."""

import copy

import pytest
import torch

from group_sampling import timing
from group_sampling.timing import PartTimer

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the CPU's clock shows next."""
    seconds = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds.pop(0))
    return seconds


def test_cpu(clock):
    timer = PartTimer()
    assert timer.seconds is None
    for times, want in (([10.0, 12.0], 2.0), ([20.0, 20.5], 0.5)):
        clock[:] = times
        with timer.measure(CPU):
            pass
        assert timer.seconds == want


def test_a_part_that_fails_leaves_the_last_measurement(clock):
    timer = PartTimer()
    clock[:] = [1.0, 2.0, 5.0, 9.0]
    with timer.measure(CPU):
        pass
    with pytest.raises(RuntimeError, match="part"), timer.measure(CPU):
        raise RuntimeError("part")
    assert timer.seconds == 1.0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that finishes the events listed in ``finished``; each event takes a millisecond more than the last."""

    class Event:
        made, finished = [], set()

        def __init__(self, enable_timing):
            assert enable_timing
            self.number = len(self.made)
            self.made.append(self)

        def record(self, stream):
            assert stream == "stream of cuda:1"

        def query(self):
            return self.number in self.finished

        def elapsed_time(self, end):
            assert end.number == self.number + 1 and end.query()
            return float(end.number)

        def synchronize(self):
            raise AssertionError("the timer waited for the GPU")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return Event


def test_gpu_is_read_when_it_is_ready(gpu):
    timer, device = PartTimer(), torch.device("cuda:1")
    for _ in range(3):
        with timer.measure(device):
            pass
    assert timer.seconds is None
    gpu.finished |= {0, 1, 2}
    assert timer.seconds == 1e-3
    gpu.finished |= {3, 4, 5}
    assert timer.seconds == 5e-3
    assert timer.seconds == 5e-3


def test_a_gpu_that_never_answers_costs_no_memory(gpu):
    timer = PartTimer()
    for _ in range(3 * timing.MAX_PENDING):
        with timer.measure(torch.device("cuda:1")):
            pass
    assert len(timer._pending) == timing.MAX_PENDING
    assert timer.seconds is None


def test_a_copy_starts_anew(gpu):
    timer = PartTimer()
    with timer.measure(torch.device("cuda:1")):
        pass
    assert copy.deepcopy(timer).seconds is None
