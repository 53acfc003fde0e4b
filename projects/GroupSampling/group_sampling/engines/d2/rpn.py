"""Detectron2's RPN with the anchors, samples and losses of the paper."""

import functools
from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ... import head
from ...anchors import AnchorGrid
from ...checkpoint import refuse_partial_weights
from ...config import ConfigError, check_values
from ...criterion import AnchorCriterion
from ...head import Predict, flatten_predictions, predict_from
from ...inference import select_proposals
from ...monitor import name_counts
from ...samplers import build_anchor_sampler
from ..build import LOG_PERIOD, SINGLE_STAGE_HEADS, AnchorLayout, build_criterion, common_channels
from .data import ignore_boxes_of


def log_counts(storage: EventStorage, stage: str, scales: Sequence[float], num_pos: Tensor, num_neg: Tensor) -> None:
    """Log :func:`~group_sampling.monitor.name_counts` in iterations that are written: to read them back is a wait."""
    if storage.iter % LOG_PERIOD == 0 or (storage.iter + 1) % LOG_PERIOD == 0:
        for name, count in name_counts(stage, scales, num_pos.tolist(), num_neg.tolist()).items():
            storage.put_scalar(name, count)


def refuse_partial_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
    """Load hook for a part of Detectron2's own meta-architectures, where missing weights are logged and no more."""
    refuse_partial_weights(state_dict, module, prefix=prefix)


