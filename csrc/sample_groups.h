// sample_groups(labels (B, n) int8, group_ids (n,) int64 or lattices, G, N, ...)
//     -> indices (B, G, N) int64, num_pos (B, G) int64, num_neg (B, G) int64
//
// Sec. 4.2 of the paper: of P positives (label 1) and Q negatives (label 0) in a group, num_pos = min(P, floor(N *
// positive_fraction)) and num_neg = min(Q, N - num_pos) are drawn, uniformly and without replacement. Indices hold the
// positives, then the negatives, each in draw order, then -1.
//
// Draw order: place i of the order is member permutation(i) of the group (permutation.h), keyed by (seed, iteration,
// first_image + b, group). Members are numbered by ascending anchor index for group_ids (an id outside [0, G) belongs
// to no group), and lattice by lattice for a grid. Nothing else enters: same draw on every device and thread count.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "grid_layout.h"
#include "options.h"

namespace group_sampling {

struct SampleGroupsCall {
  at::Tensor labels;     // contiguous
  at::Tensor group_ids;  // contiguous; undefined for a grid
  GridLayout layout;     // empty for group_ids
  int64_t num_groups;
  DrawOptions options;
  std::tuple<at::Tensor, at::Tensor, at::Tensor> out;  // indices, num_pos, num_neg
};

SampleGroupsCall prepare_sample_groups(const at::Tensor& labels, const std::optional<at::Tensor>& group_ids,
                                       at::IntArrayRef lattice_ints, int64_t num_groups, int64_t samples_per_group,
                                       double positive_fraction, int64_t seed, int64_t iteration, int64_t first_image);

}  // namespace group_sampling
