// The backward of squeeze_excite for a cluster that holds an image: dy stays in its shared memory
// between the sums and dx, and x does where z has to be found again (no mask), so that each is read
// once.
#pragma once

#include "squeeze_excite_cluster.cuh"

namespace fusedres {
namespace cuda {

// A block's arrays behind its tile.
template <typename S>
struct SeBackwardArrays {
  S* partial;  // [ty, C] sums of the threads; then [threads / R, R]
  // [C]: sums of the block, read by the cluster. Each block puts dlogits in the place of those of
  // its own channels, which no other reads; at last it gives dpooled of these to all blocks.
  S* channels;
  S* part;     // [R]: of dhidden, from the block's channels; read by the cluster
  S* dhidden;  // [R]
  __device__ __forceinline__ SeBackwardArrays(uint4* behind_tile, const SeClusterParams& m) {
    partial = reinterpret_cast<S*>(behind_tile);
    channels = partial + partial_count(m);
    part = channels + m.c;
    dhidden = part + m.r;
  }
  static int64_t bytes(const SeClusterParams& m) {
    return static_cast<int64_t>(sizeof(S)) * (partial_count(m) + m.c + 2 * m.r);
  }

 private:
  __host__ __device__ static int64_t partial_count(const SeClusterParams& m) {
    const int64_t products = m.r < kThreads ? kThreads : m.r;
    return m.ty * m.c < products ? products : m.ty * m.c;
  }
};

// part[r] = sum of dlogits[c] * w2[c, r] over the block's channels.
template <typename S>
__device__ __forceinline__ void sum_dhidden(const SeClusterParams& m, int64_t begin, int64_t end,
                                            const SeBackwardArrays<S>& s) {
  // Neighbours take neighbouring columns of w2; what is left of the threads, other rows.
  const int width = m.r < kThreads ? static_cast<int>(m.r) : kThreads;
  const int rows = kThreads / width;
  const int row = static_cast<int>(threadIdx.x) / width;
  const S* const w2 = static_cast<const S*>(m.w2);
  for (int64_t r = threadIdx.x % width; r < m.r && row < rows; r += width) {
    s.partial[row * m.r + r] = chained_sum<S>(
        begin + row, end, rows, [&](int64_t c) { return s.channels[c] * w2[c * m.r + r]; });
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; r < m.r; r += kThreads) {
    S sum = S(0);
    for (int i = 0; i < rows; ++i) sum += s.partial[i * m.r + r];
    s.part[r] = sum;
  }
}

// From channels, the sums of u * x of each block, to channels, dpooled of the image; dlogits and
// dhidden on the way. A block has the MLP's channels that its rank says.
template <typename S>
__device__ __forceinline__ void cluster_mlp_backward(const SeClusterParams& m, const SeLane& own,
                                                     const SeBackwardArrays<S>& s) {
  const int64_t each = (m.c + m.cluster - 1) / m.cluster;
  const int64_t begin = own.rank * each;
  const int64_t end = begin + each < m.c ? begin + each : m.c;
  cluster_sync();
  for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) {
    S sum = S(0);
    for (int peer = 0; peer < m.cluster; ++peer) sum += cluster_peer(s.channels, peer)[c];
    const int64_t at = own.image * m.c + c;
    sum = gate_backward(m.gate, static_cast<const S*>(m.logits)[at], sum);
    static_cast<S*>(m.dlogits)[at] = s.channels[c] = sum;
  }
  __syncthreads();
  sum_dhidden(m, begin, end, s);
  cluster_sync();
  for (int64_t r = threadIdx.x; r < m.r; r += kThreads) {
    S sum = S(0);
    for (int peer = 0; peer < m.cluster; ++peer) sum += cluster_peer(s.part, peer)[r];
    const int64_t at = own.image * m.r + r;
    s.dhidden[r] = act_backward(m.act, static_cast<const S*>(m.hidden)[at], sum);
    if (own.rank == 0) static_cast<S*>(m.dhidden)[at] = s.dhidden[r];
  }
  __syncthreads();
  const S* const w1 = static_cast<const S*>(m.w1);
  for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) {
    const S sum = chained_sum<S>(int64_t{0}, m.r, int64_t{1},
                                 [&](int64_t r) { return s.dhidden[r] * w1[r * m.c + c]; });
    const S mean = sum / static_cast<S>(m.hw);
    for (int peer = 0; peer < m.cluster; ++peer) cluster_peer(s.channels, peer)[c] = mean;
  }
  cluster_sync();
}

// z as the forward found it, of a thread's channels: x * gate.
template <typename S>
__device__ __forceinline__ Affine<S, false> se_gates(const SeClusterParams& m, const SeLane& own) {
  const S* const from = static_cast<const S*>(m.logits) + own.image * m.c + own.pack * kPack;
  S logits[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) logits[i] = from[i];  // before the gates' branches
  Affine<S, false> affine{};
#pragma unroll
  for (int i = 0; i < kPack; ++i) affine.scale.v[i] = gate_forward(m.gate, logits[i]);
  return affine;
}

