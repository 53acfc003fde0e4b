"""The permutation's quality: uniform, independent between iterations, images and groups, everything reachable.

Every test states the hypothesis it tests and rejects it below p = 1e-4. Seeds are fixed, so a run is red or green for
good; the smallest p of the code as it is stands next to each test. MUTATIONS shows that broken permutations fail.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample, extension_status, reference, sample_groups

LIMIT = 1e-4


def draws(size, trials, samples, seed=0, iteration=0):
    """(trials, samples) draws from one group of ``size`` negatives: the images of a batch differ by number only."""
    if not extension_status().loaded:
        pytest.skip("millions of draws take too long on the torch reference, which other tests show to draw the same")
    grid = AnchorGrid.from_cell_anchors([cell_anchors([16], [1.0])], [4], [(1, size)])
    no_faces = [torch.empty(0, 4)] * trials
    return (
        assign_and_sample(grid, no_faces, samples_per_group=samples, seed=seed, iteration=iteration)
        .indices[:, 0]
        .numpy()
    )


def p_of_counts(counts, expected):
    """p of Pearson's chi-square for counts against equal expectations."""
    counts = np.asarray(counts, dtype=float)
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1)


def p_of_inclusion(counts, trials, samples, size):
    """p that every anchor is drawn equally often when each trial draws without replacement.

    Counts of one trial are negatively correlated; the corrected statistic is again chi-square with size - 1 degrees.
    """
    share = samples / size
    statistic = ((counts - trials * share) ** 2).sum() / (trials * share * (1 - share)) * (size - 1) / size
    return chi2.sf(statistic, size - 1)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 16, 100, 1000, 1024, 5000])  # p >= 0.12
def test_first_place_is_uniform(size):
    trials = 40 * size + 20000
    first = draws(size, trials, 1)[:, 0]
    assert p_of_counts(np.bincount(first, minlength=size), trials / size) > LIMIT


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 9, 12, 40])  # p >= 0.09
def test_first_two_places_are_an_independent_pair(size):
    trials = 100000
    pair = draws(size, trials, 2)
    counts = np.bincount(pair[:, 0] * size + pair[:, 1], minlength=size * size).reshape(size, size)
    assert not counts.diagonal().any()
    off = counts[~np.eye(size, dtype=bool)]
    assert p_of_counts(off, trials / off.size) > LIMIT


@pytest.mark.parametrize("size", [1024, 1500, 90000])  # p >= 0.13
def test_pairs_of_large_groups_have_no_structure(size):
    """Where the first anchor lies and how far on the second one is, both in sixteenths of the group."""
    trials = 50000
    pair = draws(size, trials, 2)
    first, onward = pair[:, 0] * 16 // size, (pair[:, 1] - pair[:, 0]) % size * 16 // size
    cells = np.arange(size) * 16 // size
    share = np.bincount(cells)[:, None] * np.bincount(cells[1:])[None, :] / (size * (size - 1))  # a step of 0 is out
    counts = np.bincount(first * 16 + onward, minlength=256).reshape(16, 16)
    assert p_of_counts(counts, trials * share) > LIMIT


def test_three_places_of_three_take_all_orders():  # p = 0.69
    orders = draws(3, 60000, 3)
    counts = np.bincount(orders @ [9, 3, 1], minlength=27)
    assert p_of_counts(counts[counts > 0], 60000 / 6) > LIMIT
    assert (counts > 0).sum() == 6


@pytest.mark.parametrize("size, samples", [(50, 10), (1000, 64), (2500, 64)])  # p >= 0.06
def test_every_eligible_anchor_is_drawn_equally_often(size, samples):
    """Negatives among positives and ignored anchors; the eligible ones are every third."""
    labels = torch.full((size,), -1, dtype=torch.int8)
    labels[::3] = 0
    labels[1::3] = 1
    trials = 20000
    groups = torch.zeros(size, dtype=torch.int64)
    indices = sample_groups(labels.expand(trials, size), groups, num_groups=1, samples_per_group=samples, seed=0)
    indices = indices.indices[:, 0].numpy()
    num_pos = samples // 4
    for part, label in ((indices[:, :num_pos], 1), (indices[:, num_pos:], 0)):
        eligible = (labels == label).nonzero().squeeze(1).numpy()
        drawn = part[part >= 0]
        per_trial = min(part.shape[1], len(eligible))
        counts = np.bincount(drawn, minlength=size)
        assert counts.sum() == counts[eligible].sum() == trials * per_trial
        if per_trial < len(eligible):
            assert p_of_inclusion(counts[eligible], trials, per_trial, len(eligible)) > LIMIT
        assert (counts[eligible] > 0).all()


