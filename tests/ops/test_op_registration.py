"""The operators as torch sees them: dispatcher, fake kernels, torch.compile, the pybind11 route, loading."""

import os
import subprocess
import sys

import pytest
import torch
from strategies import devices

from group_sampling.anchors import MAX_CELLS, MIN_SIDE, AnchorGrid, cell_anchors
from group_sampling.ops import (
    _checks,
    _library,
    assign_and_sample,
    extension_status,
    match_anchor_grid,
    match_anchors,
    pairwise_iou,
    sample_groups,
)

needs_extension = pytest.mark.skipif(not extension_status().loaded, reason="the extension is not built")

GRID = AnchorGrid.from_cell_anchors([cell_anchors([16, 32], [1.0])], [4], [(10, 12)])
FACES = torch.tensor([[2.0, 3, 20, 22], [10, 8, 40, 44], [1, 1, 1, 5]])
MATCH = (0.6, 0.4, "all", 0.5)
DRAW = (8, 0.25, 1, 2, 3)
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # all


def calls(device):
    faces, labels = FACES.to(device), torch.zeros(2, GRID.num_anchors, dtype=torch.int8, device=device)
    lattices = (list(GRID.lattice_ints), list(GRID.lattice_floats))
    return {
        "pairwise_iou": (faces, faces[:1]),
        "match_anchors": (GRID.boxes(device), faces, faces[:1], *MATCH),
        "match_anchor_grid": ([faces, faces[:0]], [faces[:1], faces], *lattices, *MATCH),
        "sample_groups": (labels, None, lattices[0], GRID.num_groups, *DRAW),
        "assign_and_sample": ([faces, faces[:0]], [], *lattices, GRID.num_groups, *DRAW, *MATCH),
    }


@needs_extension
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", calls("cpu"))
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.group_sampling, name).default, calls(device)[name], test_utils=UTILITIES)


@needs_extension
@pytest.mark.parametrize("device", devices())
def test_opcheck_with_group_ids(device):
    labels = torch.zeros(2, 20, dtype=torch.int8, device=device)
    ids = torch.arange(20, device=device) % 3
    operator = torch.ops.group_sampling.sample_groups.default
    torch.library.opcheck(operator, (labels, ids, [], 3, *DRAW), test_utils=UTILITIES)


@needs_extension
@pytest.mark.parametrize("name", calls("cpu"))
def test_pybind_forwards_to_the_dispatcher(name):
    from group_sampling import _C

    result, want = getattr(_C, name)(*calls("cpu")[name]), getattr(torch.ops.group_sampling, name)(*calls("cpu")[name])
    result, want = ((r,) if isinstance(r, torch.Tensor) else r for r in (result, want))
    assert all(torch.equal(a, b) for a, b in zip(result, want))


@needs_extension
def test_pybind_binds_every_operator():
    from group_sampling import _C

    assert calls("cpu").keys() <= vars(_C).keys()
    assert torch.equal(_C.pairwise_iou(boxes1=FACES, boxes2=FACES[:1]), pairwise_iou(FACES, FACES[:1]))
    with pytest.raises(RuntimeError, match="boxes2"):
        _C.pairwise_iou(FACES)


@needs_extension
def test_limits_are_those_of_the_python_side():
    from group_sampling import _C

    assert _C.limits() == {"max_cells": MAX_CELLS, "min_side": MIN_SIDE, "min_threshold": _checks.MIN_THRESHOLD}


@needs_extension
def test_extension_imports_before_torch():
    program = """
import sys
import group_sampling
assert "torch" not in sys.modules  # who reads annotations does not wait for it
import group_sampling._C as extension
print(sorted(extension.build_info()))
import torch
print(torch.ops.group_sampling.pairwise_iou)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "compiler" in done.stdout and "group_sampling.pairwise_iou" in done.stdout


@needs_extension
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_small_work_stays_on_one_thread():
    """A thread that waits for a core holds up the others: one image must not depend on a second core, a batch may."""
    program = """
