#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../match_anchor_grid.h"
#include "call_arrays.h"

namespace group_sampling {
namespace {

template <typename T>
void match_by_windows(const MatchAnchorGridCall& call, cudaStream_t stream) {
  const auto num_images = static_cast<int64_t>(call.gt_boxes.size());
  const int64_t n = call.layout.num_anchors;
  const GridTables tables(call.layout, num_images, call.gt_boxes, call.ignore_boxes);
  Workspace workspace;
  const auto table = workspace.reserve<uint8_t>(tables.tables().bytes);
  const BoxArrays<T> boxes(workspace, tables);
  const RescueArrays<T> rescues(workspace, call.options.second_pass, tables.num_gts(), num_images * n);
  workspace.allocate(call.gt_boxes[0].options());
  auto* device = workspace.at<uint8_t>(table);
  const auto windows = boxes.windows(workspace);
  const auto limits = thresholds<T>(call.options);
  cuda::prepare<T>(tables.tables(), tables.host(), device, workspace.clears(), {}, nullptr, nullptr, windows, limits,
                   stream);
  const MatchOutput<T> out(call.out);
  cuda::match_windows<T>(tables.tables(), device, n, tables.num_tiles(), windows, limits, rescues.rescue(workspace),
                         {out.labels, out.matched_gt, out.best_iou}, stream);
}

void match_anchor_grid_cuda(const MatchAnchorGridCall& call) {
  const c10::cuda::CUDAGuard guard(call.gt_boxes[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(call.gt_boxes[0].scalar_type(), "match_anchor_grid",
                             [&] { match_by_windows<scalar_t>(call, stream); });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

using MatchAnchorGridCuda = Kernel<prepare_match_anchor_grid, match_anchor_grid_cuda>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CUDA, m) {
  m.impl("match_anchor_grid", TORCH_FN(group_sampling::MatchAnchorGridCuda::call));
}
