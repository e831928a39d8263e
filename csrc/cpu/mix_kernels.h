// Kernels of residual_mix: a weighted sum of two tensors, with an optional elementwise gate.
#pragma once

#include "isa.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_ISA {

// Calls vector(element offset, mask offset, n, image) over the rows of the items [begin, end).
template <typename Full, typename Partial>
FR_INLINE void for_each_mix_vector(const MixParams& a, int64_t begin, int64_t end, Full full,
                                   Partial partial) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / a.items_per_image;
    const int64_t row0 = item % a.items_per_image * a.rows_per_item;
    const int64_t row1 = row0 + a.rows_per_item < a.rows ? row0 + a.rows_per_item : a.rows;
    for (int64_t row = row0; row < row1; ++row) {
      const int64_t start = row * a.row_len;
      const int64_t left = a.image_elems - start;
      const int64_t len = left < a.row_len ? left : a.row_len;
      const int64_t i = image * a.image_elems + start;
      const int64_t mask = image * a.mask_image_bytes + row * a.mask_row_bytes;
      int64_t j = 0;
      for (; j + kLanes <= len; j += kLanes) full(i + j, mask + j / 8, kLanes, image);
      if (j < len) partial(i + j, mask + j / 8, static_cast<int>(len - j), image);
    }
  }
}

template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> mixed(const MixParams& a, Vec<acc_of<T>> alpha, int64_t i, int n) {
  using V = Vec<acc_of<T>>;
  V branch = alpha * load_n<kPartial>(static_cast<const T*>(a.branch) + i, n);
  V shortcut = V(static_cast<acc_of<T>>(a.beta)) *
               load_n<kPartial>(static_cast<const T*>(a.shortcut) + i, n);
  if (a.gate != nullptr) {
    const V gate = load_n<kPartial>(static_cast<const T*>(a.gate) + i, n);
    branch = gate * branch;
    shortcut = (V(1) - gate) * shortcut;
  }
  return branch + shortcut;
}

template <typename T, bool kPartial>
FR_INLINE void mix_fwd_vector(const MixParams& a, int64_t i, int64_t mask, int n, int64_t image) {
  using V = Vec<acc_of<T>>;
  const V alpha(static_cast<const acc_of<T>*>(a.alpha)[image]);
  const V z = mixed<T, kPartial>(a, alpha, i, n);
  if (a.mask_out != nullptr) {
    uint32_t bits = ~mask_to_bits(z <= V(0));
    if (a.act == Act::kRelu6) bits &= ~mask_to_bits(z >= V(6));
    store_bits<kPartial>(a.mask_out + mask, bits, n);
  }
  const V y = a.act == Act::kIdentity ? z
              : a.act == Act::kRelu   ? act_forward(Act::kRelu, z)
                                      : any_act_forward(a.act, z);
  store_n<kPartial>(static_cast<T*>(a.y) + i, y, n);
}

// Computes: y = act(alpha[n] * branch + beta * shortcut), or with a gate
//           y = act(alpha[n] * gate * branch + beta * (1 - gate) * shortcut)
// Reads:    branch, shortcut, gate [N, C, H, W] once each
// Writes:   y [N, C, H, W] once; mask once, if wanted
// Traffic:  (3 + has_gate)*N*C*H*W*sizeof(scalar_t) (+ N*C*H*W/8) bytes; eager moves 8, or 16
//           with a gate
// Split:    one item = some rows of one image; 16 lanes, acc_t arithmetic, one rounding at the
// store
template <typename T>
void residual_mix_fwd_kernel(const MixParams& params, int64_t begin, int64_t end) {
  const MixParams a = params;  // a local copy: stores cannot alias it
  for_each_mix_vector(
      a, begin, end,
      [&](int64_t i, int64_t m, int n, int64_t g)
          FR_INLINE_LAMBDA { mix_fwd_vector<T, false>(a, i, m, n, g); },
      [&](int64_t i, int64_t m, int n, int64_t g)
          FR_INLINE_LAMBDA { mix_fwd_vector<T, true>(a, i, m, n, g); });
}

template <typename T, bool kPartial>
FR_INLINE void mix_bwd_vector(const MixParams& a, int64_t i, int64_t mask, int n, int64_t image) {
  using S = acc_of<T>;
  using V = Vec<S>;
  const V alpha(static_cast<const S*>(a.alpha)[image]);
  const V beta(static_cast<S>(a.beta));
  const V dy = load_n<kPartial>(static_cast<const T*>(a.dy) + i, n);
  V u = dy;
  if (a.mask_in != nullptr) {
    const V closed = a.act == Act::kLeakyRelu ? dy * V(kLeakySlope) : V(0);
    u = select(mask_from_bits<S>(load_bits<kPartial>(a.mask_in + mask, n)), dy, closed);
  } else if (a.act != Act::kIdentity) {
    u = any_act_backward(a.act, mixed<T, kPartial>(a, alpha, i, n), dy);
  }
  V dbranch = alpha * u;
  V dshortcut = beta * u;
  if (a.gate != nullptr) {
    const V gate = load_n<kPartial>(static_cast<const T*>(a.gate) + i, n);
    const V branch = load_n<kPartial>(static_cast<const T*>(a.branch) + i, n);
    const V shortcut = load_n<kPartial>(static_cast<const T*>(a.shortcut) + i, n);
    store_n<kPartial>(static_cast<T*>(a.dgate) + i, dbranch * branch - dshortcut * shortcut, n);
    dbranch = dbranch * gate;
    dshortcut = dshortcut * (V(1) - gate);
  }
  store_n<kPartial>(static_cast<T*>(a.dbranch) + i, dbranch, n);
  store_n<kPartial>(static_cast<T*>(a.dshortcut) + i, dshortcut, n);
}

// Computes: dbranch = alpha[n] * gate * u, dshortcut = beta * (1 - gate) * u,
//           dgate = (alpha[n] * branch - beta * shortcut) * u, with u = dy * act'(z)
// Reads:    dy once, and the mask; with a gate or a recomputed z: gate, branch, shortcut once
// Writes:   dbranch, dshortcut, dgate [N, C, H, W] once each
// Traffic:  3*N*C*H*W*sizeof(scalar_t) + N*C*H*W/8 bytes, 7 tensors with a gate
// Split:    one item = some rows of one image; 16 lanes, acc_t arithmetic, one rounding at the
// store
template <typename T>
void residual_mix_bwd_kernel(const MixParams& params, int64_t begin, int64_t end) {
  const MixParams a = params;  // a local copy: stores cannot alias it
  for_each_mix_vector(
      a, begin, end,
      [&](int64_t i, int64_t m, int n, int64_t g)
          FR_INLINE_LAMBDA { mix_bwd_vector<T, false>(a, i, m, n, g); },
      [&](int64_t i, int64_t m, int n, int64_t g)
          FR_INLINE_LAMBDA { mix_bwd_vector<T, true>(a, i, m, n, g); });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
