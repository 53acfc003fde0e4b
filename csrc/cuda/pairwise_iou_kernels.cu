// The matrix of IoUs.
#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

constexpr int64_t kRowsPerThread = 8;

// A block fills in tiles of 2^log_columns columns, one to a thread, and kRowsPerThread rows for each of its rows of
// threads. Rows and columns of a tile follow from shifts; only its number is divided.
template <typename T>
__global__ void iou_kernel(const AlignedBox<T>* boxes1, int64_t n, const AlignedBox<T>* boxes2, int64_t m,
                           int log_columns, int64_t tiles_across, int64_t num_tiles, T* out) {
  const int64_t rows_per_tile = kRowsPerThread << (8 - log_columns);
  static_assert(kThreads == 1 << 8);
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t column = (tile % tiles_across << log_columns) + (threadIdx.x & ((1u << log_columns) - 1u));
    const int64_t first_row = tile / tiles_across * rows_per_tile + (threadIdx.x >> log_columns) * kRowsPerThread;
    if (column >= m) continue;
    const Box<T> box2 = load_box(boxes2 + column);
    for (int64_t row = first_row; row < first_row + kRowsPerThread && row < n; ++row) {
      out[row * m + column] = iou(load_box(boxes1 + row), box2);
    }
  }
}

}  // namespace

template <typename T>
void pairwise_iou(const AlignedBox<T>* boxes1, int64_t n, const AlignedBox<T>* boxes2, int64_t m, T* out,
                  cudaStream_t stream) {
  if (n == 0 || m == 0) return;
  int log_columns = 0;
  while (log_columns < 8 && int64_t(1) << log_columns < m) ++log_columns;
  const int64_t rows_per_tile = kRowsPerThread << (8 - log_columns);
  const int64_t tiles_across = (m + (int64_t(1) << log_columns) - 1) >> log_columns;
  const int64_t num_tiles = tiles_across * ((n + rows_per_tile - 1) / rows_per_tile);
  iou_kernel<T><<<blocks_for(num_tiles, 1), kThreads, 0, stream>>>(boxes1, n, boxes2, m, log_columns, tiles_across,
                                                                   num_tiles, out);
}

template void pairwise_iou<float>(const AlignedBox<float>*, int64_t, const AlignedBox<float>*, int64_t, float*,
                                  cudaStream_t);
template void pairwise_iou<double>(const AlignedBox<double>*, int64_t, const AlignedBox<double>*, int64_t, double*,
                                   cudaStream_t);

}  // namespace group_sampling::cuda
