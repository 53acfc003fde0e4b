#!/usr/bin/env python
"""The demo: train FPN-finest and FPN-finest-sampling on the built-in faces, evaluate both, and write a report.

    python projects/GroupSampling/tools/demo.py
    python projects/GroupSampling/tools/demo.py --seeds 0 1 2    # mean and spread over seeds

Both runs differ in MODEL.GROUP_SAMPLING.SAMPLER alone. A run that is complete is not repeated unless --fresh is given;
one that was interrupted continues.
"""

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from group_sampling import project
from group_sampling.env import ENGINES, collect_env, resolve_engine
from group_sampling.errors import UserError, add_debug_flag, exit_on_error
from group_sampling.experiments.jobs import Job, run_jobs
from group_sampling.experiments.report import write_report
from group_sampling.experiments.runs import Run
from group_sampling.files import read_json, write_json

CONFIGS = project.CONFIGS / "quick"
DETECTORS = {"FPN-finest": "demo_fpn_finest", "FPN-finest-sampling": "demo_fpn_finest_sampling"}
DATASET = "synthetic_faces_val"
MARKER = "demo.json"  # in a run's folder: its settings


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=project.ROOT / "output/demo")
    parser.add_argument("--engine", default="auto", choices=("auto", *ENGINES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="also write the AP of every seed, mean and spread to this file")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are complete")
    add_debug_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_args(argv)


def job(config: str, engine: str, folder: Path, seed: int, opts: list[str], title: str) -> Job:
    command = [sys.executable, str(project.TRAIN_NET), "--engine", engine, "--resume"]
    command += ["--config-file", str(CONFIGS / f"{config}.yaml"), "OUTPUT_DIR", str(folder.resolve())]
    command += ["SEED", str(seed), *opts]
    return Job(title, command, folder)


def summarize(runs: dict[str, list[Run]], seeds: list[int], engine: str) -> dict:
    """AP in percent of every detector: each seed, mean and standard deviation (n - 1)."""
    summary = {
        "engine": engine,
        "seeds": seeds,
        "data_set": DATASET,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "ap_percent": {},
    }
    for name, seeds_of_run in runs.items():
        results = [run.results(DATASET)["ap"] for run in seeds_of_run]
        summary["ap_percent"][name] = {subset: statistics([ap[subset] for ap in results]) for subset in results[0]}
    return summary


def statistics(values: list[float | None]) -> dict:
    """Of a subset's AP, by seed; None where it has no faces, and then there is no mean."""
    percent = [None if value is None else round(100 * value, 2) for value in values]
    if None in values:
        return {"seeds": percent, "mean": None, "std": None}
    std = round(100 * float(np.std(values, ddof=1)), 2) if len(values) > 1 else None
    return {"seeds": percent, "mean": round(100 * float(np.mean(values)), 2), "std": std}


def show(value: dict) -> str:
    if value["mean"] is None:
        return "n/a"
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def is_complete(run: Run, settings: dict) -> bool:
    """Whether a run has its results; one that was made with other settings is deleted before that.

    Raises:
        UserError: it has results of other settings.
    """
    marker = run.folder / MARKER
    found = read_json(marker) if marker.exists() else None
    has_results = (run.folder / "inference" / DATASET / "results.json").exists()
    if found != settings and has_results:
        raise UserError(
            f"{run.folder}: expected a run with the settings {settings}, got one with {found}; --fresh repeats it, "
            "and --output FOLDER keeps it"
        )
    if found != settings:
        shutil.rmtree(run.folder, ignore_errors=True)
        write_json(marker, settings)
    return has_results


def demo(args: argparse.Namespace) -> None:
    engine = resolve_engine(args.engine)
    print(f"engine: {engine}")
    runs: dict[str, list[Run]] = {name: [] for name in DETECTORS}
    jobs = []
    for seed in args.seeds:
        for name, config in DETECTORS.items():
            run = Run(name, args.output / f"seed{seed}" / config)
            runs[name].append(run)
            title = f"{name}, seed {seed}"
            if args.fresh:
                shutil.rmtree(run.folder, ignore_errors=True)
            if is_complete(run, {"engine": engine, "opts": args.opts}):
                print(f"{title}: complete in {run.folder} (--fresh repeats it)")
            else:
                jobs.append(job(config, engine, run.folder, seed, args.opts, title))
    for outcome in run_jobs(jobs, working_directory=project.ROOT):
        if outcome.error:
            raise UserError(outcome.error)

    summary = summarize(runs, args.seeds, engine)
    write_json(args.output / "summary.json", summary)
    if args.json:
        write_json(args.json, summary)

    first = [seeds_of_run[0] for seeds_of_run in runs.values()]
    solver = first[0].config["SOLVER"]
    notes = [
        f"Both detectors were trained from scratch by train_net.py ({engine} engine) with one seed, data set and "
        f"schedule: {solver['MAX_ITER']} iterations of {solver['IMS_PER_BATCH']} images. They differ in "
        "MODEL.GROUP_SAMPLING.SAMPLER alone."
    ]
    for name, subsets in summary["ap_percent"].items():
        if len(args.seeds) > 1:
            values = ", ".join(f"{subset.capitalize()} {show(value)}" for subset, value in subsets.items())
            notes.append(
                f"{name} over seeds {args.seeds}: {values}. The table and figures below are of seed {args.seeds[0]}."
            )
        print(
            f"{name:22s}" + "".join(f"  {subset.capitalize()} {show(value):>5s}" for subset, value in subsets.items())
        )
    report = write_report(
        first,
        args.output,
        title="FPN-finest against FPN-finest-sampling",
        configs=CONFIGS.parent,
        notes=notes,
        environment=collect_env(),
    )
    print(f"report: {report}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error("demo.py", args):
        demo(args)


if __name__ == "__main__":
    main()
