"""Builds csrc/cuda for the CPU with the host compiler, and switches a process's operators to it."""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from group_sampling.ops import extension_status

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# Without fused multiply-adds, as setup.py has it.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
KERNEL_FLAGS = ["-O2", "-fsanitize=thread", "-fsanitize-coverage=trace-pc", "-Wall", "-Wno-unknown-pragmas"]
RUNTIME_FLAGS = ["-O2", "-Wall", "-U_FORTIFY_SOURCE"]  # _longjmp between stacks
OPERATOR_FLAGS = ["-O0", "-DGS_WORKSPACE_GUARD", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


COMPILER = shlex.split(os.environ.get("CXX", "g++"))


def missing():
    """Why the emulation cannot be built and used here, or None."""
    if sys.platform != "linux" or shutil.which(COMPILER[0]) is None:
        return f"the CUDA emulation needs Linux and g++, and {COMPILER[0]} is not here"
    predefined = subprocess.run(
        [*COMPILER, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    ).stdout
    if "__clang__" in predefined or "__GNUC__" not in predefined:
        return f"the CUDA emulation needs g++, and {COMPILER[0]} is another compiler"
    status = extension_status()
    return None if status.loaded else f"the CUDA emulation needs the extension: {status.reason}"


def rewritten(source):
    """A .cu file as C++: launches and shared arrays become calls of the emulation."""
    source = re.sub(
        r"__shared__\s+(\w[\w:]*(?:<[^;<>]*>)?)\s+(\w+)((?:\[[^\]]*\])*);",
        r"auto& \2 = emulation::shared<\1\3>(__LINE__);",
        source,
    )
    while match := re.search(r"(\w+(?:<[^;<>]*>)?)\s*<<<(.*?)>>>\s*\(", source, re.DOTALL):
        end, depth = match.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        name, configuration = match.group(1, 2)
        call = f'emulation::launch("{name}", {configuration}, [=] {{ {name}({source[match.end() : end]}; }})'
        source = source[: match.start()] + call + source[end:]
    assert "__shared__" not in source and "<<<" not in source, "expected only launches and shared arrays of known form"
    return source


def _digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _contents(paths):
    return [f"{path.name}\n{path.read_text()}" for path in sorted(paths)]


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"expected the emulation to compile, got: {' '.join(command)}\n{done.stderr[:4000]}")


def _made(path, *command):
    """``path``, made by ``command`` with -o unless it is there."""
    if not path.exists():
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        _run([*command, "-o", str(fresh)])
        fresh.replace(path)
    return path


def build(csrc=REPOSITORY / "csrc", folder=REPOSITORY / "build/cuda_emulation"):
    """Path of the library of the sources in ``csrc``; ``folder`` keeps what was compiled, by content.

    The operators' host code is always the repository's; only kernels and the headers they see may differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    cuda = _contents((HERE / "include").rglob("*.h"))
    runtime = _contents(HERE.rglob("*.h"))
    jobs = []

    kernel_headers = _contents(csrc.rglob("*.h"))
    for path in sorted((csrc / "cuda").glob("*.cu")):
        text = rewritten(path.read_text())
        key = _digest(version, *KERNEL_FLAGS, *cuda, *kernel_headers, text)
        source = folder / f"{path.stem}-{key}.cpp"
        source.write_text(text)
        include = ["-I", str(csrc / "cuda"), "-I", str(HERE / "include")]
        jobs.append((source.with_suffix(".o"), *COMPILER, *FLAGS, *KERNEL_FLAGS, *include, "-c", str(source)))

    for name in ("device.cpp", "memory.cpp", "scheduler.cpp"):
        key = _digest(version, *RUNTIME_FLAGS, *runtime, (HERE / name).read_text())
        command = [*COMPILER, *FLAGS, *RUNTIME_FLAGS, "-I", str(HERE / "include"), "-c", str(HERE / name)]
        jobs.append((folder / f"{name[:-4]}-{key}.o", *command))

    host = REPOSITORY / "csrc"
    sources = sorted(p for p in (*host.glob("*.cpp"), *host.glob("cuda/*.cpp")) if p.name != "bindings.cpp")
    text = "".join(f'#include "{path.relative_to(host)}"\n' for path in sources)
    host_headers = _contents(host.rglob("*.h"))
    operators = HERE / "operators.cpp"
    key = _digest(
        version,
        torch.__version__,
        *OPERATOR_FLAGS,
        *runtime,
        *host_headers,
        *_contents(sources),
        operators.read_text(),
    )
    generated = folder / f"operators-{key}"
    generated.mkdir(exist_ok=True)
    (generated / "sources.inc").write_text(text)
    in_torch = Path(torch.__file__).parent
    headers = (generated, host, HERE / "include", in_torch / "include", in_torch / "include/torch/csrc/api/include")
    include = [part for path in headers for part in ("-I", str(path))]
    jobs.insert(0, (generated / "operators.o", *COMPILER, *FLAGS, *OPERATOR_FLAGS, *include, "-c", str(operators)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(lambda job: _made(*job), jobs)]
    libraries = [f"-L{in_torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    link = [*COMPILER, "-shared", "-Wl,-Bsymbolic", "-Wl,-z,now", *objects, *libraries]
    return _made(folder / f"emulation-{_digest(*objects)}.so", *link)


class Emulation:
    """A built library in this process."""

    in_use = False

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_seed.argtypes = [ctypes.c_uint64]
        self._library.emulation_counts.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def operators(self, seed=1, cut_grids=True):
        """Within, operators on CPU tensors run the CUDA kernels; equal seeds give equal schedules."""
        if Emulation.in_use:
            raise RuntimeError("expected one emulation at a time, got a second one")
        self._library.emulation_seed(seed)
        self._library.emulation_cut_grids(cut_grids)
        self._library.emulation_start()
        Emulation.in_use = True
        try:
            yield self
        finally:
            Emulation.in_use = False
            self._library.emulation_stop()

    def reset_counts(self):
        self._library.emulation_reset_counts()

    def counts(self):
        """{kernel: {"launches", "accesses", "busiest_accesses", ...}} since the last reset."""
        return json.loads(self._library.emulation_counts())
