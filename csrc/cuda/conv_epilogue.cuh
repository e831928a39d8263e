// From the tensor cores' sums to memory: what every convolution mainloop ends with.
//
// A mainloop leaves fp32 sums in the registers of its warps, as slabs of 16 pixels by 8 *
// kFragments channels in the layout of mma.m16n8 (PTX ISA 9.7.14.5.8), which is a warp's part of a
// wgmma.m64 too: of acc[slab][f], lane 4 * g + t has columns 8 * f + 2 * t and the next one, of
// rows g
// ([0], [1]) and g + 8 ([2], [3]). kFragments is a multiple of 4. Which pixels and channels these
// are, the mainloop says:
//
//   OutTile         the block's tile of channels, and the warp's place in it
//   row_of(s, h)    the pixel, a row of the result [rows, channels], that this lane has in row
//                   g + 8 * h of slab s; -1 if there is none. Equal in the four lanes of a g
//
// and then calls, in this order,
//
//   coefficients(out, tile, table)      some threads of the block, at any time before; a barrier
//   store_tile(out, tile, table, acc)   whole warps; no barrier inside
//   tile_moments(out, tile, acc)        where statistics are wanted: all warps of the block's tile;
//                                       one barrier inside, its argument
//
// y = act(scale * acc + shift + residual) is rounded once. Four lanes exchange their columns so
// that each has a pack of eight: residual and y are accessed in 16 bytes where kWide, else as
// out.width and the channels allow. tile_moments takes mean and M2 of what was stored, of one tile
// of pixels: bn_stats_finalize_kernel adds up such parts.
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

// The result of a convolution. Channels' parameters: fp32, any may be null (mean and var together).
struct ConvOut {
  int64_t channels;                                 // of the result, all groups
  void* y;                                          // [rows, channels] scalar_t
  const void* residual;                             // as y, or null
  const float *bias, *mean, *var, *weight, *shift;  // of batch norm, after the bias
  double eps;
  Act act;
  int width;     // access_width of y and residual, by steps of a group's channels
  float* part1;  // [tiles of pixels, channels]: sums, for tile_moments
  float* part2;  // the same: sums of squared deviations from the tile's mean
};

struct OutTile {
  int64_t part;          // which tile of pixels
  int64_t channel, end;  // the tile's first channel; the first one that is not its group's
  int column;            // the warp's first column in the tile
  int row_warp;          // which of the warps that share these columns
};

// Scale and shift of a tile's channels: z = scale * sum + shift.
template <int kColumns>
struct Coefficient {
  float scale[kColumns], shift[kColumns];
};

// Fills the table, thread `thread` of `threads`.
template <int kColumns>
__device__ __forceinline__ void coefficients(const ConvOut& out, const OutTile& tile, int thread,
                                             int threads, Coefficient<kColumns>* table) {
  for (int i = thread; i < kColumns; i += threads) {
    const int64_t c = tile.channel + i;
    const bool there = c < tile.end;
    const auto read = [&](const float* from, float otherwise) {
      return there && from != nullptr ? from[c] : otherwise;
    };
    float scale = read(out.weight, 1.0f);
    if (there && out.var != nullptr) scale *= bn_rstd(out.var[c], out.eps);
    table->scale[i] = scale;
    table->shift[i] = (read(out.bias, 0.0f) - read(out.mean, 0.0f)) * scale + read(out.shift, 0.0f);
  }
}

// Four lanes 4 * g + t with four words each: word i of lane t becomes word t of lane i.
__device__ __forceinline__ void exchange_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 2; step >= 1; step /= 2) {
    const bool high = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t sent = high ? words[i] : words[i + step];
      const uint32_t got = __shfl_xor_sync(~0u, sent, step);
      (high ? words[i] : words[i + step]) = got;
    }
  }
}

template <typename T>
__device__ __forceinline__ float half_of(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(which == 0 ? word : word >> 16);
  return to_acc(reinterpret_cast<const T&>(bits));
}

// y of 32 columns of one row: `sums` are the lane's, `n` channels from element `at` its pack.
template <typename T, bool kWide, bool kAny>
__device__ __forceinline__ void store_row(const ConvOut& out, float (&sums)[8], int64_t at, int n,
                                          uint32_t (&words)[4]) {
  T* const pack = reinterpret_cast<T*>(words);
  if (out.residual != nullptr) {
#pragma unroll
    for (uint32_t& word : words) word = 0;
    if (n > 0) copy_pack<T, kWide>(static_cast<const T*>(out.residual) + at, pack, out.width, n);
    exchange_quad(words);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += half_of<T>(words[i / 2], i % 2);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] =
        two_of(activate<kAny>(out.act, sums[2 * i]), activate<kAny>(out.act, sums[2 * i + 1]), T{});
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = half_of<T>(words[i / 2], i % 2);
  exchange_quad(words);
  if (n <= 0) return;
  T* const y = static_cast<T*>(out.y) + at;
  if (kWide) {
    store_words(y, words);
  } else {
    copy_pack<T, false>(pack, y, out.width, n);
  }
}

