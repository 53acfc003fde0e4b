"""check_gpu.sh without a GPU: what is missing is named, and a stub device takes it up to the first kernel."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import setuptools
import torch

from group_sampling.ops import extension_status

SCRIPT = "projects/GroupSampling/benchmarks/check_gpu.sh"
# Python runs this before anything else: torch claims a GPU, of which only the first real kernel finds out.
STUB = """
import types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
stub = types.SimpleNamespace(name="stub", major=9, minor=0, total_memory=2**36)
torch.cuda.get_device_properties = lambda index: stub
"""


def run(repository, *arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    command = ["bash", str(repository / SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def with_stub(tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB)
    return os.pathsep.join([str(tmp_path / "stub"), *sys.path])


@pytest.fixture
def check_gpu(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "projects/GroupSampling/benchmarks"))
    return importlib.import_module("check_gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_what_is_missing_is_named_before_anything_starts(repository, tmp_path):
    done = run(repository, "--output", tmp_path / "out", "--no-build")
    assert done.returncode == 1
    assert "expected a GPU that torch sees, got none" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "owner, version, message",
    [
        (torch, "2.9.1", "torch >= 2.10, got 2.9.1"),
        (torch.version, None, "torch built for CUDA, got "),
        (setuptools, "70.0", "setuptools >= 77, got 70.0"),
    ],
)
def test_old_or_wrong_parts_are_named(check_gpu, monkeypatch, owner, version, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_gpu.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    assert check_gpu.missing_requirements(build=True) == []
    monkeypatch.setattr(owner, "cuda" if owner is torch.version else "__version__", version)
    (missing,) = check_gpu.missing_requirements(build=True)
    assert missing.startswith(message)


def test_a_toolkit_that_is_missing_is_named(check_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    (missing,) = check_gpu.missing_requirements(build=True)
    assert "CUDA kernels cannot be built" in missing


@pytest.mark.slow
@pytest.mark.skipif(not extension_status().loaded, reason="the extension is not built")
def test_with_a_stub_device_every_step_reports(repository, tmp_path):
    """A step that fails does not keep the others from running, and the report holds all of them."""
    (tmp_path / "bin").mkdir()
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\nexit 3\n")
    sanitizer.chmod(0o755)
    environment = {
        "PYTHONPATH": with_stub(tmp_path),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    only = ["--only", "equality", "figures", "memcheck", "racecheck", "initcheck", "synccheck"]
    done = run(repository, "--output", tmp_path / "out", "--no-build", *only, **environment)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "out" / "check_gpu.json").read_text())
    assert report["surroundings"]["gpu"] == "stub" and report["surroundings"]["torch"] == torch.__version__
    assert [step["name"] for step in report["steps"]] == only[1:]
    assert {step["status"] for step in report["steps"]} == {"failed"}
    assert "exit code 3" in report["steps"][2]["reason"]
    equality = "\n".join(report["steps"][0]["tail"])
    assert "no CUDA kernels" in equality or "NVIDIA" in equality or "CUDA" in equality, equality
    assert "| equality | failed" in done.stdout and "| n; m | images | N |" in done.stdout


def test_the_tests_to_run_exist(repository, check_gpu):
    assert all((repository / path).exists() for path in check_gpu.TESTS)


def test_a_step_ends_at_its_limit(check_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "DEFAULT_MINUTES", 1 / 60)
    # The shell's child holds the output open: the limit has to end it as well.
    step = {"name": "endless", "commands": [["sh", "-c", "sleep 600 & sleep 600"]], "environment": dict(os.environ)}
    result = check_gpu.run_step(step, tmp_path)
    assert result["status"] == "timed out" and result["seconds"] < 60
    skipped = check_gpu.run_step({**step, "skipped": "not installed: pytest"}, tmp_path)
    assert (skipped["status"], skipped["reason"]) == ("skipped", "not installed: pytest")


def test_an_unknown_step_is_named(check_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_gpu.main(["--output", str(tmp_path / "out"), "--no-build", "--only", "memchek"]) == 1
    assert "expected steps among equality, figures" in capsys.readouterr().err
