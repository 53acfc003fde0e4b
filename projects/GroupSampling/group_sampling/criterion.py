"""The losses of the anchors that a sampler chose: the part of training that both engines share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .anchors import AnchorGrid
from .head import Predict, predict_from
from .losses import BOX_LOSSES, box_loss
from .monitor import HeadMonitor
from .samplers import AnchorSampler


class AnchorLosses(NamedTuple):
    """What :class:`AnchorCriterion` returns."""

    classification: Tensor  # scalar
    localization: Tensor  # scalar
    num_pos: Tensor  # (S,) positives chosen of each of the grid's scales, mean over the images
    num_neg: Tensor  # (S,) likewise negatives


# The values of MODEL.GROUP_SAMPLING.BBOX_REG_LOSS_MEAN.
BOX_LOSS_MEANS = ("positives", "drawn")


class AnchorCriterion(nn.Module):
    """Classification and regression loss of the anchors that the sampler chose.

    How losses are averaged is the sampler's :meth:`~AnchorSampler.classification` and :meth:`~AnchorSampler.average`.
    No step waits for a GPU.

    Attributes:
        monitor: what the training steps since it was last read say of the head's health.
    """

    def __init__(
        self,
        sampler: AnchorSampler,
        *,
        box_loss_type: str = "iou_l2",
        smooth_l1_beta: float = 0.0,
        box_loss_mean: str = "positives",
    ):
        """
        Args:
            box_loss_type: one of :data:`~group_sampling.losses.BOX_LOSSES`.
            smooth_l1_beta: where smooth-L1 turns from quadratic to linear.
            box_loss_mean: the regression losses of the positives are divided by the number of "positives", or of all
                "drawn", as in Faster R-CNN.

        Raises:
            ValueError: unknown ``box_loss_type`` or ``box_loss_mean``.
        """
        super().__init__()
        if box_loss_type not in BOX_LOSSES:
            raise ValueError(f"AnchorCriterion: expected a box_loss_type among {BOX_LOSSES}, got {box_loss_type!r}")
        if box_loss_mean not in BOX_LOSS_MEANS:
            raise ValueError(f"AnchorCriterion: expected a box_loss_mean among {BOX_LOSS_MEANS}, got {box_loss_mean!r}")
        self.sampler = sampler
        self.monitor = HeadMonitor()
        self.box_loss_mean = box_loss_mean
        self.box_loss_type = box_loss_type
        self.smooth_l1_beta = smooth_l1_beta

    def forward(
        self,
        grid: AnchorGrid,
        predict: Predict,
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
    ) -> AnchorLosses:
        """
        Args:
            grid: n anchors.
            predict: gives logits and deltas of all anchors, or of the chosen ones alone.
            gt_boxes, ignore_boxes, iteration: see :meth:`AnchorSampler.__call__`.
        """
        logits = None
        if self.sampler.needs_logits:
            all_logits, all_deltas = predict(None)
            predict, logits = predict_from(all_logits, all_deltas), all_logits.detach()
        chosen = self.sampler(grid, gt_boxes, ignore_boxes, iteration=iteration, logits=logits)
        shape = chosen.indices.shape  # (B, G, N)
        logits, deltas = predict(chosen.indices.flatten(1).clamp(min=0))  # -1 where a group ran out of anchors
        logits, deltas = logits.float(), deltas.float()  # under autocast they have 16 bits, too few for losses
        logits = logits.unflatten(1, shape[1:])
        classification = self.sampler.classification(logits, chosen)

        # Positives come first in every group, so the regression loss reads a fixed number of columns.
        columns = slice(self.sampler.max_positives)
        positive = (chosen.labels[..., columns] == 1).flatten(1)
        index = chosen.indices[..., columns].flatten(1).clamp(min=0)
        matched_gt = chosen.matched_gt[..., columns].flatten(1).clamp(min=0)
        deltas = deltas.unflatten(1, shape[1:])[:, :, columns].flatten(1, 2)
        anchors = grid.boxes_at(index)
        # An image without faces still needs a row to index; its loss is masked.
        targets = torch.stack([_rows(boxes, rows, anchors.dtype) for boxes, rows in zip(gt_boxes, matched_gt)])
        # Masked entries regress to their own anchor: finite loss, and no gradient after the mask.
        targets = torch.where(positive[..., None], targets, anchors)
        losses = box_loss(self.box_loss_type, deltas, anchors, targets, self.smooth_l1_beta)
        losses = torch.where(positive, losses, 0.0).unflatten(1, (shape[1], -1))
        weights = self.sampler.weights(chosen)
        of_positives = weights[..., columns] * positive.view_as(losses)
        normalizer = of_positives if self.box_loss_mean == "positives" else weights
        localization = self.sampler.average(losses, of_positives, normalizer)

        num_pos, num_neg = self.monitor.add(grid, chosen, logits)
        return AnchorLosses(classification, localization, num_pos / shape[0], num_neg / shape[0])


def _rows(boxes: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if len(boxes) == 0:
        boxes = boxes.new_zeros((1, 4))
    return boxes.to(dtype)[rows]
