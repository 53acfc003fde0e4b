// What both matching operators return.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

namespace group_sampling {

using MatchResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // labels, matched_gt, best_iou

// Outputs of one shape, in the boxes' dtype and on their device.
inline MatchResult empty_match_result(at::IntArrayRef shape, const at::TensorOptions& box_options) {
  return {at::empty(shape, box_options.dtype(at::kChar)), at::empty(shape, box_options.dtype(at::kLong)),
          at::empty(shape, box_options)};
}

// Where a kernel writes them.
template <typename T>
struct MatchOutput {
  int8_t* labels;
  int64_t* matched_gt;
  T* best_iou;

  explicit MatchOutput(const MatchResult& result)
      : labels(std::get<0>(result).mutable_data_ptr<int8_t>()),
        matched_gt(std::get<1>(result).mutable_data_ptr<int64_t>()),
        best_iou(std::get<2>(result).template mutable_data_ptr<T>()) {}
};

}  // namespace group_sampling