@pytest.mark.parametrize("name", ["iteration", "first_image", "seed"])  # p >= 0.43
def test_consecutive_keys_draw_independently(name):
    """First anchors under keys k and k + 1 of 12 anchors: all 144 pairs equally often."""
    labels, groups = torch.zeros(1, 12, dtype=torch.int8), torch.zeros(12, dtype=torch.int64)
    base = {"seed": 7, "iteration": 0, "first_image": 0}
    trials = 6000
    first = np.array(
        [
            sample_groups(labels, groups, num_groups=1, samples_per_group=1, **{**base, name: k}).indices.item()
            for k in range(trials + 1)
        ]
    )
    counts = np.bincount(first[:-1] * 12 + first[1:], minlength=144)
    assert p_of_counts(counts, trials / 144) > LIMIT


@pytest.mark.parametrize("size", [3, 12, 1100])  # p >= 0.014, of 45
def test_every_two_iterations_are_independent(size):
    """First anchors, in tenths of the group where it is large, of 20,000 images under each pair of six iterations."""
    trials, cells = 20000, min(size, 10) if size > 100 else size
    share = np.bincount(np.arange(size) * cells // size) / size
    first = [draws(size, trials, 1, iteration=i)[:, 0] * cells // size for i in range(6)]
    for one, other in itertools.combinations(first, 2):
        counts = np.bincount(one * cells + other, minlength=cells * cells).reshape(cells, cells)
        assert p_of_counts(counts, trials * np.outer(share, share)) > LIMIT


def test_groups_draw_independently():  # p = 0.92
    groups = torch.arange(24) // 12
    labels = torch.zeros(20000, 24, dtype=torch.int8)
    first = sample_groups(labels, groups, num_groups=2, samples_per_group=1, seed=5).indices[:, :, 0].numpy()
    counts = np.bincount(first[:, 0] * 12 + first[:, 1] - 12, minlength=144)
    assert p_of_counts(counts, 20000 / 144) > LIMIT


def test_overlap_of_two_iterations_is_hypergeometric():  # p = 0.58
    """Draws of 50 from 500 in two iterations share 5 on average, with the variance of independent draws."""
    trials, size, samples = 4000, 500, 50
    first, second = (draws(size, trials, samples, iteration=i) for i in (1, 2))
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(first, second)])
    mean = samples**2 / size
    variance = mean * (1 - samples / size) * (size - samples) / (size - 1)
    z = (shared.mean() - mean) / np.sqrt(variance / trials)
    assert chi2.sf(z**2, 1) > LIMIT
    assert 0.9 < shared.var() / variance < 1.1


def broken_constant_key(*parts):
    return 12345


def broken_ignores_iteration(seed, iteration, image, group):
    return (seed * 7919 + image // 8 * 31 + group) * 0x9E3779B97F4A7C15


def broken_affine(size, key, device=None):
    """x -> x + k: a permutation, but neighbors stay neighbors."""
    return (torch.arange(size) + key % size) % size


MUTATIONS = {"draw_key": [broken_constant_key, broken_ignores_iteration], "permutation": [broken_affine]}


@pytest.mark.parametrize("name, mutation", [(name, m) for name, ms in MUTATIONS.items() for m in ms])
def test_a_broken_permutation_is_noticed(monkeypatch, name, mutation):
    """The pair test, on the reference with one function replaced, must reject."""
    monkeypatch.setattr(reference, name, mutation)
    size, trials = 12, 600
    labels = torch.zeros(trials, size, dtype=torch.int8)
    indices = reference.sample_groups(labels, [torch.arange(size)], 2, 0.25, 0, 0, 0)[0][:, 0].numpy()
    counts = np.bincount(indices[:, 0] * size + indices[:, 1], minlength=size * size).reshape(size, size)
    off = counts[~np.eye(size, dtype=bool)]
    assert p_of_counts(off, trials / off.size) < 1e-12


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_are_noticed(monkeypatch, rounds):
    monkeypatch.setattr(reference, "_ROUNDS_SMALL", rounds)
    size, trials = 12, 1200
    labels = torch.zeros(trials, size, dtype=torch.int8)
    indices = reference.sample_groups(labels, [torch.arange(size)], 2, 0.25, 0, 0, 0)[0][:, 0].numpy()
    counts = np.bincount(indices[:, 0] * size + indices[:, 1], minlength=size * size).reshape(size, size)
    off = counts[~np.eye(size, dtype=bool)]
    assert p_of_counts(off, trials / off.size) < 1e-12
