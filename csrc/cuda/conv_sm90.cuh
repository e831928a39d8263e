// Convolution on Hopper, the kernel: conv_sm90_mainloop.cuh, and conv_epilogue.cuh behind it.
#pragma once

#include "conv_sm90_norm.cuh"

namespace fusedres {
namespace cuda {

#if defined(FUSEDRES_HAS_WGMMA)

// A warpgroup's share of all tiles of this block.
template <typename T, int kColumns, bool kAny, bool kNorm>
__device__ __forceinline__ void conv_consume(const ConvSm90& a, ConvStages<kColumns>* s) {
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const auto meet = [] { named_barrier(kConvBarrier, kConvConsumers); };
  Ring<ConvStages<kColumns>::kStages> ring;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t part = quotient(tile, a.column_tiles);
    const OutTile out{part, (tile - part * a.column_tiles) * kColumns, a.out.channels, 0,
                      thread / 32};
    meet();  // nobody reads the tables of the tile before any more
    coefficients(a.out, out, thread, kConvConsumers, &s->table);
    float sums[1][kColumns / 8][4];
    float (&flat)[kColumns / 2] = reinterpret_cast<float (&)[kColumns / 2]>(sums);
    const int64_t first = part * kConvRows + thread / 32 * 16 + thread % 32 / 4;
    if constexpr (kNorm) {
      conv_multiply_normed<T>(a, first, s, &ring, flat);
    } else {
      conv_multiply<T>(a, s, &ring, flat);
    }
    const auto row_of = [&](int, int h) { return first + 8 * h < a.rows ? first + 8 * h : -1; };
    meet();  // the coefficients are there
    store_tile<T, true, kAny>(a.out, out, s->table, sums, row_of);
    if (a.out.part1 != nullptr) {
      tile_moments(a.out, out, thread, kConvConsumers, sums, row_of, &s->moments, meet);
    }
  }
}

#endif

// Computes: y = act(scale * conv(in_act(bn(x))) + shift + residual); sums and M2 of tiles of y
// Reads:    x [N, H, W, C] once a tap and block of columns, from the L2 after the first; weight
//           [K, KH, KW, C], from the L2; residual [N, P, Q, K] once; the channels' parameters [K]
// Writes:   y [N, P, Q, K] once; part1, part2 [tiles, K] fp32 where wanted
// Traffic:  (N*H*W*C + (1 + has_residual)*N*P*Q*K + K*KH*KW*C)*2 bytes (+ 8*K*N*P*Q/128)
// Split:    one block = tiles of 128 pixels and kColumns channels, columns first: neighbours read
//           the same pixels; fp32 sums in tensor cores, one rounding at the store
template <typename T, int kColumns, bool kAny, bool kNorm>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ ConvSm90 a) {
#if defined(FUSEDRES_HAS_WGMMA)
  using Stages = ConvStages<kColumns>;
  FUSEDRES_DYNAMIC_SHARED(Stages, shared);
  Stages* const s = at_swizzle(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages::kStages; ++i) {
      mbarrier_init(&s->full[i], 1);
      mbarrier_init(&s->empty[i], kConvWarps);
    }
    mbarrier_init_fence();
  }
  if (kNorm) conv_norms(a.in, a.c_steps * kBoxChannels, reinterpret_cast<float*>(s + 1));
  __syncthreads();
  // 65536 registers for 384 threads are 168 each; the producer's warpgroup needs few of them
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) conv_produce(x_map, weight_map, a, s);
  } else {
    take_registers<232>();
    conv_consume<T, kColumns, kAny, kNorm>(a, s);
  }
#endif
}

}  // namespace cuda
}  // namespace fusedres
