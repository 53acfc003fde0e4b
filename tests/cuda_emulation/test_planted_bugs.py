"""The emulated run finds what it is there to find: bugs planted in the kernels, each by the check that is named."""

import re
import shutil
from typing import NamedTuple

import pytest
import torch
from cuda_emulation.emulation import Emulation, build

from group_sampling.anchors import AnchorGrid, cell_anchors
from group_sampling.ops import assign_and_sample, match_anchor_grid, match_anchors, pairwise_iou, sample_groups


class Bug(NamedTuple):
    file: str
    old: str  # occurs once in the file
    new: str
    found_by: str  # the check; for two alternatives, the order of the threads decides


BUGS = {
    "no barrier before shared memory is read": Bug(
        "cuda/match_kernels.cu",
        """row0, window.row1};
        }
        __syncthreads();""",
        """row0, window.row1};
        }""",
        "race or uninitialized",
    ),
    "no barrier before other threads' words are read": Bug(
        "cuda/sample_kernels.cu",
        "scratch.indices[thread] = index;\n      __syncthreads();",
        "scratch.indices[thread] = index;",
        "race or uninitialized",
    ),
    "no barrier after the copy of the tables": Bug(
        "cuda/prepare_kernels.cu",
        "  __syncthreads();\n  const void* all",
        "  const void* all",
        "race or uninitialized",
    ),
    "one array where calls must take turns with two": Bug(
        "cuda/match_kernels.cu",
        "turn = 1 - turn;\n        const int place = place_in_block<kWarps>",
        "const int place = place_in_block<kWarps>",
        "race",
    ),
    "a bit set without an atomic operation": Bug(
        "cuda/device_utils.h",
        "const uint32_t before = atomicOr(bits.not_negative + word + w, bit);",
        "const uint32_t before = bits.not_negative[word + w];\n    bits.not_negative[word + w] = before | bit;",
        "race",
    ),
    "a counter of all blocks without an atomic operation": Bug(
        "cuda/match_kernels.cu",
        "first = atomicAdd(rescue.num_candidates, static_cast<unsigned long long>(__popc(listed)));",
        "first = *rescue.num_candidates, *rescue.num_candidates = first + __popc(listed);",
        "race",
    ),
    "one row too many": Bug(
        "cuda/pairwise_iou_kernels.cu",
        "row < first_row + kRowsPerThread && row < n",
        "row < first_row + kRowsPerThread",
        "bounds",
    ),
    "one window too many": Bug(
        "cuda/match_kernels.cu", "if (number < last) window", "if (number <= last) window", "bounds"
    ),
    "shared memory for half of the warps": Bug(
        "cuda/match_kernels.cu",
        "__shared__ int32_t counts[2][kWarps];",
        "__shared__ int32_t counts[2][kWarps / 2];",
        "bounds",
    ),
    "shared memory for too few boxes": Bug(
        "cuda/match_kernels.cu",
        "__shared__ Reached<T> reached[kThreads];",
        "__shared__ Reached<T> reached[kThreads / 8];",
        "bounds",
    ),
    "an array that is not cleared": Bug(
        "cuda/prepare_kernels.cu",
        "for (int k = 0; k < clears.count; ++k) {",
        "for (int k = 1; k < clears.count; ++k) {",
        "uninitialized",
    ),
    "a stride of two grids of blocks": Bug(
        "cuda/sample_kernels.cu",
        "draw < num_draws; draw += gridDim.x",
        "draw < num_draws; draw += 2 * gridDim.x",
        "uninitialized",
    ),
    "the rest of a sample left as it was": Bug(
        "cuda/sample_kernels.cu", "      write(place, -1, -1, -1);", "", "uninitialized"
    ),
    "a barrier for some threads only": Bug(
        "cuda/match_kernels.cu",
        "__syncthreads();  // warp_reach is written again",
        "if (anchor < num_anchors) __syncthreads();",
        "divergence",
    ),
    "threads that leave before a barrier": Bug(
        "cuda/match_kernels.cu", "if (count == 0) continue;", "if (!keep) continue;", "divergence"
    ),
    "lanes that leave before a warp's vote": Bug(
        "cuda/match_kernels.cu",
        "const Box<T> box = anchor < num_anchors ? load_box(anchors + anchor) : Box<T>{};",
        "if (anchor >= num_anchors) break;\n    const Box<T> box = load_box(anchors + anchor);",
        "divergence",
    ),
    "a search that never ends": Bug(
        "cuda/device_utils.h", "while (high - low > 1) {", "while (high - low > 0) {", "hang"
    ),
    "a walk that never ends": Bug("permutation.h", "} while (rank >= p.size);", "} while (rank < p.a * p.b);", "hang"),
    "a tie to the last ground truth": Bug(
        "cuda/match_kernels.cu", "if (value > best[k]) {", "if (value >= best[k]) {", "wrong result"
    ),
    "a tie to the last anchor": Bug(
        "cuda/device_utils.h",
        "return UINT64_MAX - static_cast<unsigned long long>(anchor);",
        "return static_cast<unsigned long long>(anchor) + 1;",
        "wrong result",
    ),
    "a product in 32 bits": Bug(
        "permutation.h",
        "(static_cast<uint64_t>(x) * range) >> 32",
        "static_cast<uint64_t>(x * range) >> 32",
        "wrong result",
    ),
    "an iteration in 32 bits": Bug(
        "permutation.h", "static_cast<uint64_t>(iteration)", "static_cast<uint32_t>(iteration)", "wrong result"
    ),
    "no mask for the last word": Bug(
        "cuda/sample_kernels.cu",
        "return left < 32 ? word & ((1u << left) - 1u) : word;",
        "return word;",
        "wrong result",
    ),
    "a wrong initial value": Bug("cuda/match_kernels.cu", "best[k] = T(0);", "best[k] = thresholds.neg_iou;", "bounds"),
}
FAST = ("one array where calls must take turns with two", "one row too many")


