// Matching: IoUs, the two passes, labels.
#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

constexpr int kUploadBytes = 2048;  // kernel arguments may take 4 KB

struct UploadChunk {
  unsigned char bytes[kUploadBytes];
};

__global__ void upload_kernel(const UploadChunk chunk, int count, unsigned char* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) out[i] = chunk.bytes[i];
}

// One anchor to a thread; the block reads the ground truths tile by tile.
template <typename T>
__global__ void dense_kernel(const MatchState<T> state, const Box<T>* anchors, const Box<T>* gts, int64_t num_gts,
                             const Box<T>* ignores, int64_t num_ignores) {
  __shared__ Box<T> tile[kThreads];
  const int64_t n = state.num_anchors;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < n; first += grid_size()) {
    const int64_t anchor = first + thread;
    const Box<T> box = anchor < n ? anchors[anchor] : Box<T>{};
    T best = T(0);
    int64_t best_gt = -1;
    for (int64_t start = 0; start < num_gts; start += kThreads) {
      if (start + thread < num_gts) tile[thread] = gts[start + thread];
      __syncthreads();
      const int count = static_cast<int>(num_gts - start < kThreads ? num_gts - start : kThreads);
      for (int j = 0; j < count; ++j) {
        const T value = iou(box, tile[j]);
        if (value > best) {
          best = value;
          best_gt = start + j;
        }
      }
      __syncthreads();
    }
    bool covered = false;
    for (int64_t start = 0; start < num_ignores; start += kThreads) {
      if (start + thread < num_ignores) tile[thread] = ignores[start + thread];
      __syncthreads();
      const int count = static_cast<int>(num_ignores - start < kThreads ? num_ignores - start : kThreads);
      for (int k = 0; k < count; ++k) {
        covered = covered || (is_valid(tile[k]) && is_covered(box, tile[k], state.ignore_ioa));
      }
      __syncthreads();
    }
    if (anchor < n && best >= state.neg_iou) {
      state.best_iou[anchor] = to_bits(best);
      state.best_gt_key[anchor] = gt_key(best_gt);
    }
    if (anchor < n && covered) state.covered[anchor] = 1;
  }
}

// Calls visit(image, box, lattice, anchor, anchor box) for the anchors in the windows of all boxes: one warp for each
// box and lattice, its lanes side by side along the window's cells.
template <typename T, typename WindowOf, typename Visit>
__device__ void for_each_in_windows(const GridTable& grid, const BoxBatch<T>& batch, int64_t num_images,
                                    const WindowOf& window_of_box, const Visit& visit) {
  constexpr uint32_t kLanes = 32;
  const int64_t lane = grid_index() % kLanes, warps = grid_size() / kLanes;
  for (int64_t task = grid_index() / kLanes; task < batch.total * grid.num_lattices; task += warps) {
    const int64_t index = task / grid.num_lattices;
    const Lattice lattice = grid.lattices[task % grid.num_lattices];
    const Box<T> box = batch.boxes[index];
    const Window window = window_of_box(lattice, box);
    if (window.row1 < window.row0) continue;
    const int64_t image = owner_of(batch.offsets, num_images, index);
    // A lattice has fewer than 2^31 cells; 64-bit division is slow on a GPU.
    const auto columns = static_cast<uint32_t>(window.col1 - window.col0 + 1);
    const uint32_t cells = static_cast<uint32_t>(window.row1 - window.row0 + 1) * columns;
    for (auto cell = static_cast<uint32_t>(lane); cell < cells; cell += kLanes) {
      const int64_t row = window.row0 + cell / columns, col = window.col0 + cell % columns;
      const int64_t anchor = anchor_of_cell(lattice, row * lattice.width + col);
      visit(image, index - batch.offsets[image], image * grid.num_anchors + anchor, lattice_box<T>(lattice, row, col),
            box);
    }
  }
}

template <typename T>
__global__ void window_iou_kernel(const MatchState<T> state, const GridTable grid, const BoxBatch<T> gts) {
  for_each_in_windows(
      grid, gts, state.num_images,
      [&](const Lattice& lattice, const Box<T>& gt) { return iou_window(lattice, gt, state.neg_iou); },
      [&](int64_t, int64_t, int64_t at, const Box<T>& anchor, const Box<T>& gt) {
        const T value = iou(anchor, gt);
        if (value >= state.neg_iou) atomicMax(state.best_iou + at, to_bits(value));
      });
}

// Runs after window_iou_kernel: the lowest ground truth among those that have the best IoU.
template <typename T>
__global__ void window_gt_kernel(const MatchState<T> state, const GridTable grid, const BoxBatch<T> gts) {
  for_each_in_windows(
      grid, gts, state.num_images,
      [&](const Lattice& lattice, const Box<T>& gt) { return iou_window(lattice, gt, state.neg_iou); },
      [&](int64_t, int64_t index, int64_t at, const Box<T>& anchor, const Box<T>& gt) {
        const T value = iou(anchor, gt);
        if (value >= state.neg_iou && to_bits(value) == state.best_iou[at]) {
          atomicMax(state.best_gt_key + at, gt_key(index));
        }
      });
}

template <typename T>
__global__ void window_cover_kernel(const MatchState<T> state, const GridTable grid, const BoxBatch<T> ignores) {
  for_each_in_windows(
      grid, ignores, state.num_images,
      [&](const Lattice& lattice, const Box<T>& region) { return cover_window(lattice, region, state.ignore_ioa); },
      [&](int64_t, int64_t, int64_t at, const Box<T>& anchor, const Box<T>& region) {
        if (is_covered(anchor, region, state.ignore_ioa)) state.covered[at] = 1;
      });
}

