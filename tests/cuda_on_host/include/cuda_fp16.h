// Stands in for CUDA's header of this name: storage and conversions.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  float v;
  if (magnitude >= 0x7c00) {  // Inf, NaN
    const uint32_t bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    std::memcpy(&v, &bits, sizeof v);
  } else {  // 2^-24 is the smallest subnormal; 2^112 moves the exponent
    const uint32_t bits = magnitude << 13;
    std::memcpy(&v, &bits, sizeof v);
    v *= 0x1p112f;
  }
  uint32_t out;
  std::memcpy(&out, &v, sizeof v);
  out |= sign;
  std::memcpy(&v, &out, sizeof v);
  return v;
}

// To nearest, ties to even.
inline __half __float2half_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof v);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  uint32_t out;
  if (bits > 0x7f800000) {
    out = 0x7fff;  // CUDA's NaN
  } else if (bits >= 0x477ff000) {
    out = 0x7c00;  // 65520 and more round to infinity
  } else if (bits < 0x38800000) {
    float magnitude;  // below 2^-14: adding 1/2 leaves multiples of 2^-24, rounded by the adder
    std::memcpy(&magnitude, &bits, sizeof v);
    magnitude += 0.5f;
    std::memcpy(&out, &magnitude, sizeof v);
    out -= 0x3f000000;
  } else {
    out = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(out | sign)};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
