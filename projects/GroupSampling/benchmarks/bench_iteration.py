#!/usr/bin/env python
"""How much of a training iteration assigning and sampling anchors takes.

    python bench_iteration.py [--device cpu|cuda] [--engines torchvision detectron2] [--cases demo paper]
                              [--iterations 20] [--precision fp32|bf16] [--threads N] [--json FILE]

Runs the real training (what train_net.py runs) on each engine for a few iterations, without checkpoints read and
without evaluation:

demo    configs/quick/demo_fpn_finest_sampling.yaml as it is: images of the built-in faces.
paper   configs/fpn_finest_sampling.yaml, ResNet-50, one image of 1,200 x 1,200 with 1,000 faces an iteration.

An iteration lasts from one call of the sampler to the next, so that it includes everything: data, forward, backward,
update. Beside the share of assign_and_sample stands what Detectron2's and torchvision's matcher and sampler take for
the same anchors and faces, where they are installed. Prints a table in Markdown and writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_matcher import (
    PINNING,
    SAMPLES,
    SCALES,
    detectron2_step,
    make_faces,
    surroundings,
    synchronize,
    torchvision_step,
    version_of,
)
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from group_sampling.env import ENGINES
from group_sampling.files import write_atomically
from group_sampling.samplers import AnchorSampler

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIDE, FACES = 1200, 1000  # of the paper's case
WARM_UP = 2  # iterations
PEER_RUNS = 3
CASES = {
    "demo": {"config": "quick/demo_fpn_finest_sampling.yaml", "input": "built-in faces", "opts": {}},
    "paper": {
        "config": "fpn_finest_sampling.yaml",
        "input": f"{SIDE:,} x {SIDE:,}, {FACES:,} faces",
        "opts": {
            "MODEL.WEIGHTS": "",  # nothing to download; the time is the same
            "INPUT.SCALE_JITTER": (1.0,),
            "DATASETS.COCO_FORMAT": (("crowd", "crowd.json", "images"),),
            "DATASETS.TRAIN": ("crowd",),
            "SOLVER.IMS_PER_BATCH": 1,  # one image on each GPU
            "SOLVER.BASE_LR": 0.0,  # an untrained network need not stay finite
        },
    },
}


def write_crowd(folder: Path) -> None:
    """One image of noise with many faces, in COCO's format."""
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "crowd.png")
    boxes = make_faces(FACES, SIDE)
    boxes[:, 2:] -= boxes[:, :2]
    content = {
        "images": [{"id": 1, "file_name": "crowd.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "face"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
            for i, box in enumerate(boxes.tolist(), 1)
        ],
    }
    (folder / "crowd.json").write_text(json.dumps(content))


class Observer:
    """Notes when ``AnchorSampler.__call__`` is called, for how long and with what, and how long backward passes and
    optimizer steps last."""

    def __init__(self, device: str):
        self.device = device
        self.starts: list[float] = []
        self.seconds: list[float] = []
        self.stages: dict[str, list[float]] = {"backward": [], "update": []}  # seconds, one per iteration
        self.batch: tuple = ()
        self._call = AnchorSampler.__call__

    def __call__(self, sampler, grid, gt_boxes, ignore_boxes=None, **options):
        synchronize(self.device)
        start = time.perf_counter()
        result = self._call(sampler, grid, gt_boxes, ignore_boxes, **options)
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.starts.append(start)
        self.batch = grid, gt_boxes
        return result

    def install(self) -> None:
        AnchorSampler.__call__ = lambda *args, **kwargs: self(*args, **kwargs)
        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)
        started = []

        def begin(*_):
            synchronize(self.device)
            started.append(time.perf_counter())

        def end(*_):
            synchronize(self.device)
            self.stages["update"].append(time.perf_counter() - started.pop())

        register_optimizer_step_pre_hook(begin)
        register_optimizer_step_post_hook(end)

    def timed(self, stage, function):
        def call(*args, **kwargs):
            synchronize(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.device)
            self.stages[stage].append(time.perf_counter() - start)
            return result

        return call


