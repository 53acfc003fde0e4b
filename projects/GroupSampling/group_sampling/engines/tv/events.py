"""What a run writes: log, ``metrics.json``, TensorBoard scalars, with Detectron2's names."""

import datetime
import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from fvcore.common.config import CfgNode
from fvcore.common.history_buffer import HistoryBuffer

from ..build import LOG_PERIOD
from ..monitoring import WandbRun

logger = logging.getLogger(__name__)

_ETA_WINDOW = 1000  # iterations


@contextmanager
def logging_to(folder: str, rank: int) -> Iterator[None]:
    """Log to ``folder/log.txt`` and, on the main process, to the console; other ranks write ``log.txt.rank<r>``."""
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, f"log.txt.rank{rank}" if rank else "log.txt")
    handlers: list[logging.Handler] = [logging.FileHandler(file, encoding="utf-8")]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    with ExitStack() as stack:
        for handler in handlers:
            stack.callback(handler.close)
            handler.setFormatter(
                logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
            )
        for log in map(logging.getLogger, ("group_sampling", "fvcore")):
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.INFO)
            for handler in handlers:
                stack.callback(log.removeHandler, handler)
                log.addHandler(handler)
        yield


class MetricWriter:
    """Collects the scalars of every iteration and writes them every :data:`LOG_PERIOD` iterations.

    They go to ``metrics.json``, to TensorBoard and, with ``LOGGING.WANDB``, to Weights & Biases.

    Losses and times are medians over that period, as Detectron2 writes them; sample counts, "rpn/..." and "roi/...",
    are means.
    """

    def __init__(self, cfg: CfgNode, start_iter: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        folder, self._max_iter = cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER
        self._last_written = start_iter - 1
        self._file = open(os.path.join(folder, "metrics.json"), "a", encoding="utf-8")  # noqa: SIM115 (close())
        self._tensorboard = SummaryWriter(folder, purge_step=start_iter)
        self._wandb = WandbRun(cfg, resume=start_iter > 0) if cfg.LOGGING.WANDB else None
        self._history: dict[str, HistoryBuffer] = defaultdict(partial(HistoryBuffer, _ETA_WINDOW))

    def step(self, iteration: int, scalars: dict[str, float], lr: float, health: dict[str, float]) -> None:
        """Record the scalars of an iteration: "time", "data_time", ... in seconds, losses, counts.

        Args:
            health: in an iteration that is written, of :meth:`~group_sampling.engines.step.HealthLog.read`.
        """
        for name, value in scalars.items():
            self._history[name].update(value)
        if (iteration + 1) % LOG_PERIOD and iteration + 1 < self._max_iter:
            return
        window, self._last_written = iteration - self._last_written, iteration
        smooth = {
            name: history.avg(window) if name.startswith(("rpn/", "roi/")) else history.median(window)
            for name, history in self._history.items()
        }
        eta = self._history["time"].median(_ETA_WINDOW) * (self._max_iter - iteration - 1)
        self.write(iteration, {**smooth, **health, "lr": lr, "eta_seconds": eta})
        shown = [name for name in smooth if "loss" in name or name == "grad_norm"]
        losses = "  ".join(f"{name}: {smooth[name]:.4g}" for name in shown)
        memory = f"  max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M" if torch.cuda.is_available() else ""
        logger.info(
            f"eta: {datetime.timedelta(seconds=int(eta))}  iter: {iteration}  {losses}  time: {smooth['time']:.4f}  "
            f"data_time: {smooth['data_time']:.4f}  lr: {lr:.5g}{memory}"
        )

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Write a line of ``metrics.json``, and points of curves.

        Left out is what is not finite: AP of a scale without faces, the norm of gradients that a scaler let overflow.
        """
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        self._file.write(json.dumps({**scalars, "iteration": iteration}, sort_keys=True) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(iteration, scalars)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Add pictures, (H, W, 3) uint8 by name."""
        for name, image in images.items():
            self._tensorboard.add_image(name, image, iteration, dataformats="HWC")
        if self._wandb:
            self._wandb.log_images(iteration, images)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.close()
