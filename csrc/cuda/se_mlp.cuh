// The squeeze-excite MLP on [N, C] vectors, all acc_t: hidden = p @ w1.T + b1 [N, R],
// logits = act(hidden) @ w2.T + b2 [N, C], and its backward. The weights are read once for eight
// images: for one image at a time they would be more traffic than the activations (7x7x2048:
// 2 MB of weights, 200 KB of x).
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

constexpr int kImages = 8;  // of a block

// What happens to an input before, and to an output after the product.
enum class Pre : int { kNone, kAct };
enum class Post : int { kNone, kGate, kActBackward, kDivide };

struct LinearParams {
  int64_t n, k, o;   // out [n, o] from in [n, k]
  const void* in;    // [n, k]
  const void* w;     // [o, k] (linear) or [k, o] (linear_t)
  const void* bias;  // [o] or null
  void* out;         // [n, o]
  void* gate_out;    // [n, o]: gate(out); Post::kGate
  const void* at;    // [n, o]: where act' is taken; Post::kActBackward
  double divisor;    // Post::kDivide
  Pre pre;
  Post post;
  Act act;
  Gate gate;
};

template <typename S>
__device__ __forceinline__ S linear_input(const LinearParams& p, int64_t image, int64_t k) {
  if (image >= p.n) return S(0);
  const S v = static_cast<const S*>(p.in)[image * p.k + k];
  return p.pre == Pre::kAct ? act_forward(p.act, v) : v;
}

template <typename S>
__device__ __forceinline__ void linear_output(const LinearParams& p, int64_t image, int64_t o,
                                              S sum) {
  if (image >= p.n) return;
  const int64_t at = image * p.o + o;
  if (p.bias != nullptr) sum += static_cast<const S*>(p.bias)[o];
  if (p.post == Post::kActBackward) sum = act_backward(p.act, static_cast<const S*>(p.at)[at], sum);
  if (p.post == Post::kDivide) sum /= static_cast<S>(p.divisor);
  static_cast<S*>(p.out)[at] = sum;
  if (p.post == Post::kGate) static_cast<S*>(p.gate_out)[at] = gate_forward(p.gate, sum);
}

// Computes: out[n, o] = post(sum_k pre(in[n, k]) * w[o, k] + bias[o])
// Reads:    in [n, k] from cache; w [o, k] once for eight images
// Writes:   out [n, o]
// Traffic:  n/8*o*k*sizeof(acc_t) bytes
// Split:    one warp = one output of eight images; a lane adds every 32nd term, then a shuffle tree
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    se_linear_kernel(const __grid_constant__ LinearParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t o = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t image0 = static_cast<int64_t>(blockIdx.y) * kImages;
  if (o >= p.o) return;
  S sums[kImages] = {};
  for (int64_t k = lane; k < p.k; k += 32) {
    const S w = static_cast<const S*>(p.w)[o * p.k + k];
#pragma unroll
    for (int i = 0; i < kImages; ++i) sums[i] += linear_input<S>(p, image0 + i, k) * w;
  }
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    for (int lanes = 16; lanes > 0; lanes /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], lanes);
    if (lane == i) linear_output(p, image0 + i, o, sums[i]);
  }
}

constexpr int64_t kChain = 64;  // terms that are added up in acc_t before they join the total

// The sum of term(k) for k = first, first + step, ... below end.
template <typename S, typename Term>
__device__ __forceinline__ S chained_sum(int64_t first, int64_t end, int64_t step, Term term) {
  S total = S(0);
  for (int64_t k0 = first; k0 < end; k0 += kChain * step) {
    const int64_t stop = k0 + kChain * step < end ? k0 + kChain * step : end;
    S sum = S(0);
#pragma unroll 8
    for (int64_t k = k0; k < stop; k += step) sum += term(k);
    total += sum;
  }
  return total;
}

// Computes: out[n, o] = post(sum_k pre(in[n, k]) * w[k, o] + bias[o])
// Reads:    in [n, k] from cache; w [k, o] once for eight images
// Writes:   out [n, o]
// Traffic:  n/8*o*k*sizeof(acc_t) bytes
// Split:    one thread = one output of eight images
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    se_linear_t_kernel(const __grid_constant__ LinearParams p) {
  const int64_t o = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t image0 = static_cast<int64_t>(blockIdx.y) * kImages;
  if (o >= p.o) return;
  S totals[kImages] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kChain) {
    const int64_t end = k0 + kChain < p.k ? k0 + kChain : p.k;
    S sums[kImages] = {};
    for (int64_t k = k0; k < end; ++k) {
      const S w = static_cast<const S*>(p.w)[k * p.o + o];
#pragma unroll
      for (int i = 0; i < kImages; ++i) sums[i] += linear_input<S>(p, image0 + i, k) * w;
    }
#pragma unroll
    for (int i = 0; i < kImages; ++i) totals[i] += sums[i];
  }
#pragma unroll
  for (int i = 0; i < kImages; ++i) linear_output(p, image0 + i, o, totals[i]);
}

struct OuterLayer {
  int64_t o, k;
  const void* a;  // [n, o]: the gradient of the layer's output
  const void* b;  // [n, k]: its input
  void* dw;       // [o, k]
  void* dbias;    // [o]
  Pre pre;        // of b
};

