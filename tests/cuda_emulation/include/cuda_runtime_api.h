// The part of CUDA that csrc/cuda uses, for the host compiler. What is not here does not compile: a new intrinsic has
// to be given its meaning first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using cudaStream_t = void*;

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

// `line` tells one call from another.
void barrier(int line);
unsigned int ballot(unsigned int lanes, bool vote, int line);
uint64_t shuffle(unsigned int lanes, uint64_t value, int source, int line);

// Memory of the block for one __shared__ declaration.
void* shared_memory(int line, size_t bytes);
template <typename T>
T& shared(int line) {
  return *static_cast<T*>(shared_memory(line, sizeof(T)));
}

// No thread runs between the two.
uint64_t atomic_read(const void* address, size_t bytes);
void atomic_write(void* address, size_t bytes, uint64_t value);

void launch(const char* kernel, const dim3& grid, const dim3& block, void (*call)(const void*), const void* arguments,
            size_t argument_bytes);

// kernel<<<grid, block, 0, stream>>>(arguments), as launches.py rewrites it.
template <typename Body>
void launch(const char* kernel, const dim3& grid, const dim3& block, int, cudaStream_t, const Body& body) {
  launch(kernel, grid, block, [](const void* it) { (*static_cast<const Body*>(it))(); }, &body, sizeof(body));
}

template <typename T>
T shuffle_value(unsigned int lanes, T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(lanes, bits, source, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T, typename Combine>
T atomic(T* address, const Combine& combine) {
  static_assert(std::is_unsigned_v<T>);
  const auto old = static_cast<T>(atomic_read(address, sizeof(T)));
  atomic_write(address, sizeof(T), combine(old));
  return old;
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }
inline int __popc(unsigned int x) { return __builtin_popcount(x); }

inline unsigned int __ballot_sync(unsigned int lanes, bool vote, int line = __builtin_LINE()) {
  return emulation::ballot(lanes, vote, line);
}
template <typename T>
T __shfl_sync(unsigned int lanes, T value, int source, int line = __builtin_LINE()) {
  return emulation::shuffle_value(lanes, value, source % 32, line);
}
template <typename T>
T __shfl_up_sync(unsigned int lanes, T value, unsigned int distance, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(threadIdx.x % 32), source = lane - static_cast<int>(distance);
  return emulation::shuffle_value(lanes, value, source >= 0 ? source : lane, line);
}
template <typename T>
T __shfl_xor_sync(unsigned int lanes, T value, int distance, int line = __builtin_LINE()) {
  return emulation::shuffle_value(lanes, value, static_cast<int>(threadIdx.x % 32) ^ distance, line);
}

template <typename T>
T atomicAdd(T* address, T value) {
  return emulation::atomic(address, [value](T old) { return old + value; });
}
template <typename T>
T atomicOr(T* address, T value) {
  return emulation::atomic(address, [value](T old) { return old | value; });
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulation::atomic(address, [value](T old) { return old > value ? old : value; });
}
