// The tables and arrays of a call, by what they serve.
#pragma once

#include <cstring>
#include <vector>

#include "../grid_layout.h"
#include "workspace.h"

namespace group_sampling {

// The tables of a call over a grid, on the host. They must outlive the call's first launch, not its kernels.
class GridTables {
 public:
  // No boxes for sample_groups.
  GridTables(const GridLayout& layout, int64_t num_images, at::TensorList gt_boxes = {},
             at::TensorList ignore_boxes = {}) {
    tables_.num_lattices = static_cast<int64_t>(layout.lattices.size());
    tables_.num_groups = static_cast<int64_t>(layout.group_sizes.size());
    tables_.num_images = num_images;
    tables_.lattices = append(layout.lattices);

    std::vector<int64_t> first_tiles{0};
    for (const Lattice& lattice : layout.lattices) {
      const int64_t down = (lattice.height + cuda::kTileRows - 1) / cuda::kTileRows;
      const int64_t across = (lattice.width + cuda::kTileColumns - 1) / cuda::kTileColumns;
      first_tiles.push_back(first_tiles.back() + down * across);
    }
    tables_.first_tiles = append(first_tiles);
    num_tiles_ = first_tiles.back();

    std::vector<int64_t> group_offsets{0};
    for (const int64_t size : layout.group_sizes) group_offsets.push_back(group_offsets.back() + size);
    tables_.group_offsets = append(group_offsets);

    std::vector<cuda::ImageEntry> images;
    int64_t first_gt = 0, first_ignore = 0;
    for (size_t b = 0; b < gt_boxes.size(); ++b) {
      const bool ignores = !ignore_boxes.empty();
      images.push_back(
          {gt_boxes[b].const_data_ptr(), ignores ? ignore_boxes[b].const_data_ptr() : nullptr, first_gt, first_ignore});
      first_gt += gt_boxes[b].size(0);
      first_ignore += ignores ? ignore_boxes[b].size(0) : 0;
    }
    images.push_back({nullptr, nullptr, first_gt, first_ignore});
    tables_.images = append(images);
    num_gts_ = first_gt;
    num_ignores_ = first_ignore;
    tables_.bytes = static_cast<int64_t>(bytes_.size());
  }

  const cuda::Tables& tables() const { return tables_; }
  const void* host() const { return bytes_.data(); }
  int64_t num_tiles() const { return num_tiles_; }  // of one image
  int64_t num_gts() const { return num_gts_; }
  int64_t num_ignores() const { return num_ignores_; }

  cuda::MemberTable members(const uint8_t* device) const {
    cuda::MemberTable table{};
    table.lattices = reinterpret_cast<const Lattice*>(device + tables_.lattices);
    table.num_lattices = tables_.num_lattices;
    table.group_offsets = reinterpret_cast<const int64_t*>(device + tables_.group_offsets);
    table.num_groups = tables_.num_groups;
    return table;
  }

 private:
  template <typename V>
  int64_t append(const std::vector<V>& values) {
    static_assert(sizeof(V) % sizeof(int64_t) == 0);  // so that every table is aligned
    const size_t offset = bytes_.size(), size = values.size() * sizeof(V);
    bytes_.resize(offset + size);
    if (size > 0) std::memcpy(bytes_.data() + offset, values.data(), size);
    return static_cast<int64_t>(offset);
  }

  cuda::Tables tables_{};
  int64_t num_tiles_ = 0, num_gts_ = 0, num_ignores_ = 0;
  std::vector<uint8_t> bytes_;
};

template <typename T>
class BoxArrays {
 public:
  BoxArrays(Workspace& workspace, const GridTables& tables)
      : num_gts_(tables.num_gts()),
        num_ignores_(tables.num_ignores()),
        boxes_(workspace.reserve<cuda::AlignedBox<T>>(num_gts_ + num_ignores_)),
        windows_(workspace.reserve<cuda::CellWindow>((num_gts_ + num_ignores_) * tables.tables().num_lattices)) {}

  cuda::BoxWindows<T> windows(const Workspace& workspace) const {
    return {workspace.at<cuda::AlignedBox<T>>(boxes_), workspace.at<cuda::CellWindow>(windows_), num_gts_,
            num_ignores_};
  }

 private:
  int64_t num_gts_, num_ignores_;
  Workspace::Array boxes_, windows_;
};

template <typename T>
class RescueArrays {
 public:
  // num_labels: B * n.
  RescueArrays(Workspace& workspace, SecondPass policy, int64_t num_gts, int64_t num_labels) : policy_(policy) {
    const int64_t taken = policy == SecondPass::kNone ? 0 : num_gts;
    const int64_t best = policy == SecondPass::kBest ? num_gts : 0;
    taken_ = workspace.reserve_cleared<uint32_t>(taken);
    best_iou_ = workspace.reserve_cleared<cuda::Bits<T>>(best);
    best_key_ = workspace.reserve_cleared<unsigned long long>(best);
    num_candidates_ = workspace.reserve_cleared<unsigned long long>(taken > 0 ? 1 : 0);
    candidates_ = workspace.reserve<int64_t>(taken > 0 ? num_labels : 0);
  }

  cuda::Rescue<T> rescue(const Workspace& workspace) const {
    return {policy_,
            workspace.at<uint32_t>(taken_),
            workspace.at<cuda::Bits<T>>(best_iou_),
            workspace.at<unsigned long long>(best_key_),
            workspace.at<unsigned long long>(num_candidates_),
            workspace.at<int64_t>(candidates_)};
  }

 private:
  SecondPass policy_;
  Workspace::Array taken_, best_iou_, best_key_, num_candidates_, candidates_;
};

class RankArrays {
 public:
  RankArrays(Workspace& workspace, int64_t num_images, int64_t num_anchors, int64_t num_groups)
      : words_(cuda::first_word(num_anchors, num_groups) + 1),
        summary_words_(cuda::first_summary(num_anchors, num_groups) + 1),
        positive_(workspace.reserve_cleared<uint32_t>(num_images * words_)),
        not_negative_(workspace.reserve_cleared<uint32_t>(num_images * words_)),
        any_positive_(workspace.reserve_cleared<uint32_t>(num_images * summary_words_)),
        no_negative_(workspace.reserve_cleared<uint32_t>(num_images * summary_words_)),
        permutations_(workspace.reserve<Permutation>(num_images * num_groups)) {}

  Permutation* permutations(const Workspace& workspace) const { return workspace.at<Permutation>(permutations_); }
  cuda::RankBits bits(const Workspace& workspace) const {
    return {workspace.at<uint32_t>(positive_),
            workspace.at<uint32_t>(not_negative_),
            workspace.at<uint32_t>(any_positive_),
            workspace.at<uint32_t>(no_negative_),
            words_,
            summary_words_,
            permutations(workspace)};
  }

 private:
  int64_t words_, summary_words_;
  Workspace::Array positive_, not_negative_, any_positive_, no_negative_, permutations_;
};

template <typename T>
cuda::Thresholds<T> thresholds(const MatchOptions& options) {
  return {static_cast<T>(options.pos_iou), static_cast<T>(options.neg_iou), static_cast<T>(options.ignore_ioa)};
}

}  // namespace group_sampling
