"""Detectron2's RPN with the anchors, samples and losses of the paper."""

from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ... import head
from ...anchors import AnchorGrid
from ...config import ConfigError
from ...criterion import AnchorCriterion
from ...head import flatten_predictions, predict_from
from ...inference import select_proposals
from ...samplers import build_anchor_sampler, name_counts
from ..build import SINGLE_STAGE_HEADS, AnchorLayout, build_criterion

# The numbers of drawn samples are read back from the device this often (in iterations), not every time.
LOG_PERIOD = 20


@ANCHOR_GENERATOR_REGISTRY.register()
class GroupedAnchorGenerator(DefaultAnchorGenerator):
    """``DefaultAnchorGenerator`` that also knows which anchors are of one scale (Sec. 4.2).

    With ``MODEL.GROUP_SAMPLING.ANCHOR_STRIDES`` the anchors of every size sit on their own sub-sampling of one feature.
    """

    @configurable
    def __init__(self, *, layout: AnchorLayout, offset: float = 0.0):
        super().__init__(sizes=layout.sizes, aspect_ratios=layout.aspect_ratios, strides=layout.strides, offset=offset)
        self.layout = layout
        # On the CPU, so that grid() waits for no GPU.
        self._base_boxes = [boxes.clone() for boxes in self.cell_anchors]

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        layout = AnchorLayout.from_config(cfg, [shape.stride for shape in input_shape])
        return {"layout": layout, "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET}

    def grid(self, features: list[Tensor]) -> AnchorGrid:
        """The anchors of ``features`` (per level (B, C, H, W)) as lattices, in the order of :meth:`forward`."""
        return self.layout.grid([f.shape[-2:] for f in features], self._base_boxes)

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """Per level, its anchors in the order of rows, columns and base boxes."""
        sizes = self.layout.level_sizes([f.shape[-2:] for f in features])
        return [Boxes(boxes) for boxes in self._grid_anchors(sizes)]


@RPN_HEAD_REGISTRY.register()
class SoftmaxRPNHead(head.SoftmaxRPNHead):
    """:class:`group_sampling.head.SoftmaxRPNHead`, built from a config."""

    @configurable
    def __init__(
        self, *, in_channels: int, num_anchors: int, steps: Sequence[int] = (), face_prior: float | None = None
    ):
        super().__init__(in_channels, num_anchors, steps=steps, face_prior=face_prior)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        layout = AnchorLayout.from_config(cfg, [shape.stride for shape in input_shape])
        channels = {shape.channels for shape in input_shape}
        if len(channels) != 1:
            raise ConfigError(
                "The head is shared by all levels of MODEL.RPN.IN_FEATURES, which must agree in channels (found "
                f"{sorted(channels)})"
            )
        return {
            "in_channels": channels.pop(),
            "num_anchors": layout.anchors_per_cell,
            "steps": layout.steps,
            "face_prior": build_anchor_sampler(cfg).face_prior,
        }


@PROPOSAL_GENERATOR_REGISTRY.register()
class GroupSamplingRPN(RPN):
    """RPN trained on the same number of anchors of every scale (Sec. 4).

    Matching, sampling and losses are :class:`~group_sampling.criterion.AnchorCriterion`'s; proposals carry the scale of
    their anchor as ``anchor_scales``. Works in any meta-architecture that takes an RPN.
    """

    @configurable
    def __init__(self, *, criterion: AnchorCriterion, single_stage: bool, **kwargs):
        """
        Args:
            criterion: draws the anchors and computes their losses.
            single_stage: the proposals are the detections, so none are computed while training.
            kwargs: as for ``RPN``.
        """
        super().__init__(**kwargs)
        self.criterion = criterion
        self.single_stage = single_stage

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        return {
            **super().from_config(cfg, input_shape),
            "criterion": build_criterion(cfg),
            "single_stage": cfg.MODEL.ROI_HEADS.NAME == SINGLE_STAGE_HEADS,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
        ignore_boxes: list[Boxes] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``RPN.forward``, and ``ignore_boxes``: per image, regions whose anchors are no negatives.

        Returns:
            proposals: per image ``Instances`` with ``proposal_boxes`` and ``objectness_logits``, best first, and at
                test time ``anchor_scales``; without fields while a single-stage detector trains.
            losses: ``loss_rpn_cls`` and ``loss_rpn_loc`` while training.
        """
        features = [features[f] for f in self.in_features]
        grid = self.anchor_generator.grid(features)
        if self.training and gt_instances is None:
            raise ValueError("GroupSamplingRPN needs gt_instances while training")
        if self.training and self.single_stage and isinstance(self.rpn_head, head.SoftmaxRPNHead):
            predict = self.rpn_head.predictor(features, grid)
            losses = self._losses(grid, predict, gt_instances, ignore_boxes)
            return [Instances(size) for size in images.image_sizes], losses

        logits, deltas = flatten_predictions(*self.rpn_head(features))
        losses = {}
        if self.training:
            losses = self._losses(grid, predict_from(logits, deltas), gt_instances, ignore_boxes)
            if self.single_stage:
                return [Instances(size) for size in images.image_sizes], losses
        selected = select_proposals(
            grid,
            logits.detach(),
            deltas.detach(),
            images.image_sizes,
            pre_nms_topk=self.pre_nms_topk[self.training],
            post_nms_topk=self.post_nms_topk[self.training],
            nms_thresh=self.nms_thresh,
            min_size=self.min_box_size,
        )
        proposals = []
        for size, image in zip(images.image_sizes, selected):
            proposal = Instances(size, proposal_boxes=Boxes(image.boxes), objectness_logits=image.logits)
            if not self.training:  # ROI heads append ground truth to training proposals, and it has no anchor
                proposal.anchor_scales = image.anchor_scales
            proposals.append(proposal)
        return proposals, losses

    def _losses(self, grid, predict, gt_instances, ignore_boxes) -> dict[str, Tensor]:
        storage = get_event_storage()
        result = self.criterion(
            grid,
            predict,
            [x.gt_boxes.tensor for x in gt_instances],
            None if ignore_boxes is None else [x.tensor for x in ignore_boxes],
            iteration=storage.iter,
        )
        if storage.iter % LOG_PERIOD == 0 or (storage.iter + 1) % LOG_PERIOD == 0:
            counts = name_counts("rpn", grid.scales, result.num_pos.tolist(), result.num_neg.tolist())
            storage.put_scalars(**counts)
        seconds = self.criterion.sampler.timer.seconds
        if seconds is not None:
            storage.put_scalar("time_assign", seconds)
        losses = {"loss_rpn_cls": result.classification, "loss_rpn_loc": result.localization}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}
