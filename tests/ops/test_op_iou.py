"""pairwise_iou: hand-worked numbers, the oracle, bad boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracles import oracle_iou
from strategies import BAD_BOXES, devices, examples, scenes

from group_sampling.ops import pairwise_iou, reference


@pytest.mark.parametrize("device", devices())
def test_hand_worked(device):
    boxes1 = torch.tensor([[0.0, 0, 4, 4], [10, 10, 14, 12]], device=device)
    boxes2 = torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [4, 0, 8, 4], [10, 10, 14, 14]], device=device)
    want = torch.tensor([[4 / 28, 1, 0, 0], [0, 0, 0, 8 / 16]], device=device)  # (no "+1": touching boxes do not meet)
    assert torch.equal(pairwise_iou(boxes1, boxes2), want)


def check_scene(scene, device):
    anchors = scene.grid.boxes(device, scene.dtype)
    for gt, boxes in zip(scene.tensors(device)[0], scene.gt_boxes):
        want = oracle_iou(anchors.cpu().numpy(), boxes)
        for result in (pairwise_iou(anchors, gt), reference.pairwise_iou(anchors, gt)):
            assert result.dtype == scene.dtype
            assert np.array_equal(result.cpu().numpy(), want)
        assert np.array_equal(pairwise_iou(gt, anchors).cpu().numpy(), want.T)
        assert np.array_equal(pairwise_iou(gt, gt).cpu().numpy(), oracle_iou(boxes, boxes))


@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(300))
@given(scene=scenes())
def test_matches_the_oracle(device, scene):
    check_scene(scene, device)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two of CPU time, which a busy machine may not give
@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(6000))
@given(scene=scenes(max_cells=600, max_faces=25))
def test_matches_the_oracle_on_larger_scenes(device, scene):
    check_scene(scene, device)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_boxes_overlap_nothing(device, dtype):
    bad = torch.tensor(list(BAD_BOXES.values()), dtype=dtype, device=device)
    good = torch.tensor([[20, 20, 40, 40], [-1e4, -1e4, 1e4, 1e4]], dtype=dtype, device=device)
    assert not pairwise_iou(bad, good).any()
    assert not pairwise_iou(good, bad).any()
    assert not pairwise_iou(bad, bad).any()


@pytest.mark.parametrize("device", devices())
def test_area_beyond_float32_is_zero_not_nan(device):
    huge = torch.tensor([[-1e30, -1e30, 1e30, 1e30]], device=device)
    assert pairwise_iou(huge, huge).tolist() == [[0.0]]
    assert pairwise_iou(huge.double(), huge.double()).tolist() == [[1.0]]


@pytest.mark.parametrize("n, m", [(0, 0), (0, 3), (3, 0), (1, 1), (17, 9)])
def test_sizes(n, m):
    boxes = torch.tensor([[0.0, 0, 4, 4]])
    result = pairwise_iou(boxes.repeat(n, 1), boxes.repeat(m, 1))
    assert result.shape == (n, m)
    assert (result == 1).all()


def test_layout_in_memory_does_not_matter():
    boxes = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)).t()
    boxes[:, 2:] += boxes[:, :2]
    assert not boxes.is_contiguous()
    assert torch.equal(pairwise_iou(boxes, boxes[::2]), pairwise_iou(boxes.contiguous(), boxes[::2].contiguous()))


def test_has_no_gradient():
    boxes = torch.tensor([[0.0, 0, 4, 4]], requires_grad=True)
    assert not pairwise_iou(boxes, boxes).requires_grad
