"""The operators' tests, unchanged, on the emulated CUDA kernels: in a process where those are the CPU's kernels."""

import os
import re
import subprocess
import sys

import pytest

FILES = ("test_op_iou.py", "test_op_match.py", "test_op_sample.py", "test_op_errors.py")
# No kernel takes part in the first; the other is about the CPU kernels' threads.
ELSEWHERE = "not awkward and not number_of_threads"
LONG = "not two_thousand and not windows_hold and not a_bad_face"


def run(repository, files, max_examples, *selection):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GS_MAX_EXAMPLES": str(max_examples)}
    options = ["-q", "--emulate-cuda", "-p", "no:cacheprovider", *selection]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/ops/{name}" for name in files)]
    done = subprocess.run(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    launches = re.search(r"emulation : (\d+) launches of (\d+) CUDA kernels", done.stdout)
    return passed, *map(int, launches.groups())


def test_the_operators_tests_pass(repository):
    """Five properties with 40 scenes each, and the tests of single cases."""
    passed, launches, kernels = run(repository, FILES, 40, "-k", f"{ELSEWHERE} and {LONG}")
    assert passed >= 80 and launches >= 1500 and kernels >= 11


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES[:3])
def test_all_of_the_operators_tests_pass(repository, name):
    """Up to 500 scenes for each of eleven properties, six of larger scenes."""
    passed, launches, _ = run(repository, [name], 500, "-m", "slow or not slow", "-k", ELSEWHERE)
    assert passed >= 8 and launches >= 1000
