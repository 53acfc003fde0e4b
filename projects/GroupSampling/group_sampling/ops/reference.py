"""The operators in plain torch: the specification, the fallback where no extension is built, and the tests' second
opinion. Readable on purpose, on any device; the C++ and CUDA kernels return the same bits.

Shape shorthand: n anchors, m ground-truth boxes, k ignore boxes, B images, G scale groups, N samples per group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..anchors import AnchorGrid

_PAIRS_PER_CHUNK = 2**22  # bounds the memory of a (chunk of n) x m matrix

# The keyed permutation: a Feistel network on [0, a) x [0, b). Small domains mix slowly and need more rounds.
_ROUNDS, _ROUNDS_SMALL, _SMALL_DOMAIN = 8, 24, 1024
_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """(n, m) IoU. Invalid boxes (not finite, or x2 <= x1, or y2 <= y1) come out as 0 without a special case: their
    intersection is 0, or their area makes the quotient 0 or the union NaN."""
    intersection = _intersection(boxes1, boxes2)
    union = _area(boxes1)[:, None] + _area(boxes2)[None, :] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    pos_iou: float,
    neg_iou: float,
    second_pass: str,
    ignore_boxes: Tensor | None,
    ignore_ioa: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (n,) int8, matched ground truths (n,) int64 and best IoUs (n,): Sec. 4.1 and Eq. 1 of the paper."""
    # Cast once: 0.7 as float32 is less than 0.7, and an IoU of exactly 7/10 must not depend on who compares.
    pos, neg, ioa = (
        torch.tensor(x, dtype=anchors.dtype, device=anchors.device) for x in (pos_iou, neg_iou, ignore_ioa)
    )
    num_anchors, num_gt = anchors.shape[0], gt_boxes.shape[0]
    best_iou = anchors.new_zeros(num_anchors)
    matched_gt = torch.full((num_anchors,), -1, dtype=torch.int64, device=anchors.device)
    if num_gt > 0:
        for rows in _chunks(num_anchors, num_gt):
            # max() returns the first of equal maxima: ties go to the lowest ground-truth index.
            best_iou[rows], matched_gt[rows] = pairwise_iou(anchors[rows], gt_boxes).max(dim=1)
    negative = best_iou < neg
    positive = best_iou >= pos
    labels = torch.where(positive, 1, torch.where(negative, 0, -1)).to(torch.int8)
    matched_gt[negative] = -1
    best_iou[negative] = 0

    if second_pass != "none" and num_gt > 0:
        taken = torch.zeros(num_gt, dtype=torch.bool, device=anchors.device)
        taken[matched_gt[positive]] = True
        # Anchors without a match are never candidates; the clamp only keeps the look-up in range.
        candidate = (labels == -1) & ~taken[matched_gt.clamp(min=0)]
        if second_pass == "best":
            candidate = _best_per_gt(candidate, matched_gt, best_iou, num_gt)
        labels[candidate] = 1

    if ignore_boxes is not None and ignore_boxes.shape[0] > 0:
        x1, y1, x2, y2 = ignore_boxes.unbind(1)
        regions = ignore_boxes[ignore_boxes.isfinite().all(dim=1) & (x2 > x1) & (y2 > y1)]
        for rows in _chunks(num_anchors, max(1, regions.shape[0])):
            area = _area(anchors[rows])[:, None]
            covered = ((area > 0) & (_intersection(anchors[rows], regions) / area >= ioa)).any(dim=1)
            labels[rows] = torch.where(covered & (labels[rows] == 0), -1, labels[rows])
    return labels, matched_gt, best_iou


