#include "sample_groups.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <utility>

#include "parse.h"

namespace group_sampling {

SampleGroupsCall prepare_sample_groups(const at::Tensor& labels, const std::optional<at::Tensor>& group_ids,
                                       at::IntArrayRef lattice_ints, int64_t num_groups, int64_t samples_per_group,
                                       double positive_fraction, int64_t seed, int64_t iteration, int64_t first_image) {
  constexpr const char* op = "sample_groups";
  TORCH_CHECK_VALUE(labels.dim() == 2, op, ": expected labels of shape (B, n), got ", labels.sizes());
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kChar, op, ": expected int8 labels, got ", labels.scalar_type());
  const DrawOptions options =
      parse_draw_options(op, samples_per_group, positive_fraction, seed, iteration, first_image);
  GridLayout layout;
  int64_t num_anchors = 0;
  if (group_ids.has_value()) {
    TORCH_CHECK_VALUE(num_groups >= 0, op, ": expected num_groups >= 0, got ", num_groups);
    TORCH_CHECK_TYPE(group_ids->scalar_type() == at::kLong, op, ": expected int64 group_ids, got ",
                     group_ids->scalar_type());
    TORCH_CHECK_VALUE(group_ids->dim() == 1 && group_ids->size(0) <= kMaxCells, op,
                      ": expected group_ids of shape (n,), n < 2^31, got ", group_ids->sizes());
    TORCH_CHECK_VALUE(group_ids->device() == labels.device(), op, ": expected group_ids on the labels' device, ",
                      labels.device(), ", got ", group_ids->device());
    TORCH_CHECK_VALUE(lattice_ints.empty(), op, ": expected group_ids or lattices, got both");
    num_anchors = group_ids->size(0);
  } else {
    layout = parse_grid_layout(op, lattice_ints, {}, num_groups);
    num_anchors = layout.num_anchors;
  }
  TORCH_CHECK_VALUE(labels.size(1) == num_anchors, op, ": expected one label per anchor, ", num_anchors, ", got shape ",
                    labels.sizes());
  const int64_t num_images = labels.size(0);
  const auto long_options = labels.options().dtype(at::kLong);
  return {labels.contiguous(),
          group_ids.has_value() ? group_ids->contiguous() : at::Tensor(),
          std::move(layout),
          num_groups,
          options,
          {at::empty({num_images, num_groups, samples_per_group}, long_options),
           at::empty({num_images, num_groups}, long_options), at::empty({num_images, num_groups}, long_options)}};
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.sample");  // registers the fake kernel
  m.def(
      "sample_groups(Tensor labels, Tensor? group_ids, SymInt[] lattice_ints, SymInt num_groups, "
      "SymInt samples_per_group, float positive_fraction, SymInt seed, SymInt iteration, SymInt first_image) "
      "-> (Tensor indices, Tensor num_pos, Tensor num_neg)");
}
