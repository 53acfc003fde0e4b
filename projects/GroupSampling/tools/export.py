#!/usr/bin/env python
"""Export a detector to ONNX, TorchScript or torch.export, for images of any size in batches of any size.

    python export.py --weights model_final.pth --format onnx --output detector.onnx
    python export.py --weights model_final.pth --format torch-export --output detector.pt2 --no-nms

The file is compared with the detector on three sizes and in batches of 1 and 3, and is written only if they agree
within 1e-4. docs/export.md describes its inputs, outputs and metadata. ONNX needs pip install 'group-sampling[export]'.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from group_sampling.checkpoint import read_description, saved_config
from group_sampling.engines.tv.detect import load_config, load_model
from group_sampling.engines.tv.export import FORMATS, compare, describe, export
from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.files import atomic_file


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of either engine")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--no-nms", action="store_true", help="all candidates with their scores, before the last NMS")
    parser.add_argument("--config-file", default="", metavar="FILE", help="for weights that do not carry their config")
    add_debug_flag(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config; last")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    suffixes = FORMATS[args.format].suffixes
    if args.output.suffix not in suffixes:
        raise UserError(
            f"{args.output}: expected a name that ends with {' or '.join(suffixes)} for --format {args.format}, "
            f"got {args.output.suffix or 'none of these'}"
        )
    saved = saved_config(args.config_file, args.weights, needed_by="--weights")
    # One image size, one list of detections, on the CPU: what runs the file chooses its own device.
    fixed = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "TEST.SUB_DETECTORS", "False"]
    cfg = load_config(args.config_file, [*args.opts, *fixed], saved=saved)
    model = load_model(cfg, args.weights)
    metadata = describe(cfg, model, read_description(args.weights).class_names or ("face",))
    with atomic_file(args.output) as file:  # opened first: a place that cannot be written is said at once
        content = export(model, args.format, metadata, with_nms=not args.no_nms)
        print(f"compared with the detector: {compare(model, content, args.format, with_nms=not args.no_nms)}")
        file.write(content)
    print(f"{args.output}: {len(content) / 2**20:.1f} MiB, {args.format}{', without NMS' if args.no_nms else ''}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("export.py", args):
        run(args)


if __name__ == "__main__":
    main()
