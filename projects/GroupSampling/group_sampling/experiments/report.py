"""The HTML report of a run, or of several side by side, from the files that either engine leaves."""

import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import flatten_config
from ..data.images import read_image
from ..data.records import ImageRecord, UnreadableImageError
from ..detections import Detections
from ..detector import ENGINE_MODULES
from ..engines.tv.config import load_config
from ..env import collect_env, detectron2_problem
from ..errors import UserError, describe
from ..evaluation.run import PROTOCOLS
from ..files import read_json, write_json
from .claims import paper_values
from .mistakes import draw_mistakes, find_mistakes
from .page import Section, Strong, gallery, paragraph, picture, relative, table, write_page
from .plots import plot_curves, plot_detections, plot_health, plot_samples, plot_training
from .rows import EXPERIMENTS
from .runs import Run

# Detections below this score are not drawn beside each other.
DRAW_SCORE = 0.7

BASE_CONFIG = "Base-GroupSampling.yaml"  # in the folder of the configs
_NUM_MISTAKES = 12
_NUM_SLOWEST = 10
# Keys of a machine, not of a detector or its training.
_LOCAL_KEYS = {"OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS"}

Predictions = Mapping[str, Mapping[str, Detections]]  # by name of the run and image id


def write_report(
    runs: Sequence[Run],
    folder: Path,
    *,
    title: str,
    configs: Path,
    notes: Sequence[str] = (),
    environment: Sequence[tuple[str, str]] | None = None,
) -> Path:
    """Write ``report.html``, and its pictures into ``report/``.

    What a run has not, such as curves of an evaluation alone, is left out; data sets and images that cannot be read
    are named.

    Args:
        runs: at least one; several are compared.
        folder: where to write, the folder of the run or one above those of several.
        configs: folder of the project's configs: of the base to which a run's config is compared, and of the paper's
            rows.
        notes: paragraphs under the title, plain text.
        environment: in which they ran, of :func:`~group_sampling.env.collect_env`; None: what an earlier report says,
            else this one.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError, OSError: ``runs`` has no run, or its files are damaged.
    """
    for kind in ("misses", "false_positives"):  # of an earlier report; this one may need fewer
        for file in (folder / "report").glob(f"{kind}_*.jpg"):
            file.unlink()
    sections = list(_sections(runs, folder, configs))
    sections.append(_environment(folder, environment))
    write_page(folder / "report.html", title, [*notes, *map(_summary, runs)], sections)
    return folder / "report.html"


def _sections(runs: Sequence[Run], folder: Path, configs: Path) -> Iterator[Section]:
    datasets = list(dict.fromkeys(name for run in runs for name in run.datasets))
    for dataset in datasets:
        yield _results(runs, dataset, configs)
    if any(run.metrics() for run in runs):
        yield from _training(runs, folder)
    for dataset in datasets:
        yield from _detections([run for run in runs if dataset in run.datasets], dataset, folder)
    for run in runs:
        yield _config(run, _of(run, runs), configs)


def _of(run: Run, runs: Sequence[Run]) -> str:
    return "" if len(runs) == 1 else f": {run.name}"


def _summary(run: Run) -> str:
    config = run.config
    solver = config["SOLVER"]
    done = max((row["iteration"] + 1 for row in run.metrics()), default=0)
    training = (
        f"trained on {', '.join(config['DATASETS']['TRAIN'])}, {min(done, solver['MAX_ITER'])} of "
        f"{solver['MAX_ITER']} iterations of {solver['IMS_PER_BATCH']} images"
        if done
        else "evaluated"
    )
    return f"{run.name}: {training}, {run.engine} engine, SEED {config['SEED']}."


def _results(runs: Sequence[Run], dataset: str, configs: Path) -> Section:
    """Runs as columns, which fit a phone, and beside each the paper's row."""
    columns: list[tuple[str, Mapping[str, float | None]]] = []
    papers = []
    for run in runs:
        columns.append((run.name, run.figures(dataset) if dataset in run.datasets else {}))
        row = find_row(run.config, configs)
        if row and "All" in columns[-1][1]:
            columns.append((f"paper, {row[0]}", row[1]))
            papers.append(columns[-1][0])
    names = list(dict.fromkeys(name for head, values in columns if head not in papers for name in values))
    rows = []
    for name in names:
        ours = [value for head, values in columns if head not in papers and (value := values.get(name)) is not None]
        best = max(ours, default=None) if len(runs) > 1 else None
        rows.append(
            [name, *(_percent(values.get(name), best if head not in papers else None) for head, values in columns)]
        )
    text = ""
    if any(name.startswith("@") for name in names):
        text = " @s: All of what the anchors of scale s find by themselves."
    body = paragraph(f"In percent.{text}")
    if papers:
        body += paragraph(
            "The paper's figures are of WIDER FACE's validation set, after its schedule on 8 GPUs and with an image "
            "pyramid. They compare with ours only where data, schedule and test are the same."
        )
    return Section(f"Results on {dataset}", body + table(["", *(head for head, _ in columns)], rows))


