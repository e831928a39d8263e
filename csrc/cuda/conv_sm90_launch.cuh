// The host's side of conv_sm90.cuh: what it takes, in which tiles, and its launch.
#pragma once

#include "conv_sm90.cuh"

namespace fusedres {
namespace cuda {

// Whether this library has the kernels: one for sm_90 without the a runs on the same GPUs.
#if defined(FUSEDRES_CUDA_ON_HOST) || defined(FUSEDRES_SM90A)
constexpr bool kHasConvSm90 = true;
#else
constexpr bool kHasConvSm90 = false;
#endif

inline Window window_of(const ConvShape& g) {
  return {{g.kh, g.kw}, {g.stride_h, g.stride_w}, {g.pad_h, g.pad_w}, {g.dilation_h, g.dilation_w}};
}

// Why conv_sm90_kernel cannot do this, or null.
inline const char* why_not_conv_sm90(const ConvIn& in, const ConvOut& out, const Device& device) {
  const ConvShape& g = in.shape;
  if (!kHasConvSm90 || device.major != 9) return "wgmma is sm_90a's";
  if (g.groups != 1) return "the tensor maps are of all channels";
  if (in.bn_mean != nullptr && (g.c > kConvNormChannels || needs_any(in.act))) {
    return "the norm before it has too many channels, or an activation other than relu";
  }
  if (!is_wide(in, out)) return "the copy engine wants rows and addresses of 16 bytes";
  if (g.rows + kConvRows > INT32_MAX) return "the copy engine's coordinates have 32 bits";
  return g.pointwise ? nullptr : why_no_im2col(window_of(g));
}

// The columns of conv_sm90_kernel's tiles, or 0 for another kernel. Unless it was asked for it runs
// where x has 64 channels, a whole box. The widest tile that the channels fill and of which every
// multiprocessor has one; activations other than relu are rare: they have one tile. Not measured.
inline int conv_sm90_columns(int asked, const ConvIn& in, const ConvOut& out,
                             const Device& device) {
  const ConvShape& g = in.shape;
  const int first = static_cast<int>(ConvVariant::kSm90x64);
  if (asked >= first) return 64 << (asked - first);
  if (asked != 0 || g.c < kBoxChannels || why_not_conv_sm90(in, out, device) != nullptr) return 0;
  if (needs_any(out.act)) return 128;
  const int64_t parts = cdiv(g.rows, kConvRows);
  if (g.k > 128 && parts * cdiv(g.k, 256) >= device.sms) return 256;
  return g.k > 64 && parts * cdiv(g.k, 128) >= device.sms ? 128 : 64;
}

template <typename T, int kColumns, bool kAny, bool kNorm>
cudaError_t launch_conv_sm90_tile(const ConvIn& in, const ConvOut& out, const Device& device,
                                  Dtype dtype, cudaStream_t stream) {
  const ConvShape& g = in.shape;
  ConvSm90 a{};
  a.in = in;
  a.out = out;
  a.rows = g.rows;
  a.column_tiles = cdiv(g.k, kColumns);
  a.tiles = cdiv(a.rows, kConvRows) * a.column_tiles;
  a.pixels = g.p * g.q;
  a.width = g.q;
  a.c_steps = static_cast<int>(cdiv(g.c, kBoxChannels));
  a.steps = g.kh * g.kw * a.c_steps;
  a.im2col = !g.pointwise;
  a.window = window_of(g);
  CUtensorMap x_map, weight_map;
  cudaError_t error = a.im2col ? im2col_map(&x_map, dtype, in.x, a.rows / a.pixels, g.h, g.w, g.c,
                                            a.window, kConvRows)
                               : tiled_map(&x_map, dtype, in.x, 2, {g.c, a.rows, 0}, kConvRows);
  if (error != cudaSuccess) return error;
  error = tiled_map(&weight_map, dtype, in.weight, 3, {g.c, g.kh * g.kw, g.k}, kColumns);
  if (error != cudaSuccess) return error;
  LaunchShape shape{a.tiles < device.sms ? a.tiles : device.sms, kConvThreads};
  shape.shared_bytes = sizeof(ConvStages<kColumns>) + kSwizzleSlack;
  if (kNorm) shape.shared_bytes += a.c_steps * kBoxChannels * 8;
  return launch(conv_sm90_kernel<T, kColumns, kAny, kNorm>, shape, stream, x_map, weight_map, a);
}

// Runs a convolution in tiles of `columns` columns: 64, 128 or 256, as conv_sm90_columns says. `in`
// and `out` as for the other kernels; part1 and part2 have a row for each kConvRows pixels.
template <typename T>
cudaError_t launch_conv_sm90(const ConvIn& in, const ConvOut& out, const Device& device,
                             Dtype dtype, int columns, cudaStream_t stream) {
  if (why_not_conv_sm90(in, out, device) != nullptr) return cudaErrorNotSupported;
  const bool norm = in.bn_mean != nullptr;
  if (norm && needs_any(out.act)) return cudaErrorNotSupported;  // no op has both
#if defined(FUSEDRES_FEW_DTYPES)  // sanitizers of the host simulator: one tile stands for all
  (void)columns;
  const auto run =
      norm ? launch_conv_sm90_tile<T, 64, false, true> : launch_conv_sm90_tile<T, 64, true, false>;
#else
  const auto run = needs_any(out.act) ? launch_conv_sm90_tile<T, 128, true, false>
                   : columns == 64    ? (norm ? launch_conv_sm90_tile<T, 64, false, true>
                                              : launch_conv_sm90_tile<T, 64, false, false>)
                   : columns == 128   ? (norm ? launch_conv_sm90_tile<T, 128, false, true>
                                              : launch_conv_sm90_tile<T, 128, false, false>)
                                      : (norm ? launch_conv_sm90_tile<T, 256, false, true>
                                              : launch_conv_sm90_tile<T, 256, false, false>);
#endif
  return run(in, out, device, dtype, stream);
}

// Compiled once, in conv_sm90.cu.
extern template cudaError_t launch_conv_sm90<__nv_bfloat16>(const ConvIn&, const ConvOut&,
                                                            const Device&, Dtype, int,
                                                            cudaStream_t);
extern template cudaError_t launch_conv_sm90<__half>(const ConvIn&, const ConvOut&, const Device&,
                                                     Dtype, int, cudaStream_t);

}  // namespace cuda
}  // namespace fusedres
