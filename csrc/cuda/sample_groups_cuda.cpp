#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../sample_groups.h"
#include "call_arrays.h"

namespace group_sampling {
namespace {

void sample_groups_cuda(const SampleGroupsCall& call) {
  const c10::cuda::CUDAGuard guard(call.labels.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t num_images = call.labels.size(0), n = call.labels.size(1), num_groups = call.num_groups;
  // Sorted with their anchors, ids have each group's members side by side, in ascending order: the sort is stable.
  at::Tensor sorted_ids, sorted_anchors;
  if (call.group_ids.defined())
    std::tie(sorted_ids, sorted_anchors) =
        at::sort(call.group_ids, /*stable=*/std::optional<bool>(true), /*dim=*/0, /*descending=*/false);

  const GridTables tables(call.layout, num_images);
  Workspace workspace;
  const auto table = workspace.reserve<uint8_t>(tables.tables().bytes);
  const RankArrays ranks(workspace, num_images, n, num_groups);
  const auto member_of = workspace.reserve<int32_t>(call.group_ids.defined() ? n : 0);
  const auto group_offsets = workspace.reserve<int64_t>(call.group_ids.defined() ? num_groups + 1 : 0);
  workspace.allocate(call.labels.options());

  auto* device = workspace.at<uint8_t>(table);
  cuda::Tables shape = tables.tables();
  cuda::MemberTable members = tables.members(device);
  if (call.group_ids.defined()) {
    members = {nullptr,
               0,
               call.group_ids.const_data_ptr<int64_t>(),
               workspace.at<int32_t>(member_of),
               sorted_anchors.const_data_ptr<int64_t>(),
               workspace.at<int64_t>(group_offsets),
               num_groups};
    shape.num_groups = num_groups;
    cuda::number_members(sorted_ids.const_data_ptr<int64_t>(), members.members, n, num_groups,
                         workspace.at<int64_t>(group_offsets), workspace.at<int32_t>(member_of), stream);
  }
  const auto bits = ranks.bits(workspace);
  cuda::prepare<float>(shape, tables.host(), device, workspace.clears(), call.options, ranks.permutations(workspace),
                       call.group_ids.defined() ? members.group_offsets : nullptr, {}, {}, stream);
  cuda::mark_labels(call.labels.const_data_ptr<int8_t>(), num_images, n, members, bits, stream);
  cuda::draw(num_images, n, members, bits, call.options, nullptr,
             {std::get<0>(call.out).mutable_data_ptr<int64_t>(), nullptr, nullptr,
              std::get<1>(call.out).mutable_data_ptr<int64_t>(), std::get<2>(call.out).mutable_data_ptr<int64_t>()},
             stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

using SampleGroupsCuda = Kernel<prepare_sample_groups, sample_groups_cuda>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CUDA, m) {
  m.impl("sample_groups", TORCH_FN(group_sampling::SampleGroupsCuda::call));
}
