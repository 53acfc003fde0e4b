#!/usr/bin/env bash
# Everything that needs a GPU: build, the operators' tests on CUDA, memcheck and racecheck, the benchmark.
# Run it from the repository root, in an environment that has the project's dependencies:
#   projects/GroupSampling/benchmarks/check_gpu.sh [python]
set -euo pipefail
python=${1:-python}
results=projects/GroupSampling/benchmarks/results

GS_BUILD_EXT=1 FORCE_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --editable .

export GS_REQUIRE_CUDA=1  # a missing GPU fails instead of skipping
"$python" -m pytest tests/ops -m "cuda and not slow"
"$python" -m pytest tests/ops -m "cuda and slow"

# The sanitizers slow kernels down a hundredfold: the tests by hand and of sizes, without the thousands of scenes. torch
# caches device memory; without the cache every array is its own allocation, and memcheck sees each of its ends.
for tool in memcheck racecheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "$python" -m pytest tests/ops/test_op_iou.py tests/ops/test_op_match.py tests/ops/test_op_sample.py \
    -m "cuda and not slow" -k "not oracle and not counts and not walk and not group_ids"
done

mkdir -p "$results"
"$python" projects/GroupSampling/benchmarks/bench_matcher.py --device cuda --json "$results/bench_matcher_cuda.json"
