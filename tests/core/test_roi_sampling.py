"""The draw of proposals against rules written out in plain Python, and the second stage's regression loss."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from group_sampling.config import ConfigError
from group_sampling.evaluation import WiderFaceAP
from group_sampling.losses import BOX_LOSSES, box_loss
from group_sampling.ops import sample_groups
from group_sampling.roi_sampling import ROI_SAMPLERS, GroupProposalSampler, ProposalSample, build_proposal_sampler

SCALES = (16, 32, 64, 128)
NAN, INF = math.nan, math.inf
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def make_sampler(kind="group", num_samples=8, **options):
    return ROI_SAMPLERS[kind](num_samples, scales=SCALES, **options)


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def random_boxes(rng, count, sizes=(6.0, 200.0), extent=300.0):
    """Boxes of log-uniform size and moderate aspect ratio."""
    size = np.exp(rng.uniform(*np.log(sizes), count))
    ratio = np.exp(rng.uniform(-0.4, 0.4, count))
    corner = rng.uniform(0, extent, (count, 2))
    sides = np.stack([size * ratio, size / ratio], axis=1)
    return torch.as_tensor(np.concatenate([corner, corner + sides], axis=1), dtype=torch.float32)


def jittered(rng, boxes, count):
    """``count`` boxes around those of ``boxes``: some overlap enough to be positive, some do not."""
    chosen = boxes[rng.integers(len(boxes), size=count)]
    sides = chosen[:, 2:] - chosen[:, :2]
    return chosen + torch.as_tensor(rng.normal(0, 0.15, (count, 4)), dtype=torch.float32) * sides.repeat(1, 2)


# The rules once more, one box at a time.


def is_valid(box):
    return all(map(math.isfinite, box)) and box[2] > box[0] and box[3] > box[1]


def overlap(a, b):
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def best_match(box, gts):
    ious = [overlap(box, gt) / (area(box) + area(gt) - overlap(box, gt)) if is_valid(gt) else 0.0 for gt in gts]
    best = max(range(len(gts)), key=lambda i: ious[i], default=-1)
    return best, ious[best] if gts else 0.0


def expected_label(box, gts, ignore, pos=0.5, neg=0.5, ioa=0.5):
    if not is_valid(box):
        return -1
    iou = best_match(box, gts)[1]
    if iou >= pos:
        return 1
    covered = any(overlap(box, region) / area(box) >= ioa for region in ignore if is_valid(region))
    return -1 if iou >= neg or covered else 0


def expected_scale(box):
    return min(range(len(SCALES)), key=lambda g: abs(math.log(math.sqrt(area(box)) / SCALES[g])))


def check_draw(sample, boxes, gts, ignore, kind, num_samples, **thresholds):
    boxes, gts, ignore = boxes.tolist(), gts.tolist(), ignore.tolist()
    labels = [expected_label(box, gts, ignore, **thresholds) for box in boxes]
    drawn = sample.indices.tolist()
    assert len(drawn) == len(set(drawn))
    assert sample.labels.tolist() == [labels[i] for i in drawn] and -1 not in sample.labels.tolist()
    assert sample.scale_ids.tolist() == [expected_scale(boxes[i]) for i in drawn]
    for index, label, match in zip(drawn, sample.labels.tolist(), sample.matched_gt.tolist()):
        assert match == (best_match(boxes[index], gts)[0] if label == 1 else -1)
    groups = range(len(SCALES)) if kind == "group" else [None]
    for group in groups:
        is_member = [group is None or (label != -1 and expected_scale(b) == group) for b, label in zip(boxes, labels)]
        num_pos = sum(label == 1 and member for label, member in zip(labels, is_member))
        num_neg = sum(label == 0 and member for label, member in zip(labels, is_member))
        expected_pos = min(num_pos, num_samples // 4)
        expected = [1] * expected_pos + [0] * min(num_neg, num_samples - expected_pos)
        found = [label for index, label in zip(drawn, sample.labels.tolist()) if is_member[index]]
        assert found == expected, "positives first, at most a quarter of them, negatives fill up"


@pytest.mark.parametrize("kind", ["group", "uniform"])
@given(
    seed=st.integers(0, 2**20),
    num_proposals=st.integers(0, 150),
    num_gt=st.integers(0, 6),
    num_ignore=st.integers(0, 2),
    num_bad=st.integers(0, 3),
    num_samples=st.sampled_from([1, 4, 9, 64]),
    thresholds=st.sampled_from([{}, {"pos": 0.6, "neg": 0.4}]),
)
def test_draw_follows_the_rules(kind, seed, num_proposals, num_gt, num_ignore, num_bad, num_samples, thresholds):
    rng = np.random.default_rng(seed)
    gts, ignore = random_boxes(rng, num_gt), random_boxes(rng, num_ignore, sizes=(50.0, 300.0))
    near = jittered(rng, gts, num_proposals // 2) if num_gt else boxes_of()
    bad = boxes_of((NAN, 0, 5, 5), (9, 9, 3, 3), (0, 0, INF, 9))[:num_bad]
    boxes = torch.cat([near, random_boxes(rng, num_proposals - len(near)), bad])
    sampler = make_sampler(kind, num_samples, **{f"{name}_iou": value for name, value in thresholds.items()})
    (sample,) = sampler([boxes], [torch.cat([gts, bad])], [torch.cat([ignore, bad])], iteration=seed)
    check_draw(sample, boxes, torch.cat([gts, bad]), torch.cat([ignore, bad]), kind, num_samples, **thresholds)


def test_scales_by_hand():
    sides = [1, 15.9, 16, 22.6, 22.7, 32, 45.2, 45.3, 90.5, 90.6, 128, 4000]  # borders: 16 √2, 32 √2, 64 √2
    boxes = boxes_of(*((5, 5, 5 + s, 5 + s) for s in sides))
    assert make_sampler().scale_ids(boxes).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    # √(w · h) counts, not the longer side; of two equally near scales (area 16 · 32) the smaller.
    assert make_sampler().scale_ids(boxes_of((0, 0, 8, 128), (0, 0, 16, 32), (0, 0, 16, 33))).tolist() == [1, 0, 1]


@pytest.mark.parametrize("scales", [(16, 32, 64, 128), (12, 24, 48, 96, 400), (32,)])
def test_training_and_evaluation_put_a_box_to_the_same_scale(scales):
    """Each has the rule in its own arithmetic; whole sides make the areas exact and many of them ties."""
    sides = list(itertools.product([1, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 400], repeat=2))
    boxes = np.float32([(0, 0, width, height) for width, height in sides])
    ids = GroupProposalSampler(1, scales=scales).scale_ids(torch.from_numpy(boxes)).tolist()
    evaluator = WiderFaceAP({str(i): [box] for i, box in enumerate(boxes)}, sizes=scales, num_thresholds=1)
    for image, result in evaluator.compute_by(str).items():
        assert [result.num_faces[f"size {scale}"] for scale in scales].index(1) == ids[int(image)]


def test_group_sampling_balances_what_uniform_sampling_does_not():
    """Most proposals are small, as on P2; the group sampler evens that out."""
    rng = np.random.default_rng(0)
    boxes = torch.cat([random_boxes(rng, n, (0.8 * s, 1.2 * s)) for n, s in zip((1500, 300, 100, 40), SCALES)])
    gts = random_boxes(rng, 3)
    counts = {}
    for kind, num_samples in (("group", 32), ("uniform", 128)):
        sampler = make_sampler(kind, num_samples)
        samples = sampler([boxes], [gts], iteration=0)
        counts[kind] = sum(sampler.count_by_scale(samples)).tolist()
    assert counts["group"] == [32, 32, 32, 32]
    assert sum(counts["uniform"]) == 128 and counts["uniform"][0] > 5 * counts["uniform"][2]


def test_positives_are_at_most_a_quarter_and_negatives_fill_up():
    gt = boxes_of((100, 100, 130, 130))
    positives, negatives = gt + torch.rand(50, 1), boxes_of((0, 0, 30, 30)) + torch.rand(50, 1)
    sampler = make_sampler(num_samples=16)
    for boxes, expected in ((torch.cat([positives, negatives]), [1] * 4 + [0] * 12), (negatives, [0] * 16)):
        (sample,) = sampler([boxes], [gt], iteration=0)
        assert sample.labels.tolist() == expected
    (sample,) = sampler([torch.cat([positives, negatives[:5]])], [gt], iteration=0)
    assert sample.labels.tolist() == [1] * 4 + [0] * 5, "what is missing is not made up by positives"


def test_draws_depend_on_seed_iteration_and_image_and_repeat():
    boxes, gts = [random_boxes(np.random.default_rng(0), 400)] * 2, [boxes_of()] * 2

    def draw(seed, iteration):
        return [s.indices.tolist() for s in make_sampler(seed=seed)(boxes, gts, iteration=iteration)]

    first = draw(0, 0)
    assert first == draw(0, 0) and first[0] != first[1]
    assert first[0] not in draw(0, 1)
    of_seeds = [draw(seed, 0)[0] for seed in range(40)]
    assert all(a != b for a, b in itertools.combinations(of_seeds, 2))
    assert [s.indices.tolist() for s in make_sampler()(boxes, gts, iteration=0)] == first, "the seed is 0 by default"


def test_draw_is_independent_of_that_of_the_anchors():
    """Same seed, iteration, image and labels: the anchors' sampler picks others."""
    boxes = random_boxes(np.random.default_rng(0), 400, (10.0, 20.0))
    (sample,) = make_sampler(num_samples=32, seed=7)([boxes], [boxes_of()], iteration=3)
    labels, groups = torch.zeros(400, dtype=torch.int8), torch.zeros(400, dtype=torch.int64)
    anchors = sample_groups(labels, groups, samples_per_group=32, num_groups=1, seed=7, iteration=3).indices.flatten()
    common = set(sample.indices.tolist()) & set(anchors.tolist())
    assert len(common) < 10  # 32 · 32 / 400 = 2.6 expected


