"""Builds the extension ``group_sampling._C`` from csrc/. Everything else about the package is in pyproject.toml.

Environment switches (what was chosen is printed; `pip install -v` shows it):

GS_BUILD_EXT         unset: build where torch and a C++ compiler are found, else install pure Python with a notice;
                     1: not being able to build is an error; 0: pure Python.
FORCE_CUDA           unset: CUDA kernels where torch sees a GPU and a CUDA toolkit is found; 1: always, and not being
                     able to build them is an error; 0: CPU only.
TORCH_CUDA_ARCH_LIST GPU architectures; by default V100, T4, A100, H100, B200 and RTX 50 (those that the toolkit knows),
                     and PTX for later ones.
DEBUG=1              no optimisation, debug symbols.
GS_WORKSPACE_GUARD=1 CUDA: every scratch array is an allocation of its own, for compute-sanitizer.
GS_SANITIZE=1        CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (preload libasan to run).
MAX_JOBS             parallel compile jobs, with ninja.
"""

import os
import re
import shutil
import subprocess
import sys

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE_DIR = "projects/GroupSampling"
# Around the package in the repository, and inside it where it is installed: group_sampling/project.py finds them.
TOOLS, CONFIGS = "group_sampling.tools", "group_sampling.configs"
ARCHITECTURES = ("7.0", "7.5", "8.0", "9.0", "10.0", "12.0")  # V100, T4, A100, H100, B200, RTX 50

CPU_SOURCES = [
    "csrc/assign_and_sample.cpp",
    "csrc/bindings.cpp",
    "csrc/checks.cpp",
    "csrc/match_anchor_grid.cpp",
    "csrc/match_anchors.cpp",
    "csrc/pairwise_iou.cpp",
    "csrc/parse.cpp",
    "csrc/sample_groups.cpp",
    "csrc/cpu/assign_and_sample_cpu.cpp",
    "csrc/cpu/draw.cpp",
    "csrc/cpu/match_anchor_grid_cpu.cpp",
    "csrc/cpu/match_anchors_cpu.cpp",
    "csrc/cpu/pairwise_iou_cpu.cpp",
    "csrc/cpu/sample_groups_cpu.cpp",
    "csrc/cpu/window_matcher.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/assign_and_sample_cuda.cpp",
    "csrc/cuda/match_anchor_grid_cuda.cpp",
    "csrc/cuda/match_anchors_cuda.cpp",
    "csrc/cuda/match_kernels.cu",
    "csrc/cuda/pairwise_iou_cuda.cpp",
    "csrc/cuda/pairwise_iou_kernels.cu",
    "csrc/cuda/prepare_kernels.cu",
    "csrc/cuda/sample_groups_cuda.cpp",
    "csrc/cuda/sample_kernels.cu",
]


def notice(text):
    print(f"group-sampling: {text}", file=sys.stderr, flush=True)


def switch(name):
    """True, False, or None when the variable is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"group-sampling: {name} must be 0, 1 or unset, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def missing_for_extension():
    """Why the extension cannot be built here, or None."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch is not importable ({error}); install it first and build with --no-build-isolation"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler found ({compiler})"
    return None


def cuda_toolkit():
    """Root folder of the CUDA toolkit, or None. nvcc itself is asked: the one on PATH may be a wrapper elsewhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.isfile(nvcc):
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return os.path.realpath(found.group(1)) if found else None


def default_architectures(toolkit):
    """Those of ARCHITECTURES that nvcc compiles for, as TORCH_CUDA_ARCH_LIST has them."""
    nvcc = [os.path.join(toolkit, "bin", "nvcc"), "--list-gpu-arch"]
    known = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout.split()
    return ";".join(a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known) + "+PTX"


def missing_for_cuda(toolkit):
    """Why CUDA kernels cannot be built here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if toolkit is None:
        return "no CUDA toolkit found (nvcc on PATH, CUDA_HOME or /usr/local/cuda)"
    if not os.path.isfile(os.path.join(toolkit, "include", "cuda_runtime_api.h")):
        return f"the CUDA toolkit in {toolkit} has no include/cuda_runtime_api.h"
    nvcc = [os.path.join(toolkit, "bin", "nvcc"), "--version"]
    version = re.search(r"release (\d+)\.", subprocess.run(nvcc, capture_output=True, text=True).stdout)
    if version is None or version.group(1) != torch.version.cuda.split(".")[0]:
        found = version.group(1) if version else "unknown"
        return f"the toolkit in {toolkit} is CUDA {found}, torch was built with CUDA {torch.version.cuda}"
    return None


