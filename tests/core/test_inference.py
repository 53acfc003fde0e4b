"""From head outputs to proposals and detections, against greedy selection written out box by box."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import oracle_anchors

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.inference import Proposals, proposals_to_detections, select_proposals

GRID = AnchorGrid.from_cell_anchors(
    [cell_anchors([16, 32], [1.0]), cell_anchors([64], [1.0])], [8, 16], [(6, 5), (3, 3)]
)
ANCHORS, GROUPS = oracle_anchors(GRID, np.float64)
SCALE_OF_GROUP = (16, 32, 64)
LEVELS = (range(60), range(60, 69))


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def decode(anchor, delta):
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2 + delta[0] * width, anchor[1] + height / 2 + delta[1] * height
    width, height = width * math.exp(min(delta[2], math.log(62.5))), height * math.exp(min(delta[3], math.log(62.5)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def expected_proposals(logits, deltas, size, pre, post, nms_thresh, min_size):
    """Flat indices and boxes of what must be kept, best first."""
    kept = []
    for level in LEVELS:
        best = sorted(level, key=lambda i: -logits[i])[:pre]
        kept_in_level = []
        for i in best:
            box = decode(ANCHORS[i], deltas[i])
            if not all(map(math.isfinite, [*box, logits[i]])):
                continue
            box = [min(max(value, 0), size[1 - k % 2]) for k, value in enumerate(box)]
            if box[2] - box[0] <= min_size or box[3] - box[1] <= min_size:
                continue
            if all(nms_thresh >= 1 or iou(box, other) <= nms_thresh for _, other in kept_in_level):
                kept_in_level.append((i, box))
        kept += kept_in_level
    return sorted(kept, key=lambda item: -logits[item[0]])[:post]


def random_outputs(seed, num_images=2):
    """Distinct logits, moderate deltas."""
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.tile(np.linspace(-4, 4, GRID.num_anchors), (num_images, 1)), axis=1)
    deltas = rng.normal(0, 0.4, (num_images, GRID.num_anchors, 4))
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(deltas, dtype=torch.float32)


def check(logits, deltas, sizes, pre, post, nms_thresh, min_size=0.0):
    """Compares with the rules and returns how many proposals each image has."""
    found = select_proposals(
        GRID,
        logits,
        deltas,
        sizes,
        pre_nms_topk=pre,
        post_nms_topk=post,
        nms_thresh=nms_thresh,
        min_size=min_size,
    )
    assert len(found) == len(sizes)
    for image, size, scores, offsets in zip(found, sizes, logits.tolist(), deltas.tolist()):
        expected = expected_proposals(scores, offsets, size, pre, post, nms_thresh, min_size)
        assert image.logits.tolist() == [scores[i] for i, _ in expected]
        assert image.anchor_scales.tolist() == [SCALE_OF_GROUP[GROUPS[i]] for i, _ in expected]
        np.testing.assert_allclose(image.boxes.numpy(), np.reshape([box for _, box in expected], (-1, 4)), atol=1e-3)
    return [len(image.logits) for image in found]


@given(
    seed=st.integers(0, 2**20),
    pre=st.sampled_from([1, 7, 30, 500]),
    post=st.sampled_from([1, 6, 40, 500]),
    nms_thresh=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    min_size=st.sampled_from([0.0, 12.0]),
)
def test_proposals_follow_the_rules(seed, pre, post, nms_thresh, min_size):
    check(*random_outputs(seed), [(48, 40), (30, 37)], pre, post, nms_thresh, min_size)


@pytest.mark.parametrize("nms_thresh", [0.7, 1.0])
@pytest.mark.parametrize("post", [1, 9, 10, 11])
def test_as_many_proposals_as_the_limit_after_nms_allows(nms_thresh, post):
    outputs = random_outputs(0)
    assert min(check(*outputs, [(48, 40)] * 2, 69, 500, nms_thresh)) > 11
    assert check(*outputs, [(48, 40)] * 2, 69, post, nms_thresh) == [post, post]


def test_limit_before_nms_holds_in_each_level():
    logits, anchors = random_outputs(0)[0], torch.zeros(2, GRID.num_anchors, 4)
    assert check(logits, anchors, [(48, 40)] * 2, 4, 500, 1.0) == [8, 8]
    assert check(logits, anchors, [(48, 40)] * 2, 20, 500, 1.0) == [29, 29], "the second level has nine anchors"


def test_no_box_is_too_small_unless_asked_for():
    """A box of half a pixel is kept; one without an area is not."""
    logits, deltas = torch.full((1, 69), -9.0), torch.zeros(1, 69, 4)
    logits[0, 24], logits[0, 25] = 3.0, 2.0
    deltas[0, 25, 2:] = math.log(0.5 / (ANCHORS[25][2] - ANCHORS[25][0]))
    options = {"pre_nms_topk": 2, "post_nms_topk": 2, "nms_thresh": 1.0}
    (image,) = select_proposals(GRID, logits, deltas, [(48, 48)], **options)
    assert image.logits.tolist() == [3.0, 2.0]
    assert (image.boxes[1, 2:] - image.boxes[1, :2]).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("group", range(3))
@pytest.mark.parametrize("pre", [4, 500])
def test_a_sub_detector_is_the_detector_of_its_anchors(group, pre):
    """With the logits of all others so low that they come last, and are then left out."""
    logits, deltas = random_outputs(3)
    is_other = torch.from_numpy(np.asarray(GROUPS) != group)
    options = {"pre_nms_topk": pre, "post_nms_topk": 20, "nms_thresh": 0.6}
    alone = select_proposals(GRID, logits, deltas, [(48, 40)] * 2, group=group, **options)
    among = select_proposals(GRID, logits.masked_fill(is_other, -99), deltas, [(48, 40)] * 2, **options)
    for ours, theirs in zip(alone, among):
        count = int((theirs.logits > -99).sum())
        assert len(ours.logits) == count > 0
        assert all(torch.equal(a, b[:count]) for a, b in zip(ours, theirs))


def test_nms_within_a_level_only():
    """The same box from two levels stays twice; from one level once."""
    logits, deltas = torch.full((1, 69), -9.0), torch.zeros(1, 69, 4)
    target = [8.0, 8, 40, 40]
    for index, logit in ((24, 3.0), (25, 2.0), (64, 1.0)):
        x1, y1, x2, y2 = ANCHORS[index]
        width, height = x2 - x1, y2 - y1
        deltas[0, index] = torch.tensor(
            [
                ((target[0] + target[2]) - (x1 + x2)) / 2 / width,
                ((target[1] + target[3]) - (y1 + y2)) / 2 / height,
                math.log(32 / width),
                math.log(32 / height),
            ]
        )
        logits[0, index] = logit
    (image,) = select_proposals(
        GRID, logits, deltas, [(48, 48)], pre_nms_topk=2, post_nms_topk=3, nms_thresh=0.5, min_size=0
    )
    assert image.logits[:2].tolist() == [3.0, 1.0] and image.anchor_scales[:2].tolist() == [16, 64]
    torch.testing.assert_close(image.boxes[:2], torch.tensor([target] * 2), atol=1e-3, rtol=0)


def test_outputs_that_are_not_finite_are_left_out():
    logits, deltas = random_outputs(1)[0], torch.zeros(2, GRID.num_anchors, 4)
    best = logits[0].topk(3).indices
    logits[0, best[0]] = math.inf
    logits[1, 5] = math.nan
    deltas[0, best[1], 0] = math.nan
    deltas[0, best[2], 3] = -math.inf
    found = select_proposals(
        GRID, logits, deltas, [(200, 200)] * 2, pre_nms_topk=100, post_nms_topk=100, nms_thresh=1.0
    )
    assert [len(image.logits) for image in found] == [66, 68]
    assert all(image.logits.isfinite().all() and image.boxes.isfinite().all() for image in found)


def test_half_precision_outputs_are_decoded_in_float32():
    logits, deltas = (part.half() for part in random_outputs(2))
    options = {"pre_nms_topk": 10, "post_nms_topk": 10, "nms_thresh": 0.7}
    for ours, theirs in zip(
        select_proposals(GRID, logits, deltas, [(48, 40)] * 2, **options),
        select_proposals(GRID, logits.float(), deltas.float(), [(48, 40)] * 2, **options),
    ):
        assert ours.boxes.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_no_gradient():
    logits, deltas = (part.requires_grad_() for part in random_outputs(2))
    (first, _) = select_proposals(
        GRID, logits, deltas, [(48, 40)] * 2, pre_nms_topk=10, post_nms_topk=10, nms_thresh=0.7
    )
    assert not any(part.requires_grad for part in first)
    found = proposals_to_detections(
        Proposals(first.boxes, first.logits.clone().requires_grad_(), first.anchor_scales),
        score_thresh=0.0,
        nms_thresh=0.5,
        max_detections=9,
    )
    assert not any(part.requires_grad for part in found)


@given(seed=st.integers(0, 2**20), limit=st.sampled_from([0, 1, 5, 100]), score_thresh=st.sampled_from([0.0, 0.5]))
def test_detections_follow_the_rules(seed, limit, score_thresh):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (30, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 50, (30, 2))], axis=1).astype(np.float32)
    logits = rng.permutation(np.linspace(-3, 3, 30)).astype(np.float32)
    logits[:4] = 0  # scores of exactly 0.5 are not above it
    scales = rng.choice([16, 32], 30).astype(np.float32)
    found = proposals_to_detections(
        Proposals(*map(torch.from_numpy, (boxes, logits, scales))),
        score_thresh=score_thresh,
        nms_thresh=0.4,
        max_detections=limit,
    )
    kept = []
    for i in sorted(range(30), key=lambda i: -logits[i]):
        score = 1 / (1 + math.exp(-float(logits[i])))
        if score > score_thresh and all(iou(boxes[i], boxes[j]) <= 0.4 for j in kept):
            kept.append(i)
    kept = kept[:limit]
    assert np.array_equal(found[0].numpy(), boxes[kept])
    np.testing.assert_allclose(found[1].numpy(), 1 / (1 + np.exp(-logits[kept])), rtol=1e-6)
    assert np.array_equal(found[2].numpy(), scales[kept])
