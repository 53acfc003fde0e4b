"""Exponential moving average of a training's weights, on either engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Average of a model's trained parameters over its training steps (``SOLVER.EMA``).

    After each step, average = decay * average + (1 - decay) * parameter; the first step sets it. Frozen parameters
    never change, and the statistics of batch norms are running averages already: of both the model's are used.

    The state dict has the parameters in training while the averages are in the model (:meth:`applied`), as a
    checkpoint has them: its "model" are the averages, which whoever loads it detects with.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._average = get_ema_multi_avg_fn(decay)
        self._averages: dict[str, Tensor] = {}
        self._in_training: dict[str, Tensor] = {}  # what the averages replace in the model

    @torch.no_grad()
    def update(self) -> None:
        """Call it after each step of the optimizer; the host does not wait."""
        if self._averages:
            self._average(list(self._averages.values()), list(self._parameters.values()), 0)
        else:
            self._averages = {name: value.detach().clone() for name, value in self._parameters.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averages, after its first step."""
        if self._in_training or not self._averages:
            yield
            return
        self._in_training = {name: value.detach().clone() for name, value in self._parameters.items()}
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(self._in_training)
            self._in_training = {}

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The parameters in training, by name."""
        return dict(self._in_training or {name: value.detach() for name, value in self._parameters.items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the model's parameters as averages and those of ``state`` in training.

        Raises:
            ValueError: the names or shapes are not the model's.
        """
        found, expected = ({name: tuple(x.shape) for name, x in y.items()} for y in (state, self._parameters))
        if found != expected:
            name = min(name for name, _ in found.items() ^ expected.items())
            raise ValueError(f"ema: expected {name} of shape {expected.get(name)}, got {found.get(name)}")
        self._averages = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._write(state)
