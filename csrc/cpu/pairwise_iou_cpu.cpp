#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../pairwise_iou.h"
#include "columns.h"
#include "multiversion.h"
#include "parallel.h"
#include "tensor_boxes.h"

namespace group_sampling {
namespace {

template <typename T>
GS_ALWAYS_INLINE void iou_row(const Box<T>& box, const T* GS_RESTRICT x1, const T* GS_RESTRICT y1,
                              const T* GS_RESTRICT x2, const T* GS_RESTRICT y2, const T* GS_RESTRICT area,
                              int64_t count, T* GS_RESTRICT out) {
  const T own_area = box_area(box);
  for (int64_t j = 0; j < count; ++j) {
    const T intersection = overlap(box.x1, box.x2, x1[j], x2[j]) * overlap(box.y1, box.y2, y1[j], y2[j]);
    out[j] = iou_of_areas(intersection, own_area, area[j]);
  }
}

GS_CPU_CLONES void iou_rows(const Box<float>* boxes, int64_t begin, int64_t end, const Columns<float>& c, int64_t m,
                            float* out) {
  for (int64_t i = begin; i < end; ++i) {
    iou_row(boxes[i], c.x1.data(), c.y1.data(), c.x2.data(), c.y2.data(), c.area.data(), m, out + i * m);
  }
}

GS_CPU_CLONES void iou_rows(const Box<double>* boxes, int64_t begin, int64_t end, const Columns<double>& c, int64_t m,
                            double* out) {
  for (int64_t i = begin; i < end; ++i) {
    iou_row(boxes[i], c.x1.data(), c.y1.data(), c.x2.data(), c.y2.data(), c.area.data(), m, out + i * m);
  }
}

void pairwise_iou_cpu(const PairwiseIouCall& call) {
  const int64_t n = call.boxes1.size(0), m = call.boxes2.size(0);
  if (n * m == 0) return;
  AT_DISPATCH_FLOATING_TYPES(call.out.scalar_type(), "pairwise_iou", [&] {
    const auto* rows = boxes_of<scalar_t>(call.boxes1);
    const Columns<scalar_t> columns(boxes_of<scalar_t>(call.boxes2), m);
    auto* out = call.out.mutable_data_ptr<scalar_t>();
    for_each_range(n * m / 4, n, [&](int64_t begin, int64_t end) { iou_rows(rows, begin, end, columns, m, out); });
  });
}

using PairwiseIouCpu = Kernel<prepare_pairwise_iou, pairwise_iou_cpu>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) { m.impl("pairwise_iou", TORCH_FN(group_sampling::PairwiseIouCpu::call)); }
