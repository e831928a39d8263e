// Reductions over a tile: sums in acc_t along at most kChain rows, folded and stored in double. The
// host merges the tiles in a fixed order (merge.h).
#pragma once

#include "stream_tile.h"

namespace fusedres {
namespace FUSEDRES_ISA {

constexpr int64_t kRowsAtOnce = 8;  // rows per visit of an accumulator, which lives in L1

template <typename S>
struct Sums {
  alignas(64) S shift[kMaxColumns + kPad];
  alignas(64) S first[kMaxColumns + kPad];
  alignas(64) S second[kMaxColumns + kPad];
  alignas(64) S third[kMaxColumns + kPad];
  double total1[kMaxColumns];
  double total2[kMaxColumns];
  double total3[kMaxColumns];
};

// A shift by an infinite value would make NaN of an infinite mean.
template <typename S>
FR_INLINE Vec<S> finite_or_zero(Vec<S> v) {
  const Vec<S> zero = v - v;  // NaN where v is not finite
  return select(zero <= Vec<S>(0), v, Vec<S>(0));
}

template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> shift_of(const T* x, int64_t ld, int64_t rows, int n) {
  Vec<acc_of<T>> row[kRowsAtOnce];
  if (rows < kRowsAtOnce) return finite_or_zero(load_n<kPartial>(x, n));
  for (int64_t i = 0; i < kRowsAtOnce; ++i) row[i] = load_n<kPartial>(x + i * ld, n);
  // a tree: the mean of equal values is that value, and a constant channel has variance zero
  for (int64_t width = kRowsAtOnce / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) row[i] = row[i] + row[i + width];
  }
  const Vec<acc_of<T>> mean = row[0] * Vec<acc_of<T>>(acc_of<T>(1) / kRowsAtOnce);
  return finite_or_zero(mean);
}

// Shifts each column by about its mean, and clears its sums. The mean of 8 rows, not one row: with
// an outlier of size A as the shift, a tile of 128 rows would cancel 128 * A^2 against A^2. A mean
// alone is summed as it is.
template <typename T, bool kVariance>
__attribute__((noinline)) void choose_shift(const T* x, Tile t, Sums<acc_of<T>>& s) {
  const int64_t used = t.full > 0 ? t.columns : t.rest;
  for (int64_t j = 0; j < used; j += kLanes) {
    const int n = static_cast<int>(used - j);
    Vec<acc_of<T>> shift(0);
    if (kVariance) {
      shift = n >= kLanes ? shift_of<T, false>(x + j, t.ld, t.full, n)
                          : shift_of<T, true>(x + j, t.ld, t.full, n);
    }
    store(s.shift + j, shift);
    store(s.first + j, Vec<acc_of<T>>(0));
    store(s.second + j, Vec<acc_of<T>>(0));
  }
}

template <typename T, bool kVariance, bool kPartial>
FR_INLINE void stats_vector(const T* x, int64_t ld, int64_t rows, Sums<acc_of<T>>& s, int64_t j,
                            int n) {
  using V = Vec<acc_of<T>>;
  const V shift = load(s.shift + j);
  V first = load(s.first + j);
  V second = load(s.second + j);
  const T* p = x + j;
  for (int64_t r = 0; r < rows; ++r, p += ld) {
    V d = load_n<kPartial>(p, n) - shift;
    if (kPartial) d = select(mask_from_bits<acc_of<T>>((1u << n) - 1u), d, V(0));
    first = first + d;
    if (kVariance) second = second + d * d;
  }
  store(s.first + j, first);
  if (kVariance) store(s.second + j, second);
}

// Mean and squared deviations of each unpacked column, from its `pack` packed columns: every one
// has its own shift, so the merge is Chan's (Chan, Golub and LeVeque 1983) in double.
template <typename S, bool kVariance>
__attribute__((noinline)) void fold_stats(const StreamParams& a, Tile t, Sums<S>& s) {
  const int64_t width = a.plan.pack > 1 ? a.plan.cols : t.columns;
  const int64_t used = t.full > 0 ? t.columns : t.rest;
  const double n_long = static_cast<double>(t.full + 1);
  const double n_short = static_cast<double>(t.full);
  double* mean = a.partial1 + t.index * a.plan.cols + t.column0;
  for (int64_t c = 0; c < width; ++c) s.total1[c] = s.total2[c] = 0;
  for (int64_t j = 0; j < used; j += width) {
    const double n = j < t.rest ? n_long : n_short;
    for (int64_t c = 0; c < width; ++c) {
      s.total1[c] += n * static_cast<double>(s.shift[j + c]) + static_cast<double>(s.first[j + c]);
    }
  }
  const double inverse = 1.0 / static_cast<double>(t.count);
  for (int64_t c = 0; c < width; ++c) mean[c] = s.total1[c] *= inverse;
  if (!kVariance) return;
  for (int64_t j = 0; j < used; j += width) {
    const double n = j < t.rest ? n_long : n_short;
    const double inverse_n = 1.0 / n;
    for (int64_t c = 0; c < width; ++c) {
      const double sum = static_cast<double>(s.first[j + c]);
      const double off = static_cast<double>(s.shift[j + c]) + sum * inverse_n - s.total1[c];
      s.total2[c] += static_cast<double>(s.second[j + c]) - sum * sum * inverse_n + n * off * off;
    }
  }
  double* m2 = a.partial2 + t.index * a.plan.cols + t.column0;
  for (int64_t c = 0; c < width; ++c) m2[c] = s.total2[c];
}

// Computes: mean and sum of squared deviations of each column of each tile
// Reads:    x [N, C, H, W] once
// Writes:   partial1, partial2 [groups, tiles, cols] fp64
// Traffic:  N*C*H*W*sizeof(scalar_t) bytes + 16 bytes a channel and tile of >= 128 rows
// Split:    one item = one tile; 8 rows per visit of an accumulator; the tile's first 8 rows are
//           read twice (the shift), the second time from L1
template <typename T, bool kVariance>
void affine_fwd_stats_kernel(const StreamParams& params, int64_t begin, int64_t end) {
  using S = acc_of<T>;
  const StreamParams a = params;  // a local copy: stores cannot alias it
  Sums<S> s;
  for (int64_t item = begin; item < end; ++item) {
    const Tile t = tile_of(a, item);
    const T* x = static_cast<const T*>(a.x) + t.first;
    choose_shift<T, kVariance>(x, t, s);
    for (int64_t r = 0; r < t.full; r += kRowsAtOnce) {
      const T* p = x + r * t.ld;
      const int64_t rows = t.full - r < kRowsAtOnce ? t.full - r : kRowsAtOnce;
      int64_t j = 0;
      for (; j + kLanes <= t.columns; j += kLanes) {
        stats_vector<T, kVariance, false>(p, t.ld, rows, s, j, kLanes);
      }
      const int n = static_cast<int>(t.columns - j);
      if (n > 0) stats_vector<T, kVariance, true>(p, t.ld, rows, s, j, n);
    }
    for (int64_t j = 0; j < t.rest; j += kLanes) {
      const int n = static_cast<int>(t.rest - j < kLanes ? t.rest - j : kLanes);
      stats_vector<T, kVariance, true>(x + t.full * t.ld, t.ld, 1, s, j, n);
    }
    fold_stats<S, kVariance>(params, t, s);
  }
}

// The sums of each unpacked column, in double, from its `pack` packed columns.
template <typename S>
__attribute__((noinline)) void fold_sums(const StreamParams& a, Tile t, Sums<S>& s) {
  const int64_t width = a.plan.pack > 1 ? a.plan.cols : t.columns;
  const int64_t used = t.full > 0 ? t.columns : t.rest;
  for (int64_t c = 0; c < width; ++c) s.total1[c] = s.total2[c] = s.total3[c] = 0;
  for (int64_t j = 0; j < used; j += width) {
    for (int64_t c = 0; c < width; ++c) {
      s.total1[c] += static_cast<double>(s.first[j + c]);
      s.total2[c] += static_cast<double>(s.second[j + c]);
      s.total3[c] += static_cast<double>(s.third[j + c]);
    }
  }
  double* sum1 = a.partial1 + t.index * a.plan.cols + t.column0;
  double* sum2 = a.partial2 + t.index * a.plan.cols + t.column0;
  for (int64_t c = 0; c < width; ++c) {
    sum1[c] = s.total1[c];
    sum2[c] = s.total2[c];
  }
  if (a.partial3 == nullptr) return;
  double* sum3 = a.partial3 + t.index * a.plan.cols + t.column0;
  for (int64_t c = 0; c < width; ++c) sum3[c] = s.total3[c];
}

template <typename T, UMode kMode, bool kPartial>
FR_INLINE void reduce_vector(const StreamParams& a, const Coefficients<acc_of<T>>& c, const Tile& t,
                             Sums<acc_of<T>>& s, int64_t row, int64_t rows, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  V first = load(s.first + j);
  V second = load(s.second + j);
  V third = load(s.third + j);
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t i = t.first + r * t.ld + j;
    const V centered = centered_x<T, kPartial>(a, c, i, j, n);
    V u = gradient_at_z<T, kMode, kPartial>(a, c, i, t.mask + r * a.mask_row_bytes, j, n, centered);
    V product = u * centered;
    V product2(0);
    if (a.partial3 != nullptr) product2 = u * centered_residual<T, kPartial>(a, c, i, j, n);
    if (kPartial) {  // the lanes behind a packed row's end belong to other columns
      const auto valid = mask_from_bits<acc_of<T>>((1u << n) - 1u);
      u = select(valid, u, V(0));
      product = select(valid, product, V(0));
      product2 = select(valid, product2, V(0));
    }
    first = first + u;
    second = second + product;
    third = third + product2;
  }
  store(s.first + j, first);
  store(s.second + j, second);
  store(s.third + j, third);
}

