// Sixteen lanes of float or double on whatever registers the translation unit is compiled for.
//
// One logical width for every instruction set keeps tiles, masks and the order of every sum the
// same everywhere; with contraction off (setup.py) all variants give the same bits, so a machine
// without AVX-512 still tests the width-16 logic. Only C headers and compiler intrinsics here: an
// inline function of the standard library, compiled for AVX, could be merged into portable code.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FUSEDRES_ISA
#error "compile with -DFUSEDRES_ISA=portable, avx2 or avx512"
#endif
#define FR_INLINE static inline __attribute__((always_inline))
#define FR_INLINE_LAMBDA __attribute__((always_inline))

namespace fusedres {
namespace FUSEDRES_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kNativeBytes = 64;
#elif defined(__AVX2__)
constexpr int kNativeBytes = 32;
#else
constexpr int kNativeBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct Native;
template <>
struct Native<float> {
  typedef float V __attribute__((vector_size(kNativeBytes)));
  typedef int32_t M __attribute__((vector_size(kNativeBytes)));
  typedef uint32_t U __attribute__((vector_size(kNativeBytes)));
};
template <>
struct Native<double> {
  typedef double V __attribute__((vector_size(kNativeBytes)));
  typedef int64_t M __attribute__((vector_size(kNativeBytes)));
};

template <typename S>
struct Mask {
  static constexpr int kParts = kLanes * static_cast<int>(sizeof(S)) / kNativeBytes;
  typename Native<S>::M v[kParts];
};

template <typename S>
struct Vec {
  using V = typename Native<S>::V;
  static constexpr int kParts = Mask<S>::kParts;
  static constexpr int kPartLanes = kLanes / kParts;
  V v[kParts];
  Vec() = default;
  __attribute__((always_inline)) explicit Vec(S s) {
    for (int i = 0; i < kParts; ++i) v[i] = s - V{};  // s - 0 is s, bit for bit
  }
};

template <typename S>
FR_INLINE Vec<S> operator+(Vec<S> a, Vec<S> b) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = a.v[i] + b.v[i];
  return a;
}
template <typename S>
FR_INLINE Vec<S> operator-(Vec<S> a, Vec<S> b) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = a.v[i] - b.v[i];
  return a;
}
template <typename S>
FR_INLINE Vec<S> operator*(Vec<S> a, Vec<S> b) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = a.v[i] * b.v[i];
  return a;
}
template <typename S>
FR_INLINE Vec<S> operator/(Vec<S> a, Vec<S> b) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = a.v[i] / b.v[i];
  return a;
}
template <typename S>
FR_INLINE Mask<S> operator<=(Vec<S> a, Vec<S> b) {
  Mask<S> m;
  for (int i = 0; i < Vec<S>::kParts; ++i) m.v[i] = a.v[i] <= b.v[i];
  return m;
}
template <typename S>
FR_INLINE Mask<S> operator>=(Vec<S> a, Vec<S> b) {
  Mask<S> m;
  for (int i = 0; i < Vec<S>::kParts; ++i) m.v[i] = a.v[i] >= b.v[i];
  return m;
}
template <typename S>
FR_INLINE Vec<S> select(Mask<S> m, Vec<S> a, Vec<S> b) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = m.v[i] ? a.v[i] : b.v[i];
  return a;
}

// Lane k of the result is true where bit k of `bits` is set.
template <typename S>
FR_INLINE Mask<S> mask_from_bits(uint32_t bits) {
  typename Native<S>::M lane;
  constexpr int part = Vec<S>::kPartLanes;
  for (int k = 0; k < part; ++k) lane[k] = int32_t(1) << k;
  Mask<S> m;
  for (int i = 0; i < Vec<S>::kParts; ++i) {
    m.v[i] = (lane & static_cast<int32_t>(bits >> (i * part))) != 0;
  }
  return m;
}

FR_INLINE uint32_t part_bits(Native<float>::M m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)m));
#else
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
#endif
}
FR_INLINE uint32_t part_bits(Native<double>::M m) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)m);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)m));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)m));
#else
  return static_cast<uint32_t>((m[0] & 1) | (m[1] & 2));
#endif
}
template <typename S>
FR_INLINE uint32_t mask_to_bits(Mask<S> m) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<S>::kParts; ++i) bits |= part_bits(m.v[i]) << (i * Vec<S>::kPartLanes);
  return bits;
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres

#include "simd_math.h"
