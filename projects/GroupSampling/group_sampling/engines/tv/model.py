"""The paper's detectors as subclasses of torchvision's detection models.

The modules have torchvision's names: ``backbone.body`` is a torchvision network without its classifier,
``backbone.fpn`` a ``FeaturePyramidNetwork``. Parameters have the shapes of the Detectron2 engine's, so weights convert
both ways.
"""

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ...detections import Detections
from ...head import SoftmaxRPNHead
from ...inference import Proposals, proposals_to_detections
from ..build import SINGLE_STAGE_HEADS, AnchorLayout, build_criterion, common_channels
from .backbone import build_backbone, stage_of
from .config import FPN_BACKBONES
from .roi_heads import build_grouped_roi_heads
from .rpn import GroupedAnchorGenerator, GroupSamplingRPN
from .sampling import SamplingModule


class ProposalDetections(nn.Module):
    """ROI heads of a single-stage detector: no parameters, the proposals become the detections."""

    def __init__(self, *, score_thresh: float, nms_thresh: float, max_detections: int):
        super().__init__()
        self.options = {"score_thresh": score_thresh, "nms_thresh": nms_thresh, "max_detections": max_detections}

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Proposals],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Per image "boxes" (k, 4), "scores" (k,), "labels" (k,) of zeros and "anchor_scales" (k,), best first."""
        detections = []
        for image in proposals:
            boxes, scores, scales = proposals_to_detections(image, **self.options)
            labels = scores.new_zeros(len(scores), dtype=int)
            detections.append({"boxes": boxes, "scores": scores, "labels": labels, "anchor_scales": scales})
        return detections, {}


class NormalizeAndPad(GeneralizedRCNNTransform):
    """``GeneralizedRCNNTransform`` without its resize: the data pipeline has done that."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], size_divisibility: int):
        super().__init__(min_size=0, max_size=0, image_mean=mean, image_std=std, size_divisible=size_divisibility)
        # On the model's device, since to move them there in every step is a wait; no part of a checkpoint.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def normalize(self, image: Tensor) -> Tensor:
        """
        Raises:
            TypeError: neither uint8 nor float.
            ValueError: in eval mode, float values of [0, 1] rather than [0, 255].
        """
        if image.dtype == torch.uint8:
            image = image.float()
        elif not image.is_floating_point():
            raise TypeError(f"image: expected uint8 or float with values in [0, 255], got {image.dtype}")
        is_eager = not (self.training or torch.jit.is_tracing() or torch.compiler.is_compiling())
        # Pixels of [0, 255] may all be 0 or 1; fractions up to 1 are torchvision's range.
        if is_eager and bool((image <= 1).all() & (image != image.round()).any()):
            raise ValueError("image: expected values in [0, 255], got fractions in [0, 1]; multiply them by 255")
        mean, std = (value.to(image.dtype)[:, None, None] for value in (self.mean, self.std))
        return (image - mean) / std


