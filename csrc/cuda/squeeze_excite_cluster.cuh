// squeeze_excite in one launch: a cluster of 1, 2, 4 or 8 blocks holds an image in its shared
// memory and exchanges the squeeze, the hidden values and the gates through it, so that x is read
// once. The backward: squeeze_excite_cluster_bwd.cuh.
#pragma once

#include "held.cuh"
#include "se_mlp.cuh"
#include "stream_apply.cuh"

namespace fusedres {
namespace cuda {

struct SeClusterParams {
  int64_t n, c, hw, r;
  int64_t rows, each;  // rows of a block, of a thread
  int tx, ty, cluster;
  int held;  // tensors in shared memory
  const void *w1, *b1, *w2, *b2;
  void *squeezed, *hidden, *logits;
  void *dlogits, *dhidden;  // backward
  Act act;
  Gate gate;
};

// What a thread walks over: `count` packs of an image, ty rows apart.
struct SeLane {
  int64_t image, rank;  // rank: of the block in the cluster
  int64_t pack;         // the channels, of every row
  int64_t at, byte;     // of the first pack: element, and byte of the mask
  int count;
};

__device__ __forceinline__ SeLane se_lane_of(const SeClusterParams& m) {
  SeLane lane{};
  lane.image = quotient(blockIdx.x, m.cluster);
  lane.rank = blockIdx.x - lane.image * m.cluster;
  lane.pack = threadIdx.x % m.tx;
  const int64_t row = lane.rank * m.rows + threadIdx.x / m.tx;
  const int64_t end = (lane.rank + 1) * m.rows < m.hw ? (lane.rank + 1) * m.rows : m.hw;
  lane.at = (lane.image * m.hw + row) * m.c + lane.pack * kPack;
  lane.byte = (lane.image * m.hw + row) * m.tx + lane.pack;
  const bool works = static_cast<int>(threadIdx.x) / m.tx < m.ty && row < end;
  if (works) lane.count = static_cast<int>((end - row - 1) / m.ty) + 1;
  return lane;
}

// A block's arrays behind its tile. Two take the place of what nobody reads any more.
template <typename S>
struct SeArrays {
  S* partial;  // [ty, C] sums of the threads
  S* pooled;   // [C] means of the image, where partial was
  S* sums;     // [C] sums of the block, read by the cluster
  S* gates;    // [C], written by the cluster like hidden, where the sums were
  S* hidden;   // [R]
  __device__ __forceinline__ SeArrays(uint4* tile, int64_t words, const SeClusterParams& m) {
    partial = pooled = reinterpret_cast<S*>(tile + words);
    sums = gates = partial + m.ty * m.c;
    hidden = sums + m.c;
  }
  static int64_t bytes(const SeClusterParams& m) {
    return static_cast<int64_t>(sizeof(S)) * ((m.ty + 1) * m.c + m.r);
  }
};

// dot(w[row], in) + bias[row] in every lane of a warp.
template <typename S, typename In>
__device__ __forceinline__ S warp_dot(const void* w, const void* bias, int64_t row, int64_t k_end,
                                      In in) {
  S sum = S(0);
  for (int64_t k = threadIdx.x % 32; k < k_end; k += 32) {
    sum += in(k) * static_cast<const S*>(w)[row * k_end + k];
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  return bias == nullptr ? sum : sum + static_cast<const S*>(bias)[row];
}

// For this warp's share of `count` outputs: f(output).
template <typename F>
__device__ __forceinline__ void for_own_outputs(int64_t count, int64_t rank, int cluster, F f) {
  constexpr int kWarps = kThreads / 32;
  const int64_t first = rank * kWarps + threadIdx.x / 32;
  for (int64_t o = first; o < count; o += static_cast<int64_t>(cluster) * kWarps) f(o);
}

// sums[c] of the block, from those of its threads; partial: [ty, C].
template <typename S>
__device__ __forceinline__ void block_sums(const SeClusterParams& m, const S (&mine)[kPack],
                                           S* partial, S* sums) {
  const int x = static_cast<int>(threadIdx.x) % m.tx;
  const int y = static_cast<int>(threadIdx.x) / m.tx;
  if (y < m.ty) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) partial[y * m.c + x * kPack + i] = mine[i];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < m.c; c += kThreads) {
    S sum = S(0);
    for (int i = 0; i < m.ty; ++i) sum += partial[i * m.c + c];
    sums[c] = sum;
  }
}

// Computes: squeezed = mean_hw x; hidden, logits: the MLP; y = act(x * gate(logits) + residual)
// Reads:    x, residual [N, HW, C] once each; the weights from L2, once an image
// Writes:   y [N, HW, C], mask one bit an element; squeezed, hidden, logits [N, C or R]
// Traffic:  (2 + has_residual)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes
// Split:    one cluster = one image, a block some of its rows in shared memory; each block computes
//           its share of the MLP's outputs and gives them to all
template <typename T, bool kAny>
__global__ void __launch_bounds__(kThreads, 1)
    se_fwd_cluster_kernel(const __grid_constant__ StreamParams a,
                          const __grid_constant__ SeClusterParams m) {
  using S = acc_of<T>;
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  const Held<T> held{tile};
  const SeArrays<S> s(tile, m.each * Held<T>::kWords * kThreads, m);
  const SeLane own = se_lane_of(m);
  const auto element = [&](int k) { return own.at + k * m.ty * m.c; };
  const int middle = fetch_in_two(
      0, own.count, [&](int k) { held.fetch(k, static_cast<const T*>(a.x) + element(k)); });
  S mine[kPack] = {};
  const auto add = [&](int k) {
    const Pack<S> v = held.take(k);
#pragma unroll
    for (int i = 0; i < kPack; ++i) mine[i] += v[i];
  };
  copy_async_wait<1>();
  for (int k = 0; k < middle; ++k) add(k);
  copy_async_wait<0>();
  for (int k = middle; k < own.count; ++k) add(k);
  block_sums(m, mine, s.partial, s.sums);
  cluster_sync();
  for (int64_t c = threadIdx.x; c < m.c; c += kThreads) {
    S sum = S(0);
    for (int peer = 0; peer < m.cluster; ++peer) sum += cluster_peer(s.sums, peer)[c];
    s.pooled[c] = sum / static_cast<S>(m.hw);
    if (own.rank == 0) static_cast<S*>(m.squeezed)[own.image * m.c + c] = s.pooled[c];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_own_outputs(m.r, own.rank, m.cluster, [&](int64_t o) {
    const S v = warp_dot<S>(m.w1, m.b1, o, m.c, [&](int64_t k) { return s.pooled[k]; });
    if (lane < m.cluster) cluster_peer(s.hidden, lane)[o] = act_forward(m.act, v);
    if (lane == 0) static_cast<S*>(m.hidden)[own.image * m.r + o] = v;
  });
  cluster_sync();
  for_own_outputs(m.c, own.rank, m.cluster, [&](int64_t c) {
    const S v = warp_dot<S>(m.w2, m.b2, c, m.r, [&](int64_t k) { return s.hidden[k]; });
    if (lane < m.cluster) cluster_peer(s.gates, lane)[c] = gate_forward(m.gate, v);
    if (lane == 0) static_cast<S*>(m.logits)[own.image * m.c + c] = v;
  });
  cluster_sync();
  Affine<S, false> affine{};
  if (own.count == 0) return;
#pragma unroll
  for (int i = 0; i < kPack; ++i) affine.scale.v[i] = s.gates[own.pack * kPack + i];
  in_batches<4>(own.count, [&](int k0, auto packs) {
    Pack<S> residual[decltype(packs)::value];
#pragma unroll
    for (int j = 0; j < decltype(packs)::value; ++j) {
      residual[j] = residual_of<T, true>(a, element(k0 + j), kPack);
    }
#pragma unroll
    for (int j = 0; j < decltype(packs)::value; ++j) {
      const int64_t byte = own.byte + (k0 + j) * m.ty * m.tx;
      apply_forward<T, false, true, kAny>(a, affine, held.take(k0 + j), residual[j],
                                          element(k0 + j), byte, kPack);
    }
  });
}

// How a cluster of up to `most` blocks holds an image: `cluster` is 0 where none can. The smallest
// that fits, and more while there are SMs without an image. arrays: bytes of what lies behind a
// block's tile.
inline void se_cluster_split(const StreamParams& a, const Device& device, int most, int size,
                             int64_t (*arrays)(const SeClusterParams&), SeClusterParams* m,
                             int64_t* shared_bytes) {
  m->cluster = 0;
  if (a.tiling.planar || !is_wide(a) || size == 8 || a.tiling.packs > kThreads) return;
  m->tx = static_cast<int>(a.tiling.packs);
  m->ty = kThreads / m->tx;
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const int64_t rows = cdiv(m->hw, blocks);
    const int64_t each = cdiv(rows, m->ty);
    const int64_t bytes = m->held * each * kPack * size * kThreads + arrays(*m);
    const bool idle = m->cluster > 0 && m->n * m->cluster < device.sms && rows >= m->ty;
    if (bytes > device.shared_bytes || (m->cluster > 0 && !idle)) continue;
    m->cluster = blocks;
    m->rows = rows;
    m->each = each;
    *shared_bytes = bytes;
  }
}

inline LaunchShape se_cluster_shape(const SeClusterParams& m, int64_t shared_bytes) {
  LaunchShape shape{m.n * m.cluster};
  shape.shared_bytes = shared_bytes;
  shape.cluster = m.cluster;
  return shape;
}

using SeClusterKernel = void (*)(StreamParams, SeClusterParams);

// None for float64, of which no cluster holds an image.
template <typename T>
SeClusterKernel se_forward_kernel(const StreamParams& a) {
  if constexpr (sizeof(T) < 8) {
    return needs_any(a.act) ? se_fwd_cluster_kernel<T, true> : se_fwd_cluster_kernel<T, false>;
  } else {
    return nullptr;
  }
}

}  // namespace cuda
}  // namespace fusedres
