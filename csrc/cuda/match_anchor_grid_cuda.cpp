#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../match_anchor_grid.h"
#include "match_windows.h"

namespace group_sampling {
namespace {

template <typename T>
void match_by_windows(const MatchAnchorGridCall& call, cudaStream_t stream) {
  match_grid<T>(
      call.layout, call.gt_boxes, call.ignore_boxes, call.options, stream, [](Workspace&) { return 0; },
      [&](const Workspace&, int, const cuda::MatchState<T>& state, const cuda::MemberTable&) {
        const MatchOutput<T> out(call.out);
        cuda::write_matches(state, out.labels, out.matched_gt, out.best_iou, stream);
      });
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
