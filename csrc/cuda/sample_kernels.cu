// Sampling. Every anchor that is not negative marks its rank in the draw order; the sample is then read off the marks
// in order, without sorting and without walking: place k is the k-th marked rank, and member_at(rank) is who it is.
#include "device_utils.h"

namespace group_sampling::cuda {
namespace {

constexpr int kDrawThreads = 512;
constexpr int kWordsPerThread = 4;

// Group of an anchor and its number in the group; group -1 for none.
struct Member {
  int64_t group;
  uint32_t number;
};

__device__ Member member_of(const MemberTable& table, int64_t anchor) {
  if (table.group_ids != nullptr) {
    const int64_t group = table.group_ids[anchor];
    if (group < 0 || group >= table.num_groups) return {-1, 0};
    return {group, static_cast<uint32_t>(table.member_of[anchor])};
  }
  const AnchorPlace place = locate_anchor(table.grid.lattices, anchor);
  const Lattice& lattice = table.grid.lattices[place.lattice];
  return {lattice.group, static_cast<uint32_t>(member_of_cell(lattice, place.cell))};
}

__device__ int64_t anchor_of(const MemberTable& table, int64_t group, uint32_t number) {
  if (table.group_ids != nullptr) return table.members[table.group_offsets[group] + number];
  int64_t lattice, cell;
  locate_member(table.grid.lattices, table.grid.num_lattices, group, number, &lattice, &cell);
  return anchor_of_cell(table.grid.lattices[lattice], cell);
}

__global__ void permutation_kernel(const int64_t* group_offsets, int64_t num_images, int64_t num_groups,
                                   const DrawOptions options, Permutation* out) {
  for (int64_t i = grid_index(); i < num_images * num_groups; i += grid_size()) {
    const int64_t image = i / num_groups, group = i % num_groups;
    const auto size = static_cast<uint32_t>(group_offsets[group + 1] - group_offsets[group]);
    out[i] = make_permutation(size, draw_key(options.seed, options.iteration, options.first_image, image, group));
  }
}

// Where the labels come from: a tensor, or what matching left.
struct TensorLabels {
  const int8_t* labels;
  int64_t num_anchors;

  __device__ int8_t label(int64_t image, int64_t anchor) const { return labels[image * num_anchors + anchor]; }
  __device__ int32_t gt(int64_t, int64_t) const { return -1; }
};

template <typename T>
struct MatchedLabels {
  MatchState<T> state;

