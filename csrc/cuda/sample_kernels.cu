// Sampling. Every anchor that is not negative marks its rank in the draw order; the sample is then read off the marks
// in order, without sorting and without walking: place k is the k-th marked rank, and member_at(rank) is who it is.
#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

constexpr int kMaxDrawThreads = 512;

__device__ int64_t anchor_of(const MemberTable& table, int64_t group, uint32_t member) {
  if (table.group_ids != nullptr) return table.members[table.group_offsets[group] + member];
  int64_t lattice, cell;
  locate_member(table.lattices, table.num_lattices, group, member, &lattice, &cell);
  return anchor_of_cell(table.lattices[lattice], cell);
}

__global__ void mark_kernel(const int8_t* labels, int64_t num_images, int64_t num_anchors, const MemberTable members,
                            const RankBits bits) {
  for (int64_t image = blockIdx.y; image < num_images; image += gridDim.y) {
    for (int64_t anchor = grid_index(); anchor < num_anchors; anchor += grid_size()) {
      const int8_t label = labels[image * num_anchors + anchor];
      if (label == 0) continue;
      int64_t group, member;
      if (members.group_ids != nullptr) {
        group = members.group_ids[anchor];
        if (group < 0 || group >= members.num_groups) continue;
        member = members.member_of[anchor];
      } else {
        const AnchorPlace place = locate_anchor(members.lattices, anchor);
        group = members.lattices[place.lattice].group;
        member = member_of_cell(members.lattices[place.lattice], place.cell);
      }
      const RankWriter writer(bits, members, image, group);
      const uint32_t rank = rank_of(*writer.permutation, static_cast<uint32_t>(member));
      writer.mark(rank);
      if (label == 1) writer.mark_positive(rank);
    }
  }
}

// Words that a draw has to look at: those whose summary bit is set, after `flip`.
struct BitSet {
  const uint32_t* words;
  const uint32_t* summary;
  uint32_t flip;
  int64_t size;  // bits

  // Word `index` of an array of `count` bits; bits past the last are 0.
  __device__ static uint32_t word_of(const uint32_t* array, uint32_t flip, int64_t count, int64_t index) {
    const int64_t left = count - index * 32;
    if (left <= 0) return 0;
    const uint32_t word = array[index] ^ flip;
    return left < 32 ? word & ((1u << left) - 1u) : word;
  }
  __device__ uint32_t word(int64_t index) const { return word_of(words, flip, size, index); }
  __device__ uint32_t summary_word(int64_t index) const { return word_of(summary, flip, (size + 31) / 32, index); }
  __device__ int64_t num_summary_words() const { return ((size + 31) / 32 + 31) / 32; }
};

template <int kDrawThreads>
struct DrawScratch {
  int32_t sums[kDrawThreads / kWarp];
  int32_t words_before[kDrawThreads];  // set summary bits before each thread's word
  uint32_t summaries[kDrawThreads];
  int32_t bits_before[kDrawThreads];  // set bits before each thread's word
  uint32_t words[kDrawThreads];
  int64_t indices[kDrawThreads];  // of the words
};

// Calls emit(place, rank) for the first `limit` set bits, by the whole block. Every place is found by one thread on its
// own: which word of the block has it, and which bit of the word. Returns how many there were, at most `limit`.
template <int kDrawThreads, typename Emit>
__device__ int64_t first_set_bits(const BitSet& set, int64_t limit, DrawScratch<kDrawThreads>& scratch,
                                  const Emit& emit) {
  constexpr int kDrawWarps = kDrawThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t found = 0;
  for (int64_t start = 0; start < set.num_summary_words() && found < limit; start += kDrawThreads) {
    const uint32_t summary = set.summary_word(start + thread);
    int32_t num_words = 0;
    scratch.words_before[thread] = block_exclusive_sum<kDrawWarps>(__popc(summary), scratch.sums, &num_words);
    scratch.summaries[thread] = summary;
    __syncthreads();
    for (int32_t first = 0; first < num_words && found < limit; first += kDrawThreads) {
      uint32_t word = 0;
      int64_t index = 0;
      if (first + thread < num_words) {
        const int64_t owner = last_not_above<int32_t>(scratch.words_before, kDrawThreads, first + thread);
        index =
            (start + owner) * 32 + nth_set_bit(scratch.summaries[owner], first + thread - scratch.words_before[owner]);
        word = set.word(index);
      }
      int32_t num_bits = 0;
      scratch.bits_before[thread] = block_exclusive_sum<kDrawWarps>(__popc(word), scratch.sums, &num_bits);
      scratch.words[thread] = word;
      scratch.indices[thread] = index;
      __syncthreads();
      const int64_t wanted = limit - found < num_bits ? limit - found : num_bits;
      for (int32_t place = thread; place < wanted; place += kDrawThreads) {
        const int64_t owner = last_not_above<int32_t>(scratch.bits_before, kDrawThreads, place);
        const int bit = nth_set_bit(scratch.words[owner], place - scratch.bits_before[owner]);
        emit(found + place, static_cast<uint32_t>(scratch.indices[owner] * 32 + bit));
      }
      found += wanted;
      __syncthreads();  // scratch is written again
    }
  }
  return found;
}

