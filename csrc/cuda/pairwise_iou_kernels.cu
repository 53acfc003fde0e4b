// The matrix of IoUs.
#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

template <typename T>
__global__ void iou_kernel(const Box<T>* boxes1, const Box<T>* boxes2, int64_t m, int64_t pairs, T* out) {
  for (int64_t i = grid_index(); i < pairs; i += grid_size()) out[i] = iou(boxes1[i / m], boxes2[i % m]);
}

}  // namespace

template <typename T>
void pairwise_iou(const Box<T>* boxes1, int64_t n, const Box<T>* boxes2, int64_t m, T* out, cudaStream_t stream) {
  if (n * m == 0) return;
  iou_kernel<T><<<blocks_for(n * m), kThreads, 0, stream>>>(boxes1, boxes2, m, n * m, out);
}

template void pairwise_iou<float>(const Box<float>*, int64_t, const Box<float>*, int64_t, float*, cudaStream_t);
template void pairwise_iou<double>(const Box<double>*, int64_t, const Box<double>*, int64_t, double*, cudaStream_t);

}  // namespace group_sampling::cuda
