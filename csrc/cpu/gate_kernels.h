// Gated residuals: the highway layer and the LSTM cell. A row holds a layer's pre-activations side
// by side, as one GEMM or convolution wrote them.
#pragma once

#include "isa.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_ISA {

// Calls full(row, column) and partial(row, column, lanes) over the blocks of columns of the items.
template <typename Full, typename Partial>
FR_INLINE void for_each_gate_vector(const GateParams& a, int64_t begin, int64_t end, Full full,
                                    Partial partial) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / a.blocks;
    int64_t j = item % a.blocks * a.block;
    const int64_t stop = j + a.block < a.cols ? j + a.block : a.cols;
    for (; j + kLanes <= stop; j += kLanes) full(row, j);
    if (j < stop) partial(row, j, static_cast<int>(stop - j));
  }
}

// Part `k` of the row's pre-activations.
template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> part(const GateParams& a, int64_t row, int64_t k, int64_t j, int n) {
  return load_n<kPartial>(static_cast<const T*>(a.parts) + row * a.ld + k * a.cols + j, n);
}
template <typename T, bool kPartial>
FR_INLINE void store_part(const GateParams& a, int64_t row, int64_t k, int64_t j, int n,
                          Vec<acc_of<T>> v) {
  store_n<kPartial>(static_cast<T*>(a.dparts) + row * a.ld + k * a.cols + j, v, n);
}
template <typename T, bool kPartial>
FR_INLINE Vec<acc_of<T>> row_of(const GateParams& a, const void* p, int64_t row, int64_t j, int n) {
  return load_n<kPartial>(static_cast<const T*>(p) + row * a.cols + j, n);
}
template <typename T, bool kPartial>
FR_INLINE void store_row(const GateParams& a, void* p, int64_t row, int64_t j, int n,
                         Vec<acc_of<T>> v) {
  store_n<kPartial>(static_cast<T*>(p) + row * a.cols + j, v, n);
}

template <typename T, bool kPartial>
FR_INLINE void highway_fwd_vector(const GateParams& a, int64_t row, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  const V h = any_act_forward(a.act, part<T, kPartial>(a, row, 0, j, n));
  const V t = any_sigmoid(part<T, kPartial>(a, row, 1, j, n));
  const V c = a.count == 2 ? V(1) - t : any_sigmoid(part<T, kPartial>(a, row, 2, j, n));
  store_row<T, kPartial>(a, a.y, row, j, n, h * t + row_of<T, kPartial>(a, a.x, row, j, n) * c);
}

template <typename T, bool kPartial>
FR_INLINE void highway_bwd_vector(const GateParams& a, int64_t row, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  const V z = part<T, kPartial>(a, row, 0, j, n);
  const V t = any_sigmoid(part<T, kPartial>(a, row, 1, j, n));
  const V x = row_of<T, kPartial>(a, a.x, row, j, n);
  const V dy = row_of<T, kPartial>(a, a.dy, row, j, n);
  const V h = any_act_forward(a.act, z);
  const V slope = t * (V(1) - t);
  store_part<T, kPartial>(a, row, 0, j, n, any_act_backward(a.act, z, dy * t));
  V c = V(1) - t;
  if (a.count == 2) {
    store_part<T, kPartial>(a, row, 1, j, n, dy * (h - x) * slope);
  } else {
    c = any_sigmoid(part<T, kPartial>(a, row, 2, j, n));
    store_part<T, kPartial>(a, row, 1, j, n, dy * h * slope);
    store_part<T, kPartial>(a, row, 2, j, n, dy * x * (c * (V(1) - c)));
  }
  store_row<T, kPartial>(a, a.dx, row, j, n, dy * c);
}

// An LSTM cell's gates i, f, g, o in PyTorch's order; f is 1 without a forget gate.
template <typename S>
struct LstmGates {
  Vec<S> i, f, g, o;
};

template <typename T, bool kPartial>
FR_INLINE LstmGates<acc_of<T>> lstm_gates(const GateParams& a, int64_t row, int64_t j, int n) {
  const int64_t forget = a.count == 4;
  LstmGates<acc_of<T>> r;
  r.i = any_sigmoid(part<T, kPartial>(a, row, 0, j, n));
  r.f = Vec<acc_of<T>>(1);
  if (forget) r.f = any_sigmoid(part<T, kPartial>(a, row, 1, j, n));
  r.g = tanh_of(part<T, kPartial>(a, row, 1 + forget, j, n));
  r.o = any_sigmoid(part<T, kPartial>(a, row, 2 + forget, j, n));
  return r;
}