def _percent(value: float | None, best: float | None) -> str:
    if value is None:
        return "n/a"
    return (Strong if value == best else str)(f"{value:.1f}")


def find_row(config: Mapping[str, Any], configs: Path) -> tuple[str, dict[str, float | None]] | None:
    """The row of the paper whose detector a config has: every key of ``MODEL`` but weights and device.

    Returns:
        Table and label, and the paper's percents by subset; None: it is no row.
    """
    model = _comparable({"MODEL": config["MODEL"]})
    detectors = _paper_detectors(configs)
    for name, values in paper_values().items():
        labels = {row.config: row.label for row in EXPERIMENTS[name].rows}
        for row, figures in values.items():
            if row in detectors and detectors[row].items() <= model.items():
                title = f"{EXPERIMENTS[name].title.split(':')[0]}: {labels[row]}"
                return title, {subset.capitalize(): value for subset, value in figures.items()}
    return None


@functools.cache
def _paper_detectors(configs: Path) -> dict[str, dict[str, str]]:
    """Config -> values of ``MODEL`` as text, of every row of the tables that ``configs`` has."""
    files = {row: configs / f"{row}.yaml" for values in paper_values().values() for row in values}
    rows = {row: load_config(str(file), ["MODEL.DEVICE", "cpu"]) for row, file in files.items() if file.is_file()}
    return {row: _comparable({"MODEL": cfg.MODEL}) for row, cfg in rows.items()}


def _comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """Values as text, which can be compared; tuples and lists are the same."""
    return {key: json.dumps(value) for key, value in flatten_config(config) if key not in _LOCAL_KEYS}


def _config(run: Run, of: str, configs: Path) -> Section:
    """The keys in which a run differs from the base of the paper's rows."""
    title = f"Configuration{of}"
    file = configs / BASE_CONFIG
    if not file.is_file():
        return Section(title, paragraph(f"Not compared: {file} is not there."))
    engine = run.engine if not (run.engine == "detectron2" and detectron2_problem()) else "torchvision"
    load = importlib.import_module(ENGINE_MODULES[engine]).load_config
    base, own = _comparable(load(str(file), ["MODEL.DEVICE", "cpu"])), _comparable(run.config)
    rows = [(key, base[key], own.get(key, "-")) for key in sorted(base) if own.get(key) != base[key]]
    caption = f"Where it differs from {BASE_CONFIG}, on which the paper's rows build. config.yaml has every key."
    return Section(title, paragraph(caption) + table(["key", "base", "this run"], rows, is_text=True))


def _training(runs: Sequence[Run], folder: Path) -> Iterator[Section]:
    trained = [run for run in runs if run.metrics()]
    figures: list[tuple[bool, str, str, str, Callable[[Path], None]]] = [
        (
            any(run.samples_per_scale() for run in trained),
            "samples_per_scale",
            "Training samples of every scale",
            "Positives and negatives per image that the classifier saw, averaged over the training (paper, Fig. 2).",
            lambda path: plot_samples({run.name: run.samples_per_scale() for run in trained}, path),
        ),
        (
            any(len(run.scalars) > 1 for run in trained),
            "training_curves",
            "Training",
            "Losses are smoothed over 5 points.",
            lambda path: plot_training(trained, path),
        ),
        (
            any(run.health_scales() for run in trained),
            "health",
            "Health of the head",
            "A head can die while its loss looks fine. Of the anchors drawn in 20 iterations each.",
            lambda path: plot_health(trained, path),
        ),
    ]
    for is_there, name, title, caption, draw in figures:
        if is_there:
            yield Section(title, paragraph(caption) + _draw(folder, name, title, draw))


def _file_name(text: str) -> str:
    """Without what a system or an address could take amiss."""
    return re.sub(r"[^\w.@-]", "_", text)


def _draw(folder: Path, name: str, text: str, draw: Callable[[Path], None]) -> str:
    file = folder / "report" / f"{_file_name(name)}.png"
    draw(file)
    return picture(relative(file, folder), text)


def _detections(runs: Sequence[Run], dataset: str, folder: Path) -> Iterator[Section]:
    try:
        source = runs[0].source(dataset)
        predictions = {run.name: run.predictions(source) for run in runs}
        records = source.records
    except (UserError, ValueError, OSError) as error:
        yield Section(f"Detections on {dataset}", paragraph(f"Not shown: {describe(error)}"))
    else:
        yield _curves(runs, dataset, records, predictions, folder)
        yield from _examples(runs, dataset, records, predictions, folder)
        for number, run in enumerate(runs, start=1):
            title = f"Mistakes on {dataset}{_of(run, runs)}"
            suffix = _file_name(dataset) if len(runs) == 1 else f"{number}_{_file_name(dataset)}"
            yield Section(title, _mistakes(run, dataset, records, predictions[run.name], folder, suffix))
    for run in runs:
        times = run.times(dataset)
        if times.get("slowest"):
            rows = [(image, f"{seconds:.3f}") for image, seconds in list(times["slowest"].items())[:_NUM_SLOWEST]]
            text = f"Seconds from one image to the next, reading included; median {times['median']:.3f}."
            title = f"Slowest images of {dataset}{_of(run, runs)}"
            yield Section(title, paragraph(text) + table(["image", "s"], rows, is_text=True))


