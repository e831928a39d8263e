// The reductions over pixels: moments of x, and the sums of the backward. They write parts, which
// bn_finalize.cuh adds up in a fixed order.
#pragma once

#include "stream.cuh"

namespace fusedres {
namespace cuda {

// Of `count` values: their sum, and the sum of squared deviations from their mean. The sum and not
// the mean, because a running mean keeps the rounding of what it was before.
template <typename S>
struct Moments {
  S sum, m2, count;
};

// Chan, Golub and LeVeque 1983, eq. 2.1
template <typename S>
__device__ __forceinline__ void merge(Moments<S>* a, const Moments<S>& b) {
  if (b.count == S(0)) return;
  if (a->count == S(0)) {
    *a = b;
    return;
  }
  const S total = a->count + b.count;
  const S delta = b.sum / b.count - a->sum / a->count;
  a->sum += b.sum;
  a->m2 += b.m2 + delta * delta * (a->count * b.count / total);
  a->count = total;
}

// The sums of u and of u * (x - center).
template <typename S>
struct Sums {
  S u, ux;
};

template <typename S>
__device__ __forceinline__ void merge(Sums<S>* a, const Sums<S>& b) {
  a->u += b.u;
  a->ux += b.ux;
}

template <typename S>
__device__ __forceinline__ Moments<S> shuffled(const Moments<S>& v, int lanes) {
  return {__shfl_xor_sync(~0u, v.sum, lanes), __shfl_xor_sync(~0u, v.m2, lanes),
          __shfl_xor_sync(~0u, v.count, lanes)};
}

template <typename S>
__device__ __forceinline__ Sums<S> shuffled(const Sums<S>& v, int lanes) {
  return {__shfl_xor_sync(~0u, v.u, lanes), __shfl_xor_sync(~0u, v.ux, lanes)};
}

// NCHW: the tx threads of a plane's segment are lanes of one warp.
template <typename V>
__device__ __forceinline__ void merge_lanes(V* mine, int tx) {
  for (int lanes = tx / 2; lanes > 0; lanes /= 2) {
    // Both of a pair compute the same merge, lower lane first, so that they agree.
    const V other = shuffled(*mine, lanes);
    V first = *mine;
    V second = other;
    if ((threadIdx.x & lanes) != 0) {
      first = other;
      second = *mine;
    }
    merge(&first, second);
    *mine = first;
  }
}

template <typename S>
__device__ __forceinline__ void unpack(const Moments<S>& v, S* first, S* second) {
  *first = v.sum;
  *second = v.m2;
}

template <typename S>
__device__ __forceinline__ void unpack(const Sums<S>& v, S* first, S* second) {
  *first = v.u;
  *second = v.ux;
}

constexpr int kStride = kThreads + 4;  // keeps the columns of a pack in different banks

template <typename S>
__device__ __forceinline__ void pack_up(Moments<S>* v, S first, S second, S count) {
  *v = {first, second, count};
}
template <typename S>
__device__ __forceinline__ void pack_up(Sums<S>* v, S first, S second, S) {
  *v = {first, second};
}

// NHWC: merges the ty threads that share a channel, top to bottom, and calls write(channel of the
// block, merged value) in one thread a channel. `count`: of this thread's values.
template <typename S, typename V, typename Write>
__device__ __forceinline__ void merge_rows(const Tiling& t, const V (&mine)[kPack], S count,
                                           Write write) {
  FUSEDRES_SHARED(S, first, kPack * kStride);
  FUSEDRES_SHARED(S, second, kPack * kStride);
  FUSEDRES_SHARED(S, counts, kThreads);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    unpack(mine[i], &first[i * kStride + threadIdx.x], &second[i * kStride + threadIdx.x]);
  }
  counts[threadIdx.x] = count;
  __syncthreads();
  const int channels = t.tx * kPack;
  if (static_cast<int>(threadIdx.x) >= channels) return;
  const int x = static_cast<int>(threadIdx.x) / kPack;
  const int i = static_cast<int>(threadIdx.x) % kPack;
  V total{};
  for (int y = 0; y < t.ty; ++y) {
    const int thread = y * t.tx + x;
    V part;
    pack_up(&part, first[i * kStride + thread], second[i * kStride + thread], counts[thread]);
    merge(&total, part);
  }
  write(static_cast<int>(threadIdx.x), total);
}

template <typename S, typename V>
__device__ __forceinline__ void write_part(const StreamParams& a, int64_t part, int64_t channel,
                                           const V& v) {
  const int64_t at = part * a.tiling.c + channel;
  unpack(v, static_cast<S*>(a.part1) + at, static_cast<S*>(a.part2) + at);
}

// Moments of up to kRows rows of a pack, each channel for itself: the values are in registers, so
// the deviations are from their own mean.
template <typename S, int kRows>
__device__ __forceinline__ void add_rows(Moments<S> (&to)[kPack], const Pack<S> (&rows)[kRows],
                                         int n) {
  const S count = static_cast<S>(n);
  const S before = to[0].count;
  const S weight = before * count / (before + count);
  const S mean_before = before > S(0) ? S(1) / before : S(0);
  const S mean_now = S(1) / count;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    S sum = S(0);
#pragma unroll
    for (int k = 0; k < kRows; ++k) sum += k < n ? rows[k][i] : S(0);
    const S mean = sum * mean_now;
    S m2 = S(0);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const S off = rows[k][i] - mean;
      m2 += k < n ? off * off : S(0);
    }
    const S delta = mean - to[i].sum * mean_before;
    to[i].sum += sum;
    to[i].m2 += m2 + (before > S(0) ? delta * delta * weight : S(0));
    to[i].count = before + count;
  }
}

