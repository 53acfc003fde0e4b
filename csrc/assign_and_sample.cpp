#include "assign_and_sample.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "checks.h"
#include "parse.h"

namespace group_sampling {

AssignAndSampleCall prepare_assign_and_sample(at::TensorList gt_boxes, at::TensorList ignore_boxes,
                                              at::IntArrayRef lattice_ints, at::ArrayRef<double> lattice_floats,
                                              int64_t num_groups, int64_t samples_per_group, double positive_fraction,
                                              int64_t seed, int64_t iteration, int64_t first_image, double pos_iou,
                                              double neg_iou, std::string_view second_pass, double ignore_ioa) {
  constexpr const char* op = "assign_and_sample";
  check_box_lists(op, gt_boxes, ignore_boxes);
  const MatchOptions match_options = parse_match_options(op, pos_iou, neg_iou, second_pass, ignore_ioa);
  const DrawOptions draw_options =
      parse_draw_options(op, samples_per_group, positive_fraction, seed, iteration, first_image);
  GridLayout layout = parse_grid_layout(op, lattice_ints, lattice_floats, num_groups);
  const auto num_images = static_cast<int64_t>(gt_boxes.size());
  const std::array samples{num_images, num_groups, samples_per_group};
  const std::array counts{num_images, num_groups};
  const auto long_options = gt_boxes[0].options().dtype(at::kLong);
  return {contiguous(gt_boxes),
          contiguous(ignore_boxes),
          std::move(layout),
          match_options,
          draw_options,
          {at::empty(samples, long_options), at::empty(samples, long_options.dtype(at::kChar)),
           at::empty(samples, long_options), at::empty(counts, long_options), at::empty(counts, long_options)}};
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.sample");  // registers the fake kernel
  m.def(
      "assign_and_sample(Tensor[] gt_boxes, Tensor[] ignore_boxes, SymInt[] lattice_ints, float[] lattice_floats, "
      "SymInt num_groups, SymInt samples_per_group, float positive_fraction, SymInt seed, SymInt iteration, "
      "SymInt first_image, float pos_iou, float neg_iou, str second_pass, float ignore_ioa) "
      "-> (Tensor indices, Tensor labels, Tensor matched_gt, Tensor num_pos, Tensor num_neg)");
}
