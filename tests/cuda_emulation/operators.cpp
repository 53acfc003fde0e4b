// The CUDA operators' host code, unchanged, in a process without a GPU: their kernels registered for CUDA as they are,
// and for the CPU a kernel that copies a call's arguments to the emulated device, calls the operator there and copies
// its results back.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "scheduler.h"

namespace emulation {
namespace {

using Registration = void (*)(torch::Library&);
std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}

}  // namespace
}  // namespace emulation

// The schemas are there: the extension has defined them. The kernels are registered when start() is called.
#undef TORCH_LIBRARY_FRAGMENT
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_FRAGMENT(ns, m) [[maybe_unused]] static void C10_CONCATENATE(schema_, C10_UID)(torch::Library & m)
#define TORCH_LIBRARY_IMPL(ns, key, m) GS_IMPL(C10_CONCATENATE(register_, C10_UID), m)
#define GS_IMPL(name, m)                                                                                 \
  static void name(torch::Library&);                                                                     \
  static const bool C10_CONCATENATE(name, _listed) = (emulation::registrations().push_back(name), true); \
  static void name(torch::Library& m)

#include "sources.inc"  // every .cpp of csrc/ and csrc/cuda/, see build.py

namespace emulation {
namespace {

constexpr const char* kNamespace = "group_sampling";

std::mutex one_call;
thread_local bool on_device = false;

// While an operator runs, its tensors are made of the emulated device's memory.
class Allocator : public c10::Allocator {
 public:
  c10::Allocator* host = nullptr;

  c10::DataPtr allocate(size_t bytes) override {
    if (!on_device) return host->allocate(bytes);
    return {memory().allocate(bytes), c10::Device(c10::kCPU)};  // forgotten at the end of the call
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

class DeviceCall {
 public:
  DeviceCall() : lock_(one_call) {
    begin_call();
    on_device = true;
  }
  ~DeviceCall() {
    on_device = false;
    end_call();
  }

 private:
  std::lock_guard<std::mutex> lock_;
};

// At the same place modulo 16, with the same strides.
at::Tensor to_device(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu()) return tensor;  // for the operator to refuse
  size_t elements = tensor.numel() > 0 ? 1 : 0;
  for (int64_t d = 0; d < tensor.dim() && elements > 0; ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  const size_t bytes = elements * tensor.itemsize();
  const void* from = tensor.const_data_ptr();
  void* array = memory().allocate(bytes, reinterpret_cast<uintptr_t>(from) % 16);
  if (bytes > 0) std::memcpy(array, from, bytes);
  memory().set_initialized(array);
  return at::from_blob(array, tensor.sizes(), tensor.strides(), tensor.options());
}

at::Tensor from_device(const at::Tensor& tensor, const std::string& op) {
  const size_t bytes = tensor.nbytes(), wrong = memory().first_uninitialized(tensor.const_data_ptr(), bytes);
  if (wrong < bytes) {
    throw std::runtime_error("emulated CUDA: " + op + ": uninitialized: byte " + std::to_string(wrong) + " of " +
                             std::to_string(bytes) + " of a result was not written");
  }
  on_device = false;
  at::Tensor copy = tensor.clone();
  on_device = true;
  return copy;
}

void run_on_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const DeviceCall call;
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = to_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_device(tensor));
      value = std::move(list);
    }
  }
  op.callBoxedForDispatchKey(c10::DispatchKey::CUDA, *stack);
  memory().find_initialized();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = from_device((*stack)[i].toTensor(), op.schema().name());
  }
}

Allocator allocator;
std::optional<torch::Library> for_cuda, for_cpu;

}  // namespace
}  // namespace emulation

#define GS_EXPORT extern "C" __attribute__((visibility("default")))

GS_EXPORT void emulation_start() {
  using namespace emulation;
  for_cuda.emplace(torch::Library::IMPL, kNamespace, c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (const Registration each : registrations()) each(*for_cuda);
  for_cpu.emplace(torch::Library::IMPL, kNamespace, c10::DispatchKey::CPU, __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const std::string prefix = std::string(kNamespace) + "::";
    if (name.name.compare(0, prefix.size(), prefix) != 0) continue;
    for_cpu->impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_device>());
  }
  allocator.host = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator, /*priority=*/255);
}

GS_EXPORT void emulation_stop() {
  using namespace emulation;
  c10::SetCPUAllocator(allocator.host, /*priority=*/255);
  for_cpu.reset();
  for_cuda.reset();
}

GS_EXPORT void emulation_seed(uint64_t seed) { emulation::set_seed(seed); }
GS_EXPORT void emulation_cut_grids(int cut) { emulation::set_cut_grids(cut != 0); }
GS_EXPORT void emulation_reset_counts() { emulation::reset_counts(); }

// Valid until the next call.
GS_EXPORT const char* emulation_counts() {
  static std::string text;
  text = emulation::counts();
  return text.c_str();
}
