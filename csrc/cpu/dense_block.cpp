// dense_store, dense_load, dense_grad, dense_finish: a dense block's layers on one buffer of
// channels.
#include <cstring>

#include "bn_host.h"

namespace fusedres {
namespace {

// Channels [start, start + channels) of the buffer, beside a dense tensor of as many channels.
DenseParams dense_params(const View& v, const Tensor& buffer, int64_t start, int64_t channels) {
  STD_TORCH_CHECK(buffer.dim() == 4, v.op, ": buffer must have 4 dimensions, got ",
                  shape_of(buffer));
  STD_TORCH_CHECK(start >= 0 && channels >= 0 && start + channels <= v.c, v.op,
                  ": channels must lie inside of the buffer's ", v.c, ", got ", start, " to ",
                  start + channels);
  DenseParams p{};
  p.planar = v.planar;
  p.channels = channels;
  p.runs = v.planar ? v.n * channels : v.n * v.hw;
  p.cols = v.planar ? v.hw : channels;
  p.x_ld = v.planar ? v.c * v.hw : v.c;
  return p;
}

constexpr int64_t kBytes[] = {4, 8, 2, 2};  // of an element of each Dtype

// Bytes from the buffer's data to the slice's first element.
int64_t slice_offset(const View& v, int64_t start) {
  return (v.planar ? start * v.hw : start) * kBytes[v.dtype];
}

const char* slice_data(const View& v, const Tensor& t, int64_t start) {
  return static_cast<const char*>(t.const_data_ptr()) + slice_offset(v, start);
}

Tensor new_dense(Tensor buffer, int64_t channels) {
  return torch::stable::empty_like(torch::stable::narrow(buffer, 1, 0, channels));
}

void check_dense(const View& v, const Tensor& buffer, const char* name, const Tensor& t) {
  check_shape(v.op, name, t, {v.n, t.size(1), buffer.size(2), buffer.size(3)});
  STD_TORCH_CHECK(t.scalar_type() == buffer.scalar_type(), v.op, ": ", name,
                  " must have the dtype ", torch::headeronly::toString(buffer.scalar_type()),
                  " of buffer, got ", torch::headeronly::toString(t.scalar_type()));
  const bool laid_out = v.planar ? t.is_contiguous() : is_channels_last(t) || v.hw == 1;
  STD_TORCH_CHECK(laid_out || t.numel() == 0, v.op, ": ", name,
                  " must be dense in the memory layout of buffer (",
                  v.planar ? "contiguous" : "channels_last", ")");
}

// A number for each channel of the buffer, or for the first of them: acc_t, changed in place; null
// where they are not given.
template <typename acc_t>
acc_t* numbers(const View& v, const char* name, const OptTensor& t, int64_t channels) {
  if (!t.has_value()) return nullptr;
  const auto wanted = v.dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
  const bool fits = t->dim() == 1 && t->size(0) >= channels && t->is_contiguous();
  STD_TORCH_CHECK(fits && t->scalar_type() == wanted, v.op, ": ", name, " must be contiguous ",
                  torch::headeronly::toString(wanted), ", [", channels, "] or longer, got ",
                  torch::headeronly::toString(t->scalar_type()), " ", shape_of(*t));
  return acc_data<acc_t>(*t);
}

// Copies whole rows of the slice, or all its planes of an image.
void copy_in(const View& v, const DenseParams& p, const char* from, char* to) {
  const int64_t items = v.planar ? v.n : p.runs;
  const int64_t elements = v.planar ? p.channels * p.cols : p.cols;
  const auto bytes = static_cast<size_t>(elements * kBytes[v.dtype]);
  const auto ld = static_cast<size_t>(p.x_ld * kBytes[v.dtype]);
  parallel_items(bytes == 0 ? 0 : items, elements, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      std::memcpy(to + i * ld, from + i * bytes, bytes);
    }
  });
}

