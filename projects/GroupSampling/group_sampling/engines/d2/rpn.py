"""Detectron2's RPN with the anchors, samples and losses of the paper."""

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ... import head
from ...anchors import AnchorGrid
from ...inference import flatten_predictions, select_proposals
from ...targets import AnchorCriterion
from ..common import SINGLE_STAGE_HEADS, build_criterion

# The numbers of drawn samples are read back from the device this often (in iterations), not every time.
LOG_PERIOD = 20


@ANCHOR_GENERATOR_REGISTRY.register()
class GroupedAnchorGenerator(DefaultAnchorGenerator):
    """``DefaultAnchorGenerator`` that also knows which anchors are of one scale (Sec. 4.2)."""

    def _calculate_anchors(self, sizes, aspect_ratios):
        buffers = super()._calculate_anchors(sizes, aspect_ratios)
        self._base_boxes = [boxes.clone() for boxes in buffers]  # stay on the CPU, so that grid() waits for no GPU
        return buffers

    def grid(self, features: list[Tensor]) -> AnchorGrid:
        """The anchors of ``features`` (per level (B, C, H, W)) as lattices, in the order of :meth:`forward`."""
        return AnchorGrid.from_cell_anchors(
            self._base_boxes, self.strides, [f.shape[-2:] for f in features], offset=self.offset
        )


@RPN_HEAD_REGISTRY.register()
class SoftmaxRPNHead(head.SoftmaxRPNHead):
    """:class:`group_sampling.head.SoftmaxRPNHead`, built from a config."""

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: int):
        super().__init__(in_channels, num_anchors)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        num_anchors = set(build_anchor_generator(cfg, input_shape).num_anchors)
        channels = {shape.channels for shape in input_shape}
        if len(num_anchors) != 1 or len(channels) != 1:
            raise ValueError(
                "SoftmaxRPNHead is shared by all levels, which must agree in anchors per cell (found "
                f"{sorted(num_anchors)}) and channels (found {sorted(channels)})"
            )
        return {"in_channels": channels.pop(), "num_anchors": num_anchors.pop()}


@PROPOSAL_GENERATOR_REGISTRY.register()
class GroupSamplingRPN(RPN):
    """RPN trained on the same number of anchors of every scale (Sec. 4).

    Matching, sampling and losses are :class:`~group_sampling.targets.AnchorCriterion`'s; proposals carry the scale of
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
        logits, deltas = flatten_predictions(*self.rpn_head(features))

        losses = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("GroupSamplingRPN needs gt_instances while training")
            losses = self._losses(grid, logits, deltas, gt_instances, ignore_boxes)
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

    def _losses(self, grid, logits, deltas, gt_instances, ignore_boxes) -> dict[str, Tensor]:
        storage = get_event_storage()
        result = self.criterion(
            grid,
            logits,
            deltas,
            [x.gt_boxes.tensor for x in gt_instances],
            None if ignore_boxes is None else [x.tensor for x in ignore_boxes],
            iteration=storage.iter,
        )
        if storage.iter % LOG_PERIOD == 0 or (storage.iter + 1) % LOG_PERIOD == 0:
            for name, counts in (("num_pos", result.num_pos), ("num_neg", result.num_neg)):
                for scale, count in zip(grid.scales, counts.tolist()):
                    storage.put_scalar(f"rpn/{name}@{scale:g}", count)
        losses = {"loss_rpn_cls": result.classification, "loss_rpn_loc": result.localization}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}
