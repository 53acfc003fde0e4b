"""What WIDER FACE's protocol yields: average precision and curves of every subset."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..results import Curve, none_if_nan, plot_pr_curves
from ..thresholds import ScoreCurve


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class WiderFaceResult:
    """Outcome of :meth:`WiderFaceAP.compute`. Subsets come in the order in which they are reported.

    Attributes:
        ap: average precision in [0, 1] of each subset; nan where the subset has no face.
        curves: (recall, precision) of each subset, float64 of shape (num_thresholds,), from the highest score threshold
            to the lowest; precision is nan where nothing was detected, recall is nan where the subset has no face.
        num_faces: faces counted in each subset.
        num_detections: detections that each subset judges: those of the sub-detector for ``"@s"``, those near s in size
            for ``"size s"``, which beside them judges all that take a face, else all.
        counts: of the whole detector, ``images``, ``faces`` (ignored ones included), ``detections``,
            ``images_without_predictions``, ``images_without_faces`` (no box at all, not even an ignored one) and
            ``detections_without_faces`` on them.
        iou_thresh: IoU from which a detection takes a face.
        by_score: All by score. Of the detections that take one face, the best is a true positive.
    """

    ap: dict[str, float]
    curves: dict[str, Curve]
    num_faces: dict[str, int]
    num_detections: dict[str, int]
    counts: dict[str, int]
    iou_thresh: float
    by_score: ScoreCurve

    def reporting(self, scores: Sequence[float]) -> "WiderFaceResult":
        """The same, with the table of thresholds at these scores."""
        return replace(self, by_score=self.by_score.reporting(scores))

    def table(self) -> str:
        """Aligned text table, one line per subset: AP in percent (``n/a`` without a face), faces and detections.

        Below it that of ``by_score``.
        """
        width = max(len("subset"), *map(len, self.ap))
        lines = [f"{'subset':<{width}}  AP (%)    faces  detections"]
        for name, ap in self.ap.items():
            percent = "n/a" if math.isnan(ap) else f"{100 * ap:.2f}"
            counts = f"{self.num_faces[name]:>7}  {self.num_detections[name]:>10}"
            lines.append(f"{name.capitalize():<{width}}  {percent:>6}  {counts}")
        return "\n".join([*lines, "", self.by_score.table()])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, for JSON; an undefined AP becomes None."""
        return {
            "protocol": "WIDER FACE",
            "iou_thresh": self.iou_thresh,
            "ap": {name: none_if_nan(ap) for name, ap in self.ap.items()},
            "num_faces": self.num_faces,
            "num_detections": self.num_detections,
            "counts": self.counts,
            "by_score": self.by_score.to_dict(),
        }

    def metrics(self) -> dict[str, float]:
        """AP in percent: ``AP_all``, ``AP_easy``, ``AP@16``, ..."""
        return {f"AP{name}" if name.startswith("@") else f"AP_{name}": 100 * ap for name, ap in self.ap.items()}

    def plot(self, path: str | os.PathLike, title: str = "WIDER FACE") -> None:
        """Draw the precision-recall curves, atomically; the suffix gives the format of the image (PNG without one)."""
        curves, dashed = {}, set()
        for name, curve in self.curves.items():
            ap = "n/a" if math.isnan(self.ap[name]) else f"{100 * self.ap[name]:.1f}"
            label = f"{name.capitalize()} (AP {ap})"
            curves[label] = curve
            if name.startswith("@"):
                dashed.add(label)
        plot_pr_curves(path, curves, title=title, dashed=dashed)


def area_under_envelope(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the precision envelope; nan without faces."""
    if np.isnan(recall).any():
        return math.nan
    recall = np.concatenate([[0], recall, [1]])
    precision = np.concatenate([[0], np.nan_to_num(precision), [0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def curve_by_score(
    scores: NDArray[np.float64], taken: NDArray[np.int32], counted: NDArray[np.bool_], num_images: int
) -> ScoreCurve:
    """The curve of k detections.

    Args:
        scores: (k,).
        taken: (k,) index of the face that each takes, beyond the last one where it takes none.
        counted: (m,) whether a face counts.
    """
    order = np.argsort(-scores, kind="stable")
    faces = taken[order]
    is_best = np.zeros(len(scores), dtype=bool)  # of those that take the same face
    is_best[np.unique(faces, return_index=True)[1]] = True
    is_face = faces < len(counted)
    takes_part = np.where(is_face, np.append(counted, False)[np.minimum(faces, len(counted))], True)
    return ScoreCurve.from_detections(
        scores[order][takes_part],
        (is_best & is_face)[takes_part],
        num_objects=int(counted.sum()),
        num_images=num_images,
    )
