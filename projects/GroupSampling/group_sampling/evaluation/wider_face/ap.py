"""Average precision by the WIDER FACE protocol: Easy, Medium, Hard, All and of each sub-detector (paper, Sec. 6.1)."""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...data.records import ImageRecord
from ...detections import Detections
from ...scales import scale_borders
from ..results import Curve, check_new_image
from .ground_truth import read_official_ground_truth
from .result import WiderFaceResult, area_under_envelope, curve_by_score

# Pairs of a detection and a face whose IoU is computed at once: bounds memory, and the temporaries stay in the cache.
_PAIRS_PER_BLOCK = 1 << 15
# Beyond any image, and far from where areas overflow.
_MAX_COORDINATE = 1e9


class _Matched(NamedTuple):
    """What the curves need of the detections of one image."""

    scores: NDArray[np.float64]
    taken: NDArray[np.int32]  # index of the face that each takes, or the code of none
    size_ids: NDArray[np.int8]  # index of the size nearest to the box


class _ResultSet(NamedTuple):
    """The detections of a detector, or of a sub-detector."""

    name: str
    updates: dict[str, _Matched]  # by image id
    score_range: tuple[float, float]  # lowest and highest score


_NO_DETECTIONS = _Matched(np.empty(0), np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int8))


class WiderFaceAP:
    """Average precision by the WIDER FACE protocol, fed image by image.

    The protocol, as its authors published it in MATLAB: scores are min-max normalized over the whole result set. In an
    image, by descending score, each detection takes the face with the highest IoU (the first one on a tie), computed on
    pixels inclusive of both ends (the "+1" of width and height), if that IoU reaches ``iou_thresh``. When that face is
    not counted in the subset, the detection is left out; when it was taken before, the detection is a false positive.
    Precision and recall are read at the ``num_thresholds`` scores 1 - t / num_thresholds, and AP is the area under the
    precision envelope.

    A detection takes its face whatever the others took, so what is detected above a threshold does not depend on the
    order of equal scores, and needs no sorting: the best score of a face decides from which threshold on it is found.

    Subsets, in the order of the result:

    - those of ``subsets`` (Easy, Medium and Hard of the official ground truth): the faces that the subset keeps count,
      all others are ignore regions. As in the published code, an image without any annotated box takes no part.
    - ``"all"``: every face counts that is neither ignored nor empty. Detections in an image without any box are false
      positives. (WIDER FACE annotates a face-less image with one box 0 0 0 0, so they are there as well; a parser
      that drops such boxes changes nothing.)
    - ``"@s"``, the paper's AP of a sub-detector: ``"all"`` of what the anchors of scale s find by themselves, a result
      set of its own, whose scores are normalized over itself. Every face of All counts. Reported for the scales of the
      updates' ``sub_detectors``.
    - ``"size s"`` for each s of ``sizes``: AP of one range of face sizes on All. Faces count whose √(w·h) is nearest to
      s in log scale among ``sizes`` (the smaller one on a tie), the other faces are ignore regions; a detection without
      a face counts by its own √(w·h), as COCO has it for its area ranges. Not the paper's @s: there all faces count,
      and a face that another scale's anchors detect is missed.

    Memory: 13 bytes per detection, and about four times as much for the moment of ``compute``.

    Args:
        boxes: (m, 4) XYXY of the annotated faces of every image, by image id, in pixels; m may be 0. An empty or
            inverted box never counts in ``"all"``, ``"@s"`` and ``"size s"``.
        ignore: (m,) bool by image id, faces that are ignore regions; images that are missing here have none.
        subsets: for each named subset, (m,) bool by image id, the faces that it keeps; ignored faces never count.
        sizes: in pixels, ascending; none: no ``"size s"``.
        iou_thresh: in (0, 1].
        num_thresholds: number of score thresholds, at least 1.

    Raises:
        ValueError: an argument is out of range, or names an image that ``boxes`` lacks; the message says which.
    """

    def __init__(
        self,
        boxes: Mapping[str, ArrayLike],
        *,
        ignore: Mapping[str, ArrayLike] | None = None,
        subsets: Mapping[str, Mapping[str, ArrayLike]] | None = None,
        sizes: Sequence[float] = (),
        iou_thresh: float = 0.5,
        num_thresholds: int = 1000,
    ) -> None:
        if not 0 < iou_thresh <= 1:
            raise ValueError(f"iou_thresh: expected a number in (0, 1], got {iou_thresh}")
        if num_thresholds < 1:
            raise ValueError(f"num_thresholds: expected at least 1, got {num_thresholds}")
        self._sizes = np.asarray(sizes, dtype=np.float64)
        if self._sizes.ndim != 1 or not (np.diff(self._sizes, prepend=0) > 0).all():
            raise ValueError(f"sizes: expected positive ones, ascending, got {list(sizes)}")
        self._iou_thresh = float(iou_thresh)
        self._num_thresholds = int(num_thresholds)

        self._boxes = {image: _as_boxes(value, f"ground truth of image {image!r}") for image, value in boxes.items()}
        counts = {image: len(value) for image, value in self._boxes.items()}
        ends = np.cumsum([0, *counts.values()])
        self._first_face = dict(zip(self._boxes, ends[:-1].tolist()))
        self._num_faces = int(ends[-1])
        faces = np.concatenate([np.empty((0, 4)), *self._boxes.values()])
        valid = ~_as_flags(ignore or {}, counts, "ignore", required=False)

        self._counted: dict[str, NDArray[np.bool_]] = {}
        for name, keep in (subsets or {}).items():
            if name == "all" or name.startswith("@"):
                raise ValueError(f"subsets: expected names other than 'all' and '@...', got {name!r}")
            self._counted[name] = _as_flags(keep, counts, f"subset {name!r}", required=True) & valid
        width, height = faces[:, 2] - faces[:, 0], faces[:, 3] - faces[:, 1]
        self._counted["all"] = valid & (width > 0) & (height > 0)
        self._face_size = self._nearest_size(width * height)

        self._background = self._num_faces
        self._no_face_in_image = self._num_faces + 1
        self._updates: dict[str, _Matched] = {}
        self._sub_detectors: dict[float, dict[str, _Matched]] = {}

    @classmethod
    def from_records(cls, records: Iterable[ImageRecord], **options: Any) -> "WiderFaceAP":
        """Build from annotated images; regions to ignore are ignored faces.

        ``options`` are the keyword arguments of the constructor. No Easy, Medium and Hard.

        Raises:
            ValueError: two records share an ``image_id``, or as the constructor.
        """
        boxes, ignore = {}, {}
        for record in records:
            if record.image_id in boxes:
                raise ValueError(f"records: expected each image once, got {record.image_id!r} again")
            boxes[record.image_id], ignore[record.image_id] = record.boxes, record.ignore
        return cls(boxes, ignore=ignore, **options)

    @classmethod
    def from_official(cls, ground_truth_dir: str | os.PathLike, **options: Any) -> "WiderFaceAP":
        """Build from the official validation ground truth, with Easy, Medium and Hard.

        Image ids are ``<event>/<file name without extension>``. Faces marked invalid are ignored.

        Args:
            ground_truth_dir: folder with wider_face_val.mat and wider_{easy,medium,hard}_val.mat.
            options: keyword arguments of the constructor other than ``ignore`` and ``subsets``.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: a file is no MATLAB file or not of the published structure; names the file and the field.
        """
        boxes, ignore, subsets = read_official_ground_truth(ground_truth_dir)
        return cls(boxes, ignore=ignore, subsets=subsets, **options)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._boxes)

    @property
    def image_ids(self) -> Collection[str]:
        """Of the ground truth, in its order."""
        return self._boxes.keys()

    def update(self, image_id: str, detections: Detections) -> None:
        """Add the detections of one image. An image without an update is one without detections.

        Args:
            image_id: an image of the ground truth.
            detections: k of them, arrays or CPU tensors; k may be 0. Copied. Boxes are in pixels of the annotated
                image, scores finite and of any range. ``sub_detectors`` are the same with all images.
                ``classes`` and ``anchor_scales`` are not read.

        Raises:
            ValueError: the image is unknown or was updated before, a shape is wrong, a box is inverted or not finite, a
                score is not finite, or the sub-detectors are others than before; nothing is added then.
        """
        check_new_image(image_id, self._boxes, self._updates)
        what = f"predictions of image {image_id!r}"
        by_scale = detections.sub_detectors or {}
        if self._updates and by_scale.keys() != self._sub_detectors.keys():
            expected = sorted(self._sub_detectors)
            raise ValueError(f"{what}: sub_detectors: expected {expected} as before, got {sorted(by_scale)}")
        matched = self._match(image_id, detections, what)
        alone = {s: self._match(image_id, found, f"{what}: sub-detector {s:g}") for s, found in by_scale.items()}
        self._updates[image_id] = matched
        for scale, found in alone.items():
            self._sub_detectors.setdefault(scale, {})[image_id] = found

    def _match(self, image_id: str, detections: Detections, what: str) -> _Matched:
        boxes = _as_boxes(detections.boxes, what)
        inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
        if inverted.any():
            row = int(inverted.argmax())
            raise ValueError(f"{what}: boxes[{row}]: expected x1 <= x2 and y1 <= y2, got {boxes[row].tolist()}")
        scores = _as_vector(detections.scores, len(boxes), f"{what}: scores")
        faces = self._boxes[image_id]
        if len(faces):
            best = _best_face(boxes, faces, self._iou_thresh)
            taken = np.where(best >= 0, best + self._first_face[image_id], self._background)
        else:
            taken = np.full(len(boxes), self._no_face_in_image)
        size_ids = self._nearest_size((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.int8)
        return _Matched(scores, taken.astype(np.int32), size_ids)

    def compute(self) -> WiderFaceResult:
        """Evaluate what was added so far; more updates may follow.

        Raises:
            ValueError: the scores span more than a double holds.
        """
        return self._result(list(self._boxes), self._result_sets())

    def compute_by(self, group_of: Callable[[str], str]) -> dict[str, WiderFaceResult]:
        """Evaluate groups of images on their own, in the order of the ground truth.

        Scores keep the normalization of the whole set: a threshold is the same score in every group.

        Args:
            group_of: image id -> name of its group; for the events of WIDER FACE, what stands before the slash.

        Raises:
            ValueError: as :meth:`compute`.
        """
        groups: dict[str, list[str]] = {}
        for image_id in self._boxes:
            groups.setdefault(group_of(image_id), []).append(image_id)
        result_sets = self._result_sets()
        return {group: self._result(images, result_sets) for group, images in groups.items()}

    def _result(self, images: Sequence[str], result_sets: Sequence[_ResultSet]) -> WiderFaceResult:
        def found(result_set: _ResultSet) -> tuple[_Matched, NDArray[np.intp]]:
            """What a set has in these images, and the threshold of each detection."""
            updates = [result_set.updates[image] for image in images if image in result_set.updates]
            matched = _Matched(*(np.concatenate(parts) for parts in zip(_NO_DETECTIONS, *updates)))
            return matched, self._threshold_ids(matched.scores, result_set.score_range)

        joint, *sub_detectors = result_sets
        (scores, taken, size_ids), threshold_ids = found(joint)
        faces = np.zeros(self._num_faces, dtype=bool)
        for image in images:
            first = self._first_face[image]
            faces[first : first + len(self._boxes[image])] = True

        curves, num_faces, num_detections = {}, {}, {}
        for name, counted in self._counted.items():
            counted = counted & faces
            curves[name] = self._curve(threshold_ids, taken, counted, skip_images_without_faces=name != "all")
            num_faces[name], num_detections[name] = int(counted.sum()), len(scores)
        every = self._counted["all"] & faces
        for result_set in sub_detectors:
            alone, thresholds = found(result_set)
            name = result_set.name
            curves[name] = self._curve(thresholds, alone.taken, every, skip_images_without_faces=False)
            num_faces[name], num_detections[name] = int(every.sum()), len(alone.scores)
        has_face = taken < self._background
        for index, size in enumerate(self._sizes):
            name, mine, counted = f"size {size:g}", has_face | (size_ids == index), every & (self._face_size == index)
            curves[name] = self._curve(threshold_ids[mine], taken[mine], counted, skip_images_without_faces=False)
            num_faces[name], num_detections[name] = int(counted.sum()), int((size_ids == index).sum())

        updates = self._updates
        counts = {
            "images": len(images),
            "faces": int(faces.sum()),
            "detections": len(scores),
            "images_without_predictions": sum(
                image not in updates or not len(updates[image].scores) for image in images
            ),
            "images_without_faces": sum(len(self._boxes[image]) == 0 for image in images),
            "detections_without_faces": int((taken == self._no_face_in_image).sum()),
        }
        ap = {name: area_under_envelope(recall, precision) for name, (recall, precision) in curves.items()}
        by_score = curve_by_score(scores, taken, every, len(images))
        return WiderFaceResult(ap, curves, num_faces, num_detections, counts, self._iou_thresh, by_score)

    def _nearest_size(self, area: NDArray[np.float64]) -> NDArray[np.intp]:
        """Index of the size that is nearest to √area in log scale, the smaller one on a tie."""
        return np.searchsorted(scale_borders(self._sizes.tolist()), area, side="left")

    def _result_sets(self) -> list[_ResultSet]:
        """That of the detector, and those of its sub-detectors by ascending scale."""
        sets = {"all": self._updates} | {f"@{s:g}": self._sub_detectors[s] for s in sorted(self._sub_detectors)}
        return [_ResultSet(name, updates, _score_range(updates.values())) for name, updates in sets.items()]

    def _threshold_ids(self, scores: NDArray[np.float64], score_range: tuple[float, float]) -> NDArray[np.intp]:
        """Index t of the first threshold 1 - (t + 1) / num_thresholds that the normalized score reaches."""
        lowest, highest = score_range
        span = highest - lowest
        # Equal scores all normalize to 1: with or without them, there is one operating point.
        normalized = (scores - lowest) / span if span > 0 else np.ones_like(scores)
        thresholds = 1 - np.arange(1, self._num_thresholds + 1) / self._num_thresholds
        return self._num_thresholds - np.searchsorted(thresholds[::-1], normalized, side="right")

    def _curve(
        self,
        threshold_ids: NDArray[np.intp],
        taken: NDArray[np.int32],
        counted: NDArray[np.bool_],
        *,
        skip_images_without_faces: bool,
    ) -> Curve:
        """Recall and precision at each threshold, for the faces that are counted."""
        size = self._num_thresholds
        takes_part = np.concatenate([counted, [True, not skip_images_without_faces]])[taken]
        detected = np.cumsum(np.bincount(threshold_ids[takes_part], minlength=size))

        first_found = np.full(self._num_faces + 2, size)  # by face: the threshold of its best detection
        np.minimum.at(first_found, taken, threshold_ids)
        found = np.cumsum(np.bincount(first_found[: self._num_faces][counted], minlength=size)[:size])
        with np.errstate(invalid="ignore"):  # 0 / 0: undefined, nan
            return found / counted.sum(), found / detected


def _score_range(updates: Iterable[_Matched]) -> tuple[float, float]:
    """Lowest and highest score of a set."""
    scores = [update.scores for update in updates if len(update.scores)]
    lowest = min((float(s.min()) for s in scores), default=0.0)
    highest = max((float(s.max()) for s in scores), default=0.0)
    if math.isinf(highest - lowest):
        raise ValueError(f"scores: expected a range that a double holds, got {lowest} to {highest}")
    return lowest, highest


def _best_face(detections: NDArray[np.float64], faces: NDArray[np.float64], iou_thresh: float) -> NDArray[np.intp]:
    """(k,) index of the face with the highest IoU, the first one on a tie, or -1 where no IoU reaches ``iou_thresh``.

    The IoU of the protocol: width = x2 - x1 + 1. Boxes whose width or height comes out below 0 overlap nothing.
    """
    best = np.empty(len(detections), dtype=np.intp)
    face_x1, face_y1, face_x2, face_y2 = np.ascontiguousarray(faces.T)[:, None]
    face_area = np.maximum(face_x2 - face_x1 + 1, 0) * np.maximum(face_y2 - face_y1 + 1, 0)
    step = max(1, _PAIRS_PER_BLOCK // len(faces))
    for start in range(0, len(detections), step):
        x1, y1, x2, y2 = np.ascontiguousarray(detections[start : start + step].T)[:, :, None]
        width = np.minimum(x2, face_x2) - np.maximum(x1, face_x1) + 1
        height = np.minimum(y2, face_y2) - np.maximum(y1, face_y1) + 1
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        iou = intersection / ((x2 - x1 + 1) * (y2 - y1 + 1) + face_area - intersection)
        best[start : start + step] = np.where(iou.max(axis=1) >= iou_thresh, iou.argmax(axis=1), -1)
    return best


def _as_boxes(value: ArrayLike, what: str) -> NDArray[np.float64]:
    """Copy to a (k, 4) float64 array; an empty value of any shape gives (0, 4)."""
    boxes = np.array(value, dtype=np.float64)
    if boxes.size == 0:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{what}: boxes: expected shape (k, 4), got {boxes.shape}")
    bad = ~(np.abs(boxes) < _MAX_COORDINATE).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        limit = f"finite and below {_MAX_COORDINATE:g}"
        raise ValueError(f"{what}: boxes[{row}]: expected numbers {limit}, got {boxes[row].tolist()}")
    return boxes


def _as_vector(value: ArrayLike, size: int, what: str) -> NDArray[np.float64]:
    vector = np.array(value, dtype=np.float64)
    if vector.shape != (size,):
        raise ValueError(f"{what}: expected shape ({size},), one per box, got {vector.shape}")
    finite = np.isfinite(vector)
    if not finite.all():
        raise ValueError(f"{what}: expected finite numbers, got {vector[~finite][0]} at [{int((~finite).argmax())}]")
    return vector


def _as_flags(
    flags: Mapping[str, ArrayLike], sizes: Mapping[str, int], what: str, *, required: bool
) -> NDArray[np.bool_]:
    """The flags of all images in the order of ``sizes``; False for images without any, unless they are required."""
    unknown = next((image for image in flags if image not in sizes), None)
    if unknown is not None:
        raise ValueError(f"{what}: expected images of boxes, got {unknown!r}")
    parts = [np.empty(0, dtype=bool)]
    for image, size in sizes.items():
        if image not in flags and required:
            raise ValueError(f"{what}: expected flags for every image, got none for {image!r}")
        part = np.asarray(flags[image] if image in flags else np.zeros(size, dtype=bool)).astype(bool)
        if part.shape != (size,):
            raise ValueError(f"{what}: image {image!r}: expected {size} flags, one per box, got shape {part.shape}")
        parts.append(part)
    return np.concatenate(parts)
