"""`pip install .` of a copy of the sources, used from another folder; setup.py itself: tests/ops/test_op_builds.py."""

import os
import shutil
import subprocess
import sys

import pytest

USE = """
import torch, group_sampling
from group_sampling.experiments.claims import paper_values
from group_sampling.ops import extension_status, match_anchors
assert paper_values()["table1"]["fpn"]["all"] == 82.1
box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
assert match_anchors(box, box).labels.tolist() == [1]
status = extension_status()
print(group_sampling.__file__, status.loaded, status.cuda, status.reason, sep="|")
"""


@pytest.fixture
def sources(repository, tmp_path):
    """What an sdist would hold."""
    target = tmp_path / "sources"
    shutil.copytree(repository / "csrc", target / "csrc")
    package = "projects/GroupSampling/group_sampling"
    shutil.copytree(repository / package, target / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, target)
    return target


def install(sources, **environment):
    """Install into a folder of its own; returns the finished process and the folder."""
    site = sources.parent / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--verbose",
        "--target",
        site,
        sources,
    ]
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "GS_BUILD_EXT", "FORCE_CUDA", "GS_SANITIZE", "DEBUG")
    }
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}), site


def use(site, tmp_path):
    """Import the package from ``site`` in another folder; returns (file, loaded, cuda, reason)."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.fixture
def no_compiler(tmp_path):
    """Environment in which neither $CXX nor g++ can be found."""
    return {"CXX": "no-such-compiler", "PATH": str(tmp_path)}


def test_without_a_compiler_the_reference_runs(sources, no_compiler, tmp_path):
    done, site = install(sources, **no_compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing pure Python" in done.stdout + done.stderr
    file, loaded, _, reason = use(site, tmp_path)
    assert file.startswith(str(site)) and loaded == "False" and "not built" in reason


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_the_extension(sources, tmp_path):
    done, site = install(sources, FORCE_CUDA="0", GS_BUILD_EXT="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    _, loaded, cuda, reason = use(site, tmp_path)
    assert (loaded, cuda) == ("True", "False") and "without CUDA" in reason
