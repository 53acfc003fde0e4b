// Matching: the best ground truth of every anchor, the two passes, labels or ranks.
//
// Each anchor belongs to one thread, which meets the ground truths in ascending order: the best IoU needs no atomics,
// and a tie stays with the lowest index. A block keeps in shared memory the boxes that can reach its anchors at all.
#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsPerThread = kTileRows / kWarps;
constexpr int kDenseThreads = 128;
constexpr int kDenseWarps = kDenseThreads / kWarp;

template <typename T>
struct Reached {
  Box<T> box;
  T area;
  int32_t index;
  int32_t row0, row1;
};

// Where labels of all anchors go.
template <typename T>
struct LabelSink {
  MatchArrays<T> out;

  // What the anchors of a block have in common.
  struct Block {
    __device__ Block(const LabelSink&, const Lattice&, int64_t) {}
  };

  __device__ void put(const Block&, int64_t at, int64_t, int8_t label, int32_t gt, T iou) const {
    out.labels[at] = label;
    out.matched_gt[at] = gt;
    out.best_iou[at] = iou;
  }
  __device__ int64_t gt(int64_t at) const { return out.matched_gt[at]; }
  __device__ T iou(int64_t at) const { return out.best_iou[at]; }
  __device__ void promote(int64_t, int64_t, int64_t at) const { out.labels[at] = 1; }
};

// Where the ranks of anchors that are not negative go.
template <typename T>
struct RankSink {
  MemberTable members;
  RankBits bits;
  SparseMatches<T> out;

  struct Block {
    RankWriter writer;
    int64_t first_member;

    __device__ Block(const RankSink& sink, const Lattice& lattice, int64_t image)
        : writer(sink.bits, sink.members, image, lattice.group), first_member(lattice.first_member) {}
  };

  __device__ void put(const Block& block, int64_t at, int64_t cell, int8_t label, int32_t gt, T iou) const {
    if (label == 0) return;
    const uint32_t rank = rank_of(*block.writer.permutation, static_cast<uint32_t>(block.first_member + cell));
    block.writer.mark(rank);
    if (label == 1) block.writer.mark_positive(rank);
    out.gt[at] = gt;
    if (out.iou != nullptr) out.iou[at] = iou;
  }
  __device__ int64_t gt(int64_t at) const { return out.gt[at]; }
  __device__ T iou(int64_t at) const { return out.iou[at]; }
  __device__ void promote(int64_t image, int64_t anchor, int64_t) const {
    const AnchorPlace place = locate_anchor(members.lattices, anchor);
    const Lattice& lattice = members.lattices[place.lattice];
    const RankWriter writer(bits, members, image, lattice.group);
    const auto member = static_cast<uint32_t>(member_of_cell(lattice, place.cell));
    writer.mark_positive(rank_of(*writer.permutation, member));
  }
};

// Decides pass 1 for one anchor of each lane, those that are not `active` left out, and lists the candidates of pass 2.
// All lanes of the warp take part. `number` is that of the image's first ground truth.
template <typename T, typename Sink>
__device__ void settle(bool active, T best, int32_t gt, bool covered, int64_t at, int64_t cell, int64_t number,
                       const Thresholds<T>& thresholds, const Rescue<T>& rescue, const Sink& sink,
                       const typename Sink::Block& block) {
  const bool matched = active && best >= thresholds.neg_iou;
  const bool positive = matched && best >= thresholds.pos_iou;
  if (active) {
    const int8_t label = positive ? 1 : matched || covered ? -1 : 0;
    sink.put(block, at, cell, label, matched ? gt : -1, matched ? best : T(0));
  }
  if (rescue.policy == SecondPass::kNone) return;
  const bool candidate = matched && !positive;
  if (positive) rescue.taken[number + gt] = 1;
  if (candidate && rescue.policy == SecondPass::kBest) atomicMax(rescue.best_iou + number + gt, to_bits(best));
  const unsigned int listed = __ballot_sync(kAllLanes, candidate);
  if (listed == 0) return;
  unsigned long long first = 0;
  if (lane() == 0) first = atomicAdd(rescue.num_candidates, static_cast<unsigned long long>(__popc(listed)));
  first = __shfl_sync(kAllLanes, first, 0);
  if (candidate) rescue.candidates[first + __popc(listed & ((1u << lane()) - 1u))] = at;
}

