"""What both engines make of a config, and what both of them log."""

import argparse
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from fvcore.common.config import CfgNode
from torch import Tensor

from .. import distributed
from ..anchors import AnchorGrid
from ..checkpoint import Description, saved_config
from ..config import ConfigError, check_values, dump_config, get_value
from ..config_checks import check_common_values
from ..criterion import BOX_LOSS_MEANS, AnchorCriterion
from ..data.catalog import Catalog, Source
from ..data.loader import ToExample, TrainLoader, build_train_loader, filter_empty
from ..data.records import ImageRecord
from ..data.transforms import TestTransform, TrainTransform
from ..detections import Detections
from ..losses import BOX_LOSSES
from ..pyramid import ImagePyramid
from ..roi_sampling import build_proposal_sampler
from ..samplers import FILLS, LOSS_MEANS, build_anchor_sampler

# Values of MODEL.ROI_HEADS.NAME: the heads that return the proposals of a single-stage detector as its detections, and
# those of Grouped Fast R-CNN (Table 5).
SINGLE_STAGE_HEADS = "ProposalDetections"
GROUPED_HEADS = "GroupedROIHeads"

# Images (h, w, 3) uint8 RGB, of one size, to what a detector finds in each, in its pixels and as tensors.
Detect = Callable[[list[np.ndarray]], list[Detections]]

LOG_PERIOD = 20  # iterations


def check_config(cfg: CfgNode) -> None:
    """Refuse what neither engine can run.

    Raises:
        ConfigError: naming the key.
    """
    check_common_values(cfg)
    build_criterion(cfg)
    if cfg.MODEL.ROI_HEADS.NAME == GROUPED_HEADS:
        build_proposal_sampler(cfg)
    if cfg.TEST.PYRAMID.SCALES:
        build_pyramid(cfg)


def training_precision(cfg: CfgNode) -> torch.dtype | None:
    """What autocast computes the network in while training, of ``SOLVER.AMP``; None: all is float32.

    Raises:
        ConfigError: ``MODEL.DEVICE`` cannot do that.
    """
    return _precision(cfg, "SOLVER.AMP.PRECISION") if cfg.SOLVER.AMP.ENABLED else None


def evaluation_autocast(cfg: CfgNode) -> AbstractContextManager:
    """In it a network computes in ``TEST.PRECISION``.

    Raises:
        ConfigError: ``MODEL.DEVICE`` cannot do that.
    """
    precision = _precision(cfg, "TEST.PRECISION")
    device_type = torch.device(cfg.MODEL.DEVICE).type
    return nullcontext() if precision == torch.float32 else torch.autocast(device_type, precision)


def _precision(cfg: CfgNode, key: str) -> torch.dtype:
    name, device = get_value(cfg, key), torch.device(cfg.MODEL.DEVICE)
    if name == "float16" and device.type == "cpu":
        raise ConfigError(
            f"{key}: expected 'bfloat16' with MODEL.DEVICE {cfg.MODEL.DEVICE}, got 'float16', which would be slower "
            "than float32 there"
        )
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"{key}: expected 'float16' on {torch.cuda.get_device_name()}, got 'bfloat16'")
    return getattr(torch, name)


def describe_training(cfg: CfgNode, defaults: CfgNode, sources: Sequence[Source]) -> Description:
    """What the checkpoints of a training say of themselves.

    Args:
        defaults: the engine's.
        sources: of ``DATASETS.TRAIN``; the one with the most classes gives the names.
    """
    names = max((source.class_names for source in sources), key=len, default=("face",))
    if cfg.MODEL.ROI_HEADS.NAME == SINGLE_STAGE_HEADS and len(names) > 1:
        names = ("object",)  # an RPN does not tell classes apart
    return Description(dump_config(cfg, defaults), names)


def config_to_evaluate(args: argparse.Namespace) -> str:
    """The config in the checkpoint of ``--eval-only MODEL.WEIGHTS FILE`` without ``--config-file``; else "".

    Raises:
        ConfigError: there is none.
    """
    if args.config_file or not args.eval_only:
        return ""
    weights = dict(zip(args.opts[::2], args.opts[1::2])).get("MODEL.WEIGHTS", "")
    return saved_config(args.config_file, weights, needed_by="MODEL.WEIGHTS")