// Computes: sum of u, of u * (x - center) and, if wanted, of u * (residual - res_center) of each
//           column of each tile, u = dy * act'(z)
// Reads:    dy, x once each; the mask, or the residual when z is recomputed, once; the residual for
//           the third sum
// Writes:   partial1, partial2, partial3 [groups, tiles, cols] fp64
// Traffic:  2*N*C*H*W*sizeof(scalar_t) + N*C*H*W/8 bytes with a mask, one tensor more for the third
// Split:    one item = one tile; 8 rows per visit of an accumulator
template <typename T, UMode kMode>
void affine_bwd_reduce_kernel(const StreamParams& params, int64_t begin, int64_t end) {
  using S = acc_of<T>;
  const StreamParams a = params;  // a local copy: stores cannot alias it
  Copies<S> copies;
  Sums<S> s;
  for (int64_t item = begin; item < end; ++item) {
    const Tile t = tile_of(a, item);
    const auto c = coefficients_of<S>(params, t, copies);
    const int64_t used = t.full > 0 ? t.columns : t.rest;
    for (int64_t j = 0; j < used; j += kLanes) {
      store(s.first + j, Vec<S>(0));
      store(s.second + j, Vec<S>(0));
      store(s.third + j, Vec<S>(0));
    }
    for (int64_t r = 0; r < t.full; r += kRowsAtOnce) {
      const int64_t rows = t.full - r < kRowsAtOnce ? t.full - r : kRowsAtOnce;
      int64_t j = 0;
      for (; j + kLanes <= t.columns; j += kLanes) {
        reduce_vector<T, kMode, false>(a, c, t, s, r, rows, j, kLanes);
      }
      const int n = static_cast<int>(t.columns - j);
      if (n > 0) reduce_vector<T, kMode, true>(a, c, t, s, r, rows, j, n);
    }
    for (int64_t j = 0; j < t.rest; j += kLanes) {
      const int n = static_cast<int>(t.rest - j < kLanes ? t.rest - j : kLanes);
      reduce_vector<T, kMode, true>(a, c, t, s, t.full, 1, j, n);
    }
    fold_sums<S>(params, t, s);
  }
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
