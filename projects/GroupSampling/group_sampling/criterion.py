"""Which anchors the loss sees, and that loss: the part of training that both engines share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from . import distributed
from .anchors import AnchorGrid
from .losses import BOX_LOSSES, box_loss
from .ops import AssignResult, assign_and_sample, match_anchor_grid
from .timing import PartTimer

SAMPLERS = ("group", "uniform", "ohem", "focal")

# Logits (B, K) and deltas (B, K, 4) of the anchors with the given (B, K) indices, or of all n anchors for None.
Predict = Callable[[Tensor | None], tuple[Tensor, Tensor]]


class AnchorSampler:
    """Assigns faces to anchors (Sec. 4.1) and chooses the anchors that the loss sees (Sec. 4.2, Table 4).

    - ``"group"`` draws ``num_samples`` anchors of every scale;
    - ``"uniform"`` draws ``num_samples`` over all anchors, as Faster R-CNN and FPN do;
    - ``"ohem"`` takes the ``num_samples`` anchors of an image with the highest classification losses;
    - ``"focal"`` takes all anchors (``num_samples`` is not read), for a loss that weighs them.

    The first two draw at most ``positive_fraction`` positives, and negatives fill up what positives leave open.
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
        self.num_samples = num_samples
        self.positive_fraction = positive_fraction
        self.timer = PartTimer()  # of the last call
        self._match_options = {
            "pos_iou": pos_iou,
            "neg_iou": neg_iou,
            "second_pass": second_pass,
            "ignore_ioa": ignore_ioa,
        }

    @property
    def needs_logits(self) -> bool:
        """The choice needs the logits of all anchors."""
        return self.kind in ("ohem", "focal")

    @property
    def max_positives(self) -> int | None:
        """Positives are among the first so many columns of a group; None: anywhere."""
        return None if self.needs_logits else int(self.num_samples * self.positive_fraction)

    def __call__(
        self,
        grid: AnchorGrid,
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
        logits: Tensor | None = None,
    ) -> AssignResult:
        """Choose for a batch of B images.

        A draw depends on (seed, iteration, rank, image, scale) alone, so a resumed run draws what the uninterrupted
        one would have drawn, and the images of a batch and the ranks of a run draw independently. No step waits for a
        GPU.

        Args:
            grid: n anchors, equal for all images of the batch.
            gt_boxes: B tensors (m_b, 4) XYXY in input pixels; m_b may be 0.
            ignore_boxes: B tensors (k_b, 4): regions whose anchors are no negatives.
            iteration: the training iteration.
            logits: (B, n) face logit minus background logit; read if :attr:`needs_logits`.

        Returns:
            :class:`~group_sampling.ops.AssignResult` with G groups of N = ``num_samples`` for ``group``, else with one
            group: of ``num_samples``, and of n for ``focal``.
        """
        if self.needs_logits and logits is None:
            raise ValueError(f"AnchorSampler: {self.kind} needs the logits of all anchors")
        device = gt_boxes[0].device if len(gt_boxes) else torch.device("cpu")
        with self.timer.measure(device):
            if self.needs_logits:
                return self._choose(grid, gt_boxes, ignore_boxes, logits)
            return self._draw(grid, gt_boxes, ignore_boxes, iteration)

    def _draw(self, grid, gt_boxes, ignore_boxes, iteration) -> AssignResult:
        return assign_and_sample(
            grid if self.kind == "group" else grid.merged(),
            gt_boxes,
            ignore_boxes=ignore_boxes,
            samples_per_group=self.num_samples,
            positive_fraction=self.positive_fraction,
            seed=self.seed,
            iteration=iteration,
            first_image=distributed.rank() * len(gt_boxes),
            **self._match_options,
        )

    @torch.no_grad()
    def _choose(self, grid, gt_boxes, ignore_boxes, logits) -> AssignResult:
        match = match_anchor_grid(grid, gt_boxes, ignore_boxes=ignore_boxes, **self._match_options)
        labels = match.labels
        if self.kind == "focal":
            index = torch.arange(grid.num_anchors, device=labels.device).expand(labels.shape)
        else:
            losses = classification_loss(logits, labels).masked_fill(labels < 0, -torch.inf)
            index = losses.topk(min(self.num_samples, grid.num_anchors), dim=1).indices
        labels = labels.gather(1, index)
        is_positive = labels == 1
        return AssignResult(
            indices=index.masked_fill(labels < 0, -1)[:, None],
            labels=labels[:, None],
            matched_gt=match.matched_gt.gather(1, index).masked_fill(~is_positive, -1)[:, None],
            num_pos=is_positive.sum(1, keepdim=True),
            num_neg=(labels == 0).sum(1, keepdim=True),
        )


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Two-way softmax loss of each anchor, float32: ``logits`` are face minus background, ``labels`` 1 for a face."""
    return F.binary_cross_entropy_with_logits(logits.float(), (labels == 1).float(), reduction="none")


def predict_from(logits: Tensor, deltas: Tensor) -> Predict:
    """:data:`Predict` of predictions that exist already: ``logits`` (B, n) and ``deltas`` (B, n, 4)."""

    def predict(index: Tensor | None) -> tuple[Tensor, Tensor]:
        if index is None:
            return logits, deltas
        return logits.gather(1, index), deltas.gather(1, index[..., None].expand(-1, -1, 4))

    return predict


def count_by_scale(scale_ids: Tensor, labels: Tensor, num_scales: int) -> Tensor:
    """(2, S) float32 numbers of positives and negatives of each scale; waits for no GPU.

    Args:
        scale_ids: (k,) int64 in [0, S).
        labels: (k,) 1 positive, 0 negative; others are not counted.
    """
    counts = torch.zeros((2, num_scales), device=labels.device)
    for row, label in enumerate((1, 0)):
        counts[row].index_add_(0, scale_ids, (labels == label).to(counts.dtype))
    return counts


def count_anchors(grid: AnchorGrid, drawn: AssignResult) -> Tensor:
    """(2, S) float32 :func:`count_by_scale` of all that was drawn, whether in one group or in one of each scale."""
    index = drawn.indices.flatten().clamp(min=0)
    return count_by_scale(grid.group_ids(device=index.device)[index], drawn.labels.flatten(), grid.num_groups)


class AnchorLosses(NamedTuple):
    """What :class:`AnchorCriterion` returns."""

    classification: Tensor  # scalar
    localization: Tensor  # scalar
    num_pos: Tensor  # (G,) positives drawn of every scale, mean over the images; G scales whatever the sampler
    num_neg: Tensor  # (G,) likewise negatives


class AnchorCriterion(nn.Module):
    """Classification and regression loss of the anchors that the sampler chose.

    Classification is the two-way softmax loss, averaged over those anchors; with the ``focal`` sampler it is the focal
    loss, summed over all anchors and divided by the number of positives. Regression is averaged over the positives. No
    step waits for a GPU.
    """

    def __init__(
        self,
        sampler: AnchorSampler,
        *,
        box_loss_type: str = "iou_l2",
        smooth_l1_beta: float = 0.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ):
        super().__init__()
        if box_loss_type not in BOX_LOSSES:
            raise ValueError(f"AnchorCriterion: box_loss_type must be one of {BOX_LOSSES}, got {box_loss_type!r}")
        self.sampler = sampler
        self.box_loss_type = box_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

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
            predict: gives logits and deltas of all anchors, or of the chosen ones alone; see :func:`predict_from`.
            gt_boxes, ignore_boxes, iteration: see :meth:`AnchorSampler.__call__`.
        """
        if self.sampler.needs_logits:
            predict = predict_from(*predict(None))
            logits = predict(None)[0].detach()
        else:
            logits = None
        drawn = self.sampler(grid, gt_boxes, ignore_boxes, iteration=iteration, logits=logits)
        index = drawn.indices.flatten(1).clamp(min=0)  # (B, G * N); -1 where a group ran out of anchors
        labels = drawn.labels.flatten(1)
        logits, deltas = predict(index)
        is_drawn = labels >= 0
        if self.sampler.kind == "focal":
            losses = sigmoid_focal_loss(
                logits.float(), (labels == 1).float(), alpha=self.focal_alpha, gamma=self.focal_gamma
            )
            classification = (losses * is_drawn).sum() / drawn.num_pos.sum().clamp(min=1)
        else:
            losses = classification_loss(logits, labels)
            classification = (losses * is_drawn).sum() / is_drawn.sum().clamp(min=1)

        # Positives come first in every drawn group, so the regression loss reads a fixed number of columns.
        columns = slice(self.sampler.max_positives)
        positive = (drawn.labels[..., columns] == 1).flatten(1)
        rows = drawn.indices[..., columns].flatten(1).clamp(min=0)
        matched_gt = drawn.matched_gt[..., columns].flatten(1).clamp(min=0)
        deltas = deltas.unflatten(1, drawn.indices.shape[1:])[:, :, columns].flatten(1, 2)
        anchors = grid.boxes(device=deltas.device)[rows]
        # An image without faces still needs a row to index; its loss is masked.
        targets = torch.stack([_rows(boxes, rows, anchors.dtype) for boxes, rows in zip(gt_boxes, matched_gt)])
        # Masked entries regress to their own anchor: finite loss, and no gradient after the mask.
        targets = torch.where(positive[..., None], targets, anchors)
        losses = box_loss(self.box_loss_type, deltas.float(), anchors, targets, self.smooth_l1_beta)
        localization = torch.where(positive, losses, 0.0).sum() / positive.sum().clamp(min=1)

        num_pos, num_neg = count_anchors(grid, drawn) / labels.shape[0]
        return AnchorLosses(classification, localization, num_pos, num_neg)


def _rows(boxes: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if len(boxes) == 0:
        boxes = boxes.new_zeros((1, 4))
    return boxes.to(dtype)[rows]
