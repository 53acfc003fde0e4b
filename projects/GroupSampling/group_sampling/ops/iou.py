"""Pairwise IoU."""

import torch
from torch import Tensor

from . import _checks, _library, reference

__all__ = ["pairwise_iou"]


@torch.no_grad()
def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The matrix M(i, j) of Sec. 4.1 of the paper: IoU of every pair of boxes, in one pass and without temporaries.

    For analysis and small problems; matching a detector's anchors never needs the matrix, see
    :func:`~group_sampling.ops.match_anchors`.

    Args:
        boxes1: (n, 4) XYXY boxes in pixels, width = x2 - x1, any strides. float32 or float64; float16 and bfloat16 are
            promoted to float32.
        boxes2: (m, 4), same dtype and device.

    Returns:
        (n, m) IoU in [0, 1]. 0 for a pair with an invalid box: a coordinate that is not finite, x2 <= x1 or y2 <= y1.

    Raises:
        ValueError: a shape is not (., 4), or the devices differ.
        TypeError: dtypes differ or are not floating point.

    Not differentiable. CPU, CUDA and the reference return identical bits.
    """
    boxes1 = _checks.boxes("pairwise_iou", "boxes1", boxes1)
    boxes2 = _checks.boxes("pairwise_iou", "boxes2", boxes2)
    _checks.same_kind("pairwise_iou", "boxes1", boxes1, "boxes2", boxes2)
    if _library.has_kernels(boxes1.device):
        return torch.ops.group_sampling.pairwise_iou(boxes1, boxes2)
    return reference.pairwise_iou(boxes1, boxes2)


if _library.extension_status().loaded:

    @torch.library.register_fake("group_sampling::pairwise_iou")
    def _(boxes1, boxes2):
        return boxes1.new_empty((boxes1.shape[0], boxes2.shape[0]))
