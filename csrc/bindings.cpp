// Python's entry: importing the module registers the operators. Its functions of the same names call the dispatcher, so
// they cannot differ from torch.ops.group_sampling.*.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "grid_layout.h"
#include "options.h"

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

// What the Python side states as well, because it has to do without this module.
std::map<std::string, double> limits() {
  return {{"max_cells", static_cast<double>(kMaxCells)}, {"min_side", kMinSide}, {"min_threshold", kMinThreshold}};
}

void bind_operators(pybind11::module_& m) {
  const std::string prefix = "group_sampling::";
  for (const auto& found : c10::Dispatcher::singleton().getAllOpNames()) {
    if (found.name.compare(0, prefix.size(), prefix) != 0) continue;
    const auto symbol = c10::Symbol::fromQualString(found.name);
    m.def(found.name.c_str() + prefix.size(), [symbol](const pybind11::args& args, const pybind11::kwargs& kwargs) {
      return torch::jit::invokeOperatorFromPython(torch::jit::getAllOperatorsFor(symbol), args, kwargs);
    });
  }
}

}  // namespace
}  // namespace group_sampling

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &group_sampling::build_info, "Compiler, torch, flags and CUDA version of this build.");
  m.def("limits", &group_sampling::limits, "Limits of grids and thresholds that the operators enforce.");
  group_sampling::bind_operators(m);
}
