"""Average precision as COCO defines it, for data in COCO's annotation format."""

import contextlib
import copy
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data.coco import read_annotations
from ..files import write_atomically

_ALL_AREAS = "all"  # COCO's name for the objects of every size; the others are "small", "medium" and "large"


@dataclass(frozen=True)
class CocoResult:
    """Outcome of :meth:`CocoAP.compute`; values in [0, 1], nan where no object counts.

    Attributes:
        metrics: ``AP`` (mean over IoU 0.50:0.05:0.95 and the classes), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``
            (objects under 32^2, under 96^2 and over 96^2 pixels), and ``AR``, the mean recall of the kept detections.
        class_ap: ``AP`` of each class.
        counts: ``images``, ``objects`` (crowds left out), ``crowds``, ``detections``.
        max_dets_per_image: detections of an image and class beyond it were not looked at.
    """

    metrics: dict[str, float]
    class_ap: dict[str, float]
    counts: dict[str, int]
    max_dets_per_image: int

    def table(self) -> str:
        """Aligned text table in percent (``n/a`` where undefined), with a line per class where there are several."""
        rows = dict(self.metrics)
        if len(self.class_ap) > 1:
            rows.update({f"AP-{name}": ap for name, ap in self.class_ap.items()})
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {'n/a' if math.isnan(v) else f'{100 * v:.2f}':>6}" for name, v in rows.items()]
        limit = f"at most {self.max_dets_per_image} detections an image and class"
        return "\n".join([f"{'COCO':<{width}}     (%)  {limit}", *lines])

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything as JSON, atomically; an undefined value becomes ``null``."""
        content = {
            "protocol": "COCO",
            "max_dets_per_image": self.max_dets_per_image,
            "metrics": {name: _or_none(value) for name, value in self.metrics.items()},
            "class_ap": {name: _or_none(value) for name, value in self.class_ap.items()},
            "counts": self.counts,
        }
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


class CocoAP:
    """COCO's average precision for boxes, fed image by image, with a detection limit of the caller's choice.

    COCO's own limit of 100 detections suits its photographs; with it, perfect detections of 2,000 faces score 6 %.
    Precision and recall are accumulated by pycocotools. The matching is its greedy one, pair for pair, but visits only
    pairs that overlap enough to matter: pycocotools takes minutes for an image of 2,000 faces.

    Args:
        records: annotated images: objects with ``image_id``, ``boxes`` (m, 4) XYXY, ``classes`` (m,) indices into
            ``class_names``, and ``ignore`` (m,) bool, COCO's ``iscrowd``.
        class_names: at least one.
        areas: (m,) by image id, the area in pixels that decides between small, medium and large; that of the box where
            an image is missing.
        max_dets_per_image: the best so many detections of each class are looked at in an image.

    Raises:
        ValueError: two records share an ``image_id``, or an argument is out of range.
    """

    def __init__(
        self,
        records: Iterable[Any],
        class_names: Sequence[str],
        *,
        areas: Mapping[str, ArrayLike] | None = None,
        max_dets_per_image: int,
    ) -> None:
        if not class_names:
            raise ValueError("class_names: expected at least one")
        if max_dets_per_image < 1:
            raise ValueError(f"max_dets_per_image must be at least 1, got {max_dets_per_image}")
        self._class_names = tuple(class_names)
        self._category_ids = list(range(1, len(self._class_names) + 1))
        self._max_dets = max_dets_per_image
        self._truth: dict[str, _Objects] = {}
        for record in records:
            if record.image_id in self._truth:
                raise ValueError(f"two records have the image_id {record.image_id!r}")
            xywh = _to_xywh(record.boxes)
            area = np.asarray((areas or {}).get(record.image_id, xywh[:, 2] * xywh[:, 3]), dtype=np.float64)
            self._truth[record.image_id] = _Objects(
                xywh, np.asarray(record.classes), area, np.asarray(record.ignore, dtype=bool)
            )
        # xywh, scores, classes by image
        self._found: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]] = {}

    @classmethod
    def from_file(cls, file: str | os.PathLike, *, max_dets_per_image: int) -> "CocoAP":
        """Build from an annotation file; image ids are the file's, as strings.

        Boxes are those of the file, not clipped, so that the figures are those of COCO's own evaluation. What it cannot
        do without is filled in: a missing ``area`` is that of the box, a missing ``iscrowd`` is 0. Boxes that are empty
        or not finite are left out.

        Raises:
            AnnotationError: the file does not follow the format.
            OSError: it cannot be opened.
        """
        records, categories = read_annotations(file, ".")
        with open(file, "rb") as stream:
            content = json.load(stream)
        class_of = {category_id: index for index, category_id in enumerate(categories)}
        rows: dict[str, list] = {record.image_id: [] for record in records}
        for annotation in content["annotations"]:
            x, y, w, h = (float(value) for value in annotation["bbox"])
            if w > 0 and h > 0 and math.isfinite(x + y + w + h):
                box = x, y, w, h, annotation.get("area", w * h), annotation.get("iscrowd", 0)
                rows[str(annotation["image_id"])].append((*box, class_of[annotation["category_id"]]))
        self = cls([], tuple(categories.values()), max_dets_per_image=max_dets_per_image)
        self._category_ids = list(categories)
        for image_id in sorted(rows, key=int):  # pycocotools' order, which decides between equal scores
            table = np.array(rows[image_id], dtype=np.float64).reshape(-1, 7)
            self._truth[image_id] = _Objects(table[:, :4], table[:, 6].astype(int), table[:, 4], table[:, 5] != 0)
        return self

    def __len__(self) -> int:
        """Number of images."""
        return len(self._truth)

    def update(self, image_id: str, boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike | None = None) -> None:
        """Add the detections of one image. An image without an update is one without detections.

        Args:
            image_id: an image of the ground truth.
            boxes: (k, 4) XYXY in pixels of the annotated image; k may be 0.
            scores: (k,) finite.
            classes: (k,) indices into ``class_names``; all 0 when left out.

        Raises:
            ValueError: the image is unknown or was updated before, a shape is wrong, a number is not finite, a box is
                inverted, or a class does not exist; nothing is added then.
        """
        if image_id not in self._truth:
            raise ValueError(f"predictions for image {image_id!r}, which is not in the ground truth")
        if image_id in self._found:
            raise ValueError(f"second predictions for image {image_id!r}; an image is updated once")
        what = f"predictions of image {image_id!r}"
        xywh = _to_xywh(boxes)
        scores = np.array(scores, dtype=np.float64)
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
                objects = truth.of_class(category)
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
        area = {label: index for index, label in enumerate(params.areaRngLbl)}
        metrics = {
            "AP": average(precision[..., area[_ALL_AREAS]]),
            "AP50": average(precision[at[0.5], ..., area[_ALL_AREAS]]),
            "AP75": average(precision[at[0.75], ..., area[_ALL_AREAS]]),
            **{f"AP{label[0]}": average(precision[..., area[label]]) for label in ("small", "medium", "large")},
            "AR": average(recall[..., area[_ALL_AREAS]]),
        }
        num_of = Counter(self._class_names)
        class_ap = {}
        for index, (name, category_id) in enumerate(zip(self._class_names, self._category_ids)):
            key = name if num_of[name] == 1 else f"{name} ({category_id})"
            class_ap[key] = average(precision[:, :, index, area[_ALL_AREAS]])
        crowds = sum(int(truth.is_crowd.sum()) for truth in self._truth.values())
        counts = {
            "images": num_images,
            "objects": sum(len(truth.xywh) for truth in self._truth.values()) - crowds,
            "crowds": crowds,
            "detections": sum(len(scores) for _, scores, _ in self._found.values()),
        }
        return CocoResult(metrics, class_ap, counts, self._max_dets)

    def write_detections(self, path: str | os.PathLike) -> None:
        """Write the detections in COCO's results format, atomically, with the annotation file's ids."""
        results = []
        for image_id, (xywh, scores, classes) in self._found.items():
            number = int(image_id) if image_id.lstrip("-").isdecimal() else image_id
            for box, score, category in zip(xywh.tolist(), scores.tolist(), classes.tolist()):
                category_id = self._category_ids[category]
                results.append({"image_id": number, "category_id": category_id, "bbox": box, "score": score})
        write_atomically(path, json.dumps(results).encode())


@dataclass(frozen=True)
class _Objects:
    """Annotated objects of one image: boxes, class indices, areas in pixels, and which are crowds."""

    xywh: NDArray[np.float64]
    classes: NDArray[np.int64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]

    def of_class(self, category: int) -> "_Objects":
        rows = self.classes == category
        return _Objects(self.xywh[rows], self.classes[rows], self.areas[rows], self.is_crowd[rows])


def _match(
    objects: _Objects,
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
        raise ValueError(f"boxes must have shape (k, 4), got {boxes.shape}")
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
