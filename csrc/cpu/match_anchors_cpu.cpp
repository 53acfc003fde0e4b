// Dense matching of arbitrary anchors: blocks of anchors against the ground truths that can reach the block at all.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "../kernel.h"
#include "../match_anchors.h"
#include "columns.h"
#include "multiversion.h"
#include "parallel.h"
#include "tensor_boxes.h"

namespace group_sampling {
namespace {

constexpr int64_t kBlock = 64;  // anchors: eight vectors of float32, whose state stays in the first-level cache

template <typename T>
struct Block {
  T x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];
  T iou[kBlock];
  int32_t gt[kBlock];
};

template <typename T>
Reach<T> load_block(const Box<T>* anchors, int64_t count, T min_iou, Block<T>& block) {
  Reach<T> reach = empty_reach<T>();
  for (int64_t i = 0; i < kBlock; ++i) {
    const Box<T> box = i < count ? anchors[i] : Box<T>{};  // an empty box pads the last block
    block.x1[i] = box.x1, block.y1[i] = box.y1, block.x2[i] = box.x2, block.y2[i] = box.y2;
    block.area[i] = box_area(box);
    block.iou[i] = T(0);
    block.gt[i] = 0;
    extend_reach(reach, box);
  }
  widen_areas(reach, min_iou);
  return reach;
}

template <typename T>
GS_ALWAYS_INLINE void find_reachable(const Reach<T>& reach, const Columns<T>& gts, int64_t count, uint8_t* keep) {
  const T *GS_RESTRICT x1 = gts.x1.data(), *GS_RESTRICT y1 = gts.y1.data(), *GS_RESTRICT x2 = gts.x2.data(),
                       *GS_RESTRICT y2 = gts.y2.data(), *GS_RESTRICT area = gts.area.data();
  for (int64_t j = 0; j < count; ++j) {
    keep[j] = meets_hull(reach, Box<T>{x1[j], y1[j], x2[j], y2[j]}) & has_near_area(reach, area[j]);
  }
}

template <typename T>
GS_ALWAYS_INLINE void visit_block(Block<T>& block, const Box<T>& gt, T gt_area, int32_t index) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const T intersection =
        overlap(block.x1[i], block.x2[i], gt.x1, gt.x2) * overlap(block.y1[i], block.y2[i], gt.y1, gt.y2);
    const T value = iou_of_areas(intersection, block.area[i], gt_area);
    const bool better = value > block.iou[i];  // ground truths come in ascending order: a tie stays with the lower one
    block.iou[i] = better ? value : block.iou[i];
    block.gt[i] = better ? index : block.gt[i];
  }
}

template <typename T>
GS_ALWAYS_INLINE void match_block(Block<T>& block, const Reach<T>& reach, const Box<T>* gts, const Columns<T>& columns,
                                  int64_t count, uint8_t* keep) {
  find_reachable(reach, columns, count, keep);
  for (int64_t j = 0; j < count; ++j) {
    if (keep[j]) visit_block(block, gts[j], columns.area[j], static_cast<int32_t>(j));
  }
}

GS_CPU_CLONES void match_block_on(Block<float>& block, const Reach<float>& reach, const Box<float>* gts,
                                  const Columns<float>& columns, int64_t count, uint8_t* keep) {
  match_block(block, reach, gts, columns, count, keep);
}

GS_CPU_CLONES void match_block_on(Block<double>& block, const Reach<double>& reach, const Box<double>* gts,
                                  const Columns<double>& columns, int64_t count, uint8_t* keep) {
  match_block(block, reach, gts, columns, count, keep);
}

// Pass 2.
template <typename T>
void promote(SecondPass policy, int64_t num_anchors, int64_t num_gts, const std::atomic<uint8_t>* taken,
             const MatchOutput<T>& out) {
  if (policy == SecondPass::kNone || num_gts == 0) return;
  const auto is_candidate = [&](int64_t i) {
    return out.labels[i] == -1 && !taken[out.matched_gt[i]].load(std::memory_order_relaxed);
  };
  if (policy == SecondPass::kAll) {
    for_each_range(num_anchors, num_anchors, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (is_candidate(i)) out.labels[i] = 1;
      }
    });
    return;
  }
  std::vector<int64_t> best(num_gts, -1);
  for (int64_t i = 0; i < num_anchors; ++i) {
    if (!is_candidate(i)) continue;
    int64_t& other = best[out.matched_gt[i]];
    if (other < 0 || out.best_iou[i] > out.best_iou[other]) other = i;
  }
  for (const int64_t i : best) {
    if (i >= 0) out.labels[i] = 1;
  }
}

