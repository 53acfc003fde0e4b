"""Average precision as COCO defines it, for data in COCO's annotation format."""

import contextlib
import copy
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data.coco import CocoObjects, read_annotations
from ..data.records import ImageRecord
from ..detections import Detections
from ..errors import UserError
from ..files import decode_text, open_regular, write_json
from .results import Curve, check_new_image, none_if_nan, plot_pr_curves
from .thresholds import ScoreCurve

_INTEGER = re.compile(r"-?[0-9]+")
# Label of a curve -> its IoU.
_CURVES = {"0.50": 0.5, "0.75": 0.75}
_MEAN_CURVE = "0.50:0.95"
_ALL_AREAS = "all"  # COCO's name for the objects of every size; the others are "small", "medium" and "large"


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class CocoResult:
    """Outcome of :meth:`CocoAP.compute`; values in [0, 1], nan where no object counts.

    Attributes:
        stats: ``AP`` (mean over IoU 0.50:0.05:0.95 and the classes), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``
            (objects under 32^2, under 96^2 and over 96^2 pixels), and ``AR``, the mean recall of the kept detections.
        class_ap: ``AP`` of each class.
        curves: (recall, precision) at IoU 0.50, at 0.75 and the mean over 0.50:0.95, float64 of shape (101,); the
            precision is interpolated as COCO has it, and averaged over the classes.
        counts: ``images``, ``objects`` (crowds left out), ``crowds``, ``detections``.
        max_dets_per_image: number of highest-scoring detections per class and image that were evaluated.
        by_score: all classes together, by score, at IoU 0.50.
    """

    stats: dict[str, float]
    class_ap: dict[str, float]
    curves: dict[str, Curve]
    counts: dict[str, int]
    max_dets_per_image: int
    by_score: ScoreCurve

    def reporting(self, scores: Sequence[float]) -> "CocoResult":
        """The same, with the table of thresholds at these scores."""
        return replace(self, by_score=self.by_score.reporting(scores))

    def metrics(self) -> dict[str, float]:
        """``stats`` in percent, and where there are several classes ``AP-<class>``."""
        values = dict(self.stats)
        if len(self.class_ap) > 1:
            values.update({f"AP-{name}": ap for name, ap in self.class_ap.items()})
        return {name: 100 * value for name, value in values.items()}

    def table(self) -> str:
        """Aligned text tables of :meth:`metrics` and of ``by_score``, ``n/a`` where undefined."""
        rows = self.metrics()
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {'n/a' if math.isnan(v) else f'{v:.2f}':>6}" for name, v in rows.items()]
        limit = f"at most {self.max_dets_per_image} detections per image and class"
        return "\n".join([f"{'COCO':<{width}}     (%)  {limit}", *lines, "", "IoU 0.50", self.by_score.table()])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, for JSON; an undefined value becomes None."""
        return {
            "protocol": "COCO",
            "max_dets_per_image": self.max_dets_per_image,
            "metrics": {name: none_if_nan(value) for name, value in self.stats.items()},
            "class_ap": {name: none_if_nan(value) for name, value in self.class_ap.items()},
            "counts": self.counts,
            "by_score": self.by_score.to_dict(),
        }

    def plot(self, path: str | os.PathLike, title: str = "COCO") -> None:
        """Draw the precision-recall curves, atomically; the suffix gives the format of the image (PNG without one)."""
        plot_pr_curves(path, {f"IoU {label}": curve for label, curve in self.curves.items()}, title=title)


class CocoAP:
    """COCO's average precision for boxes, fed image by image, with a detection limit of the caller's choice.

    COCO's own limit of 100 detections suits its photographs; with it, perfect detections of 2,000 faces score 6 %.
    Precision and recall are accumulated by pycocotools. The matching is its greedy one, pair for pair, but visits only
    pairs that overlap enough to matter: pycocotools takes minutes for an image of 2,000 faces.

    Args:
        records: annotated images. Of those that carry :class:`~group_sampling.data.coco.CocoObjects`, these are
            evaluated; so the figures are those of COCO's own evaluation, which clips no box. Of the others, ``boxes``,
            ``classes`` and ``ignore`` are, the latter as COCO's ``iscrowd``, with the areas of the boxes.
        categories: category id -> name, in the order of the class indices; at least one.
        max_dets_per_image: number of highest-scoring detections per class and image that are evaluated.

    Raises:
        ValueError: two records share an ``image_id``, or an argument is out of range.
    """

    def __init__(
        self, records: Iterable[ImageRecord], categories: Mapping[int, str], *, max_dets_per_image: int
    ) -> None:
        if not categories:
            raise ValueError("categories: expected at least one, got none")
        if max_dets_per_image < 1:
            raise ValueError(f"max_dets_per_image: expected at least 1, got {max_dets_per_image}")
        self.categories = dict(categories)
        self._class_names = tuple(categories.values())
        self._category_ids = tuple(categories)
        self._max_dets = max_dets_per_image
        self._truth: dict[str, CocoObjects] = {}
        for record in sorted(records, key=_evaluation_order):
            if record.image_id in self._truth:
                raise ValueError(f"records: expected each image once, got {record.image_id!r} again")
            self._truth[record.image_id] = _objects(record)
        # xywh, scores, classes by image
        self._found: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]] = {}

    @classmethod
    def from_file(cls, file: str | os.PathLike, *, max_dets_per_image: int) -> "CocoAP":
        """Build from an annotation file; image ids are the file's, as strings.

        Raises:
            AnnotationError: the file does not follow the format.
            OSError: it cannot be opened.
        """
        return cls(*read_annotations(file, "."), max_dets_per_image=max_dets_per_image)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._truth)

    def update(self, image_id: str, detections: Detections) -> None:
        """Add the detections of one image. An image without an update is one without detections.

        Args:
            image_id: an image of the ground truth.
            detections: k of them, in pixels of the annotated image, arrays or CPU tensors; k may be 0. Copied.

        Raises:
            ValueError: the image is unknown or was updated before, a shape is wrong, a number is not finite, a box is
                inverted, or a class does not exist; nothing is added then.
        """
        check_new_image(image_id, self._truth, self._found)
        what = f"predictions of image {image_id!r}"
        xywh = _to_xywh(detections.boxes)
        scores, classes = np.array(detections.scores, dtype=np.float64), detections.classes
        classes = np.zeros(len(xywh), dtype=np.int64) if classes is None else np.array(classes, dtype=np.int64)
        if scores.shape != (len(xywh),) or classes.shape != (len(xywh),):
            shapes = f"{scores.shape} and {classes.shape}"
            raise ValueError(f"{what}: expected {len(xywh)} scores and classes, one per box, got shapes {shapes}")
        bad = ~np.isfinite(xywh).all(axis=1) | ~np.isfinite(scores) | (xywh[:, 2:] < 0).any(axis=1)
        bad |= (classes < 0) | (classes >= len(self._class_names))
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"{what}: expected finite numbers, x1 <= x2, y1 <= y2 and a class below {len(self._class_names)}, got "
                f"[{row}]: x, y, width, height {xywh[row].tolist()}, score {scores[row]}, class {classes[row]}"
            )
        self._found[image_id] = xywh, scores, classes

    def compute(self) -> CocoResult:
        """Evaluate what was added so far; more updates may follow."""
        from pycocotools.cocoeval import COCOeval

        evaluation = COCOeval(iouType="bbox")
        params = evaluation.params
        params.imgIds = list(range(len(self._truth)))
        params.catIds = list(range(len(self._class_names)))
        params.maxDets = [self._max_dets]
        evaluation._paramsEval = copy.deepcopy(params)
        thresholds = np.minimum(params.iouThrs, 1 - 1e-10)
        num_areas, num_images = len(params.areaRng), len(self._truth)
        entries: list[dict | None] = [None] * (len(self._class_names) * num_areas * num_images)
        for image, (image_id, truth) in enumerate(self._truth.items()):
            xywh, scores, classes = self._found.get(image_id, (np.empty((0, 4)), np.empty(0), np.empty(0, dtype=int)))
            for category in np.union1d(truth.classes, classes).astype(int):
                objects = CocoObjects(*(column[truth.classes == category] for column in truth))
                rows = np.flatnonzero(classes == category)
                rows = rows[np.argsort(-scores[rows], kind="stable")[: self._max_dets]]
                per_area = _match(objects, xywh[rows], params.areaRng, thresholds)
                for area, (ignored_objects, matched, ignored) in enumerate(per_area):
                    entries[(category * num_areas + area) * num_images + image] = {
                        "dtScores": scores[rows],
                        "dtMatches": matched,
                        "dtIgnore": ignored,
                        "gtIgnore": ignored_objects,
                    }
        evaluation.evalImgs = entries
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            evaluation.accumulate()
        # (thresholds, recalls, classes, areas) and (thresholds, classes, areas); -1 where no object counts
        precision, recall = evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]

        def average(values: NDArray[np.float64]) -> float:
            defined = values[values > -1]
            return float(defined.mean()) if defined.size else math.nan

        at = {round(threshold, 2): index for index, threshold in enumerate(params.iouThrs.tolist())}
        column = {label: index for index, label in enumerate(params.areaRngLbl)}
        of_all = precision[..., column[_ALL_AREAS]]  # (thresholds, recalls, classes)
        stats = {
            "AP": average(of_all),
            "AP50": average(of_all[at[0.5]]),
            "AP75": average(of_all[at[0.75]]),
            **{f"AP{label[0]}": average(precision[..., column[label]]) for label in ("small", "medium", "large")},
            "AR": average(recall[..., column[_ALL_AREAS]]),
        }
        num_of = Counter(self._class_names)
        class_ap = {}
        for index, (name, category_id) in enumerate(zip(self._class_names, self._category_ids)):
            key = name if num_of[name] == 1 else f"{name} ({category_id})"
            class_ap[key] = average(of_all[..., index])
        crowds = sum(int(truth.is_crowd.sum()) for truth in self._truth.values())
        counts = {
            "images": num_images,
            "objects": sum(len(truth.xywh) for truth in self._truth.values()) - crowds,
            "crowds": crowds,
            "detections": sum(len(scores) for _, scores, _ in self._found.values()),
        }
        curves = {label: (params.recThrs, _mean_defined(of_all[at[iou]])) for label, iou in _CURVES.items()}
        curves[_MEAN_CURVE] = params.recThrs, np.mean([_mean_defined(values) for values in of_all], axis=0)
        starts = [(index * num_areas + column[_ALL_AREAS]) * num_images for index in range(len(self._class_names))]
        judged = [entry for start in starts for entry in entries[start : start + num_images] if entry is not None]
        threshold = at[0.5]
        by_score = ScoreCurve.from_detections(
            np.concatenate([np.empty(0), *(e["dtScores"][~e["dtIgnore"][threshold]] for e in judged)]),
            np.concatenate([np.empty(0), *(e["dtMatches"][threshold][~e["dtIgnore"][threshold]] for e in judged)]),
            num_objects=counts["objects"],
            num_images=num_images,
        )
        return CocoResult(stats, class_ap, curves, counts, self._max_dets, by_score)


def read_coco_detections(path: str | os.PathLike, categories: Mapping[int, str]) -> dict[str, Detections]:
    """Read a file in COCO's results format.

    Args:
        categories: category id -> name, in the order of the class indices.

    Returns:
        By image id, as a string, in the order of the file; boxes XYXY.

    Raises:
        UserError: the file is not in this format; names the entry, the expectation and the finding.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        try:
            content = json.loads(decode_text(file.read()))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: expected COCO's results as JSON, got what is none ({error})") from error
    if not isinstance(content, list):
        keys = f" with the keys {list(content)[:5]}" if isinstance(content, dict) else ""
        raise UserError(f"{path}: expected a list of results, got {type(content).__name__}{keys}")
    class_of = {category_id: index for index, category_id in enumerate(categories)}
    rows: dict[str, list[tuple[list[float], float, int]]] = {}
    for number, entry in enumerate(content):
        place = f"{path}: result {number}"
        missing = {"image_id", "category_id", "bbox", "score"} - (entry.keys() if isinstance(entry, dict) else set())
        if missing:
            raise UserError(f"{place}: expected image_id, category_id, bbox and score, got none of {sorted(missing)}")
        if not isinstance(entry["category_id"], int) or entry["category_id"] not in class_of:
            known = list(class_of)[:10]
            raise UserError(f"{place}: expected a category_id of the annotations {known}, got {entry['category_id']!r}")
        box, score = entry["bbox"], entry["score"]
        numbers = [*box, score] if isinstance(box, list) and len(box) == 4 else [None]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise UserError(f"{place}: expected bbox as [x, y, width, height] and a score, got {box!r} and {score!r}")
        rows.setdefault(str(entry["image_id"]), []).append((box, score, class_of[entry["category_id"]]))
    found = {}
    for image_id, entries in rows.items():
        boxes, scores, classes = (np.array(column) for column in zip(*entries))
        boxes = boxes.astype(np.float64)
        boxes[:, 2:] += boxes[:, :2]
        found[image_id] = Detections(boxes, scores.astype(np.float64), classes, None)
    return found


