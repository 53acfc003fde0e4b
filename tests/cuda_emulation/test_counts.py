"""How much the kernels do, counted by the emulated run: work evenly spread, few launches, little memory cleared.

``pytest -m slow -s`` on this file prints the figures of docs/operator.md.
"""

import pytest
import torch

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample

BOX_BYTES, WINDOW_BYTES, PERMUTATION_BYTES, LATTICE_BYTES, IMAGE_BYTES = 16, 16, 112, 96, 32


def count(emulation, grid, faces, **options):
    """Counts of one call, by kernel, after their print."""
    with emulation.operators(cut_grids=False):
        emulation.reset_counts()
        assign_and_sample(grid, faces, seed=1, **options)
        kernels = emulation.counts()
    kernels = {name.split("<")[0]: kernel for name, kernel in kernels.items()}
    shown = {key: value for key, value in options.items() if key != "ignore_boxes"}
    print(f"\n{grid.num_anchors} anchors, {[len(boxes) for boxes in faces]} faces, {shown}")
    for name, kernel in kernels.items():
        print(
            f"  {name:15s} {kernel['launches']} x {kernel['blocks']} blocks; accesses: busiest thread "
            f"{kernel['busiest_accesses']}, mean of its block {kernel['mean_accesses']:.0f}, all {kernel['accesses']}; "
            f"steps: {kernel['busiest_steps']}, {kernel['mean_steps']:.0f}, {kernel['steps']}; "
            f"bytes: read {kernel['bytes_read']}, written {kernel['bytes_written']}"
        )
    accesses, moved = (
        sum(kernel[a] + kernel[b] for kernel in kernels.values())
        for a, b in (("accesses", "launches"), ("bytes_read", "bytes_written"))
    )
    print(f"  all accesses {accesses}, bytes moved {moved}, cleared {cleared(grid, faces, options)}")
    return kernels


def cleared(grid, faces, options):
    """Bytes that a call has to clear: two bitmaps with their summaries, and pass 2's per face."""
    num_faces, policy = sum(map(len, faces)), options.get("second_pass", "all")
    words = grid.num_anchors // 32 + grid.num_groups
    bitmaps = 2 * len(faces) * 4 * (words + 1 + words // 32 + grid.num_groups + 1)
    taken = 4 * num_faces + 8 if policy != "none" and num_faces else 0
    best = (4 + 8) * num_faces if policy == "best" else 0
    return bitmaps + taken + best


def check(kernels, grid, faces, options):
    assert sum(kernel["launches"] for kernel in kernels.values()) == (5 if options.get("second_pass") == "best" else 4)
    draw = kernels["draw_kernel"]
    assert draw["busiest_accesses"] <= 4 * draw["mean_accesses"]
    assert draw["busiest_steps"] <= 4 * draw["mean_steps"]

    num_boxes = sum(map(len, faces)) + sum(map(len, options.get("ignore_boxes", ())))
    num_lattices, num_groups, num_images = len(grid.lattices), grid.num_groups, len(faces)
    tables = LATTICE_BYTES * num_lattices + 8 * (num_lattices + 1 + num_groups + 1) + IMAGE_BYTES * (num_images + 1)
    made = num_boxes * (BOX_BYTES + WINDOW_BYTES * num_lattices) + PERMUTATION_BYTES * num_images * num_groups
    assert kernels["prepare_kernel"]["bytes_written"] == cleared(grid, faces, options) + tables + made


@pytest.mark.parametrize("samples", [64, 2048])
@pytest.mark.parametrize("second_pass", ["all", "best"])
def test_work_of_a_small_scene(emulation, samples, second_pass):
    grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32], [1.0])], [4], [(70, 70)])
    corner = torch.rand(60, 2, generator=torch.Generator().manual_seed(2)) * 230
    faces = torch.cat([corner, corner + torch.rand(60, 1, generator=torch.Generator().manual_seed(3)) * 40 + 8], 1)
    options = {"samples_per_group": samples, "second_pass": second_pass}
    check(count(emulation, grid, [faces, faces[:7]], **options), grid, [faces, faces[:7]], options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "anchors, images, options",
    [
        (360_000, 1, {"samples_per_group": 64}),
        (360_000, 1, {"samples_per_group": 2048}),
        (360_000, 1, {"samples_per_group": 2048, "second_pass": "best"}),
        (360_000, 1, {"samples_per_group": 2048, "ignore_boxes": [torch.tensor([[0.0, 0, 1200, 1200]])]}),
        (360_000, 8, {"samples_per_group": 64}),
        (360_000, 8, {"samples_per_group": 2048}),
        (2_250_000, 1, {"samples_per_group": 256}),  # in one group
    ],
)
def test_work_of_full_size_scenes(emulation, repository, monkeypatch, anchors, images, options):
    monkeypatch.syspath_prepend(repository / "projects/GroupSampling/benchmarks")
    from bench_matcher import make_faces, make_grid

    grid = make_grid(anchors)
    faces = [make_faces(1000, grid.lattices[0].height * 4)] * images
    if anchors == 2_250_000:
        grid = grid.merged()
    check(count(emulation, grid, faces, **options), grid, faces, options)
