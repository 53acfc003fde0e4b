// Checks that several operators share. They read metadata only, so they never wait for a device.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "options.h"

namespace group_sampling {

// (N, 4), float32 or float64.
void check_boxes(const char* op, const char* name, const at::Tensor& boxes);
// `boxes` has the dtype and the device of `first`.
void check_same_kind(const char* op, const char* name, const at::Tensor& first, const at::Tensor& boxes);
// At least one image; all boxes valid tensors of one kind; ignore boxes for every image or for none.
void check_box_lists(const char* op, at::TensorList gt_boxes, at::TensorList ignore_boxes);

MatchOptions check_match_options(const char* op, double pos_iou, double neg_iou, std::string_view second_pass,
                                 double ignore_ioa);
DrawOptions check_draw_options(const char* op, int64_t samples_per_group, double positive_fraction, int64_t seed,
                               int64_t iteration, int64_t first_image);

// The layout that AnchorGrid.lattice_ints and .lattice_floats describe. Empty floats: the boxes are not needed.
// num_groups < 0: as many as the lattices name.
GridLayout check_lattices(const char* op, at::IntArrayRef ints, at::ArrayRef<double> floats, int64_t num_groups);

}  // namespace group_sampling
