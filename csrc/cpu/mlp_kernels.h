// The squeeze-excite MLP: small dense products over [N, C] and [R, C]. A weight row, or a column
// of vectors, is used for four images while it is in registers, so that stage-4 weights (several
// times the size of one image's activations) are not streamed once an image.
#pragma once

#include "isa.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_ISA {

constexpr int64_t kImages = 4;

template <typename S, int kCount>
FR_INLINE void dot_rows(const MatmulParams& p, int64_t o, int64_t n0) {
  const S* w = static_cast<const S*>(p.w) + o * p.k;
  const S* a = static_cast<const S*>(p.a) + n0 * p.k;
  double total[kCount] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kLanes * kChain) {
    const int64_t k1 = k0 + kLanes * kChain < p.k ? k0 + kLanes * kChain : p.k;
    Vec<S> acc[kCount];
    for (int i = 0; i < kCount; ++i) acc[i] = Vec<S>(0);
    int64_t k = k0;
    for (; k + kLanes <= k1; k += kLanes) {
      const Vec<S> row = load(w + k);
      for (int i = 0; i < kCount; ++i) acc[i] = acc[i] + row * load(a + i * p.k + k);
    }
    if (k < k1) {
      const int left = static_cast<int>(k1 - k);
      const Vec<S> row = load_n<true>(w + k, left);
      for (int i = 0; i < kCount; ++i) acc[i] = acc[i] + row * load_n<true>(a + i * p.k + k, left);
    }
    for (int i = 0; i < kCount; ++i) total[i] += sum_lanes(acc[i]);
  }
  const double bias =
      p.bias == nullptr ? 0.0 : static_cast<double>(static_cast<const S*>(p.bias)[o]);
  S* out = static_cast<S*>(p.out) + n0 * p.o + o;
  for (int i = 0; i < kCount; ++i) out[i * p.o] = static_cast<S>(total[i] + bias);
}

// Computes: out[n, o] = bias[o] + sum_k a[n, k] * w[o, k], for o in [begin, end)
// Reads:    w [O, K] once; a [N, K] once a row of w, from cache
// Writes:   out [N, O] once
// Traffic:  O*K*sizeof(acc_t) bytes from memory; a and out are a few KB
// Split:    a range of rows of w; 16 lanes, chains of 128, then double
template <typename S>
void matmul_nt_kernel(const MatmulParams& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    int64_t n = 0;
    for (; n + kImages <= p.n; n += kImages) dot_rows<S, kImages>(p, o, n);
    for (; n < p.n; ++n) dot_rows<S, 1>(p, o, n);
  }
}

// kTransposed: a is [K, N], else [N, K]. Sums over k for 16 columns of w and kCount rows of out.
template <typename S, int kCount, bool kTransposed, bool kPartial>
FR_INLINE void columns_block(const MatmulParams& p, int64_t n0, int64_t o0, int lanes) {
  const S* a = static_cast<const S*>(p.a);
  const S* w = static_cast<const S*>(p.w) + o0;
  double total[kCount][kLanes] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kChain) {
    const int64_t k1 = k0 + kChain < p.k ? k0 + kChain : p.k;
    Vec<S> acc[kCount];
    for (int i = 0; i < kCount; ++i) acc[i] = Vec<S>(0);
    for (int64_t k = k0; k < k1; ++k) {
      const Vec<S> row = load_n<kPartial>(w + k * p.o, lanes);
      for (int i = 0; i < kCount; ++i) {
        const S value = kTransposed ? a[k * p.n + n0 + i] : a[(n0 + i) * p.k + k];
        acc[i] = acc[i] + Vec<S>(value) * row;
      }
    }
    for (int i = 0; i < kCount; ++i) {
      S part[kLanes];
      store(part, acc[i]);
      for (int l = 0; l < kLanes; ++l) total[i][l] += static_cast<double>(part[l]);
    }
  }
  S* out = static_cast<S*>(p.out) + n0 * p.o + o0;
  for (int i = 0; i < kCount; ++i) {
    for (int l = 0; l < lanes; ++l) out[i * p.o + l] = static_cast<S>(total[i][l]);
  }
}

template <typename S, bool kTransposed>
FR_INLINE void columns_all_rows(const MatmulParams& p, int64_t o0, int64_t row0, int64_t row1) {
  const int lanes = static_cast<int>(p.o - o0 < kLanes ? p.o - o0 : kLanes);
  int64_t n = row0;
  if (lanes == kLanes) {
    for (; n + kImages <= row1; n += kImages) {
      columns_block<S, kImages, kTransposed, false>(p, n, o0, lanes);
    }
    for (; n < row1; ++n) columns_block<S, 1, kTransposed, false>(p, n, o0, lanes);
  } else {
    for (; n < row1; ++n) columns_block<S, 1, kTransposed, true>(p, n, o0, lanes);
  }
}

// Computes: out[n, o] = sum_k a[n, k] * w[k, o], for the blocks [begin, end) of 16 columns
// Reads:    w [K, O] once for every four images, from cache after the first
// Writes:   out [N, O] once
// Traffic:  K*O*sizeof(acc_t) bytes from memory
// Split:    a range of column blocks; 16 lanes, chains of 128, then double
template <typename S>
void matmul_nn_kernel(const MatmulParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) columns_all_rows<S, false>(p, b * kLanes, 0, p.n);
}

// Computes: out[i, o] = sum_k a[k, i] * w[k, o] (k = images), for the rows i in [begin, end)
// Reads:    a [K, N], w [K, O]: activations of the MLP, a few KB, from cache
// Writes:   out [N, O] once
// Traffic:  N*O*sizeof(acc_t) bytes to memory
// Split:    a range of rows of out; 16 lanes, chains of 128, then double
template <typename S>
void matmul_tn_kernel(const MatmulParams& p, int64_t begin, int64_t end) {
  for (int64_t o0 = 0; o0 < p.o; o0 += kLanes) columns_all_rows<S, true>(p, o0, begin, end);
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
