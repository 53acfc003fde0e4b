"""The part of Detectron2's config that this engine supports: Detectron2's names and defaults, fvcore's ``CfgNode``."""

import ast
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from ...config import ConfigError, add_group_sampling_config, check_values, merge_config
from ...losses import BOX_LOSSES
from ..build import GROUPED_HEADS, SINGLE_STAGE_HEADS, check_config
from .extractor import TORCHVISION_BACKBONE, check_torchvision_backbone

FPN_BACKBONES = ("build_group_sampling_fpn_backbone", TORCHVISION_BACKBONE)
RESNET_BACKBONES = ("build_group_sampling_resnet_backbone", "build_resnet_backbone")

# Detectron2's defaults, written as configs are: a string in parentheses is a tuple.
_DEFAULTS = """
VERSION: 2
MODEL:
  DEVICE: cuda
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: ""
  PIXEL_MEAN: [103.530, 116.280, 123.675]
  PIXEL_STD: [1.0, 1.0, 1.0]
  MASK_ON: False
  KEYPOINT_ON: False
  LOAD_PROPOSALS: False
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 2}
  RESNETS: {DEPTH: 50, OUT_FEATURES: [res4], NORM: FrozenBN, STEM_OUT_CHANNELS: 64, RES2_OUT_CHANNELS: 256,
            NUM_GROUPS: 1, WIDTH_PER_GROUP: 64, STRIDE_IN_1X1: True}
  FPN: {IN_FEATURES: [], OUT_CHANNELS: 256, NORM: "", FUSE_TYPE: sum}
  PROPOSAL_GENERATOR: {NAME: RPN, MIN_SIZE: 0}
  ANCHOR_GENERATOR: {NAME: DefaultAnchorGenerator, SIZES: [[32, 64, 128, 256, 512]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]],
                     OFFSET: 0.0}
  RPN: {HEAD_NAME: StandardRPNHead, IN_FEATURES: [res4], CONV_DIMS: [-1], BOUNDARY_THRESH: -1,
        IOU_THRESHOLDS: [0.3, 0.7], IOU_LABELS: [0, -1, 1], BATCH_SIZE_PER_IMAGE: 256, POSITIVE_FRACTION: 0.5,
        BBOX_REG_LOSS_TYPE: smooth_l1, BBOX_REG_LOSS_WEIGHT: 1.0, BBOX_REG_WEIGHTS: "(1.0, 1.0, 1.0, 1.0)",
        SMOOTH_L1_BETA: 0.0, LOSS_WEIGHT: 1.0, NMS_THRESH: 0.7, PRE_NMS_TOPK_TRAIN: 12000, PRE_NMS_TOPK_TEST: 6000,
        POST_NMS_TOPK_TRAIN: 2000, POST_NMS_TOPK_TEST: 1000}
  RETINANET: {FOCAL_LOSS_ALPHA: 0.25, FOCAL_LOSS_GAMMA: 2.0, PRIOR_PROB: 0.01}
  ROI_HEADS: {NAME: Res5ROIHeads, NUM_CLASSES: 80, IN_FEATURES: [res4], IOU_THRESHOLDS: [0.5], IOU_LABELS: [0, 1],
              BATCH_SIZE_PER_IMAGE: 512, POSITIVE_FRACTION: 0.25, PROPOSAL_APPEND_GT: True, SCORE_THRESH_TEST: 0.05,
              NMS_THRESH_TEST: 0.5}
  ROI_BOX_HEAD: {NAME: "", BBOX_REG_LOSS_TYPE: smooth_l1, BBOX_REG_LOSS_WEIGHT: 1.0, SMOOTH_L1_BETA: 0.0,
                 BBOX_REG_WEIGHTS: "(10.0, 10.0, 5.0, 5.0)", POOLER_TYPE: ROIAlignV2, POOLER_RESOLUTION: 14,
                 POOLER_SAMPLING_RATIO: 0, NUM_FC: 0, FC_DIM: 1024, NUM_CONV: 0, CLS_AGNOSTIC_BBOX_REG: False,
                 TRAIN_ON_PRED_BOXES: False, USE_FED_LOSS: False, USE_SIGMOID_CE: False}
INPUT: {MIN_SIZE_TEST: 800, MAX_SIZE_TEST: 1333, RANDOM_FLIP: horizontal, FORMAT: BGR,
        CROP: {ENABLED: False, TYPE: relative_range, SIZE: [0.9, 0.9]}}
DATASETS: {TRAIN: (), TEST: ()}
DATALOADER: {NUM_WORKERS: 4, FILTER_EMPTY_ANNOTATIONS: True}
SOLVER: {LR_SCHEDULER_NAME: WarmupMultiStepLR, MAX_ITER: 40000, BASE_LR: 0.001, MOMENTUM: 0.9, NESTEROV: False,
         WEIGHT_DECAY: 0.0001, WEIGHT_DECAY_NORM: 0.0, GAMMA: 0.1, STEPS: "(30000,)", WARMUP_FACTOR: 0.001,
         WARMUP_ITERS: 1000, WARMUP_METHOD: linear, CHECKPOINT_PERIOD: 5000, IMS_PER_BATCH: 16,
         AMP: {ENABLED: False}, CLIP_GRADIENTS: {ENABLED: False, CLIP_TYPE: value, CLIP_VALUE: 1.0, NORM_TYPE: 2.0}}
TEST: {EVAL_PERIOD: 0, DETECTIONS_PER_IMAGE: 100}
OUTPUT_DIR: ./output
SEED: -1
CUDNN_BENCHMARK: False
VIS_PERIOD: 0
"""

