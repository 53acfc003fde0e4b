"""A training does not grow, however long it runs and however its images change.

GS_STEPS=2000 python -m pytest -m slow tests/engines/test_memory.py takes as many steps.
"""

import os
from pathlib import Path

import pytest
from test_output import ENGINES, engine_main
from tv_cases import arguments

from group_sampling.engines.step import FiniteLossGuard

STEPS = int(os.environ.get("GS_STEPS", "700"))
WARM_UP = 300  # allocators and caches of kernels have seen the sizes by then
BOUND = 24 << 20  # bytes; of 2,000 steps less than 17 kB a step


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_flat_over_steps_of_changing_sizes(tmp_path, monkeypatch, engine):
    """The least resident memory of every hundred steps: what stays, not what a large image takes for a moment."""
    sizes = []
    watch = FiniteLossGuard.watch

    def measure(self, iteration, losses, files):
        sizes.append(resident())
        return watch(self, iteration, losses, files)

    monkeypatch.setattr(FiniteLossGuard, "watch", measure)
    opts = ["SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", STEPS, "DATASETS.TEST", "()"]
    opts += ["SOLVER.IMS_PER_BATCH", 1, "SOLVER.BASE_LR", 1e-4, "INPUT.CROP.SIZE", "[80, 96]"]
    opts += ["INPUT.SCALE_JITTER", str([0.25 + 0.05 * i for i in range(12)])]
    engine_main(engine)(arguments(tmp_path, *opts))
    assert len(sizes) == STEPS
    least = [min(sizes[start : start + 100]) for start in range(WARM_UP, STEPS, 100)]
    growth = least[-1] - least[0]
    print(f"{engine}: {growth / 2**20:.1f} MiB in {STEPS - WARM_UP} steps")
    assert growth < BOUND, [value >> 20 for value in least]
