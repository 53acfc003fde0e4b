// assign_and_sample(gt_boxes: B x (m_b, 4), ignore_boxes: B x (k_b, 4) or empty, grid, G, N, ...)
//     -> indices (B, G, N) int64, labels (B, G, N) int8, matched_gt (B, G, N) int64, num_pos (B, G) int64,
//        num_neg (B, G) int64
//
// match_anchor_grid followed by sample_groups, bit for bit: the training path. On the CPU it keeps only the anchors
// that are not negative, which lie in the windows of the ground truths and of the ignore boxes, and draws negatives by
// walking the permutation past them: time and memory follow the boxes and N, not n. Padding: -1 in all three.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "grid_layout.h"
#include "options.h"

namespace group_sampling {

struct AssignAndSampleCall {
  std::vector<at::Tensor> gt_boxes, ignore_boxes;  // contiguous; ignore_boxes may be empty
  GridLayout layout;
  MatchOptions match_options;
  DrawOptions draw_options;
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> out;  // as listed above
};

AssignAndSampleCall prepare_assign_and_sample(at::TensorList gt_boxes, at::TensorList ignore_boxes,
                                              at::IntArrayRef lattice_ints, at::ArrayRef<double> lattice_floats,
                                              int64_t num_groups, int64_t samples_per_group, double positive_fraction,
                                              int64_t seed, int64_t iteration, int64_t first_image, double pos_iou,
                                              double neg_iou, std::string_view second_pass, double ignore_ioa);

}  // namespace group_sampling
