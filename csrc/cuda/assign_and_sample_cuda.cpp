#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../assign_and_sample.h"
#include "../kernel.h"
#include "call_arrays.h"

namespace group_sampling {
namespace {

template <typename T>
void match_and_sample(const AssignAndSampleCall& call, cudaStream_t stream) {
  const auto num_images = static_cast<int64_t>(call.gt_boxes.size());
  const auto num_groups = static_cast<int64_t>(call.layout.group_sizes.size());
  const int64_t n = call.layout.num_anchors;
  const GridTables tables(call.layout, num_images, call.gt_boxes, call.ignore_boxes);
  Workspace workspace;
  const auto table = workspace.reserve<uint8_t>(tables.tables().bytes);
  const BoxArrays<T> boxes(workspace, tables);
  const RescueArrays<T> rescues(workspace, call.match_options.second_pass, tables.num_gts(), num_images * n);
  const RankArrays ranks(workspace, num_images, n, num_groups);
  const bool any_box = tables.num_gts() + tables.num_ignores() > 0;
  const bool needs_iou = any_box && call.match_options.second_pass == SecondPass::kBest;
  const auto matched_gt = workspace.reserve<int32_t>(any_box ? num_images * n : 0);
  const auto matched_iou = workspace.reserve<T>(needs_iou ? num_images * n : 0);
  workspace.allocate(call.gt_boxes[0].options());

  auto* device = workspace.at<uint8_t>(table);
  const auto windows = boxes.windows(workspace);
  const auto limits = thresholds<T>(call.match_options);
  const auto members = tables.members(device);
  const auto bits = ranks.bits(workspace);
  const cuda::SparseMatches<T> matches{workspace.at<int32_t>(matched_gt),
                                       needs_iou ? workspace.at<T>(matched_iou) : nullptr};
  cuda::prepare<T>(tables.tables(), tables.host(), device, workspace.clears(), call.draw_options,
                   ranks.permutations(workspace), nullptr, windows, limits, stream);
  cuda::match_ranks<T>(tables.tables(), device, n, tables.num_tiles(), windows, limits, rescues.rescue(workspace),
                       members, bits, matches, stream);
  cuda::draw(num_images, n, members, bits, call.draw_options, matches.gt,
             {std::get<0>(call.out).mutable_data_ptr<int64_t>(), std::get<1>(call.out).mutable_data_ptr<int8_t>(),
              std::get<2>(call.out).mutable_data_ptr<int64_t>(), std::get<3>(call.out).mutable_data_ptr<int64_t>(),
              std::get<4>(call.out).mutable_data_ptr<int64_t>()},
             stream);
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
