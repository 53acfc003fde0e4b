#include "parse.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <string>

namespace group_sampling {

MatchOptions parse_match_options(const char* op, double pos_iou, double neg_iou, std::string_view second_pass,
                                 double ignore_ioa) {
  TORCH_CHECK_VALUE(kMinThreshold <= neg_iou && neg_iou <= pos_iou && pos_iou <= 1.0, op,
                    ": expected 0 < neg_iou <= pos_iou <= 1, got neg_iou=", neg_iou, " and pos_iou=", pos_iou);
  TORCH_CHECK_VALUE(kMinThreshold <= ignore_ioa && ignore_ioa <= 1.0, op, ": expected ignore_ioa in (0, 1], got ",
                    ignore_ioa);
  SecondPass policy = SecondPass::kAll;
  if (second_pass == "best") {
    policy = SecondPass::kBest;
  } else if (second_pass == "none") {
    policy = SecondPass::kNone;
  } else {
    TORCH_CHECK_VALUE(second_pass == "all", op, ": expected second_pass 'all', 'best' or 'none', got '",
                      std::string(second_pass), "'");
  }
  return {pos_iou, neg_iou, policy, ignore_ioa};
}

DrawOptions parse_draw_options(const char* op, int64_t samples_per_group, double positive_fraction, int64_t seed,
                               int64_t iteration, int64_t first_image) {
  TORCH_CHECK_VALUE(samples_per_group >= 1, op, ": expected samples_per_group >= 1, got ", samples_per_group);
  TORCH_CHECK_VALUE(positive_fraction >= 0.0 && positive_fraction <= 1.0, op,
                    ": expected positive_fraction in [0, 1], got ", positive_fraction);
  const auto max_positives =
      static_cast<int64_t>(std::floor(static_cast<double>(samples_per_group) * positive_fraction));
  return {samples_per_group, max_positives, seed, iteration, first_image};
}

GridLayout parse_grid_layout(const char* op, at::IntArrayRef ints, at::ArrayRef<double> floats,
                             std::optional<int64_t> num_groups) {
  TORCH_CHECK_VALUE(num_groups.value_or(0) >= 0, op, ": expected num_groups >= 0, got ", *num_groups);
  const size_t count = ints.size() / 6;
  const int64_t max_groups = num_groups.value_or(static_cast<int64_t>(count));
  TORCH_CHECK_VALUE(ints.size() == count * 6 && (floats.empty() || floats.size() == count * 5), op,
                    ": expected 6 integers and 5 floats per lattice, got ", ints.size(), " and ", floats.size());
  GridLayout layout;
  layout.lattices.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t* v = ints.data() + 6 * i;
    Lattice lattice{};
    lattice.stride = v[0], lattice.height = v[1], lattice.width = v[2];
    lattice.start = v[3], lattice.step = v[4], lattice.group = v[5];
    TORCH_CHECK_VALUE(lattice.stride >= 1 && lattice.stride <= kMaxStride && lattice.step >= 1, op, ": lattice ", i,
                      ": expected stride in [1, ", kMaxStride, "] and step >= 1, got ", lattice.stride, " and ",
                      lattice.step);
    TORCH_CHECK_VALUE(lattice.height >= 0 && lattice.height <= kMaxCells && lattice.width >= 0 &&
                          lattice.width <= kMaxCells && lattice.height * lattice.width <= kMaxCells,
                      op, ": lattice ", i, ": expected at most ", kMaxCells, " cells, got ", lattice.height, " x ",
                      lattice.width);
    TORCH_CHECK_VALUE(lattice.group >= 0 && lattice.group < max_groups, op, ": lattice ", i,
                      ": expected a group in [0, ", max_groups, "), got ", lattice.group);
    if (!floats.empty()) {
      const double* f = floats.data() + 5 * i;
      lattice.x1 = f[0], lattice.y1 = f[1], lattice.x2 = f[2], lattice.y2 = f[3], lattice.offset = f[4];
      const bool finite = is_valid(Box<double>{f[0], f[1], f[2], f[3]});
      TORCH_CHECK_VALUE(finite && f[2] - f[0] >= kMinSide && f[3] - f[1] >= kMinSide && f[4] >= 0.0 && f[4] < 1.0, op,
                        ": lattice ", i, ": expected a finite base box with sides of at least ", kMinSide,
                        " pixels and offset in [0, 1), got ", floats.slice(5 * i, 5));
    }
    layout.lattices.push_back(lattice);
  }

  layout.group_sizes.assign(num_groups.value_or(0), 0);
  for (size_t first = 0; first < count; first += layout.lattices[first].step) {
    const Lattice level = layout.lattices[first];
    TORCH_CHECK_VALUE(level.step <= static_cast<int64_t>(count - first), op, ": lattice ", first,
                      ": expected a level of ", level.step, " lattices, got ", count - first);
    for (int64_t k = 0; k < level.step; ++k) {
      Lattice& lattice = layout.lattices[first + k];
      TORCH_CHECK_VALUE(lattice.height == level.height && lattice.width == level.width && lattice.step == level.step &&
                            lattice.start == layout.num_anchors + k,
                        op, ": lattice ", first + k,
                        " breaks the layout of its level: expected height, width, step and start ", level.height, ", ",
                        level.width, ", ", level.step, ", ", layout.num_anchors + k, ", got ", lattice.height, ", ",
                        lattice.width, ", ", lattice.step, ", ", lattice.start);
      if (lattice.group >= static_cast<int64_t>(layout.group_sizes.size())) {
        layout.group_sizes.resize(lattice.group + 1, 0);
      }
      int64_t& size = layout.group_sizes[lattice.group];
      lattice.first_member = size;
      size += num_cells(lattice);
      TORCH_CHECK_VALUE(size <= kMaxCells, op, ": group ", lattice.group, ": expected at most ", kMaxCells,
                        " anchors, got ", size);
    }
    layout.num_anchors += level.step * num_cells(level);
  }
  return layout;
}

}  // namespace group_sampling
