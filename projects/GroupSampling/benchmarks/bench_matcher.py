#!/usr/bin/env python
"""Matching and sampling against Detectron2, torchvision and plain torch.

    python bench_matcher.py [--device cpu|cuda] [--anchors 40000 360000 2250000] [--faces 1 10 100 500 1000 1968]
                            [--peers detectron2 torchvision reference] [--json FILE]

One step is what an RPN does with an image: match n anchors of four scales (stride 4, square image) with m faces, and
draw 256 anchors, at most a quarter of them positive. Prints tables in Markdown, writes JSON and a log-log PNG.

On the CPU everything runs twice, in two processes that each measure all peers: with malloc as it is, and "tuned" to
keep its pages (MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=100000000000), which takes the page faults out of the peers'
large temporaries. Peak memory is taken from the first. Threads are pinned (OMP_PROC_BIND).
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matcher_report import plot, tables
from torch import Tensor

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.env import hardware
from group_sampling.files import write_atomically
from group_sampling.ops import (
    assign_and_sample,
    extension_status,
    match_anchor_grid,
    match_anchors,
    pairwise_iou,
    reference,
    sample_groups,
)

SCALES, STRIDE = (16, 32, 64, 128), 4
SAMPLES = 64  # of each scale: 256 of an image, the default of both frameworks
MAX_SAMPLES = 2048  # the paper's N
FACES_WITHIN = 1200  # pixels: larger grids get the same faces
POS_IOU, NEG_IOU = 0.6, 0.4
# Square roots of face areas in WIDER FACE's training set: share of the faces in each range of pixels.
FACE_SIZES = ((6, 16, 0.46), (16, 32, 0.27), (32, 64, 0.16), (64, 128, 0.07), (128, 400, 0.04))
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PINNING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
PEERS = ("detectron2", "torchvision", "reference")
BYTES_PER_PAIR = {"detectron2": 24, "torchvision": 36}  # what they hold at their peak
MAX_REFERENCE_PAIRS = 10**9  # more take the reference minutes
MIN_RUNS, MAX_RUNS, SECONDS = 3, 200, 2.0  # of one measurement, after one warm-up


def make_grid(num_anchors: int) -> AnchorGrid:
    side = round(math.sqrt(num_anchors / len(SCALES)))
    return AnchorGrid.from_cell_anchors([cell_anchors(SCALES, [1.0])], [STRIDE], [(side, side)])


def make_faces(count: int, side: int) -> Tensor:
    """Faces with WIDER FACE's sizes, uniform over the image, a quarter higher than wide; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([share for *_, share in FACE_SIZES])
    chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    low, high = (torch.tensor([row[k] for row in FACE_SIZES], dtype=torch.float32)[chosen] for k in (0, 1))
    size = low * (high / low) ** torch.rand(count, generator=generator)
    size = torch.stack([size / math.sqrt(1.25), size * math.sqrt(1.25)], 1)
    corner = torch.rand(count, 2, generator=generator) * (side - size).clamp(min=0)
    return torch.cat([corner, corner + size], 1)


def detectron2_step(grid: AnchorGrid, faces: Tensor) -> Callable[[], object]:
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.sampling import subsample_labels
    from detectron2.structures import Boxes
    from detectron2.structures import pairwise_iou as detectron2_iou

    anchors, gt_boxes = Boxes(grid.boxes(faces.device)), Boxes(faces)
    matcher = Matcher([NEG_IOU, POS_IOU], [0, -1, 1], allow_low_quality_matches=True)

    def step():
        _, labels = matcher(detectron2_iou(gt_boxes, anchors))
        return subsample_labels(labels, SAMPLES * len(SCALES), 0.25, 0)

    return step


def torchvision_step(grid: AnchorGrid, faces: Tensor) -> Callable[[], object]:
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
    from torchvision.ops import box_iou

    anchors = grid.boxes(faces.device)
    matcher = Matcher(POS_IOU, NEG_IOU, allow_low_quality_matches=True)
    sampler = BalancedPositiveNegativeSampler(SAMPLES * len(SCALES), 0.25)

    def step():
        matched = matcher(box_iou(faces, anchors))
        labels = (matched >= 0).float()
        labels[matched == Matcher.BETWEEN_THRESHOLDS] = -1.0
        return sampler([labels])

    return step