  __device__ int8_t label(int64_t image, int64_t anchor) const { return match_of(state, image, anchor).label; }
  __device__ int32_t gt(int64_t image, int64_t anchor) const { return match_of(state, image, anchor).gt; }
};

__device__ int64_t first_word(const MemberTable& members, const RankBits& bits, int64_t image, int64_t group) {
  return image * bits.words + members.group_offsets[group] / 32 + group;
}

template <typename Labels>
__global__ void mark_kernel(const Labels source, int64_t num_images, int64_t num_anchors, const MemberTable members,
                            const RankBits bits) {
  for (int64_t i = grid_index(); i < num_images * num_anchors; i += grid_size()) {
    const int64_t image = i / num_anchors, anchor = i % num_anchors;
    const int8_t label = source.label(image, anchor);
    if (label == 0) continue;
    const Member member = member_of(members, anchor);
    if (member.group < 0) continue;
    const uint32_t rank = rank_of(bits.permutations[image * members.num_groups + member.group], member.number);
    const int64_t word = first_word(members, bits, image, member.group) + rank / 32;
    const uint32_t bit = 1u << (rank % 32);
    atomicOr(bits.not_negative + word, bit);
    if (label == 1) atomicOr(bits.positive + word, bit);
  }
}

// Calls emit(place, rank) for the first `limit` set bits of [0, size), by the whole block; `mask` flips the words.
// Returns how many there were, at most `limit`.
template <typename Emit>
__device__ int64_t first_set_bits(const uint32_t* words, uint32_t mask, int64_t size, int64_t limit, int32_t* scratch,
                                  const Emit& emit) {
  int64_t found = 0;
  const int64_t num_words = (size + 31) / 32, step = static_cast<int64_t>(blockDim.x) * kWordsPerThread;
  for (int64_t start = 0; start < num_words && found < limit; start += step) {
    const int64_t own = start + static_cast<int64_t>(threadIdx.x) * kWordsPerThread;
    uint32_t loaded[kWordsPerThread];
    int32_t count = 0;
    for (int k = 0; k < kWordsPerThread; ++k) {
      uint32_t word = own + k < num_words ? words[own + k] ^ mask : 0u;
      if (own + k == num_words - 1 && size % 32 != 0) word &= (1u << (size % 32)) - 1u;
      loaded[k] = word;
      count += __popc(word);
    }
    int32_t total = 0;
    int64_t place = found + block_exclusive_sum(count, scratch, &total);
    for (int k = 0; k < kWordsPerThread; ++k) {
      for (uint32_t word = loaded[k]; word != 0 && place < limit; word &= word - 1) {
        emit(place++, static_cast<uint32_t>((own + k) * 32 + __ffs(static_cast<int>(word)) - 1));
      }
    }
    found += total;
  }
  return found < limit ? found : limit;
}

// One block for each image and group.
template <typename Labels>
__global__ void draw_kernel(const Labels source, int64_t num_draws, const MemberTable members, const RankBits bits,
                            const DrawOptions options, const SampleOutput out) {
  __shared__ int32_t scratch[2 * kDrawThreads];
  for (int64_t draw = blockIdx.x; draw < num_draws; draw += gridDim.x) {
    const int64_t image = draw / members.num_groups, group = draw % members.num_groups;
    const Permutation& permutation = bits.permutations[draw];
    const int64_t size = members.group_offsets[group + 1] - members.group_offsets[group];
    const int64_t word = first_word(members, bits, image, group);
    const int64_t first_place = draw * options.samples_per_group;
    const auto write = [&](int64_t place, int64_t anchor, int8_t label, int64_t gt) {
      out.indices[first_place + place] = anchor;
      if (out.labels != nullptr) out.labels[first_place + place] = label;
      if (out.matched_gt != nullptr) out.matched_gt[first_place + place] = gt;
    };
    const int64_t num_pos = first_set_bits(
        bits.positive + word, 0u, size, options.max_positives, scratch, [&](int64_t place, uint32_t rank) {
          const int64_t anchor = anchor_of(members, group, member_at(permutation, rank));
          write(place, anchor, 1, source.gt(image, anchor));
        });
    const int64_t num_neg =
        first_set_bits(bits.not_negative + word, ~0u, size, options.samples_per_group - num_pos, scratch,
                       [&](int64_t place, uint32_t rank) {
                         write(num_pos + place, anchor_of(members, group, member_at(permutation, rank)), 0, -1);
                       });
    for (int64_t place = num_pos + num_neg + threadIdx.x; place < options.samples_per_group; place += blockDim.x) {
      write(place, -1, -1, -1);
    }
    if (threadIdx.x == 0) {
      out.num_pos[draw] = num_pos;
      out.num_neg[draw] = num_neg;
    }
  }
}

template <typename Labels>
void sample(const Labels& source, int64_t num_images, int64_t num_anchors, const MemberTable& members,
            const RankBits& bits, const DrawOptions& options, const SampleOutput& out, cudaStream_t stream) {
  const int64_t num_draws = num_images * members.num_groups;
  if (num_draws == 0) return;
  permutation_kernel<<<blocks_for(num_draws), kThreads, 0, stream>>>(members.group_offsets, num_images,
                                                                     members.num_groups, options, bits.permutations);
  if (num_anchors > 0) {
    mark_kernel<Labels>
        <<<blocks_for(num_images * num_anchors), kThreads, 0, stream>>>(source, num_images, num_anchors, members, bits);
  }
  draw_kernel<Labels>
      <<<blocks_for(num_draws, 1), kDrawThreads, 0, stream>>>(source, num_draws, members, bits, options, out);
}

// Number of each anchor among those of its group in the block, and how many the block has of each group.
__global__ void count_kernel(const int64_t* group_ids, int64_t n, int64_t num_groups, int32_t* counts,
                             int32_t* member_of) {
  __shared__ int64_t ids[kIdBlock];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t block = blockIdx.x; block * kIdBlock < n; block += gridDim.x) {
    const int64_t anchor = block * kIdBlock + thread;
    const int64_t id = anchor < n ? group_ids[anchor] : -1;
    ids[thread] = id;
    __syncthreads();
    int32_t before = 0;
    for (int i = 0; i < thread; ++i) before += ids[i] == id ? 1 : 0;
    if (id >= 0 && id < num_groups) {
      member_of[anchor] = before;
      atomicAdd(counts + block * num_groups + id, 1);
    }
    __syncthreads();
  }
}

// Turns a group's counts by block into the number of members before the block; one block of threads to a group.
// group_offsets[group + 1] receives the group's size.
__global__ void scan_kernel(int64_t num_blocks, int64_t num_groups, int32_t* counts, int64_t* group_offsets) {
  __shared__ int32_t scratch[2 * kDrawThreads];
  for (int64_t group = blockIdx.x; group < num_groups; group += gridDim.x) {
    int32_t before = 0;
    for (int64_t start = 0; start < num_blocks; start += blockDim.x) {
      const int64_t block = start + threadIdx.x;
      int32_t* count = counts + block * num_groups + group;
      int32_t total = 0;
      const int32_t sum = block_exclusive_sum(block < num_blocks ? *count : 0, scratch, &total);
      if (block < num_blocks) *count = before + sum;
      before += total;
    }
    if (threadIdx.x == 0) group_offsets[group + 1] = before;
  }
}

__global__ void offset_kernel(int64_t num_groups, int64_t* group_offsets) {
  group_offsets[0] = 0;
  for (int64_t group = 0; group < num_groups; ++group) group_offsets[group + 1] += group_offsets[group];
}

__global__ void scatter_kernel(const int64_t* group_ids, int64_t n, int64_t num_groups, const int32_t* counts,
                               int32_t* member_of, int64_t* members, const int64_t* group_offsets) {
  for (int64_t anchor = grid_index(); anchor < n; anchor += grid_size()) {
    const int64_t id = group_ids[anchor];
    if (id < 0 || id >= num_groups) continue;
    const int32_t number = member_of[anchor] + counts[anchor / kIdBlock * num_groups + id];
    member_of[anchor] = number;
    members[group_offsets[id] + number] = anchor;
  }
}

}  // namespace

