// A dense tensor as kernels see it, and checks of the operands that go with it. Nothing here is
// about a kind of device: an operand must be where its tensor is.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "bn_math.h"
#include "check.h"
#include "dtype.h"

namespace fusedres {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A dense activation tensor: [N, C, inner] in memory order NCHW (planar) or NHWC.
struct View {
  const char* op;
  Dtype dtype;
  bool planar;
  int64_t n, c, hw;
  int32_t device;  // kCpu, or the index of a CUDA device
  int64_t numel() const { return n * c * hw; }
  int64_t count() const { return n * hw; }  // values a channel
  int64_t mask_rows() const { return planar ? n * c : n * hw; }
  int64_t mask_cols() const { return planar ? hw : c; }
  int64_t mask_row_bytes() const { return (mask_cols() + 7) / 8; }
};

bool is_channels_last(const Tensor& t);
Dtype checked_dtype(const char* op, const char* name, const Tensor& t);
// x must be on `device`, or for kAnyCuda on any CUDA device.
View view_of(const char* op, const Tensor& x, int32_t device = kCpu);
// dy, residual, gate, ...: x's shape, dtype and memory order. Returns the data.
const void* data_like(const View& v, const Tensor& x, const char* name, const Tensor& t);
const void* data_like(const View& v, const Tensor& x, const char* name, const OptTensor& t);
// The mask of `v`, or null when the tensor is empty.
const uint8_t* mask_data(const View& v, const Tensor& mask);
Tensor new_mask(const View& v, const Tensor& x, bool wanted);

Act parse_act(const char* op, const char* name, const std::string& act);
Gate parse_gate(const char* op, const std::string& gate);
inline bool has_mask(Act act) {
  return act == Act::kRelu || act == Act::kRelu6 || act == Act::kLeakyRelu;
}

Tensor new_acc(const View& v, const Tensor& x, std::vector<int64_t> sizes);
Tensor new_empty_like(const Tensor& x, bool wanted);  // x's strides, or [0]

}  // namespace fusedres
