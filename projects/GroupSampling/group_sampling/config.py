"""The keys this project adds to Detectron2's config, each with its source in the paper; merging and checking configs.

Keys that Detectron2 already has keep their name and meaning (``MODEL.RPN.IOU_THRESHOLDS`` are λ2 and λ1,
``MODEL.RPN.POSITIVE_FRACTION`` is the 1:3, ...); the paper's values are in ``configs/Base-GroupSampling.yaml``.
"""

import difflib
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from .errors import UserError
from .project import find_config


class ConfigError(UserError, ValueError):
    """The configuration asks for something that cannot be done; the message names the key."""


_BASE = "_BASE_"

# Paper, Sec. 5: training images are resized by 0.25 * n, n = 1 ... 8.
SCALE_JITTER = tuple(0.25 * n for n in range(1, 9))

# The built-in procedural faces, synthetic_faces_train and synthetic_faces_val.
SYNTHETIC_DEFAULTS = {"NUM_TRAIN": 2000, "NUM_VAL": 200, "HEIGHT": 480, "WIDTH": 640, "SEED": 0}


def add_group_sampling_config(cfg: CfgNode) -> None:
    """Add the keys of this project to ``cfg``, Detectron2's or the torchvision engine's; no other key changes."""
    node = type(cfg)  # Detectron2 checks that children are of its own CfgNode class

    gs = cfg.MODEL.GROUP_SAMPLING = node()
    # Which anchors the loss sees. "group": N of every scale (Sec. 4.2). "uniform": MODEL.RPN.BATCH_SIZE_PER_IMAGE over
    # all anchors. "ohem": the MODEL.RPN.BATCH_SIZE_PER_IMAGE with the highest losses. "focal": all, in the focal
    # loss with MODEL.RETINANET.FOCAL_LOSS_ALPHA and _GAMMA, the head starting from RETINANET.PRIOR_PROB (both Table 4).
    gs.SAMPLER = "group"
    # N of every scale, positives and negatives together (Sec. 6.2, Fig. 4: accuracy saturates at 2,048).
    gs.SAMPLES_PER_GROUP = 2048
    # Three readings of Sec. 4.2 (docs/deviations.md); SAMPLER "group" reads the first two. Where a scale has fewer
    # positives than N MODEL.RPN.POSITIVE_FRACTION: "negatives" take their place, or the positives there are count
    # again, in turn ("repeat") or by weight ("weight").
    gs.FILL = "negatives"
    # A loss is one mean over "all" that was drawn, or the mean of the means within each scale ("group").
    gs.LOSS_MEAN = "all"
    # The regression losses are divided by the number of "positives", or of all that was "drawn" (Faster R-CNN).
    gs.BBOX_REG_LOSS_MEAN = "positives"
    # Which proposals the second stage sees, with MODEL.ROI_HEADS.NAME GroupedROIHeads (Table 5). "group": N of every
    # scale, a proposal being of the anchor scale nearest to its size. "uniform": ROI_HEADS.BATCH_SIZE_PER_IMAGE of all.
    gs.ROI_SAMPLER = "uniform"
    gs.ROI_SAMPLES_PER_GROUP = 128  # of four scales: the 512 of ROI_HEADS.BATCH_SIZE_PER_IMAGE
    # Empty, or for FPN-finest-stride (Table 1): a stride in pixels for each of MODEL.ANCHOR_GENERATOR.SIZES[0], whose
    # anchors then sit on that sub-sampling of the single feature in MODEL.RPN.IN_FEATURES.
    gs.ANCHOR_STRIDES = ()
    # Which anchors the second matching pass promotes for a face without a positive (Sec. 4.1): "all", "best" or "none".
    gs.SECOND_PASS = "all"
    # A negative anchor whose area lies in one ignore region (WIDER FACE "invalid") by this share is not sampled.
    gs.IGNORE_IOA = 0.5

    # With MODEL.BACKBONE.NAME build_torchvision_fpn_backbone, on either engine: what is below the FPN, a classifier of
    # torchvision.models that has features at strides 4 to 32 (mobilenet_v3_large, efficientnet_b0, convnext_tiny, ...).
    # MODEL.FPN.IN_FEATURES calls them "res2" ... "res5"; FREEZE_AT counts their stages. Of MODEL.RESNETS only NORM
    # matters: FrozenBN or BN.
    cfg.MODEL.BACKBONE.TORCHVISION_NAME = "resnet50"
    # With MODEL.BACKBONE.NAME build_group_sampling_fpn_backbone, on Detectron2's engine: what is below the FPN, any
    # name of its BACKBONE_REGISTRY, to which engines/d2/bottom_up.py adds RegNet, Swin and ViT.
    cfg.MODEL.BACKBONE.BOTTOM_UP = "build_group_sampling_resnet_backbone"

    # How a training computes the network; results are equal up to rounding. Channels last in memory: for convolutions
    # on tensor cores. RECOMPUTE: the blocks of a ResNet keep no activations, and run again in the backward pass.
    # COMPILE: the backbone with its FPN, by torch.compile; sizes of images that vary are compiled for once more.
    cfg.MODEL.CHANNELS_LAST = False
    cfg.MODEL.BACKBONE.RECOMPUTE = False
    cfg.MODEL.BACKBONE.COMPILE = False

    # Factors of the random resize; applied together with INPUT.CROP (TYPE "absolute") and INPUT.RANDOM_FLIP.
    cfg.INPUT.SCALE_JITTER = SCALE_JITTER
    # A JPEG that is resized by 1/2 or less is decoded at 1/2, 1/4 or 1/8 of its size: faster, pixels differ a little.
    cfg.INPUT.REDUCE_JPEG = False
    # A face of which less than this share of its area is left after the crop is dropped.
    cfg.INPUT.MIN_VISIBLE = 0.5

    # With SOLVER.AMP.ENABLED the network is trained in mixed precision: "float16" with a scaled loss on a GPU (what
    # Detectron2 does), or "bfloat16", which needs no scaling, on a GPU or a CPU. Weights and losses stay float32.
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Each step sees its SOLVER.IMS_PER_BATCH images in this many parts, one after the other, and trains on the mean of
    # their losses, for a fraction of the memory: what this many times as many GPUs would do. Iterations, images and
    # draws are those of one part.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Exponential moving average of the weights, moved after each step: average = DECAY average + (1 - DECAY) weights.
    # Evaluations use it, and it is the "model" of checkpoints, which have the weights in training under "ema".
    ema = cfg.SOLVER.EMA = node()
    ema.ENABLED = False
    ema.DECAY = 0.999

    # Data sets declared by a line of the config. Annotations and images are relative to $DETECTRON2_DATASETS. A list
    # (one image path a line, the set is restricted to them) belongs to the config: relative to the working directory.
    cfg.DATASETS.COCO_FORMAT = ()  # ((name, annotation json, image folder), ...)
    cfg.DATASETS.WIDER_FORMAT = ()  # ((name, annotation txt, image folder[, list]), ...)
    cfg.DATASETS.SYNTHETIC = node(SYNTHETIC_DEFAULTS)
    # Boxes are of the upright picture, turned by its EXIF orientation. False: they are of the pixels as stored, and
    # pictures are not turned.
    cfg.DATASETS.APPLY_EXIF = True
    # Before the first step the headers of all image files of TRAIN and TEST are read, and remembered in OUTPUT_DIR.
    # False: an image is first looked at when it is needed.
    cfg.DATASETS.CHECK_IMAGES = True

    # A run stops when more than this share of the images cannot be read: of those of a data set before the first step
    # and in an evaluation, of those drawn in a training.
    cfg.DATALOADER.MAX_BAD_SHARE = 0.1

    # Folder with wider_face_val.mat and wider_{easy,medium,hard}_val.mat: adds Easy, Medium and Hard to the evaluation.
    # "auto": for wider_face_val, ground_truth or eval_tools/ground_truth in WIDER_FACE, if they are there. "": none.
    cfg.TEST.WIDER_GROUND_TRUTH = "auto"

    # Images of one size that an evaluation looks at together; with a pyramid, its tiles are looked at one by one.
    cfg.TEST.IMS_PER_BATCH = 1

    # What the network computes in while it is evaluated: "float32", "float16" (GPUs) or "bfloat16". Weights, scores and
    # boxes stay float32.
    cfg.TEST.PRECISION = "float32"

    # A detector returns, beside its detections, those of each sub-detector: of the anchors of one scale alone, with
    # their own top-k, NMS, merge of the pyramid and limit (Sec. 6.1). An evaluation then has AP@16, AP@32, ...
    cfg.TEST.SUB_DETECTORS = False

    # With every evaluation of a training, also the losses on images of DATASETS.TEST: "validation/total_loss", ... They
    # are augmented as those of the training are, by draws that are the same in every evaluation of every run.
    cfg.TEST.VALIDATION_LOSS = False
    cfg.TEST.VALIDATION_IMAGES = 0  # so many, chosen at random, the same ones every time; 0: all

    # Keeps model_best.pth, the checkpoint of the evaluation (TEST.EVAL_PERIOD) with the best METRIC, a name of
    # metrics.json such as "wider_face/AP_all" or "validation/total_loss". MODE: "max" or "min" is best.
    best = cfg.TEST.BEST_CHECKPOINTER = node()
    best.ENABLED = False
    best.METRIC = "wider_face/AP_all"
    best.MODE = "max"

    # Besides metrics.json and TensorBoard: log to this project of Weights & Biases; "": do not. The package wandb takes
    # the rest (entity, name of the run, offline) from its own WANDB_... variables.
    cfg.LOGGING = node()
    cfg.LOGGING.WANDB = ""
    # Images of every test set whose detections an evaluation draws, for TensorBoard, W&B and the report.
    cfg.LOGGING.EXAMPLES = 4

    # Multi-scale test on an image pyramid (pyramid.py). Factors of the size that INPUT.MIN_SIZE_TEST and
    # INPUT.MAX_SIZE_TEST give; (): a single scale. Merged by NMS with MODEL.ROI_HEADS.NMS_THRESH_TEST.
    pyramid = cfg.TEST.PYRAMID = node()
    pyramid.SCALES = ()
    pyramid.FLIP = False  # every scale also mirrored
    # The paper's test has sides of at most 3,000 pixels. Larger scaled images are cut into tiles that overlap by
    # TILE_OVERLAP pixels: a face smaller than the overlap is found whole.
    pyramid.MAX_SIDE = 3000
    pyramid.TILE_OVERLAP = 256
    # Box voting over boxes of this IoU or more; 0: none. Not in the paper.
    pyramid.VOTE_THRESH = 0.0