@ANCHOR_GENERATOR_REGISTRY.register()
class GroupedAnchorGenerator(DefaultAnchorGenerator):
    """``DefaultAnchorGenerator`` of the layout that a config describes (Sec. 4.2, Table 1).

    With ``MODEL.GROUP_SAMPLING.ANCHOR_STRIDES`` the anchors of every size sit on their own sub-sampling of one feature.
    """

    @configurable
    def __init__(self, *, layout: AnchorLayout, offset: float = 0.0):
        super().__init__(sizes=layout.sizes, aspect_ratios=layout.aspect_ratios, strides=layout.strides, offset=offset)
        self.layout = layout

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        layout = AnchorLayout.from_config(cfg, [shape.stride for shape in input_shape])
        return {"layout": layout, "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET}

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
        return {
            "in_channels": common_channels(shape.channels for shape in input_shape),
            "num_anchors": layout.anchors_per_cell,
            "steps": layout.steps,
            "face_prior": build_anchor_sampler(cfg).face_prior,
        }


@PROPOSAL_GENERATOR_REGISTRY.register()
class GroupSamplingRPN(RPN):
    """RPN trained on the same number of anchors of every scale (Sec. 4).

    Matching, sampling and losses are :class:`~group_sampling.criterion.AnchorCriterion`'s; proposals carry the scale of
    their anchor as ``anchor_scales``. Works in any meta-architecture that has an RPN, with this project's anchor
    generator or Detectron2's.
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
        generator = self.anchor_generator
        if not isinstance(generator, DefaultAnchorGenerator):
            raise ConfigError(
                "MODEL.ANCHOR_GENERATOR.NAME: expected GroupedAnchorGenerator or DefaultAnchorGenerator with "
                f"GroupSamplingRPN, got {type(generator).__name__}"
            )
        # They stay on the CPU, so that grid() waits for no GPU.
        self._base_boxes = [boxes.clone() for boxes in generator.cell_anchors]
        self.register_load_state_dict_pre_hook(refuse_partial_load)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        check_values(
            cfg,
            {"MODEL.RPN.BOUNDARY_THRESH": (-1,), "MODEL.RPN.BBOX_REG_WEIGHTS": ((1.0, 1.0, 1.0, 1.0),)},
            "GroupSamplingRPN supports nothing else",
        )
        if cfg.MODEL.GROUP_SAMPLING.ANCHOR_STRIDES:
            names = {"MODEL.ANCHOR_GENERATOR.NAME": ("GroupedAnchorGenerator",)}
            check_values(cfg, names, "MODEL.GROUP_SAMPLING.ANCHOR_STRIDES needs it")
        return {
            **super().from_config(cfg, input_shape),
            "criterion": build_criterion(cfg),
            "single_stage": cfg.MODEL.ROI_HEADS.NAME == SINGLE_STAGE_HEADS,
        }

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``RPN.forward``.

        Args:
            gt_instances: anchors in the ignore regions of
                :class:`~group_sampling.engines.d2.data.IgnoringInstances` are not used as negatives.

        Returns:
            proposals: per image ``Instances`` with ``proposal_boxes`` and ``objectness_logits``, best first, and at
                test time ``anchor_scales``; without fields while a single-stage detector trains.
            losses: ``loss_rpn_cls`` and ``loss_rpn_loc`` while training.
        """
        features = [features[f] for f in self.in_features]
        grid = self.grid(features)
        if self.training and gt_instances is None:
            raise ValueError("GroupSamplingRPN: expected gt_instances while training, got None")
        if self.training and self.single_stage and isinstance(self.rpn_head, head.SoftmaxRPNHead):
            losses = self._losses(grid, self.rpn_head.predictor(features, grid), gt_instances)
            return [Instances(size) for size in images.image_sizes], losses

        logits, deltas = flatten_predictions(*self.rpn_head(features))
        losses = self._losses(grid, predict_from(logits, deltas), gt_instances) if self.training else {}
        if self.training and self.single_stage:
            return [Instances(size) for size in images.image_sizes], losses
        return self._propose(grid, logits, deltas, images.image_sizes), losses

    def propose_by_scale(
        self, images: ImageList, features: dict[str, Tensor]
    ) -> tuple[list[Instances], dict[float, list[Instances]]]:
        """What :meth:`forward` proposes at test time, and what the anchors of each scale would by themselves.

        One pass of the head gives both.

        Returns:
            proposals: per image.
            by_scale: scale in pixels -> per image, with the same limits for a scale as for all together.
        """
        features = [features[f] for f in self.in_features]
        grid = self.grid(features)
        logits, deltas = flatten_predictions(*self.rpn_head(features))
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
    ) -> list[Instances]:
        selected = select_proposals(
            grid,
            logits.detach(),
            deltas.detach(),
            image_sizes,
            pre_nms_topk=self.pre_nms_topk[self.training],
            post_nms_topk=self.post_nms_topk[self.training],
            nms_thresh=self.nms_thresh,
            min_size=self.min_box_size,
            group=group,
        )
        proposals = []
        for size, image in zip(image_sizes, selected):
            proposal = Instances(size, proposal_boxes=Boxes(image.boxes), objectness_logits=image.logits)
            if not self.training:  # ROI heads append ground truth to training proposals, and it has no anchor
                proposal.anchor_scales = image.anchor_scales
            proposals.append(proposal)
        return proposals

    def grid(self, features: list[Tensor]) -> AnchorGrid:
        """The anchors of ``features`` (per level (B, C, H, W)) as lattices, in the order of the anchor generator."""
        generator, sizes = self.anchor_generator, [f.shape[-2:] for f in features]
        if isinstance(generator, GroupedAnchorGenerator):
            sizes = generator.layout.level_sizes(sizes)
        return AnchorGrid.from_cell_anchors(self._base_boxes, generator.strides, sizes, offset=generator.offset)

    def _losses(self, grid: AnchorGrid, predict: Predict, targets: list[Instances]) -> dict[str, Tensor]:
        storage = get_event_storage()
        gt_boxes = [x.gt_boxes.tensor for x in targets]
        result = self.criterion(grid, predict, gt_boxes, ignore_boxes_of(targets), iteration=storage.iter)
        fired = getattr(self.rpn_head, "fired", None)
        if fired is not None:
            self.criterion.monitor.add_units(fired)
        log_counts(storage, "rpn", grid.scales, result.num_pos, result.num_neg)
        seconds = self.criterion.sampler.timer.seconds
        if seconds is not None:
            storage.put_scalar("time_assign", seconds)
        losses = {"loss_rpn_cls": result.classification, "loss_rpn_loc": result.localization}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}
