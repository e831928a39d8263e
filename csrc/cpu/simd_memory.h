// Loads and stores of sixteen elements between memory and Vec, converting float, double, bfloat16
// and half. Included by simd_math.h.
//
// A partial load or store touches exactly n elements: a tensor may end at the end of a page.
#pragma once

namespace fusedres {
namespace FUSEDRES_ISA {

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using acc_of = typename AccOf<T>::type;

// IEEE binary16 -> binary32, exact.
FR_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, or NaN made quiet as the hardware does
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13) | (magnitude > 0x7c00u ? 0x400000u : 0u);
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + ((127u - 15u) << 23);
  } else {  // zero or subnormal: magnitude * 2^-24
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// IEEE binary32 -> binary16, round to nearest even.
FR_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536 and above, infinity
    h = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal; a carry may run into the exponent, up to inf
    const uint32_t rebased = magnitude - ((127u - 15u) << 23);
    h = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the mantissa to 2^-24, and the adder rounds
    float a;
    __builtin_memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t sum;
    __builtin_memcpy(&sum, &a, 4);
    h = sum - 0x3f000000u;
  }
  return static_cast<uint16_t>(sign | h);
}

// Register by register: GCC copies a whole Vec in 16-byte pieces through the stack, and the wider
// loads that follow cannot be forwarded from them (8x slower on Zen 3).
template <typename S>
FR_INLINE Vec<S> load_native(const S* p) {
  Vec<S> r;
  for (int i = 0; i < Vec<S>::kParts; ++i) {
    __builtin_memcpy(&r.v[i], p + i * Vec<S>::kPartLanes, sizeof(r.v[i]));
  }
  return r;
}
template <typename S>
FR_INLINE void store_native(S* p, Vec<S> a) {
  for (int i = 0; i < Vec<S>::kParts; ++i) {
    __builtin_memcpy(p + i * Vec<S>::kPartLanes, &a.v[i], sizeof(a.v[i]));
  }
}
FR_INLINE Vec<float> load(const float* p) { return load_native(p); }
FR_INLINE Vec<double> load(const double* p) { return load_native(p); }
FR_INLINE void store(float* p, Vec<float> a) { store_native(p, a); }
FR_INLINE void store(double* p, Vec<double> a) { store_native(p, a); }

FR_INLINE Vec<float> load(const BFloat16* p) {
  Vec<float> r;
  using V = Vec<float>::V;
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  r.v[0] = (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
    r.v[i] = (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 2; ++i) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
    r.v[2 * i] = (V)_mm_unpacklo_epi16(_mm_setzero_si128(), h);
    r.v[2 * i + 1] = (V)_mm_unpackhi_epi16(_mm_setzero_si128(), h);
  }
#else
  typedef uint16_t Narrow __attribute__((vector_size(kNativeBytes / 2)));
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    Narrow h;
    __builtin_memcpy(&h, p + i * Vec<float>::kPartLanes, sizeof(h));
    r.v[i] = (V)(__builtin_convertvector(h, Native<float>::U) << 16);
  }
#endif
  return r;
}

// The bfloat16 in the upper half of each lane: round to nearest even, NaN stays NaN.
FR_INLINE Native<float>::U bfloat16_upper(Vec<float>::V f) {
  using U = Native<float>::U;
  const U u = (U)f;
  const U rounded = u + (((u >> 16) & 1u) + 0x7fffu);
  return (f == f) ? rounded : (u | 0x400000u);
}

FR_INLINE void store(BFloat16* p, Vec<float> a) {
#if defined(__AVX512F__)
  const __m512i u = _mm512_srli_epi32((__m512i)bfloat16_upper(a.v[0]), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(u));
#elif defined(__AVX2__)
  const __m256i lo = _mm256_srli_epi32((__m256i)bfloat16_upper(a.v[0]), 16);
  const __m256i hi = _mm256_srli_epi32((__m256i)bfloat16_upper(a.v[1]), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
#elif defined(__SSE2__)
  for (int i = 0; i < 2; ++i) {  // SSE2 packs signed words only, hence the arithmetic shift
    const __m128i lo = _mm_srai_epi32((__m128i)bfloat16_upper(a.v[2 * i]), 16);
    const __m128i hi = _mm_srai_epi32((__m128i)bfloat16_upper(a.v[2 * i + 1]), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm_packs_epi32(lo, hi));
  }
#else
  typedef uint16_t Narrow __attribute__((vector_size(kNativeBytes / 2)));
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    const Narrow h = __builtin_convertvector(bfloat16_upper(a.v[i]) >> 16, Narrow);
    __builtin_memcpy(p + i * Vec<float>::kPartLanes, &h, sizeof(h));
  }
#endif
}