template <typename T>
__global__ void taken_kernel(const MatchState<T> state) {
  for (int64_t at = grid_index(); at < state.num_images * state.num_anchors; at += grid_size()) {
    const int32_t key = state.best_gt_key[at];
    if (key == kNoKey || from_bits<T>(state.best_iou[at]) < state.pos_iou) continue;
    state.taken[state.gt_offsets[at / state.num_anchors] + gt_of_key(key)] = 1;
  }
}

// Calls visit(number of the ground truth, anchor, IoU bits) for the anchors that pass 2 may promote.
template <typename T, typename Visit>
__device__ void for_each_candidate(const MatchState<T>& state, const Visit& visit) {
  for (int64_t at = grid_index(); at < state.num_images * state.num_anchors; at += grid_size()) {
    const int32_t key = state.best_gt_key[at];
    if (key == kNoKey) continue;
    const int64_t number = state.gt_offsets[at / state.num_anchors] + gt_of_key(key);
    if (!state.taken[number]) visit(number, at % state.num_anchors, state.best_iou[at]);
  }
}

template <typename T>
__global__ void rescue_iou_kernel(const MatchState<T> state) {
  for_each_candidate(state, [&](int64_t number, int64_t, Bits<T> bits) { atomicMax(state.rescue_iou + number, bits); });
}

template <typename T>
__global__ void rescue_anchor_kernel(const MatchState<T> state) {
  for_each_candidate(state, [&](int64_t number, int64_t anchor, Bits<T> bits) {
    if (bits == state.rescue_iou[number]) atomicMax(state.rescue_key + number, anchor_key(anchor));
  });
}

template <typename T>
__global__ void write_kernel(const MatchState<T> state, int8_t* labels, int64_t* matched_gt, T* best_iou) {
  for (int64_t at = grid_index(); at < state.num_images * state.num_anchors; at += grid_size()) {
    const AnchorMatch<T> match = match_of(state, at / state.num_anchors, at % state.num_anchors);
    labels[at] = match.label;
    matched_gt[at] = match.gt;
    best_iou[at] = match.iou;
  }
}

}  // namespace

void upload(const void* host, int64_t bytes, void* device, cudaStream_t stream) {
  for (int64_t first = 0; first < bytes; first += kUploadBytes) {
    UploadChunk chunk{};
    const int count = static_cast<int>(bytes - first < kUploadBytes ? bytes - first : kUploadBytes);
    memcpy(chunk.bytes, static_cast<const unsigned char*>(host) + first, static_cast<size_t>(count));
    upload_kernel<<<1, kThreads, 0, stream>>>(chunk, count, static_cast<unsigned char*>(device) + first);
  }
}

template <typename T>
void match_dense(const MatchState<T>& state, const Box<T>* anchors, const BoxBatch<T>& gts, const BoxBatch<T>& ignores,
                 cudaStream_t stream) {
  if (state.num_anchors == 0 || gts.total + ignores.total == 0) return;
  dense_kernel<T><<<blocks_for(state.num_anchors), kThreads, 0, stream>>>(state, anchors, gts.boxes, gts.total,
                                                                          ignores.boxes, ignores.total);
}

template <typename T>
void match_windows(const MatchState<T>& state, const GridTable& grid, const BoxBatch<T>& gts,
                   const BoxBatch<T>& ignores, cudaStream_t stream) {
  const int64_t gt_threads = gts.total * grid.num_lattices * 32;
  if (gt_threads > 0) {
    window_iou_kernel<T><<<blocks_for(gt_threads), kThreads, 0, stream>>>(state, grid, gts);
    window_gt_kernel<T><<<blocks_for(gt_threads), kThreads, 0, stream>>>(state, grid, gts);
  }
  const int64_t ignore_threads = ignores.total * grid.num_lattices * 32;
  if (ignore_threads > 0)
    window_cover_kernel<T><<<blocks_for(ignore_threads), kThreads, 0, stream>>>(state, grid, ignores);
}

template <typename T>
void second_pass(const MatchState<T>& state, cudaStream_t stream) {
  const int64_t total = state.num_images * state.num_anchors;
  if (total == 0 || state.second_pass == SecondPass::kNone) return;
  taken_kernel<T><<<blocks_for(total), kThreads, 0, stream>>>(state);
  if (state.second_pass == SecondPass::kBest) {
    rescue_iou_kernel<T><<<blocks_for(total), kThreads, 0, stream>>>(state);
    rescue_anchor_kernel<T><<<blocks_for(total), kThreads, 0, stream>>>(state);
  }
}

template <typename T>
void write_matches(const MatchState<T>& state, int8_t* labels, int64_t* matched_gt, T* best_iou, cudaStream_t stream) {
  const int64_t total = state.num_images * state.num_anchors;
  if (total == 0) return;
  write_kernel<T><<<blocks_for(total), kThreads, 0, stream>>>(state, labels, matched_gt, best_iou);
}

#define GS_INSTANTIATE(T)                                                                                        \
  template void match_dense<T>(const MatchState<T>&, const Box<T>*, const BoxBatch<T>&, const BoxBatch<T>&,      \
                               cudaStream_t);                                                                    \
  template void match_windows<T>(const MatchState<T>&, const GridTable&, const BoxBatch<T>&, const BoxBatch<T>&, \
                                 cudaStream_t);                                                                  \
  template void second_pass<T>(const MatchState<T>&, cudaStream_t);                                              \
  template void write_matches<T>(const MatchState<T>&, int8_t*, int64_t*, T*, cudaStream_t);
GS_INSTANTIATE(float)
GS_INSTANTIATE(double)
#undef GS_INSTANTIATE

}  // namespace group_sampling::cuda