class GroupSamplingRCNN(GeneralizedRCNN):
    """``GeneralizedRCNN`` with this engine's components.

    Takes a list of (3, H, W) RGB images, uint8 or float, with values in [0, 255] and, while training, a target for
    each: "boxes" (m, 4) XYXY in pixels, optionally "ignore_boxes" (k, 4), and with a second stage "labels" (m,),
    0 ... K - 1. Returns the losses, "loss_rpn_cls" and "loss_rpn_loc" of the RPN and "loss_cls" and "loss_box_reg" of a
    second stage, while training, else per image what :meth:`ProposalDetections.forward` describes, in pixels of the
    image given, and with ``sub_detectors`` (Sec. 6.1) under "sub_detectors" such a dict of each anchor scale: what its
    anchors find by themselves.
    """

    def __init__(self, *args, sub_detectors: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.sub_detectors = sub_detectors

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if self.training and targets and targets[0]["boxes"].device.type != "cpu":
            return self.losses(images, targets)
        if self.sub_detectors and not self.training:
            return self._detect(images)
        return super().forward(images, targets)

    def _detect(self, images: list[Tensor]) -> list[dict[str, Tensor | dict[float, dict[str, Tensor]]]]:
        """As ``GeneralizedRCNN.forward`` does at test time; backbone and head run once for all sub-detectors."""
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(images)
        features = self.backbone(batch.tensors)

        def finish(proposals: list[Proposals]) -> list[dict[str, Tensor]]:
            detections, _ = self.roi_heads(features, proposals, batch.image_sizes)
            return self.transform.postprocess(detections, batch.image_sizes, original_sizes)

        proposals, by_scale = self.rpn.propose_by_scale(batch, features)
        found = finish(proposals)
        for scale, proposals in by_scale.items():
            for output, alone in zip(found, finish(proposals)):
                output.setdefault("sub_detectors", {})[scale] = alone
        return found

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What :meth:`forward` returns while training, without its check of the boxes, which waits for a GPU.

        Boxes without an area, which that check refuses, are no target of any anchor or proposal.
        """
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, losses = self.rpn(batch, features, targets)
        _, second_stage = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return {**second_stage, **losses}

    def set_iteration(self, iteration: int) -> None:
        """Let the next training pass draw the samples of this iteration."""
        for module in self.modules():
            if isinstance(module, SamplingModule):
                module.iteration = iteration

    @property
    def sample_counts(self) -> dict[str, Tensor]:
        """``sample_counts`` of the RPN and, if there is one, of the second stage."""
        return {**self.rpn.sample_counts, **getattr(self.roi_heads, "sample_counts", {})}


def to_detections(output: dict) -> Detections:
    """One of the outputs of a :class:`GroupSamplingRCNN` in eval mode."""
    by_scale = output.get("sub_detectors")
    return Detections(
        *(output[name] for name in ("boxes", "scores", "labels", "anchor_scales")),
        by_scale and {scale: to_detections(alone) for scale, alone in by_scale.items()},
    )


def from_detections(found: Detections) -> dict:
    """The output that :func:`to_detections` reads."""
    *columns, by_scale = found
    output = dict(zip(("boxes", "scores", "labels", "anchor_scales"), columns))
    if by_scale is not None:
        output["sub_detectors"] = {scale: from_detections(alone) for scale, alone in by_scale.items()}
    return output


def build_model(cfg: CfgNode) -> GroupSamplingRCNN:
    """The detector of a config that :func:`~group_sampling.engines.tv.config.load_config` has checked.

    Raises:
        ConfigError: the levels of the RPN differ in channels or in anchors per cell.
    """
    model, rpn, heads = cfg.MODEL, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    stages = [stage_of(feature) for feature in rpn.IN_FEATURES]
    has_fpn = model.BACKBONE.NAME in FPN_BACKBONES
    channels = {model.FPN.OUT_CHANNELS} if has_fpn else {model.RESNETS.RES2_OUT_CHANNELS * 2 ** (s - 2) for s in stages}
    in_channels = common_channels(channels)
    layout = AnchorLayout.from_config(cfg, [2**stage for stage in stages])
    if heads.NAME == SINGLE_STAGE_HEADS:
        roi_heads = ProposalDetections(
            score_thresh=heads.SCORE_THRESH_TEST,
            nms_thresh=heads.NMS_THRESH_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    else:
        roi_heads = build_grouped_roi_heads(cfg, in_channels, stride=2 ** stage_of(heads.IN_FEATURES[0]))
    bg_iou_thresh, fg_iou_thresh = rpn.IOU_THRESHOLDS
    criterion = build_criterion(cfg)
    return GroupSamplingRCNN(
        backbone=build_backbone(cfg),
        rpn=GroupSamplingRPN(
            GroupedAnchorGenerator(layout),
            SoftmaxRPNHead(
                in_channels, layout.anchors_per_cell, steps=layout.steps, face_prior=criterion.sampler.face_prior
            ),
            fg_iou_thresh=fg_iou_thresh,
            bg_iou_thresh=bg_iou_thresh,
            batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
            positive_fraction=rpn.POSITIVE_FRACTION,
            pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
            nms_thresh=rpn.NMS_THRESH,
            criterion=criterion,
            loss_weights={
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
            },
            min_size=model.PROPOSAL_GENERATOR.MIN_SIZE,
            single_stage=heads.NAME == SINGLE_STAGE_HEADS,
        ),
        roi_heads=roi_heads,
        transform=NormalizeAndPad(
            model.PIXEL_MEAN,
            model.PIXEL_STD,
            # As in Detectron2: an FPN pads to its coarsest stride, a plain ResNet not at all.
            2 ** stage_of(model.FPN.IN_FEATURES[-1]) if has_fpn else 1,
        ),
        sub_detectors=cfg.TEST.SUB_DETECTORS,
    )
