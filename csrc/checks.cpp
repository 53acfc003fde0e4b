#include "checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace group_sampling {
namespace {

constexpr int64_t kMaxCells = std::numeric_limits<int32_t>::max();
constexpr double kMinThreshold = 1e-30;  // smaller ones leave float32's range once areas are involved
constexpr double kMinSide = 1.0 / 1024;  // of a base box, in pixels, for the same reason
constexpr int64_t kMaxStride = int64_t(1) << 20;

}  // namespace

void check_boxes(const char* op, const char* name, const at::Tensor& boxes) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, op, ": ", name, " must have shape (N, 4), got ",
                    boxes.sizes());
  TORCH_CHECK_TYPE(boxes.scalar_type() == at::kFloat || boxes.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", boxes.scalar_type());
  TORCH_CHECK_VALUE(boxes.size(0) <= kMaxCells, op, ": ", name, " may hold ", kMaxCells, " boxes, got ", boxes.size(0));
}

void check_same_kind(const char* op, const char* name, const at::Tensor& first, const at::Tensor& boxes) {
  TORCH_CHECK_TYPE(boxes.scalar_type() == first.scalar_type(), op, ": ", name, " must be ", first.scalar_type(),
                   " like the other boxes, got ", boxes.scalar_type());
  TORCH_CHECK_VALUE(boxes.device() == first.device(), op, ": ", name, " must be on ", first.device(),
                    " like the other boxes, got ", boxes.device());
}

void check_box_lists(const char* op, at::TensorList gt_boxes, at::TensorList ignore_boxes) {
  TORCH_CHECK_VALUE(!gt_boxes.empty(), op, ": gt_boxes must hold at least one image");
  TORCH_CHECK_VALUE(ignore_boxes.empty() || ignore_boxes.size() == gt_boxes.size(), op,
                    ": ignore_boxes must be empty or have one entry per image, ", gt_boxes.size(), ", got ",
                    ignore_boxes.size());
  for (const auto& boxes : gt_boxes) {
    check_boxes(op, "gt_boxes", boxes);
    check_same_kind(op, "gt_boxes", gt_boxes[0], boxes);
  }
  for (const auto& boxes : ignore_boxes) {
    check_boxes(op, "ignore_boxes", boxes);
    check_same_kind(op, "ignore_boxes", gt_boxes[0], boxes);
  }
}

MatchOptions check_match_options(const char* op, double pos_iou, double neg_iou, std::string_view second_pass,
                                 double ignore_ioa) {
  TORCH_CHECK_VALUE(kMinThreshold <= neg_iou && neg_iou <= pos_iou && pos_iou <= 1.0, op,
                    ": needs 0 < neg_iou <= pos_iou <= 1, got neg_iou=", neg_iou, " and pos_iou=", pos_iou);
  TORCH_CHECK_VALUE(kMinThreshold <= ignore_ioa && ignore_ioa <= 1.0, op, ": ignore_ioa must be in (0, 1], got ",
                    ignore_ioa);
  SecondPass policy = SecondPass::kAll;
  if (second_pass == "best") {
    policy = SecondPass::kBest;
  } else if (second_pass == "none") {
    policy = SecondPass::kNone;
  } else {
    TORCH_CHECK_VALUE(second_pass == "all", op, ": second_pass must be 'all', 'best' or 'none', got '",
                      std::string(second_pass), "'");
  }
  return {pos_iou, neg_iou, policy, ignore_ioa};
}

DrawOptions check_draw_options(const char* op, int64_t samples_per_group, double positive_fraction, int64_t seed,
                               int64_t iteration, int64_t first_image) {
  TORCH_CHECK_VALUE(samples_per_group >= 1, op, ": samples_per_group must be at least 1, got ", samples_per_group);
  TORCH_CHECK_VALUE(positive_fraction >= 0.0 && positive_fraction <= 1.0, op,
                    ": positive_fraction must be in [0, 1], got ", positive_fraction);
  const auto max_positives =
      static_cast<int64_t>(std::floor(static_cast<double>(samples_per_group) * positive_fraction));
  return {samples_per_group, max_positives, seed, iteration, first_image};
}

