"""The figures of the reports: samples of every scale, average precision, losses, and detections on an image."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import ImageRecord
from ..detections import Detections
from ..evaluation import WiderFaceAP
from ..files import save_figure
from .runs import Run

FACE_COLOR, FOUND_COLOR = "lime", "red"


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure  # draws off screen and leaves the caller's backend alone

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def plot_samples(
    samples: Mapping[str, Mapping[str, tuple[float, float]]],
    path: Path,
    *,
    log: bool = False,
    columns: int = 5,
    ylabel: str = "samples per image",
) -> None:
    """Bars of positives and negatives of every scale, one panel per detector (paper, Fig. 2).

    Args:
        samples: name of the detector -> anchor scale -> positives and negatives, in the unit that ``ylabel`` names.
        log: logarithmic axis, for detectors whose counts differ by orders of magnitude.
        columns: panels in a row.
    """
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    figure = new_figure(max(3.6, 10 / columns) * columns, 4 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, (name, counts) in zip(panels, samples.items()):
        position = np.arange(len(counts))
        for offset, (label, column) in zip((-0.2, 0.2), (("positives", 0), ("negatives", 1))):
            values = [count[column] for count in counts.values()]
            bars = axes.bar(position + offset, values, 0.4, label=label, color=f"C{column}")
            axes.bar_label(bars, labels=[_short(value) for value in values], fontsize=7 if columns > 2 else 8)
        axes.set_xticks(position, list(counts))
        axes.set(title=name, xlabel="anchor scale (px)", ylabel=ylabel)
        axes.label_outer()
        if log:
            axes.set_yscale("log")
        axes.margins(y=0.25)  # room for the legend
        axes.legend(loc="upper left", ncols=2)
    for axes in panels[len(samples) :]:
        axes.axis("off")
    save_figure(figure, path)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def plot_ap_bars(
    rows: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, paper: Mapping[str, Mapping[str, float]]
) -> None:
    """Bars of the average precision of every row of a table, one group of bars per subset.

    Args:
        rows: label -> subset -> mean and standard deviation over the seeds, in percent.
        paper: label -> subset -> what the paper reports, in percent; drawn as crosses.
    """
    subsets = list(dict.fromkeys(subset for values in rows.values() for subset in values))
    width = 0.85 / max(1, len(rows))
    figure = new_figure(10, 4.5)
    axes = figure.subplots()
    for index, (label, values) in enumerate(rows.items()):
        color = f"C{index % 10}"
        hatch = "//" if index >= 10 else None
        position = np.arange(len(subsets)) + (index - (len(rows) - 1) / 2) * width
        means, deviations = zip(*(values.get(subset, (np.nan, np.nan)) for subset in subsets)) if subsets else ((), ())
        axes.bar(position, means, width, yerr=deviations, label=label, color=color, hatch=hatch, capsize=2)
        known = [(x, paper[label][s]) for x, s in zip(position, subsets) if s in paper.get(label, {})]
        if known:
            axes.scatter(*zip(*known), marker="x", color="black", zorder=3)
    if any(paper.get(label) for label in rows):
        axes.scatter([], [], marker="x", color="black", label="paper (WIDER FACE)")
    axes.set_xticks(range(len(subsets)), [subset.capitalize() for subset in subsets])
    axes.set(ylabel="AP (%)", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)


def plot_ap_lines(lines: Mapping[str, Sequence[tuple[str, float, float]]], path: Path, *, xlabel: str) -> None:
    """AP over a setting, one line per detector with error bars (paper, Fig. 4).

    Args:
        lines: label -> points (tick label, mean, standard deviation over the seeds), in percent; NaN leaves a gap.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for label, points in lines.items():
        ticks, means, deviations = zip(*points)
        axes.errorbar(range(len(ticks)), means, yerr=deviations, marker="o", capsize=3, label=label)
        axes.set_xticks(range(len(ticks)), ticks)
    axes.set(xlabel=xlabel, ylabel="AP, all faces (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_curves(
    predictions: Mapping[str, Mapping[str, Detections]], records: Sequence[ImageRecord], path: Path
) -> None:
    """Precision over recall of every run on all faces."""
    figure = new_figure(6, 5)
    axes = figure.subplots()
    for name, images in predictions.items():
        metric = WiderFaceAP.from_records(records)
        for image_id, found in images.items():
            metric.update(image_id, found)
        result = metric.compute()
        axes.plot(*result.curves["all"], label=f"{name} (AP {100 * result.ap['all']:.1f})")
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(figure, path)


