"""What a training logs of the samples that it draws, and of the head that learns from them.

A head can die while its loss looks fine: a bias alone learns the share of the positives. What shows it is how many of
its hidden units still fire, and whether its scores tell positives from negatives, at each scale by itself.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .anchors import AnchorGrid
from .ops import AssignResult

T = TypeVar("T")

# A head is in danger when fewer of its units fire, a scale when its logits spread less, or when the mean scores of its
# positives and its negatives, of which it takes as many to say so, are closer to each other.
MIN_UNITS = 0.25
MIN_SPREAD = 1e-5
MIN_GAP = 0.01
MIN_COUNT = 10


def sum_by_scale(scale_ids: Tensor, values: Sequence[Tensor], num_scales: int) -> Tensor:
    """(r, S) float64 sums over each scale of r values (k,); does not wait for a GPU.

    Args:
        scale_ids: (k,) int64 in [0, S).
    """
    is_of_scale = scale_ids[:, None] == torch.arange(num_scales, device=scale_ids.device)
    return torch.stack([value.double() for value in values]) @ is_of_scale.double()


def count_by_scale(scale_ids: Tensor, labels: Tensor, num_scales: int) -> Tensor:
    """(2, S) float32 numbers of positives and negatives of each scale; does not wait for a GPU.

    Args:
        scale_ids: (k,) int64 in [0, S).
        labels: (k,) 1 positive, 0 negative; others are not counted.
    """
    return sum_by_scale(scale_ids, (labels == 1, labels == 0), num_scales).float()


def count_anchors(grid: AnchorGrid, chosen: AssignResult, weights: Tensor) -> Tensor:
    """(2, S) float64 numbers of the chosen positives and negatives of each scale, whatever groups they were chosen in.

    Args:
        weights: (B, G, N) what each of ``chosen`` counts.
    """
    index = chosen.indices.flatten().clamp(min=0)
    counts = [((chosen.labels == label) * weights).flatten() for label in (1, 0)]
    return sum_by_scale(grid.group_ids_at(index), counts, grid.num_groups)


def name_counts(stage: str, scales: Sequence[float], num_pos: Sequence[T], num_neg: Sequence[T]) -> dict[str, T]:
    """Counts of each scale under the names that both engines log: "rpn/num_pos@16", "rpn/num_neg@16", ..."""
    return {
        f"{stage}/{name}@{scale:g}": count
        for name, counts in (("num_pos", num_pos), ("num_neg", num_neg))
        for scale, count in zip(scales, counts)
    }


@dataclass(frozen=True)
class HeadHealth:
    """Of the anchors that were drawn in some training steps.

    Attributes:
        units: share of the head's hidden units that fired for one of them; None: not known.
        scales: (S,) anchor scales in pixels.
        spread: (S,) standard deviation of their logits within a step, since a head that tells nothing apart still
            changes from step to step; NaN for none.
        counts: (S,) numbers of positives and negatives.
        scores: (S,) mean scores of the positives and of the negatives; NaN for none.
    """

    units: float | None
    scales: tuple[float, ...]
    spread: tuple[float, ...]
    counts: tuple[tuple[float, float], ...]
    scores: tuple[tuple[float, float], ...]

    def metrics(self) -> dict[str, float]:
        """ "health/units", and of each scale "health/logit_std@16", "health/score_pos@16", "health/score_neg@16"."""
        values = {} if self.units is None else {"health/units": self.units}
        for scale, spread, (positive, negative) in zip(self.scales, self.spread, self.scores):
            named = {"logit_std": spread, "score_pos": positive, "score_neg": negative}
            values.update({f"health/{name}@{scale:g}": value for name, value in named.items()})
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def __str__(self) -> str:
        units = "" if self.units is None else f"units: {100 * self.units:.0f}%  "
        spread = " ".join(f"@{scale:g} {value:.3g}" for scale, value in zip(self.scales, self.spread))
        scores = " ".join(f"@{s:g} {pos:.2f}/{neg:.2f}" for s, (pos, neg) in zip(self.scales, self.scores))
        return f"health: {units}logit_std: {spread}  score pos/neg: {scores}"


class HeadMonitor:
    """Sums up on the device, over training steps, what :class:`HeadHealth` says of them; no step waits for a GPU."""

    def __init__(self):
        self._scales: tuple[float, ...] = ()
        self._sums: Tensor | None = None
        self._fired: Tensor | None = None

    @torch.no_grad()
    def add(self, grid: AnchorGrid, chosen: AssignResult, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a step; returns its (S,) float32 numbers of positives and of negatives.

        Args:
            chosen: B images, G groups of N.
            logits: (B, G, N).
        """
        labels, index = chosen.labels.flatten(), chosen.indices.flatten().clamp(min=0)
        logits = torch.where(labels >= 0, logits.flatten().double(), 0.0)
        scores, is_positive, is_negative = logits.sigmoid(), labels == 1, labels == 0
        values = (is_positive, is_negative, is_positive * scores, is_negative * scores, logits, logits**2)
        sums = sum_by_scale(grid.group_ids_at(index), values, grid.num_groups)
        num_pos, num_neg, *_, total, squares = sums
        sums[5] = (squares - total**2 / (num_pos + num_neg).clamp(min=1)).clamp(min=0)  # squared deviations
        self._scales = grid.scales
        self._sums = sums if self._sums is None else self._sums + sums
        return num_pos.float(), num_neg.float()

    def add_units(self, fired: Tensor) -> None:
        """Add which of the (C,) hidden units fired in a step."""
        self._fired = fired if self._fired is None else self._fired | fired

    def read(self) -> HeadHealth | None:
        """The health over the steps since the last call; None for none. Waits for a GPU."""
        if self._sums is None:
            return None
        num_pos, num_neg, pos_scores, neg_scores, _, deviations = self._sums.cpu()
        units = None if self._fired is None else self._fired.double().mean().item()
        self._sums = self._fired = None
        return HeadHealth(
            units,
            self._scales,
            tuple((deviations / (num_pos + num_neg)).sqrt().tolist()),
            tuple(zip(num_pos.tolist(), num_neg.tolist())),
            tuple(zip((pos_scores / num_pos).tolist(), (neg_scores / num_neg).tolist())),
        )


