"""How a training computes its backbone: layout of the tensors, recomputed activations, compilation."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..config import ConfigError


def prepare_network(cfg: CfgNode, model: nn.Module, block_types: tuple[type[nn.Module], ...]) -> None:
    """Apply ``MODEL.CHANNELS_LAST``, ``MODEL.BACKBONE.RECOMPUTE`` and ``MODEL.BACKBONE.COMPILE`` to a model, in place.

    Names and values of its parameters stay.

    Args:
        model: its "backbone" is compiled, with the FPN.
        block_types: the classes of what is recomputed by itself.

    Raises:
        ConfigError: the backbone has no blocks, and they shall be recomputed.
    """
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    if cfg.MODEL.BACKBONE.RECOMPUTE:
        blocks = [module for module in model.get_submodule("backbone").modules() if isinstance(module, block_types)]
        if not blocks:
            raise ConfigError(
                f"MODEL.BACKBONE.RECOMPUTE: expected a ResNet of this engine, got {cfg.MODEL.BACKBONE.NAME}, which has "
                "no block that could be recomputed by itself"
            )
        for block in blocks:
            if any(parameter.requires_grad for parameter in block.parameters()):
                _recompute(block)
    if cfg.MODEL.BACKBONE.COMPILE:
        _compile(model.get_submodule("backbone"))


def _recompute(block: nn.Module) -> None:
    """Let ``block`` keep its inputs alone for the backward pass, which runs it again."""
    forward = block.forward
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _still(norms)

    @functools.wraps(forward)
    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        # No block draws random numbers.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    block.forward = recomputed  # type: ignore[method-assign]  # an instance's forward hides that of its class


@contextmanager
def _still(norms: list[_BatchNorm]) -> Iterator[None]:
    """Within, no statistics of batch norms move: they have seen the batch already."""
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _compile(backbone: nn.Module) -> None:
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import

    compiled, plain = torch.compile(backbone.forward), backbone.forward

    @functools.wraps(plain)
    def forward(*args: Any) -> Any:
        if not backbone.training:  # images of a test have many sizes, and would be compiled for
            return plain(*args)
        try:
            return compiled(*args)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"MODEL.BACKBONE.COMPILE: torch cannot compile it here: {reason}") from error

    backbone.forward = forward  # type: ignore[method-assign]
