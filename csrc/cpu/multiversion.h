// GS_CPU_CLONES compiles a function once for the baseline and once for AVX2, and picks at load time. The bits stay the
// same: only the number of lanes differs, and -ffp-contract=off keeps fused multiply-adds out of both.
//
// Functions that carry it must take along what they call: GS_HOST_DEVICE and GS_ALWAYS_INLINE force that.
#pragma once

// Needs ifunc (glibc); sanitizers are not up yet when its resolvers run. Elsewhere the baseline serves, on aarch64 with
// its four-lane NEON.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute) && !defined(GS_SANITIZE)
#if __has_attribute(target_clones)
#define GS_CPU_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef GS_CPU_CLONES
#define GS_CPU_CLONES
#endif

// Before a loop whose arrays do not overlap: inlining loses sight of GS_RESTRICT.
#if defined(__GNUC__) && !defined(__clang__)
#define GS_NO_ALIAS _Pragma("GCC ivdep")
#else
#define GS_NO_ALIAS
#endif

#if defined(__GNUC__)
#define GS_ALWAYS_INLINE inline __attribute__((always_inline))
#define GS_RESTRICT __restrict__
#else
#define GS_ALWAYS_INLINE inline
#define GS_RESTRICT __restrict
#endif
