// The elementwise passes: forward and backward. They walk the tensor from its end, because the pass
// before left that in the L2 cache.
#pragma once

#include "stream.cuh"

namespace fusedres {
namespace cuda {

__device__ __forceinline__ int64_t block_from_the_end() {
  return static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x;
}

// Of one pack; zeros where there is none.
template <typename T, bool kWide>
__device__ __forceinline__ Pack<acc_of<T>> residual_of(const StreamParams& a, int64_t at, int n) {
  if (a.residual == nullptr) return {};
  return load_pack<T, kWide>(in_global(static_cast<const T*>(a.residual)) + at, a.width, n);
}

// One pack of the forward, from x and the residual to the stores of y and the mask.
template <typename T, bool kPlanar, bool kWide, bool kAny, typename S>
__device__ __forceinline__ void apply_forward(const StreamParams& a,
                                              const Affine<S, kPlanar>& affine, Pack<S> z,
                                              const Pack<S>& residual, int64_t at, int64_t byte,
                                              int n) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) z[i] = affine(z[i], i);
  if (a.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] += residual[i];
  }
  if (a.mask_out != nullptr) a.mask_out[byte] = mask_byte(a.act, z, n);
#pragma unroll
  for (int i = 0; i < kPack; ++i) z[i] = activate<kAny>(a.act, z[i]);
  store_pack<T, kWide>(static_cast<T*>(a.out) + at, z, a.width, n);
}

// p, q, r of dx = p * u + q * (x - center) + r.
template <typename S, bool kPlanar>
struct BackwardMap {
  Coefficients<S, kPlanar> p, q, r;
};

// One pack of the backward, from u to the stores of dx and dresidual; without has_q, has_r: q, r
// are zero.
template <typename T, bool kPlanar, bool kWide, typename S>
__device__ __forceinline__ void apply_backward(const StreamParams& a,
                                               const Affine<S, kPlanar>& affine,
                                               const BackwardMap<S, kPlanar>& map, bool has_q,
                                               bool has_r, const Pack<S>& u, const Pack<S>& x,
                                               int64_t at, int n) {
  Pack<S> dx;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    dx[i] = map.p[i] * u[i];
    if (has_q) dx[i] += map.q[i] * (x[i] - affine.center[i]);
    if (has_r) dx[i] += map.r[i];
  }
  store_pack<T, kWide>(static_cast<T*>(a.out) + at, dx, a.width, n);
  if (a.dresidual != nullptr) {
    store_pack<T, kWide>(static_cast<T*>(a.dresidual) + at, u, a.width, n);
  }
}

// Computes: y = act((x - center) * scale + bias + residual)   (reference.bn_act, given statistics)
// Reads:    x, residual [N, C, HW] once each; coefficients [C] or [N, C] acc_t, from cache
// Writes:   y [N, C, HW] once; mask once, if wanted
// Traffic:  (2 + has_residual)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes
// Split:    one block = a tile (stream.cuh), from the end; acc_t arithmetic, one rounding at the
//           store
template <typename T, bool kPlanar, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads, 2)
    stream_fwd_apply_kernel(const __grid_constant__ StreamParams a) {
  using S = acc_of<T>;
  const Lane lane = lane_of<kPlanar>(a.tiling, block_from_the_end());
  const Affine<S, kPlanar> affine(a, lane, coefficient_set<kPlanar>(a, lane));
#pragma unroll kAny ? 1 : 4
  for (int k = 0; k < lane.count; ++k) {
    const int64_t at = lane.at + k * lane.step;
    const int n = kWide ? kPack : elements<kPlanar>(lane, k);
    const Pack<S> x = load_pack<T, kWide>(static_cast<const T*>(a.x) + at, a.width, n);
    const int64_t byte = lane.byte + k * lane.byte_step;
    const Pack<S> residual = residual_of<T, kWide>(a, at, n);
    apply_forward<T, kPlanar, kWide, kAny>(a, affine, x, residual, at, byte, n);
  }
}

// Computes: dx = p * u + q * (x - center) + r, dresidual = u, with u = dy * act'(z)
// Reads:    dy once; x once unless it is needed nowhere; mask, or residual, if u needs it
// Writes:   dx, dresidual [N, C, HW] once each
// Traffic:  (3 + needs_dresidual)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes
// Split:    as the forward's
template <typename T, bool kPlanar, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads)
    stream_bwd_apply_kernel(const __grid_constant__ StreamParams a) {
  using S = acc_of<T>;
  const Lane lane = lane_of<kPlanar>(a.tiling, block_from_the_end());
  const int64_t set = coefficient_set<kPlanar>(a, lane);
  const Affine<S, kPlanar> affine(a, lane, set);
  const BackwardMap<S, kPlanar> map{coefficients<S, kPlanar>(lane, a.p, set, S(1)),
                                    coefficients<S, kPlanar>(lane, a.q, set, S(0)),
                                    coefficients<S, kPlanar>(lane, a.r, set, S(0))};
  const bool has_q = a.q != nullptr;
  const bool has_r = has_q || a.r != nullptr;
#pragma unroll kAny ? 1 : 2
  for (int k = 0; k < lane.count; ++k) {
    const int64_t at = lane.at + k * lane.step;
    const int n = kWide ? kPack : elements<kPlanar>(lane, k);
    Pack<S> x{};
    if (has_q || finds_z(a)) x = load_pack<T, kWide>(static_cast<const T*>(a.x) + at, a.width, n);
    const int64_t byte = lane.byte + k * lane.byte_step;
    const Pack<S> dy = load_pack<T, kWide>(static_cast<const T*>(a.dy) + at, a.width, n);
    const Pack<S> u = gradient_at_z<T, kPlanar, kWide, kAny>(a, affine, dy, x, at, byte, n);
    apply_backward<T, kPlanar, kWide>(a, affine, map, has_q, has_r, u, x, at, n);
  }
}

template <typename T>
cudaError_t forward_apply(const StreamParams& a, cudaStream_t stream) {
  const bool any = needs_any(a.act);
  return launch_stream(FUSEDRES_STREAM_KERNEL(stream_fwd_apply_kernel, T, a, any), a, stream);
}

template <typename T>
cudaError_t backward_apply(const StreamParams& a, cudaStream_t stream) {
  const bool any = a.mask == nullptr && needs_any(a.act);
  return launch_stream(FUSEDRES_STREAM_KERNEL(stream_bwd_apply_kernel, T, a, any), a, stream);
}

FUSEDRES_INSTANCES(extern template, forward_apply, StreamParams);  // stream_apply.cu
FUSEDRES_INSTANCES(extern template, backward_apply, StreamParams);

}  // namespace cuda
}  // namespace fusedres
