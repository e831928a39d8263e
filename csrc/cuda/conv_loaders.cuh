// How tiles of a convolution's operands come to shared memory: by cp.async, in a ring of stages.
//
// A stage holds 32 elements of the inner dimension for each row of both operands, as four chunks of
// 16 bytes. Chunk i of row r lies at i ^ (r / 2 % 4): eight neighbouring rows, which ldmatrix reads
// at once, then touch all 32 banks, and so do the copies' writes.
//
// conv(act(bn(x))): a thread transforms the chunks that it copied itself, in place, before the
// barrier that shows them to others. Taps outside of the image stay what the copy made them: zeros.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_geometry.cuh"

namespace fusedres {
namespace cuda {

constexpr int kConvStep = 32;  // elements of the inner dimension in a stage
constexpr int kConvStages = 4;
constexpr int kConvChunks = kConvStep / kPack;

// The part of the result that a block makes: four warps, two by two.
template <int kPixels, int kChannels>
struct ConvTile {
  static constexpr int kM = kPixels, kN = kChannels;
  static constexpr int kWarpM = kM / 2, kWarpN = kN / 2;
  static constexpr int kSlabs = kWarpM / 16, kFragments = kWarpN / 8;
  static constexpr int kThreads = 128;
  // Of a multiprocessor: without the bound ptxas spills for more of them (sm_90a, CUDA 13.0).
  static constexpr int kBlocks = kM * kN > 128 * 64 ? 2 : kM * kN > 64 * 64 ? 3 : 4;
  static constexpr int kBetween = kThreads / kConvChunks;  // rows between those of a thread
  static constexpr int kStageElements = (kM + kN) * kConvStep;
  static constexpr int64_t kBytes = kConvStages * kStageElements * 2;
};

using SmallTile = ConvTile<64, 64>;
#if defined(FUSEDRES_FEW_DTYPES)  // one tile stands for all
using LargeTile = SmallTile;
using MediumTile = SmallTile;
#else
using LargeTile = ConvTile<128, 128>;
using MediumTile = ConvTile<128, 64>;
#endif

// What a convolution reads. Channels' parameters: fp32, any may be null (mean and var together).
struct ConvIn {
  ConvShape shape;
  const void* x;                                        // [N, H, W, C] scalar_t
  const void* weight;                                   // [K, KH, KW, C / groups] scalar_t
  const float *bn_mean, *bn_var, *bn_weight, *bn_bias;  // of the norm before it
  double eps;
  Act act;  // after that norm
};

enum class Prologue { kNone, kRelu, kAny };  // kRelu: the norm, and relu or nothing

__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kConvStep + (chunk ^ (row / 2 % kConvChunks)) * kPack;
}

// Scale and shift of the norm before the convolution, of a group's channels.
__device__ __forceinline__ void norm_table(const ConvIn& in, int64_t group, float* table) {
  const int channels = in.shape.channels;
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += blockDim.x) {
    const int64_t c = group * channels + i;
    const float weight = in.bn_weight == nullptr ? 1.0f : in.bn_weight[c];
    const float scale = weight * bn_rstd(in.bn_var[c], in.eps);
    table[i] = scale;
    table[channels + i] = (in.bn_bias == nullptr ? 0.0f : in.bn_bias[c]) - in.bn_mean[c] * scale;
  }
}

// Copies a thread's chunks of x, one chunk of each of its rows a step.
template <typename T, typename Tile, bool kWide, Prologue kPrologue>
struct PixelLoader {
  static constexpr int kRows = Tile::kM / Tile::kBetween;
  static_assert(kRows * kConvStages <= 32, "seen has a bit for each chunk on its way");

  const ConvShape& g;
  const T* x;
  Act act;
  const float* table;
  int row, chunk;
  Corner corners[kRows];
  Tap tap, shown;  // of the next step to copy, and to transform
  unsigned seen = 0;

  __device__ __forceinline__ PixelLoader(const ConvIn& in, int64_t first, int64_t group,
                                         const float* norms)
      : g(in.shape),
        x(static_cast<const T*>(in.x) + group * g.channels),
        act(in.act),
        table(norms),
        row(static_cast<int>(threadIdx.x) / kConvChunks),
        chunk(static_cast<int>(threadIdx.x) % kConvChunks),
        tap{0, 0, 0} {
    if (g.channels > 0) tap.advance(g, chunk * kPack);
    shown = tap;
#pragma unroll
    for (int i = 0; i < kRows; ++i) corners[i] = corner_of(g, first + row + i * Tile::kBetween);
  }