class HealthWatch:
    """Tells, reading after reading of a training, when a head is dying or dead; each finding once while it lasts.

    Units that stop firing and logits that are constant are told at once. A scale that scores positives and negatives
    alike is told once it has told them apart before, or from an iteration on by which it should have.

    Args:
        patience: that iteration.
    """

    def __init__(self, patience: int):
        self._patience = patience
        self._has_learned: set[float] = set()
        self._told: set[tuple[str, float]] = set()

    def warnings(self, iteration: int, health: HeadHealth) -> list[str]:
        """What is new since the last reading.

        Args:
            iteration: the last one that ``health`` is of.
        """
        found = dict(self._find(iteration, health))
        new = [text for key, text in found.items() if key not in self._told]
        self._told = set(found)
        return new

    def _find(self, iteration: int, health: HeadHealth) -> Iterable[tuple[tuple[str, float], str]]:
        if health.units is not None and health.units < MIN_UNITS:
            yield ("units", 0.0), f"{100 * health.units:.0f}% of the head's hidden units fire: the others are dead"
        for scale, spread, counts, scores in zip(health.scales, health.spread, health.counts, health.scores):
            if sum(counts) >= MIN_COUNT and spread < MIN_SPREAD:
                yield ("spread", scale), f"scale {scale:g}: all anchors have the same score"
                continue
            if min(counts) < MIN_COUNT:
                continue
            gap = abs(scores[0] - scores[1])
            if gap >= 10 * MIN_GAP:
                self._has_learned.add(scale)
            if gap < MIN_GAP and (iteration >= self._patience or scale in self._has_learned):
                text = f"scale {scale:g}: positives and negatives score alike ({scores[0]:.3f} and {scores[1]:.3f})"
                yield ("gap", scale), text
