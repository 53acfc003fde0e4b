"""The paper's single-stage detectors as subclasses of torchvision's detection models.

The modules carry torchvision's names: ``backbone.body`` is a torchvision ResNet without classifier, ``backbone.fpn`` a
``FeaturePyramidNetwork``. Parameters have the shapes of the Detectron2 engine's, so weights convert both ways.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from ...anchors import AnchorGrid, cell_anchors
from ...criterion import AnchorCriterion
from ...head import Predict, SoftmaxRPNHead, flatten_predictions, predict_from
from ...inference import Proposals, proposals_to_detections, select_proposals
from ...samplers import build_anchor_sampler, name_counts
from ..build import SINGLE_STAGE_HEADS, AnchorLayout, ConfigError, build_criterion
from .config import FPN_BACKBONE
from .roi_heads import build_grouped_roi_heads

NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _frozen_batch_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    norm.running_var -= norm.eps  # the identity until weights are loaded, as in Detectron2
    return norm


_NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "": None,
    "FrozenBN": _frozen_batch_norm,
    "BN": nn.BatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
}


class ResNetBody(nn.Module):
    """torchvision's ResNet up to a given stage, with the widths and norms that Detectron2's config can ask for.

    Args:
        depth: a key of :data:`NUM_BLOCKS`; below 50 the blocks are ``BasicBlock``, else ``Bottleneck``.
        norm: "FrozenBN", "BN" or "GN" (32 groups).
        stem_channels, res2_channels: outputs of the stem and of stage 2; every further stage doubles them.
        num_groups, width_per_group: of stage 2's 3x3 convolutions in a ``Bottleneck``; the width doubles likewise.
        last_stage: 2 ... 5 (Detectron2's "res2" ... "res5", torchvision's layer1 ... layer4).
        freeze_at: stages up to this one are not trained, 1 being the stem. Their batch norms are frozen as well.
    """

    def __init__(
        self,
        depth: int,
        *,
        norm: str,
        stem_channels: int,
        res2_channels: int,
        num_groups: int,
        width_per_group: int,
        last_stage: int,
        freeze_at: int,
    ):
        super().__init__()
        norms = {s: _NORMS["FrozenBN" if norm == "BN" and s <= freeze_at else norm] for s in range(1, last_stage + 1)}
        self.last_stage = last_stage
        self.conv1 = nn.Conv2d(3, stem_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norms[1](stem_channels)
        in_channels = stem_channels
        for stage in range(2, last_stage + 1):
            out_channels = res2_channels * 2 ** (stage - 2)
            if depth < 50:
                block = partial(BasicBlock, planes=out_channels, norm_layer=norms[stage])
            else:
                block = partial(
                    Bottleneck,
                    planes=out_channels // Bottleneck.expansion,
                    groups=num_groups,
                    # torchvision's inner width is planes * base_width / 64 per group. Detectron2's is width_per_group
                    # in stage 2 and doubles as the planes do, so base_width is the same in all stages.
                    base_width=64 * width_per_group * Bottleneck.expansion // res2_channels,
                    norm_layer=norms[stage],
                )
            stride = 1 if stage == 2 else 2
            shortcut = None
            if in_channels != out_channels:
                conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
                shortcut = nn.Sequential(conv, norms[stage](out_channels))
            blocks = [block(in_channels, stride=stride, downsample=shortcut)]
            blocks += [block(out_channels) for _ in range(NUM_BLOCKS[depth][stage - 2] - 1)]
            self.add_module(f"layer{stage - 1}", nn.Sequential(*blocks))
            in_channels = out_channels

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        layers = [getattr(self, f"layer{stage - 1}") for stage in range(2, last_stage + 1)]
        for module in [nn.ModuleList([self.conv1, self.bn1]), *layers][:freeze_at]:
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to "res2", "res3", ...: (B, C, H / 4, W / 4), (B, 2 C, H / 8, W / 8), ..., rounded up."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        features = {}
        for stage in range(2, self.last_stage + 1):
            x = features[f"res{stage}"] = getattr(self, f"layer{stage - 1}")(x)
        return features


class BilinearFPN(FeaturePyramidNetwork):
    """``FeaturePyramidNetwork`` with a bilinear top-down path (paper, Fig. 3) that computes only the levels in use.

    Blocks are numbered by stage, 0 being P2, also where the finest stage is not the second: one name, one level.

    Args:
        in_channels: stage -> channels of the body's feature, finest first; stages follow each other.
        out_stages: stages whose levels are returned. Finer levels are left out altogether, coarser ones have no output
            convolution: parameters without a gradient would stop distributed training.
        out_channels, norm_layer: as for ``FeaturePyramidNetwork``.
    """

    def __init__(
        self,
        in_channels: dict[int, int],
        out_stages: Sequence[int],
        out_channels: int,
        norm_layer: Callable[[int], nn.Module] | None,
    ):
        stages = [stage for stage in in_channels if stage >= min(out_stages)]
        super().__init__([in_channels[stage] for stage in stages], out_channels, norm_layer=norm_layer)
        self.stages = stages
        blocks = list(zip(stages, self.inner_blocks, self.layer_blocks))
        self.inner_blocks = nn.ModuleDict({str(stage - 2): inner for stage, inner, _ in blocks})
        self.layer_blocks = nn.ModuleDict({str(stage - 2): layer for stage, _, layer in blocks if stage in out_stages})

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """ "res2", ... to the levels in use, "p2", ..., each (B, out_channels, H, W) of its stage's size."""
        results, inner = {}, None
        for stage in reversed(self.stages):
            lateral = self.inner_blocks[str(stage - 2)](x[f"res{stage}"])
            if inner is None:
                inner = lateral
            else:
                inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            if str(stage - 2) in self.layer_blocks:
                results[f"p{stage}"] = self.layer_blocks[str(stage - 2)](inner)
        return results


