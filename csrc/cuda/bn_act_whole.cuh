// bn_act in one cooperative launch, for a channels_last tensor that fits in the registers and the
// shared memory of all SMs: every block keeps its tile on the chip between the statistics and the
// apply pass, so that x (and dy) is read once. The grid meets twice: behind the parts of the sums,
// whose channels all warps then share, and behind the coefficients that they find.
#pragma once

#include <cooperative_groups.h>

#include "bn_finalize.cuh"
#include "held.cuh"
#include "stream_apply.cuh"
#include "stream_reduce.cuh"

namespace fusedres {
namespace cuda {

constexpr int kBlockChannels = 32 * kPack;  // the most that a block has (stream.cuh: tx <= 32)

// Packs of each of kTensors that a thread keeps in registers: 32 bytes, of 64 ptxas spills.
template <typename T, int kTensors>
constexpr int kOwnPacks = kTensors * sizeof(T) > 4 ? 1 : 4 / (kTensors * sizeof(T));

// Packs of a thread in shared memory, of one tensor.
__host__ __device__ __forceinline__ int64_t shared_packs(const Tiling& t, int own) {
  const int64_t each = t.tile_rows / t.ty;
  return each > own ? each - own : 0;
}

// The tiles of a column of blocks share its channels, a warp one: f(channel) in all of its lanes.
template <typename F>
__device__ __forceinline__ void for_own_channels(const Tiling& t, const Lane& lane, F f) {
  constexpr int kWarps = kThreads / 32;
  const int64_t channel0 = lane.channel - lane.x * kPack;
  const int64_t end = channel0 + t.tx * kPack < t.c ? channel0 + t.tx * kPack : t.c;
  const int64_t first = channel0 + lane.part * kWarps + threadIdx.x / 32;
  for (int64_t c = first; c < end; c += t.tiles * kWarps) f(c);
}

// Calls add(part) for all parts in the lanes of a warp, and adds up what the lanes then have.
template <typename Add>
__device__ __forceinline__ void warp_parts(const FinalizeParams& f, double* a, double* b, Add add) {
  for (int64_t part = threadIdx.x % 32; part < f.parts; part += 32) add(part);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    *a += __shfl_xor_sync(~0u, *a, lanes);
    *b += __shfl_xor_sync(~0u, *b, lanes);
  }
}

// Computes: mean, var of the batch, and y = act((x - mean) * rstd * weight + bias + residual)
// Reads:    x, residual [N*HW, C] once each
// Writes:   y [N*HW, C], mask one bit an element, mean, var [C]
// Traffic:  (2 + has_residual)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes, + parts below 1% of it
// Split:    one block = a tile of rows and up to 256 channels; of a thread's rows the first are in
//           registers, the others in shared memory
template <typename T, bool kAny>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_fwd_whole_kernel(const __grid_constant__ StreamParams a,
                            const __grid_constant__ FinalizeParams f) {
  using S = acc_of<T>;
  constexpr int kOwn = kOwnPacks<T, 1>;
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  const Lane lane = lane_of<false>(a.tiling, blockIdx.x);
  const T* const from = static_cast<const T*>(a.x) + lane.at;
  Kept<T, kOwn> x{{tile}, {}};
  x.load(from, lane.step, lane.count);
  const int middle =
      fetch_in_two(kOwn, lane.count, [&](int k) { x.fetch(k, from + k * lane.step); });
  Moments<S> mine[kPack] = {};
  Pack<S> first[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) first[k] = x.own[k].unpacked();
  if (lane.count > 0) add_rows(mine, first, lane.count < kOwn ? lane.count : kOwn);
  copy_async_wait<1>();
  nhwc_moments(kOwn, middle, mine, [&](int k) { return x.take(k); });
  copy_async_wait<0>();
  nhwc_moments(middle, lane.count, mine, [&](int k) { return x.take(k); });
  const int64_t channel0 = lane.channel - lane.x * kPack;
  merge_rows(a.tiling, mine, static_cast<S>(lane.count), [&](int channel, const Moments<S>& v) {
    if (channel0 + channel < a.tiling.c) write_part<S>(a, lane.part, channel0 + channel, v);
  });
  cooperative_groups::this_grid().sync();
  for_own_channels(a.tiling, lane, [&](int64_t channel) {
    const double shift = part_mean<S>(f, channel, 0);
    double off = 0, square = 0;
    warp_parts(f, &off, &square,
               [&](int64_t part) { add_moments<S>(f, channel, part, shift, &off, &square); });
    if (threadIdx.x % 32 == 0) set_statistics<S>(f, channel, shift, off, square);
  });
  cooperative_groups::this_grid().sync();
  const Affine<S, false> affine(a, lane, 0);
  const auto apply = [&](int k0, auto packs, auto x_of) {
    constexpr int kCount = decltype(packs)::value;  // whose residuals a thread waits for together
    Pack<S> residual[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = lane.at + (k0 + j) * lane.step;
      if (k0 + j < lane.count) residual[j] = residual_of<T, true>(a, at, kPack);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (k0 + j >= lane.count) break;
      apply_forward<T, false, true, kAny>(a, affine, x_of(j), residual[j],
                                          lane.at + (k0 + j) * lane.step,
                                          lane.byte + (k0 + j) * lane.byte_step, kPack);
    }
  };
  apply(0, std::integral_constant<int, kOwn>(), [&](int j) { return x.own[j].unpacked(); });
  constexpr int kAtOnce = 4;
  for (int k = kOwn; k < lane.count; k += kAtOnce) {
    apply(k, std::integral_constant<int, kAtOnce>(), [&](int j) { return x.take(k + j); });
  }
}

// Computes: dweight, dbias, dx and dresidual at once (stream_bwd_reduce, stream_bwd_apply)
// Reads:    dy, x [N*HW, C] once; mask, or residual, twice if u needs it
// Writes:   dx, dresidual [N*HW, C]; dweight, dbias [C]
// Traffic:  (3 + needs_dresidual)*N*C*HW*sizeof(T) (+ N*C*HW/4) bytes, + parts below 1% of it
// Split:    as the forward's
template <typename T, bool kAny>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_bwd_whole_kernel(const __grid_constant__ StreamParams a,
                            const __grid_constant__ FinalizeParams f) {
  using S = acc_of<T>;
  constexpr int kOwn = kOwnPacks<T, 2>;
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  FUSEDRES_SHARED(S, scale, kBlockChannels);
  const Lane lane = lane_of<false>(a.tiling, blockIdx.x);
  const T* const x_from = static_cast<const T*>(a.x) + lane.at;
  const T* const dy_from = static_cast<const T*>(a.dy) + lane.at;
  Kept<T, kOwn> x{{tile}, {}};
  Kept<T, kOwn> dy{{tile + shared_packs(a.tiling, kOwn) * Held<T>::kWords * kThreads}, {}};
  x.load(x_from, lane.step, lane.count);
  dy.load(dy_from, lane.step, lane.count);
  const int middle = fetch_in_two(kOwn, lane.count, [&](int k) {
    x.fetch(k, x_from + k * lane.step);
    dy.fetch(k, dy_from + k * lane.step);
  });
  const int64_t channel0 = lane.channel - lane.x * kPack;
  const int64_t channel = channel0 + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < a.tiling.tx * kPack && channel < f.c) {
    scale[threadIdx.x] = scale_of(f, channel, static_cast<const S*>(f.given2)[channel]);
  }
  __syncthreads();
  Affine<S, false> affine(a, lane, 0);
#pragma unroll
  for (int i = 0; i < kPack; ++i) affine.scale.v[i] = scale[lane.x * kPack + i];
  const auto gradient = [&](int k, const Pack<S>& x_k, const Pack<S>& dy_k) {
    return gradient_at_z<T, false, true, kAny>(a, affine, dy_k, x_k, lane.at + k * lane.step,
                                               lane.byte + k * lane.byte_step, kPack);
  };
  Sums<S> mine[kPack] = {};
  const auto add = [&](int k, const Pack<S>& x_k, const Pack<S>& dy_k) {
    add_gradients<S, true>(mine, gradient(k, x_k, dy_k), x_k, affine.center, kPack);
  };
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (k < lane.count) add(k, x.own[k].unpacked(), dy.own[k].unpacked());
  }
  copy_async_wait<1>();
  for (int k = kOwn; k < middle; ++k) add(k, x.take(k), dy.take(k));
  copy_async_wait<0>();
  for (int k = middle; k < lane.count; ++k) add(k, x.take(k), dy.take(k));
  merge_rows(a.tiling, mine, S(0), [&](int in_block, const Sums<S>& v) {
    if (channel0 + in_block < a.tiling.c) write_part<S>(a, lane.part, channel0 + in_block, v);
  });
  cooperative_groups::this_grid().sync();
  for_own_channels(a.tiling, lane, [&](int64_t c) {
    double dbias = 0, sum_ux = 0;
    warp_parts(f, &dbias, &sum_ux, [&](int64_t part) { add_sums<S>(f, c, part, &dbias, &sum_ux); });
    if (threadIdx.x % 32 == 0) set_gradients<S>(f, c, dbias, sum_ux);
  });
  cooperative_groups::this_grid().sync();
  const BackwardMap<S, false> map{affine.scale, coefficients<S, false>(lane, a.q, 0, S(0)),
                                  coefficients<S, false>(lane, a.r, 0, S(0))};
  const bool has_q = a.q != nullptr;
  const auto apply = [&](int k, const Pack<S>& x_k, const Pack<S>& dy_k) {
    apply_backward<T, false, true>(a, affine, map, has_q, has_q, gradient(k, x_k, dy_k), x_k,
                                   lane.at + k * lane.step, kPack);
  };
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (k < lane.count) apply(k, x.own[k].unpacked(), dy.own[k].unpacked());
  }
  for (int k = kOwn; k < lane.count; ++k) apply(k, x.take(k), dy.take(k));
}

