#!/usr/bin/env python
"""COCO AP of any detector's results, without COCO's limit of 100 detections per image.

    python evaluate_coco.py --predictions results.json --annotations instances.json
                            [--max-detections 2000] [--scores 0.3 0.5 0.7] [--plot OUT.png] [--json OUT.json]

The predictions are COCO's results: a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, such
as coco_instances_results.json of an evaluation; the annotations are in COCO's format. Beside AP stands a table of
thresholds: precision, recall and false positives per image from some scores on, and at the best F1. --max-detections
100 gives COCO's own figures. Needs neither model nor torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from group_sampling.errors import add_debug_flag, exit_on_error
from group_sampling.evaluation import CocoAP, CocoResult, read_coco_detections
from group_sampling.evaluation.results import UnitCheck
from group_sampling.evaluation.thresholds import add_scores_flag
from group_sampling.files import atomic_file


def evaluate(predictions: Path, annotations: Path, max_dets_per_image: int) -> CocoResult:
    """Evaluate a result file. Raises UserError, ValueError or OSError for input that is not as documented."""
    metric = CocoAP.from_file(annotations, max_dets_per_image=max_dets_per_image)
    units = UnitCheck()
    found = read_coco_detections(predictions, metric.categories)
    for image_id, detections in tqdm(found.items(), unit="image", disable=None):
        metric.update(image_id, detections)
        units.add(detections)
    if units.hint():
        print(f"{predictions}: {units.hint()}", file=sys.stderr)
    return metric.compute()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True, help="file of COCO's results")
    parser.add_argument("--annotations", type=Path, required=True, help="annotation file in COCO's format")
    parser.add_argument(
        "--max-detections", type=int, default=2000, help="best ones of a class and image that count (default: 2000)"
    )
    add_scores_flag(parser)
    parser.add_argument("--plot", type=Path, help="write the precision-recall curves to this image (.png, .pdf, .svg)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    if args.max_detections < 1:
        parser.error(f"--max-detections: expected a positive number, got {args.max_detections}")

    with exit_on_error("evaluate_coco.py", args):
        result = evaluate(args.predictions, args.annotations, args.max_detections).reporting(args.scores)
        print(result.table())
        print("{images} images, {objects} objects, {detections} detections".format(**result.counts))
        # All or nothing: the last file to fail leaves no other behind.
        with atomic_file(args.json) if args.json else nullcontext() as file:
            if file:
                file.write((json.dumps(result.to_dict(), indent=2) + "\n").encode())
            if args.plot:
                result.plot(args.plot, title=f"COCO: {args.predictions.name}")


if __name__ == "__main__":
    main()
