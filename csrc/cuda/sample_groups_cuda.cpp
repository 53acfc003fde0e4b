#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../sample_groups.h"
#include "workspace.h"

namespace group_sampling {
namespace {

void sample_groups_cuda(const SampleGroupsCall& call) {
  const c10::cuda::CUDAGuard guard(call.labels.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t num_images = call.labels.size(0), n = call.labels.size(1), num_groups = call.num_groups;
  HostTables tables;
  const std::vector<int64_t> group_offsets = prefix_sums(call.layout.group_sizes);
  const int64_t lattices = tables.add(call.layout.lattices.data(), call.layout.lattices.size());
  const int64_t groups = tables.add(group_offsets.data(), group_offsets.size());
  Workspace workspace;
  const int64_t uploaded = workspace.reserve<uint8_t>(tables.size());
  const RankArrays ranks(workspace, num_images, n, num_groups);
  const int64_t num_ids = call.group_ids.defined() ? n : 0;
  const int64_t id_blocks = (num_ids + cuda::kIdBlock - 1) / cuda::kIdBlock;
  const int64_t counts = workspace.reserve<int32_t>(id_blocks * num_groups);
  const int64_t member_of = workspace.reserve<int32_t>(num_ids);
  const int64_t members = workspace.reserve<int64_t>(num_ids);
  const int64_t id_offsets = workspace.reserve<int64_t>(num_groups + 1);
  workspace.allocate_zeroed(call.labels.options());

  cuda::MemberTable table{};
  table.num_groups = num_groups;
  if (call.group_ids.defined()) {
    table.group_ids = call.group_ids.const_data_ptr<int64_t>();
    table.member_of = workspace.at<int32_t>(member_of);
    table.members = workspace.at<int64_t>(members);
    table.group_offsets = workspace.at<int64_t>(id_offsets);
    cuda::number_members(table.group_ids, n, num_groups, workspace.at<int32_t>(counts),
                         workspace.at<int32_t>(member_of), workspace.at<int64_t>(members),
                         workspace.at<int64_t>(id_offsets), stream);
  } else {
    cuda::upload(tables.data(), tables.size(), workspace.at<uint8_t>(uploaded), stream);
    table.grid = {workspace.at<Lattice>(uploaded + lattices), static_cast<int64_t>(call.layout.lattices.size()), n};
    table.group_offsets = workspace.at<int64_t>(uploaded + groups);
  }
  cuda::sample_labels(
      call.labels.const_data_ptr<int8_t>(), num_images, n, table, ranks.bits(workspace), call.options,
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
