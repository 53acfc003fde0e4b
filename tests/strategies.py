"""Scenes for property tests: anchor grids, faces of every awkward kind, matching and sampling options."""

import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from group_sampling.anchors import AnchorGrid

# The nine kinds of ground truth that must add no positive and change nothing for the others.
BAD_BOXES = {
    "zero width": (20.0, 20.0, 20.0, 40.0),
    "zero height": (20.0, 20.0, 40.0, 20.0),
    "inverted x": (40.0, 20.0, 20.0, 40.0),
    "inverted y": (20.0, 40.0, 40.0, 20.0),
    "inverted": (40.0, 40.0, 20.0, 20.0),
    "nan": (20.0, math.nan, 40.0, 40.0),
    "inf": (20.0, 20.0, math.inf, 40.0),
    "-inf": (-math.inf, 20.0, 40.0, 40.0),
    "whole plane": (-math.inf, -math.inf, math.inf, math.inf),
}


def devices():
    """For ``parametrize``. tests/conftest.py skips "cuda" without a GPU, unless GS_REQUIRE_CUDA=1."""
    return ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def examples(count):
    """Number of scenes of a property test: ``count``, or GS_MAX_EXAMPLES where that is set and lower."""
    return min(count, int(os.environ.get("GS_MAX_EXAMPLES", count)))


@dataclass
class Scene:
    """One batch: what matching takes (numpy boxes, so that the oracle sees what the operators see) and the options."""

    grid: AnchorGrid
    gt_boxes: list[np.ndarray]
    ignore_boxes: list[np.ndarray] | None
    match: dict
    draw: dict

    def tensors(self, device="cpu"):
        """(gt_boxes, ignore_boxes) as the operators take them."""
        gts = [torch.from_numpy(boxes).to(device) for boxes in self.gt_boxes]
        if self.ignore_boxes is None:
            return gts, None
        return gts, [torch.from_numpy(boxes).to(device) for boxes in self.ignore_boxes]

    @property
    def dtype(self):
        return torch.from_numpy(self.gt_boxes[0]).dtype


@st.composite
def scenes(draw, max_cells=80, max_faces=6):
    """Grids of one to three levels with one to three base boxes of one to three groups, and faces that hit them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    integral = draw(st.booleans())
    cell_boxes, strides, sizes, scales = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        count = int(rng.integers(1, 4))
        if integral:  # sides are multiples of 5, so that IoUs of exactly 2/5 and 3/5 exist
            half = rng.choice([5, 10, 15, 20], (count, 2)) / 2
            center = np.zeros((count, 2))
        else:
            half, center = rng.uniform(1, 25, (count, 2)), rng.uniform(-6, 6, (count, 2))
        cell_boxes.append(torch.from_numpy(np.concatenate([center - half, center + half], 1)).float())
        strides.append(int(rng.choice([1, 2, 4, 8, 16])))
        height = int(rng.integers(0, 10))
        sizes.append((height, int(rng.integers(0, 1 + max_cells // (count * max(height, 1))))))
        scales.append(rng.choice([16.0, 32.0, 64.0], count).tolist())
    grid = AnchorGrid.from_cell_anchors(
        cell_boxes, strides, sizes, offset=float(rng.choice([0.0, 0.5, 0.3])), scales=scales
    )
    anchors = grid.boxes(dtype=torch.float64).numpy()

    def boxes(count):
        return np.array([_box(rng, anchors, integral) for _ in range(count)]).reshape(-1, 4).astype(dtype)

    num_images = draw(st.integers(1, 2))
    gt_boxes = [boxes(draw(st.integers(0, max_faces))) for _ in range(num_images)]
    ignore_boxes = [boxes(int(rng.integers(0, 3))) for _ in range(num_images)] if draw(st.booleans()) else None
    neg_iou = draw(st.sampled_from([0.4, 0.4, 0.3, 0.1, 0.02]))
    return Scene(
        grid,
        gt_boxes,
        ignore_boxes,
        match={
            "pos_iou": draw(st.sampled_from([0.6, 0.6, 0.7, 1.0, neg_iou])),
            "neg_iou": neg_iou,
            "second_pass": draw(st.sampled_from(["all", "best", "none"])),
            "ignore_ioa": draw(st.sampled_from([0.5, 0.2, 1.0])),
        },
        draw={
            "samples_per_group": draw(st.sampled_from([1, 3, 8, 32, 200])),
            "positive_fraction": draw(st.sampled_from([0.25, 0.25, 0.5, 0.0, 1.0])),
            "seed": draw(st.integers(-(2**63), 2**63 - 1)),
            "iteration": draw(st.integers(0, 2**40)),
            "first_image": draw(st.integers(0, 1000)),
        },
    )


def _box(rng, anchors, integral):
    kind = rng.integers(0, 10)
    if kind == 0:
        return list(BAD_BOXES.values())[rng.integers(0, len(BAD_BOXES))]
    if kind == 1:  # far outside, or with an area beyond float32
        return [(1e6, 1e6, 1e6 + 20, 1e6 + 20), (-3e3, 0, -2.9e3, 50), (-1e30, -1e30, 1e30, 1e30)][rng.integers(0, 3)]
    if kind == 2 or len(anchors) == 0:
        x, y, width, height = rng.uniform(-20, 60, 4)
        return (x, y, x + abs(width) + 0.1, y + abs(height) + 0.1)
    x1, y1, x2, y2 = anchors[rng.integers(0, len(anchors))]
    if kind <= 4:  # a part of an anchor: 2/5 and 3/5 of it, or the anchor itself
        share = rng.choice([0.4, 0.6, 1.0])
        return (x1, y1, x1 + share * (x2 - x1), y2) if rng.random() < 0.5 else (x1, y1, x2, y1 + share * (y2 - y1))
    if kind == 5:  # around an anchor: many anchors tie inside it
        return (x1 - 4, y1 - 4, x2 + 4, y2 + 4)
    if kind == 6:  # half-way between neighbors: both anchors, and both faces of a pair, tie
        return (x1 + 2, y1, x2 + 2, y2)
    noise = rng.normal(0, 3, 4)
    return np.array([x1, y1, x2, y2]) + (np.round(noise) if integral else noise)
