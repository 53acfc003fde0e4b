#include "sample_groups.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <limits>

namespace group_sampling {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_groups(const at::Tensor& labels,
                                                             const std::optional<at::Tensor>& group_ids,
                                                             at::IntArrayRef lattice_ints, int64_t num_groups,
                                                             int64_t samples_per_group, double positive_fraction,
                                                             int64_t seed, int64_t iteration, int64_t first_image) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("group_sampling::sample_groups", "")
                             .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                                 const at::Tensor&, const std::optional<at::Tensor>&, c10::SymIntArrayRef, c10::SymInt,
                                 c10::SymInt, double, c10::SymInt, c10::SymInt, c10::SymInt)>();
  return op.call(labels, group_ids, c10::fromIntArrayRefSlow(lattice_ints), num_groups, samples_per_group,
                 positive_fraction, seed, iteration, first_image);
}

GridLayout check_sample_groups(const at::Tensor& labels, const std::optional<at::Tensor>& group_ids,
                               at::IntArrayRef lattice_ints, int64_t num_groups) {
  constexpr const char* op = "sample_groups";
  TORCH_CHECK_VALUE(labels.dim() == 2, op, ": labels must have shape (B, n), got ", labels.sizes());
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kChar, op, ": labels must be int8, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(num_groups >= 0, op, ": num_groups must not be negative, got ", num_groups);
  GridLayout layout;
  int64_t num_anchors = 0;
  if (group_ids.has_value()) {
    TORCH_CHECK_TYPE(group_ids->scalar_type() == at::kLong, op, ": group_ids must be int64, got ",
                     group_ids->scalar_type());
    TORCH_CHECK_VALUE(group_ids->dim() == 1 && group_ids->size(0) <= std::numeric_limits<int32_t>::max(), op,
                      ": group_ids must have shape (n,), n < 2^31, got ", group_ids->sizes());
    TORCH_CHECK_VALUE(group_ids->device() == labels.device(), op, ": group_ids must be on ", labels.device(),
                      " like labels, got ", group_ids->device());
    TORCH_CHECK_VALUE(lattice_ints.empty(), op, ": takes group_ids or lattices, got both");
    num_anchors = group_ids->size(0);
  } else {
    layout = check_lattices(op, lattice_ints, {}, num_groups);
    num_anchors = layout.num_anchors;
  }
  TORCH_CHECK_VALUE(labels.size(1) == num_anchors, op, ": labels must have one entry per anchor, ", num_anchors,
                    ", got shape ", labels.sizes());
  return layout;
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.sample");  // registers the fake kernel
  m.def(
      "sample_groups(Tensor labels, Tensor? group_ids, SymInt[] lattice_ints, SymInt num_groups, "
      "SymInt samples_per_group, float positive_fraction, SymInt seed, SymInt iteration, SymInt first_image) "
      "-> (Tensor indices, Tensor num_pos, Tensor num_neg)");
}
