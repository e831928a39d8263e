// What the host sides of the convolutions share: operands in NHWC, their checks, and the sizes.
#pragma once

#include <vector>

#include "conv.cuh"
#include "host.h"

namespace fusedres {
namespace cuda {

// The geometry as the ops' schemas have it.
struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

inline void check_pair(const View& v, const char* name, const std::vector<int64_t>& pair,
                       int64_t least) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, v.op, ": ", name,
                  " must be two numbers from ", least, ", got ", shape_of(pair));
}

// x, weight or residual: 16 bits, as x where it is not x, and channels_last (a copy if it is not).
inline Tensor nhwc(const View& v, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 4, v.op, ": ", name, " must have 4 dimensions, got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), v.op, ": ", name, " must have the dtype ",
                  torch::headeronly::toString(x.scalar_type()), " of x, got ",
                  torch::headeronly::toString(t.scalar_type()));
  check_device(v.op, name, t, v.device);
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Only where and of what dtype x is: it need not be dense.
inline View conv_view(const char* op, const Tensor& x) {
  check_device(op, "x", x, kHere);
  View v{};
  v.op = op;
  v.device = kHere == kCpu ? kCpu : x.get_device_index();
  v.dtype = checked_dtype(op, "x", x);
  STD_TORCH_CHECK(v.dtype == kBFloat16 || v.dtype == kFloat16, op,
                  ": x must be bfloat16 or float16, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return v;
}

// A convolution's operands and sizes, and its result to be.
struct Convolution {
  Tensor x, weight, y;

  template <typename Params>
  Convolution(const View& v, const Tensor& x_in, const Tensor& weight_in, const Geometry& g,
              int64_t variant, Params* p)
      : x(nhwc(v, "x", x_in, x_in)), weight(nhwc(v, "weight", weight_in, x_in)) {
    check_pair(v, "stride", g.stride, 1);
    check_pair(v, "padding", g.padding, 0);
    check_pair(v, "dilation", g.dilation, 1);
    STD_TORCH_CHECK(
        g.groups > 0 && weight.size(0) % g.groups == 0 && x.size(1) == weight.size(1) * g.groups,
        v.op, ": weight must have shape [K, C / groups, KH, KW] for x ", shape_of(x), " and ",
        g.groups, " groups, got ", shape_of(weight));
    STD_TORCH_CHECK(variant >= 0 && variant < kConvVariants, v.op, ": variant must be 0 to ",
                    kConvVariants - 1, ", got ", variant);
    p->dtype = v.dtype;
    p->variant = static_cast<int>(variant);
    p->n = x.size(0), p->c = x.size(1), p->h = x.size(2), p->w = x.size(3);
    p->k = weight.size(0), p->kh = weight.size(2), p->kw = weight.size(3);
    p->groups = g.groups;
    p->stride_h = g.stride[0], p->stride_w = g.stride[1];
    p->pad_h = g.padding[0], p->pad_w = g.padding[1];
    p->dilation_h = g.dilation[0], p->dilation_w = g.dilation[1];
    const int64_t room_h = p->h + 2 * p->pad_h - p->dilation_h * (p->kh - 1) - 1;
    const int64_t room_w = p->w + 2 * p->pad_w - p->dilation_w * (p->kw - 1) - 1;
    STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, v.op, ": the filter ", shape_of(weight),
                    " does not fit into x ", shape_of(x), " with its padding");
    p->p = room_h / p->stride_h + 1;
    p->q = room_w / p->stride_w + 1;
    const int64_t shape[] = {p->n, p->k, p->p, p->q};  // nvcc takes no list in the call
    y = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), x.scalar_type(),
                             std::nullopt, x.device(), std::nullopt,
                             torch::headeronly::MemoryFormat::ChannelsLast);
    p->x = x.const_data_ptr();
    p->weight = weight.const_data_ptr();
    p->y = y.mutable_data_ptr();
  }
};

}  // namespace cuda
}  // namespace fusedres