def write_coco_detections(
    path: str | os.PathLike, categories: Mapping[int, str], detections: Mapping[str, Detections]
) -> None:
    """Write detections in COCO's results format, atomically.

    Args:
        categories: category id -> name, in the order of the class indices.
        detections: by image id, arrays or CPU tensors; ids that are numbers are written as such.
    """
    results, category_ids = [], list(categories)
    for image_id, found in detections.items():
        number = int(image_id) if _INTEGER.fullmatch(image_id) else image_id
        scores = np.asarray(found.scores, dtype=np.float64).tolist()
        classes = [0] * len(scores) if found.classes is None else np.asarray(found.classes).tolist()
        for box, score, index in zip(_to_xywh(found.boxes).tolist(), scores, classes):
            results.append({"image_id": number, "category_id": category_ids[index], "bbox": box, "score": score})
    write_json(path, results, indent=None)


def _match(
    objects: CocoObjects,
    xywh: NDArray[np.float64],
    area_ranges: Sequence[Sequence[float]],
    thresholds: NDArray[np.float64],
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]]:
    """COCO's greedy matching in one image and class, for every range of areas at once.

    By descending score, a detection takes the object with the highest IoU of at least the threshold that is still free,
    the last one on a tie; one that does not count (a crowd, or of another size) only when there is no other. A crowd is
    always free.

    Args:
        xywh: (k, 4), best score first.

    Returns:
        For each range: (g,) objects that do not count, (T, k) detections that took an object, and (T, k) detections
        that do not count.
    """
    from pycocotools import mask as mask_utils

    lows, highs = np.asarray(area_ranges, dtype=np.float64).T[..., None]
    uncounted = objects.is_crowd | (objects.areas < lows) | (objects.areas > highs)  # (areas, g)
    detection_areas = xywh[:, 2] * xywh[:, 3]
    outside = (detection_areas < lows) | (detection_areas > highs)  # (areas, k)
    shape = len(area_ranges), len(thresholds)
    matched = np.zeros((*shape, len(xywh)), dtype=bool)
    took_uncounted = np.zeros_like(matched)
    taken = np.zeros((*shape, len(objects.xywh)), dtype=bool)
    if len(xywh) and len(objects.xywh):
        ious = mask_utils.iou(xywh, objects.xywh, objects.is_crowd.astype(np.uint8))
        pairs = np.argwhere(ious >= thresholds.min())
        pairs = pairs[np.lexsort([-pairs[:, 1], -ious[pairs[:, 0], pairs[:, 1]], pairs[:, 0]])]
        starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
        for candidates in np.split(pairs, starts[1:]) if len(pairs) else []:
            detection = candidates[0, 0]
            for second_choice in (False, True):
                for obj in candidates[:, 1]:
                    takes = ~matched[:, :, detection] & (ious[detection, obj] >= thresholds)
                    takes &= (uncounted[:, obj] == second_choice)[:, None] & ~taken[:, :, obj]
                    matched[:, :, detection] |= takes
                    took_uncounted[:, :, detection] |= takes & second_choice
                    if not objects.is_crowd[obj]:
                        taken[:, :, obj] |= takes
    ignored = took_uncounted | (~matched & outside[:, None])
    return list(zip(uncounted, matched, ignored))


def _to_xywh(boxes: ArrayLike) -> NDArray[np.float64]:
    """Copy of (k, 4) XYXY as float64 (x, y, width, height); an empty value of any shape gives (0, 4)."""
    boxes = np.array(boxes, dtype=np.float64)
    if boxes.size == 0:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape (k, 4), got {boxes.shape}")
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _mean_defined(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) mean over the classes of (R, K), those without an object (-1) left out; nan where there is no other."""
    defined = precision[:, (precision > -1).all(axis=0)]
    return defined.mean(axis=1) if defined.size else np.full(len(precision), math.nan)


def _evaluation_order(record: ImageRecord) -> tuple[int, int]:
    """pycocotools evaluates images by ascending id, which decides between equal scores; others stay in their order."""
    return (0, int(record.image_id)) if _INTEGER.fullmatch(record.image_id) else (1, 0)


def _objects(record: ImageRecord) -> CocoObjects:
    if isinstance(getattr(record, "annotation", None), CocoObjects):
        return record.annotation
    xywh = _to_xywh(record.boxes)
    return CocoObjects(xywh, np.asarray(record.classes), xywh[:, 2] * xywh[:, 3], np.asarray(record.ignore, dtype=bool))
