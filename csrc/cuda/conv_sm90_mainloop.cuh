// Convolution on Hopper: an implicit GEMM whose operands the copy engine brings in (TMA, im2col)
// and whose products a warpgroup starts from shared memory (wgmma). Rows are pixels of the result,
// columns its channels, the inner dimension the window's taps times x's channels, 64 at a time.
//
// A block is persistent: one warpgroup of which one thread asks for copies, two that multiply, 64
// rows each. They meet at two mbarriers a stage: `full` when its bytes are there, `empty` when all
// warps that read it are done. The producer runs ahead into the next tile while the others store.
#pragma once

#include "conv.cuh"
#include "hopper.cuh"
#include "tensor_map.cuh"

namespace fusedres {
namespace cuda {

constexpr int kConvRows = 128;       // of a tile
constexpr int kConvConsumers = 256;  // threads
constexpr int kConvThreads = 128 + kConvConsumers;
constexpr int kConvWarps = kConvConsumers / 32;  // that consume
constexpr int kConvBarrier = 1;                  // named barrier of the consumers

// 192 KiB of stages; 8 of them cover more than 500 ns at the rate of 64 columns
// (docs/performance.md)
constexpr int conv_stages(int columns) { return columns == 64 ? 8 : columns == 128 ? 6 : 4; }

// A convolution as the kernel sees it.
struct ConvSm90 {
  ConvIn in;
  ConvOut out;
  int64_t rows, tiles, column_tiles;
  int pixels, width;   // of an image of the result, of a row of it
  int c_steps, steps;  // of a tap, of all
  bool im2col;         // else x is a matrix [rows, C]
  Window window;
};

// A block's shared memory, at_swizzle: so are the stages.
template <int kColumns>
struct ConvStages {
  static constexpr int kStages = conv_stages(kColumns);
  static constexpr int kXBytes = kConvRows * kBoxChannels * 2;
  static constexpr int kWeightBytes = kColumns * kBoxChannels * 2;
  unsigned char x[kStages][kXBytes];
  unsigned char weight[kStages][kWeightBytes];
  uint64_t full[kStages], empty[kStages];
  Coefficient<kColumns> table;
  MomentTable<kConvWarps, kColumns> moments;
};

// Which stage is next; a phase of its barriers has the parity of the round.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

#if defined(FUSEDRES_HAS_WGMMA)

// One thread: asks for the boxes of all tiles of this block.
template <int kColumns>
__device__ __forceinline__ void conv_produce(const CUtensorMap& x_map,
                                             const CUtensorMap& weight_map, const ConvSm90& a,
                                             ConvStages<kColumns>* s) {
  using Stages = ConvStages<kColumns>;
  Ring<Stages::kStages> ring;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int part = static_cast<int>(quotient(tile, a.column_tiles));
    const int channel = static_cast<int>(tile - part * a.column_tiles) * kColumns;
    const int row = part * kConvRows;
    const int image = row / a.pixels;
    const int line = row % a.pixels / a.width;
    const Pixel corner{image, line * a.window.stride[0] - a.window.pad[0],
                       row % a.pixels % a.width * a.window.stride[1] - a.window.pad[1]};
    int c = 0;
    int tap = 0;
    int tap_h = 0;  // offsets of the tap
    int tap_w = 0;
    for (int step = 0; step < a.steps; ++step) {
      uint64_t* const full = &s->full[ring.stage];
      mbarrier_wait(&s->empty[ring.stage], ring.parity ^ 1);  // the first round passes
      mbarrier_arrive_expect(full, Stages::kXBytes + Stages::kWeightBytes);
      if (a.im2col) {
        tensor_copy_im2col(s->x[ring.stage], &x_map, c, corner, tap_h, tap_w, full);
      } else {
        tensor_copy(s->x[ring.stage], &x_map, c, row, full);
      }
      tensor_copy(s->weight[ring.stage], &weight_map, c, tap, channel, full);
      ring.advance();
      c += kBoxChannels;
      if (c < a.c_steps * kBoxChannels) continue;
      c = 0;
      ++tap;
      tap_w += a.window.dilation[1];
      if (tap_w < a.window.taps[1] * a.window.dilation[1]) continue;
      tap_w = 0;
      tap_h += a.window.dilation[0];
    }
  }
}

// The sums of one tile: 64 rows in a warpgroup.
template <typename T, int kColumns>
__device__ __forceinline__ void conv_multiply(const ConvSm90& a, ConvStages<kColumns>* s,
                                              Ring<ConvStages<kColumns>::kStages>* ring,
                                              float (&sums)[kColumns / 2]) {
  const bool leads = threadIdx.x % 32 == 0;
  const int own = static_cast<int>(threadIdx.x) / 128 - 1;
  int before = 0;  // the stage of the products that may still run
  for (int step = 0; step < a.steps; ++step) {
    mbarrier_wait(&s->full[ring->stage], ring->parity);
    const uint64_t x = wgmma_operand(s->x[ring->stage] + own * (64 * kBoxChannels * 2));
    const uint64_t weight = wgmma_operand(s->weight[ring->stage]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBoxChannels / 16; ++k) {
      wgmma<T>(sums, operand_at(x, k), operand_at(weight, k), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>(sums);
    if (step > 0 && leads) mbarrier_arrive(&s->empty[before]);
    before = ring->stage;
    ring->advance();
  }
  wgmma_wait<0>(sums);
  if (leads) mbarrier_arrive(&s->empty[before]);
}

#endif

}  // namespace cuda
}  // namespace fusedres