// One block to a tile of a lattice of an image; a warp has kRowsPerThread of its rows, a lane the cells of a column.
template <typename T, typename Sink>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(const Tables tables, const void* device, int64_t num_anchors, int64_t tiles_per_image,
                const BoxWindows<T> windows, const Thresholds<T> thresholds, const Rescue<T> rescue, const Sink sink) {
  __shared__ Reached<T> reached[kThreads];
  __shared__ int32_t counts[2][kWarps];
  const auto* lattices = table<Lattice>(device, tables.lattices);
  const auto* first_tiles = table<int64_t>(device, tables.first_tiles);
  const auto* images = table<ImageEntry>(device, tables.images);
  const int64_t num_boxes = windows.num_gts + windows.num_ignores;
  int turn = 0;
  for (int64_t task = blockIdx.x; task < tables.num_images * tiles_per_image; task += gridDim.x) {
    const int64_t image = task / tiles_per_image, tile = task % tiles_per_image;
    const int64_t lattice_index = last_not_above(first_tiles, tables.num_lattices, tile);
    const Lattice& lattice = lattices[lattice_index];
    const int64_t tiles_across = (lattice.width + kTileColumns - 1) / kTileColumns;
    const int64_t in_lattice = tile - first_tiles[lattice_index];
    const auto tile_row = static_cast<int32_t>(in_lattice / tiles_across * kTileRows);
    const auto tile_col = static_cast<int32_t>(in_lattice % tiles_across * kTileColumns);
    const int32_t row0 = tile_row + warp() * kRowsPerThread, col = tile_col + lane();

    Box<T> anchors[kRowsPerThread];
    T best[kRowsPerThread];
    int32_t best_gt[kRowsPerThread];
    bool covered[kRowsPerThread];
    for (int k = 0; k < kRowsPerThread; ++k) {
      anchors[k] = lattice_box<T>(lattice, row0 + k, col);
      best[k] = T(0);
      best_gt[k] = -1;
      covered[k] = false;
    }

    // Calls visit(box) for the boxes numbered [first, last) whose windows reach the rows of this warp.
    const auto for_each_reached = [&](int64_t first, int64_t last, const auto& visit) {
      for (int64_t start = first; start < last; start += kThreads) {
        const int64_t number = start + threadIdx.x;
        CellWindow window{0, -1, 0, -1};
        if (number < last) window = windows.windows[lattice_index * num_boxes + number];
        const bool keep = window.row0 < tile_row + kTileRows && window.row1 >= tile_row &&
                          window.col0 < tile_col + kTileColumns && window.col1 >= tile_col;
        int count = 0;
        turn = 1 - turn;
        const int place = place_in_block<kWarps>(keep, counts[turn], &count);
        if (count == 0) continue;
        if (keep) {
          const Box<T> box = load_box(windows.boxes + number);
          reached[place] = {box, box_area(box), static_cast<int32_t>(number - first), window.row0, window.row1};
        }
        __syncthreads();
        for (int j = 0; j < count; ++j) {
          if (reached[j].row0 < row0 + kRowsPerThread && reached[j].row1 >= row0) visit(reached[j]);
        }
      }
    };
    for_each_reached(images[image].first_gt, images[image + 1].first_gt, [&](const Reached<T>& gt) {
      for (int k = 0; k < kRowsPerThread; ++k) {
        const T value = iou_of_areas(intersection_area(anchors[k], gt.box), box_area(anchors[k]), gt.area);
        if (value > best[k]) {
          best[k] = value;
          best_gt[k] = gt.index;
        }
      }
    });
    for_each_reached(windows.num_gts + images[image].first_ignore, windows.num_gts + images[image + 1].first_ignore,
                     [&](const Reached<T>& region) {
                       for (int k = 0; k < kRowsPerThread; ++k) {
                         covered[k] = covered[k] || is_covered(anchors[k], region.box, thresholds.ignore_ioa);
                       }
                     });

    const typename Sink::Block block(sink, lattice, image);
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t cell = (row0 + k) * lattice.width + col;
      const bool active = row0 + k < lattice.height && col < lattice.width;
      settle(active, best[k], best_gt[k], covered[k], image * num_anchors + anchor_of_cell(lattice, cell), cell,
             images[image].first_gt, thresholds, rescue, sink, block);
    }
  }
}

