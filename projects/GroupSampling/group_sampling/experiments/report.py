"""An HTML report that sets several training runs side by side, from the files that either engine leaves."""

import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.images import read_image
from ..data.records import ImageRecord
from ..detections import Detections
from ..evaluation import WiderFaceAP, read_predictions
from ..files import write_atomically

# Detections below this score are not drawn.
DRAW_SCORE = 0.7


@dataclass(frozen=True)
class Run:
    """The output folder of one training run.

    Attributes:
        name: what the report calls it.
        folder: its ``OUTPUT_DIR``: ``metrics.json`` and ``inference/<data set>/`` are read.
    """

    name: str
    folder: Path

    def metrics(self) -> list[dict]:
        """The lines of ``metrics.json``; a line that a killed run cut short is left out."""
        rows = []
        for line in (self.folder / "metrics.json").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of one scalar."""
        rows = [(row["iteration"], row[key]) for row in self.metrics() if key in row]
        return [row[0] for row in rows], [row[1] for row in rows]

    def samples_per_scale(self) -> dict[str, tuple[float, float]]:
        """Mean number of positives and negatives of every anchor scale in an image, over the whole run."""
        keys = {key.split("@")[1] for row in self.metrics() for key in row if key.startswith("rpn/num_pos@")}
        return {
            scale: tuple(float(np.mean(self.series(f"rpn/{kind}@{scale}")[1])) for kind in ("num_pos", "num_neg"))
            for scale in sorted(keys, key=float)
        }

    def results(self, dataset: str) -> dict:
        return json.loads((self.folder / "inference" / dataset / "results.json").read_text())

    def predictions(self, dataset: str) -> dict[str, Detections]:
        """By image id; classes and anchor scales are unknown."""
        return dict(read_predictions(self.folder / "inference" / dataset / "predictions"))


def write_report(
    runs: Sequence[Run],
    dataset: str,
    records: Sequence[ImageRecord],
    folder: Path,
    *,
    title: str,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` and its PNGs.

    Args:
        runs: the runs to compare, all evaluated on ``dataset``.
        records: the images of ``dataset``.
        folder: where to write; is created.
        notes: paragraphs under the title, plain text.

    Returns:
        The path of ``report.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictions = {run.name: run.predictions(dataset) for run in runs}
    figures: list[tuple[str, str, str, Callable]] = [
        (
            "samples_per_scale.png",
            "Training samples of every scale",
            "Positives and negatives that the classifier saw in an image, averaged over the training (paper, Fig. 2).",
            lambda path: plot_samples({run.name: run.samples_per_scale() for run in runs}, path),
        ),
        (
            "pr_curves.png",
            "Precision and recall",
            "All faces, WIDER FACE protocol.",
            lambda path: plot_curves(predictions, records, path),
        ),
        (
            "training_curves.png",
            "Training",
            "Loss of the drawn anchors, smoothed over 5 points.",
            lambda path: plot_training(runs, path),
        ),
    ]
    for file, heading, record in _example_images(records):
        figures.append(
            (
                file,
                heading,
                f"{record.image_id}: detections that score at least {DRAW_SCORE}; green dashes are annotated faces.",
                lambda path, record=record: plot_detections(predictions, record, path),
            )
        )
    for file, _, _, draw in figures:
        draw(folder / file)
    write_atomically(folder / "report.html", _page(runs, dataset, figures, title, notes).encode())
    return folder / "report.html"


def _page(runs, dataset, figures, title, notes) -> str:
    sections = "\n".join(
        f"<h2>{html.escape(heading)}</h2>\n<p>{html.escape(caption)}</p>\n"
        f'<img src="{file}" alt="{html.escape(heading)}">'
        for file, heading, caption, _ in figures
    )
    paragraphs = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .3em 1em; text-align: right; border-bottom: 1px solid #ccc; }}
th:first-child, td:first-child {{ text-align: left; }} img {{ max-width: 100%; }}
</style></head>
<body>
<h1>{html.escape(title)}</h1>
{paragraphs}
<h2>Average precision (%)</h2>
<p>{html.escape(dataset)}, WIDER FACE protocol. @s: faces nearest to anchor scale s, detections of its anchors.</p>
{_ap_table(runs, dataset)}
{sections}
</body>
</html>
"""


