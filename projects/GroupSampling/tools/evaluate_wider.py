#!/usr/bin/env python
"""WIDER FACE validation AP of any detector's result files: Easy, Medium, Hard and All.

    python evaluate_wider.py --predictions DIR|ZIP|TAR --ground-truth DIR [--plot OUT.png] [--json OUT.json]

The predictions are in the submission format (a folder per event, a text file per image, lines "x y w h score"); the
ground truth is the folder of wider_face_val.mat and wider_{easy,medium,hard}_val.mat. Needs neither model nor torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from group_sampling.evaluation import WiderFaceAP, WiderFaceResult, read_predictions


def evaluate(predictions: Path, ground_truth: Path) -> WiderFaceResult:
    """Evaluate a result set, file by file. Raises ValueError or OSError for input that is not as documented."""
    evaluator = WiderFaceAP.from_official(ground_truth)
    progress = tqdm(read_predictions(predictions), total=len(evaluator), unit="image", disable=None)
    for image_id, boxes, scores in progress:
        evaluator.update(image_id, boxes, scores)
    return evaluator.compute()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True, help="folder, ZIP or tar archive of result files")
    parser.add_argument("--ground-truth", type=Path, required=True, help="folder of the four official .mat files")
    parser.add_argument("--plot", type=Path, help="write the precision-recall curves to this image (.png, .pdf, .svg)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)

    try:
        result = evaluate(args.predictions, args.ground_truth)
        print(result.table())
        print("{images} images, {images_without_predictions} of them without predictions".format(**result.counts))
        if args.json:
            result.to_json(args.json)
        if args.plot:
            result.plot(args.plot, title=f"WIDER FACE validation: {args.predictions.name}")
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
