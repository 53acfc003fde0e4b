"""Box coding, paired IoU and the regression losses: hand-worked numbers, limits and gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from group_sampling.boxes import decode_boxes, encode_boxes, paired_iou
from group_sampling.losses import BOX_LOSSES, box_loss, classification_loss

COORDINATE = st.floats(-500, 500, width=32)
SIDE = st.floats(1, 500, width=32)


@st.composite
def boxes(draw, side=SIDE):
    x, y = draw(COORDINATE), draw(COORDINATE)
    return torch.tensor([[x, y, x + draw(side), y + draw(side)]], dtype=torch.float64)


def test_decode_by_hand():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 32.0]])  # center (8, 16)
    deltas = torch.tensor([[0.5, -0.25, math.log(2), 0.0]])  # center (16, 8), size 32 x 32
    assert torch.allclose(decode_boxes(deltas, anchor), torch.tensor([[0.0, -8.0, 32.0, 24.0]]), atol=1e-5)


def test_decode_caps_the_size():
    box = decode_boxes(torch.tensor([[0.0, 0.0, 50.0, 9.0]]), torch.tensor([[0.0, 0.0, 16.0, 32.0]]))
    assert (box[0, 2:] - box[0, :2]).tolist() == pytest.approx([1000, 2000], rel=1e-6)  # 62.5 times the anchor's


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_boxes_are_decoded_in_at_least_float32(given):
    deltas = torch.tensor([[0.5, -0.25, 0.75, 0.0]], dtype=given)
    anchor = torch.tensor([[1000.25, 7.0, 1016.25, 39.0]], dtype=torch.float64)
    boxes = decode_boxes(deltas, anchor)
    assert boxes.dtype == (torch.float64 if given == torch.float64 else torch.float32)
    half = 8 * math.exp(0.75)
    expected = torch.tensor([[1016.25 - half, -1.0, 1016.25 + half, 31.0]], dtype=boxes.dtype)
    torch.testing.assert_close(boxes, expected, rtol=1e-6, atol=0)


@given(boxes(), boxes(side=st.floats(8.5, 500, width=32)))
def test_decode_inverts_encode_below_the_cap(box, anchor):
    """Sides differ by a factor of less than 500 / 8.5 = 58.8; the cap is 62.5."""
    assert torch.allclose(decode_boxes(encode_boxes(box, anchor), anchor), box, atol=1e-6)


def test_deltas_by_hand():
    box, anchor = torch.tensor([[0.0, -8.0, 32.0, 24.0]]), torch.tensor([[0.0, 0.0, 16.0, 32.0]])
    assert torch.allclose(encode_boxes(box, anchor), torch.tensor([[0.5, -0.25, math.log(2), 0.0]]), atol=1e-6)
    assert encode_boxes(box, anchor.double()).dtype == torch.float32


@pytest.mark.parametrize("name", ["encode", "decode", "iou", *BOX_LOSSES])
def test_leading_dimensions_are_kept(name):
    generator = torch.Generator().manual_seed(0)
    first, second, gts = 50 * torch.rand(3, 3, 2, 4, generator=generator) + torch.tensor([0, 0, 60, 60])

    def call(a, b, gt):
        functions = {"encode": encode_boxes, "decode": lambda a, b: decode_boxes(a / 100, b), "iou": paired_iou}
        return functions[name](a, b) if name in functions else box_loss(name, a / 100, b, gt, 0.5)

    rows = [call(a[None], b[None], gt[None])[0] for a, b, gt in zip(*(t.view(6, 4) for t in (first, second, gts)))]
    torch.testing.assert_close(call(first, second, gts), torch.stack(rows).unflatten(0, (3, 2)))


def test_decode_agrees_with_detectron2():
    box_regression = pytest.importorskip("detectron2.modeling.box_regression", reason="Detectron2 is not installed")
    transform = box_regression.Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(1000, 4, generator=generator) * 100
    anchors[:, 2:] += anchors[:, :2] + 1
    deltas = torch.randn(1000, 4, generator=generator) * 2
    assert torch.allclose(decode_boxes(deltas, anchors), transform.apply_deltas(deltas, anchors), rtol=1e-5, atol=1e-4)
    boxes = decode_boxes(deltas.clamp(max=1), anchors)
    assert torch.allclose(encode_boxes(boxes, anchors), transform.get_deltas(anchors, boxes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # touching
        ((0, 0, 10, 10), (50, 50, 60, 60), 0.0),
        ((0, 0, 10, 10), (2, 2, 7, 7), 0.25),  # nested
    ],
)
def test_paired_iou_by_hand(a, b, expected):
    a, b = (torch.tensor([box], dtype=torch.float32) for box in (a, b))
    assert paired_iou(a, b).item() == pytest.approx(expected, abs=1e-7)
    assert paired_iou(b, a).item() == pytest.approx(expected, abs=1e-7)


def test_iou_of_empty_boxes():
    """Zero, with a finite gradient: a sum of areas below the smallest number counts as that number."""
    empty = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    iou = paired_iou(empty, empty)
    (gradient,) = torch.autograd.grad(iou.sum(), empty)
    assert iou.item() == 0 and gradient.isfinite().all()
    tiny = torch.tensor([[0.0, 0.0, 1e-10, 1e-10]])
    assert paired_iou(tiny, tiny).item() == 1


def test_classification_loss_by_hand():
    logits = torch.tensor([math.log(3), math.log(3), math.log(3), 0.0]).half()
    losses = classification_loss(logits, torch.tensor([1, 0, -1, 2], dtype=torch.int8))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([-math.log(3 / 4), math.log(4), math.log(4), math.log(2)], abs=1e-3)


def test_losses_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    gt = torch.tensor([[5.0, 0.0, 15.0, 10.0]])  # IoU 1/3 with the anchor, deltas (0.5, 0, 0, 0)
    zero = torch.zeros(1, 4)
    assert box_loss("iou_l2", zero, anchors, gt).item() == pytest.approx((2 / 3) ** 2, abs=1e-6)
    assert box_loss("iou_log", zero, anchors, gt).item() == pytest.approx(math.log(3), abs=1e-6)
    assert box_loss("smooth_l1", zero, anchors, gt).item() == pytest.approx(0.5)
    assert box_loss("smooth_l1", zero, anchors, gt, smooth_l1_beta=1.0).item() == pytest.approx(0.125)


def test_deltas_have_no_weights_unless_asked_for():
    anchors, gt = torch.tensor([[0.0, 0.0, 16.0, 32.0]]), torch.tensor([[0.0, 0.0, 32.0, 16.0]])
    deltas = torch.tensor([[0.5, -0.25, math.log(2), -math.log(2)]])
    total = deltas.abs().sum().item()
    assert box_loss("smooth_l1", 0 * deltas, anchors, gt).item() == pytest.approx(total)
    assert box_loss("smooth_l1", deltas, anchors, gt).item() == pytest.approx(0, abs=1e-6)
    assert box_loss("iou_l2", deltas, anchors, gt).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_perfect_box_costs_nothing_and_has_no_gradient(kind):
    anchors = torch.tensor([[3.0, 4.0, 19.0, 28.0]], dtype=torch.float64)
    deltas = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss = box_loss(kind, deltas, anchors, anchors, smooth_l1_beta=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), deltas)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.isfinite().all()
    if kind != "iou_log":  # -ln IoU has a kink at its minimum
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ("iou_l2", "iou_log"))
def test_disjoint_boxes_are_finite(kind):
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64)
    deltas = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss = box_loss(kind, deltas, anchors, anchors + 100)
    (gradient,) = torch.autograd.grad(loss.sum(), deltas)
    assert loss.item() == pytest.approx(1.0 if kind == "iou_l2" else 6 * math.log(10))
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_gradients(kind):
    generator = torch.Generator().manual_seed(1)
    anchors = torch.rand(20, 4, dtype=torch.float64, generator=generator) * 50
    anchors[:, 2:] = anchors[:, :2] + 10 + 20 * torch.rand(20, 2, dtype=torch.float64, generator=generator)
    gt = anchors + 3 * torch.randn(20, 4, dtype=torch.float64, generator=generator)
    deltas = (0.1 * torch.randn(20, 4, dtype=torch.float64, generator=generator)).requires_grad_()
    assert gradcheck(lambda d: box_loss(kind, d, anchors, gt, smooth_l1_beta=0.5), (deltas,))


def test_unknown_loss():
    zero = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"box_loss: expected a kind among .*iou_l2.*, got 'giou'"):
        box_loss("giou", zero, zero, zero)
