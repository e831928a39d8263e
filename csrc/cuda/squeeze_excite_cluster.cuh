// squeeze_excite in one launch: a cluster of 1, 2, 4 or 8 blocks holds an image in its shared
// memory and exchanges the squeeze, the hidden values and the gates through it, so that x is read
// once.
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
  const void *w1, *b1, *w2, *b2;
  void *squeezed, *hidden, *logits;
  Act act;
  Gate gate;
};

// A block's arrays behind its tile.
template <typename S>
struct SeArrays {
  S* partial;  // [ty, C] sums of the threads
  S* sums;     // [C] sums of the block, read by the cluster
  S* pooled;   // [C] means of the image
  S* hidden;   // [R], written by the cluster, like gates
  S* gates;    // [C]
  __device__ __forceinline__ SeArrays(uint4* tile, int64_t words, const SeClusterParams& m) {
    partial = reinterpret_cast<S*>(tile + words);
    sums = partial + m.ty * m.c;
    pooled = sums + m.c;
    hidden = pooled + m.c;
    gates = hidden + m.r;
  }
  static int64_t bytes(const SeClusterParams& m) {
    return static_cast<int64_t>(sizeof(S)) * ((m.ty + 3) * m.c + m.r);
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

// sums[c] of this block's rows, which it keeps in shared memory.
template <typename T, typename S>
__device__ __forceinline__ void hold_and_sum(const StreamParams& a, const SeClusterParams& m,
                                             const Held<T>& held, const SeArrays<S>& s, int64_t at,
                                             int count) {
  const int x = static_cast<int>(threadIdx.x) % m.tx;
  const int y = static_cast<int>(threadIdx.x) / m.tx;
  S sums[kPack] = {};
#pragma unroll 8
  for (int k = 0; k < count; ++k) {
    const Pack<S> v = held.keep(k, static_cast<const T*>(a.x) + at + k * m.ty * m.c);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sums[i] += v[i];
  }
  if (y < m.ty) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) s.partial[y * m.c + x * kPack + i] = sums[i];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < m.c; c += kThreads) {
    S sum = S(0);
    for (int i = 0; i < m.ty; ++i) sum += s.partial[i * m.c + c];
    s.sums[c] = sum;
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
  const int64_t image = quotient(blockIdx.x, m.cluster);
  const int64_t rank = blockIdx.x - image * m.cluster;
  const int64_t row = rank * m.rows + threadIdx.x / m.tx;
  const int64_t end = (rank + 1) * m.rows < m.hw ? (rank + 1) * m.rows : m.hw;
  const bool works = static_cast<int>(threadIdx.x) / m.tx < m.ty && row < end;
  const int count = works ? static_cast<int>((end - row - 1) / m.ty) + 1 : 0;
  const int64_t pack = threadIdx.x % m.tx;
  const int64_t at = (image * m.hw + row) * m.c + pack * kPack;
  hold_and_sum(a, m, held, s, at, count);
  cluster_sync();
  for (int64_t c = threadIdx.x; c < m.c; c += kThreads) {
    S sum = S(0);
    for (int peer = 0; peer < m.cluster; ++peer) sum += cluster_peer(s.sums, peer)[c];
    s.pooled[c] = sum / static_cast<S>(m.hw);
    if (rank == 0) static_cast<S*>(m.squeezed)[image * m.c + c] = s.pooled[c];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_own_outputs(m.r, rank, m.cluster, [&](int64_t o) {
    const S v = warp_dot<S>(m.w1, m.b1, o, m.c, [&](int64_t k) { return s.pooled[k]; });
    if (lane < m.cluster) cluster_peer(s.hidden, lane)[o] = act_forward(m.act, v);
    if (lane == 0) static_cast<S*>(m.hidden)[image * m.r + o] = v;
  });
  cluster_sync();
  for_own_outputs(m.c, rank, m.cluster, [&](int64_t c) {
    const S v = warp_dot<S>(m.w2, m.b2, c, m.r, [&](int64_t k) { return s.hidden[k]; });
    if (lane < m.cluster) cluster_peer(s.gates, lane)[c] = gate_forward(m.gate, v);
    if (lane == 0) static_cast<S*>(m.logits)[image * m.c + c] = v;
  });
  cluster_sync();
  Affine<S, false> affine{};
  if (count == 0) return;
#pragma unroll
  for (int i = 0; i < kPack; ++i) affine.scale.v[i] = s.gates[pack * kPack + i];
  const int64_t byte = (image * m.hw + row) * m.tx + pack;
  for (int k = 0; k < count; ++k) {
    apply_forward<T, false, true, kAny>(a, affine, held.take(k), at + k * m.ty * m.c,
                                        byte + k * m.ty * m.tx, kPack);
  }
}

// How a cluster holds an image: `cluster` is 0 where none can. The smallest that fits, and more
// while there are SMs without an image.
inline void se_cluster_split(const StreamParams& a, const Device& device, int size,
                             SeClusterParams* m, int64_t* shared_bytes) {
  m->cluster = 0;
  if (a.tiling.planar || !is_wide(a) || size == 8 || a.tiling.packs > kThreads) return;
  m->tx = static_cast<int>(a.tiling.packs);
  m->ty = kThreads / m->tx;
  for (int blocks = 1; blocks <= (device.major >= 9 ? 8 : 1); blocks *= 2) {
    const int64_t rows = cdiv(m->hw, blocks);
    const int64_t each = cdiv(rows, m->ty);
    const int64_t bytes = each * kPack * size * kThreads + SeArrays<float>::bytes(*m);
    const bool idle = m->cluster > 0 && m->n * m->cluster < device.sms && rows >= m->ty;
    if (bytes > device.shared_bytes || (m->cluster > 0 && !idle)) continue;
    m->cluster = blocks;
    m->rows = rows;
    m->each = each;
    *shared_bytes = bytes;
  }
}

template <typename T>
cudaError_t launch_se_cluster(const StreamParams& a, const SeClusterParams& m, int64_t shared_bytes,
                              cudaStream_t stream) {
  LaunchShape shape{m.n * m.cluster};
  shape.shared_bytes = shared_bytes;
  shape.cluster = m.cluster;
  const auto kernel =
      needs_any(a.act) ? se_fwd_cluster_kernel<T, true> : se_fwd_cluster_kernel<T, false>;
  return launch(kernel, shape, stream, a, m);
}

}  // namespace cuda
}  // namespace fusedres