class Backbone(nn.Module):
    """A ResNet, with or without FPN, that returns the features of the RPN in its order."""

    def __init__(self, body: ResNetBody, fpn: BilinearFPN | None, out_features: Sequence[str]):
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_features = tuple(out_features)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        features = self.body(x)
        if self.fpn is not None:
            features = self.fpn(features)
        return OrderedDict((name, features[name]) for name in self.out_features)


class GroupedAnchorGenerator(AnchorGenerator):
    """``AnchorGenerator`` with Detectron2's base boxes and known strides, that knows which anchors are of one scale."""

    def __init__(self, layout: AnchorLayout):
        super().__init__(layout.sizes, layout.aspect_ratios)
        self.layout = layout

    def generate_anchors(self, scales: Sequence[float], aspect_ratios: Sequence[float], *args, **kwargs) -> Tensor:
        return cell_anchors(scales, aspect_ratios)

    def grid(self, features: Sequence[Tensor]) -> AnchorGrid:
        """The anchors of ``features``, per level (B, C, H, W), as lattices."""
        return self.layout.grid([f.shape[-2:] for f in features], self.cell_anchors)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Per image, the (n, 4) anchors of all levels."""
        boxes = self.grid(feature_maps).boxes(device=feature_maps[0].device)
        return [boxes] * len(image_list.image_sizes)


class GroupSamplingRPN(RegionProposalNetwork):
    """``RegionProposalNetwork`` trained on the same number of anchors of every scale (Sec. 4).

    Matching, sampling and losses are the criterion's; torchvision's matcher and sampler are not used.

    Args:
        criterion: draws the anchors and computes their losses.
        loss_weights: factors of "loss_rpn_cls" and "loss_rpn_loc".
        min_size: proposals with a side not longer than this many pixels are left out.
        single_stage: the proposals are the detections, so none are computed while training.
        kwargs: as for ``RegionProposalNetwork``.

    Attributes:
        iteration: the training iteration, set by the training loop; the draw depends on it.
        sample_counts: of the last training step, "rpn/num_pos@16", "rpn/num_neg@16", ...: 0-dimensional tensors with
            the mean number of anchors drawn per image.
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
        self.iteration = 0
        self.sample_counts: dict[str, Tensor] = {}

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """As ``RegionProposalNetwork.forward``; a target may have ``ignore_boxes``, whose anchors are no negatives.

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
        proposals = select_proposals(
            grid,
            logits.detach(),
            deltas.detach(),
            images.image_sizes,
            pre_nms_topk=self.pre_nms_top_n(),
            post_nms_topk=self.post_nms_top_n(),
            nms_thresh=self.nms_thresh,
            min_size=self.min_size,
        )
        return proposals, losses

    def _losses(self, grid: AnchorGrid, predict: Predict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        gt_boxes = [target["boxes"] for target in targets]
        ignore_boxes = [target.get("ignore_boxes", boxes.new_zeros((0, 4))) for target, boxes in zip(targets, gt_boxes)]
        result = self.criterion(grid, predict, gt_boxes, ignore_boxes, iteration=self.iteration)
        self.sample_counts = name_counts("rpn", grid.scales, result.num_pos, result.num_neg)
        losses = {"loss_rpn_cls": result.classification, "loss_rpn_loc": result.localization}
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}


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

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class GroupSamplingRCNN(GeneralizedRCNN):
    """``GeneralizedRCNN`` of this engine's parts.

    Takes a list of (3, H, W) float RGB images with values in [0, 255] and, while training, a target for each: "boxes"
    (m, 4) XYXY in pixels, optionally "ignore_boxes" (k, 4), and with a second stage "labels" (m,), 0 ... K - 1. Returns
    the losses, "loss_rpn_cls" and "loss_rpn_loc" of the RPN and "loss_cls" and "loss_box_reg" of a second stage, while
    training, else per image what :meth:`ProposalDetections.forward` describes, in pixels of the image given.
    """

    @property
    def sample_counts(self) -> dict[str, Tensor]:
        """``sample_counts`` of the RPN and, if there is one, of the second stage."""
        return {**self.rpn.sample_counts, **getattr(self.roi_heads, "sample_counts", {})}


def build_backbone(cfg: CfgNode) -> Backbone:
    """The backbone of a config that :func:`~group_sampling.engines.tv.config.load_config` has checked."""
    resnets, out_features = cfg.MODEL.RESNETS, cfg.MODEL.RPN.IN_FEATURES
    has_fpn = cfg.MODEL.BACKBONE.NAME == FPN_BACKBONE
    stages = [_stage(feature) for feature in (cfg.MODEL.FPN.IN_FEATURES if has_fpn else out_features)]
    body = ResNetBody(
        resnets.DEPTH,
        norm=resnets.NORM,
        stem_channels=resnets.STEM_OUT_CHANNELS,
        res2_channels=resnets.RES2_OUT_CHANNELS,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        last_stage=max(stages),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    fpn = None
    if has_fpn:
        fpn = BilinearFPN(
            {stage: resnets.RES2_OUT_CHANNELS * 2 ** (stage - 2) for stage in stages},
            [_stage(feature) for feature in out_features],
            cfg.MODEL.FPN.OUT_CHANNELS,
            _NORMS[cfg.MODEL.FPN.NORM],
        )
    return Backbone(body, fpn, out_features)


def build_model(cfg: CfgNode) -> GroupSamplingRCNN:
    """The detector of a config that :func:`~group_sampling.engines.tv.config.load_config` has checked.

    Raises:
        ConfigError: the levels of the RPN differ in channels or in anchors per cell.
    """
    model, rpn, heads = cfg.MODEL, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    stages = [_stage(feature) for feature in rpn.IN_FEATURES]
    has_fpn = model.BACKBONE.NAME == FPN_BACKBONE
    channels = {model.FPN.OUT_CHANNELS} if has_fpn else {model.RESNETS.RES2_OUT_CHANNELS * 2 ** (s - 2) for s in stages}
    layout = AnchorLayout.from_config(cfg, [2**stage for stage in stages])
    if len(channels) != 1:
        raise ConfigError(
            "The head is shared by all levels of MODEL.RPN.IN_FEATURES, which must agree in channels (found "
            f"{sorted(channels)})"
        )
    if heads.NAME == SINGLE_STAGE_HEADS:
        roi_heads = ProposalDetections(
            score_thresh=heads.SCORE_THRESH_TEST,
            nms_thresh=heads.NMS_THRESH_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    else:
        roi_heads = build_grouped_roi_heads(cfg, *channels, stride=2 ** _stage(heads.IN_FEATURES[0]))
    bg_iou_thresh, fg_iou_thresh = rpn.IOU_THRESHOLDS
    return GroupSamplingRCNN(
        backbone=build_backbone(cfg),
        rpn=GroupSamplingRPN(
            GroupedAnchorGenerator(layout),
            SoftmaxRPNHead(
                channels.pop(),
                layout.anchors_per_cell,
                steps=layout.steps,
                face_prior=build_anchor_sampler(cfg).face_prior,
            ),
            fg_iou_thresh=fg_iou_thresh,
            bg_iou_thresh=bg_iou_thresh,
            batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
            positive_fraction=rpn.POSITIVE_FRACTION,
            pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
            nms_thresh=rpn.NMS_THRESH,
            criterion=build_criterion(cfg),
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
            2 ** _stage(model.FPN.IN_FEATURES[-1]) if has_fpn else 1,
        ),
    )


def _stage(feature: str) -> int:
    """ "res2" and "p2" are of stage 2, with stride 4."""
    return int(feature.removeprefix("res").removeprefix("p"))
