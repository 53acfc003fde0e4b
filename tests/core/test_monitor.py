"""What is logged of a training's samples and of its head, against sums written out anchor by anchor."""

import math
import statistics

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.monitor import HeadHealth, HeadMonitor, HealthWatch
from group_sampling.ops import AssignResult

GRID = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64], [1.0])], [4], [(8, 8)])


def make_draw(seed, num_groups=1, count=60):
    """Random anchors of all scales in one group, or of each scale in its own; a tenth of the places is empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_groups, count)
    index = torch.randint(GRID.num_anchors, shape, generator=generator)
    labels = torch.randint(2, shape, generator=generator, dtype=torch.int8)
    empty = torch.rand(shape, generator=generator) < 0.1
    index, labels = index.masked_fill(empty, -1), labels.masked_fill(empty, -1)
    counts = (labels == 1).sum(-1), (labels == 0).sum(-1)
    return AssignResult(index, labels, torch.zeros_like(index), *counts), torch.randn(shape, generator=generator)


def test_health_of_two_steps():
    monitor = HeadMonitor()
    assert monitor.read() is None
    rows, squares = [], {16.0: 0.0, 32.0: 0.0, 64.0: 0.0}  # scale, label, logit; deviations from each step's mean
    for seed in (0, 1):
        chosen, logits = make_draw(seed)
        step = []
        for index, label, logit in zip(*(x.flatten().tolist() for x in (chosen.indices, chosen.labels, logits))):
            if index >= 0:
                step.append((GRID.scales[int(GRID.group_ids()[index])], label, logit))
        num_pos, num_neg = monitor.add(GRID, chosen, logits)
        for label, counts in ((1, num_pos), (0, num_neg)):
            assert counts.tolist() == [sum(row[:2] == (scale, label) for row in step) for scale in GRID.scales]
        monitor.add_units(torch.tensor([True, seed == 0, False, seed == 1, False]))
        for scale in squares:
            logits = [logit for s, _, logit in step if s == scale]
            squares[scale] += len(logits) * statistics.pvariance(logits)
        rows += step
    health = monitor.read()
    assert health.units == 0.6 and health.scales == (16.0, 32.0, 64.0)
    for i, scale in enumerate(health.scales):
        assert health.spread[i] ** 2 == pytest.approx(squares[scale] / sum(s == scale for s, *_ in rows))
        for label, score, count in zip((1, 0), health.scores[i], health.counts[i]):
            scores = [1 / (1 + math.exp(-x)) for s, y, x in rows if (s, y) == (scale, label)]
            assert score == pytest.approx(statistics.mean(scores)) and count == len(scores)
    assert monitor.read() is None  # a reading starts anew
    monitor.add(GRID, *make_draw(2))
    assert monitor.read().units is None


def test_constant_logits_have_no_spread():
    chosen, logits = make_draw(0)
    monitor = HeadMonitor()
    for step in range(20):
        monitor.add(GRID, chosen, torch.full_like(logits, step - 17.3))
    assert max(monitor.read().spread) < 1e-6


def test_scales_without_anchors_are_left_out():
    chosen, logits = make_draw(0)
    of_16 = GRID.group_ids()[chosen.indices.clamp(min=0)] == 0
    chosen = chosen._replace(labels=chosen.labels.masked_fill(~of_16, -1).masked_fill(chosen.labels == 1, -1))
    monitor = HeadMonitor()
    monitor.add(GRID, chosen, logits)
    health = monitor.read()
    assert health.metrics().keys() == {"health/logit_std@16", "health/score_neg@16"}
    assert HealthWatch(0).warnings(500, health) == []


def health_of(units=1.0, spread=(1.0, 1.0), scores=((0.8, 0.1), (0.7, 0.2)), counts=((50.0, 150.0),) * 2):
    return HeadHealth(units, (16.0, 128.0), spread, counts, scores)


def test_a_healthy_head_and_a_young_one_raise_no_warning():
    watch = HealthWatch(200)
    assert watch.warnings(19, health_of(spread=(1e-3, 1e-4), scores=((0.5, 0.5), (0.25, 0.251)))) == []
    for iteration in (199, 219, 999):
        assert watch.warnings(iteration, health_of(units=0.3)) == []
    hardest = ((0.1, 0.9), (0.2, 0.7))  # online hard example mining
    assert watch.warnings(1019, health_of(scores=hardest)) == []


def test_dead_units_are_told_at_once_and_once():
    watch = HealthWatch(200)
    (warning,) = watch.warnings(19, health_of(units=15 / 64))
    assert "23% of the head's hidden units fire" in warning
    assert watch.warnings(39, health_of(units=0.0)) == []
    assert watch.warnings(59, health_of()) == []
    assert len(watch.warnings(79, health_of(units=0.1))) == 1  # again


def test_a_scale_of_constant_logits_is_named():
    (warning,) = HealthWatch(200).warnings(19, health_of(spread=(1.0, 1e-7), scores=((0.8, 0.1), (0.25, 0.25))))
    assert warning == "scale 128: all anchors have the same score"


def test_a_scale_that_never_learns_is_told_when_it_should_have():
    watch, never = HealthWatch(200), health_of(scores=((0.8, 0.1), (0.254, 0.249)))
    assert watch.warnings(199, never) == []
    assert watch.warnings(219, never) == ["scale 128: positives and negatives score alike (0.254 and 0.249)"]
    assert watch.warnings(239, never) == []


def test_a_scale_that_forgets_is_told_at_once():
    watch = HealthWatch(200)
    assert watch.warnings(19, health_of()) == []
    (warning,) = watch.warnings(39, health_of(scores=((0.3, 0.3), (0.7, 0.2))))
    assert warning.startswith("scale 16: ")


def test_few_samples_say_nothing():
    few = health_of(scores=((0.8, 0.1), (0.25, 0.25)), counts=((50.0, 150.0), (9.0, 500.0)))
    assert HealthWatch(0).warnings(500, few) == []
    assert HealthWatch(0).warnings(500, health_of(spread=(1.0, 0.0), counts=((50.0, 150.0), (3.0, 6.0)))) == []
