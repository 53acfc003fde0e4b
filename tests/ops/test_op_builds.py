"""setup.py's switches, a real CUDA build, and the CPU kernels under sanitizers."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools
import torch

PACKAGE = "projects/GroupSampling"


@pytest.fixture
def setup_arguments(monkeypatch, repository):
    """Runs setup.py under the given environment; returns what it would pass to setuptools, and its globals."""

    def run(**environment):
        for name in ("GS_BUILD_EXT", "FORCE_CUDA", "GS_SANITIZE", "DEBUG", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        monkeypatch.chdir(repository)
        script = runpy.run_path("setup.py")
        return {**found, "script": script}

    return run


def test_pure_python_on_request(setup_arguments, capsys):
    arguments = setup_arguments(GS_BUILD_EXT="0")
    assert "ext_modules" not in arguments
    assert "group_sampling.ops" in arguments["packages"]
    assert "GS_BUILD_EXT=0" in capsys.readouterr().err


def test_no_compiler_installs_pure_python_with_a_notice(setup_arguments, capsys):
    assert "ext_modules" not in setup_arguments(PATH="/nonexistent", CXX="/nonexistent/c++")
    assert "no C++ compiler found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"GS_BUILD_EXT": "1", "PATH": "/nonexistent", "CXX": "/nonexistent/c++"},
            "GS_BUILD_EXT=1, but .* no C\\+\\+ comp",
        ),
        ({"FORCE_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FORCE_CUDA=1, but CUDA kernels cannot be built: "),
        ({"FORCE_CUDA": "1", "GS_SANITIZE": "1"}, "CPU kernels only"),
        ({"GS_BUILD_EXT": "yes"}, "GS_BUILD_EXT must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_an_error(setup_arguments, environment, message):
    with pytest.raises(SystemExit, match=message):
        setup_arguments(**environment)


def test_cpu_build_by_choice_or_for_want_of_a_toolkit(setup_arguments, capsys):
    for environment in ({"FORCE_CUDA": "0"}, {"CUDA_HOME": "/nonexistent"}):
        (extension,) = setup_arguments(**environment)["ext_modules"]
        assert extension.name == "group_sampling._C"
        assert not any("cuda" in source for source in extension.sources)
        assert "-ffp-contract=off" in extension.extra_compile_args["cxx"]
    assert "building without CUDA kernels" in capsys.readouterr().err


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("has_gpu, force, expected", [(True, "", True), (False, "", False), (False, "1", True)])
def test_cuda_kernels_are_built_for_a_gpu_that_is_there(setup_arguments, monkeypatch, capsys, has_gpu, force, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    (extension,) = setup_arguments(FORCE_CUDA=force)["ext_modules"]
    assert any(source.endswith(".cu") for source in extension.sources) == expected
    if expected:
        architectures = dict(extension.define_macros)["GS_CUDA_ARCHITECTURES"].strip('"')
        assert {"7.5", "8.0", "9.0"} <= set(architectures.removesuffix("+PTX").split(";")) and "+PTX" in architectures
    assert ("torch sees no GPU (FORCE_CUDA=1 builds them all the same" in capsys.readouterr().err) != expected


def test_every_source_is_listed(setup_arguments, repository):
    """A new file under csrc/ that nobody builds is a mistake."""
    script = setup_arguments(GS_BUILD_EXT="0")["script"]
    listed = set(script["CPU_SOURCES"] + script["CUDA_SOURCES"])
    found = {str(p.relative_to(repository)) for s in ("*.cpp", "*.cu") for p in (repository / "csrc").rglob(s)}
    assert listed == found


def build(repository, folder, **environment):
    """The package with a freshly built extension in ``folder``; returns the build's log."""
    shutil.copytree(
        repository / PACKAGE / "group_sampling",
        folder / "group_sampling",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(folder / "temp"),
        "--build-lib",
        str(folder),
    ]
    done = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_sources_compile(repository, tmp_path):
    """For the default architectures. Runs nothing on a GPU: without one, only the registration can be seen."""
    environment = {"FORCE_CUDA": "1", "GS_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": "", "GS_WORKSPACE_GUARD": "1"}
    log = build(repository, tmp_path, **environment)
    assert "warning" not in log.replace("SetuptoolsWarning", ""), log[-5000:]
    for flag in ("arch=compute_75,code=sm_75", "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"):
        assert flag in log
    assert re.search(r"code=compute_\d+", log) and "--fmad=false" in log and "-DGS_WORKSPACE_GUARD" in log
    program = """
import torch
from group_sampling.ops import extension_status
status = extension_status()
assert status.loaded and status.cuda and status.build_info["cuda"] == torch.version.cuda, status
for name in ("pairwise_iou", "match_anchors", "match_anchor_grid", "sample_groups", "assign_and_sample"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"group_sampling::{name}", "CUDA"), name
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


# Most registers of a kernel's thread, and bytes of a block's shared memory: two blocks of 256 threads that match tiles,
# or one of 512 that draw, fit the 65,536 registers of any multiprocessor, and four blocks the 64 KB of shared memory of
# sm_75. Parameters fit the 4 KB that any driver takes.
MAX_REGISTERS = {
    "tile_kernel": 112,
    "dense_kernel": 72,
    "draw_kernel": 72,
    "prepare_kernel": 88,
    "iou_kernel": 64,
    "": 64,
}
MAX_SHARED_BYTES, MAX_PARAMETER_BYTES = 16384, 4096


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ["75", "80", "90", "100"])
def test_device_code(setup_arguments, repository, tmp_path, architecture):
    """What nvcc makes of the kernels: no fused multiply-add, no spills, bounded resources, boxes in vector loads."""
    script = setup_arguments(GS_BUILD_EXT="0")["script"]
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{architecture}" not in listed:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    kernels = {}
    for source in (s for s in script["CUDA_SOURCES"] if s.endswith(".cu")):
        ptx = tmp_path / "kernels.ptx"
        flags = ["-std=c++20", "--fmad=false", "-O3", "-DNDEBUG", f"-arch=compute_{architecture}"]
        subprocess.run(["nvcc", *flags, "-ptx", "-o", ptx, repository / source], check=True)
        text = ptx.read_text()
        assert not re.search(r"\b(fma|mad)\.[a-z.]*f(32|64)", text), source
        command = ["ptxas", "-v", "-O3", f"-arch=sm_{architecture}", "-o", tmp_path / "kernels.cubin", ptx]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        entries = re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?Used [^\n]*)", log, re.DOTALL)
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?\n\})", text, re.DOTALL))
        assert len(entries) == len(bodies) > 0
        for name, report in entries:
            kernels[name] = (report, bodies[name])
    assert {kind for kind in MAX_REGISTERS if any(kind in name for name in kernels)} == set(MAX_REGISTERS)
    for name, (report, body) in kernels.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in report, (name, report)
        kind = next(kind for kind in MAX_REGISTERS if kind in name)
        assert int(re.search(r"Used (\d+) registers", report).group(1)) <= MAX_REGISTERS[kind], (name, report)
        shared = re.search(r"(\d+) bytes smem", report)
        assert shared is None or int(shared.group(1)) <= MAX_SHARED_BYTES, (name, report)
        parameters = re.findall(r"\.param (?:\.align \d+ )?\.(\w+) \w+(?:\[(\d+)\])?", body.split(")")[0])
        size = sum(int(count) if count else int(re.sub(r"\D", "", kind)) // 8 for kind, count in parameters)
        assert 0 < size <= MAX_PARAMETER_BYTES, (name, size)
        if any(kind in name for kind in ("iou_kernel", "dense_kernel", "tile_kernel")):
            assert re.search(r"ld\.global(\.nc)?\.v[24]\.[fb](32|64)", body), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ and its sanitizers")
def test_cpu_kernels_are_clean_under_sanitizers(repository, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over the operators' fast tests; both abort on a finding."""
    build(repository, tmp_path, GS_SANITIZE="1", GS_BUILD_EXT="1")
    # Both come first: libasan finds the C++ runtime's throw at start-up, and Python itself does not load that runtime.
    preload = " ".join(
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    tests = ["test_op_match.py", "test_op_sample.py", "test_op_iou.py", "test_op_errors.py"]
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys"]  # a finding is written to the process's stderr
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/ops/{name}" for name in tests)]
    done = subprocess.run(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "passed" in done.stdout
    assert (
        "-fsanitize=address,undefined"
        in subprocess.run(
            [sys.executable, "-c", "from group_sampling.ops import extension_status as s; print(s().build_info)"],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        ).stdout
    )
