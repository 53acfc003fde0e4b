"""Which proposals the second stage is trained on: Grouped Fast R-CNN (Sec. 4.2, Table 5), shared by both engines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from . import distributed
from .config import ConfigError, anchor_scales, sample_count
from .monitor import count_by_scale
from .ops import MatchOptions, match_anchors, sample_groups
from .samplers import named_class
from .scales import scale_borders

# Keeps the draws of proposals independent of the draws of anchors, which start from the same seed.
_STREAM = 0x2545F4914F6CDD1D


class ProposalSample(NamedTuple):
    """The proposals drawn from one image: group by group, in a group positives first."""

    indices: Tensor  # (k,) int64
    labels: Tensor  # (k,) int8, 1 positive, 0 negative
    matched_gt: Tensor  # (k,) int64 ground-truth index of positives, else -1
    scale_ids: Tensor  # (k,) int64 index of the nearest scale

    def classes(self, gt_classes: Tensor, background: int) -> Tensor:
        """(k,) int64: the class of the matched ground truth for positives, ``background`` for negatives.

        Args:
            gt_classes: (m,) int64 classes of the image's ground truths; m may be 0.
        """
        classes = torch.full_like(self.indices, background)
        if len(gt_classes) == 0:
            return classes
        return torch.where(self.labels == 1, gt_classes[self.matched_gt.clamp(min=0)], classes)


class ProposalSampler(ABC):
    """Assigns ground truths to proposals and draws the proposals (RoIs) that the loss of the second stage sees.

    Of each group of proposals, ``num_samples`` are drawn, at most ``positive_fraction`` of them positive; negatives
    fill what positives leave open. Subclasses say what the groups are.

    Attributes:
        count_key: config key of ``num_samples``.
    """

    count_key: ClassVar[str]

    def __init__(
        self,
        num_samples: int,
        *,
        scales: Sequence[float],
        positive_fraction: float = 0.25,
        pos_iou: float = 0.5,
        neg_iou: float = 0.5,
        ignore_ioa: float = 0.5,
        seed: int = 0,
    ):
        """
        Args:
            num_samples: proposals to draw per image and group.
            scales: anchor scales in pixels.
            pos_iou, neg_iou: a proposal is positive from ``pos_iou`` on, negative below ``neg_iou``.
            ignore_ioa: a proposal of which an ignore region covers this share is not used as a negative.

        Raises:
            ValueError: ``num_samples`` or a scale is not positive, or there is no scale.
        """
        if num_samples < 1:
            raise ValueError(f"{type(self).__name__}: expected num_samples of at least 1, got {num_samples}")
        if not scales or min(scales) <= 0:
            raise ValueError(f"{type(self).__name__}: expected positive scales, got {scales}")
        self.num_samples = num_samples
        self.scales = tuple(sorted(set(map(float, scales))))
        self.positive_fraction = positive_fraction
        self.seed = seed
        self._match_options: MatchOptions = {
            "pos_iou": pos_iou,
            "neg_iou": neg_iou,
            "second_pass": "none",
            "ignore_ioa": ignore_ioa,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ProposalSampler":
        """The sampler with the numbers of ``cfg``.

        Raises:
            ConfigError: naming the key whose value is not usable.
        """
        heads = cfg.MODEL.ROI_HEADS
        if list(heads.IOU_LABELS) != {1: [0, 1], 2: [0, -1, 1]}.get(len(heads.IOU_THRESHOLDS)):
            raise ConfigError(
                "MODEL.ROI_HEADS.IOU_THRESHOLDS and IOU_LABELS: expected [t] and [0, 1], or "
                "[negative below, positive from] and [0, -1, 1], "
                f"got {heads.IOU_THRESHOLDS} and {heads.IOU_LABELS}"
            )
        return cls(
            sample_count(cfg, cls.count_key),
            scales=anchor_scales(cfg),
            positive_fraction=heads.POSITIVE_FRACTION,
            pos_iou=heads.IOU_THRESHOLDS[-1],
            neg_iou=heads.IOU_THRESHOLDS[0],
            ignore_ioa=cfg.MODEL.GROUP_SAMPLING.IGNORE_IOA,
            seed=cfg.SEED,
        )

    @abstractmethod
    def groups(self, scale_ids: Tensor) -> tuple[Tensor, int]:
        """What is drawn from: (n,) int64 group of each proposal, and the number of groups.

        Args:
            scale_ids: (n,) of :meth:`scale_ids`.
        """

    def scale_ids(self, boxes: Tensor) -> Tensor:
        """(n,) int64 index of the scale nearest to each of the (n, 4) boxes, the smaller one on a tie."""
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        # As torch.bucketize, for which the borders would have to be copied to a GPU; NaN is past them all.
        is_past = [~(area <= border) for border in scale_borders(self.scales)]
        return sum(is_past, torch.zeros_like(area, dtype=torch.int64))

    @torch.no_grad()
    def __call__(
        self,
        proposals: Sequence[Tensor],
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
    ) -> list[ProposalSample]:
        """Draw for a batch of B images. Waits once for a GPU, for how many were drawn of each image.

        The draw depends on (seed, iteration, rank, image, group) and the proposals alone, and is independent of the
        draw of the anchors.

        Args:
            proposals: B tensors (n_b, 4) XYXY in input pixels; n_b may be 0. Empty, inverted and non-finite ones are
                never drawn.
            gt_boxes: B tensors (m_b, 4); m_b may be 0. Ground truths of that kind match nothing.
            ignore_boxes: B tensors (k_b, 4): regions whose proposals are not used as negatives.
            iteration: the training iteration.
        """
        first = distributed.first_image(len(proposals))
        regions: Sequence[Tensor | None] = [None] * len(proposals) if ignore_boxes is None else ignore_boxes
        found = []
        for image, (boxes, gt, ignore) in enumerate(zip(proposals, gt_boxes, regions)):
            match = match_anchors(
                boxes,
                gt.to(boxes.dtype),
                ignore_boxes=None if ignore is None else ignore.to(boxes.dtype),
                **self._match_options,
            )
            is_usable = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            labels = match.labels.masked_fill(~is_usable, -1)
            scale_ids = self.scale_ids(boxes)
            group_ids, num_groups = self.groups(scale_ids)
            drawn = sample_groups(
                labels,
                group_ids,
                num_groups=num_groups,
                samples_per_group=self.num_samples,
                positive_fraction=self.positive_fraction,
                seed=self.seed ^ _STREAM,
                iteration=iteration,
                first_image=first + image,
            )
            index = drawn.indices.flatten()
            index = index[(index < 0).sort(stable=True).indices]  # those drawn first, in their order
            found.append((index, (index >= 0).sum(), labels, match.matched_gt, scale_ids))
        if not found:
            return []
        counts = torch.stack([count for _, count, *_ in found]).tolist()  # the only wait for a GPU
        return [
            ProposalSample(index[:count], *(values[index[:count]] for values in parts))
            for (index, _, *parts), count in zip(found, counts)
        ]

    def count_by_scale(self, samples: Sequence[ProposalSample]) -> tuple[Tensor, Tensor]:
        """(S,) positives and (S,) negatives drawn of each of :attr:`scales`, mean over the images."""
        scale_ids = torch.cat([sample.scale_ids for sample in samples])
        labels = torch.cat([sample.labels for sample in samples])
        num_pos, num_neg = count_by_scale(scale_ids, labels, len(self.scales)) / len(samples)
        return num_pos, num_neg


class UniformProposalSampler(ProposalSampler):
    """N proposals of all, as in Fast R-CNN: one group."""

    count_key = "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"

    def groups(self, scale_ids: Tensor) -> tuple[Tensor, int]:
        return torch.zeros_like(scale_ids), 1


class GroupProposalSampler(ProposalSampler):
    """N proposals of every scale; the scale of a proposal is the one nearest to its size."""

    count_key = "MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP"

    def groups(self, scale_ids: Tensor) -> tuple[Tensor, int]:
        return scale_ids, len(self.scales)


# The values of MODEL.GROUP_SAMPLING.ROI_SAMPLER.
ROI_SAMPLERS: dict[str, type[ProposalSampler]] = {"uniform": UniformProposalSampler, "group": GroupProposalSampler}


def build_proposal_sampler(cfg: CfgNode) -> ProposalSampler:
    """The sampler that ``MODEL.GROUP_SAMPLING.ROI_SAMPLER`` names.

    Raises:
        ConfigError: unknown name, or a value that the sampler cannot use, naming the key.
    """
    return named_class(cfg, "MODEL.GROUP_SAMPLING.ROI_SAMPLER", ROI_SAMPLERS).from_config(cfg)