# Keys of which this engine supports only some values.
_ALLOWED = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GroupSamplingRCNN",),
    "MODEL.MASK_ON": (False,),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.BACKBONE.NAME": (*FPN_BACKBONES, *RESNET_BACKBONES),
    "MODEL.BACKBONE.BOTTOM_UP": ("build_group_sampling_resnet_backbone",),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "GN"),
    "MODEL.RESNETS.STRIDE_IN_1X1": (False,),
    "MODEL.FPN.NORM": ("", "GN"),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("GroupSamplingRPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("GroupedAnchorGenerator",),
    "MODEL.RPN.HEAD_NAME": ("SoftmaxRPNHead",),
    "MODEL.RPN.BOUNDARY_THRESH": (-1,),
    "MODEL.RPN.BBOX_REG_WEIGHTS": ((1.0, 1.0, 1.0, 1.0),),
    "MODEL.RPN.CONV_DIMS": ([-1],),
    "MODEL.ROI_HEADS.NAME": (SINGLE_STAGE_HEADS, GROUPED_HEADS),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR",),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "VIS_PERIOD": (0,),
}

# The same by MODEL.ROI_HEADS.NAME.
_ALLOWED_HEADS = {
    SINGLE_STAGE_HEADS: {"MODEL.ROI_HEADS.NUM_CLASSES": (1,)},
    GROUPED_HEADS: {
        "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2",),
        "MODEL.ROI_BOX_HEAD.NUM_FC": (2,),  # torchvision's TwoMLPHead
        "MODEL.ROI_BOX_HEAD.NUM_CONV": (0,),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (False,),
        "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    },
}


def get_cfg() -> CfgNode:
    """Detectron2's defaults of the keys that this engine has, and the keys of this project."""
    cfg = CfgNode.load_cfg(_DEFAULTS)
    _parse_tuples(cfg)
    add_group_sampling_config(cfg)
    return cfg


def _parse_tuples(cfg: CfgNode) -> None:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            _parse_tuples(value)
        elif isinstance(value, str) and value.startswith("("):
            cfg[key] = ast.literal_eval(value)


