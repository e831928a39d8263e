// How one launch of bn_act cuts a tensor that fits on the chip: a block keeps a tile of rows and
// channels, a thread some rows of its own channels.
//
//   NHWC  As the streaming passes do (stream.cuh): a row is a pixel, and a thread has a pack of its
//         channels.
//   NCHW  A row is a pack of pixels: those of a channel, image by image. ty threads share a
//         channel, and take its packs in turns; a block has tx channels. So any number of images
//         and pixels fills the threads, and a thread has one set of coefficients.
//
// A column of blocks, one above the other, shares its channels: each block has a part of them.
#pragma once

#include <cooperative_groups.h>

#include "bn_finalize.cuh"
#include "held.cuh"
#include "stream_reduce.cuh"

namespace fusedres {
namespace cuda {

// Packs of each of kTensors that a thread keeps in registers: 32 bytes, of 64 ptxas spills (NHWC).
template <typename T, int kTensors>
constexpr int kOwnPacks = kTensors * sizeof(T) > 4 ? 1 : 4 / (kTensors * sizeof(T));

// Packs of a thread in shared memory, of one tensor.
__host__ __device__ __forceinline__ int64_t shared_packs(const Tiling& t, int own) {
  const int64_t each = t.tile_rows / t.ty;
  return each > own ? each - own : 0;
}

template <bool kPlanar>
constexpr int kLaneChannels = kPlanar ? 1 : kPack;
constexpr int kBlockChannels = 32 * kPack;  // the most that a block has: NHWC (tx <= 32)

template <bool kPlanar>
struct WholeLane : Lane {
  uint32_t row;      // NCHW: its first pack among its channel's; at, byte and the steps are NHWC's
  int64_t channel0;  // the block's first
};

template <bool kPlanar>
__device__ __forceinline__ WholeLane<kPlanar> whole_lane(const Tiling& t) {
  WholeLane<kPlanar> lane{};
  if constexpr (kPlanar) {
    lane.x = static_cast<int>(threadIdx.x) / t.ty;
    lane.y = static_cast<int>(threadIdx.x) % t.ty;
    lane.part = quotient(blockIdx.x, t.col_blocks);
    lane.channel = (blockIdx.x - lane.part * t.col_blocks) * t.tx + lane.x;
    const int64_t row = lane.part * t.tile_rows + lane.y;
    const int64_t below = (lane.part + 1) * t.tile_rows;
    const int64_t end = below < t.rows ? below : t.rows;
    lane.row = static_cast<uint32_t>(row);
    if (lane.channel < t.c && row < end) lane.count = static_cast<int>((end - row - 1) / t.ty) + 1;
  } else {
    static_cast<Lane&>(lane) = lane_of<false>(t, blockIdx.x);
  }
  lane.channel0 = lane.channel - lane.x * kLaneChannels<kPlanar>;
  return lane;
}

// Where the lane's k-th pack is, its byte of the mask, and its elements.
struct Spot {
  int64_t at, byte;
  int n;
};

template <bool kWide, bool kPlanar>
__device__ __forceinline__ Spot spot_of(const Tiling& t, const WholeLane<kPlanar>& lane, int k) {
  if constexpr (!kPlanar) {
    return {lane.at + k * lane.step, lane.byte + k * lane.byte_step, kPack};
  }
  // What fits on the chip has addresses of 32 bits.
  const uint32_t packs = static_cast<uint32_t>(t.packs), cols = static_cast<uint32_t>(t.cols);
  const uint32_t row = lane.row + static_cast<uint32_t>(k * t.ty);
  const uint32_t image = row / packs;
  const uint32_t pack = row - image * packs;
  const uint32_t plane = image * static_cast<uint32_t>(t.c) + static_cast<uint32_t>(lane.channel);
  const uint32_t left = cols - pack * kPack;
  return {plane * cols + pack * kPack, plane * packs + pack,
          kWide || left > kPack ? kPack : static_cast<int>(left)};
}

// Brings the lane's packs of tensors to where it keeps them. They come by asynchronous copies where
// they are aligned; returns where the second group of those begins.
template <bool kWide, bool kPlanar, typename T, int kOwn, typename... Others>
__device__ __forceinline__ int keep(const StreamParams& a, const WholeLane<kPlanar>& lane,
                                    Kept<T, kOwn>& x, Others&... others) {
  const auto read = [&](const T* from, int k) {
    const Spot s = spot_of<kWide>(a.tiling, lane, k);
    return RawPack<T>::template read<kWide>(from + s.at, a.width, s.n);
  };
  const auto fill = [&](const Kept<T, kOwn>& kept) {
    kept.fill(lane.count, [&](int k) { return read(kept.from, k); });
  };
  const auto fetch = [&](const Kept<T, kOwn>& kept, int k, int64_t at) {
    kept.others.fetch(k - kOwn, kept.from + at);
  };
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (k >= lane.count) break;
    x.own[k] = read(x.from, k);
    ((others.own[k] = read(others.from, k)), ...);
  }
  if constexpr (!kWide) {
    fill(x);
    (fill(others), ...);
    return kOwn;
  }
  return fetch_in_two(kOwn, lane.count, [&](int k) {
    const int64_t at = spot_of<kWide>(a.tiling, lane, k).at;
    fetch(x, k, at);
    (fetch(others, k, at), ...);
  });
}

// NCHW: merges the ty threads that share a channel, in a fixed order; the first has the result.
template <typename V>
__device__ __forceinline__ void merge_channel(const Tiling& t, const Lane& lane, V* mine) {
  FUSEDRES_SHARED(V, warps, kThreads / 32);
  merge_lanes(mine, t.ty < 32 ? t.ty : 32);
  if (t.ty <= 32) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) warps[warp] = *mine;
  __syncthreads();
  if (lane.y != 0) return;
  for (int w = 1; w < t.ty / 32; ++w) merge(mine, warps[warp + w]);
}