def probes():
    """Calls that touch every kernel: odd sizes, ties, several images and groups, more than a block has threads."""
    grid = AnchorGrid.from_cell_anchors(
        [cell_anchors([16, 32], [1.0]), cell_anchors([64], [1.0, 2.0])], [4, 8], [(37, 41), (9, 11)]
    )
    generator = torch.Generator().manual_seed(7)

    def faces(count, dtype=torch.float32):
        corner = torch.randint(0, 150, (count, 2), generator=generator)
        size = torch.randint(12, 80, (count, 2), generator=generator)
        return torch.cat([corner, corner + size], 1).to(dtype)

    crowd = faces(300)
    crowd[3] = torch.nan
    crowd[20:40] = crowd[60:80]
    images, regions = [crowd, faces(0), faces(5)], [faces(2), faces(1), faces(0)]
    anchors = grid.boxes()[:700]
    labels = torch.randint(-1, 2, (2, grid.num_anchors), generator=generator).to(torch.int8)
    ids = torch.randint(-1, 5, (grid.num_anchors,), generator=generator)
    draw = {"seed": 3, "iteration": 2**33 + 5}
    for second_pass, samples in (("all", 9), ("best", 300)):
        options = {"second_pass": second_pass, "pos_iou": 0.75}
        yield match_anchor_grid, (grid, images), {"ignore_boxes": regions, **options}
        yield match_anchors, (anchors, crowd), {"ignore_boxes": regions[0], **options}
        options["samples_per_group"] = samples
        yield assign_and_sample, (grid, images), {"ignore_boxes": regions, **options, **draw}
    yield assign_and_sample, (grid.merged(), [faces(4, torch.float64)]), {"samples_per_group": 5000, **draw}
    yield sample_groups, (labels, ids), {"num_groups": 4, "samples_per_group": 40, **draw}
    yield pairwise_iou, (anchors[:101], crowd), {}
    small = AnchorGrid.from_cell_anchors([cell_anchors([32], [1.0])], [16], [(3, 3)])
    yield match_anchor_grid, (small, [faces(1)] * 100), {}  # tables that do not travel as a kernel's arguments


@pytest.fixture(scope="module")
def expected():
    """(call, arguments, options, result of the C++ operators)."""
    found = []
    for call, arguments, options in probes():
        result = call(*arguments, **options)
        found.append((call, arguments, options, result if isinstance(result, tuple) else (result,)))
    return found


def found_by(emulation, expected, seeds):
    """Name of the first check that fails, or None; an error that is no check's is raised."""
    for seed in seeds:
        with emulation.operators(seed):
            for call, arguments, options, want in expected:
                try:
                    result = call(*arguments, **options)
                except RuntimeError as error:
                    check = re.match(r"emulated CUDA: .+?: (bounds|uninitialized|race|divergence|hang): ", str(error))
                    if check is None:
                        raise
                    return check.group(1)
                if not all(torch.equal(a, b) for a, b in zip(result if isinstance(result, tuple) else (result,), want)):
                    return "wrong result"
    return None


def with_bug(repository, folder, bug):
    shutil.copytree(repository / "csrc", folder)
    path = folder / bug.file
    text = path.read_text()
    assert text.count(bug.old) == 1, f"expected the text to replace once in {bug.file}, got {text.count(bug.old)}"
    path.write_text(text.replace(bug.old, bug.new))
    return Emulation(build(folder))


def test_nothing_is_found_in_the_kernels_as_they_are(repository, emulation, expected):
    emulation.reset_counts()
    assert found_by(emulation, expected, [1]) is None
    sources = "".join(path.read_text() for path in (repository / "csrc/cuda").glob("*.cu"))
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(", sources))
    assert {name.split("<")[0] for name in emulation.counts()} == kernels


@pytest.mark.slow
def test_nothing_is_found_with_many_schedules(emulation, expected):
    assert found_by(emulation, expected, range(100, 140)) is None


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BUGS]
)
def test_a_planted_bug_is_found(repository, tmp_path, expected, name):
    emulation = with_bug(repository, tmp_path / "csrc", BUGS[name])
    assert found_by(emulation, expected, range(5)) in BUGS[name].found_by.split(" or ")
