// conv_stats: y = conv(act(bn(x))) + bias, and the statistics of y: the convolution with partial
// moments of its tiles, then their sum. The contract of the params and launches: launch.cuh.
#pragma once

#include "bn_finalize.cuh"
#include "conv_sm90_launch.cuh"

namespace fusedres {
namespace cuda {

struct ConvStatsParams {
  Dtype dtype;         // kFloat16 or kBFloat16; others fail with cudaErrorNotSupported
  int variant;         // a ConvVariant
  int64_t n, c, h, w;  // x
  int64_t p, q, k;     // y
  int64_t kh, kw, groups;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  double eps;
  Act act;
  const void* x;          // [N, H, W, C] scalar_t
  const void* weight;     // [K, KH, KW, C / groups] scalar_t
  const void* bias;       // [K] acc_t or null
  const void* bn_weight;  // [C] acc_t or null, like the next three
  const void* bn_bias;
  const void* mean;  // null: neither norm nor activation before the convolution
  const void* var;
  void* y;       // [N, P, Q, K] scalar_t
  void* y_mean;  // [K] acc_t, or null: no statistics
  void* y_var;   // [K] acc_t, biased
  void* workspace;
};

// Computes: y = conv(act(a * (x - mean) + bn_bias)) + bias; sum and M2 of a tile of y's pixels
// Reads:    x [N, H, W, C] once a block of channels, from the L2 after the first (a 3x3: once a
//           tap); weight, cached; the norm's parameters [C]
// Writes:   y [N, P, Q, K] once; part1, part2 [tiles, K] fp32
// Traffic:  (N*H*W*C + N*P*Q*K + K*KH*KW*C)*sizeof(x) bytes, + 8*tiles*K (3% of y, written in tiles
//           of 128 pixels)
// Split:    one block = one tile of pixels and of a group's channels; fp32 sums, rounded to y's
//           dtype; the moments are of the rounded values
template <typename T, typename Tile, bool kWide, Prologue kPrologue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_stats_fwd_kernel(const __grid_constant__ ConvIn in, const __grid_constant__ ConvOut out) {
  convolve<T, Tile, kWide, kPrologue, false, true>(in, out);
}

struct ConvStatsScratch {
  void *part1, *part2, *scale;
  int64_t bytes;
  explicit ConvStatsScratch(const ConvStatsParams& p) {
    const int64_t parts = cdiv(p.n * p.p * p.q, kLeastPixels);
    Workspace w(p.workspace);
    part1 = w.take(parts * p.k * 4);
    part2 = w.take(parts * p.k * 4);
    scale = w.take(p.k * 4);
    bytes = w.used();
  }
};

// Which kernel, and the pixels of its tiles.
struct ConvStatsKernel {
  ConvKernel kernel;
  cudaError_t (*launch)(ConvKernel, const ConvIn&, const ConvOut&, cudaStream_t);
  int64_t pixels;
};

template <typename T, typename Tile, bool kWide, Prologue kPrologue>
ConvStatsKernel conv_stats_kernel() {
  return {conv_stats_fwd_kernel<T, Tile, kWide, kPrologue>, launch_conv<Tile>, Tile::kM};
}

template <typename T, Prologue kPrologue>
ConvStatsKernel conv_stats_kernel(ConvVariant variant) {
  switch (variant) {
    case ConvVariant::k128x128:
      return conv_stats_kernel<T, LargeTile, true, kPrologue>();
    case ConvVariant::k128x64:
      return conv_stats_kernel<T, MediumTile, true, kPrologue>();
    default:
      return conv_stats_kernel<T, SmallTile, true, kPrologue>();
  }
}

// An activation other than relu before the convolution is rare: it has one tile.
template <typename T>
ConvStatsKernel pick_conv_stats(const ConvStatsParams& p, const ConvIn& in, const ConvOut& out,
                                const Device& device) {
  const bool wide = is_wide(in, out);
  const ConvVariant variant = conv_variant(p.variant, in.shape, device);
  if (p.mean == nullptr) {
    return wide ? conv_stats_kernel<T, Prologue::kNone>(variant)
                : conv_stats_kernel<T, SmallTile, false, Prologue::kNone>();
  }
  if (!wide) return conv_stats_kernel<T, SmallTile, false, Prologue::kAny>();
  return needs_any(p.act) ? conv_stats_kernel<T, SmallTile, true, Prologue::kAny>()
                          : conv_stats_kernel<T, Prologue::kRelu>(variant);
}

inline FinalizeParams finalize_params(const ConvStatsParams& p, const ConvStatsScratch& scratch,
                                      int64_t pixels) {
  FinalizeParams f{};
  f.c = p.k;
  f.part_length = pixels;
  f.run_length = p.n * p.p * p.q;
  f.parts = f.parts_of_run = cdiv(f.run_length, pixels);
  f.count = static_cast<double>(f.run_length);
  f.part1 = scratch.part1;
  f.part2 = scratch.part2;
  f.out1 = p.y_mean;
  f.out2 = p.y_var;
  f.scale = scratch.scale;
  return f;
}

template <typename T>
cudaError_t conv_stats_forward(const ConvStatsParams& p, cudaStream_t stream) {
  const ConvStatsScratch scratch(p);
  if (!fits_conv(p)) return cudaErrorNotSupported;
  ConvIn in = conv_in(p);
  in.bn_mean = static_cast<const float*>(p.mean);
  in.bn_var = static_cast<const float*>(p.var);
  in.bn_weight = static_cast<const float*>(p.bn_weight);
  in.bn_bias = static_cast<const float*>(p.bn_bias);
  in.eps = p.eps;
  in.act = p.act;
  ConvOut out = conv_out(p, nullptr);
  out.act = Act::kIdentity;
  if (p.y_mean != nullptr) {
    out.part1 = static_cast<float*>(scratch.part1);
    out.part2 = static_cast<float*>(scratch.part2);
  }
  Device device;
  cudaError_t error = read_device(&device);
  if (error != cudaSuccess) return error;
  int64_t pixels = kConvRows;
  if (const int columns = conv_sm90_columns(p.variant, in, out, device)) {
    error = launch_conv_sm90<T>(in, out, device, p.dtype, columns, stream);
  } else {
    const ConvStatsKernel picked = pick_conv_stats<T>(p, in, out, device);
    error = picked.launch(picked.kernel, in, out, stream);
    pixels = picked.pixels;
  }
  if (error != cudaSuccess || p.y_mean == nullptr) return error;
  const FinalizeParams f = finalize_params(p, scratch, pixels);
  return launch_finalize(bn_stats_finalize_kernel<float>, f, stream);
}

inline int64_t conv_stats_forward_workspace(const ConvStatsParams& p) {
  return p.y_mean == nullptr ? 0 : ConvStatsScratch(p).bytes;
}

inline cudaError_t launch_conv_stats_forward(const ConvStatsParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_HALF(p.dtype, conv_stats_forward, p, stream);
}

}  // namespace cuda
}  // namespace fusedres
