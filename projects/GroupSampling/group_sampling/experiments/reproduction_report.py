"""The report of a reproduction: the paper's values next to ours, as Markdown, JSON and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.catalog import MissingDatasetError
from ..data.records import ImageRecord
from ..engines.build import load_records
from ..files import write_atomically, write_json
from .balance import sample_balance
from .claims import paper_values
from .plots import plot_ap_bars, plot_ap_lines, plot_samples
from .reproduction import COUNT_DIVISORS, OVERRIDES, Reproduction
from .rows import FIGURE4_DETECTORS, Experiment
from .verdicts import Judgment, judge, sample_shares, seed_noise
from .verdicts import markdown as verdict_table

NOT_RUN = "not run"
NAN = float("nan")


def statistics(values: Sequence[float]) -> dict:
    """Every value, their mean and standard deviation (n - 1); None where there are too few."""
    return {
        "seeds": [round(value, 2) for value in values],
        "mean": round(float(np.mean(values)), 2) if values else None,
        "std": round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None,
    }


def experiment_results(reproduction: Reproduction, experiment: Experiment, paper: Mapping) -> dict:
    """Paper and ours of every row: "ours" on the first data set, "elsewhere" on each of the others."""
    first, *others = reproduction.datasets
    rows = []
    for row in experiment.rows:
        ours, runs = _over_seeds(reproduction, row.config, first)
        rows.append(
            {
                "label": row.label,
                "config": row.config,
                "paper": paper.get(row.config, {}),
                "ours": ours,
                "elsewhere": {name: _over_seeds(reproduction, row.config, name)[0] for name in others},
                "runs": runs,
            }
        )
    return {"title": experiment.title, "rows": rows}


def _over_seeds(reproduction: Reproduction, config: str, dataset: str) -> tuple[dict[str, dict], int]:
    """Statistics of every subset, and the number of trainings behind them."""
    aps = [ap for seed in reproduction.seeds if (ap := reproduction.ap(config, seed, dataset)) is not None]
    subsets = list(dict.fromkeys(subset for ap in aps for subset in ap))
    return {subset: statistics([ap[subset] for ap in aps if subset in ap]) for subset in subsets}, len(aps)


def judgments(reproduction: Reproduction, figure2: dict | None) -> list[Judgment]:
    """What the paper claims of the order of the results that were asked for, and whether ours agree.

    Args:
        figure2: of :func:`figure2_results`, if that was asked for.
    """
    measured: dict[str, dict[str, Sequence[float | None]]] = {}
    for experiment in reproduction.experiments.values():
        for row in experiment.rows:
            aps = [reproduction.ap(row.config, seed) or {} for seed in reproduction.seeds]
            subsets = {subset for ap in aps for subset in ap}
            measured[row.config] = {subset: [ap.get(subset) for ap in aps] for subset in sorted(subsets)}
    samples = {}
    for row in figure2["rows"] if figure2 else ():
        values = [[kind["seeds"] for kind in kinds.values()] for kinds in row["samples"].values()]
        samples[row["config"]] = [
            {scale: (positives[i], negatives[i]) for scale, (positives, negatives) in zip(row["samples"], values)}
            for i in range(len(reproduction.seeds))
        ]
    for config, shares in sample_shares(samples).items():
        measured.setdefault(config, {}).update(shares)
    asked = set(reproduction.experiments) | ({"figure2"} if figure2 else set())
    found = judge(measured, noise=seed_noise(measured))
    return [judgment for judgment in found if judgment.ordering.experiment in asked]


def same_samples(reproduction: Reproduction) -> list[dict] | None:
    """Pairs of rows that train on the same samples; None: not known, since the data set is not here."""
    try:
        return [
            {"experiment": name, "rows": [a.label, b.label], "total_variation": round(distance, 4)}
            for name, a, b, distance in reproduction.same_samples
        ]
    except MissingDatasetError:
        return None


def figure2_results(reproduction: Reproduction) -> dict:
    """Samples of every scale under the five detectors, over the seeds."""
    rows = []
    records: dict[str, list[ImageRecord]] = {}  # the five detectors train on the same images
    for row in reproduction.figure2_rows:
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


def markdown(results: dict, found: Sequence[Judgment]) -> str:
    """The report as Markdown, headings from level 3 on.

    Args:
        found: of :func:`judgments`.
    """
    about = results["about"]
    lines = [
        f"Scale `{about['scale']}`, {about['engine']} engine, {len(about['seeds'])} seeds, data set "
        f"`{about['data_sets'][0]}`. {len(results['trainings'])} trainings, {about['hours']:.1f} hours of training and "
        f"evaluation in all{_ran_on(results['trainings'])}. {about['note']}",
        "",
        "AP in %: *paper* / *ours*, ours as mean ± standard deviation over the seeds. –: the paper has no such number; "
        f"`{NOT_RUN}`: not run. A claim of the paper *agrees* or *disagrees* with ours if the 90 % confidence interval "
        "over the seeds allows no other verdict (`group_sampling/experiments/verdicts.py`).",
    ]
    for name, experiment in results["experiments"].items():
        lines += ["", f"### {experiment['title']}", ""]
        lines += _figure2_table(experiment) if name == "figure2" else _ap_table(experiment["rows"])
        for dataset in about["data_sets"][1:] if name != "figure2" else ():
            elsewhere = [{**row, "paper": {}, "ours": row["elsewhere"][dataset]} for row in experiment["rows"]]
            lines += ["", f"The same detectors on `{dataset}`:", "", *_ap_table(elsewhere)]
        lines += ["", f"![{experiment['title']}](images/{_image(about['scale'], name)})"]
        pairs = [pair for pair in results["same_samples"] or () if pair["experiment"] == name]
        lines += [line for pair in pairs for line in ("", warn_of(pair))]
        claims = [judgment for judgment in found if judgment.ordering.experiment == name]
        if claims:
            lines += ["", *verdict_table(claims)]
    return "\n".join(lines) + "\n"


def warn_of(pair: dict) -> str:
    """What :func:`same_samples` found, in words."""
    a, b = pair["rows"]
    return (
        f"{a} and {b} draw the same samples (total variation {100 * pair['total_variation']:.2g} %) and differ in "
        "nothing else: they are one training run twice."
    )


def _ran_on(trainings: Sequence[dict]) -> str:
    machines: dict[str, None] = {}
    for training in trainings:
        hardware = training["hardware"]
        machines[f"{hardware.get('gpu', hardware['cpu'])}, torch {training['torch']}"] = None
    return f" ({'; '.join(machines)})" if machines else ""


def _ap_table(rows: Sequence[dict]) -> list[str]:
    found = [subset for row in rows for subset in (*row["ours"], *row["paper"])]
    order = ("easy", "medium", "hard", "all")
    subsets = sorted(
        dict.fromkeys(found or ["all"]), key=lambda s: (0, order.index(s)) if s in order else (1, float(s.lstrip("@")))
    )
    lines = ["| | config | " + " | ".join(s.capitalize() for s in subsets) + " |"]
    lines.append("|---|---|" + "---|" * len(subsets))
    for row in rows:
        cells = [f"{row['paper'].get(s, '–')} / {_value(row['ours'].get(s))}" for s in subsets]
        lines.append(f"| {row['label']} | `{row['config']}` | " + " | ".join(cells) + " |")
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
        lines: dict[str, list[tuple[str, float, float]]] = {label: [] for label in FIGURE4_DETECTORS.values()}
        for row in experiment["rows"]:
            label, n = row["label"].split(", N = ")
            lines[label].append((n, *pair(row["ours"].get("all"))))
        share = f", of which 1/{COUNT_DIVISORS[scale][0]} is drawn" if scale in OVERRIDES else ""
        plot_ap_lines(lines, path, xlabel=f"N of the config{share}")
        return
    plot_ap_bars(
        {row["label"]: {s: pair(v) for s, v in row["ours"].items()} for row in experiment["rows"]},
        path,
        paper={row["label"]: row["paper"] for row in experiment["rows"]},
    )


def write_report(reproduction: Reproduction) -> Path:
    """Write report.json, the images and, last, report.md; returns its path."""
    scale, paper = reproduction.scale, paper_values()
    note = "Each row is its config as it stands."
    if scale in OVERRIDES:
        where = {"tiny": "procedural faces", "photos": "1,300 photographs"}[scale]
        note = (
            f"Each row is its config with the overrides of `configs/{OVERRIDES[scale]}`, its numbers of anchors and "
            "RoIs drawn divided by {} and {}, except OHEM's: a small network from scratch on {}. Order and "
            "differences can be compared with the paper's, absolute values cannot."
        ).format(*COUNT_DIVISORS[scale], where)
    trainings = [
        training
        for config in reproduction.configs
        for seed in reproduction.seeds
        if (training := reproduction.training(config, seed)) is not None
    ]
    if not all(reproduction.config(config).TEST.PYRAMID.SCALES for config in reproduction.configs):
        note += (
            " The test is of a single scale, where a sub-detector finds few faces but those of its size: @s of the "
            "paper are of an image pyramid."
        )
    results: dict[str, Any] = {
        "about": {
            "scale": scale,
            "engine": reproduction.engine,
            "seeds": reproduction.seeds,
            "data_sets": list(reproduction.datasets),
            "hours": round(sum(training["seconds"] for training in trainings) / 3600, 2),
            "overrides": reproduction.overrides,
            "note": note,
        },
        "same_samples": same_samples(reproduction),
        "trainings": trainings,
        "experiments": {},
    }
    if reproduction.figure2_rows:
        results["experiments"]["figure2"] = figure2_results(reproduction)
    for name, experiment in reproduction.experiments.items():
        results["experiments"][name] = experiment_results(reproduction, experiment, paper.get(name, {}))
    found = judgments(reproduction, results["experiments"].get("figure2"))
    results["claims"] = [judgment.to_dict() for judgment in found]
    for name, experiment in results["experiments"].items():
        draw(name, experiment, reproduction.folder / "images" / _image(scale, name), scale)
    write_json(reproduction.folder / "report.json", results)
    write_atomically(reproduction.folder / "report.md", markdown(results, found).encode())
    return reproduction.folder / "report.md"
