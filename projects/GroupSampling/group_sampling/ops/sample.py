"""Group sampling: N anchors of every scale, drawn without replacement."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..anchors import MAX_CELLS, AnchorGrid
from . import _checks, _library, reference

__all__ = ["AssignResult", "SampleResult", "assign_and_sample", "sample_groups"]


class SampleResult(NamedTuple):
    """Which anchors were drawn; B images, G groups, N = ``samples_per_group``.

    Attributes:
        indices: (B, G, N) int64 anchor indices: positives, then negatives, each in draw order, then -1.
        num_pos: (B, G) int64 positives drawn.
        num_neg: (B, G) int64 negatives drawn.
    """

    indices: Tensor
    num_pos: Tensor
    num_neg: Tensor


class AssignResult(NamedTuple):
    """Which anchors were drawn and what they were assigned; B images, G groups, N = ``samples_per_group``.

    Attributes:
        indices: (B, G, N) int64 anchor indices: positives, then negatives, each in draw order, then -1.
        labels: (B, G, N) int8. 1 positive, 0 negative, -1 where the index is -1.
        matched_gt: (B, G, N) int64 ground-truth index of positives, else -1.
        num_pos: (B, G) int64 positives drawn.
        num_neg: (B, G) int64 negatives drawn.
    """

    indices: Tensor
    labels: Tensor
    matched_gt: Tensor
    num_pos: Tensor
    num_neg: Tensor


@torch.no_grad()
def sample_groups(
    labels: Tensor,
    groups: AnchorGrid | Tensor,
    *,
    samples_per_group: int,
    num_groups: int | None = None,
    positive_fraction: float = 0.25,
    seed: int,
    iteration: int = 0,
    first_image: int = 0,
) -> SampleResult:
    """Draw up to N anchors of each scale group, at most a fraction of them positive (paper, Sec. 4.2).

    Of P positives and Q negatives in a group, min(P, floor(N * positive_fraction)) positives are drawn, then negatives
    fill up: min(Q, N - positives). Uniform over the eligible anchors, without replacement, and no index twice.

    The draw walks a keyed pseudo-random permutation of the group's anchors and takes the first ones of each label. It
    depends on (seed, iteration, first_image + b, group) alone, not on the device, the thread count or the rest of the
    batch: ranks that pass distinct ``first_image`` draw independently, and a resumed run draws what the uninterrupted
    one would have drawn.

    Args:
        labels: (n,) for one image or (B, n), int8: 1 positive, 0 negative, -1 ignored (never drawn).
        groups: the anchors' grid, or (n,) int64 group ids on the labels' device. An id outside [0, G) belongs to no
            group.
        samples_per_group: N >= 1.
        num_groups: G, for a tensor of group ids. None reads the largest id, which waits for a GPU.
        positive_fraction: in [0, 1]; 0.25 is the paper's 1:3.
        seed, iteration, first_image: 64-bit integers; ``first_image`` is the global number of the batch's first image.

    Returns:
        SampleResult; B is 1 for labels of one image.

    Raises:
        ValueError: a shape, device or number is not as above.
        TypeError: a dtype is not as above.

    To sample all anchors uniformly pass ``grid.merged()``. Reference, CPU and CUDA return identical bits.
    """
    op = "sample_groups"
    if labels.dtype != torch.int8:
        raise TypeError(f"{op}: expected int8 labels, got {labels.dtype}")
    if labels.dim() not in (1, 2):
        raise ValueError(f"{op}: expected labels of shape (n,) or (B, n), got {tuple(labels.shape)}")
    labels = labels[None] if labels.dim() == 1 else labels
    _checks.sampling(op, samples_per_group, positive_fraction, seed, iteration, first_image)
    if isinstance(groups, AnchorGrid):
        if num_groups not in (None, groups.num_groups):
            raise ValueError(
                f"{op}: expected num_groups to be the grid's {groups.num_groups} or None, got {num_groups}"
            )
        num_groups, num_anchors, group_ids, lattice_ints = (
            groups.num_groups,
            groups.num_anchors,
            None,
            groups.lattice_ints,
        )
    else:
        if groups.dtype != torch.int64:
            raise TypeError(f"{op}: expected int64 group ids, got {groups.dtype}")
        if groups.dim() != 1 or groups.shape[0] > MAX_CELLS:
            raise ValueError(f"{op}: expected group ids of shape (n,), n <= {MAX_CELLS}, got {tuple(groups.shape)}")
        if groups.device != labels.device:
            raise ValueError(f"{op}: expected group ids on the labels' device, {labels.device}, got {groups.device}")
        if num_groups is None:
            num_groups = int(groups.max()) + 1 if groups.numel() else 0
        if num_groups < 0:
            raise ValueError(f"{op}: expected num_groups >= 0, got {num_groups}")
        num_anchors, group_ids, lattice_ints = groups.shape[0], groups, ()
    if labels.shape[1] != num_anchors:
        raise ValueError(f"{op}: expected one label per anchor, {num_anchors}, got shape {tuple(labels.shape)}")
    draw = (samples_per_group, positive_fraction, seed, iteration, first_image)
    if _library.has_kernels(labels.device):
        result = torch.ops.group_sampling.sample_groups(labels, group_ids, lattice_ints, num_groups, *draw)
    else:
        if isinstance(groups, AnchorGrid):
            members = [groups.group_members(group, labels.device) for group in range(num_groups)]
        else:
            members = [(groups == group).nonzero().squeeze(1) for group in range(num_groups)]
        result = reference.sample_groups(labels, members, *draw)
    return SampleResult(*result)


@torch.no_grad()
def assign_and_sample(
    grid: AnchorGrid,
    gt_boxes: Sequence[Tensor],
    *,
    samples_per_group: int,
    positive_fraction: float = 0.25,
    seed: int,
    iteration: int = 0,
    first_image: int = 0,
    pos_iou: float = 0.6,
    neg_iou: float = 0.4,
    second_pass: str = "all",
    ignore_boxes: Sequence[Tensor] | None = None,
    ignore_ioa: float = 0.5,
) -> AssignResult:
    """:func:`match_anchor_grid` followed by :func:`sample_groups`, bit for bit, without writing n labels.

    The training path. On the CPU the cost follows the faces and N, not the number of anchors: positive and ignored
    anchors are few, every other anchor is a negative, and negatives are drawn by walking the permutation past the few.

    Args:
        grid: n anchors in G groups; the same for every image of the batch.
        gt_boxes: B tensors (m_b, 4) XYXY in pixels, of one dtype and device; m_b may be 0.
        samples_per_group, positive_fraction, seed, iteration, first_image: as in :func:`sample_groups`.
        pos_iou, neg_iou, second_pass, ignore_boxes, ignore_ioa: as in :func:`match_anchor_grid`.

    Returns:
        AssignResult; on the CPU when B is 0.

    Raises:
        ValueError, TypeError: as in the two operators.
    """
    op = "assign_and_sample"
    gt_boxes, ignore_boxes = _checks.box_lists(op, gt_boxes, ignore_boxes)
    _checks.thresholds(op, pos_iou, neg_iou, second_pass, ignore_ioa)
    _checks.sampling(op, samples_per_group, positive_fraction, seed, iteration, first_image)
    if not gt_boxes:
        return AssignResult(*_empty_result(torch.empty(0), 0, grid.num_groups, samples_per_group))
    draw = (samples_per_group, positive_fraction, seed, iteration, first_image)
    if _library.has_kernels(gt_boxes[0].device):
        result = torch.ops.group_sampling.assign_and_sample(
            gt_boxes,
            ignore_boxes,
            grid.lattice_ints,
            grid.lattice_floats,
            grid.num_groups,
            *draw,
            pos_iou,
            neg_iou,
            second_pass,
            ignore_ioa,
        )
    else:
        result = reference.assign_and_sample(
            grid, gt_boxes, *draw, pos_iou, neg_iou, second_pass, ignore_boxes, ignore_ioa
        )
    return AssignResult(*result)


def _empty_result(like: Tensor, num_images: int, num_groups: int, samples_per_group: int) -> tuple[Tensor, ...]:
    shape = (num_images, num_groups, samples_per_group)
    return (
        like.new_empty(shape, dtype=torch.int64),
        like.new_empty(shape, dtype=torch.int8),
        like.new_empty(shape, dtype=torch.int64),
        like.new_empty(shape[:2], dtype=torch.int64),
        like.new_empty(shape[:2], dtype=torch.int64),
    )


if _library.extension_status().loaded:

    @torch.library.register_fake("group_sampling::sample_groups")
    def _(labels, group_ids, lattice_ints, num_groups, samples_per_group, *_draw):
        indices, _, _, num_pos, num_neg = _empty_result(labels, labels.shape[0], num_groups, samples_per_group)
        return indices, num_pos, num_neg

    @torch.library.register_fake("group_sampling::assign_and_sample")
    def _(gt_boxes, ignore_boxes, lattice_ints, lattice_floats, num_groups, samples_per_group, *_rest):
        return _empty_result(gt_boxes[0], len(gt_boxes), num_groups, samples_per_group)