// One block for each image and group.
template <int kDrawThreads>
__global__ void __launch_bounds__(kDrawThreads, 1)
    draw_kernel(int64_t num_draws, int64_t num_anchors, const MemberTable members, const RankBits bits,
                const DrawOptions options, const int32_t* gts, const SampleOutput out) {
  __shared__ DrawScratch<kDrawThreads> scratch;
  __shared__ Permutation permutation;
  for (int64_t draw = blockIdx.x; draw < num_draws; draw += gridDim.x) {
    const int64_t image = draw / members.num_groups, group = draw % members.num_groups;
    constexpr int kKeyWords = sizeof(Permutation) / sizeof(uint32_t);
    for (int i = static_cast<int>(threadIdx.x); i < kKeyWords; i += kDrawThreads) {
      reinterpret_cast<uint32_t*>(&permutation)[i] = reinterpret_cast<const uint32_t*>(bits.permutations + draw)[i];
    }
    __syncthreads();
    const int64_t before = members.group_offsets[group], size = permutation.size;
    const int64_t word = image * bits.words + first_word(before, group);
    const int64_t summary = image * bits.summary_words + first_summary(before, group);
    const int64_t first_place = draw * options.samples_per_group;
    const auto write = [&](int64_t place, int64_t anchor, int8_t label, int64_t gt) {
      out.indices[first_place + place] = anchor;
      if (out.labels != nullptr) out.labels[first_place + place] = label;
      if (out.matched_gt != nullptr) out.matched_gt[first_place + place] = gt;
    };
    const int64_t num_pos =
        first_set_bits(BitSet{bits.positive + word, bits.any_positive + summary, 0u, size}, options.max_positives,
                       scratch, [&](int64_t place, uint32_t rank) {
                         const int64_t anchor = anchor_of(members, group, member_at(permutation, rank));
                         write(place, anchor, 1, gts != nullptr ? gts[image * num_anchors + anchor] : -1);
                       });
    const int64_t num_neg =
        first_set_bits(BitSet{bits.not_negative + word, bits.no_negative + summary, kAllLanes, size},
                       options.samples_per_group - num_pos, scratch, [&](int64_t place, uint32_t rank) {
                         write(num_pos + place, anchor_of(members, group, member_at(permutation, rank)), 0, -1);
                       });
    for (int64_t place = num_pos + num_neg + threadIdx.x; place < options.samples_per_group; place += kDrawThreads) {
      write(place, -1, -1, -1);
    }
    if (threadIdx.x == 0) {
      out.num_pos[draw] = num_pos;
      out.num_neg[draw] = num_neg;
    }
    __syncthreads();  // the permutation is written again
  }
}

// Number of ids below `id` among n sorted ones.
__device__ int64_t lower_bound(const int64_t* sorted_ids, int64_t n, int64_t id) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted_ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void offset_kernel(const int64_t* sorted_ids, int64_t n, int64_t num_groups, int64_t* group_offsets) {
  for (int64_t group = grid_index(); group <= num_groups; group += grid_size()) {
    group_offsets[group] = lower_bound(sorted_ids, n, group);
  }
}

__global__ void number_kernel(const int64_t* sorted_ids, const int64_t* members, int64_t n, int64_t num_groups,
                              const int64_t* group_offsets, int32_t* member_of) {
  for (int64_t i = grid_index(); i < n; i += grid_size()) {
    const int64_t id = sorted_ids[i];
    if (id >= 0 && id < num_groups) member_of[members[i]] = static_cast<int32_t>(i - group_offsets[id]);
  }
}

}  // namespace

void number_members(const int64_t* sorted_ids, const int64_t* members, int64_t n, int64_t num_groups,
                    int64_t* group_offsets, int32_t* member_of, cudaStream_t stream) {
  offset_kernel<<<blocks_for(num_groups + 1), kThreads, 0, stream>>>(sorted_ids, n, num_groups, group_offsets);
  if (n == 0) return;
  number_kernel<<<blocks_for(n), kThreads, 0, stream>>>(sorted_ids, members, n, num_groups, group_offsets, member_of);
}

void mark_labels(const int8_t* labels, int64_t num_images, int64_t num_anchors, const MemberTable& members,
                 const RankBits& bits, cudaStream_t stream) {
  if (num_images == 0 || num_anchors == 0 || members.num_groups == 0) return;
  constexpr int64_t kMaxRows = 65535;  // of a grid of blocks
  const dim3 blocks(blocks_for(num_anchors), static_cast<unsigned int>(num_images < kMaxRows ? num_images : kMaxRows));
  mark_kernel<<<blocks, kThreads, 0, stream>>>(labels, num_images, num_anchors, members, bits);
}

void draw(int64_t num_images, int64_t num_anchors, const MemberTable& members, const RankBits& bits,
          const DrawOptions& options, const int32_t* gts, const SampleOutput& out, cudaStream_t stream) {
  const int64_t num_draws = num_images * members.num_groups;
  if (num_draws == 0) return;
  const unsigned int blocks = blocks_for(num_draws, 1);
  // As many threads as there are places to find, so that none of them is idle for long.
  if (options.samples_per_group <= 128) {
    draw_kernel<128><<<blocks, 128, 0, stream>>>(num_draws, num_anchors, members, bits, options, gts, out);
  } else {
    draw_kernel<kMaxDrawThreads>
        <<<blocks, kMaxDrawThreads, 0, stream>>>(num_draws, num_anchors, members, bits, options, gts, out);
  }
}

}  // namespace group_sampling::cuda
