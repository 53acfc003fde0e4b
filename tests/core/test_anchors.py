"""AnchorGrid: the frameworks' anchors to the bit, groups, member order, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import oracle_anchors
from strategies import scenes
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from group_sampling.anchors import AnchorGrid, AnchorLattice, cell_anchors

# The five detectors of the paper: (sizes per level, strides).
DETECTORS = {
    "rpn": ([[16, 32, 64, 128]], [16]),
    "fpn": ([[16], [32], [64], [128]], [4, 8, 16, 32]),
    "fpn_finest_stride": ([[16], [32], [64], [128]], [4, 8, 16, 32]),
    "fpn_finest": ([[16, 32, 64, 128]], [4]),
    "fpn_finest_sampling": ([[16, 32, 64, 128]], [4]),
}
BASE = cell_anchors([16], [1.0])
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
    assert [grid.group_members(1, level=i).tolist() for i in (0, 1)] == [[1, 3, 5, 7, 9, 11], [12, 13]]
    assert [grid.group_members(0, level=i).tolist() for i in (0, 1)] == [[0, 2, 4, 6, 8, 10], []]
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(scene=scenes(), seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(0,), (1,), (3, 20), (2, 0, 4), ()]))
def test_anchors_at_an_index(dtype, scene, seed, shape):
    grid, torch_dtype = scene.grid, torch.from_numpy(np.empty(0, dtype)).dtype
    boxes, groups = oracle_anchors(grid, dtype)
    assert np.array_equal(grid.boxes(dtype=torch_dtype).numpy(), boxes)
    assert np.array_equal(grid.group_ids().numpy(), groups)
    if grid.num_anchors == 0:
        shape = (0,)
    index = np.random.default_rng(seed).integers(0, max(grid.num_anchors, 1), shape)
    if index.size:
        index.flat[-1] = grid.num_anchors - 1
    at = torch.from_numpy(np.asarray(index))
    found = grid.boxes_at(at, torch_dtype)
    assert found.dtype == torch_dtype and np.array_equal(found.numpy(), boxes[index])
    assert np.array_equal(grid.group_ids_at(at).numpy(), groups[index])
    scales = np.array([*grid.scales, np.nan], np.float32)[groups[index]]
    assert grid.scales_at(at).dtype == torch.float32 and np.array_equal(grid.scales_at(at).numpy(), scales)


def test_places_by_hand():
    grid = AnchorGrid.from_cell_anchors(
        [cell_anchors([16, 32], [1.0]), BASE, BASE, cell_anchors([32], [1.0])],
        [4, 4, 4, 8],
        [(2, 3), (0, 5), (5, 0), (1, 2)],
    )
    place = grid.locate(torch.tensor([[0, 3, 11], [10, 12, 13]]))
    assert place.lattice.tolist() == [[0, 1, 1], [0, 4, 4]]
    assert place.row.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert place.column.tolist() == [[0, 1, 2], [2, 0, 1]]
    assert grid.scales_at(torch.tensor([0, 3, 13])).tolist() == [16, 32, 32]


def test_a_float64_base_box_keeps_its_digits():
    base = torch.tensor([[-8.1, -8.2, 8.3, 8.4]], dtype=torch.float64)
    grid = AnchorGrid.from_cell_anchors([base], [4], [(1, 2)])
    assert grid.boxes_at(torch.tensor([1]), torch.float64).tolist() == [[4 - 8.1, -8.2, 4 + 8.3, 8.4]]


def test_boxes_can_be_traced():
    torch.compiler.reset()
    grid, index = grid_of(*GENERIC), torch.tensor([0, 5, 9999])
    compiled = torch.compile(grid.boxes_at, fullgraph=True, backend="eager")
    assert torch.equal(compiled(index), grid.boxes()[index])
    with torch._subclasses.FakeTensorMode():
        assert type(grid.boxes()) is not torch.Tensor and grid.boxes().shape == (grid.num_anchors, 4)


@pytest.mark.parametrize("name", DETECTORS)
def test_what_a_step_reads_is_neither_copied_from_the_host_nor_waited_for(name):
    """Counted on the CPU: a GPU would have to wait for any of these operations."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    grid, index, called = grid_of(*DETECTORS[name]), torch.tensor([[0, 7], [3000, 5]]), []
    with Recorder():
        grid.boxes_at(index), grid.scales_at(index), grid.group_ids_at(index)
    assert len(called) > 10
    # .item(), torch.tensor(), .nonzero() and masks.
    assert not {"_local_scalar_dense", "lift_fresh", "nonzero"} & set(called)


@pytest.mark.cuda
def test_no_call_waits_for_a_gpu():
    grid, index = grid_of(*GENERIC), torch.tensor([0, 5, 9999])
    on_gpu = index.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = grid.boxes_at(on_gpu), grid.group_ids_at(on_gpu), grid.scales_at(on_gpu), grid.boxes("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = grid.boxes_at(index), grid.group_ids_at(index), grid.scales_at(index), grid.boxes()
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours.cpu(), theirs)


def test_no_levels():
    grid = AnchorGrid.from_cell_anchors([], [], [])
    assert (grid.num_anchors, grid.num_groups, grid.boxes().shape, grid.merged()) == (0, 0, (0, 4), grid)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([BASE], [4, 8], [(2, 2)]), "expected one entry per feature level in .*, got 1, 2, 1 and None"),
        (([BASE[0]], [4], [(2, 2)]), r"expected cell_anchors\[0\] of shape \(A, 4\), A > 0, got \(4,\)"),
        (([BASE[:0]], [4], [(2, 2)]), r"got \(0, 4\)"),
        (([BASE.flip(1)], [4], [(2, 2)]), "base box 0: expected finite numbers and sides of at least"),
        (([BASE * float("nan")], [4], [(2, 2)]), "base box 0: expected finite"),
        (([BASE], [0], [(2, 2)]), "stride >= 1"),
        (([BASE], [4], [(-1, 2)]), r"lattice 0: expected a feature size >= 0, got \(-1, 2\)"),
        (([BASE], [4], [(2**16, 2**16)]), "expected at most 2147483647 anchors in a group, got 4294967296"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorGrid.from_cell_anchors(*arguments)


def test_errors_of_options():
    with pytest.raises(ValueError, match="expected one scale for each of the 1 base boxes of level 0, got 2"):
        AnchorGrid.from_cell_anchors([BASE], [4], [(2, 2)], scales=[[16, 32]])
    with pytest.raises(ValueError, match=r"offset in \[0, 1\), got 4 and 1.0"):
        AnchorGrid.from_cell_anchors([BASE], [4], [(2, 2)], offset=1.0)
    with pytest.raises(TypeError, match="expected float32 or float64 boxes, got torch.float16"):
        grid_of(*GENERIC).boxes(dtype=torch.float16)


def test_lattices_must_form_levels():
    lattice = {"base": (-8.0, -8.0, 8.0, 8.0), "stride": 4, "offset": 0.0, "height": 2, "width": 2, "group": 0}
    with pytest.raises(
        ValueError, match=r"lattice 0: expected \(height, width, step, start\) \(2, 2, 1, 0\) .* got \(2, 2, 1, 3\)"
    ):
        AnchorGrid((AnchorLattice(**lattice, start=3, step=1),), (16.0,))
    with pytest.raises(ValueError, match="in a level of 2 lattices, got .* in one of 1"):
        AnchorGrid((AnchorLattice(**lattice, start=0, step=2),), (16.0,))
