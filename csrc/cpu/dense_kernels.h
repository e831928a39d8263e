// The dense block: layers read a growing slice of one buffer of channels, and their gradients are
// added into another. A channel's mean and variance are the same for every layer that reads it.
#pragma once

#include "isa.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_ISA {

constexpr int64_t kDenseRows = 8;  // rows per visit of the coefficients and accumulators

// Offset of run `i` in the buffer's slice; in a dense tensor of its channels it is i * cols.
FR_INLINE int64_t in_buffer(const DenseParams& a, int64_t i) {
  return a.planar ? i / a.channels * a.x_ld + i % a.channels * a.cols : i * a.x_ld;
}

// A coefficient for the lanes from column j on: its own for every channel of a row, or one for all
// pixels of a plane. Coefficient arrays are padded.
template <typename S>
FR_INLINE Vec<S> coefficient(const DenseParams& a, const void* p, int64_t run, int64_t j) {
  const S* values = static_cast<const S*>(p);
  return a.planar ? Vec<S>(values[run % a.channels]) : load(values + j);
}

// Calls full(first run, runs, column) and partial(..., lanes): blocks of 8 rows in NHWC, and planes
// one by one in NCHW.
template <typename Full, typename Partial>
FR_INLINE void for_dense_block(const DenseParams& a, int64_t begin, int64_t end, Full full,
                               Partial partial) {
  const int64_t most = a.planar ? 1 : kDenseRows;
  for (int64_t i = begin; i < end; i += most) {
    const int64_t runs = end - i < most ? end - i : most;
    int64_t j = 0;
    for (; j + kLanes <= a.cols; j += kLanes) full(i, runs, j);
    if (j < a.cols) partial(i, runs, j, static_cast<int>(a.cols - j));
  }
}

// A kernel that does `vectors` on every block of its items.
#define FR_DENSE_KERNEL(name, vectors)                                       \
  template <typename T>                                                      \
  void name(const DenseParams& params, int64_t begin, int64_t end) {         \
    const DenseParams a = params; /* a local copy: stores cannot alias it */ \
    for_dense_block(                                                         \
        a, begin, end,                                                       \
        [&](int64_t i, int64_t runs, int64_t j)                              \
            FR_INLINE_LAMBDA { vectors<T, false>(a, i, runs, j, kLanes); },  \
        [&](int64_t i, int64_t runs, int64_t j, int n)                       \
            FR_INLINE_LAMBDA { vectors<T, true>(a, i, runs, j, n); });       \
  }

template <typename T, bool kPartial>
FR_INLINE void dense_load_vectors(const DenseParams& a, int64_t run, int64_t runs, int64_t j,
                                  int n) {
  using S = acc_of<T>;
  const auto center = coefficient<S>(a, a.center, run, j);
  const auto scale = coefficient<S>(a, a.scale, run, j);
  const auto bias = coefficient<S>(a, a.bias, run, j);
  for (int64_t i = run; i < run + runs; ++i) {
    const auto x = load_n<kPartial>(static_cast<const T*>(a.x) + in_buffer(a, i) + j, n);
    const auto z = (x - center) * scale + bias;
    store_n<kPartial>(static_cast<T*>(a.h) + i * a.cols + j, act_forward(Act::kRelu, z), n);
  }
}

// Computes: h = relu((x - center) * scale + bias)
// Reads:    x, the first C channels of the buffer [N, *, H, W], once
// Writes:   h [N, C, H, W] once
// Traffic:  2*N*C*H*W*sizeof(scalar_t) bytes; eager moves 7 (concatenation, norm, ReLU)
// Split:    one item = one row of channels, or one plane; one rounding at the store
FR_DENSE_KERNEL(dense_load_kernel, dense_load_vectors)

template <typename S>
struct DenseSums {
  Vec<S> weight, bias;
};

// Adds u = dh * relu'(z) into dx, scaled, and returns the sums of u * (x - center) and u.
template <typename T, bool kPartial>
FR_INLINE DenseSums<acc_of<T>> dense_grad_vectors(const DenseParams& a, int64_t run, int64_t runs,
                                                  int64_t j, int n, DenseSums<acc_of<T>> sums) {
  using S = acc_of<T>;
  using V = Vec<S>;
  const V center = coefficient<S>(a, a.center, run, j);
  const V scale = coefficient<S>(a, a.scale, run, j);
  const V bias = coefficient<S>(a, a.bias, run, j);
  for (int64_t i = run; i < run + runs; ++i) {
    const int64_t at = in_buffer(a, i) + j;
    const V d = load_n<kPartial>(static_cast<const T*>(a.x) + at, n) - center;
    const V dh = load_n<kPartial>(static_cast<const T*>(a.dh) + i * a.cols + j, n);
    const V u = act_backward(Act::kRelu, d * scale + bias, dh);
    T* dx = static_cast<T*>(a.dx) + at;
    store_n<kPartial>(dx, load_n<kPartial>(dx, n) + scale * u, n);
    V product = u * d;
    if (kPartial) product = select(mask_from_bits<S>((1u << n) - 1u), product, V(0));
    sums.weight = sums.weight + product;
    sums.bias = sums.bias + u;
  }
  return sums;
}

