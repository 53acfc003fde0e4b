"""Encoding and decoding of boxes against anchors, and IoU of box pairs with a gradient. Pure torch."""

import math

import torch
from torch import Tensor

# exp() of a predicted log-size is capped at this factor, as in Detectron2 and torchvision: 1000 / 16.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Apply regression deltas to anchors (Faster R-CNN's parametrisation, weights 1).

    Args:
        deltas: (..., 4) dx, dy in units of the anchor's size and dw, dh as log of the size ratio.
        anchors: (..., 4) XYXY in input pixels, same leading shape.

    Returns:
        (..., 4) XYXY boxes in at least float32; dw and dh are capped at log(1000 / 16).
    """
    deltas = deltas.float() if deltas.dtype in (torch.float16, torch.bfloat16) else deltas
    anchors = anchors.to(deltas.dtype)
    sizes = anchors[..., 2:] - anchors[..., :2]
    centers = anchors[..., :2] + 0.5 * sizes
    centers = deltas[..., :2] * sizes + centers
    sizes = torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * sizes
    return torch.cat([centers - 0.5 * sizes, centers + 0.5 * sizes], dim=-1)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The deltas with ``decode_boxes(deltas, anchors) == boxes``; both (..., 4) XYXY with positive width and height."""
    anchors = anchors.to(boxes.dtype)
    anchor_sizes = anchors[..., 2:] - anchors[..., :2]
    box_sizes = boxes[..., 2:] - boxes[..., :2]
    anchor_centers = anchors[..., :2] + 0.5 * anchor_sizes
    box_centers = boxes[..., :2] + 0.5 * box_sizes
    return torch.cat([(box_centers - anchor_centers) / anchor_sizes, torch.log(box_sizes / anchor_sizes)], dim=-1)


def paired_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of box i of the first set with box i of the second, differentiable.

    Args:
        boxes1, boxes2: (..., 4) XYXY of one shape.

    Returns:
        (...) in [0, 1]; 0 (with zero gradient) where the boxes do not overlap.
    """
    overlap = (torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])).clamp(
        min=0
    )
    intersection = overlap.prod(dim=-1)
    area1 = (boxes1[..., 2:] - boxes1[..., :2]).prod(dim=-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2]).prod(dim=-1)
    # The floor only matters for two empty boxes, whose intersection is 0 as well.
    union = (area1 + area2 - intersection).clamp(min=torch.finfo(boxes1.dtype).tiny)
    return intersection / union
