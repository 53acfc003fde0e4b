"""Training and evaluation with torchvision's models, in one process or several."""

import argparse
import datetime
import functools
import logging
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import clip_boxes_to_image

from ... import stop
from ...checkpointer import CheckpointMixin
from ...data.batching import BatchesBySize
from ...data.catalog import Catalog
from ...data.loader import SkippedImage, build_test_loader
from ...data.records import ImageRecord
from ...detections import Detections, map_lists
from ...distributed import rank, world_size
from ...env import collect_env
from ...evaluation.examples import read_examples
from ...evaluation.run import Evaluation
from ...files import write_atomically
from ..build import (
    build_test_transform,
    build_training_loader,
    check_start,
    config_to_evaluate,
    describe_training,
    evaluation_autocast,
    load_records,
    resolve_seed,
)
from ..launch import Finish, launch
from ..monitoring import BestModel, ValidationLoss, check_monitoring
from ..preflight import check_data, check_run, check_test_classes
from ..speed import prepare_network
from ..step import HealthLog, TrainingStep, is_due
from .config import get_cfg, load_config
from .events import MetricWriter, logging_to
from .model import GroupSamplingRCNN, build_model, to_detections
from .sampling import SamplingModule
from .solver import build_lr_schedule, build_optimizer
from .tta import GroupSamplingTTA

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0  # between two lines of an evaluation's progress


class GroupSamplingCheckpointer(CheckpointMixin, Checkpointer):
    """fvcore's checkpointer: atomic, runs no code from files, and reads the Detectron2 engine's files as well."""

    naming = "torchvision"


class Example(NamedTuple):
    """One input of the model, as the loader's workers make it."""

    image: Tensor  # (3, H, W) uint8 RGB
    target: dict[str, Tensor]  # "boxes" (m, 4), "ignore_boxes" (k, 4) XYXY in pixels of ``image``; "labels" (m,)
    record: ImageRecord


def to_example(image: np.ndarray, boxes, classes, ignore_boxes, record: ImageRecord, draw: int) -> Example:
    arrays = {"boxes": boxes, "labels": classes, "ignore_boxes": ignore_boxes}
    target = {name: torch.as_tensor(array) for name, array in arrays.items()}
    return Example(torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1))), target, record)