template <typename T, bool kPartial>
FR_INLINE void lstm_fwd_vector(const GateParams& a, int64_t row, int64_t j, int n) {
  const auto r = lstm_gates<T, kPartial>(a, row, j, n);
  const auto c = r.f * row_of<T, kPartial>(a, a.x, row, j, n) + r.i * r.g;
  store_row<T, kPartial>(a, a.c, row, j, n, c);
  store_row<T, kPartial>(a, a.y, row, j, n, r.o * tanh_of(c));
}

template <typename T, bool kPartial>
FR_INLINE void lstm_bwd_vector(const GateParams& a, int64_t row, int64_t j, int n) {
  using V = Vec<acc_of<T>>;
  const V one(1);
  const int64_t forget = a.count == 4;
  const auto r = lstm_gates<T, kPartial>(a, row, j, n);
  const V before = row_of<T, kPartial>(a, a.x, row, j, n);
  const V squashed = tanh_of(r.f * before + r.i * r.g);
  V dc(0), dgate_o(0);
  if (a.dc != nullptr) dc = row_of<T, kPartial>(a, a.dc, row, j, n);
  if (a.dy != nullptr) {
    const V dh = row_of<T, kPartial>(a, a.dy, row, j, n);
    dc = dc + dh * r.o * (one - squashed * squashed);
    dgate_o = dh * squashed * (r.o * (one - r.o));
  }
  store_part<T, kPartial>(a, row, 0, j, n, dc * r.g * (r.i * (one - r.i)));
  if (forget) store_part<T, kPartial>(a, row, 1, j, n, dc * before * (r.f * (one - r.f)));
  store_part<T, kPartial>(a, row, 1 + forget, j, n, dc * r.i * (one - r.g * r.g));
  store_part<T, kPartial>(a, row, 2 + forget, j, n, dgate_o);
  store_row<T, kPartial>(a, a.dx, row, j, n, dc * r.f);
}

#define FR_GATE_KERNEL(name, vector)                                                             \
  template <typename T>                                                                          \
  void name(const GateParams& params, int64_t begin, int64_t end) {                              \
    const GateParams a = params; /* a local copy: stores cannot alias it */                      \
    for_each_gate_vector(                                                                        \
        a, begin, end,                                                                           \
        [&](int64_t row, int64_t j) FR_INLINE_LAMBDA { vector<T, false>(a, row, j, kLanes); },   \
        [&](int64_t row, int64_t j, int n) FR_INLINE_LAMBDA { vector<T, true>(a, row, j, n); }); \
  }

// Computes: y = act(h) * sigmoid(t) + x * (1 - sigmoid(t)), or uncoupled ... + x * sigmoid(c)
// Reads:    parts [rows, 2 * cols] (3 * cols uncoupled), x [rows, cols] once each
// Writes:   y [rows, cols] once
// Traffic:  4*rows*cols*sizeof(scalar_t) bytes, 5 uncoupled; eager moves 15
// Split:    one item = up to 16384 columns of a row; acc_t arithmetic, one rounding at the store
FR_GATE_KERNEL(highway_fwd_kernel, highway_fwd_vector)

// Computes: dh = dy * t * act'(h), dt = dy * (act(h) - x) * t * (1 - t), dx = dy * (1 - t); the
//           gates are computed again
// Reads:    parts, x, dy once each
// Writes:   dparts, dx once each
// Traffic:  7*rows*cols*sizeof(scalar_t) bytes, 9 uncoupled
// Split:    as the forward
FR_GATE_KERNEL(highway_bwd_kernel, highway_bwd_vector)

// Computes: c' = sigmoid(f) * c + sigmoid(i) * tanh(g), h = sigmoid(o) * tanh(c')
// Reads:    parts [rows, 4 * cols] (3 * cols without f, which is then 1), c [rows, cols]
// Writes:   c', h [rows, cols]
// Traffic:  7*rows*cols*sizeof(scalar_t) bytes; eager moves 22
// Split:    one item = up to 16384 columns of a row; acc_t arithmetic, one rounding at the store
FR_GATE_KERNEL(lstm_fwd_kernel, lstm_fwd_vector)

// Computes: the derivatives of the above; gates and c' are computed again
// Reads:    parts, c, and dh, dc' where there are any, once each
// Writes:   dparts, dc once each
// Traffic:  12*rows*cols*sizeof(scalar_t) bytes
// Split:    as the forward
FR_GATE_KERNEL(lstm_bwd_kernel, lstm_bwd_vector)

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
