#include "draw.h"

#include "multiversion.h"

namespace group_sampling {
namespace {

GS_CPU_CLONES void encrypt_batch(const Permutation& p, uint32_t* GS_RESTRICT left, uint32_t* GS_RESTRICT right) {
  const uint32_t a = p.a, b = p.b;
  for (int r = 0; r < p.rounds; r += 2) {
    const uint32_t key_left = p.keys[r], key_right = p.keys[r + 1];
    for (int64_t i = 0; i < kBatch; ++i) {
      left[i] = add_modulo(left[i], scaled_hash(right[i], key_left, a), a);
      right[i] = add_modulo(right[i], scaled_hash(left[i], key_right, b), b);
    }
  }
}

GS_CPU_CLONES void decrypt_batch(const Permutation& p, uint32_t* GS_RESTRICT left, uint32_t* GS_RESTRICT right) {
  const uint32_t a = p.a, b = p.b;
  for (int r = p.rounds - 2; r >= 0; r -= 2) {
    const uint32_t key_left = p.keys[r], key_right = p.keys[r + 1];
    for (int64_t i = 0; i < kBatch; ++i) {
      right[i] = subtract_modulo(right[i], scaled_hash(left[i], key_right, b), b);
      left[i] = subtract_modulo(left[i], scaled_hash(right[i], key_left, a), a);
    }
  }
}

}  // namespace

void ranks_of(const Permutation& p, const uint32_t* members, int64_t count, uint32_t* ranks) {
  uint32_t left[kBatch] = {}, right[kBatch] = {};
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t n = std::min(kBatch, count - first);
    for (int64_t i = 0; i < n; ++i) {
      left[i] = members[first + i] / p.b;
      right[i] = members[first + i] % p.b;
    }
    decrypt_batch(p, left, right);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t rank = left[i] * p.b + right[i];
      ranks[first + i] = rank < p.size ? rank : rank_of(p, rank);
    }
  }
}

void members_at(const Permutation& p, uint32_t first_rank, int64_t count, uint32_t* members) {
  uint32_t left[kBatch] = {}, right[kBatch] = {};
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t n = std::min(kBatch, count - first);
    const auto rank = static_cast<uint32_t>(first_rank + first);
    uint32_t l = rank / p.b, r = rank % p.b;
    for (int64_t i = 0; i < n; ++i) {
      left[i] = l;
      right[i] = r;
      if (++r == p.b) r = 0, ++l;
    }
    encrypt_batch(p, left, right);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t member = left[i] * p.b + right[i];
      members[first + i] = member < p.size ? member : member_at(p, member);
    }
  }
}

}  // namespace group_sampling
