"""The criterion against sums written out anchor by anchor."""

import math

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.criterion import BOX_LOSS_MEANS, AnchorCriterion
from group_sampling.head import predict_from
from group_sampling.ops import AssignResult, match_anchors
from group_sampling.samplers import (
    FILLS,
    LOSS_MEANS,
    SAMPLERS,
    FocalSampler,
    GroupSampler,
    OHEMSampler,
    UniformSampler,
)


def make_grid(height=16, width=16, sizes=(16, 32)):
    return AnchorGrid.from_cell_anchors([cell_anchors(sizes, [1.0])], [4], [(height, width)])


def make_criterion(kind="group", num_samples=8, **options):
    count = {} if SAMPLERS[kind].count_key is None else {"num_samples": num_samples}
    return AnchorCriterion(SAMPLERS[kind](**count, seed=3), **options)


def faces(*boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize("kind", ["group", "uniform"])
def test_losses_are_means_over_the_draw(kind):
    grid, criterion = make_grid(), make_criterion(kind)
    gt = [faces((8, 8, 24, 24), (20, 20, 52, 52)), faces((0, 0, 30, 30))]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, grid.num_anchors, generator=generator)
    deltas = 0.1 * torch.randn(2, grid.num_anchors, 4, generator=generator)
    result = criterion(grid, predict_from(logits, deltas), gt, iteration=5)

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
    zeros = predict_from(torch.zeros(1, grid.num_anchors), torch.zeros(1, grid.num_anchors, 4))
    uniform = make_criterion("uniform", 64)(grid, zeros, gt, iteration=0)
    group = make_criterion("group", 16)(grid, zeros, gt, iteration=0)
    assert group.num_pos.tolist() == [4, 4, 4, 4]
    assert (group.num_pos + group.num_neg).tolist() == [16, 16, 16, 16]
    assert (uniform.num_pos + uniform.num_neg).sum() == 64
    assert uniform.num_pos[3] > 2 * uniform.num_pos[0]


@pytest.mark.parametrize("loss", ["iou_l2", "iou_log", "smooth_l1"])
def test_image_without_faces(loss):
    grid, criterion = make_grid(), make_criterion(box_loss_type=loss)
    logits = torch.zeros(1, grid.num_anchors, requires_grad=True)
    deltas = torch.zeros(1, grid.num_anchors, 4, requires_grad=True)
    result = criterion(grid, predict_from(logits, deltas), [faces()], iteration=0)
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
    clean = criterion(grid, predict_from(logits, deltas), [good], iteration=0)
    dirty = criterion(grid, predict_from(logits, deltas), [torch.cat([good, bad])], iteration=0)
    assert clean.classification == dirty.classification and clean.localization == dirty.localization
    assert clean.num_pos.tolist() == dirty.num_pos.tolist()


def test_ignore_regions_are_no_negatives():
    grid, criterion = make_grid(sizes=(16,)), make_criterion(num_samples=256)
    whole = [faces((-100, -100, 200, 200))]
    zeros = predict_from(torch.zeros(1, grid.num_anchors), torch.zeros(1, grid.num_anchors, 4))
    assert criterion(grid, zeros, [faces()], iteration=0).num_neg.tolist() == [256]
    nothing = criterion(grid, zeros, [faces()], whole, iteration=0)
    assert nothing.num_neg.tolist() == [0] and nothing.classification == nothing.localization == 0


@pytest.mark.parametrize("kind", ["group", "uniform", "focal"])
def test_a_single_positive_the_first_anchor(kind):
    """Each average over one anchor is its loss: not halved, and not that of its neighbor."""
    grid = make_grid(sizes=(16,))
    options = {"pos_iou": 0.9, "neg_iou": 0.4}
    sampler = FocalSampler(**options) if kind == "focal" else SAMPLERS[kind](1, positive_fraction=1.0, **options)
    logits, deltas = torch.full((1, grid.num_anchors), -100.0), torch.zeros(1, grid.num_anchors, 4)
    logits[0, 0], deltas[0, 0, 0] = math.log(3), 0.5  # softmax 3/4; half a side aside, so IoU 1/3
    result = AnchorCriterion(sampler)(grid, predict_from(logits, deltas), [grid.boxes()[:1]], iteration=0)
    expected = -math.log(3 / 4) * (0.25 * (1 / 4) ** 2 if kind == "focal" else 1)
    assert result.num_pos.tolist() == [1]
    assert result.classification.item() == pytest.approx(expected, rel=1e-5)
    assert result.localization.item() == pytest.approx(4 / 9, rel=1e-5)