def _curves(
    runs: Sequence[Run], dataset: str, records: Sequence[ImageRecord], predictions: Predictions, folder: Path
) -> Section:
    """Of several runs in one figure; of one what the evaluation has drawn."""
    title = f"Precision and recall on {dataset}"
    if len(runs) > 1:
        text = paragraph("All faces, WIDER FACE protocol.")
        return Section(
            title,
            text + _draw(folder, f"pr_curves_{dataset}", title, lambda path: plot_curves(predictions, records, path)),
        )
    plots = dict.fromkeys(protocol.plot for protocol in PROTOCOLS.values())
    files = [file for file in (runs[0].folder / "inference" / dataset / name for name in plots) if file.is_file()]
    return Section(title, "".join(picture(relative(file, folder), title) for file in files))


def _mistakes(
    run: Run,
    dataset: str,
    records: Sequence[ImageRecord],
    predictions: Mapping[str, Detections],
    folder: Path,
    suffix: str,
) -> str:
    """
    Args:
        suffix: of the names of the pictures.
    """
    score = run.best_score(dataset)
    body = paragraph(
        f"At the score of the best F1, {score:.3g}. Green: annotated faces; red: detections of at least that score. "
        "At most one of each kind per image."
    )
    kinds = zip(
        ("misses", "false_positives"),
        ("The largest faces that are missed", "The most confident detections that are no annotated face"),
        find_mistakes(records, predictions, min_score=score, count=_NUM_MISTAKES),
    )
    for kind, heading, mistakes in kinds:
        name = f"{kind}_{suffix}"
        drawn, problems = draw_mistakes(mistakes, predictions, folder / "report", name, min_score=score)
        body += paragraph(f"{heading}:" if mistakes else f"{heading}: none.")
        body += gallery(
            (
                relative(file, folder),
                f"{mistake.record.image_id}: {mistake.size:.0f} px, "
                + (f"score {mistake.score:.2f}" if mistake.score else "nothing found"),
            )
            for file, mistake in drawn
        )
        if problems:
            body += paragraph(f"{len(problems)} more cannot be shown, the first: {problems[0]}")
    return body


def _examples(
    runs: Sequence[Run], dataset: str, records: Sequence[ImageRecord], predictions: Predictions, folder: Path
) -> Iterator[Section]:
    for name, heading, record in _example_images(records):
        title = f"{heading} in {dataset}"
        text = f"{record.image_id}: detections that score at least {DRAW_SCORE}; green dashes are annotated faces."
        try:
            image = read_image(record)
        except UnreadableImageError as error:
            yield Section(title, paragraph(f"Not shown: {error}"))
            continue

        def draw(path: Path, image: np.ndarray = image, record: ImageRecord = record) -> None:
            _plot_example(predictions, image, record, path)

        yield Section(title, paragraph(text) + _draw(folder, f"detections_{name}_{dataset}", title, draw))


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
        ("large", "Large faces", with_most(lambda s: len(s[(s >= 64) & (s <= 180)]))),
        ("tiny", "Tiny faces", with_most(lambda s: len(s[(s >= 10) & (s < 24)]))),
        ("many", "Many faces", with_most(len)),
    ]


def _plot_example(predictions: Predictions, image: np.ndarray, record: ImageRecord, path: Path) -> None:
    faces, panels = record.boxes[~record.ignore], {}
    for name, images in predictions.items():
        found = images.get(record.image_id, Detections(np.zeros((0, 4)), np.zeros(0)))
        found = found.select(found.scores >= DRAW_SCORE)
        panels[f"{name}: {len(found.scores)} detections, {len(faces)} faces"] = found
    plot_detections(image, faces, panels, path)


def _environment(folder: Path, environment: Sequence[tuple[str, str]] | None) -> Section:
    """That of the run; a report that is written again does not change it."""
    file, text = folder / "report" / "environment.json", ""
    if environment is not None:
        write_json(file, dict(environment))
        rows = list(environment)
    elif file.is_file():
        rows = [(name, str(value)) for name, value in read_json(file).items()]
    else:
        rows, text = collect_env(), paragraph("Of the machine that wrote this report; the run does not say its own.")
    return Section("Environment", text + table(["", ""], rows, is_text=True))
