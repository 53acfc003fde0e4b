#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../box_geometry.h"
#include "../pairwise_iou.h"
#include "columns.h"
#include "multiversion.h"

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

template <typename T>
void run(const at::Tensor& boxes1, const at::Tensor& boxes2, const at::Tensor& out) {
  const auto* rows = reinterpret_cast<const Box<T>*>(boxes1.const_data_ptr<T>());
  const Columns<T> columns(reinterpret_cast<const Box<T>*>(boxes2.const_data_ptr<T>()), boxes2.size(0));
  const int64_t m = boxes2.size(0);
  T* data = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(m, 1));
  at::parallel_for(0, boxes1.size(0), grain,
                   [&](int64_t begin, int64_t end) { iou_rows(rows, begin, end, columns, m, data); });
}

at::Tensor pairwise_iou_cpu(const at::Tensor& boxes1, const at::Tensor& boxes2) {
  check_pairwise_iou(boxes1, boxes2);
  const at::Tensor first = boxes1.contiguous(), second = boxes2.contiguous();
  at::Tensor out = at::empty({first.size(0), second.size(0)}, first.options());
  if (out.numel() == 0) return out;
  if (first.scalar_type() == at::kFloat) {
    run<float>(first, second, out);
  } else {
    run<double>(first, second, out);
  }
  return out;
}

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) { m.impl("pairwise_iou", TORCH_FN(group_sampling::pairwise_iou_cpu)); }
