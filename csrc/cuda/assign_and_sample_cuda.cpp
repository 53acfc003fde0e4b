#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../assign_and_sample.h"
#include "../kernel.h"
#include "match_windows.h"

namespace group_sampling {
namespace {

template <typename T>
void match_and_sample(const AssignAndSampleCall& call, cudaStream_t stream) {
  const cuda::SampleOutput out{
      std::get<0>(call.out).mutable_data_ptr<int64_t>(), std::get<1>(call.out).mutable_data_ptr<int8_t>(),
      std::get<2>(call.out).mutable_data_ptr<int64_t>(), std::get<3>(call.out).mutable_data_ptr<int64_t>(),
      std::get<4>(call.out).mutable_data_ptr<int64_t>()};
  const auto num_images = static_cast<int64_t>(call.gt_boxes.size());
  const auto num_groups = static_cast<int64_t>(call.layout.group_sizes.size());
  match_grid<T>(
      call.layout, call.gt_boxes, call.ignore_boxes, call.match_options, stream,
      [&](Workspace& workspace) { return RankArrays(workspace, num_images, call.layout.num_anchors, num_groups); },
      [&](const Workspace& workspace, const RankArrays& ranks, const cuda::MatchState<T>& state,
          const cuda::MemberTable& members) {
        cuda::sample_matches(state, members, ranks.bits(workspace), call.draw_options, out, stream);
      });
}

void assign_and_sample_cuda(const AssignAndSampleCall& call) {
  const c10::cuda::CUDAGuard guard(call.gt_boxes[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(call.gt_boxes[0].scalar_type(), "assign_and_sample",
                             [&] { match_and_sample<scalar_t>(call, stream); });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

using AssignAndSampleCuda = Kernel<prepare_assign_and_sample, assign_and_sample_cuda>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CUDA, m) {
  m.impl("assign_and_sample", TORCH_FN(group_sampling::AssignAndSampleCuda::call));
}
