// The arithmetic of bn_se_act on [N, C] vectors, between its passes over the activations.
#pragma once

#include "bn_finalize.cuh"

namespace fusedres {
namespace cuda {

// Arithmetic on [N, C]; the fields that a kernel below names.
struct BnSeVectors {
  int64_t n, c;
  double hw, eps;
  bool batch_stats;
  Gate gate;
  const void *mean, *var, *bn_scale, *bias;  // [C]; bn_scale = weight * rstd
  const void *squeezed, *logits;             // [N, C]
  void *pooled, *gates, *scale, *shift;      // [N, C]
  void *sum_u, *sum_ux, *dlogits;            // [N, C]; sum_ux: of u * (x - mean)
  const void* dpooled;                       // [N, C], divided by hw
  void *dweight, *dbias;                     // [C]
  void *q, *r;                               // [N, C]
};

template <typename S>
__device__ __forceinline__ S value_of(const void* from, int64_t i) {
  return from == nullptr ? S(0) : static_cast<const S*>(from)[i];
}

template <typename S>
__device__ __forceinline__ void set_value(void* to, int64_t i, S v) {
  static_cast<S*>(to)[i] = v;
}

// Computes: pooled = (squeezed - mean) * bn_scale + bias, the squeeze of z
// Reads:    squeezed [N, C], coefficients [C]
// Writes:   pooled [N, C]
// Traffic:  2*N*C*sizeof(acc_t) bytes
// Split:    one thread = one (n, c)
template <typename S>
__global__ void __launch_bounds__(kThreads)
    bn_se_pool_kernel(const __grid_constant__ BnSeVectors v) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= v.n * v.c) return;
  const int64_t c = i - quotient(i, v.c) * v.c;
  const S centered = value_of<S>(v.squeezed, i) - value_of<S>(v.mean, c);
  set_value(v.pooled, i, centered * value_of<S>(v.bn_scale, c) + value_of<S>(v.bias, c));
}

// Computes: gates = gate(logits), scale = bn_scale * gates, shift = bias * gates; in the backward,
//           with the sums of u, dlogits = gate'(logits) * (bn_scale * sum_ux + bias * sum_u)
// Reads:    logits, sums [N, C], coefficients [C]
// Writes:   gates, scale, shift, or dlogits [N, C]
// Traffic:  up to 4*N*C*sizeof(acc_t) bytes
// Split:    one thread = one (n, c)
template <typename S, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    bn_se_gate_kernel(const __grid_constant__ BnSeVectors v) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= v.n * v.c) return;
  const int64_t c = i - quotient(i, v.c) * v.c;
  const S logit = value_of<S>(v.logits, i);
  const S a = value_of<S>(v.bn_scale, c);
  const S b = value_of<S>(v.bias, c);
  if (kBackward) {
    const S dgate = a * value_of<S>(v.sum_ux, i) + b * value_of<S>(v.sum_u, i);
    set_value(v.dlogits, i, gate_backward(v.gate, logit, dgate));
  } else {
    const S gate = gate_forward(v.gate, logit);
    set_value(v.gates, i, gate);
    set_value(v.scale, i, a * gate);
    set_value(v.shift, i, b * gate);
  }
}

// Computes: with dz = u * gate + dpooled: dbias = sum dz, dweight = rstd * sum dz * (x - mean), and
//           dx = scale * u + q * (x - mean) + r   (bn_math.h, over all images of a channel)
// Reads:    gates, sums, dpooled, squeezed [N, C] twice
// Writes:   q, r [N, C]; dweight, dbias [C]
// Traffic:  10*N*C*sizeof(acc_t) bytes
// Split:    one thread = one channel; double sums over the images in order
template <typename S>
__global__ void __launch_bounds__(kThreads)
    bn_se_bwd_finalize_kernel(const __grid_constant__ BnSeVectors v) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= v.c) return;
  const double mean = static_cast<double>(value_of<S>(v.mean, c));
  double sum_dz = 0;
  double sum_dz_x = 0;
  for (int64_t i = c; i < v.n * v.c; i += v.c) {
    const double gate = static_cast<double>(value_of<S>(v.gates, i));
    const double dp = static_cast<double>(value_of<S>(v.dpooled, i)) * v.hw;
    sum_dz += gate * static_cast<double>(value_of<S>(v.sum_u, i)) + dp;
    sum_dz_x += gate * static_cast<double>(value_of<S>(v.sum_ux, i)) +
                dp * (static_cast<double>(value_of<S>(v.squeezed, i)) - mean);
  }
  const S a = value_of<S>(v.bn_scale, c);
  const S rstd = bn_rstd(value_of<S>(v.var, c), v.eps);
  const double dweight = sum_dz_x * static_cast<double>(rstd);
  const double count = static_cast<double>(v.n) * v.hw;
  const S q = bn_backward_q(a, rstd, dweight, count);
  for (int64_t i = c; i < v.n * v.c; i += v.c) {
    const double dp = static_cast<double>(value_of<S>(v.dpooled, i));
    const double through = v.batch_stats ? dp - sum_dz / count : dp;
    set_value(v.q, i, q);
    set_value(v.r, i, static_cast<S>(static_cast<double>(a) * through));
  }
  set_value(v.dweight, c, static_cast<S>(dweight));
  set_value(v.dbias, c, static_cast<S>(sum_dz));
}

using VectorsKernel = void (*)(BnSeVectors);

inline cudaError_t launch_vectors(VectorsKernel kernel, const BnSeVectors& v, int64_t threads,
                                  cudaStream_t stream) {
  return launch(kernel, {cdiv(threads, kThreads)}, stream, v);
}

}  // namespace cuda
}  // namespace fusedres
