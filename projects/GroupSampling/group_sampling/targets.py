"""Which anchors the loss sees, and that loss: the part of training that both engines share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .anchors import AnchorGrid
from .losses import BOX_LOSSES, box_loss
from .ops import AssignResult, assign_and_sample

SAMPLERS = ("group", "uniform")


class AnchorSampler:
    """Assigns faces to anchors (Sec. 4.1) and draws the anchors that the loss sees (Sec. 4.2).

    ``kind="group"`` draws ``num_samples`` anchors of every scale; ``kind="uniform"`` draws ``num_samples`` over all
    anchors, as Faster R-CNN and FPN do. Either way at most ``positive_fraction`` of a draw are positives, and negatives
    fill up what positives leave open.
    """

    def __init__(
        self,
        kind: str,
        *,
        num_samples: int,
        positive_fraction: float = 0.25,
        pos_iou: float = 0.6,
        neg_iou: float = 0.4,
        second_pass: str = "all",
        ignore_ioa: float = 0.5,
        seed: int = 0,
    ):
        if kind not in SAMPLERS:
            raise ValueError(f"AnchorSampler: kind must be one of {SAMPLERS}, got {kind!r}")
        if num_samples <= 0:
            raise ValueError(f"AnchorSampler: num_samples must be positive, got {num_samples}")
        self.kind = kind
        self.seed = seed
        self.max_positives = int(num_samples * positive_fraction)
        self._options = {
            "samples_per_group": num_samples,
            "positive_fraction": positive_fraction,
            "pos_iou": pos_iou,
            "neg_iou": neg_iou,
            "second_pass": second_pass,
            "ignore_ioa": ignore_ioa,
        }

    def __call__(
        self,
        grid: AnchorGrid,
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
    ) -> AssignResult:
        """Draw for a batch of B images.

        The draw depends on (seed, iteration, rank, image, scale) alone, so a resumed run draws what the uninterrupted
        one would have drawn, and the images of a batch and the ranks of a run draw independently.

        Args:
            grid: the anchors, equal for all images of the batch.
            gt_boxes: B tensors (m_b, 4) XYXY in input pixels; m_b may be 0.
            ignore_boxes: B tensors (k_b, 4): regions whose anchors are no negatives.
            iteration: the training iteration.

        Returns:
            :class:`~group_sampling.ops.AssignResult` with G groups (1 for ``uniform``).
        """
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return assign_and_sample(
            grid if self.kind == "group" else grid.merged(),
            gt_boxes,
            ignore_boxes=ignore_boxes,
            seed=self.seed,
            iteration=iteration,
            first_image=rank * len(gt_boxes),
            **self._options,
        )


class AnchorLosses(NamedTuple):
    """What :class:`AnchorCriterion` returns."""

    classification: Tensor  # scalar
    localization: Tensor  # scalar
    num_pos: Tensor  # (G,) positives drawn of every scale, mean over the images; G scales whatever the sampler
    num_neg: Tensor  # (G,) likewise negatives


class AnchorCriterion(nn.Module):
    """Classification and regression loss of the drawn anchors.

    Classification is the two-way softmax loss, averaged over the drawn anchors; regression is averaged over the drawn
    positives. No step waits for a GPU.
    """

    def __init__(self, sampler: AnchorSampler, *, box_loss_type: str = "iou_l2", smooth_l1_beta: float = 0.0):
        super().__init__()
        if box_loss_type not in BOX_LOSSES:
            raise ValueError(f"AnchorCriterion: box_loss_type must be one of {BOX_LOSSES}, got {box_loss_type!r}")
        self.sampler = sampler
        self.box_loss_type = box_loss_type
        self.smooth_l1_beta = smooth_l1_beta

    def forward(
        self,
        grid: AnchorGrid,
        logits: Tensor,
        deltas: Tensor,
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
    ) -> AnchorLosses:
        """
        Args:
            grid: n anchors.
            logits: (B, n) face logit minus background logit.
            deltas: (B, n, 4).
            gt_boxes, ignore_boxes, iteration: see :meth:`AnchorSampler.__call__`.
        """
        drawn = self.sampler(grid, gt_boxes, ignore_boxes, iteration=iteration)
        index = drawn.indices.flatten(1)  # (B, G * N), -1 where a group ran out of anchors
        labels = drawn.labels.flatten(1)
        losses = F.binary_cross_entropy_with_logits(
            logits.gather(1, index.clamp(min=0)).float(), (labels == 1).float(), reduction="none"
        )
        is_drawn = labels >= 0
        classification = (losses * is_drawn).sum() / is_drawn.sum().clamp(min=1)

        # Positives come first in every group, so the regression loss reads a fixed number of columns.
        columns = self.sampler.max_positives
        positive = (drawn.labels[..., :columns] == 1).flatten(1)
        index = drawn.indices[..., :columns].flatten(1).clamp(min=0)
        matched_gt = drawn.matched_gt[..., :columns].flatten(1).clamp(min=0)
        anchors = grid.boxes(device=logits.device)[index]
        # An image without faces still needs a row to index; its loss is masked.
        targets = torch.stack([_rows(boxes, rows, anchors.dtype) for boxes, rows in zip(gt_boxes, matched_gt)])
        # Masked entries regress to their own anchor: finite loss, and no gradient after the mask.
        targets = torch.where(positive[..., None], targets, anchors)
        losses = box_loss(
            self.box_loss_type,
            deltas.gather(1, index[..., None].expand(-1, -1, 4)).float(),
            anchors,
            targets,
            self.smooth_l1_beta,
        )
        localization = torch.where(positive, losses, 0.0).sum() / positive.sum().clamp(min=1)

        # Scale of every drawn anchor: the uniform sampler has one group, but what it draws has scales all the same.
        scale = grid.group_ids(device=logits.device)[drawn.indices.flatten(1).clamp(min=0)].flatten()
        counts = logits.new_zeros((2, grid.num_groups))
        for row, label in enumerate((1, 0)):
            counts[row].index_add_(0, scale, (labels.flatten() == label).to(counts.dtype))
        num_pos, num_neg = counts / logits.shape[0]
        return AnchorLosses(classification, localization, num_pos, num_neg)


def _rows(boxes: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if len(boxes) == 0:
        boxes = boxes.new_zeros((1, 4))
    return boxes.to(dtype)[rows]