def test_ranks_draw_differently(monkeypatch):
    boxes = random_boxes(np.random.default_rng(0), 400)
    alone = make_sampler()([boxes] * 4, [boxes_of()] * 4, iteration=0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    second_rank = make_sampler()([boxes] * 2, [boxes_of()] * 2, iteration=0)
    for ours, theirs in zip(second_rank, alone[2:]):
        assert torch.equal(ours.indices, theirs.indices)


def test_all_negatives_can_be_drawn():
    boxes = random_boxes(np.random.default_rng(0), 100, (10.0, 20.0))
    drawn = torch.cat([make_sampler(num_samples=10)([boxes], [boxes_of()], iteration=i)[0].indices for i in range(200)])
    counts = drawn.bincount(minlength=100)
    assert counts.sum() == 2000 and counts.min() > 0 and counts.max() < 45  # 20 expected


@pytest.mark.parametrize("kind", ["group", "uniform"])
def test_nothing_to_draw(kind):
    bad = boxes_of((NAN, 0, 4, 4), (0, 0, INF, 8), (5, 5, 5, 9), (0, 5, 9, 5), (9, 9, 3, 3))
    cases = [boxes_of(), bad, boxes_of((0, 0, 16, 16))]
    sampler = make_sampler(kind)
    samples = sampler(cases, [bad, bad, boxes_of()], iteration=0)
    assert [sample.indices.tolist() for sample in samples] == [[], [], [0]]
    num_pos, num_neg = sampler.count_by_scale(samples)
    assert num_pos.tolist() == [0, 0, 0, 0] and num_neg.tolist() == pytest.approx([1 / 3, 0, 0, 0])


def test_ignore_regions_are_no_negatives():
    boxes, gt = boxes_of((0, 0, 20, 20), (100, 100, 120, 120), (40, 40, 60, 60)), boxes_of((40, 40, 60, 60))
    ignore = boxes_of((0, 0, 20, 10), (40, 40, 60, 60))  # covers half of the first, all of the last
    (sample,) = make_sampler()([boxes], [gt], [ignore], iteration=0)
    assert sorted(sample.indices.tolist()) == [1, 2] and sample.labels.tolist() == [1, 0]
    (sample,) = make_sampler(ignore_ioa=0.6)([boxes], [gt], [ignore], iteration=0)
    assert sorted(sample.indices.tolist()) == [0, 1, 2]


def test_classes_of_what_was_drawn():
    sample = ProposalSample(
        torch.tensor([5, 0, 2]), torch.tensor([1, 1, 0], dtype=torch.int8), torch.tensor([0, 2, -1]), torch.zeros(3)
    )
    assert sample.classes(torch.tensor([7, 8, 9]), 80).tolist() == [7, 9, 80]
    alone = ProposalSample(*(part[2:] for part in sample))
    assert alone.classes(torch.tensor([7]), 80).tolist() == [80]
    assert alone.classes(torch.zeros(0, dtype=torch.int64), 80).tolist() == [80]


def test_no_images():
    assert make_sampler()([], [], iteration=0) == []


def test_errors():
    assert make_sampler(num_samples=1).num_samples == GroupProposalSampler(1, scales=[0.5]).num_samples == 1
    with pytest.raises(ValueError, match="GroupProposalSampler: expected num_samples of at least 1, got 0"):
        make_sampler(num_samples=0)
    for scales in ([], [16, 0]):
        message = f"GroupProposalSampler: expected positive scales, got {scales}"
        with pytest.raises(ValueError, match=re.escape(message)):
            GroupProposalSampler(1, scales=scales)


def make_cfg(sampler="group", thresholds=(0.5,), labels=(0, 1)):
    heads = SimpleNamespace(
        IOU_THRESHOLDS=thresholds, IOU_LABELS=labels, BATCH_SIZE_PER_IMAGE=512, POSITIVE_FRACTION=0.25
    )
    gs = SimpleNamespace(ROI_SAMPLER=sampler, ROI_SAMPLES_PER_GROUP=128, IGNORE_IOA=0.5)
    generator = SimpleNamespace(SIZES=[[64, 16], [32, 16]])
    return SimpleNamespace(
        SEED=3, MODEL=SimpleNamespace(ROI_HEADS=heads, GROUP_SAMPLING=gs, ANCHOR_GENERATOR=generator)
    )


def test_sampler_from_a_config():
    sampler = build_proposal_sampler(make_cfg())
    assert (type(sampler), sampler.num_samples, sampler.scales) == (GroupProposalSampler, 128, (16, 32, 64))
    two = build_proposal_sampler(make_cfg("uniform", (0.4, 0.6), (0, -1, 1)))
    assert two.num_samples == 512
    boxes = boxes_of(*((0, 0, 100, height) for height in (30, 50, 70)))  # IoU 0.3, 0.5, 0.7
    for built, expected in ((sampler, {0: 0, 1: 1, 2: 1}), (two, {0: 0, 2: 1})):
        (sample,) = built([boxes], [boxes_of((0, 0, 100, 100))], iteration=0)
        assert dict(zip(sample.indices.tolist(), sample.labels.tolist())) == expected
    names = "'uniform', 'group', got 'ohem'"
    with pytest.raises(ConfigError, match=rf"MODEL\.GROUP_SAMPLING\.ROI_SAMPLER: expected one of {names}"):
        build_proposal_sampler(make_cfg("ohem"))
    cfg = make_cfg()
    cfg.MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP = 0
    with pytest.raises(ConfigError, match=r"ROI_SAMPLES_PER_GROUP: expected at least 1, got 0"):
        build_proposal_sampler(cfg)
    for thresholds, labels in (((0.5,), (0, -1, 1)), ((0.3, 0.5), (0, 1)), ((0.5, 0.6), (-1, 0, 1)), ((), ())):
        with pytest.raises(ConfigError, match=r"MODEL\.ROI_HEADS\.IOU_THRESHOLDS and IOU_LABELS"):
            build_proposal_sampler(make_cfg(thresholds=thresholds, labels=labels))


# box_loss with Fast R-CNN's weights


def make_pairs(count=12, dtype=torch.float64):
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, count, (20.0, 60.0)).to(dtype)
    return boxes, jittered(rng, boxes.float(), count).to(dtype)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_weighted_loss_against_torchvisions_coder(kind):
    anchors, gts = make_pairs(dtype=torch.float32)
    deltas = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    coder = BoxCoder(WEIGHTS)
    if kind == "smooth_l1":
        error = (deltas - coder.encode([gts], [anchors])[0]).abs()
        expected = torch.where(error < 0.5, error**2, error - 0.25).sum(1)  # beta 0.5
    else:
        iou = box_iou(coder.decode(deltas, [anchors]).squeeze(1), gts).diagonal()
        expected = (1 - iou) ** 2 if kind == "iou_l2" else -iou.clamp(min=1e-6).log()
    found = box_loss(kind, deltas, anchors, gts, smooth_l1_beta=0.5, weights=WEIGHTS)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_gradients_with_weights(kind):
    anchors, gts = make_pairs()
    deltas = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert gradcheck(lambda d: box_loss(kind, d, anchors, gts, 0.5, WEIGHTS), (deltas,))


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_perfect_box_with_weights(kind):
    """IoU = 1: no loss, a finite gradient, and where the loss has no kink there none at all."""
    anchors, _ = make_pairs()
    deltas = torch.zeros(12, 4, dtype=torch.float64, requires_grad=True)
    loss = box_loss(kind, deltas, anchors, anchors, 0.5, WEIGHTS)
    assert loss.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(loss.sum(), deltas)
    assert gradient.isfinite().all()
    if kind != "iou_log":
        assert gradient.abs().max() < 1e-9
        assert gradcheck(lambda d: box_loss(kind, d, anchors, anchors, 0.5, WEIGHTS), (deltas,), atol=1e-4)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_disjoint_boxes_with_weights(kind):
    anchors, _ = make_pairs()
    deltas = torch.zeros(12, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda d: box_loss(kind, d, anchors, anchors + 500, 0.5, WEIGHTS), (deltas,))
    loss = box_loss(kind, deltas, anchors, anchors + 500, 0.5, WEIGHTS)
    (gradient,) = torch.autograd.grad(loss.sum(), deltas)
    assert loss.isfinite().all() and gradient.isfinite().all()
