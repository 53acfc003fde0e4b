"""The head's sub-sampled levels and its evaluation at drawn cells, against the plain convolutions."""

import math

import pytest
import torch
import torch.nn.functional as F

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.head import SoftmaxRPNHead, flatten_predictions


def make(num_anchors=4, steps=(), sizes=((12, 10),), channels=8, **options):
    torch.manual_seed(0)
    head = SoftmaxRPNHead(channels, num_anchors, steps=steps, **options)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = [torch.randn(3, channels, *size, requires_grad=True) for size in sizes]
    return head, features


def grid_of(head, features):
    """Anchors for what the head predicts; where they sit does not matter here."""
    sizes = [feature.shape[-2:] for feature in features]
    if head.steps:
        ((height, width),) = sizes
        sizes = [(math.ceil(height / step), math.ceil(width / step)) for step in head.steps]
    anchors = cell_anchors([8] * (head.num_anchors // max(len(head.steps), 1)), [1.0])
    return AnchorGrid.from_cell_anchors([anchors] * len(sizes), [4] * len(sizes), sizes)


def plain(head, feature):
    """Per anchor: the two-way logits' difference (B, A, H, W) and deltas (B, A, 4, H, W) of every cell."""
    hidden = F.relu(head.conv(feature))
    scores, deltas = head.cls_logits(hidden), head.bbox_pred(hidden)
    count = head.num_anchors
    return scores[:, count:] - scores[:, :count], deltas.unflatten(1, (count, 4))


def test_outputs_are_those_of_the_three_convolutions():
    head, features = make(sizes=((12, 10), (6, 5)))
    logits, deltas = head(features)
    for feature, level_logits, level_deltas in zip(features, logits, deltas):
        expected_logits, expected_deltas = plain(head, feature)
        torch.testing.assert_close(level_logits, expected_logits)
        torch.testing.assert_close(level_deltas, expected_deltas.flatten(1, 2))


def test_levels_of_sub_sampled_cells():
    """FPN-finest-stride: anchor i in every steps[i]-th row and column of the one feature."""
    head, features = make(num_anchors=8, steps=(1, 2, 4, 8), sizes=((13, 10),))
    logits, deltas = head(features)
    expected_logits, expected_deltas = plain(head, features[0])
    assert [tuple(level.shape) for level in logits] == [(3, 2, 13, 10), (3, 2, 7, 5), (3, 2, 4, 3), (3, 2, 2, 2)]
    for i, step in enumerate((1, 2, 4, 8)):
        cells = (slice(None), slice(2 * i, 2 * i + 2), ..., slice(None, None, step), slice(None, None, step))
        torch.testing.assert_close(logits[i], expected_logits[cells])
        torch.testing.assert_close(deltas[i], expected_deltas[cells].flatten(1, 2))


CASES = {
    "one level": {},
    "one anchor": {"num_anchors": 1},
    "levels": {"num_anchors": 3, "sizes": ((12, 10), (6, 5), (3, 3))},
    "steps": {"num_anchors": 8, "steps": (1, 2, 4, 8), "sizes": ((13, 10),)},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_predictions_at_drawn_anchors_and_their_gradients(options):
    head, features = make(**options)
    flat = flatten_predictions(*head(features))
    n = flat[0].shape[1]
    # Every anchor once, some twice, in any order, a few at a time: the sparse path takes no more than half the cells.
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(n, generator=generator) for _ in range(3)])
    index = torch.cat([index, index[:, :7]], dim=1)
    weights = torch.randn(3, index.shape[1], 5, generator=generator)

    def gradients(logits, deltas):
        head.zero_grad()
        for feature in features:
            feature.grad = None
        (torch.cat([logits[..., None], deltas], -1) * weights).sum().backward()
        return [p.grad.clone() for p in [*head.parameters(), *features]]

    expected = flat[0].gather(1, index), flat[1].gather(1, index[..., None].expand(-1, -1, 4))
    expected_gradients = gradients(*expected)
    predict = head.predictor(features, grid_of(head, features))
    chunks = [predict(part) for part in index.split(20, dim=1)]
    found = torch.cat([c[0] for c in chunks], 1), torch.cat([c[1] for c in chunks], 1)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(*found), expected_gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_few_anchors_do_not_evaluate_the_feature(monkeypatch):
    head, features = make()
    monkeypatch.setattr(head, "forward", None)
    logits, deltas = head.predictor(features, grid_of(head, features))(torch.zeros(3, 60, dtype=torch.int64))
    assert logits.shape == (3, 60) and deltas.shape == (3, 60, 4)


def test_all_anchors_and_many_anchors_are_the_dense_pass():
    head, features = make()
    flat = flatten_predictions(*head(features))
    for index in (None, torch.arange(480).expand(3, -1)):
        for ours, theirs in zip(head.predictor(features, grid_of(head, features))(index), flat):
            assert torch.equal(ours, theirs)


def test_prior_of_a_fresh_head():
    head = SoftmaxRPNHead(8, 2, face_prior=0.01)
    logits, _ = head([torch.zeros(1, 8, 4, 4)])
    torch.testing.assert_close(logits[0].sigmoid(), torch.full((1, 2, 4, 4), 0.01))


def test_a_grid_of_other_anchors_is_refused():
    head, features = make(sizes=((12, 10), (6, 5)))
    with pytest.raises(ValueError, match=r"expected a grid of lattices of sizes .*\(6, 5\)\], got .*\(12, 10\)\]"):
        head.predictor(features, grid_of(head, features[:1]))