def test_smooth_l1_is_l1_unless_asked_for():
    grid = make_grid(sizes=(16,))
    deltas = torch.zeros(1, grid.num_anchors, 4)
    deltas[..., 1] = 0.25
    for options, expected in (({}, 0.25), ({"smooth_l1_beta": 1.0}, 0.5 * 0.25**2)):
        criterion = AnchorCriterion(
            GroupSampler(1, positive_fraction=1.0, pos_iou=0.9), box_loss_type="smooth_l1", **options
        )
        result = criterion(grid, predict_from(deltas[..., 0], deltas), [grid.boxes()[:1]], iteration=0)
        assert result.localization.item() == pytest.approx(expected)


def test_draws_differ_between_iterations_and_repeat_with_the_seed():
    grid, gt = make_grid(), [faces((8, 8, 24, 24))]
    draws = [GroupSampler(8, seed=s)(grid, gt, iteration=i).indices for s, i in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_errors():
    for sampler, found in ((GroupSampler, 0), (OHEMSampler, -1), (OHEMSampler, None)):
        with pytest.raises(ValueError, match=f"{sampler.__name__}: expected num_samples of at least 1, got {found}"):
            sampler(found)
    with pytest.raises(ValueError, match="box_loss_type.*got 'giou'"):
        make_criterion(box_loss_type="giou")
    with pytest.raises(ValueError, match="box_loss_mean.*got 'all'"):
        make_criterion(box_loss_mean="all")
    for options in ({"fill": "nothing"}, {"loss_mean": "scale"}):
        with pytest.raises(ValueError, match=f"expected a fill among .*{next(iter(options.values()))}"):
            GroupSampler(8, **options)


def counted(drawn, image, group, fill, num_samples=12, places=3):
    """(index, ground truth or None, how often it counts) of a group, once more from the sentences of the docstring."""
    rows = zip(*(x[image, group].tolist() for x in (drawn.indices, drawn.labels, drawn.matched_gt)))
    rows = [(index, gt if label == 1 else None) for index, label, gt in rows if label >= 0]
    positives, negatives = [r for r in rows if r[1] is not None], [r for r in rows if r[1] is None]
    if fill == "negatives":
        return [(*row, 1) for row in rows]
    others = negatives[: num_samples - places]
    if fill == "repeat":
        again = [positives[place % len(positives)] for place in range(places)] if positives else []
        return [(*row, 1) for row in again + others]
    return [(*row, places / len(positives)) for row in positives] + [
        (*row, len(others) / len(negatives)) for row in negatives
    ]


@pytest.mark.parametrize("box_loss_mean", BOX_LOSS_MEANS)
@pytest.mark.parametrize("loss_mean", LOSS_MEANS)
@pytest.mark.parametrize("fill", FILLS)
def test_readings_of_group_sampling(fill, loss_mean, box_loss_mean):
    """Scales with enough positives, with too few, with none, with few anchors, and with nothing at all."""
    lattices = [cell_anchors([size], [1.0]) for size in (16, 32, 64, 128)]
    grid = AnchorGrid.from_cell_anchors(lattices, [4, 8, 32, 64], [(16, 16), (8, 8), (2, 2), (1, 1)])
    small = [(x, y, x + 16, y + 16) for x in (8, 40) for y in (8, 40)]  # on anchors, one positive each
    gt = [faces(*small), faces(*small[:2], (17, 16, 48, 48))]
    ignore = [faces((-64, -64, 1, 64))] * 2  # the anchors of the first column
    options = {"pos_iou": 0.65, "second_pass": "none", "seed": 3}
    sampler = GroupSampler(12, fill=fill, loss_mean=loss_mean, **options)
    criterion = AnchorCriterion(sampler, box_loss_type="smooth_l1", smooth_l1_beta=0.1, box_loss_mean=box_loss_mean)
    drawn = criterion.sampler(grid, gt, ignore, iteration=2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, grid.num_anchors, generator=generator)
    deltas = 0.1 * torch.randn(2, grid.num_anchors, 4, generator=generator)
    result = criterion(grid, predict_from(logits, deltas), gt, ignore, iteration=2)

    seen = {(tuple(p), tuple(n)) for p, n in zip(drawn.num_pos.tolist(), drawn.num_neg.tolist())}
    anchors = grid.boxes()
    sums = [[0.0] * 4 for _ in range(4)]  # of a scale: losses, counts, regression losses, counts of positives
    for image in range(2):
        for group in range(4):
            for index, match, count in counted(drawn, image, group, fill):
                logit = logits[image, index].item()
                target = 0.0
                if match is not None:
                    (ax1, ay1, ax2, ay2), (x1, y1, x2, y2) = anchors[index].tolist(), gt[image][match].tolist()
                    width, height = ax2 - ax1, ay2 - ay1
                    wanted = [((x1 + x2) - (ax1 + ax2)) / 2 / width, ((y1 + y2) - (ay1 + ay2)) / 2 / height]
                    wanted += [math.log((x2 - x1) / width), math.log((y2 - y1) / height)]
                    errors = [abs(a - b) for a, b in zip(deltas[image, index].tolist(), wanted)]
                    target = sum(e - 0.05 if e >= 0.1 else e * e / 0.2 for e in errors)
                row = sums[group]
                row[0] += count * math.log(1 + math.exp(logit if match is None else -logit))
                row[1] += count
                row[2] += count * target
                row[3] += count * (match is not None)
    divisor = 3 if box_loss_mean == "positives" else 1
    if loss_mean == "all":
        columns = [sum(column) for column in zip(*sums)]
        classification, localization = columns[0] / columns[1], columns[2] / columns[divisor]
    else:
        means = [row[0] / row[1] for row in sums if row[1]]
        box_means = [row[2] / row[divisor] for row in sums if row[divisor]]
        classification, localization = sum(means) / len(means), sum(box_means) / len(box_means)
        assert len(means) == 3 and len(box_means) == (2 if box_loss_mean == "positives" else 3)
    assert seen == {((3, 0, 0, 0), (9, 12, 2, 0)), ((2, 1, 0, 0), (10, 11, 2, 0))}
    assert result.classification.item() == pytest.approx(classification, rel=1e-5)
    assert result.localization.item() == pytest.approx(localization, rel=1e-5)


@pytest.mark.parametrize("loss_mean", LOSS_MEANS)
@pytest.mark.parametrize("fill", FILLS)
def test_effective_weights_are_the_slopes_of_the_mean(fill, loss_mean):
    """How fast the mean over an image grows with each loss, times what all of them count."""
    num_pos = torch.tensor([[2, 1, 0], [0, 0, 2], [0, 1, 0], [0, 0, 0]])
    num_neg = torch.tensor([[6, 3, 0], [8, 1, 0], [0, 5, 0], [0, 0, 0]])
    column = torch.arange(8)
    labels = torch.where(column < num_pos[..., None], 1, 0).masked_fill(column >= (num_pos + num_neg)[..., None], -1)
    chosen = AssignResult(labels, labels.to(torch.int8), labels, num_pos, num_neg)
    sampler = GroupSampler(8, positive_fraction=0.25, fill=fill, loss_mean=loss_mean)
    found = sampler.effective_weights(chosen)
    for image in range(4):
        alone = AssignResult(*(part[image : image + 1] for part in chosen))
        weights = sampler.weights(alone).float()
        losses = torch.ones(1, 3, 8, requires_grad=True)
        (slopes,) = torch.autograd.grad(sampler.average(losses, weights, weights), losses)
        torch.testing.assert_close(found[image].float(), slopes[0] * weights.sum())
    assert found[:3].sum(dim=(1, 2)).tolist() == pytest.approx(sampler.weights(chosen)[:3].sum(dim=(1, 2)).tolist())


def test_of_one_scale_the_means_are_that_of_all():
    """The mean over the scales that have something to count is not drawn towards zero by the others."""
    losses = torch.tensor([[[2.0, 4.0], [9.0, 9.0]]])
    weights = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert GroupSampler(2, loss_mean="group").average(losses, weights, weights) == 3


def test_uniform_samples_count_once():
    labels = torch.tensor([[[1, 0, -1]]])
    chosen = AssignResult(labels, labels.to(torch.int8), labels, torch.tensor([[1]]), torch.tensor([[1]]))
    assert UniformSampler(3).effective_weights(chosen).tolist() == [[[True, True, False]]]


@pytest.mark.parametrize("loss_mean", LOSS_MEANS)
def test_readings_without_anything_drawn(loss_mean):
    grid, everything = make_grid(sizes=(16,)), [faces((-100, -100, 200, 200))]
    criterion = AnchorCriterion(GroupSampler(8, fill="weight", loss_mean=loss_mean))
    zeros = predict_from(torch.zeros(1, grid.num_anchors), torch.zeros(1, grid.num_anchors, 4))
    result = criterion(grid, zeros, [faces()], everything, iteration=0)
    assert result.classification == 0 and result.localization == 0


def test_default_reading_has_the_bits_of_the_plain_mean():
    grid, gt, logits, deltas = random_scene()
    criterion = make_criterion()
    result = criterion(grid, predict_from(logits, deltas), gt, iteration=0)
    drawn = criterion.sampler(grid, gt, iteration=0)
    chosen = drawn.labels >= 0
    at = logits.gather(1, drawn.indices.clamp(min=0).flatten(1)).view_as(drawn.labels)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(at, (drawn.labels == 1).float(), reduction="none")
    assert torch.equal(result.classification, (losses * chosen).sum() / chosen.sum())


def random_scene(seed=0):
    """A grid, two images' faces and predictions of every anchor."""
    grid = make_grid()
    gt = [faces((8, 8, 24, 24), (20, 20, 52, 52)), faces((0, 0, 30, 30))]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, grid.num_anchors, generator=generator, requires_grad=True)
    deltas = (0.1 * torch.randn(2, grid.num_anchors, 4, generator=generator)).requires_grad_()
    return grid, gt, logits, deltas


