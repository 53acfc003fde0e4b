"""An HTML report that compares several training runs, from the files that either engine leaves."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.images import read_image
from ..data.records import ImageRecord
from ..detections import Detections
from ..files import write_atomically
from .plots import plot_curves, plot_detections, plot_health, plot_samples, plot_training
from .runs import Run

# Detections below this score are not drawn.
DRAW_SCORE = 0.7


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
            "Positives and negatives per image that the classifier saw, averaged over the training (paper, Fig. 2).",
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
    if any(run.health_scales() for run in runs):
        figures.append(
            (
                "health.png",
                "Health of the head",
                "A head can die while its loss looks fine. Of the anchors drawn in 20 iterations each.",
                lambda path: plot_health(runs, path),
            )
        )
    for file, heading, record in _example_images(records):
        figures.append(
            (
                file,
                heading,
                f"{record.image_id}: detections that score at least {DRAW_SCORE}; green dashes are annotated faces.",
                lambda path, record=record: _plot_example(predictions, record, path),
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
<p>{html.escape(dataset)}, WIDER FACE protocol. @s: All of what the anchors of scale s find by themselves.</p>
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
            "<td>n/a</td>" if ap[s] is None else f"<td>{_emphasize(f'{100 * ap[s]:.1f}', ap[s] == best[s])}</td>"
            for s in subsets
        )
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>\n"
    return f"<table><tr><th></th>{head}</tr>\n{rows}</table>"


def _emphasize(text: str, is_best: bool) -> str:
    return f"<b>{text}</b>" if is_best else text


def _example_images(records: Sequence[ImageRecord]) -> list[tuple[str, str, ImageRecord]]:
    """An image with large faces, one with tiny faces and one with many."""

    def sizes(record: ImageRecord) -> np.ndarray:
        boxes = record.boxes[~record.ignore]
        return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))

    with_faces = [record for record in records if (~record.ignore).any()]
    if not with_faces:
        return []

    def with_most(count: Callable[[np.ndarray], int]) -> ImageRecord:
        return max(with_faces, key=lambda record: count(sizes(record)))

    return [
        ("detections_large.png", "Large faces", with_most(lambda s: len(s[(s >= 64) & (s <= 180)]))),
        ("detections_tiny.png", "Tiny faces", with_most(lambda s: len(s[(s >= 10) & (s < 24)]))),
        ("detections_many.png", "Many faces", with_most(len)),
    ]


def _plot_example(predictions: Mapping[str, Mapping[str, Detections]], record: ImageRecord, path: Path) -> None:
    faces, panels = record.boxes[~record.ignore], {}
    for name, images in predictions.items():
        found = images.get(record.image_id, Detections(np.zeros((0, 4)), np.zeros(0)))
        found = found.select(found.scores >= DRAW_SCORE)
        panels[f"{name}: {len(found.scores)} detections, {len(faces)} faces"] = found
    plot_detections(read_image(record), faces, panels, path)