import os
import numpy as np
import torch
from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample, match_anchor_grid, pairwise_iou, sample_groups
torch.set_num_threads(2)
grid = AnchorGrid.from_cell_anchors([cell_anchors([16, 32, 64, 128], [1.0])], [4], [(300, 300)])
rng = np.random.default_rng(0)  # torch would wake its threads for this
corner = rng.uniform(0, 1100, (1000, 2))
faces = np.concatenate([corner, corner + np.exp(rng.uniform(1.8, 5.3, (1000, 1)))], 1)
faces = torch.from_numpy(faces.astype(np.float32))
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
for number in (64, 2048):
    assign_and_sample(grid, [faces], samples_per_group=number, seed=1)
labels = match_anchor_grid(grid, [faces]).labels
sample_groups(labels, grid, samples_per_group=2048, seed=1)
pairwise_iou(faces, faces)
print(threads() - before)
assign_and_sample(grid, [faces] * 16, samples_per_group=64, seed=1)
print(threads() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


class EveryOperator(torch.nn.Module):
    def forward(self, faces, iteration):
        labels = match_anchor_grid(GRID, [faces, faces[:1]]).labels
        drawn = assign_and_sample(GRID, [faces], samples_per_group=8, seed=1, iteration=iteration)
        return (
            pairwise_iou(faces, faces),
            *match_anchors(GRID.boxes(faces.device), faces),
            *sample_groups(labels, GRID, samples_per_group=8, seed=1, iteration=iteration),
            *drawn,
        )


@needs_extension
@pytest.mark.parametrize("device", devices())
def test_compile(device):
    torch.compiler.reset()
    module = EveryOperator()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for iteration, count in ((0, 3), (1, 3), (2, 2), (3, 1)):  # other iterations and other numbers of faces
        faces = FACES[:count].to(device)
        assert all(torch.equal(a, b) for a, b in zip(compiled(faces, iteration), module(faces, iteration)))


@needs_extension
def test_a_new_iteration_does_not_recompile():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(EveryOperator(), fullgraph=True, backend=counter)
    for iteration in range(6):
        compiled(FACES, iteration)
    assert counter.frame_count <= 2  # the first iteration, then one graph for all others


@needs_extension
@pytest.mark.cuda
def test_capture_in_a_cuda_graph():
    """No synchronisation and no allocation that depends on data: capture would fail on either."""
    faces, anchors, ids = FACES.cuda(), GRID.boxes("cuda"), GRID.group_ids("cuda")
    labels = match_anchor_grid(GRID, [faces]).labels

    def step():
        return [
            pairwise_iou(faces, faces),
            *match_anchors(anchors, faces, ignore_boxes=faces[:1]),
            *match_anchor_grid(GRID, [faces, faces[:0]]),
            *sample_groups(labels, ids, num_groups=2, samples_per_group=8, seed=1),
            *assign_and_sample(GRID, [faces, faces[:1]], samples_per_group=8, seed=1),
        ]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    faces += 4
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.cuda
def test_cuda_kernels_are_there():
    assert torch.cuda.is_available(), "GS_REQUIRE_CUDA=1, but torch sees no GPU"
    assert extension_status().cuda, extension_status().reason


@needs_extension
def test_build_info():
    info = extension_status().build_info
    assert {"compiler", "torch", "flags", "cuda"} <= set(info)
    assert extension_status().cuda == (info["cuda"] != "none")


def test_without_the_extension_the_reference_runs_and_says_so_once():
    program = """
import sys, warnings
sys.modules["group_sampling._C"] = None
import torch
from group_sampling.ops import extension_status, pairwise_iou
box = torch.tensor([[0.0, 0, 4, 4]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert pairwise_iou(box, box).item() == 1 and pairwise_iou(box, box).item() == 1
status = extension_status()
assert not status.loaded and not status.cuda and status.build_info == {}
assert len(caught) == 1 and status.reason in str(caught[0].message), caught
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_broken_extension_is_named(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(_library.importlib, "import_module", broken)
    status = _library._load()
    assert not status.loaded
    assert "rebuild it: undefined symbol: _ZN3c10" in status.reason
