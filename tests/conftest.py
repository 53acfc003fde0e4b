"""What every test needs, and the closing summary that says what a run covered and what it could not."""

import importlib.util
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parents[1]
# Real annotations, photographs and published results, which are not ours to ship.
TEST_DATA = REPOSITORY / os.environ.get("GS_TEST_DATA", "../shared/data")
NO_TEST_DATA = f"no real data in {TEST_DATA}: set GS_TEST_DATA to its folder"

EMULATED_KERNELS = pytest.StashKey[dict]()  # what ran, with --emulate-cuda

# No deadline: a busy machine is not a failure. derandomize: a red run is red again.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
# tests/mutation/run.py runs a test hundreds of times.
hypothesis.settings.register_profile(
    "mutants", hypothesis.settings.get_profile("default"), max_examples=10, phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("default")


class ReferenceData(NamedTuple):
    """Annotations and results in the data sets' own formats, and what is known of them."""

    folder: Path
    numbers: dict  # counts and rates, see tests/tiny_data/make.py


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-cuda", action="store_true", help="operators on CPU tensors run the CUDA kernels (cuda_emulation/)"
    )


@pytest.fixture(scope="session", autouse=True)
def _emulated_cuda(request):
    """With --emulate-cuda, every test of the run meets the emulated kernels."""
    if not request.config.getoption("--emulate-cuda"):
        yield
        return
    from cuda_emulation.emulation import Emulation, build

    with Emulation(build()).operators() as emulation:
        yield
        request.config.stash[EMULATED_KERNELS] = emulation.counts()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data, for what only real data can show; a test that asks for it is skipped without."""
    if not TEST_DATA.is_dir():
        pytest.skip(NO_TEST_DATA)
    return TEST_DATA


@pytest.fixture(scope="session", params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def reference_data(request) -> ReferenceData:
    """A small set of our own making, which is always there, and the real data sets: slow, skipped where absent."""
    tests = REPOSITORY / "tests"
    if request.param == "tiny":
        folder, numbers = tests / "tiny_data", tests / "tiny_data/numbers.json"
    else:
        folder, numbers = request.getfixturevalue("shared_data"), tests / "real_numbers.json"
    return ReferenceData(folder, json.loads(numbers.read_text()))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(autouse=True)
def _restore_generators():
    """A test that seeds a global generator must not change what the next one draws."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or os.environ.get("GS_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible"))


def pytest_terminal_summary(terminalreporter, config):
    from group_sampling.ops import extension_status

    status = extension_status()
    has_detectron2 = importlib.util.find_spec("detectron2") is not None
    write = terminalreporter.write_line
    terminalreporter.section("what this run covered")
    has_gpu, has_data = torch.cuda.is_available(), TEST_DATA.is_dir()
    write(f"engines   : torchvision{', detectron2' if has_detectron2 else '; Detectron2 is not installed (README.md)'}")
    if not status.loaded:
        operators = f"torch reference only; no extension: {status.reason}"
    elif status.cuda:
        operators = "torch reference, C++, CUDA sources compiled"
    else:
        operators = f"torch reference, C++; no CUDA kernels: {status.reason}"
    write(f"operators : {operators}")
    if kernels := config.stash.get(EMULATED_KERNELS, {}):
        launches = sum(kernel["launches"] for kernel in kernels.values())
        write(f"emulation : {launches} launches of {len(kernels)} CUDA kernels on the CPU")
    write(f"devices   : cpu{', cuda' if has_gpu else '; no GPU is visible, so no CUDA kernel was run'}")
    selection = config.getoption("-m")
    real = "; real data sets only with -m slow" if selection == "not slow" else ", real WIDER FACE and FDDB"
    write(f"data      : synthetic, tiny reference data{real if has_data else f'; {NO_TEST_DATA}'}")
    write(f"selection : {selection or 'all tests'}")
    reasons = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for reason, count in sorted(reasons.items()):
        write(f"skipped   : {count} x {reason}")
