"""On real WIDER FACE annotations: the grid path equals the dense path, and one call equals the two."""

import gzip
import json

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample, match_anchor_grid, match_anchors, sample_groups

# Anchor sizes and strides of the levels. Matching knows no groups, so three layouts serve the paper's five detectors
# and Table 2; the samplers draw from each of them both with a group for each scale and with a single group.
SCALES = [16, 32, 64, 128]
LAYOUTS = {
    "C4": ([SCALES], [16]),  # RPN: one group
    "P2 to P5": ([[s] for s in SCALES], [4, 8, 16, 32]),  # FPN, and FPN-finest-stride on a sub-sampled P2
    "P2": ([SCALES], [4]),  # FPN-finest: one group; FPN-finest-sampling: four
}


@pytest.fixture(scope="module", params=["train", "val"])
def records(request, reference_data):
    with gzip.open(reference_data.folder / f"wider/annotations/wider_{request.param}_merged.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    assert len(records) == reference_data.numbers["images"][request.param]
    return records


def check(record, layout, samplers=True):
    sizes, strides = LAYOUTS[layout]
    height, width = record["height"], record["width"]
    grid = AnchorGrid.from_cell_anchors(
        [cell_anchors(s, [1.0]) for s in sizes], strides, [(-(-height // s), -(-width // s)) for s in strides]
    )
    boxes = torch.tensor(record["boxes_xywh"], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    # A part of them as ignore regions, as invalid faces are.
    faces, regions = boxes, boxes[::7]
    dense = match_anchors(grid.boxes(), faces, ignore_boxes=regions)
    for groups in (grid, grid.merged()) if samplers else (grid,):
        matches = match_anchor_grid(groups, [faces], ignore_boxes=[regions])
        assert all(torch.equal(a[0], b) for a, b in zip(matches, dense)), record["file"]
        if samplers:
            draw = {"samples_per_group": 256, "seed": 1}
            both = assign_and_sample(groups, [faces], ignore_boxes=[regions], **draw)
            two = sample_groups(matches.labels, groups, **draw)
            assert torch.equal(both.indices, two.indices), record["file"]
            assert torch.equal(both.num_pos, two.num_pos) and torch.equal(both.num_neg, two.num_neg), record["file"]
    return int((dense.labels == 1).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_images(records, layout):
    assert sum(check(record, layout) for record in records[:: 200 if len(records) > 1000 else 2]) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image(records, layout):
    """The 3,226 images of val, and of the 12,880 of train every fourth; the samplers on every third of these."""
    if len(records) > 10000:
        records = records[::4]
    positives = sum(check(record, layout, samplers=number % 3 == 0) for number, record in enumerate(records))
    assert positives > 0
