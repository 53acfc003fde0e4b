// Options of the operators, parsed.
#pragma once

#include <cstdint>

namespace group_sampling {

constexpr double kMinThreshold = 1e-30;  // smaller ones leave float32's range once areas are involved

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

}  // namespace group_sampling
