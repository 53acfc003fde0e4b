#!/usr/bin/env python
"""How fast a training step is: against stock detectors, against its backbone alone, stage by stage, key by key.

    python bench_training.py [--compare rpn rcnn keys keys_detectron2] [--device cpu|cuda] [--side 320] [--images 1]
                             [--faces 50] [--precision float32|bfloat16|float16] [--rounds 7] [--threads N]
                             [--json FILE]

All detectors train in one process on the same images of noise and faces, and take turns: a round is one step of each.

rpn    FPN-finest-sampling (Table 1) on both engines, against Detectron2's RPN-R50-FPN and torchvision's RPN.
rcnn   Grouped Fast R-CNN (Table 5) on both engines, against both frameworks' Faster R-CNN R50-FPN.
keys   FPN-finest-sampling with each key that makes a training faster or smaller, against the plain one, on the
       torchvision engine; keys_detectron2 on Detectron2's.

A step is forward pass, backward pass and the optimizer's update, without data; what our loader takes for a batch (JPEG,
scale jitter, crop, in one process) stands beside it. The limit is forward and backward pass of our backbone and its FPN
alone. Ratios are of medians. "Kept" is what the forward pass keeps for the backward pass, "peak" what a step takes of
memory at most (on the CPU by the resident set, a rough figure). Stages are timed in steps of their own, which wait for
the GPU. Weights are random, and the learning rate is 0. Prints tables in Markdown and writes JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_matcher import peak_extra_mb, surroundings, synchronize, version_of
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training_subjects import CONFIGS, KEYS, Subject, our_options, subjects

import group_sampling.engines.tv.train as tv_train
from group_sampling.data.images import read_image
from group_sampling.engines.build import build_training_loader, load_records
from group_sampling.engines.tv.config import load_config
from group_sampling.files import write_atomically

WARM_UP = 2  # rounds
STAGES = ("backbone", "head", "assign and sample", "second stage", "loss and the rest", "backward", "update")


def seconds_of(call: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def timed_stages(subject: Subject, device: str) -> Iterator[None]:
    """Within, each step of the subject adds the seconds of its stages to ``subject.stages``."""
    stages: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable, *, of_result: bool = False) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if of_result:
                return timed(stage, function(*args, **kwargs))
            results = []
            stages[stage] += seconds_of(lambda: results.append(function(*args, **kwargs)), device)
            return results[0]

        return call

    wrapped = [(stage, *part) for stage, parts in subject.parts.items() for part in parts if hasattr(*part)]
    originals = [(owner, name, owner.__dict__.get(name)) for _, owner, name in wrapped]
    for stage, owner, name in wrapped:
        setattr(owner, name, timed(stage, getattr(owner, name), of_result=name == "predictor"))
    backward = torch.Tensor.backward
    torch.Tensor.backward = timed("backward", backward)
    begun: list[float] = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: synchronize(device) or begun.append(time.perf_counter())),
        register_optimizer_step_post_hook(
            lambda *_: synchronize(device) or stages.update(update=time.perf_counter() - begun.pop())
        ),
    ]
    step = subject.step

    def whole() -> None:
        stages.clear()
        total = seconds_of(step, device)
        stages["loss and the rest"] = total - sum(stages.values())
        for stage in STAGES:
            subject.stages[stage].append(stages[stage])

    subject.step = whole
    try:
        yield
    finally:
        subject.step, torch.Tensor.backward = step, backward
        for hook in hooks:
            hook.remove()
        for owner, name, original in originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


class _Kept:
    """A tensor that a graph keeps; ``live`` counts, by storage, how many there are and their bytes."""

    def __init__(self, tensor: Tensor, live: dict[int, list[int]]):
        self.tensor, self._live = tensor, live
        storage = tensor.untyped_storage()
        self._key = storage.data_ptr()
        live.setdefault(self._key, [0, storage.nbytes()])[0] += 1

    def __del__(self) -> None:
        entry = self._live[self._key]
        entry[0] -= 1
        if entry[0] == 0:
            del self._live[self._key]


def kept_mb(subject: Subject) -> float:
    """The most that a step keeps at a time for its backward pass, beside parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*subject.model.parameters(), *subject.model.buffers())}
    live: dict[int, list[int]] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor | _Kept:
        nonlocal most
        if tensor.untyped_storage().data_ptr() in known:
            return tensor
        kept = _Kept(tensor, live)
        most = max(most, sum(size for _, size in live.values()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept):
        subject.step()
    return most / 1e6


def data_seconds(options: argparse.Namespace) -> float:
    """Median of a batch of our loader, without workers: photographs of the built-in faces, as JPEG."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(
            str(CONFIGS / "fpn_finest_sampling.yaml"),
            [
                *our_options(options, ["DATASETS.TRAIN", "('synthetic_faces_train',)", "DATALOADER.NUM_WORKERS", "0"]),
                *("DATASETS.SYNTHETIC.NUM_TRAIN", "4", "INPUT.CROP.SIZE", f"[{options.side}, {options.side}]"),
                *("DATASETS.SYNTHETIC.HEIGHT", str(options.side), "DATASETS.SYNTHETIC.WIDTH", str(options.side)),
            ],
        )
        records = []
        for i, record in enumerate(load_records(cfg, cfg.DATASETS.TRAIN)):
            path = os.path.join(folder, f"{i}.jpg")
            Image.fromarray(read_image(record)).save(path, quality=90)
            records.append(replace(record, file_name=path))
        batches = iter(build_training_loader(cfg, records, tv_train.to_example))
        return statistics.median(seconds_of(lambda: next(batches), "cpu") for _ in range(8))


def measure(kind: str, options: argparse.Namespace) -> list[dict]:
    """A record for each detector of a comparison; of several, the first is the one to compare with."""
    found = []
    for build in subjects(kind, options):
        torch.manual_seed(0)
        found.append(build())
        print(f"[{kind}] {found[-1].name}", file=sys.stderr, flush=True)
    for turn in range(WARM_UP + options.rounds):
        for subject in found:
            seconds = seconds_of(subject.step, options.device)
            limit = seconds_of(subject.limit, options.device) if subject.limit and not kind.startswith("keys") else None
            if turn >= WARM_UP:
                subject.seconds.append(seconds)
                subject.limit_seconds += [] if limit is None else [limit]
    records = []
    for subject in found:
        with timed_stages(subject, options.device):
            for _ in range(max(3, options.rounds // 2)):
                subject.step()
        median = statistics.median(subject.seconds)
        limit = statistics.median(subject.limit_seconds) if subject.limit_seconds else None
        records.append(
            {
                "comparison": kind,
                "name": subject.name,
                "step_ms": 1e3 * median,
                "spread_ms": [1e3 * min(subject.seconds), 1e3 * max(subject.seconds)],
                "images_per_second": options.images / median,
                "speed_of_first": statistics.median(found[0].seconds) / median,
                "limit_ms": None if limit is None else 1e3 * limit,
                "step_per_limit": None if limit is None else median / limit,
                "stages_ms": {stage: 1e3 * statistics.median(subject.stages[stage]) for stage in STAGES},
                "kept_mb": kept_mb(subject),
                "peak_mb": peak_extra_mb(subject.step, options.device),
            }
        )
    return records


def table(report: dict) -> str:
    lines = []
    for kind in report["options"]["compare"]:
        records = [record for record in report["records"] if record["comparison"] == kind]
        lines += [
            f"| {kind} | step (min … max) | images/s | speed, first = 1 | step / limit | "
            + " | ".join(STAGES)
            + " | kept | peak |",
            "|---" * (7 + len(STAGES)) + "|",
        ]
        for record in records:
            total = sum(record["stages_ms"].values())
            stages = [f"{100 * record['stages_ms'][stage] / total:.2f} %" for stage in STAGES]
            limit = "" if record["step_per_limit"] is None else f"{record['step_per_limit']:.3f}"
            low, high = record["spread_ms"]
            peak = "not known" if record["peak_mb"] is None else f"{record['peak_mb']:,.0f} MB"
            cells = [f"{record['step_ms']:,.1f} ms ({low:,.1f} … {high:,.1f})", f"{record['images_per_second']:.2f}"]
            cells += [f"{record['speed_of_first']:.3f}", limit, *stages, f"{record['kept_mb']:,.0f} MB", peak]
            lines.append(f"| {record['name']} | {' | '.join(cells)} |")
        lines.append("")
    options = report["options"]
    lines.append(
        f"{options['images']} x {options['side']} x {options['side']}, {options['faces']} faces each, "
        f"{options['precision']}, {options['rounds']} rounds on {options['device']}, {report['threads']} threads; our "
        f"loader takes {report['data_ms']:.1f} ms for a batch in one process"
    )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("rpn", "rcnn", "keys", "keys_detectron2")
    parser.add_argument("--compare", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--side", type=int, default=None, help="of the images in pixels (default: 320; 1,200 on a GPU)")
    parser.add_argument("--images", type=int, default=None, help="of a batch (default: 1; 2 on a GPU)")
    parser.add_argument("--faces", type=int, default=50, help="of each image")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--keys", nargs="+", choices=tuple(KEYS), default=list(KEYS), help="of --compare keys")
    parser.add_argument("--rounds", type=int, default=None, help="default: 7; 50 on a GPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, default=None, help="default: output/bench/bench_training_DEVICE.json")
    arguments = parser.parse_args()
    defaults = {"side": (320, 1200), "images": (1, 2), "rounds": (7, 50)}
    for name, values in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values[arguments.device == "cuda"])
    return arguments


def main() -> None:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_training: --device cuda, but torch sees no GPU")
    if version_of("detectron2") is None:
        options.compare = [kind for kind in options.compare if kind != "keys_detectron2"]
    torch.set_num_threads(options.threads)
    report = {
        **surroundings(options.device, options.threads),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "skipped": {} if version_of("detectron2") else {"detectron2": "not installed"},
        "data_ms": 1e3 * data_seconds(options),
        "records": [record for kind in options.compare for record in measure(kind, options)],
    }
    path = options.json or Path(f"output/bench/bench_training_{options.device}.json")
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))
    print(path)


if __name__ == "__main__":
    main()
