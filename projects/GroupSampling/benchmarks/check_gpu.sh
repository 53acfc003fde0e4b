#!/usr/bin/env bash
# Everything that needs a GPU: build, the operators' tests on CUDA, memcheck and racecheck, the benchmarks.
# Run it from the repository root, in an environment that has the project's dependencies:
#   projects/GroupSampling/benchmarks/check_gpu.sh [python]
set -euo pipefail
python=${1:-python}
results=projects/GroupSampling/benchmarks/results
tests=(tests/ops tests/test_anchors.py)

# What is missing is said now, before anything is installed or built.
for tool in nvcc compute-sanitizer; do
  command -v "$tool" > /dev/null || { echo "check_gpu.sh: $tool, of the CUDA toolkit, is not on PATH" >&2; exit 1; }
done
"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"check_gpu.sh: torch {torch.__version__} sees no GPU")'

GS_BUILD_EXT=1 FORCE_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --editable .

export GS_REQUIRE_CUDA=1  # a missing GPU fails instead of skipping
"$python" -m pytest "${tests[@]}" -m "cuda and not slow"
"$python" -m pytest "${tests[@]}" -m "cuda and slow" --timeout 3600

# The sanitizers slow kernels down a hundredfold: the tests by hand and of sizes, without the thousands of scenes. torch
# caches device memory; without the cache every array is its own allocation, and memcheck sees each of its ends.
for tool in memcheck racecheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "$python" -m pytest tests/ops/test_op_iou.py tests/ops/test_op_match.py tests/ops/test_op_sample.py \
    -m "cuda and not slow" -k "not oracle and not counts and not walk and not group_ids" --timeout 3600
done

mkdir -p "$results"
"$python" projects/GroupSampling/benchmarks/bench_matcher.py --device cuda --json "$results/bench_matcher_cuda.json"
"$python" projects/GroupSampling/benchmarks/bench_iteration.py --device cuda --json "$results/bench_iteration_cuda.json"
