// bn_act in one cooperative launch, for a channels_last tensor that fits in the shared memory of
// all SMs: every block keeps its tile on the chip between the statistics and the apply pass, so
// that x (and dy) is read once.
#pragma once

#include <cooperative_groups.h>

#include "bn_finalize.cuh"
#include "held.cuh"
#include "stream_apply.cuh"
#include "stream_reduce.cuh"

namespace fusedres {
namespace cuda {

constexpr int kBlockChannels = 32 * kPack;  // the most that a block has (stream.cuh: tx <= 32)

// A thread's eight values of an array over the block's channels.
template <typename S>
__device__ __forceinline__ Coefficients<S, false> of_lane(const Lane& lane, const S* from) {
  Coefficients<S, false> k;
#pragma unroll
  for (int i = 0; i < kPack; ++i) k.v[i] = from[lane.x * kPack + i];
  return k;
}

// For this thread's channel of the block: calls f(channel in the block, channel).
template <typename F>
__device__ __forceinline__ void for_own_channel(const Tiling& t, const Lane& lane, F f) {
  const int mine = static_cast<int>(threadIdx.x);
  const int64_t channel = lane.channel - lane.x * kPack + mine;
  if (mine < t.tx * kPack && channel < t.c) f(mine, channel);
}

// Computes: mean, var of the batch, and y = act((x - mean) * rstd * weight + bias + residual)
// Reads:    x, residual [N*HW, C] once each
// Writes:   y [N*HW, C], mask one bit an element, mean, var [C]
// Traffic:  (2 + has_residual)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes, + parts below 1% of it
// Split:    one block = a tile of rows and up to 256 channels, in shared memory; after the grid's
//           barrier every block adds up the parts of its channels, in the same order
template <typename T, bool kAny>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_fwd_whole_kernel(const __grid_constant__ StreamParams a,
                            const __grid_constant__ FinalizeParams f) {
  using S = acc_of<T>;
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  FUSEDRES_SHARED(S, center, kBlockChannels);
  FUSEDRES_SHARED(S, scale, kBlockChannels);
  const Held<T> held{tile};
  const Lane lane = lane_of<false>(a.tiling, blockIdx.x);
  const int64_t channel0 = lane.channel - lane.x * kPack;
  Moments<S> mine[kPack] = {};
  nhwc_moments(lane, mine, [&](int k) {
    return held.keep(k, static_cast<const T*>(a.x) + lane.at + k * lane.step);
  });
  merge_rows(a.tiling, mine, static_cast<S>(lane.count), [&](int channel, const Moments<S>& v) {
    if (channel0 + channel < a.tiling.c) write_part<S>(a, lane.part, channel0 + channel, v);
  });
  cooperative_groups::this_grid().sync();
  for_own_channel(a.tiling, lane, [&](int in_block, int64_t channel) {
    const S* sums = static_cast<const S*>(a.part1) + channel;
    const S* m2s = static_cast<const S*>(a.part2) + channel;
    const double shift = static_cast<double>(sums[0]) / part_count(f, 0);
    double off = 0;
    double square = 0;
#pragma unroll 8
    for (int64_t part = 0; part < f.parts; ++part) {
      const double n = part_count(f, part);
      const double d = static_cast<double>(sums[part * f.c]) / n - shift;
      off += n * d;
      square += static_cast<double>(m2s[part * f.c]) + n * d * d;
    }
    const Statistics<S> found = statistics<S>(f, shift, off, square);
    center[in_block] = found.mean;
    scale[in_block] = scale_of(f, channel, found.var);
    if (lane.part != 0) return;
    static_cast<S*>(f.out1)[channel] = found.mean;
    static_cast<S*>(f.out2)[channel] = found.var;
  });
  __syncthreads();
  Affine<S, false> affine;
  affine.center = of_lane(lane, center);
  affine.scale = of_lane(lane, scale);
  affine.bias = coefficients<S, false>(lane, a.bias, 0, S(0));
  for (int k = 0; k < lane.count; ++k) {
    const int64_t at = lane.at + k * lane.step;
    const int64_t byte = lane.byte + k * lane.byte_step;
    apply_forward<T, false, true, kAny>(a, affine, held.take(k), at, byte, kPack);
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
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  FUSEDRES_SHARED(S, scale, kBlockChannels);
  FUSEDRES_SHARED(S, q, kBlockChannels);
  FUSEDRES_SHARED(S, r, kBlockChannels);
  const Lane lane = lane_of<false>(a.tiling, blockIdx.x);
  const int64_t channel0 = lane.channel - lane.x * kPack;
  const Held<T> x_held{tile};
  const Held<T> dy_held{tile + a.tiling.tile_rows / a.tiling.ty * Held<T>::kWords * kThreads};
  for_own_channel(a.tiling, lane, [&](int in_block, int64_t channel) {
    scale[in_block] = scale_of(f, channel, static_cast<const S*>(f.given2)[channel]);
  });
  __syncthreads();
  Affine<S, false> affine;
  affine.center = coefficients<S, false>(lane, f.given1, 0, S(0));
  affine.scale = of_lane(lane, scale);
  affine.bias = coefficients<S, false>(lane, a.bias, 0, S(0));
  Sums<S> mine[kPack] = {};
  for (int k = 0; k < lane.count; ++k) {
    const int64_t at = lane.at + k * lane.step;
    const int64_t byte = lane.byte + k * lane.byte_step;
    const Pack<S> x = x_held.keep(k, static_cast<const T*>(a.x) + at);
    const Pack<S> dy = dy_held.keep(k, static_cast<const T*>(a.dy) + at);
    const Pack<S> u = gradient_at_z<T, false, true, kAny>(a, affine, dy, x, at, byte, kPack);
    add_gradients<S, true>(mine, u, x, affine.center, kPack);
  }
  merge_rows(a.tiling, mine, S(0), [&](int channel, const Sums<S>& v) {
    if (channel0 + channel < a.tiling.c) write_part<S>(a, lane.part, channel0 + channel, v);
  });
  cooperative_groups::this_grid().sync();
  for_own_channel(a.tiling, lane, [&](int in_block, int64_t channel) {
    double dbias = 0;
    double sum_ux = 0;
#pragma unroll 8
    for (int64_t part = 0; part < f.parts; ++part) {
      dbias += static_cast<double>(static_cast<const S*>(a.part1)[part * f.c + channel]);
      sum_ux += static_cast<double>(static_cast<const S*>(a.part2)[part * f.c + channel]);
    }
    const Gradients<S> found = gradients_of<S>(f, channel, dbias, sum_ux);
    q[in_block] = found.q;
    r[in_block] = found.r;
    if (lane.part != 0) return;
    static_cast<S*>(f.out1)[channel] = found.dbias;
    static_cast<S*>(f.out2)[channel] = found.dweight;
  });
  __syncthreads();
  const BackwardMap<S, false> map{affine.scale, of_lane(lane, q), of_lane(lane, r)};
  const bool has_q = f.q != nullptr;
  for (int k = 0; k < lane.count; ++k) {
    const int64_t at = lane.at + k * lane.step;
    const int64_t byte = lane.byte + k * lane.byte_step;
    const Pack<S> x = x_held.take(k);
    const Pack<S> u =
        gradient_at_z<T, false, true, kAny>(a, affine, dy_held.take(k), x, at, byte, kPack);
    apply_backward<T, false, true>(a, affine, map, has_q, has_q, u, x, at, kPack);
  }
}

// The tiling in which all of the tensor is on the chip at once, two blocks an SM; `tiles` is 0
// where there is none.
inline Tiling whole_tiling(const StreamParams& a, const Device& device, int held_tensors, int size,
                           int64_t* shared_bytes) {
  constexpr int64_t kStatic = 24 * 1024;  // what the kernels declare, rounded up
  Tiling t = a.tiling;
  t.tiles = 0;
  if (t.planar || !is_wide(a) || !device.cooperative || size == 8) return t;
  const int64_t row_tiles = 2 * device.sms / t.col_blocks;
  if (row_tiles == 0) return t;
  // No more parts than the streaming passes have: the workspace is made for those.
  const int64_t least = t.tile_rows / t.ty;
  const int64_t wanted = cdiv(t.rows, row_tiles * t.ty);
  const int64_t each = wanted > least ? wanted : least;
  *shared_bytes = each * held_tensors * kPack * size * kThreads;
  // A block's share of an SM, less the 1 KiB that the system takes of every block.
  if (*shared_bytes + kStatic + 1024 > (device.shared_bytes + 1024) / 2) return t;
  t.tile_rows = each * t.ty;
  t.tiles = cdiv(t.rows, t.tile_rows);
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

// Every block adds up all parts of its channels in double. A part is some 20 operations on up to
// 256 channels, and where double is slow (2 a clock and SM on sm_86, sm_89, sm_120) 1 us: more than
// the second read that it saves. How many parts are few enough was not measured.
constexpr int kSlowDouble = 32;
constexpr int64_t kFewParts = 4;

inline bool merges_slowly(const Tiling& t, const Device& device) {
  return device.double_ratio >= kSlowDouble && t.tiles > kFewParts;
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
