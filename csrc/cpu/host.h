// What the host side of every operator shares: the view of a tensor, parameters in the
// accumulator's type, plans, launches and the merge of partial sums.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "isa.h"

namespace fusedres {

// A dense activation tensor: [N, C, inner] in memory order NCHW (planar) or NHWC.
struct View {
  const char* op;
  Dtype dtype;
  bool planar;
  int64_t n, c, hw;
  int64_t numel() const { return n * c * hw; }
  int64_t count() const { return n * hw; }  // values a channel
  int64_t mask_rows() const { return planar ? n * c : n * hw; }
  int64_t mask_cols() const { return planar ? hw : c; }
  int64_t mask_row_bytes() const { return (mask_cols() + 7) / 8; }
};

bool is_channels_last(const Tensor& t);
View view_of(const char* op, const Tensor& x);
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
template <typename acc_t>
acc_t* acc_data(const Tensor& t) {
  return static_cast<acc_t*>(t.mutable_data_ptr());
}

// A parameter of any floating dtype as acc_t, with kPad readable elements behind it.
template <typename acc_t>
std::vector<acc_t> read_parameter(const char* op, const char* name, const Tensor& t,
                                  const std::vector<int64_t>& shape);
template <typename acc_t>
std::vector<acc_t> read_parameter(const char* op, const char* name, const OptTensor& t,
                                  const std::vector<int64_t>& shape, acc_t otherwise);

// Runs fn(begin, end) over [0, items) on torch's threads; small work stays on one.
template <typename F>
void parallel_items(int64_t items, int64_t elements_each, const F& fn) {
  // at least 32768 elements a thread: below that starting a thread costs more than it saves
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each));
  if (items > 0) torch::stable::parallel_for(0, items, grain, fn);
}

// per_image: coefficients or sums for every (n, c), else for every c.
Plan reduce_plan(const View& v, bool per_image, bool with_mask);
Plan apply_plan(const View& v, bool per_image, bool with_mask);
StreamParams stream_params(const View& v, const Plan& plan, bool per_image);
void set_mask(const View& v, const uint8_t* in, uint8_t* out, StreamParams* p);
void launch(StreamFn fn, const StreamParams& p);

// Two double arrays [groups, C]: mean and squared deviations, or two sums.
struct Pair {
  std::vector<double> first, second;
};

Pair merge_moments(const Pair& tiles, int64_t groups, int64_t n_tiles, int64_t cols,
                   int64_t tile_count, int64_t last_count);
Pair merge_sums(const Pair& tiles, int64_t groups, int64_t n_tiles, int64_t cols);

// Mean and squared deviations (or the mean only) of each channel, or of each (n, c).
Pair moments(const View& v, const void* x, bool per_image, bool variance);
// Mean and squared deviations of each channel, from those of each (n, c).
Pair channel_moments(const View& v, const Pair& per_image);
// Runs an elementwise pass; mean and squared deviations of each channel of its result, tile by
// tile.
Pair apply_with_moments(const View& v, bool per_image, StreamFn apply, StreamParams p);
// Sums of u and u * (x - center); `p` carries x, dy, mask, residual, center, scale, bias, act.
// residual_sums: where to put those of u * (residual - res_center), or null.
Pair gradient_sums(const View& v, bool per_image, UMode mode, StreamParams p,
                   std::vector<double>* residual_sums = nullptr);

FwdAct fwd_act(Act act);
UMode u_mode(Act act, const uint8_t* mask);

}  // namespace fusedres
