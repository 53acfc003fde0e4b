// Windowed matching of a batch on the device, shared by match_anchor_grid and assign_and_sample.
#pragma once

#include "workspace.h"

namespace group_sampling {

// Matches a batch by windows and hands the state, the grid and the tables to `finish` for what is read off them.
// `reserve` adds the finisher's own arrays to the workspace.
template <typename T, typename Reserve, typename Finish>
void match_grid(const GridLayout& layout, at::TensorList gt_boxes, at::TensorList ignore_boxes,
                const MatchOptions& options, cudaStream_t stream, const Reserve& reserve, const Finish& finish) {
  const size_t num_images = gt_boxes.size();
  const Concatenated gts(gt_boxes, num_images), ignores(ignore_boxes, num_images);
  const std::vector<int64_t> group_offsets = prefix_sums(layout.group_sizes);
  HostTables tables;
  const int64_t lattices = tables.add(layout.lattices.data(), layout.lattices.size());
  const int64_t gt_offsets = tables.add(gts.offsets.data(), gts.offsets.size());
  const int64_t ignore_offsets = tables.add(ignores.offsets.data(), ignores.offsets.size());
  const int64_t groups = tables.add(group_offsets.data(), group_offsets.size());

  Workspace workspace;
  const int64_t uploaded = workspace.reserve<uint8_t>(tables.size());
  const StateArrays<T> arrays(workspace, static_cast<int64_t>(num_images), layout.num_anchors, gts.offsets.back(),
                              ignores.offsets.back(), options);
  const auto own = reserve(workspace);
  workspace.allocate_zeroed(gt_boxes[0].options());
  cuda::upload(tables.data(), tables.size(), workspace.at<uint8_t>(uploaded), stream);

  const auto state = arrays.state(workspace, workspace.at<int64_t>(uploaded + gt_offsets));
  const cuda::GridTable grid{workspace.at<Lattice>(uploaded + lattices), static_cast<int64_t>(layout.lattices.size()),
                             layout.num_anchors};
  cuda::match_windows(state, grid, gts.batch<T>(workspace.at<int64_t>(uploaded + gt_offsets)),
                      ignores.batch<T>(workspace.at<int64_t>(uploaded + ignore_offsets)), stream);
  cuda::second_pass(state, stream);
  const cuda::MemberTable members{grid,
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  workspace.at<int64_t>(uploaded + groups),
                                  static_cast<int64_t>(layout.group_sizes.size())};
  finish(workspace, own, state, members);
}

}  // namespace group_sampling
