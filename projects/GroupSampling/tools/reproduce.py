#!/usr/bin/env python
"""Train the rows of the paper's tables and figures, and set paper and ours side by side.

    python projects/GroupSampling/tools/reproduce.py --table 1 3 4 5 --figure 2 4 --scale tiny --seeds 3 --jobs 2
    python projects/GroupSampling/tools/reproduce.py --table 1 --scale wider          # the real thing, 8 GPUs

Each row is one config under configs/, trained by train_net.py into its own folder for each seed, so a row that several
tables share is trained once, a row that is complete is not repeated, and one that was interrupted goes on from its last
checkpoint. "tiny" is the built-in faces sized for two CPU cores: the overrides of configs/quick/tiny.yaml, and the
row's numbers of samples divided by 32 (RoIs by 8), since the images have 1/47 of the area of a 1,200 x 1,200 crop.
"wider" changes nothing.

Writes report.md, report.json and images/*.png under OUTPUT/SCALE; cells that were not run say so.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from fvcore.common.config import CfgNode

from group_sampling.config import ConfigError, get_value
from group_sampling.data.catalog import MissingDatasetError
from group_sampling.data.records import ImageRecord
from group_sampling.engines.build import load_records
from group_sampling.engines.tv.config import load_config
from group_sampling.env import ENGINES, resolve_engine
from group_sampling.experiments.balance import sample_balance
from group_sampling.experiments.jobs import Job, run_jobs
from group_sampling.experiments.report import Run, plot_ap_bars, plot_ap_lines, plot_samples
from group_sampling.files import write_atomically

PROJECT = Path(__file__).resolve().parents[1]
REPOSITORY = PROJECT.parents[1]
TRAIN_NET = REPOSITORY / "train_net.py"
CONFIGS = PROJECT / "configs"
TINY = CONFIGS / "quick/tiny.yaml"
PAPER = Path(__file__).with_name("paper_values.yaml")

# What "tiny" divides a row's numbers of samples by: anchors as the area of the images, RoIs by less, since a 32nd of
# them would leave one face of every scale.
COUNT_DIVISORS = {
    "MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP": 32,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP": 8,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
}
FIGURE4_SAMPLES = (256, 512, 1024, 2048, 4096)
TABLE_SAMPLES = 2048
MARKER = "reproduce.json"  # in a row's folder: its settings, and how long it took once it is complete
NOT_RUN = "not run"
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of Figure 4.

    Attributes:
        label: as the report names it.
        config: YAML below configs/, without suffix.
    """

    label: str
    config: str


@dataclass(frozen=True)
class Experiment:
    """A table, or Figure 4.

    Attributes:
        title: heading.
        rows: what is trained.
        comparisons: pairs (a, b) of configs whose difference in AP over all faces the report states, seed by seed, and
            whether the paper has a above b, as far as that was checked ("?" if it was not).
    """

    title: str
    rows: tuple[Row, ...]
    comparisons: tuple[tuple[str, str, str], ...]


DETECTORS = (
    Row("RPN (C4)", "rpn_c4"),
    Row("FPN", "fpn"),
    Row("FPN-finest-stride", "fpn_finest_stride"),
    Row("FPN-finest", "fpn_finest"),
    Row("FPN-finest-sampling", "fpn_finest_sampling"),
)
_FEATURES = {
    "P2-P5": ("fpn", "table2/fpn_sampling"),
    "P2": ("fpn_finest", "fpn_finest_sampling"),
    "P3": ("table2/p3", "table2/p3_sampling"),
    "P4": ("table2/p4", "table2/p4_sampling"),
    "C3": ("table2/c3", "table2/c3_sampling"),
    "C4": ("rpn_c4", "table2/c4_sampling"),
}
_FIGURE4_DETECTORS = {
    row.config: row.label for row in DETECTORS if row.config in ("fpn", "fpn_finest", "fpn_finest_sampling")
}