void number_members(const int64_t* group_ids, int64_t n, int64_t num_groups, int32_t* counts, int32_t* member_of,
                    int64_t* members, int64_t* group_offsets, cudaStream_t stream) {
  if (num_groups == 0) return;
  const int64_t num_blocks = (n + kIdBlock - 1) / kIdBlock;
  if (n > 0) count_kernel<<<blocks_for(n), kIdBlock, 0, stream>>>(group_ids, n, num_groups, counts, member_of);
  scan_kernel<<<blocks_for(num_groups, 1), kDrawThreads, 0, stream>>>(num_blocks, num_groups, counts, group_offsets);
  offset_kernel<<<1, 1, 0, stream>>>(num_groups, group_offsets);
  if (n > 0) {
    scatter_kernel<<<blocks_for(n), kThreads, 0, stream>>>(group_ids, n, num_groups, counts, member_of, members,
                                                           group_offsets);
  }
}

void sample_labels(const int8_t* labels, int64_t num_images, int64_t num_anchors, const MemberTable& members,
                   const RankBits& bits, const DrawOptions& options, const SampleOutput& out, cudaStream_t stream) {
  sample(TensorLabels{labels, num_anchors}, num_images, num_anchors, members, bits, options, out, stream);
}

template <typename T>
void sample_matches(const MatchState<T>& state, const MemberTable& members, const RankBits& bits,
                    const DrawOptions& options, const SampleOutput& out, cudaStream_t stream) {
  sample(MatchedLabels<T>{state}, state.num_images, state.num_anchors, members, bits, options, out, stream);
}

template void sample_matches<float>(const MatchState<float>&, const MemberTable&, const RankBits&, const DrawOptions&,
                                    const SampleOutput&, cudaStream_t);
template void sample_matches<double>(const MatchState<double>&, const MemberTable&, const RankBits&, const DrawOptions&,
                                     const SampleOutput&, cudaStream_t);

}  // namespace group_sampling::cuda
