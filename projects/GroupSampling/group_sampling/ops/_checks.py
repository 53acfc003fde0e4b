"""Checks of arguments that the operators share. Shapes, dtypes and scalars only: values on a device are never read."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Windows come from IoU thresholds by division; below this the intersections themselves leave float32's range.
MIN_THRESHOLD = 1e-30
SECOND_PASSES = ("all", "best", "none")


def boxes(op: str, name: str, value: Tensor) -> Tensor:
    """``value`` as (., 4) float32 or float64 boxes; float16 and bfloat16 are promoted to float32."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected a Tensor as {name}, got {type(value).__name__}")
    if value.dim() != 2 or value.shape[1] != 4:
        raise ValueError(f"{op}: expected {name} of shape (N, 4), got {tuple(value.shape)}")
    if value.dtype in (torch.float32, torch.float64):
        return value
    if value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    raise TypeError(f"{op}: expected float64, float32, bfloat16 or float16 {name}, got {value.dtype}")


def same_kind(op: str, first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    if value.dtype != first.dtype:
        raise TypeError(f"{op}: expected {name} of the dtype of {first_name}, {first.dtype}, got {value.dtype}")
    if value.device != first.device:
        raise ValueError(f"{op}: expected {name} on the device of {first_name}, {first.device}, got {value.device}")


def box_lists(
    op: str, gt_boxes: Sequence[Tensor], ignore_boxes: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Checked and promoted (gt_boxes, ignore_boxes), one tensor per image; no ignore boxes become an empty list."""
    if isinstance(gt_boxes, Tensor) or isinstance(ignore_boxes, Tensor):
        raise TypeError(
            f"{op}: expected sequences of (N, 4) Tensors, one per image, as gt_boxes and ignore_boxes, got a Tensor"
        )
    checked = [boxes(op, f"gt_boxes[{i}]", value) for i, value in enumerate(gt_boxes)]
    regions = [boxes(op, f"ignore_boxes[{i}]", value) for i, value in enumerate(ignore_boxes or ())]
    if regions and len(regions) != len(checked):
        raise ValueError(f"{op}: expected one entry of ignore_boxes per image, {len(checked)}, got {len(regions)}")
    for i, value in enumerate(checked[1:], 1):
        same_kind(op, "gt_boxes[0]", checked[0], f"gt_boxes[{i}]", value)
    for i, value in enumerate(regions):
        same_kind(op, "gt_boxes[0]", checked[0], f"ignore_boxes[{i}]", value)
    return checked, regions


def thresholds(op: str, pos_iou: float, neg_iou: float, second_pass: str, ignore_ioa: float) -> None:
    if not MIN_THRESHOLD <= neg_iou <= pos_iou <= 1.0:
        raise ValueError(f"{op}: expected 0 < neg_iou <= pos_iou <= 1, got neg_iou={neg_iou} and pos_iou={pos_iou}")
    if not MIN_THRESHOLD <= ignore_ioa <= 1.0:
        raise ValueError(f"{op}: expected ignore_ioa in (0, 1], got {ignore_ioa}")
    if second_pass not in SECOND_PASSES:
        raise ValueError(f"{op}: expected second_pass to be one of {SECOND_PASSES}, got {second_pass!r}")


def sampling(
    op: str, samples_per_group: int, positive_fraction: float, seed: int, iteration: int, first_image: int
) -> None:
    if samples_per_group < 1:
        raise ValueError(f"{op}: expected samples_per_group >= 1, got {samples_per_group}")
    if not 0.0 <= positive_fraction <= 1.0:
        raise ValueError(f"{op}: expected positive_fraction in [0, 1], got {positive_fraction}")
    for name, value in (("seed", seed), ("iteration", iteration), ("first_image", first_image)):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: expected {name} to fit into 64 bits, got {value}")
