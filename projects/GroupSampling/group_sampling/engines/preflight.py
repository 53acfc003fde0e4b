"""All that can be known of a run before its first step is known before its first step."""

import argparse
import logging
import os
from collections.abc import Callable, Sequence

from fvcore.common.config import CfgNode

from .. import distributed
from ..config import ConfigError
from ..data.catalog import Source
from ..data.check import HeaderCache, ImageCheck, check_images
from ..data.loader import BadDataError, list_files, too_many
from ..errors import UserError, describe, is_expected
from ..evaluation.run import check_ground_truth
from .build import SINGLE_STAGE_HEADS, evaluation_autocast, training_precision

logger = logging.getLogger(__name__)

FindSource = Callable[[str], Source]  # the data set of a name; raises ValueError for an unknown one

_CACHE = "image_headers.json"  # in OUTPUT_DIR


def check_run(cfg: CfgNode, args: argparse.Namespace, find_source: FindSource) -> None:
    """Refuse a command that lacks its data sets or weights, or that its device cannot train, without reading a file.

    Args:
        args: of the command, see :func:`~group_sampling.engines.launch.launch`.

    Raises:
        ConfigError: an unknown data set, an invalid declaration, no weights to evaluate, or what
            :func:`~group_sampling.engines.build.training_precision` or ``evaluation_autocast`` refuse.
        MissingDatasetError: files are missing.
    """
    for key in ("TEST",) if args.eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            try:
                find_source(name).require()
            except ValueError as error:
                raise ConfigError(f"DATASETS.{key}: {error}") from error
    evaluation_autocast(cfg)
    if not args.eval_only:
        training_precision(cfg)
        return
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST: expected a data set to evaluate, got ()")
    has_checkpoint = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if not cfg.MODEL.WEIGHTS and not has_checkpoint and not getattr(args, "allow_partial_weights", False):
        raise ConfigError(
            "--eval-only: expected a checkpoint in MODEL.WEIGHTS, or --resume for the last one in OUTPUT_DIR "
            f"{cfg.OUTPUT_DIR!r}, got neither; the weights would be random"
        )


def check_data(cfg: CfgNode, find_source: FindSource, *, eval_only: bool) -> None:
    """Refuse data that a training or an evaluation would stumble over, perhaps only after days.

    Annotations are parsed, their classes compared, and the ground truth of the evaluations is built; with
    ``DATASETS.CHECK_IMAGES`` the header of every image file is read. All processes call it together, the main one
    looks. What does not end a run is said in the log.

    Raises:
        UserError: in every process; more images cannot be read than ``DATALOADER.MAX_BAD_SHARE`` allows, classes do not
            fit, or an annotation file does not follow its format.
    """
    failure: Exception | None = None
    if distributed.rank() == 0:
        try:
            train = [] if eval_only else [find_source(name) for name in cfg.DATASETS.TRAIN]
            test = [find_source(name) for name in cfg.DATASETS.TEST]
            _check(cfg, train, test)
        except Exception as error:
            if distributed.world_size() == 1 or not is_expected(error):
                raise
            failure = error if isinstance(error, UserError) else UserError(describe(error))
    failure = distributed.broadcast(failure)
    if failure is not None:
        raise failure


def _check(cfg: CfgNode, train: Sequence[Source], test: Sequence[Source]) -> None:
    if train:
        named = max(train, key=lambda source: len(source.class_names))
        for source in train:
            _compare(cfg, "DATASETS.TRAIN", named.class_names, repr(named.name), source)
        check_test_classes(cfg, named.class_names, test)
    for source in test:
        check_ground_truth(cfg, source)
    if not cfg.DATASETS.CHECK_IMAGES:
        return
    cache = HeaderCache(os.path.join(cfg.OUTPUT_DIR, _CACHE))
    checks = {source.name: check_images(source.name, source.records, cache) for source in (*train, *test)}
    cache.save()
    share = cfg.DATALOADER.MAX_BAD_SHARE
    _report("DATASETS.TRAIN", [checks[source.name] for source in train], share, "are replaced by others")
    for source in test:
        _report(source.name, [checks[source.name]], share, "count as images without detections")


def _report(what: str, checks: Sequence[ImageCheck], share: float, consequence: str) -> None:
    """Say what was found, or raise BadDataError."""
    total = sum(check.num_images for check in checks)
    unreadable = {file: reason for check in checks for file, reason in check.unreadable.items()}
    outside = {file: count for check in checks for file, count in check.outside.items()}
    exchanged = [file for check in checks for file in check.exchanged]
    counts = f"{what}: {len(unreadable):,} of {total:,} images cannot be read"
    if unreadable and (len(unreadable) == total or too_many(len(unreadable), total, share)):
        allowed = f"expected a share of at most {share:g} (DATALOADER.MAX_BAD_SHARE)"
        raise BadDataError(f"{counts}; {allowed}. Got:\n{list_files(unreadable)}")
    if unreadable:
        logger.warning(f"{counts} and {consequence}:\n{list_files(unreadable)}")
    if outside:
        listed = list_files({file: f"{count} boxes" for file, count in outside.items()})
        logger.warning(
            f"{what}: {sum(outside.values()):,} boxes of {len(outside):,} images are outside of them, or nearly; a "
            f"training leaves them out, an evaluation counts them as missed:\n{listed}"
        )
    if exchanged:
        logger.warning(
            f"{what}: the boxes of {len(exchanged):,} images ({exchanged[0]}, ...) fit with the sides exchanged: if "
            "they were made for the other orientation, before or after EXIF turned it, change DATASETS.APPLY_EXIF"
        )


def check_test_classes(cfg: CfgNode, trained: Sequence[str], sources: Sequence[Source]) -> None:
    """Refuse data sets of which a detector knows other classes.

    Args:
        trained: the class names of the training; empty: not known.
        sources: of ``DATASETS.TEST``.

    Raises:
        ConfigError: naming data set and classes.
    """
    for source in sources:
        if source.protocol != "coco":  # the others do not tell classes apart
            continue
        names, count = source.class_names, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if cfg.MODEL.ROI_HEADS.NAME == SINGLE_STAGE_HEADS:
            if len(names) > 1:
                logger.warning(
                    f"DATASETS.TEST: {source.name!r} has the classes {', '.join(names)}; this single-stage detector "
                    f"does not tell classes apart: all that it finds counts as {names[0]!r}"
                )
            continue
        _compare(cfg, "DATASETS.TEST", trained, "the training", source)
        used = 1 + max((int(record.classes.max()) for record in source.records if len(record.classes)), default=0)
        if not used <= count <= len(names):
            raise ConfigError(
                f"MODEL.ROI_HEADS.NUM_CLASSES: expected the number of classes of DATASETS.TEST {source.name!r}, "
                f"{len(names)} ({', '.join(names)}), got {count}"
            )


def _compare(cfg: CfgNode, key: str, expected: Sequence[str], of: str, source: Source) -> None:
    """Refuse a data set that gives a class, known by its place in the list, another name."""
    names = source.class_names
    if all(name == other for name, other in zip(names, expected)):
        return
    what = (
        f"{key}: expected the classes of {of} ({', '.join(expected)}), in the order of their ids, got "
        f"({', '.join(names)}) in {source.name!r}"
    )
    if cfg.MODEL.ROI_HEADS.NAME == SINGLE_STAGE_HEADS or len(names) == len(expected) == 1:
        logger.warning(f"{what}; they are taken for one class")
        return
    raise ConfigError(f"{what}: a class is known by its place in that order, and boxes would change their classes")