@stop.handler.deferred()
def train(cfg: CfgNode, model: GroupSamplingRCNN, device: torch.device, *, resume: bool) -> dict[str, float]:
    """Train until ``SOLVER.MAX_ITER`` and evaluate.

    Args:
        resume: continue from the last checkpoint in ``OUTPUT_DIR``, if there is one. Images, draws and learning rates
            depend on ``SEED`` and the iteration alone, so the run is bit-identical to an uninterrupted one.

    Returns:
        The metrics of the last evaluation, see :func:`evaluate`.

    Raises:
        FloatingPointError: a loss is not finite; raised in every process, with no weight changed by it.
        SystemExit: SIGTERM or SIGINT; a checkpoint has been written.
        ConfigError: the checkpoint to continue from is the other engine's.
    """
    prepare_network(cfg, model, (BasicBlock, Bottleneck))
    optimizer = build_optimizer(cfg, model)
    schedule = build_lr_schedule(cfg)
    is_main, max_iter = rank() == 0, cfg.SOLVER.MAX_ITER
    parallel: nn.Module = model
    if world_size() > 1:
        parallel = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )
    update = TrainingStep(cfg, parallel, optimizer)
    state = {"optimizer": optimizer, **update.stateful}
    checkpointer = GroupSamplingCheckpointer(model, cfg.OUTPUT_DIR, save_to_disk=is_main, **state)
    checkpointer.saved_weights = update.averaged
    catalog = Catalog(cfg.DATASETS)
    sources = [catalog[name] for name in cfg.DATASETS.TRAIN]
    checkpointer.description = describe_training(cfg, get_cfg(), sources)
    saved = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    resume = resume and checkpointer.has_checkpoint()
    start_iter = saved["iteration"] + 1 if resume else 0
    check_start(cfg, start_iter)
    checkpointer.complete(start_iter, max_iter)
    periodic_checkpointer = PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter)

    model.set_iteration(start_iter)  # also with the weights of another run, or of a checkpoint without the count

    records = [record for source in sources for record in source.records]
    loader = build_training_loader(cfg, records, to_example, start_iter=start_iter)
    validation = None
    if cfg.TEST.VALIDATION_LOSS:
        validation = ValidationLoss(cfg, load_records(cfg, cfg.DATASETS.TEST), to_example)
    best = BestModel(cfg, checkpointer)
    if resume:
        best.resume()
    writer = MetricWriter(cfg, start_iter) if is_main else None

    def evaluate_and_log(iteration: int, *, resume: bool = False) -> dict[str, float]:
        with update.averaged():
            metrics = evaluate(cfg, model, device, resume=resume)
            if validation:
                losses = validation(model, functools.partial(_validation_losses, model, device))
                metrics.update({f"validation/{name}": loss for name, loss in losses.items()} if is_main else {})
            if writer and metrics:
                writer.write(iteration, metrics)
                writer.write_images(iteration, read_examples(cfg))
            best.update(iteration, metrics)
        return metrics

    logger.info(f"Training from iteration {start_iter} to {max_iter} on {world_size()} x {device}")
    model.train()
    guard, health = update.guard, HealthLog(cfg, model)
    logged: list[tuple[int, dict[str, float], float]] = []  # iteration, times, learning rate
    scalars: list[dict[str, Tensor]] = []  # of the same iterations, not read back yet
    batches = iter(loader)
    for iteration in range(start_iter, max_iter):
        start = time.perf_counter()
        batch = next(batches)
        data_time = time.perf_counter() - start

        lr = cfg.SOLVER.BASE_LR * schedule(iteration / max_iter)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, counts = train_step(model, update, batch, device, iteration)
        norm = {"grad_norm": update.clipper.norm}
        scalars.append({"total_loss": sum(losses.values()), **losses, **norm, **counts})
        times = {"time": time.perf_counter() - start, "data_time": data_time}
        if model.rpn.criterion.sampler.timer.seconds is not None:
            times["time_assign"] = model.rpn.criterion.sampler.timer.seconds
        logged.append((iteration, times, lr))

        is_last = iteration + 1 == max_iter
        stops = guard.stop_signal and not is_last
        if stops or is_due(iteration, max_iter, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD):
            guard.check()
        if is_due(iteration, max_iter):
            means = _mean_over_ranks(scalars)
            if writer:
                last = health.read(iteration, [values["grad_norm"] for values in means])
                for (step, step_times, step_lr), values in zip(logged, means):
                    writer.step(step, {**values, **step_times}, step_lr, last if step == iteration else {})
            logged.clear()
            scalars.clear()
        periodic_checkpointer.step(iteration)
        if stops:
            stop.save_and_stop(checkpointer, iteration, guard.stop_signal)
        if not is_last and cfg.TEST.EVAL_PERIOD > 0 and (iteration + 1) % cfg.TEST.EVAL_PERIOD == 0:
            try:
                evaluate_and_log(iteration)
            except stop.Stopped as stopped:
                stop.save_and_stop(checkpointer, iteration, stopped.number)
    left_out = loader.summary()
    if left_out:
        logger.warning(left_out)
    metrics = evaluate_and_log(max_iter - 1, resume=resume)
    if writer:
        writer.close()
    return metrics


