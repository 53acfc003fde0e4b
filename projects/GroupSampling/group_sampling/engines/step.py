"""The training step of both engines, in which the host does not wait for a GPU, and what they do around it."""

import functools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

from .. import stop
from ..criterion import AnchorCriterion
from ..distributed import part_of_batch, world_size
from ..monitor import HealthWatch
from .averaging import WeightAverage
from .build import LOG_PERIOD, training_precision

logger = logging.getLogger(__name__)

Example = TypeVar("Example")


def is_due(iteration: int, max_iter: int, *periods: int) -> bool:
    """Whether the host may wait after this iteration: it logs, saves or evaluates, or is the last one.

    Args:
        periods: further ones than that of the log, in iterations; 0 is never.
    """
    done = iteration + 1
    return done >= max_iter or any(period > 0 and done % period == 0 for period in (LOG_PERIOD, *periods))


class TrainingStep:
    """One update of the weights by a batch, for which the host does not wait.

    With ``SOLVER.AMP`` the network's convolutions and matrix products run in 16 bits, and with float16 the loss is
    scaled, so that small gradients are not lost. Weights, losses, matching, sampling and boxes stay float32.

    With ``SOLVER.ACCUMULATE_STEPS`` the batch is seen in as many parts, and the mean of their losses is trained on: a
    process does what as many processes would do.

    Args:
        model: in training mode, in ``DistributedDataParallel`` if there are several processes.
        optimizer: gets the hooks of :class:`FiniteLossGuard` and :class:`GradientClipper`.

    Attributes:
        stateful: by name, what is part of a checkpoint beside model and optimizer: with float16 the "grad_scaler", with
            ``SOLVER.EMA`` the "ema".

    Raises:
        ConfigError: see :func:`~group_sampling.engines.build.training_precision`.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self._optimizer, self._num_parts = model, optimizer, cfg.SOLVER.ACCUMULATE_STEPS
        self.guard, self.clipper = FiniteLossGuard(optimizer), GradientClipper(cfg, optimizer)
        device_type, precision = torch.device(cfg.MODEL.DEVICE).type, training_precision(cfg)
        self.autocast = nullcontext if precision is None else functools.partial(torch.autocast, device_type, precision)
        self.scaler = torch.amp.GradScaler(device_type) if precision == torch.float16 else None
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self.average = WeightAverage(inner, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        named = {"grad_scaler": self.scaler, "ema": self.average}
        self.stateful = {name: part for name, part in named.items() if part is not None}

    def __call__(
        self,
        iteration: int,
        batch: Sequence[Example],
        forward: Callable[[Sequence[Example]], dict[str, Tensor]],
        files: Sequence[str | None],
    ) -> dict[str, Tensor]:
        """Train on the sum of the losses that ``forward`` returns; returns them without gradients.

        Args:
            batch: of this process.
            forward: the losses of some of its examples; called once for each part.
            files: the images of the batch.

        Raises:
            FloatingPointError: see :meth:`FiniteLossGuard.watch`.
        """
        count = self._num_parts
        size = len(batch) // count
        losses: dict[str, Tensor] = {}
        for k in range(count):
            with self._without_exchange() if k + 1 < count else nullcontext():
                with self.autocast(), part_of_batch(k * size, len(batch)):
                    part = forward(batch[k * size : (k + 1) * size])
                if count > 1:
                    part = {name: loss / count for name, loss in part.items()}
                losses = {name: losses[name] + loss.detach() if k else loss.detach() for name, loss in part.items()}
                if k + 1 == count:
                    self.guard.watch(iteration, losses, files)
                if k == 0:
                    self._optimizer.zero_grad()
                total = functools.reduce(torch.add, part.values())
                (total if self.scaler is None else self.scaler.scale(total)).backward()
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.unscale_(self._optimizer)  # before they are clipped
            self.scaler.step(self._optimizer)
            self.scaler.update()
        if self.average is not None:
            self.average.update()
        return losses

    def _without_exchange(self) -> AbstractContextManager:
        """Gradients are exchanged between the processes with the last part."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def averaged(self) -> AbstractContextManager:
        """Within, the model has the average weights, if there is one."""
        return nullcontext() if self.average is None else self.average.applied()


