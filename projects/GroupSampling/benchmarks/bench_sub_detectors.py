#!/usr/bin/env python
"""What the lists of the sub-detectors (TEST.SUB_DETECTORS: AP@16, ...) cost an evaluation.

    python bench_sub_detectors.py [--weights model_final.pth] [--config-file FILE] [--repeats 3] [--threads N]
                                  [--json FILE] [KEY VALUE ...]

Evaluates DATASETS.TEST with the torchvision engine as train_net.py --eval-only does, in turn without the lists and with
them, and checks that all other figures are equal. Reports the seconds of the detector, and of the whole evaluation:
reading images, the pyramid's merge, scoring and writing files are in it. One evaluation of each kind goes ahead and is
not counted. Without weights they are random: all boxes score alike and fill every list, an upper bound.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from bench_matcher import surroundings, synchronize

from group_sampling.checkpoint import saved_config
from group_sampling.engines.build import load_records
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.train import GroupSamplingCheckpointer, evaluate
from group_sampling.files import write_json


def run(cfg, model: torch.nn.Module, *, sub_detectors: bool) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of an evaluation, and its seconds."""
    device, seconds, forward = torch.device(cfg.MODEL.DEVICE), 0.0, type(model).forward

    def timed(*args, **kwargs):
        nonlocal seconds
        synchronize(device.type)
        start = time.perf_counter()
        output = forward(model, *args, **kwargs)
        synchronize(device.type)
        seconds += time.perf_counter() - start
        return output

    model.sub_detectors, model.forward = sub_detectors, timed
    start = time.perf_counter()
    metrics = evaluate(cfg, model, device)
    return metrics, {"detector": seconds, "evaluation": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="", help="checkpoint of either engine")
    parser.add_argument("--config-file", default="", help="needed for weights that do not carry their config")
    parser.add_argument("--repeats", type=int, default=3, help="evaluations of each kind, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("opts", nargs="*", help="KEY VALUE of the config: DATASETS.TEST, TEST.PYRAMID.SCALES, ...")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    saved = saved_config(args.config_file, args.weights, needed_by="--weights")
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.config_file, [*args.opts, "OUTPUT_DIR", folder], saved=saved)
        torch.manual_seed(0)
        model = build_model(cfg).to(cfg.MODEL.DEVICE).eval()
        if args.weights:
            GroupSamplingCheckpointer(model).load(args.weights)
        seconds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for repeat in range(args.repeats + 1):
            metrics = {}
            for kind in seconds:
                metrics[kind], measured = run(cfg, model, sub_detectors=kind)
                if repeat > 0:
                    seconds[kind].append(measured)
            for name, value in metrics[False].items():
                if value != metrics[True][name] and value == value:
                    raise SystemExit(f"{name}: expected the same with the lists, got {value} and {metrics[True][name]}")
        num_images = len(load_records(cfg, cfg.DATASETS.TEST))
    report = {
        "config": {"file": args.config_file, "data": list(cfg.DATASETS.TEST), "opts": args.opts},
        "pyramid": list(cfg.TEST.PYRAMID.SCALES),
        "random_weights": not args.weights,
        "roi_heads": cfg.MODEL.ROI_HEADS.NAME,
        "images": num_images,
        "metrics": metrics[True],
        "seconds": {
            "with" if kind else "without": {
                name: {"median": statistics.median(r[name] for r in runs), "runs": [round(r[name], 4) for r in runs]}
                for name in runs[0]
            }
            for kind, runs in seconds.items()
        },
        "surroundings": surroundings(torch.device(cfg.MODEL.DEVICE).type, args.threads),
    }
    for name in ("detector", "evaluation"):
        without, with_lists = (report["seconds"][kind][name]["median"] for kind in ("without", "with"))
        an_image = [1e3 * seconds / num_images for seconds in (without, with_lists)]
        print(
            f"{name:10s} {an_image[0]:9.1f} ms an image without, {an_image[1]:9.1f} with: {with_lists / without:.2f}x"
        )
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