def with_cuda():
    wanted = switch("FORCE_CUDA")
    if switch("GS_SANITIZE"):
        if wanted:
            sys.exit("group-sampling: GS_SANITIZE=1 builds the CPU kernels only, but FORCE_CUDA=1 is set")
        return False
    if wanted is False:
        return False
    toolkit = cuda_toolkit()
    missing = missing_for_cuda(toolkit)
    if missing and wanted:
        sys.exit(f"group-sampling: FORCE_CUDA=1, but CUDA kernels cannot be built: {missing}")
    import torch
    from torch.utils import cpp_extension

    if not missing and not wanted and not torch.cuda.is_available():
        missing = "torch sees no GPU (FORCE_CUDA=1 builds them all the same, in minutes)"
    if missing:
        notice(f"building without CUDA kernels: {missing}")
        return False
    cpp_extension.CUDA_HOME = toolkit  # torch guesses it from the place of nvcc alone
    return True


def extension():
    import torch
    from torch.utils import cpp_extension

    # The results are promised bit for bit on every backend, so no fused multiply-add and no fast math anywhere.
    # -fno-trapping-math changes no result: it lets loops divide in lanes whose quotient is then not used.
    cxx = ["-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    nvcc = ["-std=c++20", "--fmad=false", "-lineinfo", "--threads=2"]
    if switch("GS_WORKSPACE_GUARD"):
        cxx.append("-DGS_WORKSPACE_GUARD")
    link = []
    if switch("GS_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        cxx += ["-O1", "-g", "-DGS_SANITIZE", *sanitizers]
        link += sanitizers[:1]
    elif switch("DEBUG"):
        cxx += ["-O0", "-g"]
        nvcc += ["-O0", "-g"]
    else:
        cxx += ["-O3", "-DNDEBUG", "-g0"]
        nvcc += ["-O3", "-DNDEBUG"]
    if torch.backends.openmp.is_available() and sys.platform == "linux":
        cxx.append("-fopenmp")  # at::parallel_for runs serially without it
        link.append("-fopenmp")
    macros = [("GS_BUILD_FLAGS", '"' + " ".join(cxx) + '"')]
    cuda = with_cuda()
    if cuda:
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(cpp_extension.CUDA_HOME)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # where torch looks for them
        macros += [
            ("GS_WITH_CUDA", None),
            ("GS_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("GS_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ]
        notice(f"building _C for CPU and CUDA {torch.version.cuda} ({architectures}), torch {torch.__version__}")
    else:
        notice(f"building _C for CPU, torch {torch.__version__}")
    notice(f"compiler flags: {' '.join(cxx)}")
    return (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        name="group_sampling._C",
        sources=CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )


class BuildPy(build_py):
    """Takes along train_net.py, which is where Detectron2's projects have theirs."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [*modules, (TOOLS, "train_net", "train_net.py")] if package == TOOLS else modules


def build_arguments():
    wanted = switch("GS_BUILD_EXT")
    if wanted is False:
        notice("GS_BUILD_EXT=0: installing pure Python, operators run on the torch reference")
        return {"cmdclass": {"build_py": BuildPy}}
    missing = missing_for_extension()
    if missing:
        for name in ("GS_BUILD_EXT", "FORCE_CUDA"):
            if switch(name):
                sys.exit(f"group-sampling: {name}=1, but the extension cannot be built: {missing}")
        notice(f"installing pure Python, operators run on the torch reference: {missing}")
        return {"cmdclass": {"build_py": BuildPy}}
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension()], "cmdclass": {"build_py": BuildPy, "build_ext": BuildExtension}}


setup(
    packages=[*find_packages(PACKAGE_DIR), TOOLS, CONFIGS],
    package_dir={"": PACKAGE_DIR, TOOLS: f"{PACKAGE_DIR}/tools", CONFIGS: f"{PACKAGE_DIR}/configs"},
    **build_arguments(),
)
