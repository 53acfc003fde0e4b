"""On real WIDER FACE annotations: the grid path equals the dense path, and one call equals the two."""

import gzip
import json

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample, match_anchor_grid, match_anchors, sample_groups

# The paper's five detectors, and one of Table 2: anchor sizes and strides of the levels, a group for each scale or one.
SCALES = [16, 32, 64, 128]
LAYOUTS = {
    "RPN": ([SCALES], [16], False),
    "FPN": ([[s] for s in SCALES], [4, 8, 16, 32], False),
    "FPN-finest-stride": ([[s] for s in SCALES], [4, 8, 16, 32], False),
    "FPN-finest": ([SCALES], [4], False),
    "FPN-finest-sampling": ([SCALES], [4], True),
    "FPN with group sampling": ([[s] for s in SCALES], [4, 8, 16, 32], True),
}


@pytest.fixture(scope="module", params=["train", "val"])
def records(request, shared_data):
    with gzip.open(shared_data / "wider" / "annotations" / f"wider_{request.param}_merged.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def check(record, layout):
    sizes, strides, grouped = LAYOUTS[layout]
    height, width = record["height"], record["width"]
    grid = AnchorGrid.from_cell_anchors(
        [cell_anchors(s, [1.0]) for s in sizes], strides, [(-(-height // s), -(-width // s)) for s in strides]
    )
    grid = grid if grouped else grid.merged()
    boxes = torch.tensor(record["boxes_xywh"], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    # A part of them as ignore regions, as invalid faces are.
    faces, regions = boxes, boxes[::7]
    matches = match_anchor_grid(grid, [faces], ignore_boxes=[regions])
    dense = match_anchors(grid.boxes(), faces, ignore_boxes=regions)
    assert all(torch.equal(a[0], b) for a, b in zip(matches, dense)), record["file"]
    draw = {"samples_per_group": 256, "seed": 1}
    both = assign_and_sample(grid, [faces], ignore_boxes=[regions], **draw)
    two = sample_groups(matches.labels, grid, **draw)
    assert torch.equal(both.indices, two.indices), record["file"]
    return int((dense.labels == 1).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_images(records, layout):
    assert sum(check(record, layout) for record in records[::200]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image(records, layout):
    """All 16,106 images; on the large grids of stride 4 every third, to keep this to minutes."""
    step = 3 if LAYOUTS[layout][1][0] == 4 else 1
    for record in records[::step]:
        check(record, layout)
