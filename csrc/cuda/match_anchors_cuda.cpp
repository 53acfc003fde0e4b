#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../match_anchors.h"
#include "workspace.h"

namespace group_sampling {
namespace {

template <typename T>
void match_densely(const MatchAnchorsCall& call, cudaStream_t stream) {
  const int64_t n = call.anchors.size(0), num_gts = call.gt_boxes.size(0), num_ignores = call.ignore_boxes.size(0);
  Workspace workspace;
  const int64_t offsets = workspace.reserve<int64_t>(2);  // of the only image's ground truths: 0 is all that is read
  const StateArrays<T> arrays(workspace, 1, n, num_gts, num_ignores, call.options);
  workspace.allocate_zeroed(call.anchors.options());
  const auto state = arrays.state(workspace, workspace.at<int64_t>(offsets));
  const auto boxes_of = [](const at::Tensor& boxes) {
    return reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
  };
  cuda::match_dense<T>(state, boxes_of(call.anchors), {boxes_of(call.gt_boxes), nullptr, num_gts},
                       {boxes_of(call.ignore_boxes), nullptr, num_ignores}, stream);
  cuda::second_pass(state, stream);
  const MatchOutput<T> out(call.out);
  cuda::write_matches(state, out.labels, out.matched_gt, out.best_iou, stream);
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