template <typename T, bool kPartial>
FR_INLINE void dense_grad_rows(const DenseParams& a, acc_of<T>* dweight, acc_of<T>* dbias,
                               int64_t run, int64_t runs, int64_t j, int n) {
  DenseSums<acc_of<T>> s = {load(dweight + j), load(dbias + j)};
  s = dense_grad_vectors<T, kPartial>(a, run, runs, j, n, s);
  store(dweight + j, s.weight);
  store(dbias + j, s.bias);
}

template <typename T>
FR_INLINE void dense_grad_plane(const DenseParams& a, int64_t run, acc_of<T>* dweight,
                                acc_of<T>* dbias) {
  using S = acc_of<T>;
  double total_weight = 0, total_bias = 0;
  for (int64_t j = 0; j < a.cols;) {
    DenseSums<S> s = {Vec<S>(0), Vec<S>(0)};
    const int64_t end = j + kChain * kLanes < a.cols ? j + kChain * kLanes : a.cols;
    for (; j + kLanes <= end; j += kLanes) {
      s = dense_grad_vectors<T, false>(a, run, 1, j, kLanes, s);
    }
    if (j < end) s = dense_grad_vectors<T, true>(a, run, 1, j, static_cast<int>(end - j), s);
    j = end;
    total_weight += sum_lanes(s.weight);
    total_bias += sum_lanes(s.bias);
  }
  dweight[run % a.channels] = static_cast<S>(total_weight);
  dbias[run % a.channels] = static_cast<S>(total_bias);
}

// Computes: dx += scale * u with u = dh * relu'((x - center) * scale + bias), and the sums of
//           u * (x - center) and u. The rest of batch norm's derivative, q * (x - center) + r, is
//           the same for every layer that reads a channel but for factors: dense_finish adds it
//           once
// Reads:    dh [N, C, H, W], x and dx, the first C channels of their buffers, once each
// Writes:   dx once; partials [tiles, C] acc_t
// Traffic:  4*N*C*H*W*sizeof(scalar_t) bytes; eager moves 11 (ReLU, norm, slices, accumulation)
// Split:    one item = a tile of 128 rows of channels (chains of 128), or one image's planes
template <typename T>
void dense_grad_kernel(const DenseParams& params, int64_t begin, int64_t end) {
  using S = acc_of<T>;
  const DenseParams a = params;  // a local copy: stores cannot alias it
  for (int64_t tile = begin; tile < end; ++tile) {
    S* dweight = static_cast<S*>(a.partial_weight) + tile * a.partial_ld;
    S* dbias = static_cast<S*>(a.partial_bias) + tile * a.partial_ld;
    const int64_t run0 = tile * a.tile_runs;
    const int64_t run1 = run0 + a.tile_runs < a.runs ? run0 + a.tile_runs : a.runs;
    if (a.planar) {
      for (int64_t run = run0; run < run1; ++run) dense_grad_plane<T>(a, run, dweight, dbias);
      continue;
    }
    for_dense_block(
        a, run0, run1,
        [&](int64_t i, int64_t runs, int64_t j)
            FR_INLINE_LAMBDA { dense_grad_rows<T, false>(a, dweight, dbias, i, runs, j, kLanes); },
        [&](int64_t i, int64_t runs, int64_t j, int n)
            FR_INLINE_LAMBDA { dense_grad_rows<T, true>(a, dweight, dbias, i, runs, j, n); });
  }
}

template <typename T, bool kPartial>
FR_INLINE void dense_finish_vectors(const DenseParams& a, int64_t run, int64_t runs, int64_t j,
                                    int n) {
  using S = acc_of<T>;
  const auto center = coefficient<S>(a, a.center, run, j);
  const auto q = coefficient<S>(a, a.q, run, j);
  const auto r = coefficient<S>(a, a.r, run, j);
  for (int64_t i = run; i < run + runs; ++i) {
    const int64_t at = in_buffer(a, i) + j;
    const auto x = load_n<kPartial>(static_cast<const T*>(a.x) + at, n);
    const auto dx = load_n<kPartial>(static_cast<const T*>(a.dx_in) + at, n);
    store_n<kPartial>(static_cast<T*>(a.h) + i * a.cols + j, dx + (q * (x - center) + r), n);
  }
}

// Computes: out = dx + q * (x - center) + r for the channels that one layer wrote
// Reads:    C channels of x and dx in their buffers, once each
// Writes:   out [N, C, H, W] once
// Traffic:  3*N*C*H*W*sizeof(scalar_t) bytes
// Split:    one item = one row of channels, or one plane; one rounding at the store
FR_DENSE_KERNEL(dense_finish_kernel, dense_finish_vectors)

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