template <typename acc_t>
void store(const View& v, const DenseParams& p, const Tensor& buffer, const Tensor& x,
           const OptTensor& mean, const OptTensor& var, int64_t start) {
  const int64_t end = start + p.channels;
  acc_t* mean_out = numbers<acc_t>(v, "mean", mean, end);
  acc_t* var_out = numbers<acc_t>(v, "var", var, end);
  copy_in(v, p, slice_data(v, x, 0),
          static_cast<char*>(buffer.mutable_data_ptr()) + slice_offset(v, start));
  if (mean_out == nullptr) return;
  View slice = v;
  slice.c = p.channels;
  bn_statistics<acc_t>(slice, x, {}, {}, true, nullptr, mean_out + start, var_out + start);
}

int64_t elements_each(const DenseParams& p) { return std::max<int64_t>(1, p.cols); }

template <typename acc_t>
void load(const View& v, DenseParams p, const Tensor& mean, const Tensor& var,
          const OptTensor& weight, const OptTensor& bias, double eps) {
  View slice = v;
  slice.c = p.channels;
  const auto m = read_parameter<acc_t>(v.op, "mean", mean, {p.channels});
  const auto s = read_parameter<acc_t>(v.op, "var", var, {p.channels});
  const auto k = bn_coefficients<acc_t>(slice, weight, bias, m.data(), s.data(), eps);
  p.center = k.center.data();
  p.scale = k.scale.data();
  p.bias = k.bias.data();
  if (p.runs * p.cols == 0) return;
  parallel_items(p.runs, elements_each(p),
                 [&](int64_t begin, int64_t end) { kernels().dense_load[v.dtype](p, begin, end); });
}

template <typename acc_t>
void merge_partials(const std::vector<acc_t>& partials, int64_t tiles, int64_t ld, int64_t channels,
                    const acc_t* factor, acc_t* out) {
  std::vector<double> total(static_cast<size_t>(channels));
  for (int64_t t = 0; t < tiles; ++t) {
    for (size_t c = 0; c < total.size(); ++c) {
      total[c] += static_cast<double>(partials[static_cast<size_t>(t * ld) + c]);
    }
  }
  for (size_t c = 0; c < total.size(); ++c) {
    const double f = factor == nullptr ? 1.0 : static_cast<double>(factor[c]);
    out[c] = static_cast<acc_t>(total[c] * f);
  }
}

template <typename acc_t>
void grad(const View& v, DenseParams p, const Tensor& mean, const Tensor& var,
          const OptTensor& weight, const OptTensor& bias, double eps, const Tensor& dweight,
          const Tensor& dbias, const OptTensor& q, const OptTensor& r) {
  acc_t* q_out = numbers<acc_t>(v, "q", q, p.channels);
  acc_t* r_out = numbers<acc_t>(v, "r", r, p.channels);
  View slice = v;
  slice.c = p.channels;
  const auto m = read_parameter<acc_t>(v.op, "mean", mean, {p.channels});
  const auto s = read_parameter<acc_t>(v.op, "var", var, {p.channels});
  const auto k = bn_coefficients<acc_t>(slice, weight, bias, m.data(), s.data(), eps);
  p.center = k.center.data();
  p.scale = k.scale.data();
  p.bias = k.bias.data();
  // Tiles depend on the shape alone: sums are the same for any number of threads.
  p.tile_runs = p.planar ? std::max<int64_t>(1, p.channels) : kChain;
  p.partial_ld = p.channels + kPad;
  const int64_t tiles = (p.runs + p.tile_runs - 1) / p.tile_runs;
  std::vector<acc_t> sums_weight(static_cast<size_t>(tiles * p.partial_ld));
  std::vector<acc_t> sums_bias(static_cast<size_t>(tiles * p.partial_ld));
  p.partial_weight = sums_weight.data();
  p.partial_bias = sums_bias.data();
  if (p.cols > 0) {
    parallel_items(tiles, p.tile_runs * p.cols, [&](int64_t begin, int64_t end) {
      kernels().dense_grad[v.dtype](p, begin, end);
    });
  }
  merge_partials(sums_weight, tiles, p.partial_ld, p.channels, k.rstd.data(),
                 acc_data<acc_t>(dweight));
  merge_partials<acc_t>(sums_bias, tiles, p.partial_ld, p.channels, nullptr,
                        acc_data<acc_t>(dbias));
  if (q_out == nullptr || v.count() == 0) return;
  const auto count = static_cast<double>(v.count());
  for (int64_t c = 0; c < p.channels; ++c) {
    const auto i = static_cast<size_t>(c);
    q_out[c] += bn_backward_q(k.scale[i], k.rstd[i], acc_data<acc_t>(dweight)[c], count);
    r_out[c] += bn_backward_r(k.scale[i], acc_data<acc_t>(dbias)[c], count);
  }
}

