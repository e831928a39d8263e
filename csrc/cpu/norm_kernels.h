// Residual addition and the norm behind it: each row is one token, normalised over its columns.
#pragma once

#include "isa.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_ISA {

// The sum of term(column, lanes, partial) over a row: chains of kChain in acc_t, then double.
template <typename S, typename Full, typename Partial>
FR_INLINE double sum_row(int64_t cols, Full full, Partial partial) {
  double total = 0;
  int64_t j = 0;
  while (j < cols) {
    Vec<S> sum(0);
    const int64_t end = j + kChain * kLanes < cols ? j + kChain * kLanes : cols;
    for (; j + kLanes <= end; j += kLanes) sum = sum + full(j);
    if (j < end) {
      const int n = static_cast<int>(end - j);
      sum = sum + select(mask_from_bits<S>((1u << n) - 1u), partial(j, n), Vec<S>(0));
      j = end;
    }
    total += sum_lanes(sum);
  }
  return total;
}

template <typename Full, typename Partial>
FR_INLINE void for_row(int64_t cols, Full full, Partial partial) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) full(j);
  if (j < cols) partial(j, static_cast<int>(cols - j));
}

// What dropout and drop path multiply a branch by: zero, or the inverse of what survives.
template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> noise(const NormParams& a, int64_t row, int64_t i, int n) {
  using S = acc_of<T>;
  S scale = static_cast<S>(a.scale);
  if (a.row_scale != nullptr) scale *= static_cast<const S*>(a.row_scale)[row];
  if (a.keep == nullptr) return Vec<S>(scale);
  return Vec<S>(scale) * load_bytes<S, kPartial>(a.keep + i, n);
}

template <typename T, bool kPartial>
FR_INLINE void add_vector(const NormParams& a, int64_t row, int64_t i, int n) {
  const auto branch = load_n<kPartial>(static_cast<const T*>(a.branch) + i, n);
  const auto shortcut = load_n<kPartial>(static_cast<const T*>(a.shortcut) + i, n);
  store_n<kPartial>(static_cast<T*>(a.sum) + i,
                    shortcut + branch * noise<T, kPartial>(a, row, i, n), n);
}

template <typename T>
FR_INLINE void normalise_row(const NormParams& a, int64_t row, const T* x, T* y) {
  using S = acc_of<T>;
  using V = Vec<S>;
  S mean = 0;
  if (a.norm == Norm::kLayer) {
    mean = static_cast<S>(sum_row<S>(
                              a.cols, [&](int64_t j) FR_INLINE_LAMBDA { return load(x + j); },
                              [&](int64_t j, int n)
                                  FR_INLINE_LAMBDA { return load_n<true>(x + j, n); }) /
                          static_cast<double>(a.cols));
    static_cast<S*>(a.mean)[row] = mean;
  }
  const V center(mean);
  const double squares = sum_row<S>(
      a.cols,
      [&](int64_t j) FR_INLINE_LAMBDA {
        const V d = load(x + j) - center;
        return d * d;
      },
      [&](int64_t j, int n) FR_INLINE_LAMBDA {
        const V d = load_n<true>(x + j, n) - center;
        return d * d;
      });
  const S rstd = bn_rstd(static_cast<S>(squares / static_cast<double>(a.cols)), a.eps);
  static_cast<S*>(a.rstd)[row] = rstd;
  const V scale(rstd);
  const S* weight = static_cast<const S*>(a.weight);
  const S* bias = static_cast<const S*>(a.bias);
  for_row(
      a.cols,
      [&](int64_t j) FR_INLINE_LAMBDA {
        store(y + j, (load(x + j) - center) * scale * load(weight + j) + load(bias + j));
      },
      [&](int64_t j, int n) FR_INLINE_LAMBDA {
        const V xhat = (load_n<true>(x + j, n) - center) * scale;
        store_n<true>(y + j, xhat * load(weight + j) + load(bias + j), n);
      });
}

// Computes: sum = shortcut + scale * row_scale[m] * keep * branch; y = norm(sum) * weight + bias
// Reads:    branch, shortcut [M, D] once each, keep [M, D] bytes; the row again from L1
// Writes:   sum, y [M, D] once each (y only where there is a norm); mean, rstd [M]
// Traffic:  4*M*D*sizeof(scalar_t) (+ M*D) bytes; eager moves 5, or 9 with dropout
// Split:    one item = one row; 16 lanes, chains of 128, then double; statistics are taken of the
//           stored sum, mean first
template <typename T>
void add_norm_fwd_kernel(const NormParams& params, int64_t begin, int64_t end) {
  const NormParams a = params;  // a local copy: stores cannot alias it
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * a.cols;
    for_row(
        a.cols,
        [&](int64_t j) FR_INLINE_LAMBDA { add_vector<T, false>(a, row, start + j, kLanes); },
        [&](int64_t j, int n) FR_INLINE_LAMBDA { add_vector<T, true>(a, row, start + j, n); });
    if (a.norm == Norm::kNone) continue;
    normalise_row<T>(a, row, static_cast<const T*>(a.sum) + start, static_cast<T*>(a.y) + start);
  }
}

// A row of the backward: what of it the two passes share.
template <typename S>
struct NormRow {
  int64_t row, start;
  Vec<S> center, rstd, mean_g, mean_gx;
};

template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> xhat_of(const NormParams& a, const NormRow<acc_of<T>>& r, int64_t j,
                                 int n) {
  return (load_n<kPartial>(static_cast<const T*>(a.x) + r.start + j, n) - r.center) * r.rstd;
}

