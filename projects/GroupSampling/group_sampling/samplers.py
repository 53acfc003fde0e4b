"""Which anchors the loss sees (Sec. 4.2, Table 4): one class per sampler, and the registry of their names.

Everything that depends on the sampler is a property or method of its class; CONTRIBUTING.md tells how to add one.
Shape shorthand: B images, n anchors, G groups, N anchors chosen per group.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from . import distributed
from .anchors import AnchorGrid
from .config import ConfigError, sample_count
from .losses import classification_loss
from .ops import AssignResult, MatchOptions, MatchResult, assign_and_sample, match_anchor_grid
from .timing import PartTimer

T = TypeVar("T")

# The values of MODEL.GROUP_SAMPLING.FILL and .LOSS_MEAN.
FILLS = ("negatives", "repeat", "weight")
LOSS_MEANS = ("all", "group")


class AnchorSampler(ABC):
    """Assigns faces to anchors (Sec. 4.1), chooses the anchors that the loss sees, and averages their losses.

    Attributes:
        count_key: config key of ``num_samples``; None for a sampler that has no such number.
        needs_logits: the choice depends on the logits of all anchors.
        max_positives: positives occupy only the first ``max_positives`` columns of a group; None means any column.
        face_prior: probability of a face that a fresh head should predict; None means 1/2.
        timer: how long the last choice took.
    """

    count_key: ClassVar[str | None] = None
    needs_logits: ClassVar[bool] = False
    max_positives: int | None = None
    face_prior: float | None = None

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        pos_iou: float = 0.6,
        neg_iou: float = 0.4,
        second_pass: str = "all",
        ignore_ioa: float = 0.5,
        seed: int = 0,
    ):
        """
        Args:
            num_samples: anchors to choose per image and group; required by samplers with a ``count_key``.
            pos_iou, neg_iou, second_pass, ignore_ioa: see :func:`~group_sampling.ops.match_anchor_grid`.
            seed: of the draw.

        Raises:
            ValueError: ``num_samples`` is not positive.
        """
        if self.count_key is not None and (num_samples is None or num_samples < 1):
            raise ValueError(f"{type(self).__name__}: expected num_samples of at least 1, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self.timer = PartTimer()
        self.match_options: MatchOptions = {
            "pos_iou": pos_iou,
            "neg_iou": neg_iou,
            "second_pass": second_pass,
            "ignore_ioa": ignore_ioa,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode, **options: Any) -> "AnchorSampler":
        """The sampler with the numbers of ``cfg``; ``options`` are further arguments of the class.

        Raises:
            ConfigError: the value of ``count_key`` is not positive.
        """
        if cls.count_key is not None:
            options["num_samples"] = sample_count(cfg, cls.count_key)
        neg_iou, pos_iou = cfg.MODEL.RPN.IOU_THRESHOLDS
        return cls(
            pos_iou=pos_iou,
            neg_iou=neg_iou,
            second_pass=cfg.MODEL.GROUP_SAMPLING.SECOND_PASS,
            ignore_ioa=cfg.MODEL.GROUP_SAMPLING.IGNORE_IOA,
            seed=cfg.SEED,
            **options,
        )

    @torch.no_grad()
    def __call__(
        self,
        grid: AnchorGrid,
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
        *,
        iteration: int,
        logits: Tensor | None = None,
    ) -> AssignResult:
        """Choose for a batch of B images. No step waits for a GPU.

        Args:
            grid: n anchors, equal for all images of the batch.
            gt_boxes: B tensors (m_b, 4) XYXY in input pixels; m_b may be 0.
            ignore_boxes: B tensors (k_b, 4): regions whose anchors are not used as negatives.
            iteration: the training iteration.
            logits: (B, n) face logit minus background logit; read only if :attr:`needs_logits`.

        Returns:
            :class:`~group_sampling.ops.AssignResult`; how many groups, and of how many, is up to the sampler.

        Raises:
            ValueError: the sampler needs logits and has none.
        """
        if self.needs_logits and logits is None:
            raise ValueError(f"{type(self).__name__}: expected the logits of all anchors, got None")
        device = gt_boxes[0].device if len(gt_boxes) else torch.device("cpu")
        with self.timer.measure(device):
            return self.choose(grid, gt_boxes, ignore_boxes, iteration, logits)

    @abstractmethod
    def choose(
        self,
        grid: AnchorGrid,
        gt_boxes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None,
        iteration: int,
        logits: Tensor | None,
    ) -> AssignResult:
        """What :meth:`__call__` returns; arguments as there."""

    def classification(self, logits: Tensor, chosen: AssignResult) -> Tensor:
        """Scalar classification loss of the chosen anchors: the mean of their softmax losses.

        Args:
            logits: (B, G, N) face logit minus background logit of each anchor of ``chosen``.
        """
        weights = self.weights(chosen)
        return self.average(classification_loss(logits, chosen.labels), weights, weights)

    def weights(self, chosen: AssignResult) -> Tensor:
        """(B, G, N) how often each anchor of ``chosen`` counts in the losses; 0 or False where there is none."""
        return chosen.labels >= 0

    def average(self, losses: Tensor, weights: Tensor, normalizer: Tensor) -> Tensor:
        """Scalar: the sum of ``weights`` times ``losses``, divided by the sum of ``normalizer``; 0 for no samples.

        Args:
            losses, weights, normalizer: (B, G, k) of the same k of each group's columns; the normalizer may have more.
        """
        return (losses * weights).sum() / normalizer.sum().clamp(min=1)

    def effective_weights(self, chosen: AssignResult) -> Tensor:
        """(B, G, N) what each anchor counts in the mean of the classification losses, each image by itself.

        As :meth:`weights`, with what :meth:`average` does to them; the sum over an image is the same.
        """
        return self.weights(chosen)

    def match(self, grid: AnchorGrid, gt_boxes: Sequence[Tensor], ignore_boxes: Sequence[Tensor] | None) -> MatchResult:
        """(B, n) labels and matched faces of all anchors, for samplers that look at each of them."""
        return match_anchor_grid(grid, gt_boxes, ignore_boxes=ignore_boxes, **self.match_options)


class _RandomSampler(AnchorSampler):
    """Draws N anchors of each group, at most a fraction of them positive; negatives fill what positives leave open.

    A draw depends on (seed, iteration, rank, image, group) alone, so a resumed run draws what the uninterrupted one
    would have drawn, and the images of a batch and the ranks of a run draw independently.
    """

    num_samples: int
    max_positives: int

    def __init__(self, num_samples: int, *, positive_fraction: float = 0.25, **options: Any):
        super().__init__(num_samples, **options)
        self.positive_fraction = positive_fraction
        self.max_positives = int(num_samples * positive_fraction)

    @classmethod
    def from_config(cls, cfg: CfgNode, **options: Any) -> AnchorSampler:
        return super().from_config(cfg, positive_fraction=cfg.MODEL.RPN.POSITIVE_FRACTION, **options)

    @staticmethod
    @abstractmethod
    def groups(grid: AnchorGrid) -> AnchorGrid:
        """The anchors in the groups that are drawn from."""

    def choose(self, grid, gt_boxes, ignore_boxes, iteration, logits) -> AssignResult:
        return assign_and_sample(
            self.groups(grid),
            gt_boxes,
            ignore_boxes=ignore_boxes,
            samples_per_group=self.num_samples,
            positive_fraction=self.positive_fraction,
            seed=self.seed,
            iteration=iteration,
            first_image=distributed.first_image(len(gt_boxes)),
            **self.match_options,
        )


class GroupSampler(_RandomSampler):
    """Group sampling (Sec. 4.2): N anchors of every scale.

    The paper leaves open what takes the place of missing positives, and whether a scale that draws less also weighs
    less (docs/deviations.md). Let P be the positives that were drawn of a group, K the most that may be, Q its drawn
    negatives. With all fills the same anchors are drawn; they differ in how often each counts:

    - "negatives": each once. Negatives take the place of missing positives.
    - "repeat": the K places of positives are given to the P in turn, and the first N - K negatives count once.
    - "weight": the same numbers, spread evenly: a positive counts K / P times, a negative min(Q, N - K) / Q times.

    A group without positives then has N - K negatives. A loss is the mean over all that count ("all"), or the mean
    of the means within each scale, over the scales of which the batch has something to count ("group").

    Args:
        fill: one of :data:`FILLS`.
        loss_mean: one of :data:`LOSS_MEANS`.

    Raises:
        ValueError: another value of these.
    """

    count_key = "MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP"

    def __init__(self, num_samples: int, *, fill: str = "negatives", loss_mean: str = "all", **options: Any):
        super().__init__(num_samples, **options)
        if fill not in FILLS or loss_mean not in LOSS_MEANS:
            raise ValueError(
                f"GroupSampler: expected a fill among {FILLS} and a loss_mean among {LOSS_MEANS}, got {fill!r} and "
                f"{loss_mean!r}"
            )
        self.fill = fill
        self.loss_mean = loss_mean

    @classmethod
    def from_config(cls, cfg: CfgNode, **options: Any) -> AnchorSampler:
        keys = cfg.MODEL.GROUP_SAMPLING
        return super().from_config(cfg, fill=keys.FILL, loss_mean=keys.LOSS_MEAN, **options)

    def weights(self, chosen: AssignResult) -> Tensor:
        if self.fill == "negatives":
            return super().weights(chosen)
        num_pos, num_neg = chosen.num_pos[..., None], chosen.num_neg[..., None]
        places, others = self.max_positives, self.num_samples - self.max_positives
        is_positive, is_negative = chosen.labels == 1, chosen.labels == 0
        column = torch.arange(chosen.labels.shape[-1], device=num_pos.device)
        divisor = num_pos.clamp(min=1)
        if self.fill == "repeat":
            counts = torch.where(is_positive, places // divisor + (column < places % divisor), 0)
            return (counts + (is_negative & (column - num_pos < others))).float()
        shares = num_neg.clamp(max=others) / num_neg.clamp(min=1)
        return torch.where(is_positive, places / divisor, 0.0) + torch.where(is_negative, shares, 0.0)

    def average(self, losses: Tensor, weights: Tensor, normalizer: Tensor) -> Tensor:
        if self.loss_mean == "all":
            return super().average(losses, weights, normalizer)
        sums, counts = (losses * weights).sum((0, 2)), normalizer.sum((0, 2))
        return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)

    def effective_weights(self, chosen: AssignResult) -> Tensor:
        weights = self.weights(chosen)
        if self.loss_mean == "all":
            return weights
        counts = weights.sum(-1, keepdim=True)
        even = counts.sum(1, keepdim=True) / (counts > 0).sum(1, keepdim=True).clamp(min=1)
        return weights * even / counts.clamp(min=1)

    @staticmethod
    def groups(grid: AnchorGrid) -> AnchorGrid:
        return grid


class UniformSampler(_RandomSampler):
    """N anchors over all scales, as in Faster R-CNN and FPN: one group."""

    count_key = "MODEL.RPN.BATCH_SIZE_PER_IMAGE"

    @staticmethod
    def groups(grid: AnchorGrid) -> AnchorGrid:
        return grid.merged()


class OHEMSampler(AnchorSampler):
    """Online hard example mining (Table 4): the N anchors of an image with the highest losses, in one group."""

    count_key = "MODEL.RPN.BATCH_SIZE_PER_IMAGE"
    needs_logits = True

    def choose(self, grid, gt_boxes, ignore_boxes, iteration, logits) -> AssignResult:
        match = self.match(grid, gt_boxes, ignore_boxes)
        losses = classification_loss(logits, match.labels).masked_fill(match.labels < 0, -torch.inf)
        index = losses.topk(min(self.num_samples, grid.num_anchors), dim=1).indices
        return take_matches(match, index[:, None])


class FocalSampler(AnchorSampler):
    """All anchors in one group, weighted by the focal loss (Table 4), which starts from a small prior.

    Args:
        alpha, gamma: of the focal loss.
        face_prior: probability of a face that a fresh head predicts.
    """

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0, face_prior: float = 0.01, **options: Any):
        super().__init__(**options)
        self.alpha = alpha
        self.gamma = gamma
        self.face_prior = face_prior

    @classmethod
    def from_config(cls, cfg: CfgNode, **options: Any) -> AnchorSampler:
        retinanet = cfg.MODEL.RETINANET
        return super().from_config(
            cfg,
            alpha=retinanet.FOCAL_LOSS_ALPHA,
            gamma=retinanet.FOCAL_LOSS_GAMMA,
            face_prior=retinanet.PRIOR_PROB,
            **options,
        )

    def choose(self, grid, gt_boxes, ignore_boxes, iteration, logits) -> AssignResult:
        match = self.match(grid, gt_boxes, ignore_boxes)
        index = torch.arange(grid.num_anchors, device=match.labels.device).expand(match.labels.shape)
        return take_matches(match, index[:, None])

    def classification(self, logits: Tensor, chosen: AssignResult) -> Tensor:
        """The focal losses of all anchors, summed and divided by the number of positives."""
        targets = (chosen.labels == 1).float()
        losses = sigmoid_focal_loss(logits.float(), targets, alpha=self.alpha, gamma=self.gamma)
        return (losses * (chosen.labels >= 0)).sum() / chosen.num_pos.sum().clamp(min=1)


# The values of MODEL.GROUP_SAMPLING.SAMPLER.
SAMPLERS: dict[str, type[AnchorSampler]] = {
    "group": GroupSampler,
    "uniform": UniformSampler,
    "ohem": OHEMSampler,
    "focal": FocalSampler,
}


def build_anchor_sampler(cfg: CfgNode) -> AnchorSampler:
    """The sampler that ``MODEL.GROUP_SAMPLING.SAMPLER`` names.

    Raises:
        ConfigError: unknown name, or a number that the sampler cannot use, naming the key.
    """
    return named_class(cfg, "MODEL.GROUP_SAMPLING.SAMPLER", SAMPLERS).from_config(cfg)


def named_class(cfg: CfgNode, key: str, registry: Mapping[str, T]) -> T:
    """The entry of ``registry`` that the value of ``key`` names.

    Raises:
        ConfigError: no such entry; the message names the key and the known names.
    """
    name = operator.attrgetter(key)(cfg)
    if name not in registry:
        raise ConfigError(f"{key}: expected one of {', '.join(map(repr, registry))}, got {name!r}")
    return registry[name]


def take_matches(match: MatchResult, index: Tensor) -> AssignResult:
    """What was assigned to chosen anchors, for samplers that choose among all.

    Args:
        match: of all n anchors.
        index: (B, G, N) int64 chosen anchors, -1 for none. Ignored anchors become -1.
    """
    rows = index.clamp(min=0).flatten(1)
    labels = match.labels.gather(1, rows).view_as(index).masked_fill(index < 0, -1)
    is_positive = labels == 1
    return AssignResult(
        indices=index.masked_fill(labels < 0, -1),
        labels=labels,
        matched_gt=match.matched_gt.gather(1, rows).view_as(index).masked_fill(~is_positive, -1),
        num_pos=is_positive.sum(-1),
        num_neg=(labels == 0).sum(-1),
    )