template <typename T>
void ignore_covered(const Box<T>* anchors, int64_t num_anchors, const std::vector<Box<T>>& regions, T min_share,
                    int8_t* labels) {
  if (regions.empty()) return;
  const int64_t work = num_anchors * (1 + static_cast<int64_t>(regions.size()));
  for_each_range(work, num_anchors, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (size_t k = 0; labels[i] == 0 && k < regions.size(); ++k) {
        if (is_covered(anchors[i], regions[k], min_share)) labels[i] = -1;
      }
    }
  });
}

template <typename T>
void match_densely(const MatchAnchorsCall& call) {
  const auto* anchors = boxes_of<T>(call.anchors);
  const auto* gts = boxes_of<T>(call.gt_boxes);
  const int64_t num_anchors = call.anchors.size(0), num_gts = call.gt_boxes.size(0);
  const T pos_iou = static_cast<T>(call.options.pos_iou), neg_iou = static_cast<T>(call.options.neg_iou);
  const MatchOutput<T> out(call.out);
  const Columns<T> columns(gts, num_gts);
  const auto taken = std::make_unique<std::atomic<uint8_t>[]>(num_gts);

  const int64_t num_blocks = (num_anchors + kBlock - 1) / kBlock;
  const int64_t num_threads = threads_for(num_anchors * (6 + num_gts / 32), num_blocks);
  // Neighboring blocks share pages and cache lines of the results, so threads take runs of them.
  const int64_t blocks_per_task = std::clamp<int64_t>(num_blocks / (8 * num_threads), 1, 64);
  const int64_t num_tasks = (num_blocks + blocks_per_task - 1) / blocks_per_task;
  std::vector<std::vector<uint8_t>> keep(num_threads, std::vector<uint8_t>(num_gts));
  for_each_task(num_threads, num_tasks, [&](int64_t thread, int64_t task) {
    const int64_t end = std::min(num_blocks, (task + 1) * blocks_per_task);
    for (int64_t b = task * blocks_per_task; b < end; ++b) {
      Block<T> block;
      const int64_t first = b * kBlock, count = std::min(kBlock, num_anchors - first);
      const Reach<T> reach = load_block(anchors + first, count, neg_iou, block);
      match_block_on(block, reach, gts, columns, num_gts, keep[thread].data());
      for (int64_t i = 0; i < count; ++i) {
        const T iou = block.iou[i];
        const bool matched = iou >= neg_iou, positive = iou >= pos_iou;
        out.labels[first + i] = positive ? 1 : matched ? -1 : 0;
        out.matched_gt[first + i] = matched ? block.gt[i] : -1;
        out.best_iou[first + i] = matched ? iou : T(0);
        if (positive) taken[block.gt[i]].store(1, std::memory_order_relaxed);
      }
    }
  });
  promote(call.options.second_pass, num_anchors, num_gts, taken.get(), out);

  std::vector<Box<T>> regions;
  const auto* ignores = boxes_of<T>(call.ignore_boxes);
  for (int64_t k = 0; k < call.ignore_boxes.size(0); ++k) {
    if (is_valid(ignores[k])) regions.push_back(ignores[k]);
  }
  ignore_covered(anchors, num_anchors, regions, static_cast<T>(call.options.ignore_ioa), out.labels);
}

void match_anchors_cpu(const MatchAnchorsCall& call) {
  AT_DISPATCH_FLOATING_TYPES(call.anchors.scalar_type(), "match_anchors", [&] { match_densely<scalar_t>(call); });
}

using MatchAnchorsCpu = Kernel<prepare_match_anchors, match_anchors_cpu>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) { m.impl("match_anchors", TORCH_FN(group_sampling::MatchAnchorsCpu::call)); }
