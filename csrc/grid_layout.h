// A grid of anchors as the operators hold it: its lattices, and how many members each group has.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "anchor_grid.h"

namespace group_sampling {

// What a layout may hold; AnchorGrid checks the same limits.
constexpr int64_t kMaxCells = std::numeric_limits<int32_t>::max();  // of a lattice or a group
constexpr double kMinSide = 1.0 / 1024;  // of a base box, in pixels: smaller areas leave float32's range
constexpr int64_t kMaxStride = int64_t(1) << 20;

// Lattices level by level, without gaps between the levels.
struct GridLayout {
  std::vector<Lattice> lattices;
  std::vector<int64_t> group_sizes;
  int64_t num_anchors = 0;
};

}  // namespace group_sampling
