// The keyed pseudo-random permutation of [0, size) that the sampler walks, and its inverse.
//
// A generalised Feistel network on [0, a) x [0, b), the smallest near-square domain that holds [0, size). A value that
// leaves [0, size) is permuted again until it is back ("cycle walking"): still a permutation, and as a * b - size < a
// it happens rarely. Round functions are a 32-bit multiplicative hash of the other half, scaled to the half's range.
#pragma once

#include <cmath>
#include <cstdint>

#include "box_geometry.h"

namespace group_sampling {

constexpr int kRounds = 8;
constexpr int kRoundsSmall = 24;  // halves of a few values mix slowly: eight rounds leave pairs visibly dependent
constexpr uint32_t kSmallDomain = 1024;

struct Permutation {
  uint32_t size, a, b;
  int rounds;
  uint32_t keys[kRoundsSmall];
};

// SplitMix64's finaliser.
GS_HOST_DEVICE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Key of one draw; first_image + image is the global number of the image.
GS_HOST_DEVICE uint64_t draw_key(int64_t seed, int64_t iteration, int64_t first_image, int64_t image, int64_t group) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15ull;
  uint64_t key = mix64(static_cast<uint64_t>(seed) + golden);
  key = mix64((key ^ static_cast<uint64_t>(iteration)) + golden);
  key = mix64((key ^ (static_cast<uint64_t>(first_image) + static_cast<uint64_t>(image))) + golden);
  return mix64((key ^ static_cast<uint64_t>(group)) + golden);
}

// size < 2^31.
GS_HOST_DEVICE Permutation make_permutation(uint32_t size, uint64_t key) {
  Permutation p;
  p.size = size;
  // Smallest a with a * a >= size; the correction makes it independent of how sqrt rounds.
  p.a = static_cast<uint32_t>(std::sqrt(static_cast<double>(size)));
  while (static_cast<uint64_t>(p.a) * p.a < size) ++p.a;
  while (p.a > 1 && static_cast<uint64_t>(p.a - 1) * (p.a - 1) >= size) --p.a;
  p.b = p.a == 0 ? 0 : (size + p.a - 1) / p.a;
  p.rounds = size < kSmallDomain ? kRoundsSmall : kRounds;
  for (int r = 0; r < p.rounds; ++r) {
    p.keys[r] = static_cast<uint32_t>(mix64(key + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(r + 1)) >> 32);
  }
  return p;
}

// Round function: pseudo-random value in [0, range).
GS_HOST_DEVICE uint32_t scaled_hash(uint32_t x, uint32_t key, uint32_t range) {
  x = (x ^ key) * 0x9E3779B1u;
  x = (x ^ (x >> 15)) * 0x85EBCA77u;
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * range) >> 32);
}

GS_HOST_DEVICE uint32_t add_modulo(uint32_t x, uint32_t y, uint32_t modulus) {
  const uint32_t sum = x + y;
  return sum >= modulus ? sum - modulus : sum;
}

GS_HOST_DEVICE uint32_t subtract_modulo(uint32_t x, uint32_t y, uint32_t modulus) {
  return x >= y ? x - y : x + modulus - y;
}

// One pass of the network over [0, a * b); the result may lie outside [0, size).
GS_HOST_DEVICE uint32_t encrypt_once(const Permutation& p, uint32_t x) {
  uint32_t left = x / p.b, right = x % p.b;
  for (int r = 0; r < p.rounds; r += 2) {
    left = add_modulo(left, scaled_hash(right, p.keys[r], p.a), p.a);
    right = add_modulo(right, scaled_hash(left, p.keys[r + 1], p.b), p.b);
  }
  return left * p.b + right;
}

GS_HOST_DEVICE uint32_t decrypt_once(const Permutation& p, uint32_t x) {
  uint32_t left = x / p.b, right = x % p.b;
  for (int r = p.rounds - 2; r >= 0; r -= 2) {
    right = subtract_modulo(right, scaled_hash(left, p.keys[r + 1], p.b), p.b);
    left = subtract_modulo(left, scaled_hash(right, p.keys[r], p.a), p.a);
  }
  return left * p.b + right;
}

// Member at place `rank` of the draw order, and its inverse. Arguments in [0, size).
GS_HOST_DEVICE uint32_t member_at(const Permutation& p, uint32_t rank) {
  do {
    rank = encrypt_once(p, rank);
  } while (rank >= p.size);
  return rank;
}

GS_HOST_DEVICE uint32_t rank_of(const Permutation& p, uint32_t member) {
  do {
    member = decrypt_once(p, member);
  } while (member >= p.size);
  return member;
}

}  // namespace group_sampling