  __device__ __forceinline__ float transformed(float v, int c) const {
    return activate<kPrologue == Prologue::kAny>(act, v * table[c] + table[g.channels + c]);
  }

  // One by one, and transformed at once.
  __device__ __forceinline__ void copy_elements(const Corner& corner, T* to) {
    alignas(16) T values[kPack];
    Tap at = tap;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      float v = 0.0f;
      if (at.kh < g.kh && corner.sees(g, at.dh(g), at.dw(g))) {
        v = to_acc(x[corner.at + at.offset(g)]);
        if (kPrologue != Prologue::kNone) v = transformed(v, at.c);
      }
      from_acc(v, &values[i]);
      at.advance(g, 1);
    }
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
  }

  __device__ __forceinline__ void copy(T* stage, int slot) {
    const int dh = tap.dh(g);
    const int dw = tap.dw(g);
    const int64_t offset = tap.offset(g);
    unsigned here = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T* const to = stage + chunk_at(row + i * Tile::kBetween, chunk);
      if constexpr (kWide) {
        const bool there = tap.kh < g.kh && corners[i].sees(g, dh, dw);
        copy_async(to, there ? x + corners[i].at + offset : x, there);
        here |= static_cast<unsigned>(there) << i;
      } else {
        copy_elements(corners[i], to);
      }
    }
    seen = (seen & ~(((1u << kRows) - 1) << slot * kRows)) | here << slot * kRows;
    tap.advance(g, kConvStep);
  }

  // act(bn()) of what this thread copied; its copies have landed.
  __device__ __forceinline__ void transform(T* stage, int slot) {
    if (!kWide || kPrologue == Prologue::kNone) return;
    float scale[kPack], shift[kPack];
    const bool any = shown.kh < g.kh;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      scale[i] = any ? table[shown.c + i] : 0.0f;
      shift[i] = any ? table[g.channels + shown.c + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if ((seen >> (slot * kRows + i) & 1u) == 0) continue;
      T* const at = stage + chunk_at(row + i * Tile::kBetween, chunk);
      alignas(16) uint32_t words[4];
      *reinterpret_cast<uint4*>(words) = *reinterpret_cast<const uint4*>(at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = half_of<T>(words[j], 0) * scale[2 * j] + shift[2 * j];
        const float high = half_of<T>(words[j], 1) * scale[2 * j + 1] + shift[2 * j + 1];
        constexpr bool kAny = kPrologue == Prologue::kAny;
        words[j] = two_of(activate<kAny>(act, low), activate<kAny>(act, high), T{});
      }
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(words);
    }
    shown.advance(g, kConvStep);
  }
};

// Copies a thread's chunks of the weight.
template <typename T, typename Tile, bool kWide>
struct WeightLoader {
  const T* weight;  // of the tile's first channel
  int depth, at, row, chunk, columns;

  __device__ __forceinline__ WeightLoader(const ConvIn& in, const OutTile& tile)
      : weight(static_cast<const T*>(in.weight) + tile.channel * in.shape.depth),
        depth(in.shape.depth),
        at(static_cast<int>(threadIdx.x) % kConvChunks * kPack),
        row(static_cast<int>(threadIdx.x) / kConvChunks),
        chunk(static_cast<int>(threadIdx.x) % kConvChunks),
        columns(static_cast<int>(tile.end - tile.channel < Tile::kN ? tile.end - tile.channel
                                                                    : Tile::kN)) {}

  __device__ __forceinline__ void copy(T* stage) {
#pragma unroll
    for (int i = 0; i < Tile::kN / Tile::kBetween; ++i) {
      const int column = row + i * Tile::kBetween;
      T* const to = stage + chunk_at(column, chunk);
      const T* const from = weight + static_cast<int64_t>(column) * depth + at;
      if constexpr (kWide) {
        const bool there = column < columns && at < depth;
        copy_async(to, there ? from : weight, there);
      } else {
        alignas(16) T values[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const bool there = column < columns && at + e < depth;
          if (there) values[e] = from[e];
          if (!there) from_acc(0.0f, &values[e]);
        }
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
      }
    }
    at += kConvStep;
  }
};

}  // namespace cuda
}  // namespace fusedres