struct OuterParams {
  OuterLayer layers[2];  // of as many weights
  int64_t n;
  Act act;
};

// Computes: dw[o, k] = sum_n a[n, o] * pre(b[n, k]); dbias[o] = sum_n a[n, o]; of both layers
// Reads:    a [n, o], b [n, k] from cache
// Writes:   dw [o, k], dbias [o] once
// Traffic:  2*o*k*sizeof(acc_t) bytes
// Split:    one thread = one weight, its images in order
template <typename S>
__global__ void __launch_bounds__(kThreads)
    se_outer_kernel(const __grid_constant__ OuterParams both) {
  const OuterLayer& p = both.layers[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t o = quotient(i, p.k);
  const int64_t k = i - o * p.k;
  if (o >= p.o) return;
  S total = S(0);
  S bias = S(0);
  for (int64_t n0 = 0; n0 < both.n; n0 += kChain) {
    const int64_t end = n0 + kChain < both.n ? n0 + kChain : both.n;
    S sum = S(0);
    S sum_a = S(0);
    for (int64_t n = n0; n < end; ++n) {
      const S a = static_cast<const S*>(p.a)[n * p.o + o];
      const S b = static_cast<const S*>(p.b)[n * p.k + k];
      sum += a * (p.pre == Pre::kAct ? act_forward(both.act, b) : b);
      sum_a += a;
    }
    total += sum;
    bias += sum_a;
  }
  static_cast<S*>(p.dw)[i] = total;
  if (k == 0) static_cast<S*>(p.dbias)[o] = bias;
}

template <typename S>
cudaError_t launch_linear(const LinearParams& p, cudaStream_t stream) {
  LaunchShape shape{cdiv(p.o, kThreads / 32)};
  shape.blocks_y = cdiv(p.n, kImages);
  return launch(se_linear_kernel<S>, shape, stream, p);
}

template <typename S>
cudaError_t launch_linear_t(const LinearParams& p, cudaStream_t stream) {
  LaunchShape shape{cdiv(p.o, kThreads)};
  shape.blocks_y = cdiv(p.n, kImages);
  return launch(se_linear_t_kernel<S>, shape, stream, p);
}

// The layers' sizes, parameters and results; a forward and a backward share it.
struct MlpParams {
  int64_t n, c, r;
  Act act;
  Gate gate;
  const void *w1, *b1, *w2, *b2;  // [R, C], [R], [C, R], [C]; biases may be null
  const void* pooled;             // [N, C]
  void* hidden;                   // [N, R] before act
  void* logits;                   // [N, C] before the gate
  void* gates;                    // [N, C]
  const void* dlogits;            // [N, C]
  void* dhidden;                  // [N, R] scratch
  void* dpooled;                  // [N, C], divided by `divisor`
  double divisor;
  void *dw1, *db1, *dw2, *db2;
};

template <typename S>
cudaError_t mlp_forward(const MlpParams& m, cudaStream_t stream) {
  LinearParams p{};
  p.n = m.n;
  p.act = m.act;
  p.gate = m.gate;
  p.k = m.c;
  p.o = m.r;
  p.in = m.pooled;
  p.w = m.w1;
  p.bias = m.b1;
  p.out = m.hidden;
  const cudaError_t error = launch_linear<S>(p, stream);
  if (error != cudaSuccess) return error;
  p.k = m.r;
  p.o = m.c;
  p.in = m.hidden;
  p.pre = Pre::kAct;
  p.w = m.w2;
  p.bias = m.b2;
  p.out = m.logits;
  p.gate_out = m.gates;
  p.post = Post::kGate;
  return launch_linear<S>(p, stream);
}

// From dlogits and dhidden of all images.
template <typename S>
cudaError_t mlp_weight_gradients(const MlpParams& m, cudaStream_t stream) {
  const OuterParams p{{{m.c, m.r, m.dlogits, m.hidden, m.dw2, m.db2, Pre::kAct},
                       {m.r, m.c, m.dhidden, m.pooled, m.dw1, m.db1, Pre::kNone}},
                      m.n,
                      m.act};
  LaunchShape shape{cdiv(m.c * m.r, kThreads)};
  shape.blocks_y = 2;
  return launch(se_outer_kernel<S>, shape, stream, p);
}

template <typename S>
cudaError_t mlp_backward(const MlpParams& m, cudaStream_t stream) {
  LinearParams p{};
  p.n = m.n;
  p.act = m.act;
  p.k = m.c;
  p.o = m.r;
  p.in = m.dlogits;
  p.w = m.w2;
  p.out = m.dhidden;
  p.at = m.hidden;
  p.post = Post::kActBackward;
  cudaError_t error = launch_linear_t<S>(p, stream);
  p.k = m.r;
  p.o = m.c;
  p.in = m.dhidden;
  p.w = m.w1;
  p.out = m.dpooled;
  p.post = Post::kDivide;
  p.divisor = m.divisor;
  if (error == cudaSuccess) error = launch_linear_t<S>(p, stream);
  return error == cudaSuccess ? mlp_weight_gradients<S>(m, stream) : error;
}

}  // namespace cuda
}  // namespace fusedres
