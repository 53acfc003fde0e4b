#!/usr/bin/env python
"""FDDB's discrete and continuous ROC of any detector's result files.

    python evaluate_fddb.py --predictions DIR --annotations DIR [--images DIR] [--ellipse none|fitted|s3fd ...]
                            [--regressor Fit.mat] [--scores 0.3 0.5 0.7] [--plot OUT.png] [--json OUT.json]

The predictions are fold-01-out.txt to fold-10-out.txt (per image its name, the number of detections, lines
"x y w h score"); the annotations are the folder of FDDB-fold-XX.txt and FDDB-fold-XX-ellipseList.txt. Detections are
clipped to the images, whose sizes come from image_sizes.csv among the annotations, else from the files below --images.

--ellipse none scores the rectangles, as the official evaluation does; fitted turns them into ellipses by least squares,
each fold by a regressor fitted to the other nine; s3fd by the regressor that the authors of S3FD published
(--regressor; needs h5py). Several may be given, to compare them. Needs neither model nor torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tqdm import tqdm

from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.evaluation import FDDBResult, FDDBRoc, read_fddb_predictions
from group_sampling.evaluation.fddb.regressor import EllipseRegressor
from group_sampling.evaluation.results import UnitCheck
from group_sampling.evaluation.thresholds import add_scores_flag
from group_sampling.files import atomic_file


def evaluate(
    predictions: Path,
    annotations: Path,
    images: Path | None = None,
    ellipses: Sequence[str] = ("none",),
    regressor: Path | None = None,
) -> FDDBResult:
    """Evaluate a result set, once for each of ``ellipses``.

    Raises UserError, ValueError, OSError or ModuleNotFoundError for input that is not as documented.
    """
    if "s3fd" in ellipses and regressor is None:
        raise UserError("--ellipse s3fd: expected --regressor, S3FD's Fit.mat, got none")
    s3fd = EllipseRegressor.from_s3fd(regressor) if "s3fd" in ellipses else None
    metric = FDDBRoc.from_folder(annotations, images)
    units = UnitCheck()
    for image_id, found in read_fddb_predictions(predictions):
        metric.update(image_id, found)
        units.add(found)
    if units.hint():
        print(f"{predictions}: {units.hint()}", file=sys.stderr)
    return metric.compute(
        {ellipse: s3fd if ellipse == "s3fd" else ellipse for ellipse in ellipses},
        progress=partial(tqdm, unit="image", disable=None),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True, help="folder of result files, or one file")
    parser.add_argument("--annotations", type=Path, required=True, help="folder of the published folds")
    parser.add_argument("--images", type=Path, help="folder of the images (where there is no image_sizes.csv)")
    parser.add_argument("--ellipse", nargs="+", choices=("none", "fitted", "s3fd"), default=["none"])
    parser.add_argument("--regressor", type=Path, help="S3FD's Fit.mat")
    add_scores_flag(parser)
    parser.add_argument("--plot", type=Path, help="write the ROC curves to this image (.png, .pdf, .svg)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    add_debug_flag(parser)
    args = parser.parse_args(argv)

    with exit_on_error("evaluate_fddb.py", args):
        result = evaluate(args.predictions, args.annotations, args.images, args.ellipse, args.regressor)
        result = result.reporting(args.scores)
        print(result.table())
        print(
            "{images} images, {images_without_predictions} of them without predictions; {faces} faces".format(
                **result.counts
            )
        )
        # All or nothing: the last file to fail leaves no other behind.
        with atomic_file(args.json) if args.json else nullcontext() as file:
            if file:
                file.write((json.dumps(result.to_dict(), indent=2) + "\n").encode())
            if args.plot:
                result.plot(args.plot, title=f"FDDB: {args.predictions.name}")


if __name__ == "__main__":
    main()