def merge_config(cfg: CfgNode, config_file: str, opts: Sequence[str], *, saved: str = "") -> None:
    """Merge a YAML file (with its ``_BASE_``) and command-line overrides into ``cfg``.

    Args:
        config_file: a path, or the name of one of the project's, see :func:`~group_sampling.project.find_config`.
        saved: YAML text of :func:`dump_config`, merged before both; "": none.

    Raises:
        ConfigError: no such file, an unknown key or a value of the wrong type, naming file and key.
    """
    config_file = find_config(config_file)
    if config_file and not os.path.isfile(config_file):
        raise ConfigError(f"--config-file {config_file}: no such file, here or among the project's configs")
    if config_file:
        _check_bases(config_file, (config_file,))
    defaults = cfg.clone()
    if len(opts) % 2:
        raise ConfigError(f"command line: expected pairs KEY VALUE, got {list(opts)}")
    where = "the config in the checkpoint"
    try:
        if saved:
            content = yaml.safe_load(saved)
            if not isinstance(content, dict):
                raise ValueError(f"expected keys and values, got {saved[:80]!r}")
            cfg.merge_from_other_cfg(type(cfg)(content))
        where = config_file
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        where = "command line"
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError) as error:  # yacs: unknown key in a file, on the command line
        key = str(error.args[0] if error.args else error).rsplit(": ", 1)[-1]
        close = difflib.get_close_matches(key, list(_keys(cfg)), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{where}: this engine has no key {key}.{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not plain YAML: {_one_line(error)}") from error
    except (ValueError, TypeError, AttributeError) as error:  # yacs, of values that cannot take the default's place
        raise ConfigError(f"{where}: {_one_line(error)}") from error
    _check_members(cfg, defaults)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_bases(file: str, chain: tuple[str, ...]) -> None:
    """Check a config and, along ``_BASE_``, those that it builds on.

    Args:
        chain: the files from the one that the user named to ``file``.

    Raises:
        ConfigError: with the chain, if one is missing, no file, no YAML or its own base.
    """
    where = " -> ".join(chain)
    try:
        with open(file, "rb") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not plain YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected keys and values, got {content!r:.80}")
    try:
        odd = next(iter(_odd_keys(content)), None)
    except RecursionError as error:
        raise ConfigError(f"{where}: expected values that end, got one that contains itself") from error
    if odd is not None:
        raise ConfigError(f"{where}: expected names as keys, got {odd!r}")
    bases = content.get(_BASE, [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(f"{where}: {_BASE}: expected the path of a config, or a list of them, got {content[_BASE]!r}")
    for base in bases:
        # As fvcore has it.
        path = os.path.join(os.path.dirname(file), os.path.expanduser(base))
        if any(os.path.realpath(path) == os.path.realpath(link) for link in chain):
            raise ConfigError(f"{where} -> {path}: expected a {_BASE} that ends, got a circle")
        _check_bases(path, (*chain, path))


def _odd_keys(content: Any) -> Iterable[Any]:
    if isinstance(content, dict):
        for key, value in content.items():
            if not isinstance(key, str):
                yield key
            yield from _odd_keys(value)


def _check_members(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> None:
    """Refuse a list with members of another type than the default's, which yacs lets pass.

    Raises:
        ConfigError: naming the key.
    """
    for name, value in cfg.items():
        default = defaults.get(name)
        if isinstance(value, CfgNode):
            _check_members(value, default if isinstance(default, CfgNode) else CfgNode(), f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and isinstance(default, list | tuple):
            kinds = {_kind(member) for member in leaves(default)} or _ANY_KIND
            if not {_kind(member) for member in leaves(value)} <= kinds:
                raise ConfigError(f"{prefix}{name}: expected {' and '.join(sorted(kinds))}, got {value!r}")


_ANY_KIND = {"numbers", "values of type str", "values of type bool"}  # where the default is empty


def _kind(member: Any) -> str:
    is_number = isinstance(member, int | float) and not isinstance(member, bool)
    return "numbers" if is_number else f"values of type {type(member).__name__}"


def leaves(value: Any) -> Iterable[Any]:
    """The members of nested lists and tuples, or the value itself."""
    if isinstance(value, list | tuple):
        for member in value:
            yield from leaves(member)
    else:
        yield value


def dump_config(cfg: CfgNode, defaults: CfgNode) -> str:
    """YAML of a config for a checkpoint, which either engine can merge into its own defaults.

    Written are the keys of this project, and of Detectron2's, which both engines share or one of them lacks, those that
    differ from ``defaults``. ``OUTPUT_DIR`` is left out: it names a folder of the machine that trained, and checkpoints
    of the same training are the same bytes wherever it ran.

    Args:
        defaults: Detectron2's, the keys of the project among them or not.
    """
    project = type(cfg)(new_allowed=True)
    for name in ("MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST"):
        project[name] = type(cfg)()
    project.MODEL.BACKBONE, project.SOLVER.AMP = type(cfg)(), type(cfg)()
    add_group_sampling_config(project)
    own = set(_keys(project))

    def differing(cfg: CfgNode, defaults: CfgNode, prefix: str) -> dict[str, Any]:
        kept = {}
        for name, value in cfg.items():
            key, default = prefix + name, defaults.get(name)
            if key == "OUTPUT_DIR":
                continue
            if isinstance(value, CfgNode):
                children = differing(value, default if isinstance(default, CfgNode) else type(cfg)(), f"{key}.")
                if children:
                    kept[name] = children
            elif key in own or name not in defaults or value != default:
                kept[name] = value
        return kept

    return yaml.safe_dump(differing(cfg, defaults, ""))


def _keys(cfg: CfgNode, prefix: str = "") -> Iterable[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    return operator.attrgetter(key)(cfg)


def sample_count(cfg: CfgNode, key: str) -> int:
    """The number of samples at ``key``.

    Raises:
        ConfigError: it is not positive.
    """
    count = get_value(cfg, key)
    if count < 1:
        raise ConfigError(f"{key}: expected at least 1, got {count}")
    return count


def anchor_scales(cfg: CfgNode) -> tuple[float, ...]:
    """The anchor scales of a detector in pixels, ascending, each once."""
    return tuple(sorted({float(size) for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in sizes}))


def check_values(cfg: CfgNode, allowed: Mapping[str, Sequence], reason: str) -> None:
    """Refuse every key of ``allowed`` whose value is not among those given for it.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    for key, values in allowed.items():
        value = get_value(cfg, key)
        if value not in values:
            raise ConfigError(f"{key}: expected {' or '.join(map(repr, values))}, got {value!r}: {reason}")


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value, ("A.B", 1), of every leaf of nested mappings."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten_config(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_keys(before: str, now: str) -> list[tuple[str, Any, Any]]:
    """Keys of a training that two configs of :func:`dump_config` state differently, with both values.

    Those of tests, logs and the initial weights, which do not concern a training that continues, are left out.
    """

    try:
        old, new = (dict(flatten_config(yaml.safe_load(text) or {})) for text in (before, now))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"the config in the checkpoint: not plain YAML: {_one_line(error)}") from error
    if not old or not new:
        return []
    keys = (key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    ignored = ("TEST.", "LOGGING.", "DATASETS.TEST", "DATASETS.CHECK_IMAGES", "MODEL.WEIGHTS")
    return [
        (key, old.get(key, "the default"), new.get(key, "the default")) for key in keys if not key.startswith(ignored)
    ]
