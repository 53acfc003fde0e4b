"""Everything that needs a GPU: build, equality with the CPU, tests, sanitizers, figures, training.

    projects/GroupSampling/benchmarks/check_gpu.sh [--output DIR] [--no-build] [--only STEP ...]

Needs this repository, torch >= 2.10 built for CUDA, a CUDA toolkit of its version and setuptools >= 77. What is missing
is said before anything starts. Steps that need more (pytest and hypothesis; compute-sanitizer; the package's other
dependencies; Detectron2) are skipped with the reason where it is absent. Each step is a process of its own with a time
limit, and none depends on another's success, except that all need the build. Writes check_gpu.json and a log of each
step into DIR, prints a table for docs/operator.md, and exits with 1 if a step failed.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
BENCHMARKS = Path(__file__).resolve().parent
PACKAGE = REPOSITORY / "projects" / "GroupSampling" / "group_sampling"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = ("tests/ops", "tests/core/test_anchors.py")
TEST_MODULES = ("pytest", "pytest_timeout", "hypothesis", "numpy")
PACKAGE_MODULES = ("numpy", "fvcore", "iopath", "matplotlib", "PIL", "scipy", "torchvision", "pycocotools")
MINUTES = {"build": 30, "build_guarded": 30, "slow_tests": 60, "training": 30}
DEFAULT_MINUTES = 20
SANITIZED_SCENES, SCENES = 12, 400
SYNCHRONIZING_CALLS = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")
LAUNCHING_CALLS = re.compile(r"cu(da)?LaunchKernel")


def arguments_of(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check_gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "output" / "check_gpu")
    parser.add_argument("--no-build", action="store_true", help="take the extension that is importable as it is")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--worker", choices=("equality", "figures"), help=argparse.SUPPRESS)
    parser.add_argument("--scenes", type=int, default=SCENES, help=argparse.SUPPRESS)
    return parser.parse_args(command_line)


def absent(modules) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def missing_requirements(build: bool) -> list[str]:
    """What has to be there before anything starts, and is not."""
    missing = []
    if absent(["torch"]):
        return [*missing, f"torch >= 2.10 built for CUDA, got none for {sys.executable}"]
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        missing.append(f"torch >= 2.10, got {torch.__version__}")
    if torch.version.cuda is None:
        missing.append(f"torch built for CUDA, got {torch.__version__}")
    elif not torch.cuda.is_available():
        missing.append("a GPU that torch sees, got none (nvidia-smi shows the driver's view)")
    if not build:
        return missing
    if absent(["setuptools"]):
        return [*missing, "setuptools >= 77, got none"]
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < 77:
        return [*missing, f"setuptools >= 77, got {setuptools.__version__}"]
    # setup.py knows best what a build needs, and says it without building.
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=REPOSITORY, env=build_environment(), capture_output=True, text=True
    )
    if done.returncode != 0:
        missing.append(done.stderr.strip().splitlines()[-1])
    return missing


def build_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "GS_BUILD_EXT": "1", "FORCE_CUDA": "1", **more}


def build_step(name: str, folder: Path, **more: str) -> dict:
    """The package with a fresh extension in ``folder``."""
    copy = (
        "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True, "
        "ignore=shutil.ignore_patterns('*.so', '__pycache__'))"
    )
    command = ["setup.py", "build_ext", "--build-temp", str(folder / "temp"), "--build-lib", str(folder)]
    return {
        "name": name,
        "commands": [
            [sys.executable, "-c", copy, str(PACKAGE), str(folder / "group_sampling")],
            [sys.executable, *command],
        ],
        "environment": build_environment(**more),
    }


def plan(arguments: argparse.Namespace) -> list[dict]:
    """The steps, in order: name, commands, environment, and why it is skipped, if it is."""
    output = arguments.output
    plain, guarded = output / "package", output / "package_guarded"
    steps = []
    paths = {"plain": str(plain), "guarded": str(guarded)}
    if arguments.no_build:
        paths = dict.fromkeys(paths, str(PACKAGE.parent))
    else:
        steps += [build_step("build", plain), build_step("build_guarded", guarded, GS_WORKSPACE_GUARD="1")]

    def step(name, command, package="plain", skipped=None, **environment):
        path = os.pathsep.join(filter(None, [paths[package], os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "GS_REQUIRE_CUDA": "1", **environment}
        steps.append({"name": name, "commands": [command], "environment": environment, "skipped": skipped})

    worker = [sys.executable, str(Path(__file__).resolve()), "--output", str(output), "--worker"]
    step("equality", [*worker, "equality"])
    step("figures", [*worker, "figures"])

    lacking = absent(TEST_MODULES)
    no_tests = f"not installed: {', '.join(lacking)}" if lacking else None
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-m"]
    step("tests", [*pytest, "cuda and not slow"], skipped=no_tests)
    step("slow_tests", [*pytest, "cuda and slow", "--timeout", "3600"], skipped=no_tests)

    # torch caches device memory; without the cache, and with guarded workspaces, every array is its own allocation.
    no_sanitizer = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        scenes = [*worker, "equality", "--scenes", str(SANITIZED_SCENES)]
        step(tool, [*command, *scenes], "guarded", no_sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    lacking = absent(PACKAGE_MODULES)
    no_package = f"not installed: {', '.join(lacking)}" if lacking else None
    matcher, training = ([sys.executable, str(BENCHMARKS / f"bench_{name}.py")] for name in ("matcher", "training"))
    path = str(output / "bench_matcher_cuda.json")
    step("bench_matcher", [*matcher, "--device", "cuda", "--json", path], skipped=no_package)
    # With Detectron2, where it is installed, on both engines and against its own detectors.
    runs = {f"training_{name}": ["rpn", "rcnn", "--precision", name] for name in ("float32", "bfloat16", "float16")}
    runs["training_keys"] = ["keys", "keys_detectron2"]
    for name, options in runs.items():
        path = str(output / f"bench_{name}_cuda.json")
        command = [*training, "--device", "cuda", "--faces", "1000", "--json", path, "--compare", *options]
        step(name, command, skipped=no_package)
    return steps


def run_step(step: dict, folder: Path) -> dict:
    """Status, seconds and the end of the log of one step."""
    if step.get("skipped"):
        return {"name": step["name"], "status": "skipped", "seconds": 0.0, "reason": step["skipped"]}
    minutes = MINUTES.get(step["name"], MINUTES.get(step["name"].split("_")[0], DEFAULT_MINUTES))
    log = folder / f"{step['name']}.log"
    started = time.monotonic()
    status, reason = "passed", ""
    with log.open("wb") as out:
        for command in step["commands"]:
            left = minutes * 60 - (time.monotonic() - started)
            # A group of its own, so that a limit ends what the command started as well.
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=step["environment"], stdout=out, stderr=out, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(left, 1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                status, reason = "timed out", f"not done within {minutes} minutes"
                break
            if code != 0:
                status, reason = "failed", f"exit code {code}: {' '.join(command)}"
                break
    seconds = round(time.monotonic() - started, 1)
    tail = log.read_text(errors="replace").strip().splitlines()[-5:]
    return {"name": step["name"], "status": status, "seconds": seconds, "reason": reason, "tail": tail}


def printed(*command: str) -> str:
    """What a command prints; nothing if there is no such command."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which(command[0]) else ""


