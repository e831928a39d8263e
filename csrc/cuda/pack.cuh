// Eight elements in a row: what a thread loads, computes and stores at once. It is 16 bytes of a
// 16-bit type, and always one byte of the mask.
#pragma once

#include "launch.cuh"

namespace fusedres {
namespace cuda {

constexpr int kPack = 8;

// Blocks a multiprocessor that __launch_bounds__ asks for; 0: ptxas decides. It spills some kernels
// for accesses of any width, on sm_100 and sm_120, to fit a third one.
template <typename T, bool kWide>
constexpr int kMinBlocks = kWide || sizeof(T) == 8 ? 0 : 2;

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using acc_of = typename Accumulator<T>::type;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void from_acc(float v, float* out) { *out = v; }
__device__ __forceinline__ void from_acc(double v, double* out) { *out = v; }
__device__ __forceinline__ void from_acc(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void from_acc(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}

template <typename S>
struct Pack {
  S v[kPack];
  __device__ __forceinline__ S& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const S& operator[](int i) const { return v[i]; }
};

// The widest access, in bytes, at which every given pointer (null ones aside) and every multiple of
// `step` bytes from it is aligned: 16, 8, 4, 2.
template <typename... Pointers>
int access_width(int64_t step, Pointers... pointers) {
  uint64_t bits = static_cast<uint64_t>(step) | 16u;
  ((bits |= reinterpret_cast<uint64_t>(pointers)), ...);
  return static_cast<int>(bits & (~bits + 1));
}

template <typename T, typename Word>
__device__ __forceinline__ void copy_words(const T* from, T* to) {
  if constexpr (sizeof(Word) >= sizeof(T)) {
    constexpr int kWords = kPack * static_cast<int>(sizeof(T) / sizeof(uint16_t)) /
                           static_cast<int>(sizeof(Word) / sizeof(uint16_t));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
    }
  }
}

// kWide: eight elements in 16-byte accesses. Otherwise `n` elements in accesses of `width` bytes,
// the last pack of a run one by one.
template <typename T, bool kWide>
__device__ __forceinline__ void copy_pack(const T* from, T* to, int width, int n) {
  if (kWide || (n == kPack && width == 16)) {
    copy_words<T, uint4>(from, to);
  } else if (n == kPack && width == 8) {
    copy_words<T, uint2>(from, to);
  } else if (n == kPack && width == 4) {
    copy_words<T, uint32_t>(from, to);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (i < n) to[i] = from[i];
    }
  }
}

// Elements beyond n read as zero.
template <typename T, bool kWide>
__device__ __forceinline__ Pack<acc_of<T>> load_pack(const T* from, int width, int n) {
  alignas(16) T raw[kPack];
  Pack<acc_of<T>> out;
  copy_pack<T, kWide>(from, raw, width, n);
#pragma unroll
  for (int i = 0; i < kPack; ++i) out[i] = kWide || i < n ? to_acc(raw[i]) : acc_of<T>(0);
  return out;
}

template <typename T, bool kWide>
__device__ __forceinline__ void store_pack(T* to, const Pack<acc_of<T>>& values, int width, int n) {
  alignas(16) T raw[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) from_acc(values[i], &raw[i]);
  if (kWide || (n == kPack && width == 16)) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof raw / sizeof(uint4)); ++i) {
      store_16_bytes(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(raw)[i]);
    }
  } else {
    copy_pack<T, false>(raw, to, width, n);
  }
}

// act on eight values; kAny: any activation, else identity or relu.
template <bool kAny, typename S>
__device__ __forceinline__ S activate(Act act, S z) {
  if (kAny) return act_forward(act, z);
  return act == Act::kRelu ? act_forward(Act::kRelu, z) : z;
}

inline bool needs_any(Act act) { return act != Act::kIdentity && act != Act::kRelu; }

// The mask's byte for eight pre-activations: bit i is set where the activation passes the gradient
// (fusedres/layout.py). Bits beyond n are zero.
template <typename S>
__device__ __forceinline__ uint8_t mask_byte(Act act, const Pack<S>& z, int n) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const bool closed = z[i] <= S(0) || (act == Act::kRelu6 && z[i] >= S(6));
    bits |= static_cast<unsigned>(!closed && i < n) << i;
  }
  return static_cast<uint8_t>(bits);
}

// dy * act'(z) by the mask.
template <typename S>
__device__ __forceinline__ S masked_gradient(Act act, unsigned bits, int i, S dy) {
  const S closed = act == Act::kLeakyRelu ? dy * S(kLeakySlope) : S(0);
  return bits >> i & 1u ? dy : closed;
}

// 64-bit quotients are slow on a GPU, and almost never needed.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if ((static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32 != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

}  // namespace cuda
}  // namespace fusedres
