// The mainloop of the convolutions for sm_80 and later: an implicit GEMM (conv_geometry.cuh) on
// mma.sync, fed by conv_loaders.cuh and read by ldmatrix. What its warps have summed up goes to
// conv_epilogue.cuh.
#pragma once

#include "conv_loaders.cuh"

namespace fusedres {
namespace cuda {

// acc += pixels * weights of one stage, for a warp's rows from `m` and columns from `n`.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply(const T* pixels, const T* weights, int m, int n,
                                         float (&acc)[Tile::kSlabs][Tile::kFragments][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < kConvStep / 16; ++k) {
    uint32_t b[Tile::kFragments / 2][4];
#pragma unroll
    for (int f = 0; f < Tile::kFragments / 2; ++f) {
      const int row = n + 16 * f + lane / 16 * 8 + lane % 8;
      load_matrices(b[f], weights + chunk_at(row, 2 * k + lane / 8 % 2));
    }
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s) {
      uint32_t a[4];
      load_matrices(a, pixels + chunk_at(m + 16 * s + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
        const uint32_t column[2] = {b[f / 2][f % 2 * 2], b[f / 2][f % 2 * 2 + 1]};
        mma_m16n8k16(acc[s][f], a, column, T{});
      }
    }
  }
}

// All of a block's work. kAny: any activation behind it.
template <typename T, typename Tile, bool kWide, Prologue kPrologue, bool kAny, bool kMoments>
__device__ __forceinline__ void convolve(const ConvIn& in, const ConvOut& out) {
  using Scales = Coefficient<Tile::kN>;
  using Moments = MomentTable<2, Tile::kN>;
  FUSEDRES_DYNAMIC_SHARED(T, ring);
  FUSEDRES_SHARED(Scales, scales, 1);
  FUSEDRES_SHARED(Moments, moments, 1);
  const ConvShape& g = in.shape;
  const unsigned tiles = static_cast<unsigned>(g.columns + Tile::kN - 1) / Tile::kN;
  const unsigned block = blockIdx.x / tiles;
  const int64_t part = block / static_cast<unsigned>(g.groups);
  const int64_t group = block - part * g.groups;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  OutTile tile{};
  tile.part = part;
  tile.channel = group * g.columns + (blockIdx.x - block * tiles) * Tile::kN;
  tile.end = (group + 1) * g.columns;
  tile.column = warp % 2 * Tile::kWarpN;
  tile.row_warp = warp / 2;

  float* const norms = reinterpret_cast<float*>(ring + kConvStages * Tile::kStageElements);
  PixelLoader<T, Tile, kWide, kPrologue> pixels(in, part * Tile::kM, group, norms);
  WeightLoader<T, Tile, kWide> weights(in, tile);
  if (kPrologue != Prologue::kNone) {
    norm_table(in, group, norms);
    __syncthreads();
  }
  const int steps = (g.depth + kConvStep - 1) / kConvStep;
  const auto copy = [&](int step) {
    const int slot = step % kConvStages;
    T* const stage = ring + slot * Tile::kStageElements;
    if (step < steps) pixels.copy(stage, slot);
    if (step < steps) weights.copy(stage + Tile::kM * kConvStep);
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kConvStages - 1; ++i) copy(i);
  coefficients(out, tile, static_cast<int>(threadIdx.x), Tile::kThreads, &scales[0]);

  float acc[Tile::kSlabs][Tile::kFragments][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int slot = step % kConvStages;
    T* const stage = ring + slot * Tile::kStageElements;
    copy_async_wait<kConvStages - 2>();
    pixels.transform(stage, slot);
    __syncthreads();  // the stage is there for all; and all are done with the one before it
    copy(step + kConvStages - 1);
    multiply<T, Tile>(stage, stage + Tile::kM * kConvStep, tile.row_warp * Tile::kWarpM,
                      tile.column, acc);
  }
  if (steps == 0) __syncthreads();  // the coefficients
  const int64_t first = part * Tile::kM + tile.row_warp * Tile::kWarpM + threadIdx.x % 32 / 4;
  const int64_t rows = g.rows;
  const auto row_of = [first, rows](int s, int h) -> int64_t {
    const int64_t row = first + 16 * s + 8 * h;
    return row < rows ? row : -1;
  };
  store_tile<T, kWide, kAny>(out, tile, scales[0], acc, row_of);
  if (kMoments && out.part1 != nullptr) {
    tile_moments(out, tile, static_cast<int>(threadIdx.x), Tile::kThreads, acc, row_of, &moments[0],
                 [] { __syncthreads(); });
  }
}

// --- launches

// Tiles of pixels by channels; of conv_sm90.cuh, 128 pixels by so many channels. None was measured.
enum class ConvVariant : int { kBySize, k128x128, k128x64, k64x64, kSm90x64, kSm90x128, kSm90x256 };
constexpr int kConvVariants = 7;
constexpr int64_t kLeastPixels = SmallTile::kM;

template <typename Tile>
int64_t conv_blocks(const ConvShape& g) {
  return cdiv(g.rows, Tile::kM) * g.groups * cdiv(g.columns, Tile::kN);
}

// The largest tile that the channels fill, and of which every multiprocessor has one.
inline ConvVariant conv_variant(int asked, const ConvShape& g, const Device& device) {
  if (asked != 0) return static_cast<ConvVariant>(asked);
  const bool many = g.columns > 64;
  if (many && conv_blocks<LargeTile>(g) >= device.sms) return ConvVariant::k128x128;
  const bool enough = conv_blocks<MediumTile>(g) >= device.sms;
  return enough ? ConvVariant::k128x64 : ConvVariant::k64x64;
}

// Whether all rows of a group, of operands and result, are whole packs at multiples of 16 bytes.
inline bool is_wide(const ConvIn& in, const ConvOut& out) {
  return out.width == 16 && in.shape.channels % kPack == 0 && in.shape.columns % kPack == 0 &&
         access_width(16, in.x, in.weight) == 16;
}

// What the params of both ops say of the result.
template <typename Params>
ConvOut conv_out(const Params& p, const void* residual) {
  ConvOut out{};
  out.channels = p.k;
  out.y = p.y;
  out.residual = residual;
  out.bias = static_cast<const float*>(p.bias);
  out.width = access_width(p.k / p.groups * 2, p.y, residual);
  return out;
}

template <typename Params>
ConvIn conv_in(const Params& p) {
  ConvIn in{};
  in.shape = conv_shape(p);
  in.x = p.x;
  in.weight = p.weight;
  return in;
}

using ConvKernel = void (*)(ConvIn, ConvOut);

template <typename Tile>
cudaError_t launch_conv(ConvKernel kernel, const ConvIn& in, const ConvOut& out,
                        cudaStream_t stream) {
  LaunchShape shape{conv_blocks<Tile>(in.shape), Tile::kThreads};
  shape.shared_bytes = Tile::kBytes;
  if (in.bn_mean != nullptr) shape.shared_bytes += in.shape.channels * 8;
  return launch(kernel, shape, stream, in, out);
}

}  // namespace cuda
}  // namespace fusedres
