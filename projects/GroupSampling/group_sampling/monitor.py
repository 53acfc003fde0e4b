"""What a training logs of the samples that it draws."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .anchors import AnchorGrid
from .ops import AssignResult

T = TypeVar("T")


def count_by_scale(scale_ids: Tensor, labels: Tensor, num_scales: int) -> Tensor:
    """(2, S) float32 numbers of positives and negatives of each scale; does not wait for a GPU.

    Args:
        scale_ids: (k,) int64 in [0, S).
        labels: (k,) 1 positive, 0 negative; others are not counted.
    """
    counts = torch.zeros((2, num_scales), device=labels.device)
    for row, label in enumerate((1, 0)):
        counts[row].index_add_(0, scale_ids, (labels == label).to(counts.dtype))
    return counts


def count_anchors(grid: AnchorGrid, chosen: AssignResult) -> Tensor:
    """(2, G) float32 :func:`count_by_scale` of all chosen anchors, whatever groups the sampler chose them in."""
    index = chosen.indices.flatten().clamp(min=0)
    return count_by_scale(grid.group_ids_at(index), chosen.labels.flatten(), grid.num_groups)


def name_counts(stage: str, scales: Sequence[float], num_pos: Sequence[T], num_neg: Sequence[T]) -> dict[str, T]:
    """Counts of each scale under the names that both engines log: "rpn/num_pos@16", "rpn/num_neg@16", ..."""
    return {
        f"{stage}/{name}@{scale:g}": count
        for name, counts in (("num_pos", num_pos), ("num_neg", num_neg))
        for scale, count in zip(scales, counts)
    }