// The block's part of each of its channels, from what its threads have: NHWC of each channel of a
// pack, with `count` values of each; NCHW of some values of one.
template <typename S, bool kPlanar, typename V, int kValues>
__device__ __forceinline__ void write_parts(const StreamParams& a, const WholeLane<kPlanar>& lane,
                                            V (&mine)[kValues], S count) {
  if constexpr (kPlanar) {
#pragma unroll
    for (int i = 1; i < kValues; ++i) merge(&mine[0], mine[i]);
    merge_channel(a.tiling, lane, &mine[0]);
    if (lane.y == 0 && lane.channel < a.tiling.c) {
      write_part<S>(a, lane.part, lane.channel, mine[0]);
    }
  } else {
    merge_rows(a.tiling, mine, count, [&](int in_block, const V& v) {
      const int64_t channel = lane.channel0 + in_block;
      if (channel < a.tiling.c) write_part<S>(a, lane.part, channel, v);
    });
  }
}

// Waits for all that the blocks of the column have written. A block that is alone in it does not
// have to wait for others.
__device__ __forceinline__ void meet(const Tiling& t) {
  if (t.tiles == 1) {
    __syncthreads();
  } else {
    cooperative_groups::this_grid().sync();
  }
}

// The tiles of a column of blocks share its channels, a warp one: f(channel) in all of its lanes.
template <bool kPlanar, typename F>
__device__ __forceinline__ void for_own_channels(const Tiling& t, const WholeLane<kPlanar>& lane,
                                                 F f) {
  constexpr int kWarps = kThreads / 32;
  const int64_t below = lane.channel0 + t.tx * kLaneChannels<kPlanar>;
  const int64_t end = below < t.c ? below : t.c;
  const int64_t first = lane.channel0 + lane.part * kWarps + threadIdx.x / 32;
  for (int64_t c = first; c < end; c += t.tiles * kWarps) f(c);
}

// Calls add(part) for all parts in the lanes of a warp, and adds up what the lanes then have.
template <typename Add>
__device__ __forceinline__ void warp_parts(const FinalizeParams& f, double* a, double* b, Add add) {
  for (int64_t part = threadIdx.x % 32; part < f.parts; part += 32) add(part);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    *a += __shfl_xor_sync(~0u, *a, lanes);
    *b += __shfl_xor_sync(~0u, *b, lanes);
  }
}

// NCHW: as many threads a channel as leave every channel a block, and four packs for each.
inline Tiling by_channels(Tiling t, int64_t blocks) {
  constexpr int kFewest = 8;
  t.rows = t.rows / t.c * t.packs;
  t.ty = power_of_2_from(t.rows, kThreads);
  if (t.ty < kFewest) t.ty = kFewest;
  while (t.ty > kFewest && cdiv(t.c, kThreads / t.ty) > blocks) t.ty /= 2;
  t.tx = kThreads / t.ty;
  t.col_blocks = cdiv(t.c, t.tx);
  const int64_t segment = t.packs < kThreads ? t.packs : kThreads;  // of the streaming passes
  t.tile_rows = t.ty * (segment > 4 * t.ty ? cdiv(segment, t.ty) : 4);
  return t;
}

// The tiling in which all of the tensor is on the chip at once, two blocks an SM; `tiles` is 0
// where there is none.
template <typename T, int kTensors>
Tiling whole_tiling(const StreamParams& a, const Device& device, int64_t* shared_bytes) {
  const int64_t statics = (a.tiling.planar ? 2 : 18) * 1024;  // what the kernels declare
  Tiling t = a.tiling;
  t.tiles = 0;
  if (!(t.planar || is_wide(a)) || !device.cooperative || sizeof(T) == 8) return t;
  const int64_t blocks = 2 * device.sms;
  if (t.planar) t = by_channels(t, blocks);
  const int64_t row_tiles = blocks / t.col_blocks;
  if (row_tiles == 0) return t;
  // No more parts than the streaming passes have: the workspace is made for those.
  const int64_t least = t.tile_rows / t.ty;
  const int64_t wanted = cdiv(t.rows, row_tiles * t.ty);
  t.tile_rows = (wanted > least ? wanted : least) * t.ty;
  const int64_t held = kTensors * shared_packs(t, kOwnPacks<T, kTensors>);
  *shared_bytes = held * kPack * static_cast<int64_t>(sizeof(T)) * kThreads;
  // A block's share of an SM, less the 1 KiB that the system takes of every block.
  const bool fits = *shared_bytes + statics + 1024 <= (device.shared_bytes + 1024) / 2;
  if (fits) t.tiles = cdiv(t.rows, t.tile_rows);
  return t;
}

// The blocks of a column are its tiles, in either layout.
inline int64_t whole_blocks(const Tiling& t) { return t.tiles * t.col_blocks; }

// Where the tiles are in the values of a channel.
inline void set_parts(const Tiling& t, FinalizeParams* f) {
  const int64_t values = t.planar ? kPack : 1;  // of a row
  f->parts = f->parts_of_run = t.tiles;
  f->part_length = t.tile_rows * values;
  f->run_length = t.rows * values;
  if (t.planar) {
    f->period = t.packs * kPack;
    f->padding = f->period - t.cols;
  }
}

}  // namespace cuda
}  // namespace fusedres
