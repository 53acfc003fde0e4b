"""AnchorGrid: the frameworks' anchors to the bit, groups, member order, errors."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from group_sampling import anchors
from group_sampling.anchors import AnchorGrid, AnchorLattice, cell_anchors

# The five detectors of the paper: (sizes per level, strides).
DETECTORS = {
    "rpn": ([[16, 32, 64, 128]], [16]),
    "fpn": ([[16], [32], [64], [128]], [4, 8, 16, 32]),
    "fpn_finest_stride": ([[16], [32], [64], [128]], [4, 8, 16, 32]),
    "fpn_finest": ([[16, 32, 64, 128]], [4]),
    "fpn_finest_sampling": ([[16, 32, 64, 128]], [4]),
}
GENERIC = ([[32, 64], [128], [256, 300.5]], [8, 16, 32])


def feature_sizes(strides):
    return [(-(-437 // s), -(-621 // s)) for s in strides]


def grid_of(sizes, strides, ratios=(1.0,), offset=0.0):
    return AnchorGrid.from_cell_anchors(
        [cell_anchors(s, ratios) for s in sizes], strides, feature_sizes(strides), offset=offset
    )


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("sizes, strides", [*DETECTORS.values(), GENERIC], ids=[*DETECTORS, "generic"])
def test_equals_detectron2(sizes, strides, ratios, offset):
    pytest.importorskip("detectron2")
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    generator = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[list(ratios)], strides=strides, offset=offset)
    want = generator([torch.empty(1, 1, *size) for size in feature_sizes(strides)])
    grid = grid_of(sizes, strides, ratios, offset)
    assert torch.equal(torch.cat([boxes.tensor for boxes in want]), grid.boxes())
    assert tuple(len(boxes.tensor) for boxes in want) == grid.level_sizes
    for ours, theirs in zip((cell_anchors(s, ratios) for s in sizes), generator.cell_anchors):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("sizes, strides", [*DETECTORS.values(), GENERIC], ids=[*DETECTORS, "generic"])
def test_equals_torchvision(sizes, strides, ratios):
    generator = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
    height, width = 384, 640  # whole strides: torchvision takes image size // map size for the stride
    shapes = [(height // s, width // s) for s in strides]
    maps = [torch.empty(1, 1, *shape) for shape in shapes]
    want = generator(ImageList(torch.empty(1, 3, height, width), [(height, width)]), maps)[0]
    grid = AnchorGrid.from_cell_anchors(generator.cell_anchors, strides, shapes)
    assert torch.equal(want, grid.boxes())


def test_layout_by_hand():
    grid = AnchorGrid.from_cell_anchors(
        [cell_anchors([16, 32], [1.0]), cell_anchors([32], [1.0])], [4, 8], [(2, 3), (1, 2)]
    )
    assert grid.scales == (16.0, 32.0)
    assert (grid.num_anchors, grid.num_groups, grid.level_sizes) == (14, 2, (12, 2))
    boxes = grid.boxes()
    assert boxes[0].tolist() == [-8, -8, 8, 8]
    assert boxes[1].tolist() == [-16, -16, 16, 16]
    assert boxes[2].tolist() == [-4, -8, 12, 8]  # the next column
    assert boxes[6].tolist() == [-8, -4, 8, 12]  # the next row
    assert boxes[13].tolist() == [-8, -16, 24, 16]
    assert grid.group_ids().tolist() == [0, 1] * 6 + [1, 1]
    assert grid.group_members(0).tolist() == [0, 2, 4, 6, 8, 10]
    assert grid.group_members(1).tolist() == [1, 3, 5, 7, 9, 11, 12, 13]
    assert torch.equal(boxes.double(), grid.boxes(dtype=torch.float64))


def test_scale_of_a_group_is_shared_by_aspect_ratios():
    grid = grid_of([[16, 32]], [4], ratios=(0.5, 1.0, 2.0))
    assert grid.scales == (16.0, 32.0)
    assert grid.num_groups == 2


def test_explicit_scales_are_sorted_into_groups():
    grid = AnchorGrid.from_cell_anchors([cell_anchors([64, 16], [1.0])], [4], [(1, 1)], scales=[[64, 16]])
    assert grid.scales == (16.0, 64.0)
    assert grid.group_ids().tolist() == [1, 0]


def test_merged_is_one_group():
    grid = grid_of(*GENERIC, ratios=(0.5, 2.0))
    merged = grid.merged()
    assert (merged.num_groups, merged.scales, merged.num_anchors) == (1, (0.0,), grid.num_anchors)
    assert torch.equal(merged.boxes(), grid.boxes())
    assert merged.group_members(0).sort().values.tolist() == list(range(grid.num_anchors))


def test_equal_grids_are_equal_keys():
    assert grid_of(*GENERIC) == grid_of(*GENERIC)
    assert len({grid_of(*GENERIC), grid_of(*GENERIC), grid_of(*GENERIC).merged()}) == 2


def small_grid(height, width=3):
    return AnchorGrid.from_cell_anchors([cell_anchors([16, 32], [1.0])], [4], [(height, width)])


@pytest.mark.parametrize("make", [AnchorGrid.boxes, AnchorGrid.group_ids])
def test_an_equal_grid_gets_the_same_tensor(make):
    first = make(small_grid(50))
    assert make(small_grid(50)) is make(small_grid(50), "cpu") is first
    assert make(small_grid(50).merged()) is not first
    assert not torch.equal(make(small_grid(50, 4)), first)
    assert make(small_grid(50), "meta").device.type == "meta"


def test_each_dtype_has_its_own_boxes():
    grid = small_grid(50)
    assert (grid.boxes().dtype, grid.boxes(dtype=torch.float64).dtype, grid.boxes().dtype) == (
        torch.float32,
        torch.float64,
        torch.float32,
    )


def test_only_the_last_few_grids_are_kept():
    first = small_grid(60).boxes()
    for height in range(61, 61 + anchors._recent_boxes.capacity - 1):
        small_grid(height).boxes()
    assert small_grid(60).boxes() is first  # and is the most recent one again
    for height in range(71, 71 + anchors._recent_boxes.capacity):
        small_grid(height).boxes()
    again = small_grid(60).boxes()
    assert again is not first and torch.equal(again, first)
    assert len(anchors._recent_boxes._tensors) == anchors._recent_boxes.capacity


def test_boxes_first_asked_for_in_inference_mode_serve_training():
    with torch.inference_mode():
        boxes = small_grid(80).boxes()
    weight = torch.ones(4, requires_grad=True)
    (boxes * weight).sum().backward()
    assert torch.allclose(weight.grad, small_grid(80).boxes().sum(0))


def test_what_a_compiler_traces_is_not_kept():
    torch.compiler.reset()
    grid = small_grid(90)
    before = list(anchors._recent_boxes._tensors)
    compiled = torch.compile(lambda x: x + grid.boxes(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(1)), grid._make_boxes(torch.device("cpu"), torch.float32) + 1)
    assert list(anchors._recent_boxes._tensors) == before
    kept = grid.boxes()
    with torch._subclasses.FakeTensorMode():
        assert grid.boxes() is not kept and type(grid.boxes()) is not torch.Tensor
    assert grid.boxes() is kept


@pytest.mark.cuda
def test_boxes_wait_for_no_gpu():
    torch.cuda.set_sync_debug_mode("error")
    try:
        boxes, ids = small_grid(100).boxes("cuda"), small_grid(100).group_ids("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(boxes.cpu(), small_grid(100).boxes())
    assert torch.equal(ids.cpu(), small_grid(100).group_ids())
    assert small_grid(100).boxes("cuda:0") is boxes
    with torch.cuda.stream(torch.cuda.Stream()):
        assert small_grid(100).boxes("cuda") is not boxes


def test_no_levels():
    grid = AnchorGrid.from_cell_anchors([], [], [])
    assert (grid.num_anchors, grid.num_groups, grid.boxes().shape, grid.merged()) == (0, 0, (0, 4), grid)


BASE = cell_anchors([16], [1.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([BASE], [4, 8], [(2, 2)]), "one entry per feature level, got 1, 2, 1 and None"),
        (([BASE[0]], [4], [(2, 2)]), r"cell_anchors\[0\] must have shape \(A, 4\), A > 0, got \(4,\)"),
        (([BASE[:0]], [4], [(2, 2)]), r"got \(0, 4\)"),
        (([BASE.flip(1)], [4], [(2, 2)]), "base box 0 must be finite with sides of at least"),
        (([BASE * float("nan")], [4], [(2, 2)]), "base box 0 must be finite"),
        (([BASE], [0], [(2, 2)]), "stride >= 1"),
        (([BASE], [4], [(-1, 2)]), r"feature size must not be negative, got \(-1, 2\)"),
        (([BASE], [4], [(2**16, 2**16)]), "a group may hold 2147483647 anchors, got 4294967296"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorGrid.from_cell_anchors(*arguments)


def test_errors_of_options():
    with pytest.raises(ValueError, match="level 0 has 1 base boxes but 2 scales"):
        AnchorGrid.from_cell_anchors([BASE], [4], [(2, 2)], scales=[[16, 32]])
    with pytest.raises(ValueError, match=r"offset in \[0, 1\), got 4 and 1.0"):
        AnchorGrid.from_cell_anchors([BASE], [4], [(2, 2)], offset=1.0)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got torch.float16"):
        grid_of(*GENERIC).boxes(dtype=torch.float16)


def test_lattices_must_form_levels():
    lattice = {"base": (-8.0, -8.0, 8.0, 8.0), "stride": 4, "offset": 0.0, "height": 2, "width": 2, "group": 0}
    with pytest.raises(ValueError, match="lattice 0 breaks the layout of its level"):
        AnchorGrid((AnchorLattice(**lattice, start=3, step=1),), (16.0,))
    with pytest.raises(ValueError, match="the level must have 2 lattices"):
        AnchorGrid((AnchorLattice(**lattice, start=0, step=2),), (16.0,))