template <typename V, typename Combine>
__device__ V over_warp(V value, const Combine& combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// One anchor to a thread.
template <typename T>
__global__ void __launch_bounds__(kDenseThreads)
    dense_kernel(const AlignedBox<T>* anchors, int64_t num_anchors, const AlignedBox<T>* gts, int64_t num_gts,
                 const AlignedBox<T>* ignores, int64_t num_ignores, const Thresholds<T> thresholds,
                 const Rescue<T> rescue, const LabelSink<T> sink) {
  __shared__ Reached<T> reached[kDenseThreads];
  __shared__ Reach<T> warp_reach[kDenseWarps];
  __shared__ int32_t counts[2][kDenseWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const auto smaller = [](T a, T b) { return a < b ? a : b; };
  const auto larger = [](T a, T b) { return a > b ? a : b; };
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kDenseThreads; first < num_anchors; first += grid_size()) {
    const int64_t anchor = first + thread;
    const Box<T> box = anchor < num_anchors ? load_box(anchors + anchor) : Box<T>{};
    const T area = box_area(box);

    Reach<T> reach = empty_reach<T>();
    extend_reach(reach, box);
    reach = {over_warp(reach.x1, smaller), over_warp(reach.y1, smaller),       over_warp(reach.x2, larger),
             over_warp(reach.y2, larger),  over_warp(reach.min_area, smaller), over_warp(reach.max_area, larger)};
    if (lane() == 0) warp_reach[warp()] = reach;
    __syncthreads();
    for (int w = 0; w < kDenseWarps; ++w) {
      const Reach<T> other = warp_reach[w];
      reach = {smaller(reach.x1, other.x1),
               smaller(reach.y1, other.y1),
               larger(reach.x2, other.x2),
               larger(reach.y2, other.y2),
               smaller(reach.min_area, other.min_area),
               larger(reach.max_area, other.max_area)};
    }
    widen_areas(reach, thresholds.neg_iou);

    // Calls visit(box) for the boxes that can reach the anchors of this block.
    const auto for_each_reached = [&](const AlignedBox<T>* boxes, int64_t count, const auto& can_reach,
                                      const auto& visit) {
      for (int64_t start = 0; start < count; start += kDenseThreads) {
        const int64_t number = start + thread;
        const Box<T> other = number < count ? load_box(boxes + number) : Box<T>{};
        const bool keep = number < count && can_reach(other);
        int kept = 0;
        turn = 1 - turn;
        const int place = place_in_block<kDenseWarps>(keep, counts[turn], &kept);
        if (kept == 0) continue;
        if (keep) reached[place] = {other, box_area(other), static_cast<int32_t>(number), 0, 0};
        __syncthreads();
        for (int j = 0; j < kept; ++j) visit(reached[j]);
      }
    };
    T best = T(0);
    int32_t best_gt = -1;
    for_each_reached(
        gts, num_gts, [&](const Box<T>& gt) { return meets_hull(reach, gt) && has_near_area(reach, box_area(gt)); },
        [&](const Reached<T>& gt) {
          const T value = iou_of_areas(intersection_area(box, gt.box), area, gt.area);
          if (value > best) {
            best = value;
            best_gt = gt.index;
          }
        });
    bool covered = false;
    for_each_reached(
        ignores, num_ignores, [&](const Box<T>& region) { return is_valid(region) && meets_hull(reach, region); },
        [&](const Reached<T>& region) { covered = covered || is_covered(box, region.box, thresholds.ignore_ioa); });
    settle(anchor < num_anchors, best, best_gt, covered, anchor, int64_t(0), int64_t(0), thresholds, rescue, sink,
           typename LabelSink<T>::Block(sink, Lattice{}, 0));
    __syncthreads();  // warp_reach is written again
  }
}

// Pass 2 "best": after the best IoU of a ground truth's candidates, the lowest anchor that has it.
template <typename T, typename Sink>
__global__ void rescue_kernel(const ImageEntry* images, int64_t num_anchors, const Rescue<T> rescue, const Sink sink) {
  for (int64_t i = grid_index(); i < static_cast<int64_t>(*rescue.num_candidates); i += grid_size()) {
    const int64_t at = rescue.candidates[i], image = at / num_anchors;
    const int64_t number = (images == nullptr ? 0 : images[image].first_gt) + sink.gt(at);
    if (rescue.taken[number] == 0 && to_bits(sink.iou(at)) == rescue.best_iou[number]) {
      atomicMax(rescue.best_key + number, anchor_key(at - image * num_anchors));
    }
  }
}

template <typename T, typename Sink>
__global__ void promote_kernel(const ImageEntry* images, int64_t num_anchors, const Rescue<T> rescue, const Sink sink) {
  for (int64_t i = grid_index(); i < static_cast<int64_t>(*rescue.num_candidates); i += grid_size()) {
    const int64_t at = rescue.candidates[i], image = at / num_anchors, anchor = at - image * num_anchors;
    const int64_t number = (images == nullptr ? 0 : images[image].first_gt) + sink.gt(at);
    if (rescue.taken[number] != 0) continue;
    if (rescue.policy == SecondPass::kAll || rescue.best_key[number] == anchor_key(anchor)) {
      sink.promote(image, anchor, at);
    }
  }
}

// images: null for one image.
template <typename T, typename Sink>
void second_pass(const ImageEntry* images, int64_t num_images, int64_t num_anchors, int64_t num_gts,
                 const Rescue<T>& rescue, const Sink& sink, cudaStream_t stream) {
  if (rescue.policy == SecondPass::kNone || num_gts == 0) return;
  // How many candidates there are only the device knows: enough threads to fill it, and they stride over the rest.
  constexpr unsigned int kEnough = 512;
  const unsigned int all = blocks_for(num_images * num_anchors), blocks = all < kEnough ? all : kEnough;
  if (rescue.policy == SecondPass::kBest) {
    rescue_kernel<T, Sink><<<blocks, kThreads, 0, stream>>>(images, num_anchors, rescue, sink);
  }
  promote_kernel<T, Sink><<<blocks, kThreads, 0, stream>>>(images, num_anchors, rescue, sink);
}

template <typename T, typename Sink>
void match_tiles(const Tables& tables, const void* device, int64_t num_anchors, int64_t num_tiles,
                 const BoxWindows<T>& windows, const Thresholds<T>& thresholds, const Rescue<T>& rescue,
                 const Sink& sink, cudaStream_t stream) {
  if (num_tiles == 0) return;
  tile_kernel<T, Sink><<<blocks_for(tables.num_images * num_tiles, 1), kThreads, 0, stream>>>(
      tables, device, num_anchors, num_tiles, windows, thresholds, rescue, sink);
  const auto* images = reinterpret_cast<const ImageEntry*>(static_cast<const unsigned char*>(device) + tables.images);
  second_pass(images, tables.num_images, num_anchors, windows.num_gts, rescue, sink, stream);
}

}  // namespace

