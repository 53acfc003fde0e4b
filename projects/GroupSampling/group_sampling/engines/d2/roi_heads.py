"""Grouped Fast R-CNN (Table 5): Detectron2's standard ROI heads, trained on as many proposals of every scale."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ...losses import box_loss
from ...roi_sampling import ProposalSample, ProposalSampler, build_proposal_sampler
from .data import ignore_boxes_of
from .rpn import log_counts, refuse_partial_load


class GroupedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` with the paper's regression losses, whose detections have the scale of their proposal.

    ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE`` may be ``iou_l2`` or ``iou_log`` (Sec. 5, Table 3) or one of
    Detectron2's own types.
    """

    def box_reg_loss(self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor) -> Tensor:
        """As in ``FastRCNNOutputLayers``: summed over the positives, divided by the number R of proposals."""
        if self.box_reg_loss_type not in ("iou_l2", "iou_log"):
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        positive = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)
        deltas = pred_deltas.unflatten(1, (-1, 4))  # one box per class, or one for all
        deltas = deltas[positive, gt_classes[positive] if deltas.shape[1] > 1 else 0]
        losses = box_loss(
            self.box_reg_loss_type,
            deltas.float(),
            proposal_boxes[positive],
            gt_boxes[positive],
            weights=self.box2box_transform.weights,
        )
        return losses.sum() / max(len(gt_classes), 1)

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """As in ``FastRCNNOutputLayers``; a detection has the ``anchor_scales`` of its proposal, if that has one."""
        predictions = tuple(part.float() for part in predictions)  # under autocast they have 16 bits
        boxes = self.predict_boxes(predictions, proposals)
        scores = self.predict_probs(predictions, proposals)
        detections, kept = fast_rcnn_inference(
            boxes,
            scores,
            [proposal.image_size for proposal in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        # Detectron2 numbers what it kept among the finite predictions, not among all.
        finite = [
            (b.isfinite().all(dim=1) & s.isfinite().all(dim=1)).nonzero().squeeze(1) for b, s in zip(boxes, scores)
        ]
        kept = [rows[index] for rows, index in zip(finite, kept)]
        for image, proposal, index in zip(detections, proposals, kept):
            if proposal.has("anchor_scales"):
                image.anchor_scales = proposal.anchor_scales[index]
        return detections, kept


@ROI_HEADS_REGISTRY.register()
class GroupedROIHeads(StandardROIHeads):
    """``StandardROIHeads`` that draws its proposals with :class:`~group_sampling.roi_sampling.ProposalSampler`.

    ``MODEL.GROUP_SAMPLING.ROI_SAMPLER`` is ``group`` for as many proposals of every scale or ``uniform``. Works with
    any backbone, proposal generator and box head; a config needs the keys of this project
    (:func:`~group_sampling.config.add_group_sampling_config`) and this class as ``MODEL.ROI_HEADS.NAME``.
    """

    @configurable
    def __init__(self, *, sampler: ProposalSampler, **kwargs):
        """
        Args:
            sampler: draws the proposals.
            kwargs: as for ``StandardROIHeads``; its matcher, batch size and positive fraction are not used.
        """
        super().__init__(**kwargs)
        self.sampler = sampler
        self.register_load_state_dict_pre_hook(refuse_partial_load)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        return {**super().from_config(cfg, input_shape), "sampler": build_proposal_sampler(cfg)}

    @classmethod
    def _init_box_head(cls, cfg, input_shape: dict[str, ShapeSpec]):
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_predictor"] = GroupedFastRCNNOutputLayers(cfg, parts["box_head"].output_shape)
        return parts

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """As ``ROIHeads.label_and_sample_proposals``: the drawn proposals with the ``gt_*`` fields of their targets.

        Proposals in the ignore regions of the targets (:class:`~group_sampling.engines.d2.data.IgnoringInstances`) are
        not used as negatives.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        storage = get_event_storage()
        samples = self.sampler(
            [image.proposal_boxes.tensor for image in proposals],
            [image.gt_boxes.tensor for image in targets],
            ignore_boxes_of(targets),
            iteration=storage.iter,
        )
        log_counts(storage, "roi", self.sampler.scales, *self.sampler.count_by_scale(samples))
        return [self._label(*image) for image in zip(proposals, targets, samples)]

    def _label(self, proposals: Instances, targets: Instances, sample: ProposalSample) -> Instances:
        drawn = proposals[sample.indices]
        drawn.gt_classes = sample.classes(targets.gt_classes, background=self.num_classes)
        if len(targets) > 0:
            matched = sample.matched_gt.clamp(min=0)  # negatives have a target that nobody reads
            for name, value in targets.get_fields().items():
                if name.startswith("gt_") and not drawn.has(name):
                    drawn.set(name, value[matched])
        return drawn
