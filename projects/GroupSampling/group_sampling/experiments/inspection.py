"""What is in a data set, and whether a detector's anchors can learn it: sizes, faces without a positive, findings."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from ..anchors import AnchorGrid
from ..config import anchor_scales
from ..data.images import check_size, image_size, read_image, read_size
from ..data.records import DataReport, ImageRecord, UnreadableImageError, fit_exchanged_sides
from ..data.synthetic import is_address
from ..data.transforms import TrainTransform
from ..engines.build import build_train_transform
from ..files import save_figure
from ..ops import match_anchor_grid
from .balance import anchor_grid
from .plots import new_figure

_BATCH = 8  # images per call of the operator
_TILE = 360  # pixels of a picture's longer side on the sheet
FACE, IGNORED = "lime", "gray"


@dataclass(frozen=True)
class Coverage:
    """Faces that training sees at one factor of the scale jitter, and those of them without a positive anchor.

    Both as counts by size: entry k is of faces whose size, after the resize, is in [2^k, 2^(k+1)) pixels.
    """

    factor: float
    faces: Counter[int]
    uncovered: Counter[int]

    @property
    def share(self) -> float:
        """Of the faces, those without a positive anchor; nan without faces."""
        return self.uncovered.total() / self.faces.total() if self.faces else math.nan


@dataclass
class Inspection:
    """The findings on a data set under a config.

    Attributes:
        name: of the data set.
        sizes: (m,) sqrt(width * height) of every face in pixels, ignore regions left out.
        per_image: (n,) number of faces in each image.
        class_counts: class name -> number of faces.
        scales: anchor scales in pixels.
        thresholds: (λ2, λ1) and the second pass that matching goes by.
        coverage: one entry a factor of ``INPUT.SCALE_JITTER``.
        unreadable: what is wrong with the image files.
        report: what was wrong in the annotations.
    """

    name: str
    sizes: np.ndarray
    per_image: np.ndarray
    class_counts: dict[str, int]
    scales: tuple[float, ...]
    thresholds: tuple[float, float, str]
    coverage: list[Coverage]
    report: DataReport
    unreadable: list[str] = field(default_factory=list)

    @property
    def uncovered_share(self) -> float:
        """Share of faces without a positive anchor over the whole jitter, whose factors are equally likely."""
        faces = sum(entry.faces.total() for entry in self.coverage)
        return sum(entry.uncovered.total() for entry in self.coverage) / faces if faces else math.nan

    def to_dict(self) -> dict[str, Any]:
        """For JSON; shares in [0, 1], None where there is no face."""
        percentiles = (0, 5, 25, 50, 75, 95, 100)
        values = np.percentile(self.sizes, percentiles).tolist() if len(self.sizes) else []
        share = self.uncovered_share
        return {
            "data_set": self.name,
            "images": len(self.per_image),
            "images_without_faces": int((self.per_image == 0).sum()),
            "faces": len(self.sizes),
            "classes": self.class_counts,
            "size_percentiles": {str(p): round(value, 2) for p, value in zip(percentiles, values)},
            "anchor_scales": list(self.scales),
            "without_positive_anchor": None if math.isnan(share) else round(share, 6),
            "without_positive_anchor_by_jitter": [
                {
                    "factor": entry.factor,
                    "faces": entry.faces.total(),
                    "without_positive_anchor": entry.uncovered.total(),
                    "by_size": {
                        f"{2**k:g}-{2 ** (k + 1):g}": [entry.faces[k], entry.uncovered[k]] for k in sorted(entry.faces)
                    },
                }
                for entry in self.coverage
            ],
            "annotations": {
                "boxes": self.report.num_boxes,
                "ignored": self.report.num_ignore,
                "dropped": self.report.num_dropped,
                "findings": dict(self.report.counts),
                "examples": self.report.examples,
            },
            "unreadable_images": self.unreadable,
        }

    def table(self) -> str:
        """Plain text for a terminal."""
        lines = [f"data set {self.name}: {self.report.summary()}"]
        lines += [f"  {message}" for message in self.unreadable]
        if not self.unreadable:
            lines.append("  every image file can be opened and has the size that its annotation says")
        lines.append(f"{len(self.sizes):,} faces, {int((self.per_image == 0).sum()):,} images without one")
        if len(self.class_counts) > 1:
            lines.append("classes: " + ", ".join(f"{name} {count:,}" for name, count in self.class_counts.items()))
        if not len(self.sizes):
            return "\n".join(lines)
        low, middle, high = np.percentile(self.sizes, (5, 50, 95))
        lines.append(
            f"sizes, sqrt(width x height): median {middle:.0f}, nine of ten in {low:.0f} ... {high:.0f} pixels"
        )
        lines.append(f"anchor scales: {', '.join(f'{scale:g}' for scale in self.scales)} pixels")
        neg_iou, pos_iou, second_pass = self.thresholds
        lines.append(
            f"faces without a positive anchor in training (IoU from {pos_iou:g}; second pass {second_pass!r} from "
            f"{neg_iou:g}), by size after the resize:"
        )
        buckets = sorted({k for entry in self.coverage for k in entry.faces})
        lines.append("  resized by     all" + "".join(f"{f'{2**k:g}-{2 ** (k + 1):g} px':>14}" for k in buckets))
        for entry in self.coverage:
            cells = (f"{100 * entry.uncovered[k] / entry.faces[k]:.1f}%" if entry.faces[k] else "-" for k in buckets)
            whole = f"{100 * entry.share:.1f}%" if entry.faces else "-"
            lines.append(f"  {entry.factor:10g} {whole:>7}" + "".join(f"{cell:>14}" for cell in cells))
        lines.append(f"  over the whole jitter: {100 * self.uncovered_share:.1f}%")
        return "\n".join(lines)


def inspect(
    cfg: CfgNode,
    name: str,
    records: Sequence[ImageRecord],
    class_names: Sequence[str],
    report: DataReport,
    *,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Inspection:
    """Look at the header of every image, and match its faces to the config's anchors as training would.

    Every image is augmented once for each factor of ``INPUT.SCALE_JITTER``, with its crop and flip, and its faces are
    matched with ``MODEL.RPN.IOU_THRESHOLDS`` and ``MODEL.GROUP_SAMPLING.SECOND_PASS``. Images whose file is missing or
    of another size than annotated are listed; they take part in the sizes and not in the matching, as in training.

    Args:
        cfg: a complete config of either engine.
        seed: of crops and flips.
        on_progress: called with the number of images done since the last call.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError(f"data set {name}: expected at least one image, got none")
    transform = build_train_transform(cfg)
    grid_of = functools.lru_cache(maxsize=None)(functools.partial(anchor_grid, cfg))
    neg_iou, pos_iou = cfg.MODEL.RPN.IOU_THRESHOLDS
    second_pass = cfg.MODEL.GROUP_SAMPLING.SECOND_PASS
    coverage = [Coverage(factor, Counter(), Counter()) for factor in transform.scales]
    resizes = [
        TrainTransform((factor,), transform.crop_size, transform.flip_prob, transform.min_visible)
        for factor in transform.scales
    ]
    waiting: dict[tuple[int, AnchorGrid], list[torch.Tensor]] = defaultdict(list)

    def match(key: tuple[int, AnchorGrid]) -> None:
        index, grid = key
        batch = waiting.pop(key)
        result = match_anchor_grid(grid, batch, pos_iou=pos_iou, neg_iou=neg_iou, second_pass=second_pass)
        for boxes, labels, matched in zip(batch, result.labels, result.matched_gt):
            covered = np.zeros(len(boxes), dtype=bool)
            covered[matched[labels == 1].unique().numpy()] = True
            octaves = np.floor(np.log2(_sizes(boxes.numpy()))).astype(int)
            coverage[index].faces.update(octaves.tolist())
            coverage[index].uncovered.update(octaves[~covered].tolist())

    sizes, unreadable, class_counts = [], [], np.zeros(len(class_names), dtype=np.int64)
    for number, record in enumerate(records):
        faces = record.boxes[~record.ignore]
        sizes.append(_sizes(faces))
        np.add.at(class_counts, record.classes[~record.ignore], 1)
        on_progress(1)
        try:
            height, width = _check_file(record)
        except UnreadableImageError as error:
            unreadable.append(str(error))
            continue
        if fit_exchanged_sides(record.boxes, height, width):
            unreadable.append(
                f"{record.file_name}: its boxes fit it with its sides exchanged alone, {height}x{width} pixels: of "
                "before or after EXIF turned it? See DATASETS.APPLY_EXIF"
            )
        for index, resize in enumerate(resizes):
            geometry = resize.sample(height, width, np.random.default_rng([seed, number, index]))
            moved, _, _ = resize.apply_annotations(record.boxes, record.ignore, record.classes, geometry, height, width)
            if not len(moved):
                continue
            x0, y0, x1, y1 = geometry.crop
            key = index, grid_of(y1 - y0, x1 - x0)
            waiting[key].append(torch.from_numpy(moved))
            if len(waiting[key]) == _BATCH:
                match(key)
    for key in list(waiting):
        match(key)
    return Inspection(
        name,
        np.concatenate(sizes),
        np.array([len(found) for found in sizes]),
        dict(zip(class_names, class_counts.tolist())),
        anchor_scales(cfg),
        (float(neg_iou), float(pos_iou), second_pass),
        coverage,
        report,
        unreadable,
    )


