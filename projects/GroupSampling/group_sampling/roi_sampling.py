"""Which proposals the second stage is trained on: Grouped Fast R-CNN (Sec. 4.2, Table 5), shared by both engines."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import distributed
from .criterion import count_by_scale
from .ops import match_anchors, sample_groups
from .scales import scale_borders

ROI_SAMPLERS = ("uniform", "group")

# Keeps the draws of proposals independent of the draws of anchors, which start from the same seed.
_STREAM = 0x2545F4914F6CDD1D


class ProposalSample(NamedTuple):
    """The proposals drawn from one image: group by group, in a group positives first."""

    indices: Tensor  # (k,) int64
    labels: Tensor  # (k,) int8, 1 positive, 0 negative
    matched_gt: Tensor  # (k,) int64 ground-truth index of positives, else -1
    scale_ids: Tensor  # (k,) int64 index of the nearest scale

    def classes(self, gt_classes: Tensor, background: int) -> Tensor:
        """(k,) int64: of positives the class of their ground truth, of ``gt_classes`` (m,); else ``background``."""
        if len(gt_classes) == 0:
            return torch.full_like(self.indices, background)
        return torch.where(self.labels == 1, gt_classes[self.matched_gt.clamp(min=0)], background)


class ProposalSampler:
    """Assigns ground truths to proposals and draws the proposals (RoIs) that the loss of the second stage sees.

    ``kind="group"`` draws ``num_samples`` proposals of every scale, a proposal being of the anchor scale that its
    √(width · height) is nearest to in log scale; ``kind="uniform"`` draws ``num_samples`` over all of them, as
    Fast R-CNN does. Either way at most ``positive_fraction`` of a draw are positives, and negatives fill up what
    positives leave open.
    """

    def __init__(
        self,
        kind: str,
        *,
        num_samples: int,
        scales: Sequence[float],
        positive_fraction: float = 0.25,
        pos_iou: float = 0.5,
        neg_iou: float = 0.5,
        ignore_ioa: float = 0.5,
        seed: int = 0,
    ):
        """
        Args:
            scales: anchor scales in pixels.
            pos_iou, neg_iou: a proposal is positive from ``pos_iou`` on, negative below ``neg_iou``.
            ignore_ioa: a proposal of which an ignore region covers this share is no negative.
        """
        if kind not in ROI_SAMPLERS:
            raise ValueError(f"ProposalSampler: kind must be one of {ROI_SAMPLERS}, got {kind!r}")
        if num_samples <= 0:
            raise ValueError(f"ProposalSampler: num_samples must be positive, got {num_samples}")
        if not scales or min(scales) <= 0:
            raise ValueError(f"ProposalSampler: scales must be positive numbers, got {scales}")
        self.kind = kind
        self.num_samples = num_samples
        self.scales = tuple(sorted(set(map(float, scales))))
        self.positive_fraction = positive_fraction
        self.seed = seed
        self._match_options = {"pos_iou": pos_iou, "neg_iou": neg_iou, "second_pass": "none", "ignore_ioa": ignore_ioa}

    def scale_ids(self, boxes: Tensor) -> Tensor:
        """(n,) int64 index of the scale nearest to each of the (n, 4) boxes, the smaller one on a tie."""
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return torch.bucketize(area, area.new_tensor(scale_borders(self.scales)))

    @torch.no_grad()
    def __call__(
        self,
        proposals: Sequence[Tensor],
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
    ) -> list[ProposalSample]:
        """Draw for a batch of B images.

        The draw depends on (seed, iteration, rank, image, scale) and the proposals alone, and is independent of the
        draw of the anchors.

        Args:
            proposals: B tensors (n_b, 4) XYXY in input pixels; n_b may be 0. Empty, inverted and non-finite ones are
                never drawn.
            gt_boxes: B tensors (m_b, 4); m_b may be 0. Ground truths of that kind match nothing.
            ignore_boxes: B tensors (k_b, 4): regions whose proposals are no negatives.
            iteration: the training iteration.
        """
        ignore_boxes = [None] * len(proposals) if ignore_boxes is None else ignore_boxes
        samples = []
        for image, (boxes, gt, ignore) in enumerate(zip(proposals, gt_boxes, ignore_boxes)):
            match = match_anchors(
                boxes,
                gt.to(boxes.dtype),
                ignore_boxes=None if ignore is None else ignore.to(boxes.dtype),
                **self._match_options,
            )
            is_usable = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            labels = match.labels.masked_fill(~is_usable, -1)
            scale_ids = self.scale_ids(boxes)
            is_grouped = self.kind == "group"
            drawn = sample_groups(
                labels,
                scale_ids if is_grouped else torch.zeros_like(scale_ids),
                num_groups=len(self.scales) if is_grouped else 1,
                samples_per_group=self.num_samples,
                positive_fraction=self.positive_fraction,
                seed=self.seed ^ _STREAM,
                iteration=iteration,
                first_image=distributed.rank() * len(proposals) + image,
            )
            index = drawn.indices.flatten()
            index = index[index >= 0]
            samples.append(ProposalSample(index, labels[index], match.matched_gt[index], scale_ids[index]))
        return samples

    def count_by_scale(self, samples: Sequence[ProposalSample]) -> tuple[Tensor, Tensor]:
        """(S,) positives and (S,) negatives drawn of each scale, mean over the images; S scales whatever the kind."""
        scale_ids = torch.cat([sample.scale_ids for sample in samples])
        labels = torch.cat([sample.labels for sample in samples])
        num_pos, num_neg = count_by_scale(scale_ids, labels, len(self.scales)) / len(samples)
        return num_pos, num_neg
