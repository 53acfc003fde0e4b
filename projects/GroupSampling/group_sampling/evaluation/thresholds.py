"""Which score to cut at: precision, recall and false positives per image of a result set, from each score on."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .results import none_if_nan

SCORES = (0.1, 0.3, 0.5, 0.7, 0.9)


def add_scores_flag(parser: argparse.ArgumentParser) -> None:
    """``--scores`` of the evaluating commands, for ``reporting`` of a result."""
    parser.add_argument(
        "--scores",
        type=float,
        nargs="+",
        default=list(SCORES),
        metavar="SCORE",
        help=f"of the table of thresholds (default: {' '.join(map(str, SCORES))})",
    )


class OperatingPoint(NamedTuple):
    """What detections of at least ``score`` are worth; nan where a quotient is undefined."""

    score: float
    precision: float
    recall: float
    f1: float
    false_positives_per_image: float


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class ScoreCurve:
    """The detections of a result set by score; p is the number of distinct ones.

    Attributes:
        scores: (p,) float64, descending.
        true_positives, false_positives: (p,) int64, among the detections of at least that score. What falls on ignored
            objects is neither.
        num_objects: objects that count.
        num_images: images of the data set, those without detections among them.
        reported: the scores of :meth:`table` and :meth:`to_dict`, beside that of the best F1.
    """

    scores: NDArray[np.float64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    num_objects: int
    num_images: int
    reported: tuple[float, ...] = SCORES

    @classmethod
    def from_detections(
        cls, scores: ArrayLike, is_true: ArrayLike, *, num_objects: int, num_images: int
    ) -> "ScoreCurve":
        """
        Args:
            scores: (k,), in any order.
            is_true: (k,) bool, a true positive rather than a false one.
        """
        scores, is_true = np.asarray(scores, dtype=np.float64), np.asarray(is_true, dtype=bool)
        order = np.argsort(-scores, kind="stable")
        last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each distinct score
        found = np.cumsum(is_true[order])[last]
        return cls(scores[order][last], found, last + 1 - found, num_objects, num_images)

    def reporting(self, scores: Sequence[float]) -> "ScoreCurve":
        """The same, with other scores in :meth:`table` and :meth:`to_dict`."""
        return replace(self, reported=tuple(map(float, scores)))

    def at(self, score: float) -> OperatingPoint:
        """The point of the detections of at least this score."""
        count = int(np.searchsorted(-self.scores, -score, side="right"))
        found, wrong = (int(self.true_positives[count - 1]), int(self.false_positives[count - 1])) if count else (0, 0)
        return OperatingPoint(
            float(score),
            found / (found + wrong) if found + wrong else math.nan,
            found / self.num_objects if self.num_objects else math.nan,
            2 * found / (found + wrong + self.num_objects) if found + wrong + self.num_objects else math.nan,
            wrong / self.num_images if self.num_images else math.nan,
        )

    def best(self) -> OperatingPoint | None:
        """The point of the highest F1, of the highest score on a tie; None where nothing was detected."""
        if not len(self.scores):
            return None
        positives = self.true_positives + self.false_positives
        return self.at(self.scores[np.argmax(2 * self.true_positives / (positives + self.num_objects))])

    def table(self) -> str:
        """Aligned text table of the scores reported, the best F1 last; ``n/a`` where undefined."""
        best = self.best()
        rows = [("", self.at(score)) for score in self.reported] + ([("best F1", best)] if best else [])
        lines = ["score      precision (%)  recall (%)  F1 (%)  false positives per image"]
        for name, point in rows:
            shares = [f"{100 * value:.2f}" if not math.isnan(value) else "n/a" for value in point[1:4]]
            wrong = point.false_positives_per_image
            line = f"{point.score:<9.4g}  {shares[0]:>13}  {shares[1]:>10}  {shares[2]:>6}  "
            lines.append((line + f"{'n/a' if math.isnan(wrong) else f'{wrong:.3f}':>25}  {name}").rstrip())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The rows of :meth:`table` in [0, 1], for JSON: "scores", a list, and "best_f1"; undefined values are None."""

        def row(point: OperatingPoint) -> dict[str, float | None]:
            return {name: none_if_nan(value) for name, value in point._asdict().items()}

        best = self.best()
        return {"scores": [row(self.at(score)) for score in self.reported], "best_f1": row(best) if best else None}