// The tiling in which all of the tensor is on the chip at once, two blocks an SM; `tiles` is 0
// where there is none.
template <typename T, int kTensors>
Tiling whole_tiling(const StreamParams& a, const Device& device, int64_t* shared_bytes) {
  constexpr int64_t kStatic = 18 * 1024;  // what the kernels declare, rounded up
  Tiling t = a.tiling;
  t.tiles = 0;
  if (t.planar || !is_wide(a) || !device.cooperative || sizeof(T) == 8) return t;
  const int64_t row_tiles = 2 * device.sms / t.col_blocks;
  if (row_tiles == 0) return t;
  // No more parts than the streaming passes have: the workspace is made for those.
  const int64_t least = t.tile_rows / t.ty;
  const int64_t wanted = cdiv(t.rows, row_tiles * t.ty);
  t.tile_rows = (wanted > least ? wanted : least) * t.ty;
  const int64_t held = kTensors * shared_packs(t, kOwnPacks<T, kTensors>);
  *shared_bytes = held * kPack * static_cast<int64_t>(sizeof(T)) * kThreads;
  // A block's share of an SM, less the 1 KiB that the system takes of every block.
  const bool fits = *shared_bytes + kStatic + 1024 <= (device.shared_bytes + 1024) / 2;
  if (fits) t.tiles = cdiv(t.rows, t.tile_rows);
  return t;
}

