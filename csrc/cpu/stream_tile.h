// One tile of a streaming kernel: where it starts, its rows, and its coefficients.
#pragma once

#include "isa.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_ISA {

constexpr int kSets = 12;  // center, scale, bias, p, q, r, and the same of the residual

// A tile as the kernels see it: `full` rows of `columns` elements, `ld` apart, and `rest` elements
// of one more row (packed tiles only).
struct Tile {
  int64_t group, index;  // index: row of the partial sums, group * tiles + tile
  int64_t first, count;  // element offset of the tile; its number of unpacked rows
  int64_t full, rest, columns, ld;
  int64_t column0;  // first of its columns in the group's coefficients
  int64_t mask;     // byte offset into the mask
};

FR_INLINE Tile tile_of(const StreamParams& a, int64_t item) {
  const Plan& plan = a.plan;
  Tile t;
  const int64_t block = item % plan.col_blocks;
  t.index = item / plan.col_blocks;
  t.group = t.index / plan.tiles;
  const int64_t row0 = (t.index % plan.tiles) * plan.tile_rows;
  t.count = plan.rows - row0 < plan.tile_rows ? plan.rows - row0 : plan.tile_rows;
  t.column0 = block * plan.col_block;
  t.first = (t.group * plan.rows + row0) * plan.cols + t.column0;
  t.mask = t.group * a.mask_group_bytes + row0 / plan.pack * a.mask_row_bytes + t.column0 / 8;
  if (plan.pack > 1) {
    t.columns = t.ld = plan.pack * plan.cols;
    t.full = t.count / plan.pack;
    t.rest = t.count % plan.pack * plan.cols;
  } else {
    const int64_t left = plan.cols - t.column0;
    t.columns = left < plan.col_block ? left : plan.col_block;
    t.ld = plan.cols;
    t.full = t.count;
    t.rest = 0;
  }
  return t;
}

// Coefficients of the current tile, one value a column.
template <typename S>
struct Coefficients {
  const S *center, *scale, *bias, *p, *q, *r;
  const S *res_center, *res_scale, *res_bias, *res_p, *res_q, *res_r;
};

// Where packed tiles keep their coefficients: the group's `cols` values, repeated `pack` times.
template <typename S>
struct Copies {
  int64_t group = -1;
  alignas(64) S sets[kSets][kMaxColumns + kPad];
};

template <typename S>
__attribute__((noinline)) void repeat_columns(const S* from, int64_t cols, int64_t columns, S* to) {
  if (cols == 1) {
    for (int64_t j = 0; j < columns; ++j) to[j] = from[0];
  } else {
    for (int64_t j = 0; j < columns; j += cols) {
      for (int64_t c = 0; c < cols; ++c) to[j + c] = from[c];
    }
  }
  store(to + columns, Vec<S>(0));  // the last vector may read past the end
}

// Out of line, and given the caller's parameters: the kernels' own copies must not escape.
template <typename S>
__attribute__((noinline)) Coefficients<S> coefficients_of(const StreamParams& a, Tile t,
                                                          Copies<S>& copies) {
  const void* const sources[kSets] = {a.center,   a.scale, a.bias,       a.p,
                                      a.q,        a.r,     a.res_center, a.res_scale,
                                      a.res_bias, a.res_p, a.res_q,      a.res_r};
  const S* found[kSets];
  for (int i = 0; i < kSets; ++i) {
    found[i] = static_cast<const S*>(sources[i]);
    if (found[i] == nullptr) continue;
    found[i] +=
        t.group % (i == 0 || i >= 6 ? a.center_groups : a.coef_groups) * a.plan.cols + t.column0;
    if (a.plan.pack == 1) continue;
    if (t.group != copies.group) {
      const int64_t rows = a.plan.rows < a.plan.pack ? a.plan.rows : a.plan.pack;
      repeat_columns(found[i], a.plan.cols, rows * a.plan.cols, copies.sets[i]);
    }
    found[i] = copies.sets[i];
  }
  copies.group = t.group;
  return {found[0], found[1], found[2], found[3], found[4],  found[5],
          found[6], found[7], found[8], found[9], found[10], found[11]};
}

// Calls row(offset of the row, mask offset, columns) for every row of the tile.
template <typename Row>
FR_INLINE void for_each_row(const StreamParams& a, const Tile& t, Row row) {
  const int64_t rows = t.full + (t.rest > 0);
  for (int64_t i = 0; i < rows; ++i) {
    row(t.first + i * t.ld, t.mask + i * a.mask_row_bytes, i < t.full ? t.columns : t.rest);
  }
}

// The residual of one vector, through its own affine map if it has one.
template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> mapped_residual(const StreamParams& a, const Coefficients<acc_of<T>>& c,
                                         int64_t i, int64_t j, int n) {
  const Vec<acc_of<T>> r = load_n<kPartial>(static_cast<const T*>(a.residual) + i, n);
  if (c.res_scale == nullptr) return r;
  return (r - load(c.res_center + j)) * load(c.res_scale + j) + load(c.res_bias + j);
}

// u = dy * act'(z) for one vector. z is recomputed exactly as the forward computed it.
template <typename T, UMode kMode, bool kPartial>
FR_INLINE Vec<acc_of<T>> gradient_at_z(const StreamParams& a, const Coefficients<acc_of<T>>& c,
                                       int64_t i, int64_t mask, int64_t j, int n,
                                       Vec<acc_of<T>> centered) {
  using V = Vec<acc_of<T>>;
  const V dy = load_n<kPartial>(static_cast<const T*>(a.dy) + i, n);
  if (kMode == kUIdentity) return dy;
  if (kMode == kUMask) {
    const auto open = mask_from_bits<acc_of<T>>(load_bits<kPartial>(a.mask_in + mask + j / 8, n));
    const V closed = a.act == Act::kLeakyRelu ? dy * V(kLeakySlope) : V(0);
    return select(open, dy, closed);
  }
  V z = centered * load(c.scale + j) + load(c.bias + j);
  if (a.residual != nullptr) {
    z = z + mapped_residual<T, kPartial>(a, c, i, j, n);
  }
  return kMode == kURelu ? act_backward(Act::kRelu, z, dy) : any_act_backward(a.act, z, dy);
}

template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> centered_x(const StreamParams& a, const Coefficients<acc_of<T>>& c,
                                    int64_t i, int64_t j, int n) {
  return load_n<kPartial>(static_cast<const T*>(a.x) + i, n) - load(c.center + j);
}

template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> centered_residual(const StreamParams& a, const Coefficients<acc_of<T>>& c,
                                           int64_t i, int64_t j, int n) {
  return load_n<kPartial>(static_cast<const T*>(a.residual) + i, n) - load(c.res_center + j);
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
