// Drawing the members of one group: its permutation walked in order, without walking all of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../options.h"
#include "../permutation.h"

namespace group_sampling {

// Members are independent of each other: a batch of them goes through the rounds side by side, one to a lane.
constexpr int64_t kBatch = 64;

// ranks[i] = rank_of(p, members[i]).
void ranks_of(const Permutation& p, const uint32_t* members, int64_t count, uint32_t* ranks);
// members[i] = member_at(p, first_rank + i); first_rank + count <= p.size.
void members_at(const Permutation& p, uint32_t first_rank, int64_t count, uint32_t* members);

// Draws one group of one image: positives, then negatives, each in draw order. Returns how many of each.
//
// positives: the group's positive members, ascending; num_negatives: how many negatives the group has.
// label_of(member): 1, 0 or -1.
// emit_positive(place, index) and emit_negative(place, member) are called for what is drawn; places are in [0, N).
template <typename LabelOf, typename EmitPositive, typename EmitNegative>
std::pair<int64_t, int64_t> draw_group(int64_t size, const DrawOptions& options, int64_t image, int64_t group,
                                       const std::vector<uint32_t>& positives, int64_t num_negatives,
                                       const LabelOf& label_of, const EmitPositive& emit_positive,
                                       const EmitNegative& emit_negative) {
  const auto num_positives = static_cast<int64_t>(positives.size());
  const int64_t num_pos = std::min(num_positives, options.max_positives);
  const int64_t num_neg = std::min(num_negatives, options.samples_per_group - num_pos);
  if (num_pos + num_neg == 0) return {0, 0};
  const Permutation p = make_permutation(static_cast<uint32_t>(size),
                                         draw_key(options.seed, options.iteration, options.first_image, image, group));

  // Positives may be so few that a walk would see most of the group before it met them. The first ones on the walk are
  // those of the lowest ranks, and ranks can be computed. The weights are measured: a rank and its selection cost about
  // two steps of the walk, finding a positive's index about eight.
  int64_t missing_pos = num_pos;
  if (num_pos > 0 && num_positives < num_pos * (size / num_positives / 2 + 4)) {
    std::vector<uint32_t> ranks(positives.size());
    ranks_of(p, positives.data(), num_positives, ranks.data());
    std::vector<uint64_t> order(positives.size());  // rank, then index
    for (int64_t i = 0; i < num_positives; ++i)
      order[i] = static_cast<uint64_t>(ranks[i]) << 32 | static_cast<uint64_t>(i);
    if (num_pos < num_positives) std::nth_element(order.begin(), order.begin() + num_pos, order.end());
    std::sort(order.begin(), order.begin() + num_pos);
    for (int64_t i = 0; i < num_pos; ++i) emit_positive(i, static_cast<int64_t>(order[i] & 0xFFFFFFFFu));
    missing_pos = 0;
  }

  int64_t missing_neg = num_neg;
  uint32_t members[kBatch];
  for (int64_t rank = 0; missing_pos + missing_neg > 0; rank += kBatch) {
    const int64_t count = std::min(kBatch, size - rank);
    members_at(p, static_cast<uint32_t>(rank), count, members);
    for (int64_t i = 0; i < count; ++i) {
      const int8_t label = label_of(members[i]);
      if (label == 1 && missing_pos > 0) {
        const auto found = std::lower_bound(positives.begin(), positives.end(), members[i]);
        emit_positive(num_pos - missing_pos--, found - positives.begin());
      } else if (label == 0 && missing_neg > 0) {
        emit_negative(num_pos + num_neg - missing_neg--, members[i]);
      }
    }
  }
  return {num_pos, num_neg};
}

}  // namespace group_sampling