// A thread's packs of dy and, kFindsZ, of x in shared memory.
template <typename T, bool kFindsZ>
struct SeHeld {
  using S = acc_of<T>;
  const StreamParams& a;
  const SeClusterParams& m;
  const SeLane own;
  const Held<T> dy, x;

  __device__ __forceinline__ int64_t element(int k) const { return own.at + k * m.ty * m.c; }
  __device__ __forceinline__ void fetch() const {
    for (int k = 0; k < own.count; ++k) {
      dy.fetch(k, static_cast<const T*>(a.dy) + element(k));
      if (kFindsZ) x.fetch(k, static_cast<const T*>(a.x) + element(k));
    }
    copy_async_commit();
  }
  // u = dy * act'(z) of the packs from k0 on. Bytes of the mask are asked for together.
  template <int kCount>
  __device__ __forceinline__ void gradients(const Affine<S, false>& affine, int k0,
                                            Pack<S> (&u)[kCount]) const {
    const int64_t byte = own.byte + k0 * m.ty * m.tx;
    unsigned bits[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      u[j] = dy.take(k0 + j);
      bits[j] = kFindsZ || a.mask == nullptr ? 0xffu : a.mask[byte + j * m.ty * m.tx];
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (kFindsZ) {
        u[j] = gradient_at_z<T, false, true, true>(a, affine, u[j], x.take(k0 + j), element(k0 + j),
                                                   0, kPack);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) u[j][i] = masked_gradient(a.act, bits[j], i, u[j][i]);
      }
    }
  }
};

// Computes: dx = u * gate + dpooled / HW, dresidual = u, with u = dy * act'(z), and the MLP's
//           backward but for the gradients of its weights: se_outer_kernel makes these of all
//           images
// Reads:    x, dy [N, HW, C] once each; mask, or residual, twice if u needs it; the weights from
//           L2, once an image
// Writes:   dx, dresidual [N, HW, C]; dlogits [N, C], dhidden [N, R]
// Traffic:  (3 + needs_dresidual)*N*C*HW*sizeof(T) (+ N*C*HW/4) bytes; se_outer_kernel's
//           2*C*R*sizeof(acc_t) besides
// Split:    as the forward's, one cluster = one image; a block has its share of the MLP's channels
template <typename T, bool kFindsZ>
__global__ void __launch_bounds__(kThreads, 1)
    se_bwd_cluster_kernel(const __grid_constant__ StreamParams a,
                          const __grid_constant__ SeClusterParams m) {
  using S = acc_of<T>;
  constexpr int kAtOnce = kFindsZ ? 1 : 4;  // packs whose loads a thread waits for together
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  const int64_t words = m.each * Held<T>::kWords * kThreads;
  const SeBackwardArrays<S> s(tile + m.held * words, m);
  const SeLane own = se_lane_of(m);
  const SeHeld<T, kFindsZ> held{a, m, own, {tile}, {tile + words}};
  held.fetch();
  const Affine<S, false> affine = se_gates<S>(m, own);
  copy_async_wait<0>();
  S mine[kPack] = {};
  in_batches<kAtOnce>(own.count, [&](int k0, auto packs) {
    constexpr int kCount = decltype(packs)::value;
    Pack<S> x[kCount], u[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const T* const from = static_cast<const T*>(a.x) + held.element(k0 + j);
      x[j] = kFindsZ ? held.x.take(k0 + j) : load_pack<T, true>(from, 16, kPack);
    }
    held.gradients(affine, k0, u);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) mine[i] += u[j][i] * x[j][i];
    }
  });
  block_sums(m, mine, s.partial, s.channels);
  cluster_mlp_backward(m, own, s);
  if (own.count == 0) return;
  BackwardMap<S, false> map{affine.scale, {}, {}};
#pragma unroll
  for (int i = 0; i < kPack; ++i) map.r.v[i] = s.channels[own.pack * kPack + i];
  in_batches<kAtOnce>(own.count, [&](int k0, auto packs) {
    Pack<S> u[decltype(packs)::value];
    held.gradients(affine, k0, u);
#pragma unroll
    for (int j = 0; j < decltype(packs)::value; ++j) {
      apply_backward<T, false, true>(a, affine, map, false, true, u[j], u[j], held.element(k0 + j),
                                     kPack);
    }
  });
}

template <typename T>
SeClusterKernel se_backward_kernel(const StreamParams& a) {
  if constexpr (sizeof(T) < 8) {
    return finds_z(a) ? se_bwd_cluster_kernel<T, true> : se_bwd_cluster_kernel<T, false>;
  } else {
    return nullptr;
  }
}

}  // namespace cuda
}  // namespace fusedres