template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> weighted_dy(const NormParams& a, const NormRow<acc_of<T>>& r, int64_t j,
                                     int n) {
  using S = acc_of<T>;
  return load_n<kPartial>(static_cast<const T*>(a.dy) + r.start + j, n) *
         load(static_cast<const S*>(a.weight) + j);
}

// Adds a row's share to the gradients of weight and bias, whose rows are padded.
template <typename T, bool kPartial>
FR_INLINE void add_parameter_gradients(const NormParams& a, const NormRow<acc_of<T>>& r,
                                       acc_of<T>* dweight, acc_of<T>* dbias, int64_t j, int n) {
  const auto dy = load_n<kPartial>(static_cast<const T*>(a.dy) + r.start + j, n);
  store(dweight + j, load(dweight + j) + dy * xhat_of<T, kPartial>(a, r, j, n));
  store(dbias + j, load(dbias + j) + dy);
}

template <typename T, bool kPartial>
FR_INLINE void norm_bwd_vector(const NormParams& a, const NormRow<acc_of<T>>& r, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  const int64_t i = r.start + j;
  V d(0);
  if (a.dy != nullptr) {
    const V g = weighted_dy<T, kPartial>(a, r, j, n);
    d = r.rstd * (g - r.mean_g - xhat_of<T, kPartial>(a, r, j, n) * r.mean_gx);
  }
  if (a.dsum != nullptr) d = d + load_n<kPartial>(static_cast<const T*>(a.dsum) + i, n);
  store_n<kPartial>(static_cast<T*>(a.dshortcut) + i, d, n);
  if (a.dbranch != nullptr) {
    store_n<kPartial>(static_cast<T*>(a.dbranch) + i, d * noise<T, kPartial>(a, r.row, i, n), n);
  }
}

template <typename T>
FR_INLINE void norm_row_sums(const NormParams& a, NormRow<acc_of<T>>& r, acc_of<T>* dweight,
                             acc_of<T>* dbias) {
  using S = acc_of<T>;
  using V = Vec<S>;
  const double inverse = 1.0 / static_cast<double>(a.cols);
  const double sum_gx = sum_row<S>(
      a.cols,
      [&](int64_t j) FR_INLINE_LAMBDA {
        add_parameter_gradients<T, false>(a, r, dweight, dbias, j, kLanes);
        return weighted_dy<T, false>(a, r, j, kLanes) * xhat_of<T, false>(a, r, j, kLanes);
      },
      [&](int64_t j, int n) FR_INLINE_LAMBDA {
        add_parameter_gradients<T, true>(a, r, dweight, dbias, j, n);
        return weighted_dy<T, true>(a, r, j, n) * xhat_of<T, true>(a, r, j, n);
      });
  r.mean_gx = V(static_cast<S>(sum_gx * inverse));
  if (a.norm != Norm::kLayer) return;
  const double sum_g = sum_row<S>(
      a.cols, [&](int64_t j) FR_INLINE_LAMBDA { return weighted_dy<T, false>(a, r, j, kLanes); },
      [&](int64_t j, int n) FR_INLINE_LAMBDA { return weighted_dy<T, true>(a, r, j, n); });
  r.mean_g = V(static_cast<S>(sum_g * inverse));
}

// Computes: d = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum with g = dy * weight (RMS norm
//           has no mean(g)); dshortcut = d, dbranch = scale * row_scale[m] * keep * d; sums of
//           dy * xhat and dy over the rows of a tile
// Reads:    dy, x, dsum [M, D] once each, keep [M, D] bytes; the row again from L1
// Writes:   dshortcut [M, D], dbranch [M, D] where it differs; partials [tiles, D] acc_t
// Traffic:  (4 + has_noise)*M*D*sizeof(scalar_t) (+ M*D) bytes; eager moves 8, or 11 with dropout
// Split:    one item = a tile of at most 128 rows; 16 lanes, chains of 128, then double
template <typename T>
void add_norm_bwd_kernel(const NormParams& params, int64_t begin, int64_t end) {
  using S = acc_of<T>;
  using V = Vec<S>;
  const NormParams a = params;  // a local copy: stores cannot alias it
  for (int64_t tile = begin; tile < end; ++tile) {
    S* dweight = static_cast<S*>(a.partial_weight) + tile * a.partial_ld;
    S* dbias = static_cast<S*>(a.partial_bias) + tile * a.partial_ld;
    const int64_t row0 = tile * a.tile_rows;
    const int64_t row1 = row0 + a.tile_rows < a.rows ? row0 + a.tile_rows : a.rows;
    for (int64_t row = row0; row < row1; ++row) {
      NormRow<S> r = {row, row * a.cols, V(0), V(1), V(0), V(0)};
      if (a.dy != nullptr) {
        if (a.norm == Norm::kLayer) r.center = V(static_cast<const S*>(a.mean)[row]);
        r.rstd = V(static_cast<const S*>(a.rstd)[row]);
        norm_row_sums<T>(a, r, dweight, dbias);
      }
      for_row(
          a.cols, [&](int64_t j) FR_INLINE_LAMBDA { norm_bwd_vector<T, false>(a, r, j, kLanes); },
          [&](int64_t j, int n) FR_INLINE_LAMBDA { norm_bwd_vector<T, true>(a, r, j, n); });
    }
  }
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