def reference_step(grid: AnchorGrid, faces: Tensor) -> Callable[[], object]:
    return lambda: reference.assign_and_sample(
        grid, [faces], SAMPLES, 0.25, 0, 0, 0, POS_IOU, NEG_IOU, "all", None, 0.5
    )


def our_steps(grid: AnchorGrid, faces: Tensor) -> dict[str, Callable[[], object]]:
    anchors, draw = grid.boxes(faces.device), {"samples_per_group": SAMPLES, "seed": 0}
    return {
        "assign_and_sample": lambda: assign_and_sample(grid, [faces], **draw),
        f"assign_and_sample, N = {MAX_SAMPLES}": lambda: assign_and_sample(
            grid, [faces], samples_per_group=MAX_SAMPLES, seed=0
        ),
        "assign_and_sample, 8 images": lambda: assign_and_sample(grid, [faces] * 8, **draw),
        "match_anchor_grid + sample_groups": lambda: sample_groups(
            match_anchor_grid(grid, [faces]).labels, grid, **draw
        ),
        "match_anchors + sample_groups": lambda: sample_groups(match_anchors(anchors, faces).labels, grid, **draw),
        "match_anchors": lambda: match_anchors(anchors, faces),
    }


def peer_steps(name: str, grid: AnchorGrid, faces: Tensor) -> Callable[[], object]:
    steps = {"detectron2": detectron2_step, "torchvision": torchvision_step, "reference": reference_step}
    return steps[name](grid, faces)


def version_of(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


# --- measuring ---


def measure(step: Callable[[], object], options: dict) -> dict[str, float | None]:
    """Median, quartiles and number of runs in milliseconds, after a warm-up, and peak extra memory in MB."""
    device, seconds = options["device"], options["seconds"]
    extra_mb = peak_extra_mb(step, device)  # also the warm-up
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and time.perf_counter() - started < seconds):
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3)
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median_ms": statistics.median(times),
        "q1_ms": quartiles[0],
        "q3_ms": quartiles[2],
        "min_ms": min(times),
        "runs": len(times),
        "extra_mb": None if options["keeps_pages"] else extra_mb,
    }


def measure_graph(step: Callable[[], object]) -> dict[str, float]:
    """Time of one replay of a CUDA graph, from events around many: what the GPU needs, without Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    replays = 20
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / replays)
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median_ms": statistics.median(times),
        "q1_ms": quartiles[0],
        "q3_ms": quartiles[2],
        "min_ms": min(times),
        "runs": len(times) * replays,
        "extra_mb": None,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_extra_mb(step: Callable[[], object], device: str) -> float | None:
    """Peak memory of one step above what was held before; None where Linux does not let a process reset its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # pages that malloc kept would hide what the step needs
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        step()
        return None
    before = _kb("/proc/self/status", "VmRSS")
    step()
    return max(0, _kb("/proc/self/status", "VmHWM") - before) * 1024 / 1e6


