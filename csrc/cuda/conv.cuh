// The mainloop of the convolutions for sm_80 and later: an implicit GEMM (conv_geometry.cuh) on
// mma.sync, fed through a ring of stages in shared memory by cp.async and read by ldmatrix. The
// results of its warps go to conv_epilogue.cuh.
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
  static constexpr int kBetween = kThreads / kConvChunks;  // rows between those of a thread
  static constexpr int kStageElements = (kM + kN) * kConvStep;
  static constexpr int64_t kBytes = kConvStages * kStageElements * 2;
};

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
  const int channels = static_cast<int>(in.shape.c / in.shape.groups);
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
  int channels, row, chunk;
  Corner corners[kRows];
  Tap tap, shown;  // of the next step to copy, and to transform
  unsigned seen = 0;

  __device__ __forceinline__ PixelLoader(const ConvIn& in, int64_t first, int64_t group,
                                         const float* norms)
      : g(in.shape),
        x(static_cast<const T*>(in.x) + group * (g.c / g.groups)),
        act(in.act),
        table(norms),
        channels(static_cast<int>(g.c / g.groups)),
        row(static_cast<int>(threadIdx.x) / kConvChunks),
        chunk(static_cast<int>(threadIdx.x) % kConvChunks),
        tap{0, 0, 0} {
    if (channels > 0) tap.advance(g, chunk * kPack);
    shown = tap;
#pragma unroll
    for (int i = 0; i < kRows; ++i) corners[i] = corner_of(g, first + row + i * Tile::kBetween);
  }

  __device__ __forceinline__ float transformed(float v, int c) const {
    return activate<kPrologue == Prologue::kAny>(act, v * table[c] + table[channels + c]);
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
      shift[i] = any ? table[channels + shown.c + i] : 0.0f;
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
  int64_t depth, at;
  int row, chunk, columns;

  __device__ __forceinline__ WeightLoader(const ConvIn& in, const OutTile& tile)
      : weight(static_cast<const T*>(in.weight) + tile.channel * in.shape.depth()),
        depth(in.shape.depth()),
        at(threadIdx.x % kConvChunks * kPack),
        row(static_cast<int>(threadIdx.x) / kConvChunks),
        chunk(static_cast<int>(threadIdx.x) % kConvChunks),
        columns(static_cast<int>(tile.end - tile.channel < Tile::kN ? tile.end - tile.channel
                                                                    : Tile::kN)) {}

  __device__ __forceinline__ void copy(T* stage) {
#pragma unroll
    for (int i = 0; i < Tile::kN / Tile::kBetween; ++i) {
      const int column = row + i * Tile::kBetween;
      T* const to = stage + chunk_at(column, chunk);
      const T* const from = weight + column * depth + at;
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
  const int64_t group_channels = g.k / g.groups;
  const int64_t tiles = (group_channels + Tile::kN - 1) / Tile::kN;
  const int64_t block = quotient(blockIdx.x, tiles);
  const int64_t part = quotient(block, g.groups);
  const int64_t group = block - part * g.groups;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  OutTile tile{};
  tile.part = part;
  tile.channel = group * group_channels + (blockIdx.x - block * tiles) * Tile::kN;
  tile.end = (group + 1) * group_channels;
  tile.column = warp % 2 * Tile::kWarpN;
  tile.row_warp = warp / 2;

  float* const norms = reinterpret_cast<float*>(ring + kConvStages * Tile::kStageElements);
  PixelLoader<T, Tile, kWide, kPrologue> pixels(in, part * Tile::kM, group, norms);
  WeightLoader<T, Tile, kWide> weights(in, tile);
  if (kPrologue != Prologue::kNone) {
    norm_table(in, group, norms);
    __syncthreads();
  }
  const int steps = static_cast<int>((g.depth() + kConvStep - 1) / kConvStep);
  const auto copy = [&](int step) {
    const int slot = step % kConvStages;
    T* const stage = ring + slot * Tile::kStageElements;
    if (step < steps) pixels.copy(stage, slot);
    if (step < steps) weights.copy(stage + Tile::kM * kConvStep);
    copy_async_commit();
  };
#pragma unroll
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
  const int64_t rows = g.rows();
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

// 1: tiles of 128 pixels by 128 channels, 2: 128 by 64, 3: 64 by 64. None was measured.
enum class ConvVariant : int { kBySize, k128x128, k128x64, k64x64 };
constexpr int64_t kLeastPixels = 64;  // of a tile

template <typename Tile>
int64_t conv_blocks(const ConvShape& g) {
  return cdiv(g.rows(), Tile::kM) * g.groups * cdiv(g.k / g.groups, Tile::kN);
}

// The largest tile that the channels fill, and of which every multiprocessor has one.
inline ConvVariant conv_variant(int asked, const ConvShape& g, const Device& device) {
  if (asked != 0) return static_cast<ConvVariant>(asked);
  const bool many = g.k / g.groups > 64;
  if (many && conv_blocks<ConvTile<128, 128>>(g) >= device.sms) return ConvVariant::k128x128;
  const bool enough = conv_blocks<ConvTile<128, 64>>(g) >= device.sms;
  return enough ? ConvVariant::k128x64 : ConvVariant::k64x64;
}

// Whether all rows of a group, of operands and result, are whole packs at multiples of 16 bytes.
inline bool is_wide(const ConvIn& in, const ConvOut& out) {
  const int64_t c = in.shape.c / in.shape.groups;
  const int64_t k = in.shape.k / in.shape.groups;
  return out.width == 16 && c % kPack == 0 && k % kPack == 0 &&
         access_width(16, in.x, in.weight) == 16;
}

// What the kernels count in 32 bits.
inline bool fits_conv(const ConvShape& g) {
  constexpr int64_t kMost = int64_t{1} << 29;
  const int64_t reach_h = g.h + g.pad_h + g.dilation_h * g.kh;
  const int64_t reach_w = g.w + g.pad_w + g.dilation_w * g.kw;
  return reach_h < kMost && reach_w < kMost && g.depth() < kMost;
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
  if (in.bn_mean != nullptr) shape.shared_bytes += in.shape.c / in.shape.groups * 8;
  return launch(kernel, shape, stream, in, out);
}

}  // namespace cuda
}  // namespace fusedres
