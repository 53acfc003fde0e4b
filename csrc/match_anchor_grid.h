// match_anchor_grid(gt_boxes: B x (m_b, 4), ignore_boxes: B x (k_b, 4) or empty, grid, ...)
//     -> labels (B, n) int8, matched_gt (B, n) int64, best_iou (B, n)
//
// match_anchors of every image against the anchors of a grid, bit for bit, but each ground truth visits only the window
// of cells that it can reach neg_iou with (window_of in anchor_grid.h). The grid comes as AnchorGrid.lattice_ints,
// (stride, height, width, start, step, group) per lattice, and .lattice_floats, (x1, y1, x2, y2, offset) per lattice.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "grid_layout.h"
#include "match_result.h"
#include "options.h"

namespace group_sampling {

struct MatchAnchorGridCall {
  std::vector<at::Tensor> gt_boxes, ignore_boxes;  // contiguous; ignore_boxes may be empty
  GridLayout layout;
  MatchOptions options;
  MatchResult out;  // (B, n)
};

MatchAnchorGridCall prepare_match_anchor_grid(at::TensorList gt_boxes, at::TensorList ignore_boxes,
                                              at::IntArrayRef lattice_ints, at::ArrayRef<double> lattice_floats,
                                              double pos_iou, double neg_iou, std::string_view second_pass,
                                              double ignore_ioa);

}  // namespace group_sampling