def _kb(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no field {field}")


def why_not(name: str, pairs: int, options: dict) -> str | None:
    """Why a peer is left out of a case, or None."""
    if name == "reference":
        return f"more than {MAX_REFERENCE_PAIRS:.0e} pairs" if pairs > MAX_REFERENCE_PAIRS else None
    needed = BYTES_PER_PAIR[name] * pairs
    if options["device"] == "cuda":
        available = torch.cuda.mem_get_info()[0]
    else:
        available = _kb("/proc/meminfo", "MemAvailable") * 1024
        if options["keeps_pages"]:
            available += _kb("/proc/self/status", "VmRSS") * 1024  # free for the next temporary
    return f"needs about {needed / 1e9:.0f} GB" if needed > 0.9 * available else None


def work(options: dict) -> Iterator[dict]:
    """All measurements of one process, one record each."""
    device = options["device"]
    torch.set_num_threads(options["threads"])
    for n in options["anchors"]:
        grid = make_grid(n)
        side = min(STRIDE * grid.lattices[0].width, FACES_WITHIN)
        for m in options["faces"]:
            faces = make_faces(m, side).to(device)
            case = {"n": grid.num_anchors, "m": m}
            for name, step in our_steps(grid, faces).items():
                yield {**case, "name": name, **measure(step, options)}
                if device == "cuda" and name.startswith("assign_and_sample"):
                    yield {**case, "name": f"{name}, CUDA graph", **measure_graph(step)}
            for name in options["peers"]:
                reason = why_not(name, grid.num_anchors * m, options)
                if reason:
                    yield {**case, "name": name, "skipped": reason}
                else:
                    yield {**case, "name": name, **measure(peer_steps(name, grid, faces), options)}
    # The IoU matrix alone.
    from torchvision.ops import box_iou

    boxes1, boxes2 = (make_faces(count, FACES_WITHIN).to(device) for count in (10000, 1000))
    for name, op in (("pairwise_iou", pairwise_iou), ("box_iou", box_iou)):
        step = lambda op=op: op(boxes1, boxes2)  # noqa: E731
        yield {"n": 10000, "m": 1000, "name": name, **measure(step, options)}


# --- orchestration and report ---


def run_worker(options: dict, environment: dict[str, str], title: str) -> list[dict]:
    command = [sys.executable, __file__, "--worker", json.dumps(options)]
    records = []
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            record = json.loads(line)
            records.append(record)
            figure = record.get("skipped") or f"{record['median_ms']:.3f} ms"
            print(f"[{title}] n={record['n']} m={record['m']} {record['name']}: {figure}", file=sys.stderr, flush=True)
    if process.returncode != 0:
        sys.exit(f"bench_matcher: the worker process ({title}) failed with status {process.returncode}")
    return records


def commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


def surroundings(device: str, threads: int) -> dict[str, object]:
    """What a report says of machine, versions and build; of every benchmark."""
    return {
        "hardware": hardware(device),
        "threads": threads,
        "pinning": PINNING,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version_of("torchvision"),
            "detectron2": version_of("detectron2"),
            "commit": commit(),
        },
        "build": extension_status().build_info,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--anchors", type=int, nargs="+", default=[40000, 360000, 2250000], help="four scales each")
    parser.add_argument("--faces", type=int, nargs="+", default=[1, 10, 100, 500, 1000, 1968])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of runs for one measurement, at least three")
    parser.add_argument("--json", type=Path, default=None, help="default: output/bench/bench_matcher_DEVICE.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        for record in work(json.loads(arguments.worker)):
            print(json.dumps(record), flush=True)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_matcher: --device cuda, but torch sees no GPU")
    status = extension_status()
    if not status.loaded or (arguments.device == "cuda" and not status.cuda):
        sys.exit(
            f"bench_matcher: nothing to measure without the extension's {arguments.device} kernels: {status.reason}"
        )

    skipped = {
        peer: "not installed"
        for peer in arguments.peers
        if peer != "reference" and importlib.util.find_spec(peer) is None
    }
    options = {
        "device": arguments.device,
        "anchors": arguments.anchors,
        "faces": arguments.faces,
        "peers": [peer for peer in arguments.peers if peer not in skipped],
        "threads": arguments.threads,
        "seconds": arguments.seconds,
    }
    modes = {"malloc as it is": ({**options, "keeps_pages": False}, PINNING)}
    if arguments.device == "cpu" and platform.libc_ver()[0] == "glibc":
        modes["malloc tuned"] = ({**options, "keeps_pages": True}, {**PINNING, **TUNED_MALLOC})
    report = {
        **surroundings(arguments.device, arguments.threads),
        "options": options,
        "skipped": skipped,
        "records": {title: run_worker(*mode, title) for title, mode in modes.items()},
    }
    path = arguments.json or Path(f"output/bench/bench_matcher_{arguments.device}.json")
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    plot(report, path.with_suffix(".png"))
    print(tables(report))
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
