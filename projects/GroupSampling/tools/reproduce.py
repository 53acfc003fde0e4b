#!/usr/bin/env python
"""Train the rows of the paper's tables and figures, and compare the paper's values with ours.

    python projects/GroupSampling/tools/reproduce.py --table 1 3 4 5 --figure 2 4 --scale tiny --seeds 3 --jobs 2
    python projects/GroupSampling/tools/reproduce.py --table 1 --scale photos --seeds 2    # real photographs, hours
    python projects/GroupSampling/tools/reproduce.py --table 1 --scale wider               # at full size, 8 GPUs

Each row is one config under configs/, trained by train_net.py into its own folder for each seed. A row that several
tables share is trained once, a complete row is not repeated, and an interrupted one continues from its last checkpoint.
"tiny" is the built-in faces sized for two CPU cores: the overrides of configs/quick/tiny.yaml, and the row's numbers of
samples divided by 8, except that of OHEM. "photos" is likewise with configs/quick/photos.yaml, on photographs of WIDER
FACE's validation set below $DETECTRON2_DATASETS, its numbers of anchors divided by 32. "wider" changes nothing. Rows
that are compared and draw the same samples, so that only noise can set them apart, are named before anything is
trained.

Writes report.md, report.json and images/*.png under OUTPUT/SCALE; rows that were not run are marked there.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from group_sampling.env import ENGINES, resolve_engine
from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.experiments.reproduction import OVERRIDES, Reproduction
from group_sampling.experiments.reproduction_report import same_samples, warn_of, write_report
from group_sampling.experiments.rows import ABLATIONS
from group_sampling.project import CONFIGS, ROOT, TRAIN_NET


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, nargs="+", choices=range(1, 6), default=[], metavar="1..5")
    parser.add_argument("--figure", type=int, nargs="+", choices=(2, 4), default=[], metavar="2|4")
    parser.add_argument("--ablation", nargs="+", choices=ABLATIONS, default=[], help="not in the paper")
    parser.add_argument("--scale", choices=(*OVERRIDES, "wider"), required=True)
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="seeds 0 ... K - 1 (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="trainings at a time (default: 1)")
    parser.add_argument("--num-gpus", type=int, help="of a training (default: 8 for wider, else 1 process)")
    parser.add_argument("--output", type=Path, default=ROOT / "output/reproduce")
    parser.add_argument("--engine", default="auto", choices=("auto", *ENGINES))
    parser.add_argument("--known", type=Path, metavar="REPORT", help="do not repeat the trainings of this report.json")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is complete")
    add_debug_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of every config")
    args = parser.parse_args(argv)
    if not args.table and not args.figure and not args.ablation:
        parser.error("expected at least one --table, --figure or --ablation, got none")
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if len(args.opts) % 2:
        parser.error(f"expected pairs KEY VALUE after the options, got {args.opts}")
    return args


def reproduce(args: argparse.Namespace) -> None:
    reproduction = Reproduction(
        args.table,
        args.figure,
        args.ablation,
        scale=args.scale,
        num_seeds=args.seeds,
        folder=args.output,
        configs=CONFIGS,
        train_net=TRAIN_NET,
        engine=resolve_engine(args.engine),
        opts=args.opts,
        num_gpus=args.num_gpus,
        side_by_side=args.jobs,
        known=args.known,
    )
    start = time.monotonic()
    errors: list[str] = []
    try:
        if not args.report_only:
            for pair in same_samples(reproduction) or ():
                print(f"warning: {pair['experiment']}: {warn_of(pair)}", file=sys.stderr)
            errors = reproduction.train()
    finally:  # the report of an interrupted run marks what was not run
        report = write_report(reproduction)
        print(f"report after {math.ceil((time.monotonic() - start) / 60)} min: {report}")
    if errors:
        raise UserError(f"{len(errors)} trainings failed; the same command repeats them")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("reproduce.py", args):
        reproduce(args)


if __name__ == "__main__":
    main()
