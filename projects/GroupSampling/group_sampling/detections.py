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

    @property
    def columns(self) -> dict[str, Any]:
        """The fields that have a row for every detection: all but ``sub_detectors``."""
        return {name: value for name, value in self._asdict().items() if name != "sub_detectors"}

    def select(self, index: Any) -> "Detections":
        """The rows of ``index``: indices (n,) in their order, a mask (k,), or a slice. Sub-detectors keep theirs."""
        return self._replace(**{name: None if x is None else x[index] for name, x in self.columns.items()})

    def numpy(self) -> "Detections":
        """The same as NumPy arrays on the CPU; shares memory with CPU tensors."""
        return map_lists(lambda one: Detections(**{name: _to_numpy(x) for name, x in one.columns.items()}), self)


def map_lists(function: Callable[..., Detections], *parts: Detections) -> Detections:
    """``function`` of the detections, and by itself of those of every sub-detector.

    Args:
        function: takes as many lists without sub-detectors as there are ``parts``.
        parts: at least one; all have the same sub-detectors.
    """
    joint = function(*(part._replace(sub_detectors=None) for part in parts))
    by_scale = [part.sub_detectors for part in parts if part.sub_detectors is not None]
    if not by_scale:
        return joint
    return joint._replace(sub_detectors={s: function(*(lists[s] for lists in by_scale)) for s in by_scale[0]})


def _to_numpy(column: Any) -> Any:
    if column is None:
        return None
    if not hasattr(column, "detach"):
        return np.asarray(column)
    column = column.detach().cpu()
    # NumPy has no bfloat16, in which other heads score under TEST.PRECISION.
    return np.asarray(column.float() if column.is_floating_point() and column.element_size() == 2 else column)