def _figure4_config(detector: str, n: int) -> str:
    """The point N = 2,048 is the detector of Table 1: it need not be trained again."""
    return detector if n == TABLE_SAMPLES else f"figure4/{detector}_n{n}"


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: the five detectors",
        DETECTORS,
        (
            ("fpn_finest_sampling", "fpn_finest", "above"),
            ("fpn_finest_sampling", "fpn_finest_stride", "above"),
            ("fpn_finest_stride", "fpn", "close"),
            ("fpn", "rpn_c4", "?"),
        ),
    ),
    "table2": Experiment(
        "Table 2: features, with and without group sampling",
        tuple(
            Row(f"{feature}, {sampler}", config)
            for feature, configs in _FEATURES.items()
            for sampler, config in zip(("uniform", "group sampling"), configs)
        ),
        tuple((group, uniform, "above" if f == "P2" else "?") for f, (uniform, group) in _FEATURES.items())
        + (("table2/p3_sampling", "fpn_finest_sampling", "above"),),
    ),
    "table3": Experiment(
        "Table 3: regression loss",
        (
            Row("RPN, smooth L1", "table3/smooth_l1"),
            Row("RPN, -ln IoU", "table3/iou_log"),
            Row("RPN, ‖1 - IoU‖²", "fpn_finest_sampling"),
            Row("Fast R-CNN, smooth L1", "table3/fast_rcnn_smooth_l1"),
            Row("Fast R-CNN, -ln IoU", "table3/fast_rcnn_iou_log"),
            Row("Fast R-CNN, ‖1 - IoU‖²", "table5/grouped_fast_rcnn"),
        ),
        (
            ("fpn_finest_sampling", "table3/smooth_l1", "?"),
            ("fpn_finest_sampling", "table3/iou_log", "?"),
            ("table5/grouped_fast_rcnn", "table3/fast_rcnn_smooth_l1", "?"),
            ("table5/grouped_fast_rcnn", "table3/fast_rcnn_iou_log", "?"),
        ),
    ),
    "table4": Experiment(
        "Table 4: OHEM, focal loss and group sampling",
        (
            Row("FPN-finest", "fpn_finest"),
            Row("OHEM", "table4/ohem"),
            Row("focal loss", "table4/focal"),
            Row("group sampling", "fpn_finest_sampling"),
        ),
        (
            ("fpn_finest_sampling", "fpn_finest", "above"),
            ("fpn_finest_sampling", "table4/ohem", "above"),
            ("fpn_finest_sampling", "table4/focal", "above"),
        ),
    ),
    "table5": Experiment(
        "Table 5: the second stage",
        (
            Row("FPN-finest-sampling", "fpn_finest_sampling"),
            Row("+ Fast R-CNN", "table5/fast_rcnn"),
            Row("+ IoU loss", "table5/fast_rcnn_iou"),
            Row("+ group sampling (Grouped Fast R-CNN)", "table5/grouped_fast_rcnn"),
        ),
        (
            ("table5/fast_rcnn", "fpn_finest_sampling", "?"),
            ("table5/fast_rcnn_iou", "table5/fast_rcnn", "?"),
            ("table5/grouped_fast_rcnn", "table5/fast_rcnn_iou", "?"),
            ("table5/grouped_fast_rcnn", "fpn_finest_sampling", "?"),
        ),
    ),
    "figure4": Experiment(
        "Figure 4: number of samples N of every scale",
        tuple(
            Row(f"{label}, N = {n}", _figure4_config(config, n))
            for config, label in _FIGURE4_DETECTORS.items()
            for n in FIGURE4_SAMPLES
        ),
        tuple(
            (_figure4_config("fpn_finest_sampling", n), _figure4_config("fpn_finest", n), "?") for n in FIGURE4_SAMPLES
        ),
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, nargs="+", choices=range(1, 6), default=[], metavar="1..5")
    parser.add_argument("--figure", type=int, nargs="+", choices=(2, 4), default=[], metavar="2|4")
    parser.add_argument("--scale", choices=("tiny", "wider"), required=True)
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="seeds 0 ... K - 1 (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="trainings side by side (default: 1)")
    parser.add_argument("--num-gpus", type=int, help="of a training (default: 8 for wider, 1 process for tiny)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "output/reproduce")
    parser.add_argument("--engine", default="auto", choices=("auto", *ENGINES))
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report of what is there")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of every config")
    args = parser.parse_args(argv)
    if not args.table and not args.figure:
        parser.error("name at least one --table or --figure")
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if len(args.opts) % 2:
        parser.error(f"expected pairs KEY VALUE after the options, got {args.opts}")
    return args