def match_anchor_grid(
    grid: AnchorGrid,
    gt_boxes: Sequence[Tensor],
    pos_iou: float,
    neg_iou: float,
    second_pass: str,
    ignore_boxes: Sequence[Tensor] | None,
    ignore_ioa: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match_anchors` of every image against the grid's boxes, stacked to (B, n)."""
    anchors = grid.boxes(gt_boxes[0].device, gt_boxes[0].dtype)
    regions: Sequence[Tensor | None] = ignore_boxes or [None] * len(gt_boxes)
    images = [
        match_anchors(anchors, gt, pos_iou, neg_iou, second_pass, region, ignore_ioa)
        for gt, region in zip(gt_boxes, regions)
    ]
    labels, matched_gt, best_iou = (torch.stack(parts) for parts in zip(*images))
    return labels, matched_gt, best_iou


def sample_groups(
    labels: Tensor,
    members: Sequence[Tensor],
    samples_per_group: int,
    positive_fraction: float,
    seed: int,
    iteration: int,
    first_image: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B, G, N), number of positives (B, G) and of negatives (B, G): Sec. 4.2 of the paper.

    ``members[g]`` are the flat indices of group g; labels are (B, n).
    """
    shape = (labels.shape[0], len(members))
    indices = labels.new_full((*shape, samples_per_group), -1, dtype=torch.int64)
    num_pos, num_neg = (labels.new_zeros(shape, dtype=torch.int64) for _ in range(2))
    max_pos = math.floor(samples_per_group * positive_fraction)
    for image in range(shape[0]):
        for group, member in enumerate(members):
            key = draw_key(seed, iteration, first_image + image, group)
            drawn = member[permutation(len(member), key, labels.device)]
            positives = drawn[labels[image, drawn] == 1][:max_pos]
            negatives = drawn[labels[image, drawn] == 0][: samples_per_group - len(positives)]
            sample = torch.cat([positives, negatives])
            indices[image, group, : len(sample)] = sample
            num_pos[image, group] = len(positives)
            num_neg[image, group] = len(negatives)
    return indices, num_pos, num_neg


def assign_and_sample(
    grid: AnchorGrid,
    gt_boxes: Sequence[Tensor],
    samples_per_group: int,
    positive_fraction: float,
    seed: int,
    iteration: int,
    first_image: int,
    pos_iou: float,
    neg_iou: float,
    second_pass: str,
    ignore_boxes: Sequence[Tensor] | None,
    ignore_ioa: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`match_anchor_grid`, then :func:`sample_groups`, then the sample's labels and matches, (B, G, N) each."""
    labels, matched_gt, _ = match_anchor_grid(grid, gt_boxes, pos_iou, neg_iou, second_pass, ignore_boxes, ignore_ioa)
    members = [grid.group_members(group, labels.device) for group in range(grid.num_groups)]
    indices, num_pos, num_neg = sample_groups(
        labels, members, samples_per_group, positive_fraction, seed, iteration, first_image
    )
    return indices, _pick(labels, indices), _pick(matched_gt, indices), num_pos, num_neg


def draw_key(seed: int, iteration: int, image: int, group: int) -> int:
    """64-bit key of one draw. Every argument changes all of it."""
    key = 0
    for value in (seed, iteration, image, group):
        key = _mix64((key ^ (value & _MASK64)) + 0x9E3779B97F4A7C15)
    return key


def permutation(size: int, key: int, device: torch.device | str | None = None) -> Tensor:
    """(size,) int64: the pseudo-random permutation of [0, size) that ``key`` selects, as the list of its values.

    A generalised Feistel network permutes [0, a) x [0, b), the smallest near-square domain that holds the positions;
    a value outside [0, size) is permuted again until it falls inside ("cycle walking"), which keeps it a permutation.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    rounds = _ROUNDS_SMALL if size < _SMALL_DOMAIN else _ROUNDS
    keys = [_mix64(key + 0x9E3779B97F4A7C15 * (r + 1)) >> 32 for r in range(rounds)]

    def encrypt(x: Tensor) -> Tensor:
        left, right = x // b, x % b
        for r, round_key in enumerate(keys):
            if r % 2 == 0:
                left = (left + (_hash32(right, round_key) * a >> 32)) % a
            else:
                right = (right + (_hash32(left, round_key) * b >> 32)) % b
        return left * b + right

    values = encrypt(torch.arange(size, device=device))
    while (outside := values >= size).any():
        values[outside] = encrypt(values[outside])
    return values


def _hash32(x: Tensor, key: int) -> Tensor:
    x = ((x ^ key) * 0x9E3779B1) & _MASK32
    return ((x ^ (x >> 15)) * 0x85EBCA77) & _MASK32


def _mix64(z: int) -> int:
    """SplitMix64's finaliser."""
    z &= _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    left_top = torch.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    right_bottom = torch.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    width, height = (right_bottom - left_top).clamp(min=0).unbind(2)
    return width * height


def _best_per_gt(candidate: Tensor, matched_gt: Tensor, best_iou: Tensor, num_gt: int) -> Tensor:
    """Of the candidates of each ground truth the one with the highest IoU, ties to the lowest anchor index."""
    index = candidate.nonzero().squeeze(1)
    gt, iou = matched_gt[index], best_iou[index]
    highest = iou.new_zeros(num_gt).scatter_reduce(0, gt, iou, "amax")
    index, gt = index[iou == highest[gt]], gt[iou == highest[gt]]
    lowest = index.new_full((num_gt,), len(candidate)).scatter_reduce(0, gt, index, "amin")
    best = torch.zeros_like(candidate)
    best[lowest[lowest < len(candidate)]] = True
    return best


def _pick(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` (B, n) at ``indices`` (B, G, N), -1 where the index is -1."""
    if values.shape[1] == 0:
        return torch.full_like(indices, -1, dtype=values.dtype)
    picked = values.gather(1, indices.clamp(min=0).flatten(1)).view_as(indices)
    return torch.where(indices >= 0, picked, -1)


def _chunks(num_rows: int, num_columns: int) -> list[slice]:
    step = max(1, _PAIRS_PER_CHUNK // num_columns)
    return [slice(start, start + step) for start in range(0, num_rows, step)]
