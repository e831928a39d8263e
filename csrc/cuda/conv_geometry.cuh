// A convolution as an implicit GEMM: rows are the pixels of the result, columns the output channels
// of a group, and the inner dimension the taps of the filter times the group's input channels, a
// tap after the other: as the weight [K, KH, KW, C / groups] has them in memory.
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

struct ConvShape {
  int64_t rows;                   // pixels of the result [N, P, Q, K]
  int64_t c, k;                   // channels of x [N, H, W, C] and of the result
  int groups, channels, columns;  // input and output channels of a group
  int depth;                      // of the inner dimension
  int h, w, p, q, kh, kw;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool pointwise;  // a row of the GEMM is a pixel of x
};

// Whether the kernels can count these sizes in 32 bits.
template <typename Params>
bool fits_conv(const Params& p) {
  constexpr int64_t kMost = int64_t{1} << 29;
  const int64_t reach_h = p.h + p.pad_h + p.dilation_h * p.kh + p.p * p.stride_h;
  const int64_t reach_w = p.w + p.pad_w + p.dilation_w * p.kw + p.q * p.stride_w;
  return reach_h < kMost && reach_w < kMost && p.kh * p.kw * p.c < kMost && p.k < kMost;
}

template <typename Params>
ConvShape conv_shape(const Params& p) {
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  ConvShape g{};
  g.rows = p.n * p.p * p.q;
  g.c = p.c;
  g.k = p.k;
  g.groups = number(p.groups);
  g.channels = number(p.c / p.groups);
  g.columns = number(p.k / p.groups);
  g.depth = number(p.kh * p.kw) * g.channels;
  g.h = number(p.h), g.w = number(p.w), g.p = number(p.p), g.q = number(p.q);
  g.kh = number(p.kh), g.kw = number(p.kw);
  g.stride_h = number(p.stride_h), g.stride_w = number(p.stride_w);
  g.pad_h = number(p.pad_h), g.pad_w = number(p.pad_w);
  g.dilation_h = number(p.dilation_h), g.dilation_w = number(p.dilation_w);
  g.pointwise = g.kh * g.kw == 1 && g.stride_h * g.stride_w == 1 && g.pad_h + g.pad_w == 0;
  return g;
}

// Where a pixel's filter begins in x.
struct Corner {
  int64_t at;  // element of channel 0; its pixel may be outside
  int h, w;

  __device__ __forceinline__ bool sees(const ConvShape& g, int dh, int dw) const {
    return static_cast<unsigned>(h + dh) < static_cast<unsigned>(g.h) &&
           static_cast<unsigned>(w + dw) < static_cast<unsigned>(g.w);
  }
};

// Of a row of the GEMM; no tap of a row that there is not is in the image.
__device__ __forceinline__ Corner corner_of(const ConvShape& g, int64_t row) {
  if (row >= g.rows) return {0, -(1 << 30), 0};
  if (g.pointwise) return {row * g.c, 0, 0};
  const int64_t line = quotient(row, g.q);
  const int64_t image = quotient(line, g.p);
  const int h = static_cast<int>(line - image * g.p) * g.stride_h - g.pad_h;
  const int w = static_cast<int>(row - line * g.q) * g.stride_w - g.pad_w;
  return {((image * g.h + h) * g.w + w) * g.c, h, w};
}

// Walks along the inner dimension.
struct Tap {
  int c;       // channel of the group
  int kh, kw;  // kh >= g.kh: behind the last tap

  __device__ __forceinline__ void advance(const ConvShape& g, int by) {
    c += by;
    while (c >= g.channels) {
      c -= g.channels;
      if (++kw < g.kw) continue;
      kw = 0;
      ++kh;
    }
  }
  __device__ __forceinline__ int dh(const ConvShape& g) const { return kh * g.dilation_h; }
  __device__ __forceinline__ int dw(const ConvShape& g) const { return kw * g.dilation_w; }
  // Elements of x from a corner to here.
  __device__ __forceinline__ int64_t offset(const ConvShape& g) const {
    return (static_cast<int64_t>(dh(g)) * g.w + dw(g)) * g.c + c;
  }
};

}  // namespace cuda
}  // namespace fusedres
