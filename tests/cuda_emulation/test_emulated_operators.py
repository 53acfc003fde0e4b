"""The operators' tests, unchanged, on the emulated CUDA kernels: in a process where those are the CPU's kernels."""

import os
import re
import subprocess
import sys

import pytest

FILES = ("test_op_iou.py", "test_op_match.py", "test_op_sample.py", "test_op_errors.py")
# Left out: what no kernel takes part in, and what is about the CPU kernels' threads.
LEFT_OUT = "not awkward and not number_of_threads"


def run(repository, selection, max_examples, *files):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GS_MAX_EXAMPLES": str(max_examples)}
    options = ["-q", "--emulate-cuda", "-m", selection, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/ops/{name}" for name in files)]
    done = subprocess.run(
        [*command, "-k", LEFT_OUT if selection == "slow" else f"{LEFT_OUT} and not two_thousand"],
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    launches = re.search(r"emulation : (\d+) launches of (\d+) CUDA kernels", done.stdout)
    return passed, *map(int, launches.groups())


def test_the_operators_tests_pass(repository):
    """Five tests with 50 scenes each, and all those without."""
    passed, launches, kernels = run(repository, "not slow", 50, *FILES)
    assert passed >= 100 and launches >= 2000 and kernels >= 11


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["test_op_iou.py", "test_op_match.py", "test_op_sample.py"])
def test_the_operators_slow_tests_pass(repository, name):
    """Up to 500 scenes a test, seven tests."""
    passed, launches, _ = run(repository, "slow", 500, name)
    assert passed >= 1 and launches >= 1000