// y = act(scale * acc + shift + residual); acc becomes what was stored, 0 in rows that are not
// there.
template <typename T, bool kWide, bool kAny, int kColumns, int kSlabs, int kFragments,
          typename RowOf>
__device__ __forceinline__ void store_tile(const ConvOut& out, const OutTile& tile,
                                           const Coefficient<kColumns>& table,
                                           float (&acc)[kSlabs][kFragments][4], RowOf row_of) {
  static_assert(sizeof(T) == 2 && kFragments % 4 == 0, "packs are made of four 16-bit pairs");
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int f = 0; f < kFragments; f += 4) {
    const int column = tile.column + 8 * f;
    float scale[8], shift[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scale[i] = table.scale[column + i / 2 * 8 + 2 * t + i % 2];
      shift[i] = table.shift[column + i / 2 * 8 + 2 * t + i % 2];
    }
    const int64_t channel = tile.channel + column + 8 * t;
    const int64_t left = tile.end - channel;
    const int there = left >= kPack ? kPack : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = row_of(s, h);
        float sums[8];
        alignas(16) uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          sums[i] = acc[s][f + i / 2][2 * h + i % 2] * scale[i] + shift[i];
        const int n = row < 0 ? 0 : there;
        store_row<T, kWide, kAny>(out, sums, row * out.channels + channel, n, words);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[s][f + i / 2][2 * h + i % 2] = row < 0 ? 0.0f : sums[i];
      }
    }
  }
}

// What the warps of a tile tell each other: sums, M2 and the pixels of each.
template <int kRowWarps, int kColumns>
struct MomentTable {
  float sum[kRowWarps][kColumns], m2[kRowWarps][kColumns];
  float pixels[kRowWarps];
};

// Sums over the lanes of equal t: lane g gets that of v[g]. In a fixed order.
__device__ __forceinline__ float scatter_sum(float (&v)[8]) {
#pragma unroll
  for (int step = 4; step >= 1; step /= 2) {
    const bool high = (threadIdx.x & (4 * step)) != 0;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const float sent = high ? v[i] : v[i + step];
      const float kept = high ? v[i + step] : v[i];
      v[i] = kept + __shfl_xor_sync(~0u, sent, 4 * step);
    }
  }
  return v[0];
}

// Sum and M2 of each channel of the tile, from what store_tile left in acc, to part1 and part2:
// around a warp's own means, then merged (Chan, Golub and LeVeque 1983). The table is free again
// once all threads have come to another barrier.
template <int kRowWarps, int kColumns, int kSlabs, int kFragments, typename RowOf, typename Barrier>
__device__ __forceinline__ void tile_moments(const ConvOut& out, const OutTile& tile, int thread,
                                             int threads, const float (&acc)[kSlabs][kFragments][4],
                                             RowOf row_of, MomentTable<kRowWarps, kColumns>* table,
                                             Barrier barrier) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  int count = 0;
#pragma unroll
  for (int i = 0; i < 2 * kSlabs; ++i) {
    count += __popc(__ballot_sync(~0u, row_of(i / 2, i % 2) >= 0)) / 4;
  }
  const float pixels = static_cast<float>(count);
#pragma unroll
  for (int f = 0; f < kFragments; f += 4) {
    float v[8] = {};
#pragma unroll
    for (int i = 0; i < 16 * kSlabs; ++i)
      v[i % 8] += acc[i / 16][f + i % 8 / 2][i / 8 % 2 * 2 + i % 2];
    const float sum = scatter_sum(v);
    const float mean = count == 0 ? 0.0f : sum / pixels;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float center = __shfl_sync(~0u, mean, 4 * i + t);
      v[i] = 0.0f;
#pragma unroll
      for (int r = 0; r < 2 * kSlabs; ++r) {
        const float d = acc[r / 2][f + i / 2][r % 2 * 2 + i % 2] - center;
        v[i] += row_of(r / 2, r % 2) < 0 ? 0.0f : d * d;
      }
    }
    const float m2 = scatter_sum(v);
    const int column = tile.column + 8 * (f + g / 2) + 2 * t + g % 2;
    table->sum[tile.row_warp][column] = sum;
    table->m2[tile.row_warp][column] = m2;
  }
  if (tile.column == 0 && threadIdx.x % 32 == 0) table->pixels[tile.row_warp] = pixels;
  barrier();
  for (int i = thread; i < kColumns && tile.channel + i < tile.end; i += threads) {
    float total = 0.0f, number = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) {
      total += table->sum[w][i];
      number += table->pixels[w];
    }
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) {
      if (table->pixels[w] == 0.0f) continue;
      const float off = table->sum[w][i] / table->pixels[w] - total / number;
      m2 += table->m2[w][i] + table->pixels[w] * off * off;
    }
    out.part1[tile.part * out.channels + tile.channel + i] = total;
    out.part2[tile.part * out.channels + tile.channel + i] = m2;
  }
}

}  // namespace cuda
}  // namespace fusedres