def check_start(cfg: CfgNode, start_iter: int) -> None:
    """
    Raises:
        ConfigError: the checkpoint to continue from is of a longer training.
    """
    if start_iter > cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"--resume: the checkpoint is of iteration {start_iter - 1}, expected one below SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}"
        )


def resolve_seed(cfg: CfgNode, *, keep: bool) -> None:
    """Replace ``SEED`` -1 by a number that all processes agree on, in place.

    The draws of the anchors and the order of the images are functions of it, and ``config.yaml`` records it.

    Args:
        keep: use the seed of the run in ``OUTPUT_DIR``, if there is one.

    Raises:
        ConfigError: what that run left does not say it.
    """
    if cfg.SEED >= 0:
        return
    previous = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if keep and os.path.isfile(previous):
        seed = read_run_config(previous).get("SEED")
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"{previous}: expected the SEED of the run that is there, got {seed!r}")
        cfg.SEED = seed
    else:
        cfg.SEED = distributed.broadcast(secrets.randbelow(2**31))


def read_run_config(file: str) -> dict[str, Any]:
    """The ``config.yaml`` that a run has left in its folder.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        with open(file, "rb") as stream:
            content = yaml.safe_load(stream)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: expected the config of a run, got no YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected the config of a run, got {content!r:.80}")
    return content


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
                "MODEL.GROUP_SAMPLING.ANCHOR_STRIDES: expected one feature in MODEL.RPN.IN_FEATURES and one stride per "
                f"size of MODEL.ANCHOR_GENERATOR.SIZES, got {cfg.MODEL.RPN.IN_FEATURES} and strides {strides} for "
                f"{generator.SIZES}"
            )
        if any(stride % feature_strides[0] or stride <= 0 for stride in strides):
            raise ConfigError(
                f"MODEL.GROUP_SAMPLING.ANCHOR_STRIDES: expected multiples of the stride {feature_strides[0]} of "
                f"{cfg.MODEL.RPN.IN_FEATURES}, got {strides}"
            )
        return cls(
            tuple((size,) for size in generator.SIZES[0]),
            _per_level(generator.ASPECT_RATIOS, len(strides), "ASPECT_RATIOS"),
            tuple(strides),
            tuple(stride // feature_strides[0] for stride in strides),
        )

    @property
    def anchors_per_cell(self) -> int:
        """Anchors that the head predicts per cell.

        Raises:
            ConfigError: the levels, which share the head, differ in it.
        """
        counts = [len(sizes) * len(ratios) for sizes, ratios in zip(self.sizes, self.aspect_ratios)]
        return _common_value(counts, "anchors per cell") * max(len(self.steps), 1)

    def level_sizes(self, feature_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Per level (height, width) in cells that have anchors, of features (height, width) in cells."""
        if not self.steps:
            return list(feature_sizes)
        ((height, width),) = feature_sizes
        return [(-(-height // step), -(-width // step)) for step in self.steps]

    def grid(self, feature_sizes: Sequence[tuple[int, int]], cell_anchors: Sequence[Tensor]) -> AnchorGrid:
        """The anchors of features (height, width) in cells; ``cell_anchors`` are each level's (A, 4) base boxes."""
        return AnchorGrid.from_cell_anchors(cell_anchors, self.strides, self.level_sizes(feature_sizes))


def common_channels(channels: Iterable[int]) -> int:
    """The number of channels of the levels of the RPN.

    Raises:
        ConfigError: they differ, although they share the head.
    """
    return _common_value(channels, "channels")


def _common_value(values: Iterable[int], what: str) -> int:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        raise ConfigError(
            f"MODEL.RPN.IN_FEATURES: expected levels with equal numbers of {what}, since they share the head, got "
            f"{distinct}"
        )
    return distinct[0]


def _per_level(values: Sequence[Sequence[float]], num_levels: int, key: str) -> tuple[tuple[float, ...], ...]:
    if len(values) not in (1, num_levels):
        raise ConfigError(
            f"MODEL.ANCHOR_GENERATOR.{key}: expected one entry, or one for each of the {num_levels} levels of "
            f"MODEL.RPN.IN_FEATURES, got {values}"
        )
    return tuple(tuple(level) for level in values) * (num_levels // len(values))


def build_criterion(cfg: CfgNode) -> AnchorCriterion:
    """Sampler and losses that ``MODEL.GROUP_SAMPLING`` and ``MODEL.RPN`` describe.

    Raises:
        ConfigError: naming the key.
    """
    rpn = cfg.MODEL.RPN
    check_values(cfg, {"MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES}, "these are the losses of the paper")
    readings = {"FILL": FILLS, "LOSS_MEAN": LOSS_MEANS, "BBOX_REG_LOSS_MEAN": BOX_LOSS_MEANS}
    readings = {f"MODEL.GROUP_SAMPLING.{key}": values for key, values in readings.items()}
    check_values(cfg, readings, "docs/deviations.md tells them apart")
    return AnchorCriterion(
        build_anchor_sampler(cfg),
        box_loss_type=rpn.BBOX_REG_LOSS_TYPE,
        smooth_l1_beta=rpn.SMOOTH_L1_BETA,
        box_loss_mean=cfg.MODEL.GROUP_SAMPLING.BBOX_REG_LOSS_MEAN,
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
    """The image pyramid of ``TEST.PYRAMID``.

    Raises:
        ConfigError: naming the key.
    """
    pyramid = cfg.TEST.PYRAMID
    try:
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
    except ValueError as error:
        raise ConfigError(f"TEST.PYRAMID: {error}") from None


def load_records(cfg: CfgNode, names: Sequence[str]) -> list[ImageRecord]:
    """The images of several data sets, one after the other."""
    catalog = Catalog(cfg.DATASETS)
    return [record for name in names for record in catalog[name].records]


def select_records(cfg: CfgNode, records: Sequence[ImageRecord], split: str) -> Sequence[ImageRecord]:
    """Those of the images that have a loss.

    Args:
        records: of ``DATASETS.<split>``.

    Raises:
        ConfigError: there is none, or the classes do not fit the heads.
    """
    names = f"DATASETS.{split} {tuple(cfg.DATASETS[split])}"
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_empty(records)
    if not records:
        raise ConfigError(f"{names}: no image to {'train on' if split == 'TRAIN' else 'compute a loss of'}")
    num_classes = 1 + max((int(record.classes.max()) for record in records if len(record.classes)), default=-1)
    if cfg.MODEL.ROI_HEADS.NAME != SINGLE_STAGE_HEADS and num_classes > cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but {names} has boxes of "
            f"{num_classes} classes"
        )
    return records


def build_training_loader(
    cfg: CfgNode, records: Sequence[ImageRecord], to_example: ToExample, *, start_iter: int = 0
) -> TrainLoader:
    """The training loader of both engines; iteration i of a run has the same images whether it was resumed or not.

    Args:
        records: the images of ``DATASETS.TRAIN``.
        to_example: what the engine makes of an image.

    Raises:
        ConfigError: there is nothing to train on, or the data does not fit the heads or the number of processes.
    """
    records = select_records(cfg, records, "TRAIN")
    world_size, parts = distributed.world_size(), cfg.SOLVER.ACCUMULATE_STEPS
    if cfg.SOLVER.IMS_PER_BATCH % (world_size * parts):
        times = f", times SOLVER.ACCUMULATE_STEPS {parts}" if parts > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of the {world_size} processes{times}, got "
            f"{cfg.SOLVER.IMS_PER_BATCH}"
        )
    return build_train_loader(
        records,
        build_train_transform(cfg),
        to_example,
        seed=cfg.SEED,
        images_per_batch=cfg.SOLVER.IMS_PER_BATCH // world_size,
        rank=distributed.rank(),
        world_size=world_size,
        start_batch=start_iter,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_bad_share=cfg.DATALOADER.MAX_BAD_SHARE,
        reduce_jpeg=cfg.INPUT.REDUCE_JPEG,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )
