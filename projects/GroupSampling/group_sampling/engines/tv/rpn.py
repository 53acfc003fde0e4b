"""torchvision's RPN with the anchors, samples and losses of the paper."""

import functools
from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from ...anchors import AnchorGrid, cell_anchors
from ...criterion import AnchorCriterion
from ...head import Predict, flatten_predictions, predict_from
from ...inference import Proposals, select_proposals
from ...monitor import name_counts
from ..build import AnchorLayout
from .sampling import SamplingModule


class GroupedAnchorGenerator(AnchorGenerator):
    """``AnchorGenerator`` with Detectron2's base boxes and the strides of a config, whose anchors are a grid."""

    def __init__(self, layout: AnchorLayout):
        super().__init__(layout.sizes, layout.aspect_ratios)
        self.layout = layout

    def generate_anchors(self, scales: Sequence[float], aspect_ratios: Sequence[float], *args, **kwargs) -> Tensor:
        return cell_anchors(scales, aspect_ratios)

    def grid(self, features: Sequence[Tensor]) -> AnchorGrid:
        """The anchors of ``features``, per level (B, C, H, W), as lattices."""
        return self.layout.grid([f.shape[-2:] for f in features], self.cell_anchors)


class GroupSamplingRPN(SamplingModule, RegionProposalNetwork):
    """``RegionProposalNetwork`` trained on the same number of anchors of every scale (Sec. 4).

    Matching, sampling and losses are the criterion's; torchvision's matcher and sampler are not used. It replaces the
    ``rpn`` of any of torchvision's R-CNNs.

    Args:
        criterion: draws the anchors and computes their losses.
        loss_weights: factors of "loss_rpn_cls" and "loss_rpn_loc".
        min_size: proposals with a side not longer than this many pixels are left out.
        single_stage: the proposals are the detections, so none are computed while training.
        args, kwargs: as for ``RegionProposalNetwork``.
    """

    def __init__(
        self,
        *args,
        criterion: AnchorCriterion,
        loss_weights: dict[str, float],
        min_size: float,
        single_stage: bool = True,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.single_stage = single_stage
        self.criterion = criterion
        self.loss_weights = loss_weights
        self.min_size = min_size

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """As ``RegionProposalNetwork.forward``; a target may have "ignore_boxes" (k, 4), whose anchors
        are not used as negatives.

        Returns:
            proposals: per image; none while a single-stage detector trains, which has no second stage to train.
            losses: "loss_rpn_cls" and "loss_rpn_loc" while training.
        """
        levels = list(features.values())
        grid = self.anchor_generator.grid(levels)
        if self.training and targets is None:
            raise ValueError("GroupSamplingRPN needs targets while training")
        if self.training and self.single_stage:
            return [], self._losses(grid, self.head.predictor(levels, grid), targets)
        logits, deltas = flatten_predictions(*self.head(levels))
        losses = self._losses(grid, predict_from(logits, deltas), targets) if self.training else {}
        return self._propose(grid, logits, deltas, images.image_sizes), losses

    def propose_by_scale(
        self, images: ImageList, features: dict[str, Tensor]
    ) -> tuple[list[Proposals], dict[float, list[Proposals]]]:
        """What :meth:`forward` proposes at test time, and what the anchors of each scale would by themselves.

        One pass of the head gives both.

        Returns:
            proposals: per image.
            by_scale: scale in pixels -> per image, with the same limits for a scale as for all together.
        """
        levels = list(features.values())
        grid = self.anchor_generator.grid(levels)
        logits, deltas = flatten_predictions(*self.head(levels))
        propose = functools.partial(self._propose, grid, logits, deltas, images.image_sizes)
        return propose(), {scale: propose(group=group) for group, scale in enumerate(grid.scales)}

    def _propose(
        self,
        grid: AnchorGrid,
        logits: Tensor,
        deltas: Tensor,
        image_sizes: list[tuple[int, int]],
        *,
        group: int | None = None,
    ) -> list[Proposals]:
        return select_proposals(
            grid,
            logits.detach(),
            deltas.detach(),
            image_sizes,
            pre_nms_topk=self.pre_nms_top_n(),
            post_nms_topk=self.post_nms_top_n(),
            nms_thresh=self.nms_thresh,
            min_size=self.min_size,
            group=group,
        )

    def _losses(self, grid: AnchorGrid, predict: Predict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        gt_boxes = [target["boxes"] for target in targets]
        ignore_boxes = [target.get("ignore_boxes", boxes.new_zeros((0, 4))) for target, boxes in zip(targets, gt_boxes)]
        result = self.criterion(grid, predict, gt_boxes, ignore_boxes, iteration=self._next_iteration())
        fired = getattr(self.head, "fired", None)
        if fired is not None:
            self.criterion.monitor.add_units(fired)
        self.sample_counts = name_counts("rpn", grid.scales, result.num_pos, result.num_neg)
        losses = {"loss_rpn_cls": result.classification, "loss_rpn_loc": result.localization}
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}
