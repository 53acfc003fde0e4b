"""Discrete and continuous ROC by the FDDB protocol (Jain and Learned-Miller, UM-CS-2010-009, Sec. 4)."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...data.fddb import MAX_COORDINATE, FDDBImage, read_annotations
from ...files import write_atomically
from .regions import Spans, ellipse_spans, overlaps, rectangle_spans
from .regressor import EllipseRegressor

# False positives, over all images, at which papers state the true positive rate.
OPERATING_POINTS = (200, 500, 1000)


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class FDDBResult:
    """Outcome of :meth:`FDDBRoc.compute`: p points of the ROC curves, from the highest score threshold to the lowest.

    The first point is the origin, at the threshold inf; then there is one for each score that occurs. True positive
    rates are nan where nothing is annotated.

    Attributes:
        thresholds: (p,) float64, scores.
        false_positives: (p,) int64, over all images; the same for both curves.
        discrete: (p,) float64, share of the faces that a detection overlaps with IoU above 0.5.
        continuous: (p,) float64, the IoUs of the matched pairs by the number of faces.
        counts: ``images``, ``faces``, ``detections`` and ``images_without_predictions``.
        iou_thresh: a match counts as discrete true positive above it.
    """

    thresholds: NDArray[np.float64]
    false_positives: NDArray[np.int64]
    discrete: NDArray[np.float64]
    continuous: NDArray[np.float64]
    counts: dict[str, int]
    iou_thresh: float

    def at(self, num_false_positives: int) -> tuple[float, float]:
        """The highest discrete and continuous true positive rate with at most so many false positives."""
        allowed = self.false_positives <= num_false_positives
        return float(self.discrete[allowed].max()), float(self.continuous[allowed].max())

    def to_dict(self) -> dict:
        """Everything but the curves, for JSON; an undefined rate becomes None."""
        rates = {str(number): [_or_none(rate) for rate in self.at(number)] for number in OPERATING_POINTS}
        return {
            "iou_thresh": self.iou_thresh,
            "discrete": {number: rate for number, (rate, _) in rates.items()},
            "continuous": {number: rate for number, (_, rate) in rates.items()},
            "final": {
                "discrete": _or_none(float(self.discrete[-1])),
                "continuous": _or_none(float(self.continuous[-1])),
                "false_positives": int(self.false_positives[-1]),
            },
            "counts": self.counts,
        }


class FDDBRoc:
    """ROC curves by the FDDB protocol, fed image by image.

    The protocol, as its authors published it in C++: faces are ellipses, detections rectangles or ellipses, and overlap
    is counted in pixels inside the image (:mod:`~group_sampling.evaluation.fddb.regions`). At each score of an image,
    the detections from that score on are matched to the faces one to one, so that the sum of IoUs is largest. A pair
    with an IoU above 0.5 is a discrete true positive; every other detection is a false positive; the continuous score
    is the sum of the IoUs of all pairs. Where several matchings have the largest sum, which of them counts is not
    specified; the sum is the same.

    Args:
        images: the annotation, with sizes.

    Raises:
        ValueError: two images have the same id, or one has no size.
    """

    def __init__(self, images: Iterable[FDDBImage]) -> None:
        self._images: dict[str, FDDBImage] = {}
        for image in images:
            if image.image_id in self._images:
                raise ValueError(f"two images have the image_id {image.image_id!r}")
            if image.size is None:
                raise ValueError(f"image {image.image_id!r}: expected its height and width, got none")
            self._images[image.image_id] = image
        self._faces: dict[str, Spans] = {}  # filled when needed
        self._detections: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, image_root: str | os.PathLike | None = None) -> "FDDBRoc":
        """Build from the published folds, as :func:`~group_sampling.data.fddb.read_annotations` reads them.

        Raises:
            FileNotFoundError, ValueError: as there; also when neither ``image_sizes.csv`` nor ``image_root`` is given.
        """
        images = read_annotations(folder, image_root)
        if any(image.size is None for image in images):
            raise ValueError(
                f"{folder}: the sizes of the images are needed: give their folder, or image_sizes.csv there"
            )
        return cls(images)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def update(self, image_id: str, boxes: ArrayLike, scores: ArrayLike) -> None:
        """Add the detections of one image. An image without an update is one without detections.

        Args:
            image_id: an image of the annotation.
            boxes: (k, 4) XYXY in pixels, arrays or CPU tensors; k may be 0. Copied.
            scores: (k,) finite, any range.

        Raises:
            ValueError: the image is unknown or was updated before, a shape is wrong, a box is inverted, not finite or
                beyond a million pixels, or a score is not finite; nothing is added then.
        """
        if image_id not in self._images:
            raise ValueError(f"predictions for image {image_id!r}, which is not in the ground truth")
        if image_id in self._detections:
            raise ValueError(f"second predictions for image {image_id!r}; an image is updated once")
        boxes = np.array(boxes, dtype=np.float64)
        boxes = boxes if boxes.size else np.empty((0, 4))
        scores = np.array(scores, dtype=np.float64)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
            shapes = f"{boxes.shape} and {scores.shape}"
            raise ValueError(f"predictions of image {image_id!r}: expected boxes (k, 4) and scores (k,), got {shapes}")
        good = (np.abs(boxes) <= 2 * MAX_COORDINATE).all(axis=1) & (boxes[:, 2:] >= boxes[:, :2]).all(axis=1)
        good &= np.isfinite(scores)
        if not good.all():
            row = int((~good).argmax())
            raise ValueError(
                f"predictions of image {image_id!r}: expected x1 <= x2, y1 <= y2, finite numbers and none "
                f"beyond any image, got boxes[{row}] = {boxes[row].tolist()}, scores[{row}] = {scores[row]}"
            )
        self._detections[image_id] = boxes, scores

    def compute(
        self,
        ellipse: EllipseRegressor | Literal["none", "fitted"] = "none",
        *,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> FDDBResult:
        """Evaluate what was added so far; more updates may follow.

        Args:
            ellipse: what takes the place of the rectangles.

                - ``"none"``: nothing; gives the figures of the official evaluation.
                - a regressor: the ellipses that it makes of them.
                - ``"fitted"``: ellipses by a regressor fitted to FDDB itself. For each fold it is fitted to the other
                  folds: to the discrete true positives that their rectangles give when all scores count.
            progress: wraps the iteration over the images, such as ``tqdm``.

        Raises:
            ValueError: ``ellipse`` is none of these, or too few faces are found outside a fold to fit a regressor.
        """
        if ellipse == "fitted":
            regressors = self._fit(progress)
        elif isinstance(ellipse, EllipseRegressor):
            regressors = {image.fold: ellipse for image in self._images.values()}
        elif ellipse == "none":
            regressors = {}
        else:
            raise ValueError(f"ellipse must be 'none', 'fitted' or an EllipseRegressor, got {ellipse!r}")

        steps = [np.empty((0, 4))]
        for image_id, (boxes, scores) in progress(self._detections.items()):
            image = self._images[image_id]
            steps.append(_steps(self._overlaps(image, boxes, regressors.get(image.fold)), scores))
        thresholds, num_detections, discrete, continuous = _accumulate(np.concatenate(steps))
        num_faces = sum(len(image.ellipses) for image in self._images.values())
        with np.errstate(invalid="ignore"):  # 0 / 0: undefined, nan
            rates = discrete / np.float64(num_faces), continuous / np.float64(num_faces)
        counts = {
            "images": len(self._images),
            "faces": num_faces,
            "detections": int(num_detections[-1]),
            "images_without_predictions": len(self._images)
            - sum(len(scores) > 0 for _, scores in self._detections.values()),
        }
        return FDDBResult(thresholds, (num_detections - discrete).astype(np.int64), *rates, counts, _IOU_THRESH)

    def _overlaps(
        self, image: FDDBImage, boxes: NDArray[np.float64], regressor: EllipseRegressor | None
    ) -> NDArray[np.float64]:
        """(m, k) IoU of the faces and detections of an image."""
        if image.image_id not in self._faces:
            self._faces[image.image_id] = ellipse_spans(image.ellipses, *image.size)
        if regressor is None:
            regions = rectangle_spans(boxes, *image.size)
        else:
            regions = ellipse_spans(regressor(boxes), *image.size)
        return overlaps(self._faces[image.image_id], regions)

    def _fit(self, progress: Callable[[Iterable], Iterable]) -> dict[int, EllipseRegressor]:
        """For each fold with detections, the regressor of the other folds."""
        pairs: dict[int, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
        for image_id, (boxes, _) in progress(self._detections.items()):
            if len(boxes) == 0:
                continue
            image = self._images[image_id]
            iou = self._overlaps(image, boxes, None)
            face, detection = _match(iou)
            found = iou[face, detection] > _IOU_THRESH
            pairs.setdefault(image.fold, []).append((boxes[detection[found]], image.ellipses[face[found]]))
        regressors = {}
        for fold in pairs:
            others = [pair for other, fold_pairs in pairs.items() if other != fold for pair in fold_pairs]
            boxes = np.concatenate([np.empty((0, 4)), *(boxes for boxes, _ in others)])
            ellipses = np.concatenate([np.empty((0, 5)), *(ellipses for _, ellipses in others)])
            try:
                regressors[fold] = EllipseRegressor.fit(boxes, ellipses)
            except ValueError as error:
                raise ValueError(f"cannot fit ellipses for fold {fold} to the other folds: {error}") from error
        return regressors


def table(results: Mapping[str, FDDBResult]) -> str:
    """Aligned text table, a line per result: true positive rates in percent at the usual false positives, and the last
    point of the curve. A rate at more false positives than the curve has is the one of its last point."""
    width = max(len("ellipse"), *map(len, results))
    points = "".join(f"{number:>7,}" for number in OPERATING_POINTS)
    head = f"{'':<{width}}  {'discrete TPR (%) at FP':<{len(points)}}  {'continuous TPR (%) at FP':<{len(points)}}"
    lines = [head.rstrip(), f"{'ellipse':<{width}}  {points}  {points}    last FP"]
    for name, result in results.items():
        rates = np.array([result.at(number) for number in OPERATING_POINTS]).T
        columns = ["".join(f"{'n/a' if math.isnan(rate) else f'{100 * rate:.2f}':>7}" for rate in row) for row in rates]
        lines.append(f"{name:<{width}}  {columns[0]}  {columns[1]}  {result.false_positives[-1]:>9,}")
    return "\n".join(lines)


def write_json(path: str | os.PathLike, results: Mapping[str, FDDBResult]) -> None:
    """Write everything but the curves, atomically."""
    content = {"protocol": "FDDB", "results": {name: result.to_dict() for name, result in results.items()}}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def plot(path: str | os.PathLike, results: Mapping[str, FDDBResult], title: str = "FDDB") -> None:
    """Draw the discrete and the continuous ROC curves, atomically; the suffix gives the format (PNG without one)."""
    from matplotlib.figure import Figure  # draws off screen and leaves the caller's backend alone

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    figure.suptitle(title)
    end = max(*OPERATING_POINTS, *(int(result.false_positives[-1]) for result in results.values()))
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("discrete", "continuous")):
        for index, (name, result) in enumerate(results.items()):
            rate = getattr(result, kind)
            label = f"{name} ({result.at(OPERATING_POINTS[0])[kind == 'continuous']:.3f} at {OPERATING_POINTS[0]} FP)"
            axes.plot(result.false_positives, rate, color=f"C{index}", label=label)
            axes.plot(result.false_positives[-1:], rate[-1:], "o", color=f"C{index}", markersize=4)
        axes.set(xlim=(0, 1.02 * end), ylim=(0, 1), xlabel="False positives", title=f"{kind.capitalize()} score")
        axes.set_xticks([0, *OPERATING_POINTS] if end <= 2 * OPERATING_POINTS[-1] else axes.get_xticks())
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("True positive rate")
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png")
    write_atomically(path, image.getvalue())


_IOU_THRESH = 0.5


def _match(iou: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the one-to-one matching with the largest sum of IoUs."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(iou, maximize=True)


def _steps(iou: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows (score, detections, discrete true positives, continuous score) by which an image adds to the totals.

    With m faces, only the m detections that overlap a face best can be its match in a best matching: were it matched to
    another one, one of those m would be free. So a detection that is not among them, in no face, changes nothing, and
    matchings stay small however many detections there are.
    """
    num_faces = len(iou)
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)) + 1, len(ordered)) if len(ordered) else np.empty(0, dtype=np.intp)
    steps = np.zeros((len(ends), 4))
    candidates = np.empty(0, dtype=np.intp)
    entry = np.zeros((num_faces, 1))  # IoU above which a detection is among the best of the face
    begin, discrete, continuous = 0, 0, 0.0
    for step, end in zip(steps, ends.tolist()):
        new = order[begin:end]
        step[:2] = ordered[begin], end - begin
        begin = end
        better = (iou[:, new] > entry).any(axis=0)
        if not better.any():
            continue
        candidates = np.concatenate([candidates, new[better]])
        if len(candidates) > num_faces:
            best = np.argpartition(-iou[:, candidates], num_faces - 1, axis=1)[:, :num_faces]
            entry = np.take_along_axis(iou[:, candidates], best[:, -1:], axis=1)
            candidates = candidates[np.unique(best)]
        matched = iou[:, candidates][_match(iou[:, candidates])]
        step[2:] = (matched > _IOU_THRESH).sum() - discrete, matched.sum() - continuous
        discrete, continuous = discrete + step[2], continuous + step[3]
    return steps


def _accumulate(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 1 + distinct scores): threshold, and the totals of the rows from it on; the origin comes first."""
    steps = steps[np.argsort(-steps[:, 0], kind="stable")]
    last = np.append(steps[:-1, 0] != steps[1:, 0], True)[: len(steps)]
    totals = np.cumsum(steps, axis=0)[last]
    totals[:, 0] = steps[last, 0]
    return np.concatenate([[[np.inf, 0, 0, 0]], totals]).T


def _or_none(rate: float) -> float | None:
    return None if math.isnan(rate) else rate