def draw_sheet(
    records: Sequence[ImageRecord], class_names: Sequence[str], path: Path, *, count: int = 12, seed: int = 0
) -> list[str]:
    """Draw ``count`` pictures with their boxes: a random half, and those with the most and the smallest faces.

    Returns:
        What could not be read; its tile says so.
    """
    chosen = _choose(records, count, seed)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(3.4 * columns, 3.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    colors = [FACE, "deepskyblue", "orange", "magenta", "yellow", "red"]
    problems = []
    for axes in panels:
        axes.axis("off")
    for axes, record in zip(panels, chosen):
        axes.set_title(f"{record.image_id[-44:]}\n{(~record.ignore).sum()} faces", fontsize=7)
        try:
            image = read_image(record)
        except UnreadableImageError as error:
            problems.append(str(error))
            axes.text(0.5, 0.5, "cannot be read", ha="center", color="red", transform=axes.transAxes)
            continue
        _draw_boxes(axes, image, record, colors)
    figure.suptitle("dashed gray: ignored; " + ", ".join(f"{c}: {n}" for c, n in zip(colors, class_names)), fontsize=9)
    save_figure(figure, path)
    return problems


def draw_sizes(inspection: Inspection, path: Path) -> None:
    """Draw the histogram of sizes next to the anchor scales, and below it the shares without a positive anchor."""
    figure = new_figure(8, 7)
    top, bottom = figure.subplots(2, 1)
    sizes = inspection.sizes
    low = min([*sizes.tolist(), *inspection.scales])
    high = max([*sizes.tolist(), *inspection.scales])
    edges = 2 ** np.arange(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 0.51, 0.25)
    top.hist(sizes, bins=edges, color="tab:blue", alpha=0.8)
    for index, scale in enumerate(inspection.scales):
        top.axvline(scale, color="tab:red", linestyle="--", label="anchor scales" if index == 0 else None)
    top.set_xscale("log", base=2)
    top.xaxis.set_major_formatter("{x:g}")
    top.set(xlabel="size of a face, sqrt(width x height), in pixels of the file", ylabel="faces")
    top.set_title(f"{inspection.name}: {len(sizes):,} faces in {len(inspection.per_image):,} images")
    top.legend()
    entries = [entry for entry in inspection.coverage if entry.faces]
    bars = bottom.bar([f"{entry.factor:g}" for entry in entries], [100 * entry.share for entry in entries])
    bottom.bar_label(bars, fmt="%.1f%%", fontsize=8)
    bottom.set(xlabel="image resized by (INPUT.SCALE_JITTER)", ylabel="faces without a positive anchor, %")
    bottom.set_ylim(0, max([5.0, *(115 * entry.share for entry in entries)]))
    save_figure(figure, path)


def _check_file(record: ImageRecord) -> tuple[int, int]:
    """(height, width) of the record's image, which must be as annotated."""
    if is_address(record.file_name):
        return image_size(record)
    size = read_size(record.file_name, is_raw=record.is_raw)
    check_size(record, *size)
    return size


def _choose(records: Sequence[ImageRecord], count: int, seed: int) -> list[ImageRecord]:
    """``count`` different records, or all: by turns most faces and smallest face, then random ones."""
    with_faces = [k for k, record in enumerate(records) if (~record.ignore).any()]
    crowds = sorted(with_faces, key=lambda k: -(~records[k].ignore).sum())
    small = sorted(with_faces, key=lambda k: _sizes(records[k].boxes[~records[k].ignore]).min())
    extremes = [k for pair in zip(crowds, small) for k in pair]
    random = np.random.default_rng(seed).permutation(len(records)).tolist()
    chosen = list(dict.fromkeys(extremes))[: count // 2]
    chosen += [k for k in random if k not in chosen][: count - len(chosen)]
    return [records[k] for k in chosen]


def _draw_boxes(axes, image: np.ndarray, record: ImageRecord, colors: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    step = max(1, math.ceil(max(image.shape[:2]) / (2 * _TILE)))
    height, width = image.shape[:2]
    axes.imshow(image[::step, ::step], extent=(0, width, height, 0))
    for (x1, y1, x2, y2), label, ignored in zip(record.boxes, record.classes, record.ignore):
        style = {"edgecolor": IGNORED, "linestyle": "--"} if ignored else {"edgecolor": colors[label % len(colors)]}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1, **style))


def _sizes(boxes: np.ndarray) -> np.ndarray:
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    return np.sqrt(sides[:, 0] * sides[:, 1])
