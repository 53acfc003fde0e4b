// Launchers of the CUDA kernels. Raw pointers and sizes, no torch, so that nvcc compiles them quickly and a caller can
// capture them in a CUDA graph: nothing here allocates, waits or reads the device.
//
// All pointers are device pointers unless a comment says host. Memory called "zeroed" must be zero before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../anchor_grid.h"
#include "../options.h"
#include "../permutation.h"

namespace group_sampling::cuda {

// IoUs are compared as integers: the bits of non-negative floating-point numbers sort like the numbers.
template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = unsigned int;
};
template <>
struct BitsOf<double> {
  using type = unsigned long long;
};
template <typename T>
using Bits = typename BitsOf<T>::type;

// The boxes of a batch, concatenated; image b owns [offsets[b], offsets[b + 1]).
template <typename T>
struct BoxBatch {
  const Box<T>* boxes;
  const int64_t* offsets;
  int64_t total;
};

struct GridTable {
  const Lattice* lattices;
  int64_t num_lattices;
  int64_t num_anchors;
};

// Everything that matching knows about B images of n anchors. Ground truths are numbered over the batch for the last
// three arrays. Keys are reversed, so that "lowest index" becomes the maximum and zero means none.
template <typename T>
struct MatchState {
  int64_t num_images, num_anchors;
  const int64_t* gt_offsets;       // B + 1
  Bits<T>* best_iou;               // (B, n), zeroed
  int32_t* best_gt_key;            // (B, n), zeroed: INT32_MAX - ground truth
  uint8_t* covered;                // (B, n), zeroed; null without ignore boxes
  uint8_t* taken;                  // (sum of m_b), zeroed: some anchor is positive in pass 1
  Bits<T>* rescue_iou;             // (sum of m_b), zeroed: best candidate of pass 2 "best"
  unsigned long long* rescue_key;  // (sum of m_b), zeroed: UINT64_MAX - anchor
  T pos_iou, neg_iou, ignore_ioa;
  SecondPass second_pass;
};

// How the sampler numbers the anchors of a group: through lattices, or through tables when group_ids is not null.
struct MemberTable {
  GridTable grid;
  const int64_t* group_ids;      // (n,)
  const int32_t* member_of;      // (n,)
  const int64_t* members;        // anchors, group by group
  const int64_t* group_offsets;  // (G + 1,) prefix sums of the group sizes
  int64_t num_groups;
};

// Bits by rank for each image: word(b, g) starts at b * words + group_offsets[g] / 32 + g.
struct RankBits {
  uint32_t* positive;         // (B, words), zeroed
  uint32_t* not_negative;     // (B, words), zeroed
  int64_t words;              // n / 32 + G + 1
  Permutation* permutations;  // (B, G)
};

struct SampleOutput {
  int64_t* indices;     // (B, G, N)
  int8_t* labels;       // (B, G, N) or null
  int64_t* matched_gt;  // (B, G, N) or null
  int64_t* num_pos;     // (B, G)
  int64_t* num_neg;     // (B, G)
};

// Copies `bytes` from the host through kernel arguments: no host memory has to outlive the call.
void upload(const void* host, int64_t bytes, void* device, cudaStream_t stream);

template <typename T>
void pairwise_iou(const Box<T>* boxes1, int64_t n, const Box<T>* boxes2, int64_t m, T* out, cudaStream_t stream);

// Fill best_iou, best_gt_key and covered of a MatchState: from all anchors against all boxes (one image), or by
// windows.
template <typename T>
void match_dense(const MatchState<T>& state, const Box<T>* anchors, const BoxBatch<T>& gts, const BoxBatch<T>& ignores,
                 cudaStream_t stream);
template <typename T>
void match_windows(const MatchState<T>& state, const GridTable& grid, const BoxBatch<T>& gts,
                   const BoxBatch<T>& ignores, cudaStream_t stream);

// Fills taken, rescue_iou and rescue_key. After it, the labels of all anchors are decided.
template <typename T>
void second_pass(const MatchState<T>& state, cudaStream_t stream);

template <typename T>
void write_matches(const MatchState<T>& state, int8_t* labels, int64_t* matched_gt, T* best_iou, cudaStream_t stream);

// Members of explicit groups: fills member_of, members and group_offsets. counts: (ceil(n / kIdBlock), G), zeroed.
constexpr int kIdBlock = 256;
void number_members(const int64_t* group_ids, int64_t n, int64_t num_groups, int32_t* counts, int32_t* member_of,
                    int64_t* members, int64_t* group_offsets, cudaStream_t stream);

// Draws from labels (B, n), or from the labels that a MatchState implies.
void sample_labels(const int8_t* labels, int64_t num_images, int64_t num_anchors, const MemberTable& members,
                   const RankBits& bits, const DrawOptions& options, const SampleOutput& out, cudaStream_t stream);
template <typename T>
void sample_matches(const MatchState<T>& state, const MemberTable& members, const RankBits& bits,
                    const DrawOptions& options, const SampleOutput& out, cudaStream_t stream);

}  // namespace group_sampling::cuda
