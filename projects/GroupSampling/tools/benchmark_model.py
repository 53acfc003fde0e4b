#!/usr/bin/env python
"""Speed and size of a detector: latency, images/s, parameters, FLOPs and peak memory, stage by stage.

    python benchmark_model.py --config-file ../configs/fpn_finest_sampling.yaml --sizes 640x640 1200x1600
    python benchmark_model.py --weights model_final.pth --sizes 480x640 --batch-size 8 --device cuda --json speed.json

Sizes are HEIGHTxWIDTH in pixels as the model sees them; reading, resizing and image pyramids are not measured. The
input is noise, or --image FILE at every size, which matters where the time depends on what is found: NMS and the RoI
stage. Without --weights the weights are random. One FLOP is one multiply-add, as fvcore counts. Prints a table and,
with --json, writes it with the hardware and the versions.
"""

import argparse
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from group_sampling.checkpoint import saved_config
from group_sampling.detector import ENGINE_MODULES
from group_sampling.engines.build import SINGLE_STAGE_HEADS, evaluation_autocast
from group_sampling.env import ENGINES, collect_env, hardware, resolve_engine
from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.faces import as_image
from group_sampling.files import write_json
from group_sampling.version import __version__

STAGES = ("backbone", "FPN", "head", "decode + NMS", "RoI stage", "rest")
VERSIONS = ("Python", "torch", "torchvision", "numpy", "fvcore", "detectron2", "extension")
STAGE_RUNS = 5  # passes in which stages are timed, after one that warms up


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(map(int, match.groups())):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, such as 480x640, got {text!r}")
    return int(match[1]), int(match[2])


class _Traceable(nn.Module):
    """A detector as a function from a batch to tensors, for the tracer that counts FLOPs."""

    def __init__(self, model: nn.Module, to_inputs: Callable[[Tensor], Any]):
        super().__init__()
        self.model = model
        self.to_inputs = to_inputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        inputs = self.to_inputs(images)
        if hasattr(self.model, "inference"):  # Detectron2: its post-processing takes sizes that are no tensors
            found = self.model.inference(inputs, do_postprocess=False)
            return tuple(value for image in found for value in (image.pred_boxes.tensor, image.scores))
        return tuple(value for image in self.model(inputs) for value in (image["boxes"], image["scores"]))


