"""What a training does, on either engine, to be watched: validation loss, best model, Weights & Biases."""

import importlib.util
import itertools
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import yaml
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from .. import distributed, stop
from ..checkpoint import CheckpointError, read_checkpoint
from ..checkpointer import BEST_MODEL, CheckpointMixin
from ..config import ConfigError
from ..criterion import AnchorCriterion
from ..data.loader import ToExample, build_train_loader
from ..data.records import ImageRecord
from ..files import write_atomically
from ..monitor import HeadMonitor
from .build import build_train_transform, select_records

logger = logging.getLogger(__name__)

_SEED = 0  # of the validation: its images, crops and flips are not those of a run's SEED


def check_monitoring(cfg: CfgNode) -> None:
    """Refuse a training that cannot be watched as its config wants it: better now than at the first evaluation.

    Raises:
        ConfigError: naming the key.
    """
    if cfg.TEST.VALIDATION_LOSS and not cfg.DATASETS.TEST:
        raise ConfigError("TEST.VALIDATION_LOSS: expected images in DATASETS.TEST, got none")
    if cfg.TEST.BEST_CHECKPOINTER.ENABLED and (cfg.TEST.EVAL_PERIOD < 1 or not cfg.DATASETS.TEST):
        raise ConfigError(
            "TEST.BEST_CHECKPOINTER: expected several evaluations to choose from, got TEST.EVAL_PERIOD "
            f"{cfg.TEST.EVAL_PERIOD} and DATASETS.TEST {tuple(cfg.DATASETS.TEST)}"
        )
    if cfg.LOGGING.WANDB and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"LOGGING.WANDB is {cfg.LOGGING.WANDB!r}, but the package wandb is not installed: pip install wandb, or "
            'LOGGING.WANDB ""'
        )


class ValidationLoss:
    """The losses on ``DATASETS.TEST``, by which overfitting shows: they rise while those of the training fall.

    Images go through the augmentation of the training (jitter, crop, flip), so that both losses are of the same kind,
    but every image has one draw for all times. It is looked at once, by itself; the losses are means over the images.
    Normalization and dropout are as in a test. Nothing of the training changes: neither its samples, nor its random
    numbers, nor what is summed up of the head's health.

    All processes have to construct and call it together. Each takes its share of the images. The samples drawn
    depend on the process, so the losses differ in the last digits with the number of processes.

    Args:
        records: the images of ``DATASETS.TEST``.
        to_example: what the engine makes of an image.

    Raises:
        ConfigError: no image has a loss.
    """

    def __init__(self, cfg: CfgNode, records: Sequence[ImageRecord], to_example: ToExample) -> None:
        records = select_records(cfg, records, "TEST")
        if not any((~record.ignore).any() for record in records):
            raise ConfigError(f"TEST.VALIDATION_LOSS: expected boxes in DATASETS.TEST {tuple(cfg.DATASETS.TEST)}")
        limit = cfg.TEST.VALIDATION_IMAGES
        self._count = min(limit, len(records)) if limit else len(records)
        self._first, self._step = distributed.rank(), distributed.world_size()
        self._loader = build_train_loader(
            records,
            build_train_transform(cfg),
            to_example,
            seed=_SEED,
            images_per_batch=1,
            rank=self._first,
            world_size=self._step,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            max_bad_share=cfg.DATALOADER.MAX_BAD_SHARE,
        )

    @stop.handler.at_once()
    def __call__(self, model: nn.Module, losses_of: Callable[[Any, int], Mapping[str, Tensor]]) -> dict[str, float]:
        """
        Args:
            model: not wrapped for several processes.
            losses_of: the losses of the model for an example and the number of its draw.

        Returns:
            "total_loss" and its parts, the same in every process.
        """
        draws = range(self._first, self._count, self._step)
        sums, count = np.zeros(0), 0
        names: list[str] = []
        with _undisturbed(model), torch.no_grad():
            for draw, batch in zip(draws, itertools.islice(self._loader, len(draws))):
                losses = losses_of(batch[0], draw)
                names = list(losses)
                values = torch.stack([loss.detach().double() for loss in losses.values()]).cpu().numpy()
                sums, count = (sums + values if count else values), count + 1
        # A process may have no image, and then it does not know the names.
        shares = [share for share in distributed.all_gather((names, sums, count)) if share[2]]
        means = np.sum([sums for _, sums, _ in shares], axis=0) / sum(count for _, _, count in shares)
        return {"total_loss": float(means.sum()), **dict(zip(shares[0][0], means.tolist()))}


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """A model that computes losses as in a test, and is then as it was; torch's random numbers as well."""
    modes = {module: module.training for module in model.modules()}
    criteria = [module for module in model.modules() if isinstance(module, AnchorCriterion)]
    monitors = [criterion.monitor for criterion in criteria]
    device = next(model.parameters()).device
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
                module.eval()
        for criterion in criteria:
            criterion.monitor = HeadMonitor()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        for criterion, monitor in zip(criteria, monitors):
            criterion.monitor = monitor


