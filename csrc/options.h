// What the operators pass to their kernels once the arguments are checked.
#pragma once

#include <cstdint>
#include <vector>

#include "anchor_grid.h"

namespace group_sampling {

enum class SecondPass { kAll, kBest, kNone };

struct MatchOptions {
  double pos_iou, neg_iou;
  SecondPass second_pass;
  double ignore_ioa;
};

struct DrawOptions {
  int64_t samples_per_group;  // N
  int64_t max_positives;      // floor(N * positive_fraction)
  int64_t seed, iteration, first_image;
};

// Lattices level by level: all lattices of a level have the same height, width and step, and their number is step.
struct GridLayout {
  std::vector<Lattice> lattices;
  std::vector<int64_t> group_sizes;
  int64_t num_anchors = 0;
};

}  // namespace group_sampling
