"""What a detector found in an image: the one type that models, the pyramid and the evaluations hand on."""

from collections.abc import Callable, Mapping
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
    # Scale in pixels -> what its anchors find by themselves, the paper's sub-detectors (Sec. 6.1): lists of their own,
    # no parts of this one, and without further ones. None: nobody asked the model.
    sub_detectors: "Mapping[float, Detections] | None" = None

    def select(self, index: Any) -> "Detections":
        """The rows of ``index``: indices (n,) in their order, a mask (k,), or a slice. Sub-detectors keep theirs."""
        *columns, sub_detectors = self
        return Detections(*(None if column is None else column[index] for column in columns), sub_detectors)

    def numpy(self) -> "Detections":
        """The same as NumPy arrays on the CPU; shares memory with CPU tensors."""
        return map_lists(lambda found: Detections(*map(_to_numpy, found[:-1])), self)


def map_lists(function: Callable[..., Detections], *parts: Detections) -> Detections:
    """``function`` of the detections, and by itself of those of every sub-detector.

    Args:
        function: takes as many lists without sub-detectors as there are ``parts``.
        parts: at least one; all have the same sub-detectors.
    """
    joint = function(*(part._replace(sub_detectors=None) for part in parts))
    if parts[0].sub_detectors is None:
        return joint
    lists = {scale: [part.sub_detectors[scale] for part in parts] for scale in parts[0].sub_detectors}
    return joint._replace(sub_detectors={scale: function(*found) for scale, found in lists.items()})


def _to_numpy(column: Any) -> np.ndarray | None:
    if column is None:
        return None
    return np.asarray(column.detach().cpu() if hasattr(column, "detach") else column)
