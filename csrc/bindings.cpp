// Python's entry: importing the module registers the operators; the functions below forward to the dispatcher, so they
// cannot differ from torch.ops.group_sampling.*.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "assign_and_sample.h"
#include "match_anchor_grid.h"
#include "match_anchors.h"
#include "pairwise_iou.h"
#include "sample_groups.h"

namespace group_sampling {
namespace {

std::map<std::string, std::string> build_info() {
  return {
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#elif defined(__GNUC__)
      {"compiler", "gcc " __VERSION__},
#else
      {"compiler", "unknown"},
#endif
      {"torch", TORCH_VERSION},
      {"flags", GS_BUILD_FLAGS},
#ifdef GS_WITH_CUDA
      {"cuda", GS_CUDA_VERSION},
      {"cuda_architectures", GS_CUDA_ARCHITECTURES},
#else
      {"cuda", "none"},
#endif
  };
}

// Python lists arrive as vectors; the operators take views of them.
auto py_match_anchor_grid(const std::vector<at::Tensor>& gt_boxes, const std::vector<at::Tensor>& ignore_boxes,
                          const std::vector<int64_t>& lattice_ints, const std::vector<double>& lattice_floats,
                          double pos_iou, double neg_iou, const std::string& second_pass, double ignore_ioa) {
  return match_anchor_grid(gt_boxes, ignore_boxes, lattice_ints, lattice_floats, pos_iou, neg_iou, second_pass,
                           ignore_ioa);
}

auto py_match_anchors(const at::Tensor& anchors, const at::Tensor& gt_boxes,
                      const std::optional<at::Tensor>& ignore_boxes, double pos_iou, double neg_iou,
                      const std::string& second_pass, double ignore_ioa) {
  return match_anchors(anchors, gt_boxes, ignore_boxes, pos_iou, neg_iou, second_pass, ignore_ioa);
}

auto py_sample_groups(const at::Tensor& labels, const std::optional<at::Tensor>& group_ids,
                      const std::vector<int64_t>& lattice_ints, int64_t num_groups, int64_t samples_per_group,
                      double positive_fraction, int64_t seed, int64_t iteration, int64_t first_image) {
  return sample_groups(labels, group_ids, lattice_ints, num_groups, samples_per_group, positive_fraction, seed,
                       iteration, first_image);
}

auto py_assign_and_sample(const std::vector<at::Tensor>& gt_boxes, const std::vector<at::Tensor>& ignore_boxes,
                          const std::vector<int64_t>& lattice_ints, const std::vector<double>& lattice_floats,
                          int64_t num_groups, int64_t samples_per_group, double positive_fraction, int64_t seed,
                          int64_t iteration, int64_t first_image, double pos_iou, double neg_iou,
                          const std::string& second_pass, double ignore_ioa) {
  return assign_and_sample(gt_boxes, ignore_boxes, lattice_ints, lattice_floats, num_groups, samples_per_group,
                           positive_fraction, seed, iteration, first_image, pos_iou, neg_iou, second_pass, ignore_ioa);
}

}  // namespace
}  // namespace group_sampling

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace group_sampling;
  m.def("build_info", &build_info, "Compiler, torch, flags and CUDA version of this build.");
  m.def("pairwise_iou", &pairwise_iou, py::arg("boxes1"), py::arg("boxes2"));
  m.def("match_anchors", &py_match_anchors, py::arg("anchors"), py::arg("gt_boxes"), py::arg("ignore_boxes"),
        py::arg("pos_iou"), py::arg("neg_iou"), py::arg("second_pass"), py::arg("ignore_ioa"));
  m.def("match_anchor_grid", &py_match_anchor_grid, py::arg("gt_boxes"), py::arg("ignore_boxes"),
        py::arg("lattice_ints"), py::arg("lattice_floats"), py::arg("pos_iou"), py::arg("neg_iou"),
        py::arg("second_pass"), py::arg("ignore_ioa"));
  m.def("sample_groups", &py_sample_groups, py::arg("labels"), py::arg("group_ids"), py::arg("lattice_ints"),
        py::arg("num_groups"), py::arg("samples_per_group"), py::arg("positive_fraction"), py::arg("seed"),
        py::arg("iteration"), py::arg("first_image"));
  m.def("assign_and_sample", &py_assign_and_sample, py::arg("gt_boxes"), py::arg("ignore_boxes"),
        py::arg("lattice_ints"), py::arg("lattice_floats"), py::arg("num_groups"), py::arg("samples_per_group"),
        py::arg("positive_fraction"), py::arg("seed"), py::arg("iteration"), py::arg("first_image"), py::arg("pos_iou"),
        py::arg("neg_iou"), py::arg("second_pass"), py::arg("ignore_ioa"));
}
