#!/usr/bin/env python
"""Draw what a trained detector finds on an image, at a single scale and on an image pyramid.

    python show_detections.py --weights FILE --image photo.jpg --output found.png
    python show_detections.py ... --image val/000003 --scales 0.5 1 2 --flip DATASETS.TEST "('synthetic_faces_val',)"

An image is a file, or the id of an image of DATASETS.TEST, whose annotated faces are drawn as well. With --scales there
are two panels: the single-scale test, and the pyramid. Runs on either engine, whichever trained the weights. For
pictures without annotations see predict.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torchvision.ops import box_iou

from group_sampling.config import ConfigError
from group_sampling.data.images import read_image
from group_sampling.data.records import ImageRecord
from group_sampling.detector import FaceDetector
from group_sampling.engines.build import load_records
from group_sampling.env import ENGINES
from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.experiments.plots import FACE_COLOR, FOUND_COLOR, plot_detections


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="for weights that do not carry theirs")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint, of either engine")
    parser.add_argument("--image", required=True, help="an image file, or the id of an image of DATASETS.TEST")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture, .png, .jpg, .pdf ...")
    parser.add_argument("--scales", type=float, nargs="+", default=(), help="factors of the pyramid's levels")
    parser.add_argument("--flip", action="store_true", help="the pyramid has the mirror image of every level, too")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="draw detections of this score or more")
    parser.add_argument("--engine", default="auto", choices=("auto", *ENGINES))
    add_debug_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_args(argv)


def find_image(cfg: CfgNode, image: str) -> ImageRecord:
    """The record of a file, without annotations, or of an image of ``DATASETS.TEST``.

    Raises:
        ConfigError: it is neither.
    """
    if Path(image).is_file():
        nothing = np.zeros(0, dtype=np.int64)
        return ImageRecord(image, image, None, None, np.zeros((0, 4), dtype=np.float32), nothing, nothing.astype(bool))
    for record in load_records(cfg, cfg.DATASETS.TEST):
        if record.image_id == image:
            return record
    raise ConfigError(f"--image {image}: neither a file nor the id of an image of DATASETS.TEST {cfg.DATASETS.TEST}")


def count_found(faces: np.ndarray, boxes: np.ndarray) -> int:
    """How many of ``faces`` (m, 4) overlap a box of ``boxes`` (k, 4) with an IoU of 0.5 or more."""
    if not len(faces) or not len(boxes):
        return 0
    return int((box_iou(torch.as_tensor(faces), torch.as_tensor(boxes)).amax(dim=1) >= 0.5).sum())


def show(args: argparse.Namespace) -> None:
    detector = FaceDetector.from_checkpoint(
        args.weights,
        engine=args.engine,
        score_thresh=args.score_threshold,
        config_file=args.config_file,
        opts=args.opts,
    )
    cfg = detector.cfg
    record = find_image(cfg, args.image)
    image, faces = read_image(record), record.boxes[~record.ignore]
    tests = {"single scale": ((1.0,), False)}
    if args.scales:
        mirrored = ", mirrored as well" if args.flip else ""
        tests[f"scales {', '.join(f'{scale:g}' for scale in args.scales)}{mirrored}"] = (args.scales, args.flip)
    panels = {}
    for title, (scales, flip) in tests.items():
        found = detector.with_scales(scales, flip)(image)
        summary = f"{title}: {len(found.boxes)} detections of score ≥ {args.score_threshold:g}"
        if len(faces):
            summary += f"\n{count_found(faces, found.boxes)} of {len(faces)} faces found (IoU ≥ 0.5)"
        panels[summary] = found
        print(summary.replace("\n", ", "))
    plot_detections(image, faces, panels, args.output, panel_size=5.0)
    print(
        f"engine: {detector.engine}; {args.output}: detections {FOUND_COLOR}, annotated faces {FACE_COLOR} and dashed"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("show_detections.py", args):
        show(args)


if __name__ == "__main__":
    main()
