"""Discrete and continuous ROC by the FDDB protocol (Jain and Learned-Miller, UM-CS-2010-009, Sec. 4)."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...data.fddb import MAX_COORDINATE, MAX_IMAGE_SIDE, FDDBImage, read_annotations
from ...data.images import image_size
from ...data.records import ImageRecord
from ...detections import Detections
from ..results import check_new_image
from .regions import Spans, ellipse_spans, overlaps, rectangle_spans
from .regressor import EllipseRegressor
from .result import FDDBResult, RocCurves

logger = logging.getLogger(__name__)

_IOU_THRESH = 0.5

# What takes the place of the rectangles: nothing, ellipses by a regressor, or by regressors fitted to FDDB itself.
Ellipse: TypeAlias = EllipseRegressor | Literal["none", "fitted"]


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
        ValueError: two images have the same id, or one has no size or an unreasonable one.
    """

    def __init__(self, images: Iterable[FDDBImage]) -> None:
        self._images: dict[str, FDDBImage] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        for image in images:
            if image.image_id in self._images:
                raise ValueError(f"images: expected each image once, got {image.image_id!r} again")
            if image.size is None or max(image.size) > MAX_IMAGE_SIDE:
                limit = f"a height and width of at most {MAX_IMAGE_SIDE} pixels"
                raise ValueError(f"image {image.image_id!r}: expected {limit}, got {image.size}")
            self._images[image.image_id] = image
            self._sizes[image.image_id] = image.size
        self._faces: dict[str, Spans] = {}  # filled when needed
        self._detections: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, image_root: str | os.PathLike | None = None) -> "FDDBRoc":
        """Build from the published folds, as :func:`~group_sampling.data.fddb.read_annotations` reads them.

        Raises:
            FileNotFoundError, UnreadableImageError, ValueError: as there; also when neither ``image_sizes.csv`` nor
                ``image_root`` is given.
        """
        images = read_annotations(folder, image_root)
        if any(image.size is None for image in images):
            raise ValueError(f"{folder}: expected image_sizes.csv, or the folder of the images, got neither")
        return cls(images)

    @classmethod
    def from_records(cls, records: Iterable[ImageRecord]) -> "FDDBRoc":
        """Build from the records of the data set; sizes that it does not tell are read from the images' headers.

        Raises:
            UnreadableImageError: the size of an image has to be read and cannot be.
            ValueError: as the constructor.
        """
        return cls(replace(record.annotation, size=image_size(record)) for record in records)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def update(self, image_id: str, detections: Detections) -> None:
        """Add the detections of one image. An image without an update is one without detections.

        Args:
            image_id: an image of the annotation.
            detections: k of them, arrays or CPU tensors; k may be 0. Copied. Boxes are in pixels, scores finite and of
                any range; the rest is not read.

        Raises:
            ValueError: the image is unknown or was updated before, a shape is wrong, a box is inverted, not finite or
                beyond a million pixels, or a score is not finite; nothing is added then.
        """
        check_new_image(image_id, self._images, self._detections)
        boxes, scores, *_ = detections
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
        ellipses: Mapping[str, Ellipse] | None = None,
        *,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> FDDBResult:
        """Evaluate what was added so far; more updates may follow.

        Args:
            ellipses: name -> what takes the place of the rectangles, see :meth:`curves`. None: the rectangles, and
                fitted ellipses unless too few faces are found to fit them, which is logged.
            progress: wraps the iteration over the images, such as ``tqdm``.

        Raises:
            ValueError: as :meth:`curves`.
        """
        if ellipses is not None:
            return FDDBResult({name: self.curves(ellipse, progress=progress) for name, ellipse in ellipses.items()})
        curves = {"rectangles": self.curves("none", progress=progress)}
        try:
            curves["fitted ellipses"] = self.curves("fitted", progress=progress)
        except ValueError as error:
            logger.warning(f"FDDB: no fitted ellipses: {error}")
        return FDDBResult(curves)

    def curves(self, ellipse: Ellipse = "none", *, progress: Callable[[Iterable], Iterable] = iter) -> RocCurves:
        """The ROC curves of what was added so far.

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
            raise ValueError(f"ellipse: expected 'none', 'fitted' or an EllipseRegressor, got {ellipse!r}")

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
        return RocCurves(thresholds, (num_detections - discrete).astype(np.int64), *rates, counts, _IOU_THRESH)

    def _overlaps(
        self, image: FDDBImage, boxes: NDArray[np.float64], regressor: EllipseRegressor | None
    ) -> NDArray[np.float64]:
        """(m, k) IoU of the faces and detections of an image."""
        height, width = self._sizes[image.image_id]
        if image.image_id not in self._faces:
            self._faces[image.image_id] = ellipse_spans(image.ellipses, height, width)
        if regressor is None:
            regions = rectangle_spans(boxes, height, width)
        else:
            regions = ellipse_spans(regressor(boxes), height, width)
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
