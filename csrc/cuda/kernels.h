// Launchers of the CUDA kernels. Raw pointers and sizes, no torch, so that nvcc compiles them quickly and a caller can
// capture them in a CUDA graph: nothing here allocates, waits or reads the device.
//
// All pointers are device pointers unless a comment says host. Arrays called "cleared" must be zero before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../anchor_grid.h"
#include "../options.h"
#include "../permutation.h"

namespace group_sampling::cuda {

// A box that one (float) or two (double) vector instructions load.
template <typename T>
struct alignas(16) AlignedBox {
  T x1, y1, x2, y2;
};

// A Window in 16 bytes.
struct alignas(16) CellWindow {
  int32_t row0, row1, col0, col1;
};

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

// Boxes of one image as the caller has them, and how many the images before it have.
struct ImageEntry {
  const void* gts;
  const void* ignores;
  int64_t first_gt, first_ignore;
};

// Tables that the host makes and the kernels read, one after another at byte offsets. Where they fit, they travel to
// the device as an argument of the first kernel.
struct Tables {
  int64_t bytes;
  int64_t lattices, num_lattices;     // Lattice each
  int64_t first_tiles;                // num_lattices + 1 prefix sums of the numbers of tiles of one image
  int64_t group_offsets, num_groups;  // num_groups + 1 prefix sums of the groups' sizes
  int64_t images, num_images;         // ImageEntry, num_images + 1 of them: the last counts all boxes
};

// Cells of a lattice that one block matches.
constexpr int kTileColumns = 32, kTileRows = 32;

// Arrays that the first kernel clears, in units of 32 bits.
struct ClearList {
  static constexpr int kCapacity = 8;
  uint32_t* data[kCapacity];
  int64_t words[kCapacity];
  int count;
};

// The boxes of a batch, ground truths first, and for each lattice the window of each.
template <typename T>
struct BoxWindows {
  AlignedBox<T>* boxes;
  CellWindow* windows;  // (num_lattices, num_gts + num_ignores)
  int64_t num_gts, num_ignores;
};

// Pass 2. A candidate is an anchor in [neg_iou, pos_iou); it is promoted if nobody has taken its best ground truth.
// Ground truths are numbered over the batch. Keys are reversed, so that "lowest anchor" becomes the maximum.
template <typename T>
struct Rescue {
  SecondPass policy;
  uint32_t* taken;                     // (num_gts,), cleared: some anchor is positive in pass 1
  Bits<T>* best_iou;                   // (num_gts,), cleared, for "best": of its candidates
  unsigned long long* best_key;        // (num_gts,), cleared, for "best": UINT64_MAX - anchor
  unsigned long long* num_candidates;  // (1,), cleared
  int64_t* candidates;                 // (B * n,): image * n + anchor, in any order
};

template <typename T>
struct Thresholds {
  T pos_iou, neg_iou, ignore_ioa;
};

// Labels of all anchors, (B, n) each.
template <typename T>
struct MatchArrays {
  int8_t* labels;
  int64_t* matched_gt;
  T* best_iou;
};

// How the sampler numbers the anchors of a group: through lattices, or through tables when group_ids is not null.
struct MemberTable {
  const Lattice* lattices;
  int64_t num_lattices;
  const int64_t* group_ids;      // (n,)
  const int32_t* member_of;      // (n,)
  const int64_t* members;        // anchors by group, then index
  const int64_t* group_offsets;  // (G + 1,): where the members of each group begin
  int64_t num_groups;
};

// A bit for each place of the draw order of each image and group, and a bit for each word that a draw has to look at.
// The bits of group g begin at word first_word(g) of the image's, their summary at word first_summary(g).
struct RankBits {
  uint32_t* positive;      // (B, words), cleared
  uint32_t* not_negative;  // (B, words), cleared
  uint32_t* any_positive;  // (B, summary_words), cleared: the word of `positive` is not zero
  uint32_t* no_negative;   // (B, summary_words), cleared: the word of `not_negative` is full
  int64_t words, summary_words;
  const Permutation* permutations;  // (B, G)
};

GS_HOST_DEVICE int64_t first_word(int64_t members_before, int64_t group) { return members_before / 32 + group; }
GS_HOST_DEVICE int64_t first_summary(int64_t members_before, int64_t group) {
  return first_word(members_before, group) / 32 + group;
}

// What matching leaves for the anchors that are not negative, (B, n) each, the rest undefined.
template <typename T>
struct SparseMatches {
  int32_t* gt;
  T* iou;  // null unless pass 2 is "best"
};

struct SampleOutput {
  int64_t* indices;     // (B, G, N)
  int8_t* labels;       // (B, G, N) or null
  int64_t* matched_gt;  // (B, G, N) or null
  int64_t* num_pos;     // (B, G)
  int64_t* num_neg;     // (B, G)
};

// The first launch of a call: puts `host` where `device` is, clears, makes permutations (null: none) and windows (null
// boxes: none). group_offsets: null for those of the tables. Large tables take further launches before.
template <typename T>
void prepare(const Tables& tables, const void* host, void* device, const ClearList& clears, const DrawOptions& draw,
             Permutation* permutations, const int64_t* group_offsets, const BoxWindows<T>& windows,
             const Thresholds<T>& thresholds, cudaStream_t stream);

template <typename T>
void pairwise_iou(const AlignedBox<T>* boxes1, int64_t n, const AlignedBox<T>* boxes2, int64_t m, T* out,
                  cudaStream_t stream);

// Labels of one image's anchors from all pairs; of a batch's from windows; ranks of a batch's from windows. All of them
// end with pass 2.
template <typename T>
void match_dense(const AlignedBox<T>* anchors, int64_t num_anchors, const AlignedBox<T>* gts, int64_t num_gts,
                 const AlignedBox<T>* ignores, int64_t num_ignores, const Thresholds<T>& thresholds,
                 const Rescue<T>& rescue, const MatchArrays<T>& out, cudaStream_t stream);
template <typename T>
void match_windows(const Tables& tables, const void* device, int64_t num_anchors, int64_t num_tiles,
                   const BoxWindows<T>& windows, const Thresholds<T>& thresholds, const Rescue<T>& rescue,
                   const MatchArrays<T>& out, cudaStream_t stream);
template <typename T>
void match_ranks(const Tables& tables, const void* device, int64_t num_anchors, int64_t num_tiles,
                 const BoxWindows<T>& windows, const Thresholds<T>& thresholds, const Rescue<T>& rescue,
                 const MemberTable& members, const RankBits& bits, const SparseMatches<T>& out, cudaStream_t stream);

// From ids sorted with their anchors: where each group's members begin, and the number of each anchor in its group.
void number_members(const int64_t* sorted_ids, const int64_t* members, int64_t n, int64_t num_groups,
                    int64_t* group_offsets, int32_t* member_of, cudaStream_t stream);

// Marks the ranks of labels (B, n).
void mark_labels(const int8_t* labels, int64_t num_images, int64_t num_anchors, const MemberTable& members,
                 const RankBits& bits, cudaStream_t stream);

// Draws from marked ranks. gt: (B, n) of the positives, or null.
void draw(int64_t num_images, int64_t num_anchors, const MemberTable& members, const RankBits& bits,
          const DrawOptions& options, const int32_t* gt, const SampleOutput& out, cudaStream_t stream);

}  // namespace group_sampling::cuda
