// What the host side of every CPU operator shares: parameters in the accumulator's type, plans,
// launches and the merge of partial sums.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../view.h"
#include "isa.h"

namespace fusedres {

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