def work(options: dict) -> dict:
    """What one process measures: one case on one engine."""
    if options["engine"] == "detectron2":
        from group_sampling.engines.d2.train import main as train
    else:
        from group_sampling.engines.tv.train import main as train
    case = CASES[options["case"]]
    torch.set_num_threads(options["threads"])
    observer = Observer(options["device"])
    observer.install()
    with tempfile.TemporaryDirectory() as folder:
        if options["case"] == "paper":
            write_crowd(Path(folder))
            os.environ["DETECTRON2_DATASETS"] = folder
        opts = {
            **case["opts"],
            "DATASETS.TEST": (),
            "MODEL.DEVICE": options["device"],
            "SOLVER.MAX_ITER": WARM_UP + options["iterations"] + 1,
            "SOLVER.STEPS": (),
            "SEED": 0,
            "OUTPUT_DIR": os.path.join(folder, "output"),
        }
        if options["precision"] == "bf16":
            opts |= {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bfloat16"}
        train(
            argparse.Namespace(
                config_file=str(CONFIGS / case["config"]),
                opts=[part for key, value in opts.items() for part in (key, str(value))],
                resume=False,
                eval_only=False,
                num_gpus=1,
                num_machines=1,
                machine_rank=0,
                dist_url="auto",
            )
        )
    grid, gt_boxes = observer.batch
    iterations = [b - a for a, b in zip(observer.starts[WARM_UP:], observer.starts[WARM_UP + 1 :])]
    assign = observer.seconds[WARM_UP:-1]
    stages = {name: 1e3 * statistics.median(seconds[WARM_UP:]) for name, seconds in observer.stages.items()}
    peers = {}
    for name, step in (("detectron2", detectron2_step), ("torchvision", torchvision_step)):
        if version_of(name):
            # torchvision's matcher takes no image without faces.
            peers[name] = time_peer([step(grid, faces) for faces in gt_boxes if len(faces)], options["device"])
    return {
        "case": options["case"],
        "engine": options["engine"],
        "images": len(gt_boxes),
        "anchors": grid.num_anchors,
        "faces": statistics.mean(len(boxes) for boxes in gt_boxes),
        "iterations": len(iterations),
        "precision": options["precision"],
        "iteration_ms": 1e3 * statistics.median(iterations),
        "assign_ms": 1e3 * statistics.median(assign),
        "stages_ms": stages,
        "share": statistics.median(a / b for a, b in zip(assign, iterations)),
        "peers_ms": peers,
    }


def time_peer(steps: list, device: str) -> float:
    """Median milliseconds of matching and sampling all images of the last batch."""
    times = []
    for _ in range(1 + PEER_RUNS):
        synchronize(device)
        start = time.perf_counter()
        for step in steps:
            step()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first warms up


def run_worker(options: dict) -> dict:
    print(
        f"[{options['engine']}, {options['case']}] {options['iterations']} iterations ...", file=sys.stderr, flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", json.dumps({**options, "result": str(result)})]
        done = subprocess.run(
            command, env={**os.environ, **PINNING}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != 0:
            sys.exit(f"bench_iteration: {options['engine']} failed on {options['case']}:\n{done.stdout[-4000:]}")
        return json.loads(result.read_text())


def table(report: dict) -> str:
    lines = [
        "| case | engine | images | anchors | faces | iteration | assign_and_sample | share | backward | update |"
        " Detectron2's matcher + sampler | torchvision's |",
        "|---" * 12 + "|",
    ]
    for record in report["records"]:
        peers = [
            f"{record['peers_ms'][name]:,.1f} ms" if name in record["peers_ms"] else "not installed"
            for name in ("detectron2", "torchvision")
        ]
        lines.append(
            f"| {record['case']} | {record['engine']} | {record['images']} | {record['anchors']:,} | "
            f"{record['faces']:,.0f} | {record['iteration_ms']:,.1f} ms | {record['assign_ms']:.3f} ms | "
            f"{100 * record['share']:.3f} % | {record['stages_ms']['backward']:,.1f} ms | "
            f"{record['stages_ms']['update']:,.1f} ms | {' | '.join(peers)} |"
        )
    lines += [
        "",
        *(f"- {name}: {CASES[name]['config']}, {CASES[name]['input']}" for name in report["options"]["cases"]),
    ]
    lines += [f"- skipped: {name}: {reason}" for name, reason in report["skipped"].items()]
    lines.append("- the rest of an iteration is the forward pass and what is left of waiting for data")
    lines.append(f"- the peers draw {SAMPLES * len(SCALES)} anchors of an image, their default")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--iterations", type=int, default=None, help="default: 20 of the demo, 3 of the paper on a CPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: SOLVER.AMP")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, default=None, help="default: output/bench/bench_iteration_DEVICE.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        options = json.loads(arguments.worker)
        Path(options["result"]).write_text(json.dumps(work(options)))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_iteration: --device cuda, but torch sees no GPU")
    engines = [engine for engine in arguments.engines if version_of(engine)]
    records = []
    for case in arguments.cases:
        iterations = arguments.iterations or (3 if (arguments.device, case) == ("cpu", "paper") else 20)
        for engine in engines:
            options = {"device": arguments.device, "threads": arguments.threads, "iterations": iterations}
            options |= {"engine": engine, "case": case, "precision": arguments.precision}
            records.append(run_worker(options))
    report = {
        **surroundings(arguments.device, arguments.threads),
        "options": {"device": arguments.device, "cases": arguments.cases, "engines": engines},
        "skipped": {engine: "not installed" for engine in arguments.engines if engine not in engines},
        "records": records,
    }
    path = arguments.json or Path(f"output/bench/bench_iteration_{arguments.device}.json")
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))
    print(path)


if __name__ == "__main__":
    main()
