// Batch normalisation on the host: statistics and the coefficients of its affine map.
#pragma once

#include "../ops.h"
#include "host.h"

namespace fusedres {

// Statistics as they are returned and saved: acc_t, so that forward and backward see the same bits.
// `moments_nc` are those of each (n, c) when the caller has them, else null.
template <typename acc_t>
void bn_statistics(const View& v, const Tensor& x, const OptTensor& mean, const OptTensor& var,
                   bool batch_stats, const Pair* moments_nc, acc_t* mean_out, acc_t* var_out) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), v.op,
                  ": mean and var must be given together");
  STD_TORCH_CHECK(mean.has_value() || batch_stats, v.op,
                  ": mean and var are required unless batch_stats is true");
  if (mean.has_value()) {
    const auto given_mean = read_parameter<acc_t>(v.op, "mean", *mean, {v.c});
    const auto given_var = read_parameter<acc_t>(v.op, "var", *var, {v.c});
    std::copy_n(given_mean.begin(), v.c, mean_out);
    std::copy_n(given_var.begin(), v.c, var_out);
  } else if (v.count() == 0) {
    std::fill_n(mean_out, v.c, acc_t(0));
    std::fill_n(var_out, v.c, acc_t(0));
  } else {
    const Pair stats = moments_nc != nullptr ? channel_moments(v, *moments_nc)
                                             : moments(v, x.const_data_ptr(), false, true);
    for (int64_t c = 0; c < v.c; ++c) {
      const size_t i = static_cast<size_t>(c);
      mean_out[c] = static_cast<acc_t>(stats.first[i]);
      const double var_c = stats.second[i] / static_cast<double>(v.count());
      var_out[c] = static_cast<acc_t>(var_c < 0 ? 0 : var_c);  // NaN stays NaN
    }
  }
}

// y = (x - center) * scale + bias, rstd kept for the backward.
template <typename acc_t>
struct BnCoefficients {
  std::vector<acc_t> center, scale, bias, rstd;
};

template <typename acc_t>
BnCoefficients<acc_t> bn_coefficients(const View& v, const OptTensor& weight, const OptTensor& bias,
                                      const acc_t* mean, const acc_t* var, double eps) {
  BnCoefficients<acc_t> k;
  k.scale = read_parameter<acc_t>(v.op, "weight", weight, {v.c}, acc_t(1));
  k.bias = read_parameter<acc_t>(v.op, "bias", bias, {v.c}, acc_t(0));
  k.center.assign(mean, mean + v.c);
  k.center.resize(k.scale.size());
  k.rstd.resize(k.scale.size());
  for (size_t c = 0; c < static_cast<size_t>(v.c); ++c) {
    k.rstd[c] = bn_rstd(var[c], eps);
    k.scale[c] *= k.rstd[c];
  }
  return k;
}

}  // namespace fusedres
