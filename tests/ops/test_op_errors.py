"""Wrong arguments are refused with the operator, the argument, the expectation and the finding."""

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import (
    assign_and_sample,
    extension_status,
    match_anchor_grid,
    match_anchors,
    pairwise_iou,
    sample_groups,
)

GRID = AnchorGrid.from_cell_anchors([cell_anchors([16], [1.0])], [4], [(3, 3)])
BOXES = torch.tensor([[0.0, 0, 4, 4]])
LABELS = torch.zeros(GRID.num_anchors, dtype=torch.int8)
IDS = torch.zeros(9, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: pairwise_iou(BOXES[0], BOXES),
            ValueError,
            r"pairwise_iou: expected boxes1 of shape \(N, 4\), got \(4,\)",
        ),
        (lambda: pairwise_iou(BOXES, BOXES.int()), TypeError, r"expected float64, .* boxes2, got torch.int32"),
        (lambda: pairwise_iou(BOXES, [[0, 0, 4, 4]]), TypeError, "expected a Tensor as boxes2, got list"),
        (lambda: match_anchors(BOXES, BOXES.double()), TypeError, "expected gt_boxes of the dtype of anchors"),
        (lambda: match_anchors(BOXES, BOXES.to("meta")), ValueError, "expected gt_boxes on the device of anchors"),
        (lambda: match_anchors(BOXES, BOXES, neg_iou=0.0), ValueError, "0 < neg_iou <= pos_iou <= 1, got neg_iou=0.0"),
        (lambda: match_anchors(BOXES, BOXES, pos_iou=0.3), ValueError, "got neg_iou=0.4 and pos_iou=0.3"),
        (lambda: match_anchors(BOXES, BOXES, pos_iou=1.1), ValueError, "pos_iou=1.1"),
        (lambda: match_anchors(BOXES, BOXES, pos_iou=float("nan")), ValueError, "pos_iou=nan"),
        (
            lambda: match_anchors(BOXES, BOXES, second_pass="some"),
            ValueError,
            "expected second_pass to be one of .*'some'",
        ),
        (lambda: match_anchors(BOXES, BOXES, ignore_ioa=0), ValueError, r"expected ignore_ioa in \(0, 1\], got 0"),
        (lambda: match_anchor_grid(GRID, BOXES), TypeError, "sequences of .* one per image"),
        (
            lambda: match_anchor_grid(GRID, [BOXES, BOXES.double()]),
            TypeError,
            r"expected gt_boxes\[1\] of the dtype of",
        ),
        (
            lambda: match_anchor_grid(GRID, [BOXES], ignore_boxes=[BOXES] * 2),
            ValueError,
            "one entry of ignore_boxes per image, 1, got 2",
        ),
        (lambda: sample_groups(LABELS.long(), GRID, samples_per_group=1, seed=0), TypeError, "expected int8 labels"),
        (
            lambda: sample_groups(LABELS[:5], GRID, samples_per_group=1, seed=0),
            ValueError,
            "expected one label per anchor, 9",
        ),
        (lambda: sample_groups(LABELS, IDS.int(), samples_per_group=1, seed=0), TypeError, "expected int64 group ids"),
        (
            lambda: sample_groups(LABELS, IDS[None], samples_per_group=1, seed=0),
            ValueError,
            "expected group ids of shape",
        ),
        (
            lambda: sample_groups(LABELS, GRID, samples_per_group=0, seed=0),
            ValueError,
            "expected samples_per_group >= 1, got 0",
        ),
        (
            lambda: sample_groups(LABELS, GRID, num_groups=3, samples_per_group=1, seed=0),
            ValueError,
            "grid's 1 or None",
        ),
        (
            lambda: sample_groups(LABELS, GRID, samples_per_group=1, seed=2**63),
            ValueError,
            "expected seed to fit into 64 bits",
        ),
        (
            lambda: assign_and_sample(GRID, [BOXES], samples_per_group=4, positive_fraction=1.5, seed=0),
            ValueError,
            r"assign_and_sample: expected positive_fraction in \[0, 1\], got 1.5",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not extension_status().loaded, reason="the extension is not built")
@pytest.mark.parametrize(
    "name, arguments, error, message",
    [
        ("pairwise_iou", (BOXES[0], BOXES), ValueError, r"pairwise_iou: expected boxes1 of shape \(N, 4\), got \[4\]"),
        ("pairwise_iou", (BOXES.half(), BOXES), TypeError, "expected float32 or float64 boxes1, got Half"),
        ("match_anchors", (BOXES, BOXES, None, 0.6, 0.7, "all", 0.5), ValueError, "neg_iou=0.7 and pos_iou=0.6"),
        ("match_anchors", (BOXES, BOXES, None, 0.6, 0.4, "two", 0.5), ValueError, "expected second_pass .* got 'two'"),
        (
            "match_anchors",
            (BOXES, BOXES.double(), None, 0.6, 0.4, "all", 0.5),
            TypeError,
            "expected gt_boxes of dtype Float",
        ),
        (
            "match_anchor_grid",
            ([BOXES], [], (4, 3, 3, 5, 1, 0), GRID.lattice_floats, 0.6, 0.4, "all", 0.5),
            ValueError,
            "lattice 0 breaks the layout",
        ),
        (
            "match_anchor_grid",
            ([BOXES], [], (4, 3, 3, 0, 2, 0), GRID.lattice_floats, 0.6, 0.4, "all", 0.5),
            ValueError,
            "lattice 0: expected a level of 2 lattices, got 1",
        ),
        (
            "match_anchor_grid",
            ([BOXES], [], GRID.lattice_ints, (0.0, 0.0, float("nan"), 1.0, 0.0), 0.6, 0.4, "all", 0.5),
            ValueError,
            "finite base box",
        ),
        (
            "match_anchor_grid",
            ([BOXES], [], (4, 2**20, 2**20, 0, 1, 0), GRID.lattice_floats, 0.6, 0.4, "all", 0.5),
            ValueError,
            "lattice 0: expected at most 2147483647 cells",
        ),
        (
            "match_anchor_grid",
            ([BOXES], [], (4, 3, 3, 0, 1, 7), GRID.lattice_floats, 0.6, 0.4, "all", 0.5),
            ValueError,
            r"lattice 0: expected a group in \[0, 1\), got 7",
        ),
        (
            "assign_and_sample",
            ([BOXES], [], GRID.lattice_ints, GRID.lattice_floats, 0, 4, 0.25, 0, 0, 0, 0.6, 0.4, "all", 0.5),
            ValueError,
            r"lattice 0: expected a group in \[0, 0\), got 0",
        ),
        (
            "sample_groups",
            (LABELS[None], IDS, GRID.lattice_ints, 1, 4, 0.25, 0, 0, 0),
            ValueError,
            "expected group_ids or lattices, got both",
        ),
        (
            "sample_groups",
            (LABELS, None, GRID.lattice_ints, 1, 4, 0.25, 0, 0, 0),
            ValueError,
            r"expected labels of shape \(B, n\)",
        ),
    ],
)
def test_the_kernels_check_for_themselves(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(torch.ops.group_sampling, name)(*arguments)