GridLayout check_lattices(const char* op, at::IntArrayRef ints, at::ArrayRef<double> floats, int64_t num_groups) {
  const size_t count = ints.size() / 6;
  TORCH_CHECK_VALUE(ints.size() == count * 6 && (floats.empty() || floats.size() == count * 5), op,
                    ": lattices must come as 6 integers and 5 floats each, got ", ints.size(), " and ", floats.size());
  GridLayout layout;
  layout.lattices.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t* v = ints.data() + 6 * i;
    Lattice lattice{};
    lattice.stride = v[0], lattice.height = v[1], lattice.width = v[2];
    lattice.start = v[3], lattice.step = v[4], lattice.group = v[5];
    TORCH_CHECK_VALUE(lattice.stride >= 1 && lattice.stride <= kMaxStride && lattice.step >= 1, op, ": lattice ", i,
                      " must have stride in [1, ", kMaxStride, "] and step >= 1, got ", lattice.stride, " and ",
                      lattice.step);
    TORCH_CHECK_VALUE(lattice.height >= 0 && lattice.height <= kMaxCells && lattice.width >= 0 &&
                          lattice.width <= kMaxCells && lattice.height * lattice.width <= kMaxCells,
                      op, ": lattice ", i, " may have ", kMaxCells, " cells, got ", lattice.height, " x ",
                      lattice.width);
    TORCH_CHECK_VALUE(lattice.group >= 0 &&
                          (num_groups < 0 ? lattice.group < static_cast<int64_t>(count) : lattice.group < num_groups),
                      op, ": lattice ", i, " names group ", lattice.group, " of ", num_groups);
    if (!floats.empty()) {
      const double* f = floats.data() + 5 * i;
      lattice.x1 = f[0], lattice.y1 = f[1], lattice.x2 = f[2], lattice.y2 = f[3], lattice.offset = f[4];
      const bool finite = is_valid(Box<double>{f[0], f[1], f[2], f[3]});
      TORCH_CHECK_VALUE(finite && f[2] - f[0] >= kMinSide && f[3] - f[1] >= kMinSide && f[4] >= 0.0 && f[4] < 1.0, op,
                        ": lattice ", i, " must have a finite base box with sides of at least ", kMinSide,
                        " pixels and offset in [0, 1)");
    }
    layout.lattices.push_back(lattice);
  }

  layout.group_sizes.assign(std::max<int64_t>(num_groups, 0), 0);
  for (size_t first = 0; first < count; first += layout.lattices[first].step) {
    const Lattice level = layout.lattices[first];
    TORCH_CHECK_VALUE(level.step <= static_cast<int64_t>(count - first), op, ": the level of lattice ", first,
                      " must have ", level.step, " lattices, got ", count - first);
    for (int64_t k = 0; k < level.step; ++k) {
      Lattice& lattice = layout.lattices[first + k];
      TORCH_CHECK_VALUE(lattice.height == level.height && lattice.width == level.width && lattice.step == level.step &&
                            lattice.start == layout.num_anchors + k,
                        op, ": lattice ", first + k, " breaks the layout of its level");
      if (lattice.group >= static_cast<int64_t>(layout.group_sizes.size())) {
        layout.group_sizes.resize(lattice.group + 1, 0);
      }
      int64_t& size = layout.group_sizes[lattice.group];
      lattice.first_member = size;
      size += lattice.height * lattice.width;
      TORCH_CHECK_VALUE(size <= kMaxCells, op, ": group ", lattice.group, " may hold ", kMaxCells, " anchors, got ",
                        size);
    }
    layout.num_anchors += level.step * level.height * level.width;
  }
  return layout;
}

}  // namespace group_sampling