class Reproduction:
    """What the arguments ask for: which trainings, where, with which settings."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = args.output.resolve() / args.scale
        self.engine = resolve_engine(args.engine)
        self.seeds = list(range(args.seeds))
        names = [f"table{number}" for number in args.table]
        names += ["figure4"] if 4 in args.figure else []
        self.experiments = {name: EXPERIMENTS[name] for name in dict.fromkeys(names)}
        self.has_figure2 = 2 in args.figure
        rows = [row for experiment in self.experiments.values() for row in experiment.rows]
        self.configs = list(dict.fromkeys(row.config for row in rows))
        needed = dict.fromkeys(self.configs + ([row.config for row in DETECTORS] if self.has_figure2 else []))
        missing = [str(CONFIGS / f"{config}.yaml") for config in needed if not (CONFIGS / f"{config}.yaml").exists()]
        if missing:
            raise ConfigError("no such config, but a row that was asked for needs it:\n  " + "\n  ".join(missing))
        self.opts = {config: scale_opts(config, args.scale) + args.opts for config in needed}
        self.dataset = self.config(next(iter(needed))).DATASETS.TEST[0]

    def config(self, config: str) -> CfgNode:
        # It is read here and run elsewhere: that there is no GPU here is no matter.
        return load_config(str(CONFIGS / f"{config}.yaml"), [*self.opts[config], "MODEL.DEVICE", "cpu"])

    def run(self, config: str, seed: int) -> Run:
        return Run(config, self.folder / config / f"seed{seed}")

    def settings(self, config: str) -> dict:
        """What a finished training must have been run with to count."""
        return {"config": config, "engine": self.engine, "opts": self.opts[config]}

    def marker(self, config: str, seed: int) -> dict | None:
        """What the folder of a training says of it; None: it was never started.

        Raises:
            ConfigError: it was started with other settings.
        """
        file = self.run(config, seed).folder / MARKER
        if not file.exists():
            return None
        content = json.loads(file.read_text())
        settings = self.settings(config)
        found = {key: content.get(key) for key in settings}
        if found != settings:
            raise ConfigError(
                f"{file.parent} was run with other settings:\n  found    {found}\n  expected {settings}\n"
                "Remove that folder, or name another --output."
            )
        return content

    def ap(self, config: str, seed: int) -> dict[str, float] | None:
        """AP in percent of every subset, or None: not run."""
        marker = self.marker(config, seed)
        if marker is None or "seconds" not in marker:
            return None
        ap = self.run(config, seed).results(self.dataset)["ap"]
        return {subset: 100 * value for subset, value in ap.items() if value is not None}

    def jobs(self) -> Iterator[tuple[Job, str]]:
        """The trainings that are not complete, seed by seed, and their configs."""
        for seed in self.seeds:
            for config in self.configs:
                marker = self.marker(config, seed)
                if marker is not None and "seconds" in marker:
                    continue
                folder = self.run(config, seed).folder
                num_gpus = self.args.num_gpus or (8 if self.args.scale == "wider" else 1)
                command = [sys.executable, str(TRAIN_NET), "--engine", self.engine, "--resume"]
                command += ["--num-gpus", str(num_gpus), "--config-file", str(CONFIGS / f"{config}.yaml")]
                command += [*self.opts[config], "SEED", str(seed), "OUTPUT_DIR", str(folder)]
                yield Job(f"{config} seed {seed}", command, folder), config

    def train(self) -> list[str]:
        """Run what is not complete; returns what went wrong."""
        jobs = list(self.jobs())
        total = len(self.configs) * len(self.seeds)
        print(f"engine {self.engine}: {total} trainings, {total - len(jobs)} of them complete in {self.folder}")
        config_of = {job.folder: config for job, config in jobs}
        for folder, config in config_of.items():
            write_json(folder / MARKER, self.settings(config))
        # One thread each: J processes with a pool of threads each would fight for the cores.
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.args.scale == "tiny" else {}
        errors = []
        outcomes = run_jobs(
            [job for job, _ in jobs],
            side_by_side=self.args.jobs,
            working_directory=REPOSITORY,
            environment=environment,
        )
        for outcome in outcomes:
            if outcome.error:
                errors.append(outcome.error)
                print(f"\n{outcome.error}", file=sys.stderr)
                continue
            settings = self.settings(config_of[outcome.job.folder])
            write_json(outcome.job.folder / MARKER, {**settings, "seconds": round(outcome.seconds, 1)})
        return errors


def scale_opts(config: str, scale: str) -> list[str]:
    """The overrides KEY VALUE ... that turn a row's config into that of ``scale``."""
    if scale == "wider":
        return []
    opts = [part for key, value in flatten(yaml.safe_load(TINY.read_text())) for part in (key, str(value))]
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), ["MODEL.DEVICE", "cpu"])
    for key, divisor in COUNT_DIVISORS.items():
        opts += [key, str(max(1, get_value(cfg, key) // divisor))]
    return opts


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("A.B", value) for every leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def statistics(values: Sequence[float]) -> dict:
    """Every value, their mean and standard deviation (n - 1); None where there are too few."""
    return {
        "seeds": [round(value, 2) for value in values],
        "mean": round(float(np.mean(values)), 2) if values else None,
        "std": round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None,
    }


def experiment_results(reproduction: Reproduction, experiment: Experiment, paper: Mapping) -> dict:
    """Paper and ours of every row, and the comparisons."""
    rows = []
    for row in experiment.rows:
        aps = [ap for seed in reproduction.seeds if (ap := reproduction.ap(row.config, seed)) is not None]
        subsets = list(dict.fromkeys(subset for ap in aps for subset in ap))
        ours = {subset: statistics([ap[subset] for ap in aps if subset in ap]) for subset in subsets}
        rows.append(
            {
                "label": row.label,
                "config": row.config,
                "paper": paper.get(row.config, {}),
                "ours": ours,
                "runs": len(aps),
            }
        )
    label = {row.config: row.label for row in experiment.rows}
    comparisons = []
    for a, b, claim in experiment.comparisons:
        differences = []
        for seed in reproduction.seeds:
            pair = reproduction.ap(a, seed), reproduction.ap(b, seed)
            if None not in pair:
                differences.append(pair[0]["all"] - pair[1]["all"])
        comparisons.append({"a": label[a], "b": label[b], "paper": claim, "a_minus_b": statistics(differences)})
    return {"title": experiment.title, "rows": rows, "comparisons": comparisons}


def figure2_results(reproduction: Reproduction) -> dict:
    """Samples of every scale under the five detectors, over the seeds."""
    rows = []
    records: dict[str, list[ImageRecord]] = {}  # the five detectors train on the same images
    for row in DETECTORS:
        cfg = reproduction.config(row.config)
        key = repr(cfg.DATASETS)
        if key not in records:
            records[key] = load_records(cfg, cfg.DATASETS.TRAIN)
        balances = [sample_balance(cfg, records[key], seed=seed).per_scale() for seed in reproduction.seeds]
        rows.append(
            {
                "label": row.label,
                "config": row.config,
                "samples": {
                    scale: {
                        kind: statistics([balance[scale][k] for balance in balances])
                        for k, kind in enumerate(("positives", "negatives"))
                    }
                    for scale in balances[0]
                },
            }
        )
    return {"title": "Figure 2: samples of every scale in a training image", "rows": rows}


def markdown(results: dict) -> str:
    """The report as Markdown, headings from level 3 on."""
    about = results["about"]
    lines = [
        f"Scale `{about['scale']}`, {about['engine']} engine, {len(about['seeds'])} seeds, data set "
        f"`{about['data_set']}`, torch {about['torch']}, {about['machine']}. {about['note']}",
        "",
        "AP in %: *paper* / *ours*, ours as mean ± standard deviation over the seeds. `?`: the paper's value, or what "
        f"it says of a pair, is not at hand; `{NOT_RUN}`: not run.",
    ]
    for name, experiment in results["experiments"].items():
        lines += ["", f"### {experiment['title']}", ""]
        lines += _figure2_table(experiment) if name == "figure2" else _ap_table(experiment)
        lines += ["", f"![{experiment['title']}](images/{_image(about['scale'], name)})"]
        if name != "figure2":
            lines += ["", *_comparison_table(experiment)]
    return "\n".join(lines) + "\n"


def _ap_table(experiment: dict) -> list[str]:
    found = [subset for row in experiment["rows"] for subset in (*row["ours"], *row["paper"])]
    order = ("easy", "medium", "hard", "all")
    subsets = sorted(
        dict.fromkeys(found or ["all"]), key=lambda s: (0, order.index(s)) if s in order else (1, float(s.lstrip("@")))
    )
    lines = ["| | config | " + " | ".join(s.capitalize() for s in subsets) + " |"]
    lines.append("|---|---|" + "---|" * len(subsets))
    for row in experiment["rows"]:
        cells = [f"{row['paper'].get(s, '?')} / {_value(row['ours'].get(s))}" for s in subsets]
        lines.append(f"| {row['label']} | `{row['config']}` | " + " | ".join(cells) + " |")
    return lines


def _comparison_table(experiment: dict) -> list[str]:
    lines = ["| compared (All) | in the paper | ours: difference | seeds with a difference > 0 |", "|---|---|---|---|"]
    for pair in experiment["comparisons"]:
        difference = pair["a_minus_b"]
        seeds = difference["seeds"]
        count = f"{sum(value > 0 for value in seeds)} of {len(seeds)}" if seeds else NOT_RUN
        lines.append(f"| {pair['a']} - {pair['b']} | {pair['paper']} | {_value(difference, sign='+')} | {count} |")
    return lines


def _figure2_table(experiment: dict) -> list[str]:
    scales = list(experiment["rows"][0]["samples"])
    lines = ["| positives / negatives in an image | " + " | ".join(f"@{scale}" for scale in scales) + " |"]
    lines.append("|---|" + "---|" * len(scales))
    for row in experiment["rows"]:
        cells = [" / ".join(f"{kind['mean']:.1f}" for kind in row["samples"][scale].values()) for scale in scales]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return lines


def _value(value: dict | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return NOT_RUN
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:{sign}.1f}{spread}"


def _image(scale: str, name: str) -> str:
    return f"reproduce_{scale}_{name}.png"


def draw(name: str, experiment: dict, path: Path, scale: str) -> None:
    """The PNG of a table or figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "figure2":
        samples = {
            row["label"]: {s: tuple(kind["mean"] for kind in kinds.values()) for s, kinds in row["samples"].items()}
            for row in experiment["rows"]
        }
        plot_samples(samples, path, log=True)
        return

    def pair(value: dict | None) -> tuple[float, float]:
        return (NAN, NAN) if value is None else (value["mean"], value["std"] or 0.0)

    if name == "figure4":
        lines = {label: [] for label in _FIGURE4_DETECTORS.values()}
        for row in experiment["rows"]:
            label, n = row["label"].split(", N = ")
            lines[label].append((n, *pair(row["ours"].get("all"))))
        plot_ap_lines(lines, path, xlabel="N of the config" + (", of which 1/32 is drawn" if scale == "tiny" else ""))
        return
    plot_ap_bars(
        {row["label"]: {s: pair(v) for s, v in row["ours"].items()} for row in experiment["rows"]},
        path,
        paper={row["label"]: row["paper"] for row in experiment["rows"]},
    )


def write_report(reproduction: Reproduction) -> Path:
    """Write report.json, the images and, last, report.md; returns its path."""
    paper = yaml.safe_load(PAPER.read_text())
    scale = reproduction.args.scale
    notes = {
        "tiny": f"Each row is its config with the overrides of `configs/quick/{TINY.name}`, its number of anchors "
        "drawn divided by 32 and that of RoIs by 8: a small network from scratch on procedural faces. Order and "
        "differences can be compared with the paper's, absolute values cannot.",
        "wider": "Each row is its config as it stands.",
    }
    results = {
        "about": {
            "scale": scale,
            "engine": reproduction.engine,
            "seeds": reproduction.seeds,
            "data_set": reproduction.dataset,
            "torch": torch.__version__,
            "machine": f"{platform.processor() or platform.machine()}",
            "overrides": reproduction.args.opts,
            "note": notes[scale],
        },
        "experiments": {},
    }
    if reproduction.has_figure2:
        results["experiments"]["figure2"] = figure2_results(reproduction)
    for name, experiment in reproduction.experiments.items():
        results["experiments"][name] = experiment_results(reproduction, experiment, paper.get(name, {}))
    for name, experiment in results["experiments"].items():
        draw(name, experiment, reproduction.folder / "images" / _image(scale, name), scale)
    write_json(reproduction.folder / "report.json", results)
    write_atomically(reproduction.folder / "report.md", markdown(results).encode())
    return reproduction.folder / "report.md"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    reproduction = Reproduction(args)
    start = time.monotonic()
    errors: list[str] = []
    try:
        if not args.report_only:
            errors = reproduction.train()
    finally:  # an interrupted table is a table with cells that were not run
        report = write_report(reproduction)
        print(f"report after {math.ceil((time.monotonic() - start) / 60)} min: {report}")
    if errors:
        sys.exit(f"{len(errors)} trainings failed; the same command tries them again")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, MissingDatasetError) as error:  # the user's to mend; a traceback would hide the message
        sys.exit(f"reproduce.py: {error}")
