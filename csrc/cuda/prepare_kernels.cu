// What has to be there before matching and drawing: tables on the device, cleared memory, permutations, windows.
#include <algorithm>

#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

constexpr int kChunkWords = 768;  // kernel arguments may take 4 KB

struct alignas(16) Chunk {
  uint32_t words[kChunkWords];
};

__global__ void upload_kernel(const Chunk chunk, int count, uint32_t* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) out[i] = chunk.words[i];
}

// num_words: of the tables in `chunk`; 0 where they have been uploaded before.
template <typename T>
__global__ void prepare_kernel(const Chunk chunk, int num_words, const Tables tables, uint32_t* device,
                               const ClearList clears, const DrawOptions draw, Permutation* permutations,
                               const int64_t* group_offsets, const BoxWindows<T> windows,
                               const Thresholds<T> thresholds) {
  __shared__ Chunk copy;
  for (int i = static_cast<int>(threadIdx.x); i < num_words; i += kThreads) {
    copy.words[i] = chunk.words[i];
    if (blockIdx.x == 0) device[i] = chunk.words[i];
  }
  __syncthreads();
  const void* all = num_words > 0 ? static_cast<const void*>(&copy) : device;

  for (int k = 0; k < clears.count; ++k) {
    for (int64_t i = grid_index(); i < clears.words[k]; i += grid_size()) clears.data[k][i] = 0;
  }

  if (permutations != nullptr) {
    const int64_t* offsets = group_offsets != nullptr ? group_offsets : table<int64_t>(all, tables.group_offsets);
    for (int64_t i = grid_index(); i < tables.num_images * tables.num_groups; i += grid_size()) {
      const int64_t image = i / tables.num_groups, group = i % tables.num_groups;
      const auto size = static_cast<uint32_t>(offsets[group + 1] - offsets[group]);
      permutations[i] = make_permutation(size, draw_key(draw.seed, draw.iteration, draw.first_image, image, group));
    }
  }

  const auto* images = table<ImageEntry>(all, tables.images);
  const int64_t num_boxes = windows.num_gts + windows.num_ignores;
  for (int64_t i = grid_index(); i < num_boxes * tables.num_lattices; i += grid_size()) {
    const int64_t lattice_index = i / num_boxes, number = i % num_boxes;
    const bool is_gt = number < windows.num_gts;
    // Images that have no boxes begin where the next one does: the last that begins at or before is the owner.
    int64_t low = 0, high = tables.num_images;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      const int64_t first = is_gt ? images[middle].first_gt : windows.num_gts + images[middle].first_ignore;
      if (first <= number) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const ImageEntry& image = images[low];
    const auto* boxes = static_cast<const Box<T>*>(is_gt ? image.gts : image.ignores);
    const Box<T> box = boxes[number - (is_gt ? image.first_gt : windows.num_gts + image.first_ignore)];
    const Lattice& lattice = table<Lattice>(all, tables.lattices)[lattice_index];
    const Window window =
        is_gt ? iou_window(lattice, box, thresholds.neg_iou) : cover_window(lattice, box, thresholds.ignore_ioa);
    windows.windows[i] = {static_cast<int32_t>(window.row0), static_cast<int32_t>(window.row1),
                          static_cast<int32_t>(window.col0), static_cast<int32_t>(window.col1)};
    if (lattice_index == 0) windows.boxes[number] = {box.x1, box.y1, box.x2, box.y2};
  }
}

}  // namespace

template <typename T>
void prepare(const Tables& tables, const void* host, void* device, const ClearList& clears, const DrawOptions& draw,
             Permutation* permutations, const int64_t* group_offsets, const BoxWindows<T>& windows,
             const Thresholds<T>& thresholds, cudaStream_t stream) {
  const int64_t num_words = tables.bytes / 4;
  const auto* from = static_cast<const uint32_t*>(host);
  auto* to = static_cast<uint32_t*>(device);
  Chunk chunk{};
  if (num_words <= kChunkWords) {
    if (num_words > 0) memcpy(chunk.words, from, static_cast<size_t>(num_words) * 4);
  } else {
    for (int64_t first = 0; first < num_words; first += kChunkWords) {
      const int64_t count = num_words - first < kChunkWords ? num_words - first : kChunkWords;
      memcpy(chunk.words, from + first, static_cast<size_t>(count) * 4);
      upload_kernel<<<1, kThreads, 0, stream>>>(chunk, static_cast<int>(count), to + first);
    }
  }
  // A thread for each window and each permutation; clearing takes a few turns.
  int64_t items = (windows.num_gts + windows.num_ignores) * tables.num_lattices;
  if (permutations != nullptr) items = std::max(items, tables.num_images * tables.num_groups);
  for (int k = 0; k < clears.count; ++k) items = std::max(items, clears.words[k] / 4);
  const unsigned int blocks = blocks_for(std::max<int64_t>(items, 1));
  const int words_in_chunk = num_words <= kChunkWords ? static_cast<int>(num_words) : 0;
  prepare_kernel<T><<<blocks, kThreads, 0, stream>>>(chunk, words_in_chunk, tables, to, clears, draw, permutations,
                                                     group_offsets, windows, thresholds);
}

#define GS_INSTANTIATE(T)                                                                                         \
  template void prepare<T>(const Tables&, const void*, void*, const ClearList&, const DrawOptions&, Permutation*, \
                           const int64_t*, const BoxWindows<T>&, const Thresholds<T>&, cudaStream_t);
GS_INSTANTIATE(float)
GS_INSTANTIATE(double)
#undef GS_INSTANTIATE

}  // namespace group_sampling::cuda
