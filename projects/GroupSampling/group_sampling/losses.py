"""Losses of the paper, unreduced: one value per anchor or box.

``iou_l2`` is ‖1 − IoU‖² (Sec. 5, Eq. 2); ``iou_log`` is UnitBox's −ln IoU, ``smooth_l1`` acts on the deltas (Table 3).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import decode_boxes, encode_boxes, paired_iou

BOX_LOSSES = ("iou_l2", "iou_log", "smooth_l1")

# −ln IoU of disjoint boxes would be infinite; IoU is floored here, which caps the loss at 13.8 and its gradient at 0.
MIN_IOU = 1e-6


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Two-way softmax loss of each anchor (Sec. 5).

    Args:
        logits: (...) face logit minus background logit.
        labels: (...) 1 for a face.

    Returns:
        (...) float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), (labels == 1).float(), reduction="none")


def box_loss(
    kind: str,
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    smooth_l1_beta: float = 0.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Tensor:
    """Regression loss of each predicted box (Sec. 5 and Table 3).

    Args:
        kind: one of :data:`BOX_LOSSES`: ``iou_l2`` is ‖1 − IoU‖² (Eq. 2), ``iou_log`` is UnitBox's −ln IoU, and
            ``smooth_l1`` compares deltas.
        deltas: (..., 4) predicted deltas, see :func:`group_sampling.boxes.decode_boxes`.
        anchors, gt_boxes: (..., 4) XYXY in input pixels.
        smooth_l1_beta: where smooth-L1 turns from quadratic to linear; 0 is plain L1.
        weights: what the head predicts are the deltas times these four factors (Fast R-CNN: 10, 10, 5, 5).

    Returns:
        (...) loss per box: IoU losses from the decoded box, smooth-L1 summed over the four deltas.

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind == "smooth_l1":
        targets = torch.stack(
            [target * weight for target, weight in zip(encode_boxes(gt_boxes, anchors).unbind(-1), weights)], dim=-1
        )
        return F.smooth_l1_loss(deltas, targets, beta=smooth_l1_beta, reduction="none").sum(dim=-1)
    if kind not in BOX_LOSSES:
        raise ValueError(f"box_loss: expected a kind among {BOX_LOSSES}, got {kind!r}")
    deltas = torch.stack([delta / weight for delta, weight in zip(deltas.unbind(-1), weights)], dim=-1)
    iou = paired_iou(decode_boxes(deltas, anchors), gt_boxes)
    if kind == "iou_l2":
        return (1 - iou) ** 2
    return -torch.log(iou.clamp(min=MIN_IOU))
