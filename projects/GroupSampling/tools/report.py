#!/usr/bin/env python
"""Write the report of a run again, or of several runs side by side.

    python projects/GroupSampling/tools/report.py output/fpn_finest_sampling
    python projects/GroupSampling/tools/report.py output/first output/second --output output/comparison

A training and an evaluation write report.html into their folder by themselves. This reads what they have left there,
config.yaml, metrics.json and inference/, and the images of the test sets, for the mistakes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.experiments.report import write_report
from group_sampling.experiments.runs import Run
from group_sampling.project import CONFIGS


def write(folders: Sequence[Path], output: Path | None) -> Path:
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: expected the folder of a run, got none with a config.yaml")
    if output is None and len(folders) > 1:
        raise UserError("--output: expected a folder for the report of several runs")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [Run(name, folder) for name, folder in zip(names, folders)]
    return write_report(runs, output or folders[0], title=" and ".join(names), configs=CONFIGS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a run")
    parser.add_argument("--output", type=Path, help="where to write (default: the folder of the run)")
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    with exit_on_error("report.py", args):
        print(f"report: {write(args.folders, args.output)}")


if __name__ == "__main__":
    main()
