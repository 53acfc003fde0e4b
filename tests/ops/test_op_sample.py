"""sample_groups, assign_and_sample: exact counts, and the same draw from the oracle, the reference, C++ and CUDA."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracles import oracle_counts, oracle_draw, oracle_match
from strategies import devices, examples, scenes

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample, match_anchor_grid, reference, sample_groups


def assert_same(results, want):
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, want))


def check_scene(scene, device, walk):
    gts, ignores = scene.tensors(device)
    draw = scene.draw
    labels, matched_gt, _ = match_anchor_grid(scene.grid, gts, ignore_boxes=ignores, **scene.match)
    want_labels = [
        oracle_match(
            scene.grid.boxes(dtype=scene.dtype).numpy(),
            scene.gt_boxes[image],
            ignore_boxes=None if ignores is None else scene.ignore_boxes[image],
            **scene.match,
        )[0]
        for image in range(len(gts))
    ]
    for grid in (scene.grid, scene.grid.merged()):
        members = [grid.group_members(group, device) for group in range(grid.num_groups)]
        sample = sample_groups(labels, grid, **draw)
        assert_same(sample, reference.sample_groups(labels, members, **draw))
        both = assign_and_sample(grid, gts, ignore_boxes=ignores, **draw, **scene.match)
        assert_same((both.indices, both.num_pos, both.num_neg), sample)

        # What assign_and_sample says of the anchors it drew.
        drawn = both.indices >= 0
        if scene.grid.num_anchors:
            at = both.indices.clamp(min=0).flatten(1)
            assert torch.equal(both.labels[drawn], labels.gather(1, at).view_as(both.indices)[drawn])
            assert torch.equal(both.matched_gt[drawn], matched_gt.gather(1, at).view_as(both.indices)[drawn])
        assert (both.labels[~drawn] == -1).all()
        assert (both.matched_gt[both.labels != 1] == -1).all()

        for image in range(len(gts)):
            for group, member in enumerate(members):
                member = member.tolist()
                num_pos, num_neg = oracle_counts(
                    want_labels[image], member, draw["samples_per_group"], draw["positive_fraction"]
                )
                row = both.indices[image, group].tolist()
                assert (both.num_pos[image, group].item(), both.num_neg[image, group].item()) == (num_pos, num_neg)
                taken, padding = row[: num_pos + num_neg], row[num_pos + num_neg :]
                assert set(padding) <= {-1}
                assert len(set(taken)) == len(taken)
                assert set(taken) <= set(member)
                assert [want_labels[image][i] for i in taken] == [1] * num_pos + [0] * num_neg
                if walk:
                    key = (draw["seed"], draw["iteration"], draw["first_image"] + image, group)
                    assert row == oracle_draw(
                        want_labels[image], member, draw["samples_per_group"], draw["positive_fraction"], key
                    )


@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(700))
@given(scene=scenes())
def test_counts_and_equality(device, scene):
    check_scene(scene, device, walk=False)


@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(200))
@given(scene=scenes(max_cells=40))
def test_draws_what_the_walk_of_the_permutation_draws(device, scene):
    check_scene(scene, device, walk=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two of CPU time, which a busy machine may not give
@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(6000))
@given(scene=scenes(max_cells=600, max_faces=25))
def test_counts_and_equality_on_larger_scenes(device, scene):
    check_scene(scene, device, walk=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two of CPU time, which a busy machine may not give
@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(5000))
@given(scene=scenes(max_cells=120, max_faces=12))
def test_draws_what_the_walk_draws_on_many_scenes(device, scene):
    check_scene(scene, device, walk=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two of CPU time, which a busy machine may not give
@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(500))
@given(scene=scenes(max_cells=800))
def test_draws_what_the_walk_draws_on_larger_scenes(device, scene):
    check_scene(scene, device, walk=True)


def check_group_ids(scene, device):
    """sample_groups with group ids in any order, of which 3 and -1 belong to no group."""
    gts, _ = scene.tensors(device)
    labels = match_anchor_grid(scene.grid, gts, **scene.match).labels
    rng = np.random.default_rng(scene.draw["iteration"])
    ids = torch.from_numpy(rng.integers(-1, 4, scene.grid.num_anchors)).to(device)
    result = sample_groups(labels, ids, num_groups=3, **scene.draw)
    members = [(ids == group).nonzero().squeeze(1) for group in range(3)]
    assert_same(result, reference.sample_groups(labels, members, **scene.draw))
    options = scene.draw["samples_per_group"], scene.draw["positive_fraction"]
    for image in range(len(gts)):
        for group, member in enumerate(members):
            key = (scene.draw["seed"], scene.draw["iteration"], scene.draw["first_image"] + image, group)
            want = labels[image].tolist(), member.tolist(), *options
            assert (result.num_pos[image, group].item(), result.num_neg[image, group].item()) == oracle_counts(*want)
            assert result.indices[image, group].tolist() == oracle_draw(*want, key)


@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(100))
@given(scene=scenes())
def test_group_ids_in_any_order(device, scene):
    check_group_ids(scene, device)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two of CPU time, which a busy machine may not give
@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(5000))
@given(scene=scenes(max_cells=120, max_faces=12))
def test_group_ids_in_any_order_on_many_scenes(device, scene):
    check_group_ids(scene, device)


@pytest.mark.parametrize("device", devices())
def test_one_to_three_and_fill_up(device):
    labels = torch.zeros(1000, dtype=torch.int8, device=device)
    labels[::2] = 1
    groups = torch.zeros(1000, dtype=torch.int64, device=device)
    draw = {"samples_per_group": 64, "seed": 0}
    result = sample_groups(labels, groups, **draw)
    assert (result.num_pos.item(), result.num_neg.item()) == (16, 48)
    labels[10:] = 0  # 5 positives are left: negatives fill up
    result = sample_groups(labels, groups, **draw)
    assert (result.num_pos.item(), result.num_neg.item()) == (5, 59)
    labels[:] = 1  # no negatives: positives stay at N / 4
    result = sample_groups(labels, groups, **draw)
    assert (result.num_pos.item(), result.num_neg.item()) == (16, 0)
    assert (result.indices[0, 0, 16:] == -1).all()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 1023, 1024, 1025])  # around the batch and the small domain
def test_group_sizes(device, size):
    labels = torch.zeros(1, size, dtype=torch.int8, device=device)
    groups = torch.zeros(size, dtype=torch.int64, device=device)
    result = sample_groups(labels, groups, num_groups=1, samples_per_group=2000, seed=3)
    assert result.num_neg.item() == size
    assert result.indices[0, 0, :size].sort().values.tolist() == list(range(size))
    assert (result.indices[0, 0, size:] == -1).all()


GRID = AnchorGrid.from_cell_anchors([cell_anchors([16, 32], [1.0])], [4], [(30, 33)])


def test_each_key_part_changes_the_draw():
    labels = torch.zeros(2, GRID.num_anchors, dtype=torch.int8)
    base = {"samples_per_group": 32, "seed": 1, "iteration": 2, "first_image": 3}
    draw = sample_groups(labels, GRID, **base).indices
    for change in ({"seed": 2}, {"iteration": 3}, {"first_image": 5}):
        other = sample_groups(labels, GRID, **{**base, **change}).indices
        assert not torch.equal(draw, other)
    assert torch.equal(draw, sample_groups(labels, GRID, **base).indices)
    first, second = draw[0], draw[1]
    assert not torch.equal(first, second)
    assert not torch.equal(first[0] // 2, first[1] // 2)  # both groups have the same cells
    # An image's draw depends on its global number, not on its place in the batch.
    shifted = sample_groups(labels[:1], GRID, **{**base, "first_image": 4}).indices
    assert torch.equal(shifted[0], second)


def test_the_number_of_an_image_wraps_at_64_bits():
    labels, members = torch.zeros(2, GRID.num_anchors, dtype=torch.int8), [GRID.group_members(g) for g in range(2)]
    draw = {"samples_per_group": 8, "positive_fraction": 0.25, "seed": 0, "iteration": 0, "first_image": 2**63 - 1}
    assert_same(sample_groups(labels, GRID, **draw), reference.sample_groups(labels, members, **draw))


def test_number_of_threads_does_not_matter(crowd):
    grid, faces = crowd
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for n in (64, 4096):
                results.append(assign_and_sample(grid, faces, samples_per_group=n, seed=1))
    finally:
        torch.set_num_threads(threads)
    for other in results[2:]:
        want = results[0] if other.indices.shape == results[0].indices.shape else results[1]
        assert_same(other, want)
    assert_same(results[1], reference.assign_and_sample(grid, faces, 4096, 0.25, 1, 0, 0, 0.6, 0.4, "all", None, 0.5))


@pytest.mark.parametrize("device", devices())
def test_two_thousand_faces(device):
    grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64, 128], [1.0])], [4], [(150, 160)])
    corner = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 600
    faces = torch.cat([corner, corner + 20], 1).to(device)
    both = assign_and_sample(grid, [faces, faces[:0]], samples_per_group=2048, seed=1)
    labels = match_anchor_grid(grid, [faces, faces[:0]]).labels
    assert_same((both.indices, both.num_pos, both.num_neg), sample_groups(labels, grid, samples_per_group=2048, seed=1))
    assert (both.num_pos[0, 0].item(), both.num_pos[1].tolist()) == (512, [0, 0, 0, 0])


def test_labels_need_not_be_contiguous():
    labels = torch.zeros(GRID.num_anchors, 2, dtype=torch.int8)
    labels[::5, 0], labels[::3, 1] = 1, -1
    assert not labels.t().is_contiguous()
    draw = {"samples_per_group": 64, "seed": 5}
    assert_same(sample_groups(labels.t(), GRID, **draw), sample_groups(labels.t().contiguous(), GRID, **draw))


def test_empty_batch():
    result = assign_and_sample(GRID, [], samples_per_group=8, seed=0)
    assert [tuple(part.shape) for part in result] == [(0, 2, 8)] * 3 + [(0, 2)] * 2
    labels = torch.zeros(0, GRID.num_anchors, dtype=torch.int8)
    assert sample_groups(labels, GRID, samples_per_group=8, seed=0).indices.shape == (0, 2, 8)
