"""Two-pass matching of ground-truth boxes to anchors."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..anchors import AnchorGrid
from . import _checks, _library, reference

__all__ = ["MatchOptions", "MatchResult", "match_anchor_grid", "match_anchors"]


class MatchOptions(TypedDict):
    """The numbers of the matching, as keyword arguments of :func:`match_anchors` and its like."""

    pos_iou: float
    neg_iou: float
    second_pass: str
    ignore_ioa: float


class MatchResult(NamedTuple):
    """What each anchor was assigned; (n,) tensors for one image, (B, n) for a batch.

    Attributes:
        labels: int8. 1 positive, 0 negative, -1 ignored.
        matched_gt: int64. Index of the best ground truth where its IoU reaches ``neg_iou``, else -1.
        best_iou: that IoU, in the boxes' dtype, else 0.
    """

    labels: Tensor
    matched_gt: Tensor
    best_iou: Tensor


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    *,
    pos_iou: float = 0.6,
    neg_iou: float = 0.4,
    second_pass: str = "all",
    ignore_boxes: Tensor | None = None,
    ignore_ioa: float = 0.5,
) -> MatchResult:
    """Two-pass assignment of ground-truth boxes to arbitrary anchors (paper, Sec. 4.1, Eq. 1).

    Pass 1 labels each anchor from its best IoU: positive if >= ``pos_iou``, negative if < ``neg_iou``, else ignored.
    Pass 2 goes to the ground truths that no anchor took as a positive in pass 1 and promotes ignored anchors whose
    best ground truth they are. The n x m matrix is never stored.

    Shape shorthand: n anchors, m ground-truth boxes, k ignore boxes; each may be 0.

    Args:
        anchors: (n, 4) XYXY boxes in pixels, any strides. float32 or float64; float16 and bfloat16 are promoted to
            float32.
        gt_boxes: (m, 4), same dtype and device as ``anchors``.
        pos_iou: λ1 of the paper.
        neg_iou: λ2, 0 < λ2 <= λ1 <= 1. Thresholds are cast to the boxes' dtype before they are compared.
        second_pass: "all" promotes every anchor that qualifies, "best" the one with the highest IoU for each ground
            truth (ties: lowest anchor index), "none" skips pass 2.
        ignore_boxes: (k, 4) regions that are neither face nor background. After pass 2 a negative anchor becomes
            ignored if one of them covers at least ``ignore_ioa`` of its area. Positives stay.
        ignore_ioa: share of the anchor's area in (0, 1].

    Returns:
        MatchResult of (n,) tensors. ``matched_gt`` is -1 and ``best_iou`` 0 where the best IoU is below ``neg_iou``:
        such an anchor is negative whoever its best box is, and the windowed operators never look at it.

    Raises:
        ValueError: a shape, device, threshold or policy is not as above.
        TypeError: dtypes differ or are not floating point.

    Invalid boxes (a coordinate that is not finite, x2 <= x1 or y2 <= y1) overlap nothing: they add no positive, change
    nothing for the others and ignore nothing. Equal IoUs go to the lowest ground-truth index. Not differentiable.
    CPU, CUDA and the reference return identical bits.
    """
    op = "match_anchors"
    anchors = _checks.boxes(op, "anchors", anchors)
    gt_boxes = _checks.boxes(op, "gt_boxes", gt_boxes)
    _checks.same_kind(op, "anchors", anchors, "gt_boxes", gt_boxes)
    if ignore_boxes is not None:
        ignore_boxes = _checks.boxes(op, "ignore_boxes", ignore_boxes)
        _checks.same_kind(op, "anchors", anchors, "ignore_boxes", ignore_boxes)
    _checks.thresholds(op, pos_iou, neg_iou, second_pass, ignore_ioa)
    if _library.has_kernels(anchors.device):
        result = torch.ops.group_sampling.match_anchors(
            anchors, gt_boxes, ignore_boxes, pos_iou, neg_iou, second_pass, ignore_ioa
        )
    else:
        result = reference.match_anchors(anchors, gt_boxes, pos_iou, neg_iou, second_pass, ignore_boxes, ignore_ioa)
    return MatchResult(*result)


@torch.no_grad()
def match_anchor_grid(
    grid: AnchorGrid,
    gt_boxes: Sequence[Tensor],
    *,
    pos_iou: float = 0.6,
    neg_iou: float = 0.4,
    second_pass: str = "all",
    ignore_boxes: Sequence[Tensor] | None = None,
    ignore_ioa: float = 0.5,
) -> MatchResult:
    """:func:`match_anchors` for a grid of anchors and a batch of images, by exact windows.

    IoU >= ``neg_iou`` needs an overlap that bounds where the anchor can sit, so each ground truth visits a small window
    of each lattice instead of all n anchors. The result equals ``match_anchors(grid.boxes(), gt_boxes[b], ...)`` bit
    for bit.

    Args:
        grid: n anchors; the same for every image of the batch.
        gt_boxes: B tensors (m_b, 4) of one dtype and device; m_b may be 0.
        ignore_boxes: None, or B tensors (k_b, 4).
        pos_iou, neg_iou, second_pass, ignore_ioa: as in :func:`match_anchors`.

    Returns:
        MatchResult of (B, n) tensors; on the CPU and float32 when B is 0.

    Raises:
        ValueError, TypeError: as in :func:`match_anchors`, or the sequences differ in length.
    """
    op = "match_anchor_grid"
    gt_boxes, ignore_boxes = _checks.box_lists(op, gt_boxes, ignore_boxes)
    _checks.thresholds(op, pos_iou, neg_iou, second_pass, ignore_ioa)
    if not gt_boxes:
        shape = (0, grid.num_anchors)
        return MatchResult(
            torch.empty(shape, dtype=torch.int8), torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        )
    if _library.has_kernels(gt_boxes[0].device):
        result = torch.ops.group_sampling.match_anchor_grid(
            gt_boxes, ignore_boxes, grid.lattice_ints, grid.lattice_floats, pos_iou, neg_iou, second_pass, ignore_ioa
        )
    else:
        result = reference.match_anchor_grid(grid, gt_boxes, pos_iou, neg_iou, second_pass, ignore_boxes, ignore_ioa)
    return MatchResult(*result)


if _library.extension_status().loaded:

    @torch.library.register_fake("group_sampling::match_anchors")
    def _(anchors, gt_boxes, ignore_boxes, pos_iou, neg_iou, second_pass, ignore_ioa):
        return _empty_result(anchors, (anchors.shape[0],))

    @torch.library.register_fake("group_sampling::match_anchor_grid")
    def _(gt_boxes, ignore_boxes, lattice_ints, lattice_floats, pos_iou, neg_iou, second_pass, ignore_ioa):
        num_anchors = sum(height * width for height, width in zip(lattice_ints[1::6], lattice_ints[2::6]))
        return _empty_result(gt_boxes[0], (len(gt_boxes), num_anchors))

    def _empty_result(boxes, shape):
        return (
            boxes.new_empty(shape, dtype=torch.int8),
            boxes.new_empty(shape, dtype=torch.int64),
            boxes.new_empty(shape),
        )