def train_step(
    model: GroupSamplingRCNN, update: TrainingStep, batch: Sequence[Example], device: torch.device, iteration: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One update of the weights, see :class:`TrainingStep`; returns losses without gradients, and ``sample_counts``.

    Raises:
        FloatingPointError: see :meth:`FiniteLossGuard.watch`.
    """
    counts = []

    def forward(examples: Sequence[Example]) -> dict[str, Tensor]:
        model.set_iteration(iteration)  # a pass counts as one, and a step may have several
        losses = update.model(*_to_inputs(examples, device))
        counts.append(model.sample_counts)
        return losses

    losses = update(iteration, batch, forward, [example.record.file_name for example in batch])
    if len(counts) == 1:
        return losses, counts[0]
    return losses, {name: torch.stack([part[name] for part in counts]).mean() for name in counts[0]}


def _to_inputs(batch: Sequence[Example], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return (
        [example.image.to(device, non_blocking=True).float() for example in batch],
        [{name: value.to(device, non_blocking=True) for name, value in example.target.items()} for example in batch],
    )


def _validation_losses(
    model: GroupSamplingRCNN, device: torch.device, example: Example, draw: int
) -> dict[str, Tensor]:
    """Of one image, with the samples of pass ``draw``; the count of the training's passes stays."""
    parts = [module for module in model.modules() if isinstance(module, SamplingModule)]
    counts = [part.iteration for part in parts]
    model.set_iteration(draw)
    try:
        return model(*_to_inputs([example], device))
    finally:
        for part, count in zip(parts, counts):
            part.iteration = count


@stop.handler.at_once()
def evaluate(cfg: CfgNode, model: GroupSamplingRCNN, device: torch.device, *, resume: bool = False) -> dict[str, float]:
    """Detect on ``DATASETS.TEST``, each process on its share, and score on the main one.

    Args:
        resume: continue an interrupted evaluation of the same weights, configuration and images.

    Returns:
        On the main process "wider_face/AP_all", "wider_face/AP@16", ... in percent ("coco/AP", ... for data in COCO's
        format), prefixed with the name of the data set when there are several; elsewhere nothing. The model is left in
        the mode in which it was.

    Raises:
        BadDataError: more images cannot be read than ``DATALOADER.MAX_BAD_SHARE`` allows.
    """
    metrics = {}
    was_training = model.training
    model.eval()
    catalog = Catalog(cfg.DATASETS)
    for name in cfg.DATASETS.TEST:
        evaluation = Evaluation(cfg, catalog[name], model, resume=resume)
        _detect(cfg, model, device, name, evaluation)
        prefix = "" if len(cfg.DATASETS.TEST) == 1 else f"{name}/"
        for task, results in (evaluation.finish() or {}).items():
            metrics.update({f"{prefix}{task}/{key}": value for key, value in results.items()})
    model.train(was_training)
    return metrics


@torch.no_grad()
def _detect(cfg: CfgNode, model: GroupSamplingRCNN, device: torch.device, name: str, evaluation: Evaluation) -> None:
    """Detect on this process's share of the images; boxes are in pixels of the original ones."""
    loader = build_test_loader(
        evaluation.share, build_test_transform(cfg), to_example, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    if cfg.TEST.PYRAMID.SCALES:
        model = GroupSamplingTTA(cfg, model)
    start = last_report = time.perf_counter()
    done = 0
    for batch in BatchesBySize(loader, cfg.TEST.IMS_PER_BATCH, _size_of):
        done += len(batch)
        if isinstance(batch[0], SkippedImage):
            evaluation.skip(batch[0].file, batch[0].reason)
            continue
        with evaluation_autocast(cfg):
            outputs = model([example.image.to(device).float() for example in batch])
        for (image, _, record), output in zip(batch, outputs):
            found = _rescale(to_detections(output), image.shape[-2:], (record.height, record.width))
            evaluation.add(record.image_id, found.numpy())
        now = time.perf_counter()
        if now - last_report > _PROGRESS_SECONDS:
            eta = datetime.timedelta(seconds=int((now - start) / done * (len(loader) - done)))
            logger.info(f"{name}: {done} of {len(loader)} images, eta: {eta}")
            last_report = now


def _size_of(example: Example | SkippedImage) -> torch.Size | None:
    return None if isinstance(example, SkippedImage) else example.image.shape


def _rescale(found: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    """From an image of (height, width) ``size`` to the ``original`` one; boxes that have no area there are left out."""
    factors = found.boxes.new_tensor([original[1] / size[1], original[0] / size[0]] * 2)

    def rescale(found: Detections) -> Detections:
        boxes = clip_boxes_to_image(found.boxes * factors, original)
        return found._replace(boxes=boxes).select((boxes[:, 2:] > boxes[:, :2]).all(dim=1))

    return map_lists(rescale, found)


def _mean_over_ranks(steps: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """One read-back and, with several processes, one reduction for all scalars of several iterations."""
    values = torch.stack([torch.stack([value.float() for value in step.values()]) for step in steps])
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return [dict(zip(steps[0], row)) for row in values.tolist()]


def _work(cfg: CfgNode, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """What each process does."""
    resolve_seed(cfg, keep=args.resume or args.eval_only)
    cfg.freeze()
    with logging_to(cfg.OUTPUT_DIR, rank()):
        if rank() == 0:
            logger.info("Environment:\n" + "\n".join(f"{name}: {value}" for name, value in collect_env()))
            path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
            write_atomically(path, cfg.dump().encode())
            logger.info(f"Config of this run, written to {path}:\n{cfg.dump()}")
        catalog = Catalog(cfg.DATASETS)
        check_data(cfg, catalog.__getitem__, eval_only=args.eval_only)
        torch.manual_seed(cfg.SEED)
        model = build_model(cfg).to(device)
        if args.eval_only:
            model.train(getattr(args, "allow_partial_weights", False))  # a detector to evaluate needs all weights
            checkpointer = GroupSamplingCheckpointer(model, cfg.OUTPUT_DIR)
            saved = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            check_test_classes(cfg, saved.get("class_names", ()), [catalog[name] for name in cfg.DATASETS.TEST])
            return evaluate(cfg, model, device, resume=args.resume)
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        return train(cfg, model, device, resume=args.resume)


def main(args: argparse.Namespace, finish: Finish | None = None) -> dict[str, float]:
    """Train or evaluate as ``train_net.py`` does.

    Args:
        args: with the attributes of Detectron2's ``default_argument_parser``; see
            :func:`~group_sampling.engines.launch.launch`, also for ``finish``.

    Returns:
        The metrics, see :func:`evaluate`.

    Raises:
        ConfigError: the config or the number of processes is not usable here.
        MissingDatasetError: files of a data set are missing.
    """
    cfg = load_config(args.config_file, args.opts, saved=config_to_evaluate(args))
    check_run(cfg, args, Catalog(cfg.DATASETS).__getitem__)
    if not args.eval_only:
        check_monitoring(cfg)
    return launch(_work, cfg, args, finish)