def plot_training(runs: Sequence[Run], path: Path) -> None:
    """Losses, learning rate and results of evaluations over the iterations, what there is of them.

    The losses of the training are smoothed over 5 points; those of the validation are points.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.scalars))
    losses = [name for name in names if name.startswith("loss_") or name == "total_loss"]
    panels = [([name, f"validation/{name}"], name) for name in losses] + [(["lr"], "learning rate")]
    # Of one run every subset; of several, which have a line each, the first one of a protocol. A single evaluation is
    # no curve.
    results = [name for name in names if "/AP" in name or "discrete@" in name]
    results = [name for name in results if any(len(run.series(name)[0]) > 1 for run in runs)]
    if len(runs) > 1:
        results = [name for name in results if name.endswith(("/AP_all", "coco/AP", "discrete@1000"))]
    panels += [([name], name) for name in results] if len(runs) > 1 else [(results, "results of evaluations, %")]
    panels = [panel for panel in panels if any(name in names for name in panel[0])]
    columns = min(2, len(panels))
    figure = new_figure(5 * columns, 3.4 * -(-len(panels) // columns))
    rows = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, (keys, title) in zip(rows.flatten(), panels):
        for run, key in itertools.product(runs, keys):
            iterations, values = run.series(key)
            label = key if len(runs) == 1 else f"{run.name}, validation" if key.startswith("validation/") else run.name
            if key in losses:
                window = min(5, len(values))
                values = np.convolve(values, np.ones(window) / window, mode="valid").tolist() if window else []
                axes.plot(iterations[max(window, 1) - 1 :], values, label=label)
            elif values:
                style = "--o" if key.startswith("validation/") else "-" if key == "lr" else "-o"
                axes.plot(iterations, values, style, markersize=4, label=label)
        axes.set(title=title, xlabel="iteration", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in rows.flatten()[len(panels) :]:
        axes.axis("off")
    save_figure(figure, path)


def plot_health(runs: Sequence[Run], path: Path) -> None:
    """The head's health over the iterations: units that fire, norm of the gradients, and of each scale two panels.

    Those of a scale are the spread of its logits, and by how much positives score higher than negatives.
    """
    scales = list(dict.fromkeys(scale for run in runs for scale in run.health_scales()))
    titles = {"health/units": "share of the head's units that fire", "grad_norm": "norm of the gradients, median"}
    titles["health/grad_norm_max"] = "norm of the gradients, largest"
    figure = new_figure(3.4 * max(3, len(scales)), 9)
    rows = figure.subplots(3, max(3, len(scales)), squeeze=False)
    for axes, (key, title) in zip(rows[0], titles.items()):
        for run in runs:
            axes.plot(*run.series(key), label=run.name)
        axes.set(title=title, yscale="linear" if key == "health/units" else "log")
    rows[0][0].set_ylim(0, 1.05)
    for spread, gap, scale in zip(*rows[1:], scales):
        for run in runs:
            spread.plot(*run.series(f"health/logit_std@{scale}"), label=run.name)
            gap.plot(*run.score_gaps(scale), label=run.name)
        spread.set(title=f"@{scale}: standard deviation of the logits", ylim=(0, None))
        gap.set(title=f"@{scale}: score of positives − negatives", xlabel="iteration")
        gap.axhline(0, color="black", linewidth=0.5)
    for axes in rows.flatten():
        if axes.lines:
            axes.grid(alpha=0.3)
        else:
            axes.axis("off")
    rows[0][0].legend()
    save_figure(figure, path)


def plot_detections(
    image: np.ndarray,
    faces: np.ndarray,
    panels: Mapping[str, Detections],
    path: Path,
    *,
    panel_size: float = 7.0,
) -> None:
    """Draw one image, a panel per title: detections solid with their scores, annotated faces dashed.

    Args:
        image: (H, W, 3) uint8.
        faces: (m, 4) XYXY.
        panels: title -> what to draw.
        panel_size: width of a panel in inches.
    """
    height, width = image.shape[:2]
    lines = 1 + max(title.count("\n") for title in panels)
    figure = new_figure(panel_size * len(panels), panel_size * height / width + 0.2 + 0.25 * lines)
    for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axes.imshow(image)
        axes.axis("off")
        axes.set_title(title, fontsize=10)
        _draw_boxes(axes, faces, color=FACE_COLOR, linestyle="--", linewidth=1.2)
        _draw_boxes(axes, found.boxes, color=FOUND_COLOR, linewidth=1.3)
        for (x, y, *_), score in zip(found.boxes, found.scores):
            background = {"facecolor": FOUND_COLOR, "alpha": 0.6, "linewidth": 0, "pad": 0.5}
            axes.text(x, y, f"{score:.2f}", fontsize=6, color="white", va="bottom", bbox=background)
    save_figure(figure, path)


def _draw_boxes(axes: Any, boxes: np.ndarray, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    for x1, y1, x2, y2 in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))