class GradientClipper:
    """Clips gradients before each step of an optimizer, as ``SOLVER.CLIP_GRADIENTS`` says; no step waits for a GPU.

    ``CLIP_TYPE`` "value" and "norm" are Detectron2's: of each element to [-CLIP_VALUE, CLIP_VALUE], and of each
    parameter's gradient by itself to a norm of ``CLIP_VALUE``. "full_model" scales all gradients by one factor, so that
    their norm together is at most ``CLIP_VALUE``; their direction stays. Gradients of a scaled loss have to be unscaled
    before the step.

    Attributes:
        norm: Euclidean norm of all gradients together, before they were clipped in the last step: 0-dimensional, on the
            device of the gradients. None before the first step.
    """

    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        self._options = cfg.SOLVER.CLIP_GRADIENTS.clone()
        self.norm: Tensor | None = None
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        parameters = [x for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
        options, gradients = self._options, [x.grad for x in parameters]
        self.norm = get_total_norm(gradients)
        if not options.ENABLED:
            return
        if options.CLIP_TYPE == "full_model":
            norm = self.norm if options.NORM_TYPE == 2 else get_total_norm(gradients, options.NORM_TYPE)
            clip_grads_with_norm_(parameters, options.CLIP_VALUE, norm)
        elif options.CLIP_TYPE == "norm":
            for parameter in parameters:
                clip_grad_norm_(parameter, options.CLIP_VALUE, options.NORM_TYPE)
        else:
            clip_grad_value_(parameters, options.CLIP_VALUE)


class HealthLog:
    """Writes a line on the health of the head whenever a training logs, and warns of one that is dying.

    Args:
        model: with an :class:`~group_sampling.criterion.AnchorCriterion`; of another one nothing is known.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        criteria = [module for module in model.modules() if isinstance(module, AnchorCriterion)]
        self._monitor = criteria[0].monitor if criteria else None
        # A scale that tells no faces by then does not learn them; a short training has had a quarter of its time.
        self._watch = HealthWatch(max(200, min(cfg.SOLVER.MAX_ITER // 4, cfg.SOLVER.WARMUP_ITERS + 1000)))

    def read(self, iteration: int, norms: Sequence[float]) -> dict[str, float]:
        """Log the health since the last call; returns it as metrics "health/...". Waits for a GPU.

        Args:
            iteration: the last one.
            norms: of the gradients of each iteration since the last call.
        """
        health = None if self._monitor is None else self._monitor.read()
        if health is None:
            return {}
        peak = max(norms)
        logger.info(f"iter: {iteration}  {health}  grad_norm: {statistics.median(norms):.3g}, at most {peak:.3g}")
        for warning in self._watch.warnings(iteration, health):
            logger.warning(
                f"iteration {iteration}: {warning}. The loss may look fine all the same. What helps from scratch: "
                "clipped gradients (SOLVER.CLIP_GRADIENTS), a lower SOLVER.BASE_LR, MODEL.FPN.NORM GN."
            )
        return {**health.metrics(), **({"health/grad_norm_max": peak} if math.isfinite(peak) else {})}


class _Step(NamedTuple):
    iteration: int
    losses: dict[str, Tensor]
    files: list[str | None]
    status: Tensor  # (2,) on the CPU, valid once ``copied`` is over: failed, number of the signal to stop for
    copied: torch.cuda.Event | None


class FiniteLossGuard:
    """Stops all processes of a run when the loss of one of them is not finite, with no weight changed by it.

    A fused optimizer skips an update itself when its ``found_inf`` is set, which is how gradient scalers stop one
    without asking the GPU. The guard sets it and raises in the next step, before its update: the host waits only while
    it is a whole step ahead of the GPU. Any other optimizer has to be stopped before its step: the guard then raises at
    once, which on the CPU costs nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._is_late = bool(optimizer.defaults.get("fused"))
        self._failed: Tensor | None = None  # (1,) on the device of the loss: 1 where it is not finite
        self._last: _Step | None = None
        self.stop_signal = 0
        if self._is_late:
            optimizer.register_step_pre_hook(self._skip)
            optimizer.register_load_state_dict_post_hook(_keep_implementation)

    def watch(self, iteration: int, losses: Mapping[str, Tensor], files: Sequence[str | None]) -> None:
        """Call it in every process after each forward pass, before the optimizer's step.

        Args:
            losses: of this process; their sum is trained on.
            files: the images of this process's batch.

        Raises:
            FloatingPointError: a loss, of the previous step with a fused optimizer, is not finite in some process.
        """
        failed = (~functools.reduce(torch.add, losses.values()).detach().isfinite()).float().reshape(1)
        status = torch.cat([failed, failed.new_full((1,), stop.handler.pending)])
        if world_size() > 1:
            dist.all_reduce(status, dist.ReduceOp.MAX)
        self._failed = status[:1]
        copied = None
        on_host = status.to("cpu", non_blocking=True)  # into pinned memory
        if status.device.type != "cpu":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(status.device))
        previous, detached = self._last, {name: loss.detach() for name, loss in losses.items()}
        self._last = _Step(iteration, detached, list(files), on_host, copied)
        if not self._is_late:
            self.check()
        elif previous is not None:
            self._read(previous)

    def check(self) -> None:
        """Wait for the last step that was watched: before weights are saved or used, no bad loss may be unseen.

        Raises:
            FloatingPointError: as :meth:`watch`, of the last step.
        """
        if self._last is not None:
            self._read(self._last)

    def _read(self, step: _Step) -> None:
        if step.copied is not None:
            step.copied.synchronize()
        has_failed, self.stop_signal = map(int, step.status.tolist())
        if not has_failed:
            return
        values = {name: loss.item() for name, loss in step.losses.items()}
        where = "another process" if all(map(math.isfinite, values.values())) else "this process"
        raise FloatingPointError(
            f"iteration {step.iteration}: the loss of {where} is not finite. No weight was changed. The losses of this "
            f"process are {values}, its images {step.files}"
        )

    def _skip(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """Step hook: no update with a bad loss; a gradient scaler may have its own reason to skip it."""
        if self._failed is not None:
            found_inf = getattr(optimizer, "found_inf", None)
            failed = self._failed if found_inf is None else torch.maximum(self._failed, found_inf)
            optimizer.found_inf = failed  # type: ignore[attr-defined]  # fused optimizers read it; undeclared in torch


def _keep_implementation(optimizer: torch.optim.Optimizer) -> None:
    """Load hook. A checkpoint says which implementation wrote it, and the guard relies on this run's."""
    for group in optimizer.param_groups:
        group.update({key: optimizer.defaults[key] for key in ("foreach", "fused")})