def anchor_losses(grid, gt, logits, ignore=None):
    """Per image a list of (softmax loss, label) over all anchors, label from the dense matcher."""
    for image in range(len(gt)):
        labels = match_anchors(grid.boxes(), gt[image], ignore_boxes=None if ignore is None else ignore[image]).labels
        probability = logits[image].detach().double().sigmoid()
        loss = -torch.where(labels == 1, probability, 1 - probability).log()
        yield list(zip(loss.tolist(), labels.tolist()))


@pytest.mark.parametrize("num_samples", [16, 5000])
def test_ohem_takes_the_highest_losses(num_samples):
    grid, gt, logits, deltas = random_scene()
    criterion = make_criterion("ohem", num_samples)
    drawn = criterion.sampler(grid, gt, iteration=0, logits=logits)
    total, count = 0.0, 0
    for image, losses in enumerate(anchor_losses(grid, gt, logits)):
        order = sorted((i for i, (_, label) in enumerate(losses) if label >= 0), key=lambda i: -losses[i][0])
        expected = order[:num_samples]
        index = drawn.indices[image, 0]
        assert set(index[index >= 0].tolist()) == set(expected)
        assert drawn.num_pos[image].item() == sum(losses[i][1] == 1 for i in expected)
        total, count = total + sum(losses[i][0] for i in expected), count + len(expected)
    result = criterion(grid, predict_from(logits, deltas), gt, iteration=0)
    assert result.classification.item() == pytest.approx(total / count, rel=1e-5)
    assert result.num_pos.sum() * 2 == drawn.num_pos.sum() and result.num_neg.sum() * 2 == drawn.num_neg.sum()
    (result.classification + result.localization).backward()
    assert (logits.grad != 0).sum() == count


