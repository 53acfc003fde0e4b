"""From a config to the core's objects: the steps that are equal for both engines."""

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import Tensor

from ..anchors import AnchorGrid
from ..config import ConfigError
from ..criterion import AnchorCriterion
from ..data.catalog import load_dataset, require_dataset
from ..data.loader import build_train_loader, filter_empty
from ..data.records import ImageRecord
from ..data.transforms import TestTransform, TrainTransform
from ..pyramid import ImagePyramid
from ..roi_sampling import ROI_SAMPLERS
from ..samplers import build_anchor_sampler, named_class

logger = logging.getLogger(__name__)

# The ROI heads that pass the proposals of a single-stage detector on as its detections.
SINGLE_STAGE_HEADS = "ProposalDetections"


def merge_config(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> None:
    """Merge a YAML file (with its ``_BASE_``) and command-line overrides into ``cfg``.

    Raises:
        ConfigError: no such file, an unknown key or a value of the wrong type, naming file and key.
    """
    where = config_file
    if config_file and not os.path.isfile(config_file):
        raise ConfigError(f"--config-file {config_file}: no such file")
    try:
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        where = "command line"
        if len(opts) % 2:
            raise ConfigError(f"command line: expected pairs KEY VALUE after the options, got {list(opts)}")
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError) as error:  # yacs: unknown key in a file, on the command line
        key = str(error.args[0] if error.args else error).rsplit(": ", 1)[-1]
        close = difflib.get_close_matches(key, list(_keys(cfg)), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{where}: this engine knows no key {key}.{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not plain YAML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _keys(cfg: CfgNode, prefix: str = "") -> Iterable[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def check_values(cfg: CfgNode, allowed: Mapping[str, Sequence], reason: str) -> None:
    """Refuse every key of ``allowed`` whose value is not among those given for it.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    for key, values in allowed.items():
        value = get_value(cfg, key)
        if value not in values:
            raise ConfigError(f"{key} is {value!r}, but must be {' or '.join(map(repr, values))}: {reason}")


def check_config(cfg: CfgNode) -> None:
    """Refuse what neither engine can run, naming the key."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch {torch.__version__} sees no CUDA device. "
            "Append `MODEL.DEVICE cpu` to the command to run on the CPU."
        )
    if len(cfg.MODEL.RPN.IOU_THRESHOLDS) != 2 or list(cfg.MODEL.RPN.IOU_LABELS) != [0, -1, 1]:
        raise ConfigError(
            "MODEL.RPN.IOU_THRESHOLDS must be [λ2, λ1] and MODEL.RPN.IOU_LABELS [0, -1, 1], got "
            f"{cfg.MODEL.RPN.IOU_THRESHOLDS} and {cfg.MODEL.RPN.IOU_LABELS}"
        )
    build_anchor_sampler(cfg)
    named_class(cfg, "MODEL.GROUP_SAMPLING.ROI_SAMPLER", ROI_SAMPLERS)
    if cfg.MODEL.ANCHOR_GENERATOR.OFFSET != 0.0:
        raise ConfigError(
            f"MODEL.ANCHOR_GENERATOR.OFFSET must be 0, got {cfg.MODEL.ANCHOR_GENERATOR.OFFSET}: with another value the "
            "anchors of sub-sampled cells would not lie on those of the full grid"
        )
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE != "absolute":
        raise ConfigError(f'INPUT.CROP.TYPE must be "absolute" (pixels after the resize), got {cfg.INPUT.CROP.TYPE!r}')
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ConfigError(f'INPUT.RANDOM_FLIP must be "horizontal" or "none", got {cfg.INPUT.RANDOM_FLIP!r}')
    if cfg.INPUT.FORMAT != "RGB":
        raise ConfigError(f'INPUT.FORMAT must be "RGB", as torchvision\'s weights expect, got {cfg.INPUT.FORMAT!r}')
    if cfg.TEST.PYRAMID.SCALES:
        try:
            build_pyramid(cfg)
        except ValueError as error:
            raise ConfigError(f"TEST.PYRAMID: {error}") from None
    if not cfg.DATASETS.TEST and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are both empty")


def check_datasets(cfg: CfgNode, *, eval_only: bool) -> None:
    """Refuse a run that will lack a data set: better now than after the training.

    Raises:
        ConfigError: an unknown name, or a declaration that makes no sense.
        MissingDatasetError: files are missing.
    """
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            try:
                require_dataset(name, cfg.DATASETS)
            except ValueError as error:
                raise ConfigError(f"DATASETS.{key}: {error}") from error


def resolve_seed(cfg: CfgNode, keep: bool, shared_random_seed: Callable[[], int]) -> None:
    """Turn ``SEED`` -1 into a number, in place.

    The draws of the anchors and the order of the images are functions of it, so all processes of a run must have the
    same, and ``config.yaml`` must say which it was.

    Args:
        keep: take the number of the run in ``OUTPUT_DIR``, if there is one.
        shared_random_seed: draws a number that all processes agree on.
    """
    if cfg.SEED >= 0:
        return
    previous = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if keep and os.path.isfile(previous):
        cfg.SEED = cfg.load_yaml_with_base(previous)["SEED"]
    else:
        cfg.SEED = shared_random_seed()


@dataclass(frozen=True)
class AnchorLayout:
    """Which anchors a detector has, level by level, whatever the image size.

    Attributes:
        sizes, aspect_ratios: per level, square roots of the anchor areas in pixels and height / width.
        strides: per level, pixels from one cell to the next.
        steps: empty: level i is the i-th feature. Else all levels are of one feature, and level i has anchors in every
            ``steps[i]``-th row and column of its cells (FPN-finest-stride).
    """

    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, cfg: CfgNode, feature_strides: Sequence[int]) -> "AnchorLayout":
        """
        Args:
            feature_strides: of MODEL.RPN.IN_FEATURES.

        Raises:
            ConfigError: sizes, ratios or strides do not fit the features.
        """
        generator, strides = cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.GROUP_SAMPLING.ANCHOR_STRIDES
        if not strides:
            count = len(feature_strides)
            sizes = _per_level(generator.SIZES, count, "SIZES")
            return cls(sizes, _per_level(generator.ASPECT_RATIOS, count, "ASPECT_RATIOS"), tuple(feature_strides))
        if len(feature_strides) != 1 or len(generator.SIZES) != 1 or len(generator.SIZES[0]) != len(strides):
            raise ConfigError(
                f"MODEL.GROUP_SAMPLING.ANCHOR_STRIDES is {strides}, but needs one feature in MODEL.RPN.IN_FEATURES "
                f"(got {cfg.MODEL.RPN.IN_FEATURES}) and one stride for each size of MODEL.ANCHOR_GENERATOR.SIZES "
                f"{generator.SIZES}"
            )
        if any(stride % feature_strides[0] or stride <= 0 for stride in strides):
            raise ConfigError(
                f"MODEL.GROUP_SAMPLING.ANCHOR_STRIDES is {strides}, but must be multiples of the stride "
                f"{feature_strides[0]} of {cfg.MODEL.RPN.IN_FEATURES}"
            )
        return cls(
            tuple((size,) for size in generator.SIZES[0]),
            _per_level(generator.ASPECT_RATIOS, len(strides), "ASPECT_RATIOS"),
            tuple(strides),
            tuple(stride // feature_strides[0] for stride in strides),
        )

    @property
    def anchors_per_cell(self) -> int:
        """Outputs of the head for a cell.

        Raises:
            ConfigError: the levels, which share the head, differ in it.
        """
        counts = {len(sizes) * len(ratios) for sizes, ratios in zip(self.sizes, self.aspect_ratios)}
        if len(counts) != 1:
            raise ConfigError(
                "The head is shared by all levels of MODEL.RPN.IN_FEATURES, which must agree in anchors per cell "
                f"(found {sorted(counts)})"
            )
        return counts.pop() * max(len(self.steps), 1)

    def level_sizes(self, feature_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Per level (height, width) in cells that have anchors, of features (height, width) in cells."""
        if not self.steps:
            return list(feature_sizes)
        ((height, width),) = feature_sizes
        return [(-(-height // step), -(-width // step)) for step in self.steps]

    def grid(self, feature_sizes: Sequence[tuple[int, int]], cell_anchors: Sequence[Tensor]) -> AnchorGrid:
        """The anchors of features (height, width) in cells; ``cell_anchors`` are each level's (A, 4) base boxes."""
        return AnchorGrid.from_cell_anchors(cell_anchors, self.strides, self.level_sizes(feature_sizes))


def _per_level(values: Sequence[Sequence[float]], num_levels: int, key: str) -> tuple[tuple[float, ...], ...]:
    if len(values) not in (1, num_levels):
        raise ConfigError(
            f"MODEL.ANCHOR_GENERATOR.{key} must have one entry, or one for each of the {num_levels} levels of "
            f"MODEL.RPN.IN_FEATURES, got {values}"
        )
    return tuple(tuple(level) for level in values) * (num_levels // len(values))


def build_criterion(cfg: CfgNode) -> AnchorCriterion:
    rpn = cfg.MODEL.RPN
    return AnchorCriterion(
        build_anchor_sampler(cfg), box_loss_type=rpn.BBOX_REG_LOSS_TYPE, smooth_l1_beta=rpn.SMOOTH_L1_BETA
    )


def build_train_transform(cfg: CfgNode) -> TrainTransform:
    return TrainTransform(
        scales=tuple(cfg.INPUT.SCALE_JITTER),
        crop_size=tuple(cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else (2**31, 2**31),
        flip_prob=0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
        min_visible=cfg.INPUT.MIN_VISIBLE,
    )


def build_test_transform(cfg: CfgNode) -> TestTransform:
    """The resize of the images of a test; with ``TEST.PYRAMID`` they keep their size, since the pyramid resizes."""
    if cfg.TEST.PYRAMID.SCALES:
        return TestTransform(0, 0)
    return TestTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def build_pyramid(cfg: CfgNode) -> ImagePyramid:
    """The image pyramid of ``TEST.PYRAMID``."""
    pyramid = cfg.TEST.PYRAMID
    return ImagePyramid(
        TestTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        pyramid.SCALES,
        flip=pyramid.FLIP,
        max_side=pyramid.MAX_SIDE,
        tile_overlap=pyramid.TILE_OVERLAP,
        nms_thresh=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        vote_thresh=pyramid.VOTE_THRESH,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def load_records(cfg: CfgNode, names: Sequence[str]) -> list[ImageRecord]:
    """The images of several data sets, one after the other."""
    return [record for name in names for record in load_dataset(name, cfg.DATASETS)]


def build_training_loader(cfg: CfgNode, to_example, *, rank: int, world_size: int, start_iter: int):
    """The training loader of both engines; iteration i of a run has the same images whether it was resumed or not."""
    records = load_records(cfg, cfg.DATASETS.TRAIN)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_empty(records)
    if not records:
        raise ConfigError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: no image to train on")
    num_classes = 1 + max((int(record.classes.max()) for record in records if len(record.classes)), default=-1)
    if cfg.MODEL.ROI_HEADS.NAME != SINGLE_STAGE_HEADS and num_classes > cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but DATASETS.TRAIN "
            f"{tuple(cfg.DATASETS.TRAIN)} has boxes of {num_classes} classes"
        )
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of the {world_size} processes"
        )
    return build_train_loader(
        records,
        build_train_transform(cfg),
        to_example,
        seed=cfg.SEED,
        images_per_batch=cfg.SOLVER.IMS_PER_BATCH // world_size,
        rank=rank,
        world_size=world_size,
        start_batch=start_iter,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_bad_share=cfg.DATALOADER.MAX_BAD_SHARE,
    )