constexpr int kRowsAtOnce = 4;

// The moments of packs k to end of a lane, each channel for itself; load(k) gives the k-th.
template <typename S, typename Load>
__device__ __forceinline__ void nhwc_moments(int k, int end, Moments<S> (&mine)[kPack], Load load) {
  for (; k < end; k += kRowsAtOnce) {
    Pack<S> rows[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      rows[j] = {};
      if (k + j < end) rows[j] = load(k + j);
    }
    add_rows(mine, rows, end - k < kRowsAtOnce ? end - k : kRowsAtOnce);
  }
}

// Adds the moments of n values of one channel; beyond n there are zeros.
template <bool kWide, typename S>
__device__ __forceinline__ void add_pack(Moments<S>* to, const Pack<S>& x, int n) {
  Moments<S> pack{S(0), S(0), static_cast<S>(n)};
#pragma unroll
  for (int i = 0; i < kPack; ++i) pack.sum += x[i];
  const S mean = pack.sum / pack.count;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const S off = x[i] - mean;
    pack.m2 += kWide || i < n ? off * off : S(0);
  }
  merge(to, pack);
}

template <typename T, bool kWide>
__device__ __forceinline__ Moments<acc_of<T>> nchw_moments(const StreamParams& a,
                                                           const Lane& lane) {
  Moments<acc_of<T>> mine{};
  for (int k = 0; k < lane.count; ++k) {
    const int n = kWide ? kPack : elements<true>(lane, k);
    const T* from = static_cast<const T*>(a.x) + lane.at + k * lane.step;
    add_pack<kWide>(&mine, load_pack<T, kWide>(from, a.width, n), n);
  }
  return mine;
}

// Computes: sum, and sum of squared deviations from the mean, of each part of each channel
// Reads:    x [N, C, HW] once
// Writes:   part1, part2 [parts, C] acc_t
// Traffic:  N*C*HW*sizeof(T) bytes, + 2*parts*C*sizeof(acc_t): below 1% of it
// Split:    one block = a tile (stream.cuh); a thread merges groups of 4 rows, or of 8 pixels, by
//           Chan's formula, then the block merges its threads
template <typename T, bool kPlanar, bool kWide>
__global__ void __launch_bounds__(kThreads)
    stream_stats_kernel(const __grid_constant__ StreamParams a) {
  using S = acc_of<T>;
  const Lane lane = lane_of<kPlanar>(a.tiling, blockIdx.x);
  if constexpr (kPlanar) {
    Moments<S> mine = nchw_moments<T, kWide>(a, lane);
    merge_lanes(&mine, a.tiling.tx);
    if (lane.x == 0 && lane.count > 0) write_part<S>(a, lane.part, lane.channel, mine);
  } else {
    Moments<S> mine[kPack] = {};
    const int n = kWide ? kPack : elements<false>(lane, 0);
    nhwc_moments(0, lane.count, mine, [&](int k) {
      const T* from = static_cast<const T*>(a.x) + lane.at + k * lane.step;
      return load_pack<T, kWide>(from, a.width, n);
    });
    const int64_t channel0 = lane.channel - lane.x * kPack;
    merge_rows(a.tiling, mine, static_cast<S>(lane.count), [&](int channel, const Moments<S>& v) {
      if (channel0 + channel < a.tiling.c) write_part<S>(a, lane.part, channel0 + channel, v);
    });
  }
}

