"""Values of a configuration that neither engine can use."""

import torch
from fvcore.common.config import CfgNode

from .config import ConfigError, check_values, get_value, leaves

# Lowest and highest value, both included; for a list, of its members.
_INF = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "SEED": (-1, 2**31 - 1),
    "SOLVER.MAX_ITER": (1, _INF),
    "SOLVER.IMS_PER_BATCH": (1, _INF),
    "SOLVER.ACCUMULATE_STEPS": (1, _INF),
    "SOLVER.EMA.DECAY": (0, 1),
    "SOLVER.BASE_LR": (0, 1e6),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WEIGHT_DECAY": (0, 1e6),
    "SOLVER.WEIGHT_DECAY_NORM": (0, 1e6),
    "SOLVER.GAMMA": (0, 1e6),
    "SOLVER.STEPS": (1, _INF),
    "SOLVER.WARMUP_FACTOR": (0, 1e6),
    "SOLVER.WARMUP_ITERS": (0, _INF),
    "SOLVER.CHECKPOINT_PERIOD": (1, _INF),
    "DATALOADER.NUM_WORKERS": (0, 256),
    "DATALOADER.MAX_BAD_SHARE": (0, 1),
    "INPUT.SCALE_JITTER": (0.01, 100),
    "INPUT.MIN_VISIBLE": (0, 1),
    "INPUT.MIN_SIZE_TEST": (0, 2**16),
    "INPUT.MAX_SIZE_TEST": (0, 2**16),
    "MODEL.ANCHOR_GENERATOR.SIZES": (1e-3, 1e6),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (1e-3, 1e3),
    "MODEL.GROUP_SAMPLING.ANCHOR_STRIDES": (1, _INF),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (1, _INF),
    "MODEL.RPN.POSITIVE_FRACTION": (0, 1),
    "MODEL.RPN.NMS_THRESH": (0, 1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": (1, _INF),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": (1, _INF),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": (1, _INF),
    "MODEL.RPN.POST_NMS_TOPK_TEST": (1, _INF),
    "MODEL.ROI_HEADS.NUM_CLASSES": (1, _INF),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": (0, 1),
    "TEST.EVAL_PERIOD": (0, _INF),
    "TEST.IMS_PER_BATCH": (1, _INF),
    "TEST.DETECTIONS_PER_IMAGE": (1, _INF),
    "TEST.PYRAMID.SCALES": (0.01, 100),
    "TEST.VALIDATION_IMAGES": (0, _INF),
    "LOGGING.EXAMPLES": (0, 64),
}


_NAMES = ("DATASETS.TRAIN", "DATASETS.TEST", "MODEL.FPN.IN_FEATURES", "MODEL.RPN.IN_FEATURES")


def _check_ranges(cfg: CfgNode) -> None:
    for key, (low, high) in _RANGES.items():
        value = get_value(cfg, key)
        for number in leaves(value):
            if not isinstance(number, int | float) or isinstance(number, bool) or not low <= number <= high:
                bounds = f"at least {low:g}" if high == _INF else f"from {low:.10g} to {high:.10g}"
                what = f"numbers {bounds}" if isinstance(value, list | tuple) else f"a number {bounds}"
                raise ConfigError(f"{key}: expected {what}, got {value!r}")
    for key in _NAMES:
        if not all(isinstance(name, str) for name in get_value(cfg, key)):
            raise ConfigError(f"{key}: expected names, got {get_value(cfg, key)!r}")
    steps = list(cfg.SOLVER.STEPS)
    if steps != sorted(set(steps)):
        raise ConfigError(f"SOLVER.STEPS: expected ascending iterations, each once, got {cfg.SOLVER.STEPS!r}")
    if not cfg.INPUT.SCALE_JITTER:
        raise ConfigError("INPUT.SCALE_JITTER: expected at least one factor, (1.0,) for none, got ()")
    size = tuple(cfg.INPUT.CROP.SIZE)
    if cfg.INPUT.CROP.ENABLED and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise ConfigError(f"INPUT.CROP.SIZE: expected height and width in pixels, got {cfg.INPUT.CROP.SIZE!r}")


def check_common_values(cfg: CfgNode) -> None:
    """Refuse values that neither engine can use.

    Raises:
        ConfigError: naming the key.
    """
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE: expected cpu, cuda or cuda:<index>, got {cfg.MODEL.DEVICE!r}") from error
    if cfg.INPUT.CROP.ENABLED:
        check_values(cfg, {"INPUT.CROP.TYPE": ("absolute",)}, "the crop is given in pixels after the resize")
    _check_ranges(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch {torch.__version__} sees no CUDA device. "
            "Append `MODEL.DEVICE cpu` to the command to run on the CPU."
        )
    check_values(cfg, {"SOLVER.AMP.PRECISION": ("float16", "bfloat16")}, "what the network is trained in")
    check_values(cfg, {"TEST.PRECISION": ("float32", "float16", "bfloat16")}, "what the network is evaluated in")
    if cfg.MODEL.BACKBONE.COMPILE and cfg.MODEL.BACKBONE.RECOMPUTE:
        raise ConfigError(
            "MODEL.BACKBONE.COMPILE and RECOMPUTE: expected one of them, got both; what is compiled is recomputed as "
            "the compiler decides"
        )
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    check_values(
        cfg,
        {"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model")},
        "of each element, of each parameter's norm, or of the norm of all parameters together",
    )
    if not clipping.CLIP_VALUE > 0 or not clipping.NORM_TYPE > 0:
        raise ConfigError(
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE and NORM_TYPE: expected positive numbers, got "
            f"{clipping.CLIP_VALUE} and {clipping.NORM_TYPE}"
        )
    if len(cfg.MODEL.RPN.IOU_THRESHOLDS) != 2 or list(cfg.MODEL.RPN.IOU_LABELS) != [0, -1, 1]:
        raise ConfigError(
            "MODEL.RPN.IOU_THRESHOLDS and MODEL.RPN.IOU_LABELS: expected [λ2, λ1] and [0, -1, 1], got "
            f"{cfg.MODEL.RPN.IOU_THRESHOLDS} and {cfg.MODEL.RPN.IOU_LABELS}"
        )
    check_values(
        cfg,
        {"MODEL.ANCHOR_GENERATOR.OFFSET": (0.0,)},
        "with another offset the anchors of sub-sampled cells would not coincide with those of the full grid",
    )
    check_values(cfg, {"INPUT.RANDOM_FLIP": ("horizontal", "none")}, "faces are not flipped vertically")
    check_values(cfg, {"INPUT.FORMAT": ("RGB",)}, "images are read as torchvision's weights expect them")
    check_values(cfg, {"TEST.BEST_CHECKPOINTER.MODE": ("max", "min")}, "the highest or the lowest value is the best")
    if not cfg.DATASETS.TEST and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are both empty")
