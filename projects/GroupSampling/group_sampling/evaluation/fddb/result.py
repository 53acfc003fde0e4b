"""What FDDB's protocol yields: ROC curves, for the rectangles of the detections and for ellipses made of them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files import save_figure
from ..results import none_if_nan
from ..thresholds import SCORES, ScoreCurve

# False positives, over all images, at which papers state the true positive rate.
OPERATING_POINTS = (200, 500, 1000)


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class RocCurves:
    """p points of the discrete and the continuous ROC curve, from the highest score threshold to the lowest.

    The first point is the origin, at the threshold inf; then there is one for each score that occurs. True positive
    rates are nan where nothing is annotated.

    Attributes:
        thresholds: (p,) float64, scores.
        false_positives: (p,) int64, over all images; the same for both curves.
        discrete: (p,) float64, share of the faces that a detection overlaps with IoU above 0.5.
        continuous: (p,) float64, the IoUs of the matched pairs divided by the number of faces.
        counts: ``images``, ``faces``, ``detections`` and ``images_without_predictions``.
        iou_thresh: a match counts as discrete true positive above it.
        reported: scores of the table of thresholds.
    """

    thresholds: NDArray[np.float64]
    false_positives: NDArray[np.int64]
    discrete: NDArray[np.float64]
    continuous: NDArray[np.float64]
    counts: dict[str, int]
    iou_thresh: float
    reported: tuple[float, ...] = SCORES

    def at(self, num_false_positives: int) -> tuple[float, float]:
        """The highest discrete and continuous true positive rate with at most that many false positives."""
        allowed = self.false_positives <= num_false_positives
        return float(self.discrete[allowed].max()), float(self.continuous[allowed].max())

    @property
    def by_score(self) -> ScoreCurve:
        """The discrete curve by score."""
        num_faces = self.counts["faces"]
        found = np.rint(np.nan_to_num(self.discrete[1:]) * num_faces).astype(np.int64)
        curve = ScoreCurve(self.thresholds[1:], found, self.false_positives[1:], num_faces, self.counts["images"])
        return curve.reporting(self.reported)

    def to_dict(self) -> dict:
        """Everything but the curves, for JSON; an undefined rate becomes None."""
        rates = {str(number): [none_if_nan(rate) for rate in self.at(number)] for number in OPERATING_POINTS}
        return {
            "iou_thresh": self.iou_thresh,
            "discrete": {number: rate for number, (rate, _) in rates.items()},
            "continuous": {number: rate for number, (_, rate) in rates.items()},
            "final": {
                "discrete": none_if_nan(float(self.discrete[-1])),
                "continuous": none_if_nan(float(self.continuous[-1])),
                "false_positives": int(self.false_positives[-1]),
            },
            "counts": self.counts,
            "by_score": self.by_score.to_dict(),
        }


@dataclass(frozen=True)
class FDDBResult:
    """Outcome of :meth:`FDDBRoc.compute`.

    Attributes:
        curves: by what took the place of the detections' rectangles, such as "rectangles" and "fitted ellipses".
    """

    curves: dict[str, RocCurves]

    @property
    def counts(self) -> dict[str, int]:
        """Those of the curves, which agree."""
        return next(iter(self.curves.values())).counts

    def reporting(self, scores: Sequence[float]) -> "FDDBResult":
        """The same, with the tables of thresholds at these scores."""
        return FDDBResult({name: replace(c, reported=tuple(map(float, scores))) for name, c in self.curves.items()})

    def metrics(self) -> dict[str, float]:
        """True positive rates in percent, ``discrete@n`` and ``continuous@n`` for n false positives.

        Those of the second and further curves end with an underscore and the first word of their name.
        """
        rates = {}
        for index, (name, curves) in enumerate(self.curves.items()):
            suffix = f"_{name.split()[0]}" if index else ""
            for number in OPERATING_POINTS:
                for kind, rate in zip(("discrete", "continuous"), curves.at(number)):
                    rates[f"{kind}@{number}{suffix}"] = 100 * rate
        return rates

    def table(self) -> str:
        """Aligned text table, one line per curve: true positive rates in percent at the usual false positives, and the
        last point of the curve. A rate at more false positives than the curve has is the one of its last point. Below
        them the discrete curves by score."""
        width = max(len("ellipse"), *map(len, self.curves))
        points = "".join(f"{number:>7,}" for number in OPERATING_POINTS)
        head = f"{'':<{width}}  {'discrete TPR (%) at FP':<{len(points)}}  {'continuous TPR (%) at FP':<{len(points)}}"
        lines = [head.rstrip(), f"{'ellipse':<{width}}  {points}  {points}    last FP"]
        for name, curves in self.curves.items():
            rates = np.array([curves.at(number) for number in OPERATING_POINTS]).T
            columns = [
                "".join(f"{'n/a' if math.isnan(rate) else f'{100 * rate:.2f}':>7}" for rate in row) for row in rates
            ]
            lines.append(f"{name:<{width}}  {columns[0]}  {columns[1]}  {curves.false_positives[-1]:>9,}")
        for name, curves in self.curves.items():
            lines += ["", name, curves.by_score.table()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, for JSON; an undefined rate becomes None."""
        return {"protocol": "FDDB", "results": {name: curves.to_dict() for name, curves in self.curves.items()}}

    def plot(self, path: str | os.PathLike, title: str = "FDDB") -> None:
        """Draw the discrete and the continuous ROC curves, atomically; the suffix gives the format of the image."""
        from matplotlib.figure import Figure  # draws off screen and leaves the caller's backend alone
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        figure = Figure(figsize=(11, 5), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.05))
        figure.suptitle(title)
        end = max(*OPERATING_POINTS, *(int(curves.false_positives[-1]) for curves in self.curves.values()))
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("discrete", "continuous")):
            for index, (name, curves) in enumerate(self.curves.items()):
                rate = getattr(curves, kind)
                at_first = curves.at(OPERATING_POINTS[0])[kind == "continuous"]
                label = f"{name} ({at_first:.3f} at {OPERATING_POINTS[0]} FP)"
                axes.plot(curves.false_positives, rate, color=f"C{index}", label=label)
                axes.plot(curves.false_positives[-1:], rate[-1:], "o", color=f"C{index}", markersize=4)
            axes.set(xlim=(0, 1.02 * end), ylim=(0, 1), xlabel="False positives", title=f"{kind.capitalize()} score")
            axes.set_xticks([0, *OPERATING_POINTS] if end <= 2 * OPERATING_POINTS[-1] else axes.get_xticks())
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right")
        figure.axes[0].set_ylabel("True positive rate")
        save_figure(figure, path)
