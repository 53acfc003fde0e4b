"""Optimizer and learning rates of the torchvision engine, as Detectron2's solver has them."""

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD with Detectron2's parameter groups: ``WEIGHT_DECAY_NORM`` for the norms, ``WEIGHT_DECAY`` for the rest.

    On a GPU it is fused, so that :class:`~group_sampling.engines.step.FiniteLossGuard` need not wait for the losses.
    """
    norms, others = [], []
    for module in model.modules():
        group = norms if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) else others
        group += [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    is_fused = next(model.parameters()).device.type != "cpu"
    return torch.optim.SGD(
        [{"params": others}, {"params": norms, "weight_decay": cfg.SOLVER.WEIGHT_DECAY_NORM}],
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        foreach=False,  # on a CPU it takes memory and time for copies of all gradients, for the same bits
        fused=is_fused,
    )


def build_lr_schedule(cfg: CfgNode) -> ParamScheduler:
    """Detectron2's ``WarmupMultiStepLR``: the factor of ``BASE_LR`` at iteration / ``MAX_ITER``."""
    solver = cfg.SOLVER
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    schedule = MultiStepParamScheduler(
        values=[solver.GAMMA**k for k in range(len(steps) + 1)], milestones=steps, num_updates=solver.MAX_ITER
    )
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    start = solver.WARMUP_FACTOR * schedule(0.0)
    if solver.WARMUP_METHOD == "constant":
        warmup = ConstantParamScheduler(start)
    else:
        warmup = LinearParamScheduler(start, schedule(length))
    return CompositeParamScheduler(
        [warmup, schedule], lengths=[length, 1 - length], interval_scaling=["rescaled", "fixed"]
    )
