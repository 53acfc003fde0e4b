"""The criterion against sums written out anchor by anchor."""

import math

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.targets import AnchorCriterion, AnchorSampler


def make_grid(height=16, width=16, sizes=(16, 32)):
    return AnchorGrid.from_cell_anchors([cell_anchors(sizes, [1.0])], [4], [(height, width)])


def make_criterion(kind="group", num_samples=8, **options):
    return AnchorCriterion(AnchorSampler(kind, num_samples=num_samples, seed=3), **options)


def faces(*boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize("kind", ["group", "uniform"])
def test_losses_are_means_over_the_draw(kind):
    grid, criterion = make_grid(), make_criterion(kind)
    gt = [faces((8, 8, 24, 24), (20, 20, 52, 52)), faces((0, 0, 30, 30))]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, grid.num_anchors, generator=generator)
    deltas = 0.1 * torch.randn(2, grid.num_anchors, 4, generator=generator)
    result = criterion(grid, logits, deltas, gt, iteration=5)

    drawn = criterion.sampler(grid, gt, iteration=5)
    anchors, ids = grid.boxes(), grid.group_ids()
    classification, localization = [], []
    num_pos, num_neg = [0, 0], [0, 0]
    for image in range(2):
        for index, label, match in zip(
            drawn.indices[image].flatten().tolist(),
            drawn.labels[image].flatten().tolist(),
            drawn.matched_gt[image].flatten().tolist(),
        ):
            if label == -1:
                continue
            probability = 1 / (1 + math.exp(-logits[image, index].item()))
            classification.append(-math.log(probability if label == 1 else 1 - probability))
            (num_pos if label == 1 else num_neg)[ids[index]] += 1
            if label == 1:
                (ax1, ay1, ax2, ay2), (dx, dy, dw, dh) = anchors[index].tolist(), deltas[image, index].tolist()
                width, height = (ax2 - ax1) * math.exp(dw), (ay2 - ay1) * math.exp(dh)
                cx, cy = (ax1 + ax2) / 2 + dx * (ax2 - ax1), (ay1 + ay2) / 2 + dy * (ay2 - ay1)
                gx1, gy1, gx2, gy2 = gt[image][match].tolist()
                overlap_x = min(cx + width / 2, gx2) - max(cx - width / 2, gx1)
                overlap_y = min(cy + height / 2, gy2) - max(cy - height / 2, gy1)
                overlap = max(overlap_x, 0) * max(overlap_y, 0)
                iou = overlap / (width * height + (gx2 - gx1) * (gy2 - gy1) - overlap)
                localization.append((1 - iou) ** 2)
    assert localization, "the scene must have positives"
    assert result.classification.item() == pytest.approx(sum(classification) / len(classification), rel=1e-5)
    assert result.localization.item() == pytest.approx(sum(localization) / len(localization), rel=1e-4)
    assert result.num_pos.tolist() == [n / 2 for n in num_pos]
    assert result.num_neg.tolist() == [n / 2 for n in num_neg]


def test_group_sampling_balances_the_scales():
    """A large face has far more positive anchors than a small one; the group sampler evens that out (Fig. 2)."""
    grid = make_grid(64, 64, (16, 32, 64, 128))
    gt = [faces((10, 10, 26, 26), (60, 60, 188, 188), (10, 100, 42, 132), (150, 10, 214, 74))]
    zeros = torch.zeros(1, grid.num_anchors), torch.zeros(1, grid.num_anchors, 4)
    uniform = make_criterion("uniform", 64)(grid, *zeros, gt, iteration=0)
    group = make_criterion("group", 16)(grid, *zeros, gt, iteration=0)
    assert group.num_pos.tolist() == [4, 4, 4, 4]
    assert (group.num_pos + group.num_neg).tolist() == [16, 16, 16, 16]
    assert (uniform.num_pos + uniform.num_neg).sum() == 64
    assert uniform.num_pos[3] > 2 * uniform.num_pos[0]


@pytest.mark.parametrize("loss", ["iou_l2", "iou_log", "smooth_l1"])
def test_image_without_faces(loss):
    grid, criterion = make_grid(), make_criterion(box_loss_type=loss)
    logits = torch.zeros(1, grid.num_anchors, requires_grad=True)
    deltas = torch.zeros(1, grid.num_anchors, 4, requires_grad=True)
    result = criterion(grid, logits, deltas, [faces()], iteration=0)
    (result.classification + result.localization).backward()
    assert result.classification.item() == pytest.approx(math.log(2))
    assert result.localization.item() == 0
    assert deltas.grad is not None and (deltas.grad == 0).all()
    assert (logits.grad != 0).sum() == 16  # 2 groups x 8 negatives


def test_bad_boxes_change_nothing():
    """Zero-area, inverted, NaN, infinite and far boxes: the same draw and losses as without them."""
    grid, criterion = make_grid(), make_criterion()
    good = faces((8, 8, 24, 24))
    nan, inf = math.nan, math.inf
    bad = faces((5, 5, 5, 9), (9, 9, 3, 3), (nan, 0, 4, 4), (0, 0, inf, 8), (-inf, 0, 9, 9), (1e9, 1e9, 1e9 + 64, 2e9))
    logits = torch.randn(1, grid.num_anchors, generator=torch.Generator().manual_seed(0))
    deltas = torch.zeros(1, grid.num_anchors, 4)
    clean = criterion(grid, logits, deltas, [good], iteration=0)
    dirty = criterion(grid, logits, deltas, [torch.cat([good, bad])], iteration=0)
    assert clean.classification == dirty.classification and clean.localization == dirty.localization
    assert clean.num_pos.tolist() == dirty.num_pos.tolist()


def test_ignore_regions_are_no_negatives():
    grid, criterion = make_grid(sizes=(16,)), make_criterion(num_samples=256)
    whole = [faces((-100, -100, 200, 200))]
    zeros = torch.zeros(1, grid.num_anchors), torch.zeros(1, grid.num_anchors, 4)
    assert criterion(grid, *zeros, [faces()], iteration=0).num_neg.tolist() == [256]
    assert criterion(grid, *zeros, [faces()], whole, iteration=0).num_neg.tolist() == [0]


def test_draws_differ_between_iterations_and_repeat_with_the_seed():
    grid, gt = make_grid(), [faces((8, 8, 24, 24))]
    draws = [
        AnchorSampler("group", num_samples=8, seed=s)(grid, gt, iteration=i).indices
        for s, i in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_errors():
    with pytest.raises(ValueError, match="group.*got 'random'"):
        AnchorSampler("random", num_samples=8)
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        AnchorSampler("group", num_samples=0)
    with pytest.raises(ValueError, match="box_loss_type.*got 'giou'"):
        make_criterion(box_loss_type="giou")
