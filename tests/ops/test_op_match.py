"""match_anchors, match_anchor_grid: the oracle, the reference, C++ and CUDA agree to the bit."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracles import oracle_iou, oracle_match, oracle_valid
from strategies import BAD_BOXES, devices, examples, scenes

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import match_anchor_grid, match_anchors, reference


def check_scene(scene, device):
    gts, ignores = scene.tensors(device)
    anchors = scene.grid.boxes(device, scene.dtype)
    grid_result = match_anchor_grid(scene.grid, gts, ignore_boxes=ignores, **scene.match)
    for image, gt in enumerate(gts):
        regions = None if ignores is None else ignores[image]
        labels, matched, best_iou = oracle_match(
            anchors.cpu().numpy(),
            scene.gt_boxes[image],
            ignore_boxes=None if ignores is None else scene.ignore_boxes[image],
            **scene.match,
        )
        results = {
            "grid": [part[image] for part in grid_result],
            "dense": match_anchors(anchors, gt, ignore_boxes=regions, **scene.match),
            "reference": reference.match_anchors(anchors, gt, ignore_boxes=regions, **scene.match),
        }
        for name, result in results.items():
            assert result[0].tolist() == labels, name
            assert result[1].tolist() == matched, name
            assert result[2].tolist() == best_iou, name
            assert (result[0].dtype, result[1].dtype, result[2].dtype) == (torch.int8, torch.int64, scene.dtype), name


@pytest.mark.parametrize("device", devices())
@settings(max_examples=examples(2000))
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


def test_the_scenes_hold_every_awkward_case():
    """What the tests against the oracle meet: each case in at least five of 400 scenes."""
    seen = Counter()

    @settings(max_examples=400)
    @given(scene=scenes())
    def count(scene):
        anchors = scene.grid.boxes(dtype=scene.dtype).numpy()
        found = {f"dtype {scene.dtype}", scene.match["second_pass"]}
        sides = {}
        for lattice in scene.grid.lattices:
            x1, y1, x2, y2 = lattice.base
            sides.setdefault(lattice.group, set()).add(round((y2 - y1) / (x2 - x1), 3))
        found |= {"several aspect ratios in a group"} if any(len(s) > 1 for s in sides.values()) else set()
        found |= {"ignore regions"} if scene.ignore_boxes is not None else set()
        for image, boxes in enumerate(scene.gt_boxes):
            valid = oracle_valid(boxes)
            for name, bad in BAD_BOXES.items():
                if any(np.array_equal(row, np.array(bad, boxes.dtype), equal_nan=True) for row in boxes):
                    found.add(name)
            if valid.any() and len(anchors):
                whole = np.array_equal(boxes[valid], np.round(boxes[valid]))
                found.add("integer faces" if whole else "random faces")
                iou = oracle_iou(anchors, boxes)
                best = iou.max(1)
                reached = best >= scene.match["neg_iou"]
                found |= {"face without overlap"} if (iou[:, valid].max(0) == 0).any() else set()
                found |= {"faces tie"} if ((iou == best[:, None]).sum(1)[reached] > 1).any() else set()
                highest = iou.max(0)
                tie = ((iou == highest).sum(0) > 1) & (highest >= scene.match["neg_iou"])
                found |= {"anchors tie"} if tie.any() else set()
                for name in ("pos_iou", "neg_iou"):
                    found |= {f"exactly {name}"} if (best == boxes.dtype.type(scene.match[name])).any() else set()
                options = {**scene.match, "second_pass": "none"}
                plain = oracle_match(anchors, boxes, **options)[0]
                found |= {"face promoted"} if plain != oracle_match(anchors, boxes, **scene.match)[0] else set()
                if scene.ignore_boxes is not None:
                    covered = oracle_match(anchors, boxes, ignore_boxes=scene.ignore_boxes[image], **options)[0]
                    found |= {"negative covered"} if covered != plain else set()
        found |= {"image without faces"} if any(len(boxes) == 0 for boxes in scene.gt_boxes) else set()
        found |= {"grid without anchors"} if len(anchors) == 0 else set()
        seen.update(found)

    count()
    cases = {
        *("dtype torch.float32", "dtype torch.float64", "all", "best", "none", "integer faces", "random faces"),
        *("several aspect ratios in a group", "faces tie", "anchors tie", "exactly pos_iou", "exactly neg_iou"),
        *("face without overlap", "face promoted", "ignore regions", "negative covered"),
        *("image without faces", "grid without anchors", *BAD_BOXES),
    }
    assert {case: seen[case] for case in cases if seen[case] < 5} == {}


@pytest.mark.parametrize("device", devices())
def test_second_pass_rescues_an_unmatched_face(device):
    anchors = torch.tensor([[0, 0, 16, 16], [32, 0, 48, 16], [100, 100, 116, 116]], dtype=torch.float32, device=device)
    faces = torch.tensor([[0, 0, 16, 16], [32, 0, 48, 8]], dtype=torch.float32, device=device)  # IoU 1, then 128 / 256
    result = match_anchors(anchors, faces, pos_iou=0.6, neg_iou=0.4)
    assert result.labels.tolist() == [1, 1, 0]
    assert result.matched_gt.tolist() == [0, 1, -1]
    assert result.best_iou.tolist() == [1.0, 0.5, 0.0]
    assert match_anchors(anchors, faces, second_pass="none").labels.tolist() == [1, -1, 0]


@pytest.mark.parametrize("device", devices())
def test_second_pass_all_and_best(device):
    # IoUs with the face: 50 / 150 twice, 60 / 140 and 50 / 100. None reaches 0.6.
    anchors = torch.tensor([[0, 5, 10, 15], [0, -5, 10, 5], [4, 0, 14, 10], [0, 0, 10, 5]], dtype=torch.float64)
    anchors = anchors.to(device)
    face = torch.tensor([[0, 0, 10, 10]], dtype=torch.float64, device=device)
    result = match_anchors(anchors, face, second_pass="all")
    assert result.labels.tolist() == [0, 0, 1, 1]
    assert match_anchors(anchors, face, second_pass="best").labels.tolist() == [0, 0, -1, 1]
    twice = torch.cat([anchors, anchors])
    assert match_anchors(twice, face, second_pass="best").labels.tolist() == [0, 0, -1, 1, 0, 0, -1, -1]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_reached_not_exceeded(device, dtype):
    anchors = torch.tensor([[0, 0, 5, 1], [10, 0, 15, 1], [20, 0, 30, 1]], dtype=dtype, device=device)
    faces = torch.tensor([[0, 0, 3, 1], [10, 0, 12, 1], [20, 0, 27, 1]], dtype=dtype, device=device)
    assert match_anchors(anchors, faces, second_pass="none").labels.tolist() == [1, -1, 1]
    # 7 / 10 is not 0.7 in either type, but the threshold is rounded the same way.
    assert match_anchors(anchors, faces, pos_iou=0.7, second_pass="none").labels.tolist() == [-1, -1, 1]


@pytest.mark.parametrize("device", devices())
def test_a_tie_goes_to_the_first_face(device):
    anchor = torch.tensor([[0.0, 0, 10, 10]], device=device)
    faces = torch.tensor([[2.0, 0, 12, 10], [-2, 0, 8, 10], [2, 0, 12, 10]], device=device)
    assert match_anchors(anchor, faces).matched_gt.tolist() == [0]
    assert match_anchors(anchor, faces.flip(0)).matched_gt.tolist() == [0]


@pytest.mark.parametrize("device", devices())
def test_ignore_regions_spare_positives(device):
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], device=device)
    face = anchors[:1]
    regions = torch.tensor([[0.0, 0, 25, 10], [40, 0, 44, 10]], device=device)  # all, half, 4/10 of the anchors
    result = match_anchors(anchors, face, ignore_boxes=regions, ignore_ioa=0.5)
    assert result.labels.tolist() == [1, -1, 0]
    assert result.matched_gt.tolist() == [0, -1, -1]


GRID = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64], [1.0, 1.5])], [4], [(30, 33)])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", BAD_BOXES)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_face_changes_nothing_for_the_others(device, kind, position):
    good = np.array([[20, 20, 52, 56], [70, 30, 86, 44]], dtype=np.float32)
    faces = torch.from_numpy(np.insert(good, position, BAD_BOXES[kind], axis=0)).to(device)
    want = match_anchor_grid(GRID, [torch.from_numpy(good).to(device)])
    for result in (
        match_anchor_grid(GRID, [faces]),
        [part[None] for part in match_anchors(GRID.boxes(device), faces)],
    ):
        assert torch.equal(result[0], want.labels)
        assert torch.equal(result[2], want.best_iou)
        assert torch.equal(result[1], torch.where(want.matched_gt >= position, want.matched_gt + 1, want.matched_gt))
    alone = match_anchor_grid(GRID, [faces[position : position + 1]])
    assert not alone.labels.any()


@pytest.mark.parametrize("device", devices())
def test_bad_anchors_are_negatives(device):
    bad = torch.tensor(list(BAD_BOXES.values()), device=device)
    everything = torch.tensor([[-1e3, -1e3, 1e3, 1e3], [20, 20, 40, 40]], device=device)
    result = match_anchors(bad, everything, pos_iou=0.01, neg_iou=1e-6, ignore_boxes=everything, ignore_ioa=0.01)
    assert not result.labels.any()
    assert (result.matched_gt == -1).all()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("n, m", [(0, 0), (5, 0), (0, 3), (1, 1), (63, 7), (64, 1), (257, 33)])  # around block sizes
def test_sizes(device, n, m):
    generator = torch.Generator().manual_seed(n * 100 + m)
    corners = torch.rand(n + m, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 5 + 30 * torch.rand(n + m, 2, generator=generator)], 1).to(device)
    options = {"pos_iou": 0.5, "neg_iou": 0.3, "second_pass": "all", "ignore_boxes": boxes[:2], "ignore_ioa": 0.9}
    result = match_anchors(boxes[:n], boxes[n:], **options)
    assert all(torch.equal(*pair) for pair in zip(result, reference.match_anchors(boxes[:n], boxes[n:], **options)))


@pytest.mark.parametrize("device", devices())
def test_layout_in_memory_does_not_matter(device):
    faces = torch.tensor([[20, 20, 52, 56], [70, 30, 86, 44]], dtype=torch.float32, device=device)
    strided = torch.stack([faces, -faces], 2)[..., 0]
    columns = GRID.boxes(device).t().contiguous().t()
    assert not strided.is_contiguous() and not columns.is_contiguous()
    want = match_anchors(GRID.boxes(device), faces)
    for result in (match_anchors(columns, strided), match_anchor_grid(GRID, [strided])):
        assert all(torch.equal(a.view(-1), b) for a, b in zip(result, want))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(device, dtype):
    faces = torch.tensor([[20, 20, 52, 56], [70, 30, 86, 44]], dtype=dtype, device=device)
    result = match_anchor_grid(GRID, [faces])
    assert result.best_iou.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(result, match_anchor_grid(GRID, [faces.float()])))


@pytest.mark.parametrize("device", devices())
def test_order_of_anchors_does_not_matter(device):
    faces = torch.tensor([[20, 20, 52, 56], [70, 30, 86, 44], [21, 20, 52, 56]], dtype=torch.float32, device=device)
    anchors = GRID.boxes(device)
    order = torch.randperm(len(anchors), generator=torch.Generator().manual_seed(0)).to(device)
    want = match_anchors(anchors, faces)
    assert all(torch.equal(a, b[order]) for a, b in zip(match_anchors(anchors[order], faces), want))


def test_number_of_threads_does_not_matter(crowd):
    grid, faces = crowd
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([*match_anchor_grid(grid, faces), *match_anchors(grid.boxes(), faces[0])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_empty_batch():
    result = match_anchor_grid(GRID, [])
    assert [tuple(part.shape) for part in result] == [(0, GRID.num_anchors)] * 3


def test_grid_without_anchors():
    grid = AnchorGrid.from_cell_anchors([cell_anchors([16], [1.0])], [4], [(0, 7)])
    assert match_anchor_grid(grid, [torch.tensor([[0.0, 0, 16, 16]])]).labels.shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_hold_where_coordinates_round(dtype):
    """Base boxes off the origin and large grids: anchors are rounded by more than the faces."""
    generator = torch.Generator().manual_seed(3)
    for base_shift in (0.0, 1000.3, -77777.7):
        base = torch.tensor([[-3.3, -2.7, 3.1, 2.9], [-8.1, -4.05, 8.3, 4.1]]) + base_shift
        grid = AnchorGrid.from_cell_anchors([base], [3], [(40, 45)], offset=0.3)
        anchors = grid.boxes(dtype=dtype)
        faces = anchors[torch.randint(0, len(anchors), (60,), generator=generator)]
        faces = faces + torch.randn(60, 4, generator=generator, dtype=dtype)
        for neg_iou in (0.4, 0.05, 1e-6):
            result = match_anchor_grid(grid, [faces], neg_iou=neg_iou)
            want = match_anchors(anchors, faces, neg_iou=neg_iou)
            assert all(torch.equal(a[0], b) for a, b in zip(result, want))
