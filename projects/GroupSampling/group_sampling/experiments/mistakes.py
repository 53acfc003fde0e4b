"""The faces that a detector misses and what it takes for faces, as pictures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..data.images import read_image
from ..data.records import ImageRecord, UnreadableImageError
from ..detections import Detections
from ..files import atomic_file
from ..ops import pairwise_iou
from .plots import FACE_COLOR, FOUND_COLOR

_IOU = 0.5  # from which a detection takes a face
_SIDE = 160  # pixels of a thumbnail
_CONTEXT = 3  # sides of the box that a thumbnail shows


class Mistake(NamedTuple):
    """A face that was missed, or a detection that is none.

    Attributes:
        record: its image.
        box: (4,) XYXY in pixels.
        score: of the detection; of a missed face the best score of those that take it, 0 for none.
    """

    record: ImageRecord
    box: np.ndarray
    score: float

    @property
    def size(self) -> float:
        """Square root of the area, in pixels."""
        return float(np.sqrt((self.box[2] - self.box[0]) * (self.box[3] - self.box[1])))


def find_mistakes(
    records: Iterable[ImageRecord], predictions: Mapping[str, Detections], *, min_score: float, count: int
) -> tuple[list[Mistake], list[Mistake]]:
    """The worst mistakes, no two of one image.

    Args:
        predictions: by image id; an image without an entry has no detections.
        min_score: a face is missed if no detection of at least this score takes it (IoU 0.5, and the same class where
            classes are known).
        count: so many of each kind.

    Returns:
        misses: the largest faces that are missed.
        false_positives: the detections of the highest score that take nothing, not even a region to ignore.
    """
    misses, false_positives = [], []
    for record in records:
        found = predictions.get(record.image_id, Detections(np.zeros((0, 4)), np.zeros(0)))
        boxes, scores = np.asarray(found.boxes, dtype=np.float64), np.asarray(found.scores)
        faces = record.boxes.astype(np.float64)
        takes = pairwise_iou(torch.from_numpy(boxes), torch.from_numpy(faces)).numpy() >= _IOU
        if found.classes is not None:
            takes &= (np.asarray(found.classes)[:, None] == record.classes) | record.ignore
        best = np.where(takes, scores[:, None], 0.0).max(axis=0, initial=0.0)
        missed = [
            Mistake(record, faces[i], float(best[i])) for i in np.flatnonzero(~record.ignore & (best < min_score))
        ]
        wrong = np.flatnonzero(~takes.any(axis=1) & ~_lies_in(boxes, faces[record.ignore]))
        misses += sorted(missed, key=_by_size)[:1]
        false_positives += [Mistake(record, boxes[i], float(scores[i])) for i in wrong[np.argsort(-scores[wrong])][:1]]
    false_positives = [mistake for mistake in false_positives if mistake.score >= min_score]
    return sorted(misses, key=_by_size)[:count], sorted(false_positives, key=lambda m: -m.score)[:count]


def _by_size(mistake: Mistake) -> float:
    return -mistake.size


def _lies_in(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(k,) whether a region holds at least half of a box."""
    low = np.maximum(boxes[:, None, :2], regions[:, :2])
    high = np.minimum(boxes[:, None, 2:], regions[:, 2:])
    inside = (high - low).clip(min=0).prod(axis=2).max(axis=1, initial=0.0)
    return inside >= 0.5 * np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)


def draw_mistakes(
    mistakes: Sequence[Mistake], predictions: Mapping[str, Detections], folder: Path, name: str, *, min_score: float
) -> tuple[list[tuple[Path, Mistake]], list[str]]:
    """Write ``<folder>/<name>_1.jpg`` and so on: annotated faces, and detections of at least ``min_score``.

    Returns:
        drawn: files and what they show.
        problems: of images that cannot be read.
    """
    drawn, problems = [], []
    for number, mistake in enumerate(mistakes, start=1):
        try:
            image = read_image(mistake.record)
        except UnreadableImageError as error:
            problems.append(str(error))
            continue
        found = predictions.get(mistake.record.image_id)
        boxes = np.zeros((0, 4)) if found is None else found.boxes[found.scores >= min_score]
        file = folder / f"{name}_{number}.jpg"
        with atomic_file(file) as stream:
            _thumbnail(image, mistake, boxes).save(stream, "JPEG", quality=88)
        drawn.append((file, mistake))
    return drawn, problems


def _thumbnail(image: np.ndarray, mistake: Mistake, found: np.ndarray) -> Image.Image:
    """The surroundings of a box in a square, which goes beyond the image (black) only for a box that needs it."""
    x1, y1, x2, y2 = mistake.box.tolist()
    side = max(x2 - x1, y2 - y1, 8)
    width = max(side, min(_CONTEXT * side, *image.shape[:2]))
    corner = [
        # Centered, else as far inside as it fits.
        min(max((low + high - width) / 2, 0), length - width) if width <= length else (length - width) / 2
        for low, high, length in ((x1, x2, image.shape[1]), (y1, y2, image.shape[0]))
    ]
    left, top = map(round, corner)
    window = (left, top, left + round(width), top + round(width))
    thumbnail = Image.fromarray(image).crop(window).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(thumbnail)
    record = mistake.record
    for color, boxes in ((FACE_COLOR, record.boxes[~record.ignore]), (FOUND_COLOR, found)):
        shifted = np.asarray(boxes, dtype=np.float64) - [left, top, left, top]
        for box in (shifted * (_SIDE / round(width))).tolist():
            if box[0] < _SIDE and box[1] < _SIDE and box[2] > 0 and box[3] > 0:
                draw.rectangle(box, outline=color, width=2)
    return thumbnail