def surroundings() -> dict:
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_gb": round(gpu.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "nvcc": ", ".join(re.findall(r"release [\d.]+|V[\d.]+", printed("nvcc", "--version"))),
        "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "commit": printed("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
    }


def table(report: dict) -> str:
    """Markdown for docs/operator.md."""
    found = report["surroundings"]
    lines = [
        f"{found['gpu']}, CUDA {found['cuda']}, torch {found['torch']}:",
        "",
        "| n; m | images | N | eager | CUDA graph | launches | host synchronizations |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["figures"]:
        lines.append(
            f"| {row['anchors']:,}; {row['faces']:,} | {row['images']} | {row['samples']:,} | {row['eager_us']:.1f} us "
            f"| {row['graph_us']:.1f} us | {row['launches']:g} | {row['synchronizations']:g} |"
        )
    lines += ["", "| step | result | seconds |", "|---|---|---|"]
    for step in report["steps"]:
        reason = f" ({step['reason']})" if step.get("reason") else ""
        lines.append(f"| {step['name']} | {step['status']}{reason} | {step['seconds']:g} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    arguments = arguments_of(command_line)
    if arguments.worker:
        return {"equality": check_equality, "figures": measure}[arguments.worker](arguments)
    missing = missing_requirements(build=not arguments.no_build)
    if missing:
        print("\n".join(f"check_gpu.sh: expected {line}" for line in missing), file=sys.stderr)
        return 1
    steps = plan(arguments)
    names = [step["name"] for step in steps]
    unknown = set(arguments.only or ()) - set(names)
    if unknown:
        print(
            f"check_gpu.sh: expected steps among {', '.join(names)}, got {', '.join(sorted(unknown))}", file=sys.stderr
        )
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures = arguments.output / "figures.json"
    figures.unlink(missing_ok=True)  # of an earlier run
    report = {"surroundings": surroundings(), "figures": [], "steps": []}
    for step in steps:
        if arguments.only and step["name"] not in arguments.only:
            continue
        result = run_step(step, arguments.output)
        report["steps"].append(result)
        print(f"{result['name']}: {result['status']} ({result['seconds']:g} s) {result.get('reason', '')}", flush=True)
        if figures.exists():
            report["figures"] = json.loads(figures.read_text())
        (arguments.output / "check_gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(report)}\n\n{arguments.output / 'check_gpu.json'}")
    return int(any(step["status"] not in ("passed", "skipped") for step in report["steps"]))


def results_on(device, grid, gts, regions, policy, labels, ids, draw) -> list:
    """What all operators return for a scene on a device."""
    from group_sampling import ops

    faces = [boxes.to(device) for boxes in gts]
    ignores = None if regions is None else [boxes.to(device) for boxes in regions]
    match = {"second_pass": policy, "ignore_boxes": ignores}
    anchors = grid.boxes(dtype=gts[0].dtype).to(device)
    first = None if ignores is None else ignores[0]
    return [
        ops.pairwise_iou(faces[0], anchors[:501]),
        *ops.match_anchors(anchors, faces[0], second_pass=policy, ignore_boxes=first),
        *ops.match_anchor_grid(grid, faces, **match),
        *ops.sample_groups(labels.to(device), grid, **draw),
        *ops.sample_groups(labels.to(device), ids.to(device), num_groups=4, **draw),
        *ops.assign_and_sample(grid, faces, **draw, **match),
    ]


def check_equality(arguments: argparse.Namespace) -> int:
    """All operators on random scenes: the GPU's bits are the CPU's."""
    import torch

    from group_sampling import ops
    from group_sampling.anchors import AnchorGrid, cell_anchors

    if not ops.extension_status().cuda:
        print(f"no CUDA kernels: {ops.extension_status().reason}")
        return 1
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def boxes(count, dtype):
        side = torch.exp(uniform(0.5, 5.5, count, 2))
        corner = uniform(-20, 500, count, 2)
        found = torch.cat([corner, corner + side], 1)
        for row in range(0, count, 7):  # of those some that are not valid, and ties
            found[row] = torch.tensor([[float("nan"), 0, 9, 9], [9, 9, 0, 0], found[-1].tolist()][row // 7 % 3])
        return found.to(dtype)

    for number in range(arguments.scenes):
        dtype = (torch.float32, torch.float64)[number % 2]
        policy = ("all", "best", "none")[number % 3]
        levels = 1 + number % 3
        grid = AnchorGrid.from_cell_anchors(
            [cell_anchors([16 * 2**k, 32 * 2**k], [1.0, 1.5]) for k in range(levels)],
            [4 * 2**k for k in range(levels)],
            [(int(uniform(1, 130, 1)) >> k, int(uniform(1, 130, 1)) >> k) for k in range(levels)],
        )
        grid = grid.merged() if number % 5 == 0 else grid
        images = 1 + number % 4
        gts = [boxes(int(uniform(0, 60, 1)), dtype) for _ in range(images)]
        regions = [boxes(int(uniform(0, 4, 1)), dtype) for _ in range(images)] if number % 2 else None
        samples = (1, 64, 200, 2048)[number % 4]
        labels = torch.randint(-1, 2, (images, grid.num_anchors), generator=generator).to(torch.int8)
        ids = torch.randint(-1, 5, (grid.num_anchors,), generator=generator)

        scene = (grid, gts, regions, policy, labels, ids, {"samples_per_group": samples, "seed": number})
        for index, (want, got) in enumerate(zip(results_on("cpu", *scene), results_on("cuda", *scene))):
            if not torch.equal(want, got.cpu()):
                print(f"scene {number}, result {index}: the GPU's bits differ from the CPU's")
                return 1
    torch.cuda.synchronize()
    print(f"{arguments.scenes} scenes: all bits equal")
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Microseconds of assign_and_sample in eager mode and in a graph; launches and waits, counted by the profiler."""
    import torch

    from group_sampling.anchors import AnchorGrid, cell_anchors
    from group_sampling.ops import assign_and_sample

    def median_us(call, runs=200):
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds) * 1e6

    def counts(call, runs):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(runs):
                call()
        names = [event.name for event in profile.events()]
        return [sum(bool(kind.search(name)) for name in names) for kind in (LAUNCHING_CALLS, SYNCHRONIZING_CALLS)]

    generator = torch.Generator().manual_seed(0)
    rows = []
    scenes = [(300, 1000, images, samples) for images in (1, 8) for samples in (64, 2048)] + [(750, 1968, 1, 2048)]
    for cells, count, images, samples in scenes:
        grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64, 128], [1.0])], [4], [(cells, cells)])
        side = torch.exp(1.8 + 3.5 * torch.rand(count, 1, generator=generator))
        corner = torch.rand(count, 2, generator=generator) * (4 * cells - side).clamp(min=0)
        faces = [torch.cat([corner, corner + side], 1).cuda()] * images

        call = functools.partial(assign_and_sample, grid, faces, samples_per_group=samples, seed=1)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(captured, call())):
            print("a replayed graph draws differently")
            return 1
        runs = 20
        none, many = counts(lambda: None, runs), counts(call, runs)  # what the profiler itself does is taken off
        rows.append(
            {
                "anchors": grid.num_anchors,
                "faces": count,
                "images": images,
                "samples": samples,
                "eager_us": median_us(call),
                "graph_us": median_us(graph.replay),
                "launches": (many[0] - none[0]) / runs,
                "synchronizations": (many[1] - none[1]) / runs,
            }
        )
        print(rows[-1], flush=True)
    (arguments.output / "figures.json").write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