template <typename acc_t>
void finish(const View& v, DenseParams p, const Tensor& mean, const Tensor& q, const Tensor& r) {
  const auto center = read_parameter<acc_t>(v.op, "mean", mean, {p.channels});
  const auto q_data = read_parameter<acc_t>(v.op, "q", q, {p.channels});
  const auto r_data = read_parameter<acc_t>(v.op, "r", r, {p.channels});
  p.center = center.data();
  p.q = q_data.data();
  p.r = r_data.data();
  if (p.runs * p.cols == 0) return;
  parallel_items(p.runs, elements_each(p), [&](int64_t begin, int64_t end) {
    kernels().dense_finish[v.dtype](p, begin, end);
  });
}

}  // namespace

void dense_store(Tensor buffer, Tensor x, OptTensor mean, OptTensor var, int64_t start) {
  const View v = view_of("dense_store", buffer);
  check_dense(v, buffer, "x", x);
  const DenseParams p = dense_params(v, buffer, start, x.size(1));
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), v.op,
                  ": mean and var must be given together");
  (v.dtype == kFloat64 ? store<double> : store<float>)(v, p, buffer, x, mean, var, start);
}

void dense_load(Tensor h, Tensor buffer, Tensor mean, Tensor var, OptTensor weight, OptTensor bias,
                double eps) {
  const View v = view_of("dense_load", buffer);
  check_dense(v, buffer, "h", h);
  DenseParams p = dense_params(v, buffer, 0, h.size(1));
  p.x = slice_data(v, buffer, 0);
  p.h = h.mutable_data_ptr();
  (v.dtype == kFloat64 ? load<double> : load<float>)(v, p, mean, var, weight, bias, eps);
}

Tensors2 dense_grad(Tensor dbuffer, OptTensor q, OptTensor r, Tensor dh, Tensor buffer, Tensor mean,
                    Tensor var, OptTensor weight, OptTensor bias, double eps) {
  const View v = view_of("dense_grad", buffer);
  data_like(v, buffer, "dbuffer", dbuffer);
  check_dense(v, buffer, "dh", dh);
  STD_TORCH_CHECK(q.has_value() == r.has_value(), v.op, ": q and r must be given together");
  DenseParams p = dense_params(v, buffer, 0, dh.size(1));
  Tensor dweight = new_acc(v, buffer, {p.channels});
  Tensor dbias = new_acc(v, buffer, {p.channels});
  p.x = slice_data(v, buffer, 0);
  p.dh = dh.const_data_ptr();
  p.dx = dbuffer.mutable_data_ptr();
  (v.dtype == kFloat64 ? grad<double> : grad<float>)(v, p, mean, var, weight, bias, eps, dweight,
                                                     dbias, q, r);
  return {dweight, dbias};
}

Tensor dense_finish(Tensor dbuffer, Tensor buffer, Tensor mean, Tensor q, Tensor r, int64_t start,
                    int64_t channels) {
  const View v = view_of("dense_finish", buffer);
  data_like(v, buffer, "dbuffer", dbuffer);
  DenseParams p = dense_params(v, buffer, start, channels);
  Tensor out = new_dense(buffer, channels);
  p.x = slice_data(v, buffer, start);
  p.dx_in = slice_data(v, dbuffer, start);
  p.h = out.mutable_data_ptr();
  (v.dtype == kFloat64 ? finish<double> : finish<float>)(v, p, mean, q, r);
  return out;
}

}  // namespace fusedres
