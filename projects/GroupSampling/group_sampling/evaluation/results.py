"""What the results of all protocols share.

A protocol is an object with ``update(image_id, detections)`` and ``compute()``. Its result has ``table()``,
``to_dict()`` for JSON, ``plot(path)``, and ``metrics()`` in percent.
"""

import math
import os
from collections.abc import Container, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..detections import Detections
from ..files import save_figure

Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]  # recall and precision at each threshold


class Result(Protocol):
    """Outcome of an evaluation."""

    def table(self) -> str:
        """Aligned text table."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, for JSON."""

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the curves into an image file, atomically."""

    def metrics(self) -> dict[str, float]:
        """The figures of the protocol, in percent."""


class Metric(Protocol):
    """A protocol, fed image by image."""

    def update(self, image_id: str, detections: Detections) -> None:
        """Add the detections of one image."""

    def compute(self) -> Result:
        """Evaluate what was added so far."""


def check_new_image(image_id: str, known: Container[str], updated: Container[str]) -> None:
    """Raise ValueError if ``image_id`` is not in the ground truth, or was updated before."""
    if image_id not in known:
        raise ValueError(f"predictions: expected an image of the ground truth, got {image_id!r}")
    if image_id in updated:
        raise ValueError(f"predictions: expected one update per image, got a second one for {image_id!r}")


class UnitCheck:
    """Notices result files that are not in pixels."""

    def __init__(self) -> None:
        self._num_boxes = self._num_tiny = 0

    def add(self, found: Detections) -> None:
        """Look at the boxes of an image."""
        sizes = found.boxes[:, 2:] - found.boxes[:, :2]
        self._num_boxes += len(sizes)
        self._num_tiny += int((sizes < 2).all(axis=1).sum())

    def hint(self) -> str:
        """What to tell the user where most boxes are under two pixels in both directions; else nothing."""
        if self._num_tiny <= self._num_boxes / 2:
            return ""
        return (
            f"{self._num_tiny} of {self._num_boxes} boxes are under two pixels: are they shares of the image's sides? "
            "Expected are x y w h in pixels, x and y of the top left corner"
        )


def none_if_nan(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def plot_pr_curves(
    path: str | os.PathLike, curves: Mapping[str, Curve], *, title: str, dashed: Container[str] = ()
) -> None:
    """Draw precision over recall, atomically; the suffix gives the format of the image (PNG without one).

    Args:
        curves: label -> recall and precision.
        dashed: labels of the curves that are.
    """
    from matplotlib.figure import Figure  # draws off screen and leaves the caller's backend alone

    figure = Figure(figsize=(8.5, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (label, (recall, precision)) in enumerate(curves.items()):
        axes.plot(recall, precision, "--" if label in dashed else "-", color=f"C{index}", label=label)
        axes.plot(recall[-1:], precision[-1:], "o", color=f"C{index}", markersize=4)  # a curve may be one point
    axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="Recall", ylabel="Precision", title=title)
    axes.grid(alpha=0.3)
    if curves:
        figure.legend(loc="outside right upper")  # next to the axes: the curve of a poor detector may be anywhere
    save_figure(figure, path)