def _ap_table(runs: Sequence[Run], dataset: str) -> str:
    results = {run.name: run.results(dataset)["ap"] for run in runs}
    subsets = list(next(iter(results.values())))
    best = {s: max((ap[s] for ap in results.values() if ap[s] is not None), default=None) for s in subsets}
    head = "".join(f"<th>{html.escape(s.capitalize())}</th>" for s in subsets)
    rows = ""
    for name, ap in results.items():
        cells = "".join(
            "<td>n/a</td>" if ap[s] is None else f"<td>{_emphasise(f'{100 * ap[s]:.1f}', ap[s] == best[s])}</td>"
            for s in subsets
        )
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>\n"
    return f"<table><tr><th></th>{head}</tr>\n{rows}</table>"


def _emphasise(text: str, is_best: bool) -> str:
    return f"<b>{text}</b>" if is_best else text


def _example_images(records: Sequence[ImageRecord]) -> list[tuple[str, str, ImageRecord]]:
    """An image with large faces, one with tiny faces and one with many."""

    def sizes(record: ImageRecord) -> np.ndarray:
        boxes = record.boxes[~record.ignore]
        return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))

    with_faces = [record for record in records if (~record.ignore).any()]
    if not with_faces:
        return []
    choices = (
        ("detections_large.png", "Large faces", lambda s: np.sum((s >= 64) & (s <= 180))),
        ("detections_tiny.png", "Tiny faces", lambda s: np.sum((s >= 10) & (s < 24))),
        ("detections_many.png", "Many faces", len),
    )
    return [(file, heading, max(with_faces, key=lambda r, k=key: k(sizes(r)))) for file, heading, key in choices]


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure  # draws off screen and leaves the caller's backend alone

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def plot_samples(
    samples: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, log: bool = False, columns: int = 5
) -> None:
    """Bars of positives and negatives of every scale, a panel a detector (paper, Fig. 2).

    Args:
        samples: name of the detector -> anchor scale -> mean positives and negatives in an image.
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
        axes.set(title=name, xlabel="anchor scale (px)", ylabel="samples per image")
        axes.label_outer()
        if log:
            axes.set_yscale("log")
        axes.margins(y=0.25)  # room for the legend
        axes.legend(loc="upper left", ncols=2)
    for axes in panels[len(samples) :]:
        axes.axis("off")
    save_figure(figure, path)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def plot_ap_bars(
    rows: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, paper: Mapping[str, Mapping[str, float]]
) -> None:
    """Bars of the average precision of every row of a table, a group of bars a subset.

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
    """AP over a setting, a line a detector with error bars (paper, Fig. 4).

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
            metric.update(image_id, found.boxes, found.scores)
        result = metric.compute()
        axes.plot(*result.curves["all"], label=f"{name} (AP {100 * result.ap['all']:.1f})")
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(figure, path)


def plot_training(runs: Sequence[Run], path: Path) -> None:
    """Classification and regression loss over the iterations."""
    figure = new_figure(10, 4)
    for axes, key in zip(figure.subplots(1, 2), ("loss_rpn_cls", "loss_rpn_loc")):
        for run in runs:
            iterations, values = run.series(key)
            window = min(5, len(values))
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(iterations[window - 1 :], smooth, label=run.name)
        axes.set(title=key, xlabel="iteration", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def plot_detections(predictions: Mapping[str, Mapping[str, Detections]], record: ImageRecord, path: Path) -> None:
    """One image, a panel a run: detections solid with their score, annotated faces dashed."""
    from matplotlib.patches import Rectangle

    image = read_image(record)
    height, width = image.shape[:2]
    figure = new_figure(7 * len(predictions), 7 * height / width + 0.5)
    for axes, (name, images) in zip(figure.subplots(1, len(predictions), squeeze=False)[0], predictions.items()):
        axes.imshow(image)
        axes.axis("off")
        for x1, y1, x2, y2 in record.boxes[~record.ignore]:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="lime", linestyle="--", linewidth=1))
        found = images.get(record.image_id, Detections(np.zeros((0, 4)), np.zeros(0)))
        found = found.select(found.scores >= DRAW_SCORE)
        for (x1, y1, x2, y2), score in zip(found.boxes, found.scores):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="red", linewidth=1.5))
            axes.text(x1, y1, f"{score:.2f}", fontsize=6, color="white", backgroundcolor=(1, 0, 0, 0.6), va="bottom")
        axes.set_title(f"{name}: {len(found.scores)} detections, {(~record.ignore).sum()} faces")
    save_figure(figure, path)