FR_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  Vec<float> r;
  r.v[0] = (Vec<float>::V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return r;
#elif defined(__F16C__) && defined(__AVX2__)
  Vec<float> r;
  for (int i = 0; i < 2; ++i) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
    r.v[i] = (Vec<float>::V)_mm256_cvtph_ps(h);
  }
  return r;
#elif defined(__aarch64__)
  Vec<float> r;
  for (int i = 0; i < 4; ++i) {
    const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i);
    r.v[i] = (Vec<float>::V)vcvt_f32_f16(vreinterpret_f16_u16(h));
  }
  return r;
#else
  float lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = half_to_float(p[k].bits);
  return load(lanes);
#endif
}

FR_INLINE void store(Half* p, Vec<float> a) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)a.v[0], _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#elif defined(__F16C__) && defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m128i h = _mm256_cvtps_ph((__m256)a.v[i], _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), h);
  }
#elif defined(__aarch64__)
  for (int i = 0; i < 4; ++i) {
    const uint16x4_t h = vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)a.v[i]));
    vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, h);
  }
#else
  float lanes[kLanes];
  store(lanes, a);
  for (int k = 0; k < kLanes; ++k) p[k].bits = float_to_half(lanes[k]);
#endif
}

// Copies n <= 16 elements in pieces of fixed size; n repeats from row to row, so the branches
// predict.
template <typename T>
FR_INLINE void copy_elements(T* to, const T* from, int n) {
  int at = 0;
  if (n & 16) {
    __builtin_memcpy(to, from, 16 * sizeof(T));
    return;
  }
  if (n & 8) {
    __builtin_memcpy(to, from, 8 * sizeof(T));
    at = 8;
  }
  if (n & 4) {
    __builtin_memcpy(to + at, from + at, 4 * sizeof(T));
    at += 4;
  }
  if (n & 2) {
    __builtin_memcpy(to + at, from + at, 2 * sizeof(T));
    at += 2;
  }
  if (n & 1) __builtin_memcpy(to + at, from + at, sizeof(T));
}

// Out of line: rare, and inlined into every kernel they were half of the library's code.
template <typename T>
__attribute__((noinline)) Vec<acc_of<T>> load_partial(const T* p, int n) {
  alignas(64) T lanes[kLanes] = {};
  copy_elements(lanes, p, n);
  return load(lanes);
}
template <typename T>
__attribute__((noinline)) void store_partial(T* p, Vec<acc_of<T>> a, int n) {
  alignas(64) T lanes[kLanes];
  store(lanes, a);
  copy_elements(p, lanes, n);
}

template <bool kPartial, typename T>
FR_INLINE Vec<acc_of<T>> load_n(const T* p, int n) {  // lanes from n on are zero
  return kPartial ? load_partial(p, n) : load(p);
}
template <bool kPartial, typename T>
FR_INLINE void store_n(T* p, Vec<acc_of<T>> a, int n) {
  if (kPartial) {
    store_partial(p, a, n);
  } else {
    store(p, a);
  }
}

// Sixteen bits of a row mask; a partial vector owns ceil(n / 8) bytes and its spare bits are zero.
template <bool kPartial>
FR_INLINE uint32_t load_bits(const uint8_t* p, int n) {
  if (!kPartial || n > 8) return p[0] | static_cast<uint32_t>(p[1]) << 8;
  return p[0];
}
template <bool kPartial>
FR_INLINE void store_bits(uint8_t* p, uint32_t bits, int n) {
  if (kPartial) bits &= (1u << n) - 1u;
  p[0] = static_cast<uint8_t>(bits);
  if (!kPartial || n > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}

// Sixteen bytes as numbers.
template <typename S, bool kPartial>
FR_INLINE Vec<S> load_bytes(const uint8_t* p, int n) {
  constexpr int part = Vec<S>::kPartLanes;
  typedef uint8_t Bytes __attribute__((vector_size(part)));
  uint8_t bytes[kLanes] = {};
  if (kPartial) {
    copy_elements(bytes, p, n);
    p = bytes;
  }
  Vec<S> r;
  for (int i = 0; i < Vec<S>::kParts; ++i) {
    Bytes b;
    __builtin_memcpy(&b, p + i * part, part);
    r.v[i] = __builtin_convertvector(b, typename Vec<S>::V);
  }
  return r;
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