class BestModel:
    """Keeps ``model_best.pth``, as ``TEST.BEST_CHECKPOINTER`` says.

    It is a checkpoint like the others, with "best": {"metric": ..., "value": ...}. A training that resumes knows the
    best so far from it. ``last_checkpoint`` does not name it.

    Args:
        checkpointer: that of the training, in every process.
    """

    def __init__(self, cfg: CfgNode, checkpointer: CheckpointMixin) -> None:
        options = cfg.TEST.BEST_CHECKPOINTER
        self._is_enabled, self._metric = options.ENABLED, options.METRIC
        self._sign = 1 if options.MODE == "max" else -1
        self._checkpointer = checkpointer
        self._best = -math.inf  # times the sign

    def resume(self) -> None:
        """Continue from what an earlier part of the training has found best."""
        file = os.path.join(self._checkpointer.save_dir, f"{BEST_MODEL}.pth")
        if not self._is_enabled or distributed.rank() != 0 or not os.path.isfile(file):
            return
        try:
            found = read_checkpoint(file, mmap=True).get("best", {})
            metric, value = found.get("metric"), float(found.get("value", math.nan))
        except (CheckpointError, AttributeError, TypeError, ValueError) as error:
            logger.warning(f"{file}: the next evaluation replaces it, since it does not say how good it is: {error}")
            return
        if metric != self._metric or math.isnan(value):
            logger.warning(f"{file}: the next evaluation replaces it: it is the best by {metric}, not {self._metric}")
            return
        self._best = self._sign * value
        logger.info(f"{file}: the best so far, {metric} {value:g}")

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Save the model if it is better than all before. All processes have to call it together.

        Args:
            iteration: the last one of the training.
            metrics: of an evaluation of the model, on the main process.

        Raises:
            ConfigError: in every process, if they lack the one to choose by.
        """
        if not self._is_enabled:
            return
        names = distributed.broadcast(sorted(metrics))
        if self._metric not in names:
            raise ConfigError(
                f"TEST.BEST_CHECKPOINTER.METRIC: expected one of {', '.join(names)}, got {self._metric!r}"
            )
        if distributed.rank() != 0:
            return
        value = metrics[self._metric]
        if self._sign * value > self._best:  # never for NaN
            self._best = self._sign * value
            best = {"metric": self._metric, "value": float(value)}
            self._checkpointer.write(BEST_MODEL, iteration=iteration, best=best)
            logger.info(f"iteration {iteration}: the best {self._metric} so far, {value:g}")


class WandbRun:
    """A run in the project ``LOGGING.WANDB`` of Weights & Biases.

    Args:
        resume: continue the curves of the run in ``OUTPUT_DIR``.
    """

    def __init__(self, cfg: CfgNode, *, resume: bool) -> None:
        import wandb  # optional, and it takes seconds

        self._wandb = wandb
        file = os.path.join(cfg.OUTPUT_DIR, "wandb_id")
        if not resume or not os.path.isfile(file):
            write_atomically(file, secrets.token_hex(8).encode())
        with open(file, encoding="ascii") as stream:
            name = stream.read().strip()
        self._run = wandb.init(
            project=cfg.LOGGING.WANDB,
            id=name,
            resume="allow",
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
        )

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add values to the curves."""
        self._run.log(dict(scalars), step=iteration)

    def log_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Add pictures, (H, W, 3) uint8 by name."""
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=iteration)

    def close(self) -> None:
        self._run.finish()
