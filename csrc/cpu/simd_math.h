// Functions of sixteen lanes: exponential, hyperbolic tangent, activations, sums. Included by
// simd.h.
#pragma once

#include "simd_memory.h"

namespace fusedres {
namespace FUSEDRES_ISA {

// exp(x) = 2^k * (1 + p): k = round(x / ln 2), p = exp(r) - 1 by its Taylor series in
// r = x - k * ln 2, |r| <= 0.35. ln 2 is taken in two parts whose product with k is exact in the
// first (Cody and Waite 1980, chapter 6). Measured against long double on 131072 arguments: sigmoid
// within 2.3 units in the last place (torch.sigmoid: 2.3), tanh within 2.5 (torch.tanh: 0.8).
template <typename S>
struct ExpOf;
template <>
struct ExpOf<float> {
  static constexpr float kLowest = -104, kHighest = 89;  // exp is 0 and infinite beyond
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
};
template <>
struct ExpOf<double> {
  static constexpr double kLowest = -746, kHighest = 710;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
};

constexpr double kInverseFactorial[] = {1.0,
                                        1.0,
                                        1.0 / 2,
                                        1.0 / 6,
                                        1.0 / 24,
                                        1.0 / 120,
                                        1.0 / 720,
                                        1.0 / 5040,
                                        1.0 / 40320,
                                        1.0 / 362880,
                                        1.0 / 3628800,
                                        1.0 / 39916800,
                                        1.0 / 479001600,
                                        1.0 / 6227020800.0};

// kMinusOne: exp(x) - 1 without cancellation, for x <= 0.
template <typename S, bool kMinusOne>
FR_INLINE typename Native<S>::V exp_part(typename Native<S>::V x) {
  using C = ExpOf<S>;
  using V = typename Native<S>::V;
  using M = typename Native<S>::M;
  const V zero = {};
  const V lowest = zero + C::kLowest, highest = zero + C::kHighest, round = zero + C::kRound;
  x = x < lowest ? lowest : x;  // NaN stays NaN
  x = x > highest ? highest : x;
  const V shifted = x * static_cast<S>(1.44269504088896340736) + round;
  const V n = shifted - round;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  V p = zero + static_cast<S>(kInverseFactorial[C::kTerms]);
  for (int i = C::kTerms - 1; i >= 2; --i) p = p * r + static_cast<S>(kInverseFactorial[i]);
  p = r + r * r * p;
  const M k = (M)shifted - (M)round;
  const M half = k >> 1;  // 2^k in two factors: k may be beyond the exponents of S
  const V first = (V)((half + C::kBias) << C::kMantissa);
  const V second = (V)((k - half + C::kBias) << C::kMantissa);
  if (kMinusOne) return p * first * second + (first * second - S(1));
  return (p + S(1)) * first * second;
}

// The functions below are one copy for all kernels (inlined, they were most of the code). They take
// registers, not a Vec: GCC passes that in memory, and copies it there in pieces whose values the
// loads that follow must wait for.
template <typename S>
__attribute__((noinline)) typename Native<S>::V exp_one(typename Native<S>::V x) {
  return exp_part<S, false>(x);
}
template <typename S>
FR_INLINE Vec<S> exp_of(Vec<S> a) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = exp_one<S>(a.v[i]);
  return a;
}

template <typename S>
__attribute__((noinline)) typename Native<S>::V sigmoid_one(typename Native<S>::V x) {
  return S(1) / (S(1) + exp_part<S, false>(S(0) - x));
}
template <typename S>
FR_INLINE Vec<S> any_sigmoid(Vec<S> a) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = sigmoid_one<S>(a.v[i]);
  return a;
}

// tanh(x) = -t / (t + 2) with t = exp(-2|x|) - 1, and x's sign.
template <typename S>
__attribute__((noinline)) typename Native<S>::V tanh_one(typename Native<S>::V x) {
  const auto negative = x <= S(0);
  typename Native<S>::V t = exp_part<S, true>((negative ? x : S(0) - x) * S(2));
  t = t / (t + S(2));
  return negative ? t : S(0) - t;
}
template <typename S>
FR_INLINE Vec<S> tanh_of(Vec<S> a) {
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = tanh_one<S>(a.v[i]);
  return a;
}

template <typename S>
__attribute__((noinline)) Vec<S> erf_of(Vec<S> a) {
  S lanes[kLanes];
  store(lanes, a);
  for (int k = 0; k < kLanes; ++k) lanes[k] = fusedres::erf_of(lanes[k]);
  return load(lanes);
}

// Activations chosen at run time, in place.
template <typename S>
__attribute__((noinline)) void act_forward_at(Act act, typename Native<S>::V* z) {
  Vec<S> a;
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = z[i];
  a = act_forward(act, a);
  for (int i = 0; i < Vec<S>::kParts; ++i) z[i] = a.v[i];
}
template <typename S>
FR_INLINE Vec<S> any_act_forward(Act act, Vec<S> z) {
  act_forward_at<S>(act, z.v);
  return z;
}
template <typename S>
__attribute__((noinline)) void act_backward_at(Act act, const typename Native<S>::V* z,
                                               typename Native<S>::V* dy) {
  Vec<S> a, u;
  for (int i = 0; i < Vec<S>::kParts; ++i) a.v[i] = z[i];
  for (int i = 0; i < Vec<S>::kParts; ++i) u.v[i] = dy[i];
  u = act_backward(act, a, u);
  for (int i = 0; i < Vec<S>::kParts; ++i) dy[i] = u.v[i];
}
template <typename S>
FR_INLINE Vec<S> any_act_backward(Act act, Vec<S> z, Vec<S> dy) {
  act_backward_at<S>(act, z.v, dy.v);
  return dy;
}

// Lanes added in lane order in double.
template <typename S>
FR_INLINE double sum_lanes(Vec<S> a) {
  S lanes[kLanes];
  store(lanes, a);
  double total = 0;
  for (int k = 0; k < kLanes; ++k) total += static_cast<double>(lanes[k]);
  return total;
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