template <typename S, bool kWide, bool kPlanar>
__device__ __forceinline__ void add_gradients(Sums<S> (&to)[kPack], const Pack<S>& u,
                                              const Pack<S>& x,
                                              const Coefficients<S, kPlanar>& center, int n) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (kWide || i < n) {
      to[i].u += u[i];
      to[i].ux += u[i] * (x[i] - center[i]);
    }
  }
}

// Computes: the sums of u and u * (x - center) of each part of each channel, u = dy * act'(z)
// Reads:    dy, x [N, C, HW] once; mask, or residual, if u needs it
// Writes:   part1, part2 [parts, C] acc_t
// Traffic:  2*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes, + 2*parts*C*sizeof(acc_t)
// Split:    one block = a tile (stream.cuh); a thread adds at most 64 values, the block its threads
template <typename T, bool kPlanar, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kWide>)
    stream_bwd_reduce_kernel(const __grid_constant__ StreamParams a) {
  using S = acc_of<T>;
  const Lane lane = lane_of<kPlanar>(a.tiling, blockIdx.x);
  const Affine<S, kPlanar> affine(a, lane, coefficient_set<kPlanar>(a, lane));
  Sums<S> mine[kPack] = {};
#pragma unroll kAny ? 1 : 4
  for (int k = 0; k < lane.count; ++k) {
    const int64_t at = lane.at + k * lane.step;
    const int64_t byte = lane.byte + k * lane.byte_step;
    const int n = kWide ? kPack : elements<kPlanar>(lane, k);
    const Pack<S> x = load_pack<T, kWide>(static_cast<const T*>(a.x) + at, a.width, n);
    const Pack<S> dy = load_pack<T, kWide>(static_cast<const T*>(a.dy) + at, a.width, n);
    const Pack<S> u = gradient_at_z<T, kPlanar, kWide, kAny>(a, affine, dy, x, at, byte, n);
    add_gradients<S, kWide>(mine, u, x, affine.center, n);
  }
  if constexpr (kPlanar) {
    Sums<S> total = mine[0];
#pragma unroll
    for (int i = 1; i < kPack; ++i) merge(&total, mine[i]);
    merge_lanes(&total, a.tiling.tx);
    if (lane.x == 0 && lane.count > 0) write_part<S>(a, lane.part, lane.channel, total);
  } else {
    const int64_t channel0 = lane.channel - lane.x * kPack;
    merge_rows(a.tiling, mine, S(0), [&](int channel, const Sums<S>& v) {
      if (channel0 + channel < a.tiling.c) write_part<S>(a, lane.part, channel0 + channel, v);
    });
  }
}

template <typename T>
cudaError_t stream_stats(const StreamParams& a, cudaStream_t stream) {
  constexpr bool kWide = sizeof(T) < 8;
  const StreamKernel kernels[2][2] = {
      {stream_stats_kernel<T, false, false>, stream_stats_kernel<T, true, false>},
      {stream_stats_kernel<T, false, kWide>, stream_stats_kernel<T, true, kWide>}};
  return launch_stream(kernels[is_wide(a)][a.tiling.planar], a, stream);
}

template <typename T>
cudaError_t backward_reduce(const StreamParams& a, cudaStream_t stream) {
  const bool any = a.mask == nullptr && needs_any(a.act);
  return launch_stream(FUSEDRES_STREAM_KERNEL(stream_bwd_reduce_kernel, T, a, any), a, stream);
}

FUSEDRES_INSTANCES(extern template, stream_stats, StreamParams);  // stream_reduce.cu
FUSEDRES_INSTANCES(extern template, backward_reduce, StreamParams);

}  // namespace cuda
}  // namespace fusedres