class Benchmark:
    """Measurements of a model in eval mode.

    Args:
        to_inputs: from images (B, 3, H, W), uint8, to what the model takes.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, to_inputs: Callable[[Tensor], Any]):
        self.model = model
        self.to_inputs = to_inputs
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.is_single_stage = cfg.MODEL.ROI_HEADS.NAME == SINGLE_STAGE_HEADS
        names = dict(model.named_modules())
        body = next((name for name in ("backbone.bottom_up", "backbone.body") if name in names), "backbone")
        self.paths = {
            "body": body,
            "backbone": "backbone",
            "head": next(name for name in ("proposal_generator.rpn_head", "rpn.head") if name in names),
            "rpn": next(name for name in ("proposal_generator", "rpn") if name in names),
            "roi_heads": "roi_heads",
        }

    def split(self, total: float, of: Callable[[str], float]) -> dict[str, float]:
        """A quantity by stage, from the whole model's and from each module's, which includes its parts."""
        value = {part: of(path) for part, path in self.paths.items()}
        decode, roi = value["rpn"] - value["head"], value["roi_heads"]
        if self.is_single_stage:
            decode, roi = decode + roi, 0
        stages = [value["body"], value["backbone"] - value["body"], value["head"], decode, roi]
        return dict(zip(STAGES, [*stages, total - sum(stages)]))

    def parameters(self) -> dict[str, float]:
        def count(path: str) -> int:
            return sum(parameter.numel() for parameter in self.model.get_submodule(path).parameters())

        return {"total": count(""), "stages": self.split(count(""), count)}

    def flops(self, images: Tensor) -> dict[str, float]:
        """Of one image."""
        analysis = FlopCountAnalysis(_Traceable(self.model, self.to_inputs).eval(), images[:1])
        analysis = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_module = analysis.by_module()
        return {
            "total": analysis.total(),
            "stages": self.split(analysis.total(), lambda path: by_module[f"model.{path}"]),
            "not_counted": sorted(analysis.unsupported_ops()),
        }

    def latency(self, images: Tensor, seconds: float) -> dict[str, float]:
        inputs = self.to_inputs(images)
        timer = Timer(
            "model(inputs)", globals={"model": self.model, "inputs": inputs}, num_threads=torch.get_num_threads()
        )
        self.model(inputs)
        measured = timer.blocked_autorange(min_run_time=seconds)
        return {
            "latency_ms": 1e3 * measured.median,
            "iqr_ms": 1e3 * measured.iqr,
            "images_per_second": len(images) / measured.median,
            "runs": len(measured.times) * measured.number_per_run,
        }

    def stage_times(self, images: Tensor) -> dict[str, float]:
        """Medians in ms. The GPU is waited for after every stage, so that their sum exceeds the latency."""
        inputs, spans, handles = self.to_inputs(images), {}, []

        def now() -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter()

        def watch(path: str) -> None:
            module, started = self.model.get_submodule(path), []
            handles.append(module.register_forward_pre_hook(lambda *_: started.append(now())))
            handles.append(module.register_forward_hook(lambda *_: spans.__setitem__(path, now() - started.pop())))

        for path in {"", *self.paths.values()}:
            watch(path)
        runs = []
        for _ in range(1 + STAGE_RUNS):
            spans.clear()
            self.model(inputs)
            runs.append(self.split(spans[""], spans.__getitem__))
        for handle in handles:
            handle.remove()
        return {stage: 1e3 * statistics.median(run[stage] for run in runs[1:]) for stage in STAGES}

    def peak_memory(self, images: Tensor) -> float:
        """Most bytes that tensors take at a time: weights, input, features, outputs."""
        inputs = self.to_inputs(images)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.model(inputs)
            return torch.cuda.max_memory_allocated(self.device)
        tensors = {*self.model.parameters(), *self.model.buffers(), images}
        size = peak = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.model(inputs)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            size += event.nbytes()
            peak = max(peak, size)
        return peak

    @torch.no_grad()
    def measure(self, images: Tensor, seconds: float) -> dict[str, Any]:
        return {
            "height": images.shape[2],
            "width": images.shape[3],
            "batch_size": images.shape[0],
            **self.latency(images, seconds),
            "stages_ms": self.stage_times(images),
            "flops": self.flops(images),
            "peak_memory_bytes": self.peak_memory(images),
        }


def make_images(image: str | None, size: tuple[int, int], batch_size: int) -> Tensor:
    """(B, 3, H, W) uint8."""
    if image is None:
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    else:
        pixels = np.array(Image.fromarray(as_image(image)).resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().expand(batch_size, -1, -1, -1)


def table(report: dict[str, Any]) -> str:
    lines = [
        "| size | batch | latency | IQR | images/s | GFLOPs an image | peak memory |",
        "|---" * 7 + "|",
    ]
    for record in report["records"]:
        lines.append(
            f"| {record['height']} x {record['width']} | {record['batch_size']} | {record['latency_ms']:,.1f} ms | "
            f"{record['iqr_ms']:,.1f} ms | {record['images_per_second']:,.2f} | "
            f"{record['flops']['total'] / 1e9:,.2f} | {record['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    sizes = [f"{record['height']} x {record['width']}" for record in report["records"]]
    header = "".join(f" {size}: ms | GFLOPs |" for size in sizes)
    lines += ["", f"| stage | parameters |{header}", "|---" * (2 + 2 * len(sizes)) + "|"]
    for stage in STAGES:
        cells = "".join(
            f" {record['stages_ms'][stage]:,.2f} | {record['flops']['stages'][stage] / 1e9:,.2f} |"
            for record in report["records"]
        )
        lines.append(f"| {stage} | {report['parameters']['stages'][stage]:,} |{cells}")
    lines += ["", f"- {report['parameters']['total']:,} parameters; {report['engine']} engine on {report['device']}"]
    lines += [f"- {name}: {value}" for name, value in report["hardware"].items()]
    lines.append("- " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()))
    lines.append("- rest: normalization, padding, and scaling of the boxes")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    engine = resolve_engine(args.engine)
    saved = saved_config(args.config_file, args.weights, needed_by="--weights")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    opts = ["MODEL.DEVICE", default, *args.opts, *(["MODEL.DEVICE", args.device] if args.device else [])]
    if args.threads:
        torch.set_num_threads(args.threads)
    module = importlib.import_module(ENGINE_MODULES[engine])
    cfg = module.load_config(args.config_file, [*opts, "MODEL.WEIGHTS", "", "TEST.SUB_DETECTORS", "False"], saved=saved)
    benchmark = Benchmark(cfg, module.load_model(cfg, args.weights), module.to_inputs)
    records = []
    for size in args.sizes:
        print(f"{size[0]} x {size[1]} ...", file=sys.stderr, flush=True)
        images = make_images(args.image, size, args.batch_size).to(cfg.MODEL.DEVICE)
        with evaluation_autocast(cfg):
            records.append(benchmark.measure(images, args.seconds))
    return {
        "engine": engine,
        "device": cfg.MODEL.DEVICE,
        "threads": torch.get_num_threads(),
        "config": args.config_file or args.weights,
        "weights": args.weights or "random",
        "input": args.image or "noise",
        "hardware": hardware(torch.device(cfg.MODEL.DEVICE).type),
        "versions": {"group_sampling": __version__, **{k: v for k, v in collect_env() if k in VERSIONS}},
        "parameters": benchmark.parameters(),
        "records": records,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="for weights that do not carry theirs, or none"
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint of either engine (default: random)")
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=[(480, 640), (1200, 1200)], metavar="HxW")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--image", metavar="FILE", help="the input, resized to every size (default: noise)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of runs for one latency")
    parser.add_argument("--engine", default="auto", choices=("auto", *ENGINES))
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    add_debug_flag(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config; last")
    args = parser.parse_args(argv)
    for name in ("batch_size", "seconds", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    with exit_on_error("benchmark_model.py", args):
        report = run(args)
        print(table(report))
        if args.json:
            write_json(args.json, report)


if __name__ == "__main__":
    main()