def load_config(config_file: str, opts: Sequence[str] = (), *, saved: str = "") -> CfgNode:
    """The checked config of a run.

    Args:
        config_file: a YAML file, written for either engine; "" for none.
        opts: KEY VALUE pairs of the command line.
        saved: the config of a checkpoint, of either engine, on which both build.

    Raises:
        ConfigError: an unknown key, a value that this engine does not support, or a config that no engine can run.
    """
    cfg = get_cfg()
    try:
        merge_config(cfg, config_file, opts, saved=saved)
    except ConfigError as error:
        if isinstance(error.__cause__, (KeyError, AssertionError)):  # an unknown key
            raise ConfigError(f"{error} If the key is Detectron2's, --engine detectron2 has it.") from error
        raise
    reason = "the torchvision engine supports nothing else; --engine detectron2 may"
    check_values(cfg, _ALLOWED, reason)
    check_values(cfg, _ALLOWED_HEADS[cfg.MODEL.ROI_HEADS.NAME], f"with {cfg.MODEL.ROI_HEADS.NAME}, {reason}")
    check_config(cfg)
    if cfg.MODEL.BACKBONE.NAME == TORCHVISION_BACKBONE:
        check_torchvision_backbone(cfg)
        _check_levels(cfg.MODEL)
    else:
        _check_resnet(cfg)
    _check_roi_features(cfg.MODEL)
    return cfg


def _check_resnet(cfg: CfgNode) -> None:
    model = cfg.MODEL
    resnets, fpn, rpn = model.RESNETS, model.FPN, model.RPN
    stages = [f"res{stage}" for stage in range(2, 6)]
    has_fpn = model.BACKBONE.NAME in FPN_BACKBONES
    key, used = ("MODEL.FPN.IN_FEATURES", fpn.IN_FEATURES) if has_fpn else ("MODEL.RPN.IN_FEATURES", rpn.IN_FEATURES)
    available = [stage for stage in stages if stage in resnets.OUT_FEATURES]
    if not used or not set(used) <= set(available):
        raise ConfigError(f"{key}: expected some of MODEL.RESNETS.OUT_FEATURES {available}, got {used}")
    if has_fpn:
        if list(used) != stages[stages.index(used[0]) :][: len(used)]:
            raise ConfigError(f"{key}: expected consecutive stages, finest first, got {used}")
        _check_levels(model)
    if resnets.DEPTH < 50:
        check_values(cfg, {"MODEL.RESNETS.NUM_GROUPS": (1,)}, f"ResNet-{resnets.DEPTH} has no groups")
    elif resnets.RES2_OUT_CHANNELS % 4 or (256 * resnets.WIDTH_PER_GROUP) % resnets.RES2_OUT_CHANNELS:
        raise ConfigError(
            "MODEL.RESNETS.RES2_OUT_CHANNELS: torchvision's Bottleneck expects a multiple of 4 that divides "
            f"256 * MODEL.RESNETS.WIDTH_PER_GROUP = {256 * resnets.WIDTH_PER_GROUP}, got {resnets.RES2_OUT_CHANNELS}"
        )


def _check_levels(model: CfgNode) -> None:
    levels, used = [f"p{feature[3:]}" for feature in model.FPN.IN_FEATURES], model.RPN.IN_FEATURES
    if not used or not set(used) <= set(levels):
        raise ConfigError(f"MODEL.RPN.IN_FEATURES: expected some of the FPN's levels {levels}, got {used}")


def _check_roi_features(model: CfgNode) -> None:
    features = model.ROI_HEADS.IN_FEATURES
    if model.ROI_HEADS.NAME == GROUPED_HEADS and (len(features) != 1 or features[0] not in model.RPN.IN_FEATURES):
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES: expected one of MODEL.RPN.IN_FEATURES {model.RPN.IN_FEATURES}, got "
            f"{features}: the torchvision engine pools from a single feature; --engine detectron2 takes several"
        )
