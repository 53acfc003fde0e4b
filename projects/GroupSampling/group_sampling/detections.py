"""What a detector found in an image: the one type that models, the pyramid and the evaluations hand on."""

from typing import Any, NamedTuple

import numpy as np


class Detections(NamedTuple):
    """k detections of one image: torch tensors or NumPy arrays, one kind throughout.

    This module imports no torch, so that evaluating result files needs none.
    """

    boxes: Any  # (k, 4) float XYXY in pixels
    scores: Any  # (k,) float
    classes: Any = None  # (k,) int64 index into the class names; None: all of class 0
    anchor_scales: Any = None  # (k,) float scale in pixels of the anchor behind each; None: the model does not say

    def select(self, index: Any) -> "Detections":
        """The rows of ``index``: indices (n,) in their order, a mask (k,), or a slice."""
        return Detections(*(None if column is None else column[index] for column in self))

    def numpy(self) -> "Detections":
        """The same as NumPy arrays on the CPU; shares memory with CPU tensors."""
        return Detections(*(_to_numpy(column) for column in self))


def _to_numpy(column: Any) -> np.ndarray | None:
    if column is None:
        return None
    return np.asarray(column.detach().cpu() if hasattr(column, "detach") else column)
