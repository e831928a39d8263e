// Elementwise kernels: every element is read once and written once; tiles are taken from the last
// to the first, because the pass before this one left the tensor's end in the cache.
#pragma once

#include "stream_tile.h"

namespace fusedres {
namespace FUSEDRES_ISA {

template <typename T, FwdAct kAct, bool kPartial>
FR_INLINE void fwd_apply_vector(const StreamParams& a, const Coefficients<acc_of<T>>& c, int64_t i,
                                int64_t mask, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  V z = centered_x<T, kPartial>(a, c, i, j, n) * load(c.scale + j) + load(c.bias + j);
  if (a.residual != nullptr) {
    z = z + mapped_residual<T, kPartial>(a, c, i, j, n);
  }
  if (a.mask_out != nullptr) {
    uint32_t bits = ~mask_to_bits(z <= V(0));
    if (kAct == kFwdAny && a.act == Act::kRelu6) bits &= ~mask_to_bits(z >= V(6));
    store_bits<kPartial>(a.mask_out + mask + j / 8, bits, n);
  }
  if (kAct == kFwdRelu) z = act_forward(Act::kRelu, z);
  if (kAct == kFwdAny) z = any_act_forward(a.act, z);
  store_n<kPartial>(static_cast<T*>(a.out) + i, z, n);
}

// Computes: y = act((x - center) * scale + bias + residual), mask = act'(z) > 0 (one bit each); the
//           residual may have an affine map of its own
// Reads:    x, residual [N, C, H, W] once each; center, scale, bias [C] or [N, C], cached
// Writes:   y [N, C, H, W] once; mask [rows, ceil(cols / 8)] once, if wanted
// Traffic:  (2 + has_residual)*N*C*H*W*sizeof(scalar_t) (+ N*C*H*W/8) bytes; eager bn_act moves
//           the tensor 5 times (7 with a residual) after its statistics
// Split:    one item = one tile of whole rows; 16 lanes, acc_t arithmetic, one rounding at the
// store
template <typename T, FwdAct kAct>
void affine_fwd_apply_kernel(const StreamParams& params, int64_t begin, int64_t end) {
  const StreamParams a = params;  // a local copy: stores to tensors cannot alias it
  Copies<acc_of<T>> copies;
  for (int64_t item = end - 1; item >= begin; --item) {
    const Tile t = tile_of(a, item);
    const auto c = coefficients_of<acc_of<T>>(params, t, copies);
    for_each_row(a, t, [&](int64_t i, int64_t mask, int64_t columns) FR_INLINE_LAMBDA {
      int64_t j = 0;
      for (; j + kLanes <= columns; j += kLanes) {
        fwd_apply_vector<T, kAct, false>(a, c, i + j, mask, j, kLanes);
      }
      const int n = static_cast<int>(columns - j);
      if (n > 0) fwd_apply_vector<T, kAct, true>(a, c, i + j, mask, j, n);
    });
  }
}

template <typename T, UMode kMode, bool kPartial>
FR_INLINE void bwd_apply_vector(const StreamParams& a, const Coefficients<acc_of<T>>& c, int64_t i,
                                int64_t mask, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  V centered(0);
  if (kMode >= kURelu || c.q != nullptr) centered = centered_x<T, kPartial>(a, c, i, j, n);
  const V u = gradient_at_z<T, kMode, kPartial>(a, c, i, mask, j, n, centered);
  V dx = load(c.p + j) * u;
  if (c.q != nullptr) dx = dx + load(c.q + j) * centered;
  if (c.r != nullptr) dx = dx + load(c.r + j);
  store_n<kPartial>(static_cast<T*>(a.out) + i, dx, n);
  if (a.dresidual == nullptr) return;
  V dresidual = u;
  if (c.res_p != nullptr) dresidual = load(c.res_p + j) * u;
  if (c.res_q != nullptr) {
    dresidual = dresidual + load(c.res_q + j) * centered_residual<T, kPartial>(a, c, i, j, n) +
                load(c.res_r + j);
  }
  store_n<kPartial>(static_cast<T*>(a.dresidual) + i, dresidual, n);
}

// Computes: dx = p * u + q * (x - center) + r, dresidual = u, with u = dy * act'(z); with an affine
//           map of the residual, dresidual has the form of dx
// Reads:    dy once; x once unless q is null and u comes from the mask; the mask, or the residual
//           when z is recomputed or it has a batch norm, once; coefficients, cached
// Writes:   dx [N, C, H, W] once; dresidual [N, C, H, W] once, if wanted
// Traffic:  (3 + need_dresidual)*N*C*H*W*sizeof(scalar_t) + N*C*H*W/8 bytes with a mask
// Split:    one item = one tile of whole rows; 16 lanes, acc_t arithmetic, one rounding at the
// store
template <typename T, UMode kMode>
void affine_bwd_apply_kernel(const StreamParams& params, int64_t begin, int64_t end) {
  const StreamParams a = params;  // a local copy: stores to tensors cannot alias it
  Copies<acc_of<T>> copies;
  for (int64_t item = end - 1; item >= begin; --item) {
    const Tile t = tile_of(a, item);
    const auto c = coefficients_of<acc_of<T>>(params, t, copies);
    for_each_row(a, t, [&](int64_t i, int64_t mask, int64_t columns) FR_INLINE_LAMBDA {
      int64_t j = 0;
      for (; j + kLanes <= columns; j += kLanes) {
        bwd_apply_vector<T, kMode, false>(a, c, i + j, mask, j, kLanes);
      }
      const int n = static_cast<int>(columns - j);
      if (n > 0) bwd_apply_vector<T, kMode, true>(a, c, i + j, mask, j, n);
    });
  }
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
