// conv_bn_act: y = act(bn(conv(x)) + residual) with given statistics, in one launch.
// The contract of the params and launches: launch.cuh.
#pragma once

#include "conv_sm90_launch.cuh"

namespace fusedres {
namespace cuda {

struct ConvBnActParams {
  Dtype dtype;         // kFloat16 or kBFloat16; others fail with cudaErrorNotSupported
  int variant;         // a ConvVariant
  int64_t n, c, h, w;  // x
  int64_t p, q, k;     // y
  int64_t kh, kw, groups;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  double eps;
  Act act;
  const void* x;         // [N, H, W, C] scalar_t
  const void* weight;    // [K, KH, KW, C / groups] scalar_t
  const void* residual;  // [N, P, Q, K] scalar_t or null
  const void* bias;      // [K] acc_t or null, like the next four
  const void* bn_weight;
  const void* bn_bias;
  const void* mean;  // null: no batch norm
  const void* var;
  void* y;  // [N, P, Q, K] scalar_t
};

// Computes: y = act(a * conv(x) + shift + residual), shift = a * (bias - mean) + bn_bias
// Reads:    x [N, H, W, C] once a block of channels, from the L2 after the first (a 3x3: once a
//           tap); weight, cached; residual [N, P, Q, K] once; the channels' parameters [K]
// Writes:   y [N, P, Q, K] once
// Traffic:  (N*H*W*C + (1 or 2)*N*P*Q*K + K*KH*KW*C)*sizeof(x) bytes
// Split:    one block = one tile of pixels and of a group's channels; products of 16 bits on the
//           tensor cores, fp32 sums, one rounding at the store
template <typename T, typename Tile, bool kWide>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_bn_act_fwd_kernel(const __grid_constant__ ConvIn in, const __grid_constant__ ConvOut out) {
  convolve<T, Tile, kWide, Prologue::kNone, true, false>(in, out);
}

template <typename T>
cudaError_t conv_bn_act_forward(const ConvBnActParams& p, cudaStream_t stream) {
  if (!fits_conv(p)) return cudaErrorNotSupported;
  const ConvIn in = conv_in(p);
  ConvOut out = conv_out(p, p.residual);
  out.mean = static_cast<const float*>(p.mean);
  out.var = static_cast<const float*>(p.var);
  out.weight = static_cast<const float*>(p.bn_weight);
  out.shift = static_cast<const float*>(p.bn_bias);
  out.eps = p.eps;
  out.act = p.act;
  Device device;
  const cudaError_t error = read_device(&device);
  if (error != cudaSuccess) return error;
  if (const int columns = conv_sm90_columns(p.variant, in, out, device)) {
    return launch_conv_sm90<T>(in, out, device, p.dtype, columns, stream);
  }
  if (!is_wide(in, out)) {
    return launch_conv<SmallTile>(conv_bn_act_fwd_kernel<T, SmallTile, false>, in, out, stream);
  }
  switch (conv_variant(p.variant, in.shape, device)) {
    case ConvVariant::k128x128:
      return launch_conv<LargeTile>(conv_bn_act_fwd_kernel<T, LargeTile, true>, in, out, stream);
    case ConvVariant::k128x64:
      return launch_conv<MediumTile>(conv_bn_act_fwd_kernel<T, MediumTile, true>, in, out, stream);
    default:
      return launch_conv<SmallTile>(conv_bn_act_fwd_kernel<T, SmallTile, true>, in, out, stream);
  }
}

inline cudaError_t launch_conv_bn_act_forward(const ConvBnActParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_HALF(p.dtype, conv_bn_act_forward, p, stream);
}

}  // namespace cuda
}  // namespace fusedres
