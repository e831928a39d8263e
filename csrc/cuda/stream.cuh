// How the streaming kernels cut a tensor among blocks and threads, and what each thread walks over.
//
//   NHWC  groups of rows, a row = the C channels of a pixel. A block takes `tile_rows` rows of a
//         group and tx packs of each; a thread keeps its pack of channels, and so their
//         coefficients, and steps through the rows.
//   NCHW  planes of H*W pixels, one channel each. tx threads of a warp share a segment of a plane
//         and step through its packs; a block has ty planes.
//
// Sums over pixels are parts: one for each tile of rows, or segment. Tiles depend on the shape
// alone, so that results do not depend on the GPU.
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

struct Tiling {
  bool planar;
  int64_t c;
  int64_t groups, rows, cols;  // NHWC: rows of a group; NCHW: all planes in one group
  int64_t packs;               // of a row
  int tx, ty;
  int64_t tile_rows, tiles;  // NHWC: of a group
  int64_t col_blocks;
  int64_t segment, segments;  // NCHW: packs of a segment, segments of a plane

  int64_t blocks() const {
    return planar ? cdiv(rows, ty) * segments : groups * tiles * col_blocks;
  }
  // Parts of each channel (for NHWC groups: of each group and channel).
  int64_t parts() const { return planar ? rows / c * segments : groups * tiles; }
};

constexpr int kRowsEach = 32;       // rows of a thread: the longest fp32 chain of a sum
constexpr int kEnoughBlocks = 512;  // some waves of blocks on every GPU of today; not measured

inline int power_of_2_from(int64_t n, int limit) {
  int p = 1;
  while (p < n && p < limit) p *= 2;
  return p;
}

// per_image: one group an image, for coefficients or sums of each (n, c).
inline Tiling tiling_of(bool planar, int64_t n, int64_t c, int64_t hw, bool per_image) {
  Tiling t{};
  t.planar = planar;
  t.c = c;
  t.groups = per_image && !planar ? n : 1;
  t.rows = planar ? n * c : n * hw / t.groups;
  t.cols = planar ? hw : c;
  t.packs = cdiv(t.cols, kPack);
  if (planar) {
    t.segments = cdiv(t.packs, 8 * 32);  // 64 values a thread
    t.segment = cdiv(t.packs, t.segments);
    t.tx = power_of_2_from(t.segment, 32);
    t.ty = kThreads / t.tx;
    return t;
  }
  t.col_blocks = cdiv(t.packs, 32);
  t.tx = static_cast<int>(cdiv(t.packs, t.col_blocks));
  t.col_blocks = cdiv(t.packs, t.tx);
  t.ty = kThreads / t.tx;
  int64_t each = kRowsEach;
  while (each > 4 && t.groups * cdiv(t.rows, t.ty * each) * t.col_blocks < kEnoughBlocks) each /= 2;
  t.tile_rows = t.ty * each;
  t.tiles = cdiv(t.rows, t.tile_rows);
  return t;
}

// What a thread walks over: `count` packs, `step` elements and `byte_step` mask bytes apart.
struct Lane {
  int64_t at, byte;      // of its first pack
  int64_t channel;       // of its first pack's first element; NHWC: of every pack's
  int64_t image, group;  // NCHW: image of the plane; NHWC: the group
  int64_t part;
  int64_t left;  // elements from the first pack to the end of the row
  int64_t step, byte_step;
  int count;
  int x, y;
};

template <bool kPlanar>
__device__ __forceinline__ Lane lane_of(const Tiling& t, int64_t block) {
  Lane lane{};
  lane.x = static_cast<int>(threadIdx.x) % t.tx;
  lane.y = static_cast<int>(threadIdx.x) / t.tx;
  if (kPlanar) {
    const int64_t plane = quotient(block, t.segments) * t.ty + lane.y;
    const int64_t segment = block - quotient(block, t.segments) * t.segments;
    const int64_t first = segment * t.segment + lane.x;
    const int64_t end = segment + 1 < t.segments ? (segment + 1) * t.segment : t.packs;
    lane.image = quotient(plane, t.c);
    lane.channel = plane - lane.image * t.c;
    lane.part = lane.image * t.segments + segment;
    lane.at = plane * t.cols + first * kPack;
    lane.byte = plane * t.packs + first;
    lane.left = t.cols - first * kPack;
    lane.step = static_cast<int64_t>(t.tx) * kPack;
    lane.byte_step = t.tx;
    if (plane < t.rows && first < end) lane.count = static_cast<int>((end - first - 1) / t.tx) + 1;
  } else {
    lane.part = quotient(block, t.col_blocks);
    const int64_t pack = (block - lane.part * t.col_blocks) * t.tx + lane.x;
    lane.group = quotient(lane.part, t.tiles);
    const int64_t row0 = (lane.part - lane.group * t.tiles) * t.tile_rows;
    const int64_t row = row0 + lane.y;
    const int64_t end = row0 + t.tile_rows < t.rows ? row0 + t.tile_rows : t.rows;
    lane.channel = pack * kPack;
    lane.at = (lane.group * t.rows + row) * t.cols + lane.channel;
    lane.byte = (lane.group * t.rows + row) * t.packs + pack;
    lane.left = t.cols - lane.channel;
    lane.step = t.ty * t.cols;
    lane.byte_step = t.ty * t.packs;
    if (lane.y < t.ty && pack < t.packs && row < end) {
      lane.count = static_cast<int>((end - row - 1) / t.ty) + 1;
    }
  }
  return lane;
}

// Elements of the lane's i-th pack.
template <bool kPlanar>
__device__ __forceinline__ int elements(const Lane& lane, int i) {
  const int64_t left = kPlanar ? lane.left - i * lane.step : lane.left;
  return left < kPack ? static_cast<int>(left) : kPack;
}

