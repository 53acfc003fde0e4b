"""Grouped Fast R-CNN (Table 5): torchvision's ROI heads, trained on as many proposals of every scale."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import RoIAlign, batched_nms, clip_boxes_to_image

from ...inference import Proposals
from ...losses import BOX_LOSSES, box_loss
from ...monitor import name_counts
from ...roi_sampling import ProposalSampler, build_proposal_sampler
from .sampling import SamplingModule


class SingleLevelRoIAlign(RoIAlign):
    """RoIAlign on one feature, equal to Detectron2's ``ROIAlignV2``.

    Args:
        feature: its name.
        stride: pixels of the image per cell.
        resolution: height and width of the output.
        sampling_ratio: samples per output cell and direction; 0: as many as the box has cells.
    """

    def __init__(self, feature: str, stride: int, resolution: int, sampling_ratio: int = 0):
        super().__init__((resolution, resolution), 1 / stride, sampling_ratio, aligned=True)
        self.feature = feature

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(R, C, resolution, resolution) of all ``boxes``, per image (n, 4) XYXY in pixels, R altogether."""
        return super().forward(features[self.feature], boxes)


class GroupedRoIHeads(SamplingModule, RoIHeads):
    """torchvision's ``RoIHeads`` that draws its proposals with :class:`~group_sampling.roi_sampling.ProposalSampler`.

    Takes the place of ``roi_heads`` in any of torchvision's R-CNNs that detects boxes only.

    Args:
        sampler: draws the proposals; torchvision's matcher and sampler are not used.
        box_loss_type: one of :data:`~group_sampling.losses.BOX_LOSSES`.
        smooth_l1_beta: where smooth-L1 turns from quadratic to linear.
        box_loss_weight: factor of "loss_box_reg".
        append_gt: ground truths are proposals as well while training.
        first_label: label of the first class in targets and detections: torchvision's 1, or 0 as in Detectron2.
        args, kwargs: as for ``RoIHeads``.
    """

    def __init__(
        self,
        *args,
        sampler: ProposalSampler,
        box_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        box_loss_weight: float = 1.0,
        append_gt: bool = True,
        first_label: int = 1,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if box_loss_type not in BOX_LOSSES:
            raise ValueError(f"GroupedRoIHeads: box_loss_type: expected one of {BOX_LOSSES}, got {box_loss_type!r}")
        if self.has_mask() or self.has_keypoint():
            raise ValueError("GroupedRoIHeads detects boxes only: expected no mask or keypoint head")
        self.sampler = sampler
        self.box_loss_type = box_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weight = box_loss_weight
        self.append_gt = append_gt
        self.first_label = first_label

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Tensor | Proposals],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As ``RoIHeads.forward``; a target may have "ignore_boxes" (k, 4), whose proposals are not negatives.

        Args:
            proposals: per image (n, 4) boxes, or :class:`~group_sampling.inference.Proposals`.

        Returns:
            detections: per image, at test time, "boxes" (k, 4), "scores" (k,), "labels" (k,), best first, and, if the
                proposals have them, "anchor_scales" (k,).
            losses: "loss_cls" and "loss_box_reg" while training.
        """
        if self.training:
            boxes = [image.boxes if isinstance(image, Proposals) else image for image in proposals]
            boxes, _, labels, gt_boxes = self.select_training_samples(boxes, targets)
            logits, deltas = self._predict(features, boxes, image_shapes)
            return [], self._losses(logits, deltas, torch.cat(boxes), torch.cat(labels), torch.cat(gt_boxes))

        # torchvision's roi_align crashes on coordinates that are not finite.
        proposals = [image if isinstance(image, Proposals) else Proposals(image, None, None) for image in proposals]
        finite = [image.boxes.isfinite().all(dim=1) for image in proposals]
        boxes = [image.boxes[keep] for image, keep in zip(proposals, finite)]
        logits, deltas = self._predict(features, boxes, image_shapes)
        found, scores, labels, kept = self.postprocess_detections(logits, deltas, boxes, image_shapes)
        detections = []
        for i, (image, keep) in enumerate(zip(proposals, finite)):
            detections.append({"boxes": found[i], "scores": scores[i], "labels": labels[i]})
            if image.anchor_scales is not None:
                detections[-1]["anchor_scales"] = image.anchor_scales[keep][kept[i]]
        return detections, {}

    def _predict(self, features, boxes, image_shapes) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    @torch.no_grad()
    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Draw the proposals that the losses see.

        Returns:
            Per image, k drawn: boxes (k, 4), index of the matched ground truth (k,), -1 for negatives, output of the
            classifier (k,), 0 being the background, and box of the matched ground truth (k, 4), unspecified for
            negatives.
        """
        self.check_targets(targets)
        gt_boxes = [target["boxes"].to(boxes.dtype) for target, boxes in zip(targets, proposals)]
        if self.append_gt:
            proposals = self.add_gt_proposals(proposals, gt_boxes)
        samples = self.sampler(
            proposals,
            gt_boxes,
            [target.get("ignore_boxes", gt[:0]) for target, gt in zip(targets, gt_boxes)],
            iteration=self._next_iteration(),
        )
        self.sample_counts = name_counts("roi", self.sampler.scales, *self.sampler.count_by_scale(samples))
        boxes = [image[sample.indices] for image, sample in zip(proposals, samples)]
        labels = [
            sample.classes(target["labels"] + 1 - self.first_label, background=0)
            for sample, target in zip(samples, targets)
        ]
        matched_boxes = [
            gt[sample.matched_gt.clamp(min=0)] if len(gt) else drawn
            for sample, gt, drawn in zip(samples, gt_boxes, boxes)
        ]
        return boxes, [sample.matched_gt for sample in samples], labels, matched_boxes

    def _losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, gt_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Both losses of R drawn proposals, divided by R, as in Fast R-CNN."""
        count = max(len(labels), 1)
        positive = (labels > 0).nonzero().squeeze(1)
        box_losses = box_loss(
            self.box_loss_type,
            deltas.unflatten(1, (-1, 4))[positive, labels[positive]].float(),
            boxes[positive],
            gt_boxes[positive],
            self.smooth_l1_beta,
            self.box_coder.weights,
        )
        return {
            "loss_cls": F.cross_entropy(logits.float(), labels, reduction="sum") / count,
            "loss_box_reg": self.box_loss_weight * box_losses.sum() / count,
        }

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Decode, clip, threshold, NMS within a class, top-k: as ``RoIHeads`` does, and in the order of Detectron2.

        Returns:
            Per image, best first: boxes (k, 4), scores (k,), labels (k,) and the index of the proposal (k,).
        """
        counts = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(box_regression.float(), proposals).reshape(*class_logits.shape, 4)
        probabilities = class_logits.float().softmax(dim=-1)
        results = []
        for boxes, scores, shape in zip(decoded.split(counts), probabilities.split(counts), image_shapes):
            is_finite = boxes.isfinite().flatten(1).all(dim=1) & scores.isfinite().all(dim=1)
            rows, classes = ((scores[:, 1:] > self.score_thresh) & is_finite[:, None]).nonzero().unbind(dim=1)
            boxes = clip_boxes_to_image(boxes[rows, classes + 1], shape)
            scores = scores[rows, classes + 1]
            keep = batched_nms(boxes, scores, classes, self.nms_thresh)[: self.detections_per_img]
            results.append((boxes[keep], scores[keep], classes[keep] + self.first_label, rows[keep]))
        return tuple(map(list, zip(*results)))