template <typename T>
void match_dense(const AlignedBox<T>* anchors, int64_t num_anchors, const AlignedBox<T>* gts, int64_t num_gts,
                 const AlignedBox<T>* ignores, int64_t num_ignores, const Thresholds<T>& thresholds,
                 const Rescue<T>& rescue, const MatchArrays<T>& out, cudaStream_t stream) {
  if (num_anchors == 0) return;
  const LabelSink<T> sink{out};
  dense_kernel<T><<<blocks_for(num_anchors, kDenseThreads), kDenseThreads, 0, stream>>>(
      anchors, num_anchors, gts, num_gts, ignores, num_ignores, thresholds, rescue, sink);
  second_pass(static_cast<const ImageEntry*>(nullptr), 1, num_anchors, num_gts, rescue, sink, stream);
}

template <typename T>
void match_windows(const Tables& tables, const void* device, int64_t num_anchors, int64_t num_tiles,
                   const BoxWindows<T>& windows, const Thresholds<T>& thresholds, const Rescue<T>& rescue,
                   const MatchArrays<T>& out, cudaStream_t stream) {
  match_tiles(tables, device, num_anchors, num_tiles, windows, thresholds, rescue, LabelSink<T>{out}, stream);
}

template <typename T>
void match_ranks(const Tables& tables, const void* device, int64_t num_anchors, int64_t num_tiles,
                 const BoxWindows<T>& windows, const Thresholds<T>& thresholds, const Rescue<T>& rescue,
                 const MemberTable& members, const RankBits& bits, const SparseMatches<T>& out, cudaStream_t stream) {
  if (windows.num_gts + windows.num_ignores == 0) return;  // all anchors are negative
  match_tiles(tables, device, num_anchors, num_tiles, windows, thresholds, rescue, RankSink<T>{members, bits, out},
              stream);
}

#define GS_INSTANTIATE(T)                                                                                             \
  template void match_dense<T>(const AlignedBox<T>*, int64_t, const AlignedBox<T>*, int64_t, const AlignedBox<T>*,    \
                               int64_t, const Thresholds<T>&, const Rescue<T>&, const MatchArrays<T>&, cudaStream_t); \
  template void match_windows<T>(const Tables&, const void*, int64_t, int64_t, const BoxWindows<T>&,                  \
                                 const Thresholds<T>&, const Rescue<T>&, const MatchArrays<T>&, cudaStream_t);        \
  template void match_ranks<T>(const Tables&, const void*, int64_t, int64_t, const BoxWindows<T>&,                    \
                               const Thresholds<T>&, const Rescue<T>&, const MemberTable&, const RankBits&,           \
                               const SparseMatches<T>&, cudaStream_t);
GS_INSTANTIATE(float)
GS_INSTANTIATE(double)
#undef GS_INSTANTIATE

}  // namespace group_sampling::cuda
