// A convolution as an implicit GEMM: rows are the pixels of the result, columns the output channels
// of a group, and the inner dimension the taps of the filter times the group's input channels, a
// tap after the other: as the weight [K, KH, KW, C / groups] has them in memory.
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

struct ConvShape {
  int64_t n, h, w, c;  // of x [N, H, W, C]
  int64_t p, q, k;     // of the result [N, P, Q, K]
  int64_t kh, kw, groups;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  __host__ __device__ int64_t rows() const { return n * p * q; }
  __host__ __device__ int64_t depth() const { return kh * kw * (c / groups); }
};

// Sizes of a convolution: `geometry` has the members kh to dilation_w, and those of x.
template <typename Params>
ConvShape conv_shape(const Params& p) {
  return {p.n,  p.h,      p.w,        p.c,        p.p,     p.q,     p.k,          p.kh,
          p.kw, p.groups, p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w};
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
  if (row >= g.rows()) return {0, -(1 << 30), 0};
  const int64_t line = quotient(row, g.q);
  const int64_t image = quotient(line, g.p);
  const int h = static_cast<int>((line - image * g.p) * g.stride_h - g.pad_h);
  const int w = static_cast<int>((row - line * g.q) * g.stride_w - g.pad_w);
  return {((image * g.h + h) * g.w + w) * g.c, h, w};
}

// Walks along the inner dimension.
struct Tap {
  int c;       // channel of the group
  int kh, kw;  // kh >= g.kh: behind the last tap

  __device__ __forceinline__ void advance(const ConvShape& g, int by) {
    const int channels = static_cast<int>(g.c / g.groups);
    c += by;
    while (c >= channels) {
      c -= channels;
      if (++kw < g.kw) continue;
      kw = 0;
      ++kh;
    }
  }
  __device__ __forceinline__ int dh(const ConvShape& g) const {
    return kh * static_cast<int>(g.dilation_h);
  }
  __device__ __forceinline__ int dw(const ConvShape& g) const {
    return kw * static_cast<int>(g.dilation_w);
  }
  // Elements of x from a corner to here.
  __device__ __forceinline__ int64_t offset(const ConvShape& g) const {
    return (dh(g) * g.w + dw(g)) * g.c + c;
  }
};

}  // namespace cuda
}  // namespace fusedres