def build_grouped_roi_heads(cfg: CfgNode, in_channels: int, stride: int) -> GroupedRoIHeads:
    """The ROI heads of a config that :func:`~group_sampling.engines.tv.config.load_config` has checked.

    Args:
        in_channels, stride: of the feature ``MODEL.ROI_HEADS.IN_FEATURES``.
    """
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    resolution = box_head.POOLER_RESOLUTION
    result = GroupedRoIHeads(
        SingleLevelRoIAlign(heads.IN_FEATURES[0], stride, resolution, box_head.POOLER_SAMPLING_RATIO),
        TwoMLPHead(in_channels * resolution**2, box_head.FC_DIM),
        FastRCNNPredictor(box_head.FC_DIM, heads.NUM_CLASSES + 1),
        fg_iou_thresh=heads.IOU_THRESHOLDS[-1],
        bg_iou_thresh=heads.IOU_THRESHOLDS[0],
        batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        bbox_reg_weights=tuple(box_head.BBOX_REG_WEIGHTS),
        score_thresh=heads.SCORE_THRESH_TEST,
        nms_thresh=heads.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        sampler=build_proposal_sampler(cfg),
        box_loss_type=box_head.BBOX_REG_LOSS_TYPE,
        smooth_l1_beta=box_head.SMOOTH_L1_BETA,
        box_loss_weight=box_head.BBOX_REG_LOSS_WEIGHT,
        append_gt=heads.PROPOSAL_APPEND_GT,
        first_label=0,
    )
    # Detectron2's initialization, which differs from torchvision's.
    for layer in (result.box_head.fc6, result.box_head.fc7):
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
    for layer, std in ((result.box_predictor.cls_score, 0.01), (result.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    # The background's box, which no loss reads and Detectron2 does not have.
    nn.init.zeros_(result.box_predictor.bbox_pred.weight[:4])
    return result
