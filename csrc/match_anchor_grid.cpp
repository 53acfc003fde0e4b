#include "match_anchor_grid.h"

#include <torch/library.h>

#include "checks.h"
#include "parse.h"

namespace group_sampling {

MatchAnchorGridCall prepare_match_anchor_grid(at::TensorList gt_boxes, at::TensorList ignore_boxes,
                                              at::IntArrayRef lattice_ints, at::ArrayRef<double> lattice_floats,
                                              double pos_iou, double neg_iou, std::string_view second_pass,
                                              double ignore_ioa) {
  constexpr const char* op = "match_anchor_grid";
  check_box_lists(op, gt_boxes, ignore_boxes);
  const MatchOptions options = parse_match_options(op, pos_iou, neg_iou, second_pass, ignore_ioa);
  GridLayout layout = parse_grid_layout(op, lattice_ints, lattice_floats);
  MatchResult out =
      empty_match_result({static_cast<int64_t>(gt_boxes.size()), layout.num_anchors}, gt_boxes[0].options());
  return {contiguous(gt_boxes), contiguous(ignore_boxes), std::move(layout), options, std::move(out)};
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.match");  // registers the fake kernel
  m.def(
      "match_anchor_grid(Tensor[] gt_boxes, Tensor[] ignore_boxes, SymInt[] lattice_ints, float[] lattice_floats, "
      "float pos_iou, float neg_iou, str second_pass, float ignore_ioa) "
      "-> (Tensor labels, Tensor matched_gt, Tensor best_iou)");
}