// Coefficients of a lane: one for each of its channels.
template <typename S, bool kPlanar>
struct Coefficients {
  S v[kPlanar ? 1 : kPack];
  __device__ __forceinline__ S operator[](int i) const { return v[kPlanar ? 0 : i]; }
};

// From an array [C], or [groups, C] with an image or group to select; a null one is `otherwise`.
template <typename S, bool kPlanar>
__device__ __forceinline__ Coefficients<S, kPlanar> coefficients(const Lane& lane, const void* from,
                                                                 int64_t first, S otherwise) {
  Coefficients<S, kPlanar> k;
#pragma unroll
  for (int i = 0; i < (kPlanar ? 1 : kPack); ++i) {
    const bool there = from != nullptr && lane.count > 0 && (kPlanar || i < lane.left);
    k.v[i] = there ? static_cast<const S*>(from)[first + lane.channel + i] : otherwise;
  }
  return k;
}

// The tensors and coefficients of the streaming passes. z = (x - center) * scale + bias + residual;
// dx = p * u + q * (x - center) + r with u = dy * act'(z). Null arrays are zero, a null scale or p
// is one.
struct StreamParams {
  Tiling tiling;
  const void* x;
  const void* dy;
  const void* residual;
  void* out;  // y or dx
  void* dresidual;
  const uint8_t* mask;
  uint8_t* mask_out;
  const void* center;  // acc_t [C]
  const void* scale;   // acc_t [C], or [N, C] if per_image; the same for bias, p, q, r
  const void* bias;
  const void* p;
  const void* q;
  const void* r;
  bool per_image;
  Act act;
  int width;
  void* part1;  // acc_t [parts, C]: sum of x, or of u
  void* part2;  // sum of squared deviations, or of u * (x - center)
};

// The coefficients of z.
template <typename S, bool kPlanar>
struct Affine {
  Coefficients<S, kPlanar> center, scale, bias;
  Affine() = default;
  __device__ __forceinline__ Affine(const StreamParams& a, const Lane& lane, int64_t set)
      : center(coefficients<S, kPlanar>(lane, a.center, 0, S(0))),
        scale(coefficients<S, kPlanar>(lane, a.scale, set, S(1))),
        bias(coefficients<S, kPlanar>(lane, a.bias, set, S(0))) {}
  __device__ __forceinline__ S operator()(S x, int i) const {
    return (x - center[i]) * scale[i] + bias[i];
  }
};

// Where the lane's set of per-image coefficients begins.
template <bool kPlanar>
__device__ __forceinline__ int64_t coefficient_set(const StreamParams& a, const Lane& lane) {
  return a.per_image ? (kPlanar ? lane.image : lane.group) * a.tiling.c : 0;
}

// Whether z, and so x, has to be found again for u = dy * act'(z).
__host__ __device__ __forceinline__ bool finds_z(const StreamParams& a) {
  return a.mask == nullptr && a.act != Act::kIdentity;
}

// u = dy * act'(z) of one pack, given dy; z is found again as the forward found it. kAny: any
// activation.
template <typename T, bool kPlanar, bool kWide, bool kAny, typename S>
__device__ __forceinline__ Pack<S> gradient_at_z(const StreamParams& a,
                                                 const Affine<S, kPlanar>& affine, Pack<S> u,
                                                 const Pack<S>& x, int64_t at, int64_t byte,
                                                 int n) {
  if (a.act == Act::kIdentity) return u;
  if (a.mask != nullptr) {
    const unsigned bits = a.mask[byte];
#pragma unroll
    for (int i = 0; i < kPack; ++i) u[i] = masked_gradient(a.act, bits, i, u[i]);
    return u;
  }
  Pack<S> residual{};
  if (a.residual != nullptr) {
    residual = load_pack<T, kWide>(static_cast<const T*>(a.residual) + at, a.width, n);
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    u[i] = act_backward(kAny ? a.act : Act::kRelu, affine(x[i], i) + residual[i], u[i]);
  }
  return u;
}

using StreamKernel = void (*)(StreamParams);

inline cudaError_t launch_stream(StreamKernel kernel, const StreamParams& a, cudaStream_t stream) {
  return launch(kernel, {a.tiling.blocks()}, stream, a);
}

// Whether every pack is whole and 16-byte aligned.
inline bool is_wide(const StreamParams& a) { return a.width == 16 && a.tiling.cols % kPack == 0; }

// The instantiation for a layout, alignment and activation; float64 has the general ones only.
#define FUSEDRES_STREAM_KERNEL(kernel, T, a, any)                   \
  (::fusedres::cuda::pick_kernel<T>(                                \
      (a), (any),                                                   \
      {kernel<T, false, false, true>, kernel<T, true, false, true>, \
       kernel<T, false, (sizeof(T) < 8), (sizeof(T) == 8)>,         \
       kernel<T, true, (sizeof(T) < 8), (sizeof(T) == 8)>,          \
       kernel<T, false, (sizeof(T) < 8), true>, kernel<T, true, (sizeof(T) < 8), true>}))

struct KernelChoices {
  StreamKernel narrow_nhwc, narrow_nchw, wide_nhwc, wide_nchw, wide_any_nhwc, wide_any_nchw;
};

template <typename T>
StreamKernel pick_kernel(const StreamParams& a, bool any, const KernelChoices& k) {
  const bool planar = a.tiling.planar;
  if (sizeof(T) == 8 || !is_wide(a)) return planar ? k.narrow_nchw : k.narrow_nhwc;
  if (any) return planar ? k.wide_any_nchw : k.wide_any_nhwc;
  return planar ? k.wide_nchw : k.wide_nhwc;
}

}  // namespace cuda
}  // namespace fusedres
