#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernel.h"
#include "../pairwise_iou.h"
#include "workspace.h"

namespace group_sampling {
namespace {

void pairwise_iou_cuda(const PairwiseIouCall& call) {
  const c10::cuda::CUDAGuard guard(call.out.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor boxes1 = aligned(call.boxes1), boxes2 = aligned(call.boxes2);
  AT_DISPATCH_FLOATING_TYPES(call.out.scalar_type(), "pairwise_iou", [&] {
    cuda::pairwise_iou(aligned_boxes<scalar_t>(boxes1), boxes1.size(0), aligned_boxes<scalar_t>(boxes2), boxes2.size(0),
                       call.out.mutable_data_ptr<scalar_t>(), stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

using PairwiseIouCuda = Kernel<prepare_pairwise_iou, pairwise_iou_cuda>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CUDA, m) { m.impl("pairwise_iou", TORCH_FN(group_sampling::PairwiseIouCuda::call)); }
