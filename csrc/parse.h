// From the operators' arguments to what their kernels take. Refuses what the contracts in <operator>.h exclude.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "grid_layout.h"
#include "options.h"

namespace group_sampling {

MatchOptions parse_match_options(const char* op, double pos_iou, double neg_iou, std::string_view second_pass,
                                 double ignore_ioa);
DrawOptions parse_draw_options(const char* op, int64_t samples_per_group, double positive_fraction, int64_t seed,
                               int64_t iteration, int64_t first_image);

// The layout that AnchorGrid.lattice_ints and .lattice_floats describe. Empty floats: the boxes are not needed.
// Without num_groups there are as many groups as the lattices name.
GridLayout parse_grid_layout(const char* op, at::IntArrayRef ints, at::ArrayRef<double> floats,
                             std::optional<int64_t> num_groups = std::nullopt);

}  // namespace group_sampling
