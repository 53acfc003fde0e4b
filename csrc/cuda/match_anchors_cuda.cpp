#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../match_anchors.h"
#include "call_arrays.h"

namespace group_sampling {
namespace {

template <typename T>
void match_densely(const MatchAnchorsCall& call, cudaStream_t stream) {
  const int64_t n = call.anchors.size(0), num_gts = call.gt_boxes.size(0);
  Workspace workspace;
  const RescueArrays<T> rescues(workspace, call.options.second_pass, num_gts, n);
  workspace.allocate(call.anchors.options());
  const auto rescue = rescues.rescue(workspace);
  const auto limits = thresholds<T>(call.options);
  const at::Tensor anchors = aligned(call.anchors), gts = aligned(call.gt_boxes), ignores = aligned(call.ignore_boxes);
  cuda::prepare<T>({}, nullptr, nullptr, workspace.clears(), {}, nullptr, nullptr, {}, limits, stream);
  const MatchOutput<T> out(call.out);
  cuda::match_dense<T>(aligned_boxes<T>(anchors), n, aligned_boxes<T>(gts), num_gts, aligned_boxes<T>(ignores),
                       ignores.size(0), limits, rescue, {out.labels, out.matched_gt, out.best_iou}, stream);
}

void match_anchors_cuda(const MatchAnchorsCall& call) {
  const c10::cuda::CUDAGuard guard(call.anchors.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(call.anchors.scalar_type(), "match_anchors",
                             [&] { match_densely<scalar_t>(call, stream); });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

using MatchAnchorsCuda = Kernel<prepare_match_anchors, match_anchors_cuda>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CUDA, m) {
  m.impl("match_anchors", TORCH_FN(group_sampling::MatchAnchorsCuda::call));
}