@pytest.mark.parametrize("ignore", [False, True])
def test_focal_loss_over_all_anchors(ignore):
    grid, gt, logits, deltas = random_scene()
    ignore = [faces((30, 30, 60, 60)), faces()] if ignore else None
    criterion = AnchorCriterion(FocalSampler(alpha=0.2, gamma=1.5))
    result = criterion(grid, predict_from(logits, deltas), gt, ignore, iteration=0)
    total, positives, negatives = 0.0, 0, 0
    for losses in anchor_losses(grid, gt, logits, ignore):
        for loss, label in losses:
            if label >= 0:
                total += (0.2 if label == 1 else 0.8) * (1 - math.exp(-loss)) ** 1.5 * loss
                positives, negatives = positives + (label == 1), negatives + (label == 0)
    assert positives > 0
    assert result.classification.item() == pytest.approx(total / positives, rel=1e-5)
    assert result.num_pos.sum().item() * 2 == positives and result.num_neg.sum().item() * 2 == negatives
    if ignore:
        assert negatives + positives < 2 * grid.num_anchors


def test_all_samplers_regress_the_same_positives():
    """One face, every positive drawn: the regression loss is the mean over them, whoever chose them."""
    grid, gt, logits, deltas = random_scene()
    found = {
        kind: make_criterion(kind, 2048)(grid, predict_from(logits, deltas), gt, iteration=0).localization.item()
        for kind in SAMPLERS
    }
    assert all(value == pytest.approx(found["group"], rel=1e-5) for value in found.values()), found


@pytest.mark.parametrize("kind", ["ohem", "focal"])
def test_samplers_of_all_anchors_without_faces_and_with_bad_ones(kind):
    grid = make_grid()
    logits = torch.zeros(1, grid.num_anchors, requires_grad=True)
    deltas = torch.zeros(1, grid.num_anchors, 4, requires_grad=True)
    bad = faces((5, 5, 5, 9), (math.nan, 0, 4, 4), (0, 0, math.inf, 8))
    for gt in (faces(), bad):
        result = make_criterion(kind)(grid, predict_from(logits, deltas), [gt], iteration=0)
        (result.classification + result.localization).backward()
        assert result.classification.isfinite() and result.localization == 0
        assert (deltas.grad == 0).all() and logits.grad.isfinite().all()


def test_ohem_needs_logits():
    with pytest.raises(ValueError, match="OHEMSampler: expected the logits of all anchors, got None"):
        OHEMSampler(8)(make_grid(), [faces()], iteration=0)
