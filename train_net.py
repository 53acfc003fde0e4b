#!/usr/bin/env python
"""Train or evaluate a detector of "Group Sampling for Scale Invariant Face Detection" from a config file.

    python train_net.py --config-file projects/GroupSampling/configs/fpn_finest_sampling.yaml --num-gpus 8
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    python train_net.py --config-file ... --resume SOLVER.BASE_LR 0.005

The flags are those of Detectron2's training scripts, --engine and --allow-partial-weights. Flags and KEY VALUE pairs
may come in any order.
"""

import argparse
import logging
from pathlib import Path

from fvcore.common.config import CfgNode

from group_sampling.env import ENGINES, collect_env, resolve_engine
from group_sampling.errors import add_debug_flag, describe, exit_on_error, is_expected
from group_sampling.experiments.report import write_report
from group_sampling.experiments.runs import Run
from group_sampling.project import CONFIGS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to config file")
    parser.add_argument(
        "--engine", default="auto", choices=("auto", *ENGINES), help="auto: Detectron2 where it is installed"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    parser.add_argument(
        "--allow-partial-weights", action="store_true", help="evaluate weights that do not fit the whole detector"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes per machine, one GPU each")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="unique number of this machine")
    parser.add_argument("--dist-url", default="auto", help="where the processes meet, tcp://host:port")
    add_debug_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_intermixed_args(argv)


def train(args: argparse.Namespace) -> None:
    engine = resolve_engine(args.engine)
    print(f"engine: {engine}" + (" (--engine auto)" if args.engine == "auto" else ""), flush=True)
    if engine == "detectron2":
        from group_sampling.engines.d2.train import main as run
    else:
        from group_sampling.engines.tv.train import main as run
    run(args, report)


def report(cfg: CfgNode) -> None:
    """Write the report of a run that has ended. Whatever goes wrong with it is a warning: the run has succeeded."""
    folder = Path(cfg.OUTPUT_DIR)
    name = folder.resolve().name
    try:
        path = write_report([Run(name, folder)], folder, title=name, configs=CONFIGS, environment=collect_env())
    except Exception as error:
        logger = logging.getLogger("group_sampling.report")
        logger.warning(f"{folder}: no report.html: {describe(error)}", exc_info=not is_expected(error))
    else:
        print(f"report: {path}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("train_net.py", args):
        train(args)


if __name__ == "__main__":
    main()