using WholeKernel = void (*)(StreamParams, FinalizeParams);

// None for float64, of which no tensor has a tiling.
template <typename T>
WholeKernel whole_forward(const StreamParams& a) {
  if constexpr (sizeof(T) < 8) {
    return needs_any(a.act) ? bn_act_fwd_whole_kernel<T, true> : bn_act_fwd_whole_kernel<T, false>;
  } else {
    return nullptr;
  }
}

template <typename T>
WholeKernel whole_backward(const StreamParams& a) {
  if constexpr (sizeof(T) < 8) {
    return finds_z(a) && needs_any(a.act) ? bn_act_bwd_whole_kernel<T, true>
                                          : bn_act_bwd_whole_kernel<T, false>;
  } else {
    return nullptr;
  }
}

inline cudaError_t launch_whole(WholeKernel kernel, const StreamParams& a, FinalizeParams f,
                                int64_t shared_bytes, cudaStream_t stream) {
  f.parts = f.parts_of_run = a.tiling.tiles;
  f.part_length = a.tiling.tile_rows;
  LaunchShape shape{a.tiling.blocks()};
  shape.shared_bytes = shared_bytes;
  shape.cooperative = true;
  return launch(kernel, shape, stream, a, f);
}

}  // namespace cuda
}  // namespace fusedres
