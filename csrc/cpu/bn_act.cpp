// bn_act: y = act((x - mean) * rstd * weight + bias + residual), its backward, and bn_stats.
#include "bn_host.h"

namespace fusedres {
namespace {

template <typename acc_t>
Tensors4 forward(const View& v, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                 const OptTensor& residual, const OptTensor& mean_in, const OptTensor& var_in,
                 bool batch_stats, double eps, Act act, bool save_mask) {
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_acc(v, x, {v.c});
  Tensor var = new_acc(v, x, {v.c});
  Tensor mask = new_mask(v, x, save_mask);
  const void* residual_data = data_like(v, x, "residual", residual);
  bn_statistics<acc_t>(v, x, mean_in, var_in, batch_stats, nullptr, acc_data<acc_t>(mean),
                       acc_data<acc_t>(var));
  const auto k =
      bn_coefficients<acc_t>(v, weight, bias, acc_data<acc_t>(mean), acc_data<acc_t>(var), eps);
  StreamParams p = stream_params(v, apply_plan(v, false, save_mask), false);
  p.x = x.const_data_ptr();
  p.residual = residual_data;
  p.out = y.mutable_data_ptr();
  p.center = k.center.data();
  p.scale = k.scale.data();
  p.bias = k.bias.data();
  p.act = act;
  set_mask(v, nullptr, save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, &p);
  launch(kernels().fwd_apply[v.dtype][fwd_act(act)], p);
  return {y, mean, var, mask};
}

template <typename acc_t>
Tensors4 backward(const View& v, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                  const OptTensor& bias, const OptTensor& residual, const Tensor& mean_in,
                  const Tensor& var_in, const Tensor& mask, bool batch_stats, double eps, Act act,
                  bool need_dresidual) {
  Tensor dx = torch::stable::empty_like(x);
  Tensor dresidual = new_empty_like(x, need_dresidual);
  Tensor dweight = new_acc(v, x, {v.c});
  Tensor dbias = new_acc(v, x, {v.c});
  StreamParams p = stream_params(v, Plan{}, false);
  p.x = x.const_data_ptr();
  p.dy = data_like(v, x, "dy", dy);
  p.residual = data_like(v, x, "residual", residual);
  p.mask_in = mask_data(v, mask);
  p.act = act;
  const auto mean = read_parameter<acc_t>(v.op, "mean", mean_in, {v.c});
  const auto var = read_parameter<acc_t>(v.op, "var", var_in, {v.c});
  const auto k = bn_coefficients<acc_t>(v, weight, bias, mean.data(), var.data(), eps);
  acc_t* dweight_data = acc_data<acc_t>(dweight);
  acc_t* dbias_data = acc_data<acc_t>(dbias);
  p.center = k.center.data();
  p.scale = k.scale.data();
  p.bias = k.bias.data();
  const UMode mode = u_mode(act, p.mask_in);
  const Pair sums = gradient_sums(v, false, mode, p);
  std::vector<acc_t> q(k.scale.size());
  std::vector<acc_t> r(k.scale.size());
  const double count = static_cast<double>(std::max<int64_t>(1, v.count()));
  for (size_t c = 0; c < static_cast<size_t>(v.c); ++c) {
    const double dw = sums.second[c] * static_cast<double>(k.rstd[c]);
    q[c] = bn_backward_q(k.scale[c], k.rstd[c], dw, count);
    r[c] = bn_backward_r(k.scale[c], sums.first[c], count);
    dweight_data[c] = static_cast<acc_t>(dw);
    dbias_data[c] = static_cast<acc_t>(sums.first[c]);
  }
  p.plan = apply_plan(v, false, p.mask_in != nullptr);
  p.out = dx.mutable_data_ptr();
  p.dresidual = need_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  p.p = k.scale.data();
  p.q = batch_stats ? q.data() : nullptr;
  p.r = batch_stats ? r.data() : nullptr;
  set_mask(v, p.mask_in, nullptr, &p);
  launch(kernels().bwd_apply[v.dtype][mode], p);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace

Tensors2 bn_stats(Tensor x) {
  const View v = view_of("bn_stats", x);
  Tensor mean = new_acc(v, x, {v.c});
  Tensor var = new_acc(v, x, {v.c});
  if (v.dtype == kFloat64) {
    bn_statistics<double>(v, x, {}, {}, true, nullptr, acc_data<double>(mean),
                          acc_data<double>(var));
  } else {
    bn_statistics<float>(v, x, {}, {}, true, nullptr, acc_data<float>(mean), acc_data<float>(var));
  }
  return {mean, var};
}

Tensors4 bn_act(Tensor x, OptTensor weight, OptTensor bias, OptTensor residual, OptTensor mean,
                OptTensor var, bool batch_stats, double eps, std::string act, bool save_mask) {
  const View v = view_of("bn_act", x);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  const auto run = v.dtype == kFloat64 ? forward<double> : forward<float>;
  return run(v, x, weight, bias, residual, mean, var, batch_stats, eps, parsed, save_mask);
}

Tensors4 bn_act_backward(Tensor dy, Tensor x, OptTensor weight, OptTensor bias, OptTensor residual,
                         Tensor mean, Tensor var, Tensor mask, bool batch_stats, double eps,
                         std::string act, bool need_dresidual) {
  const View v = view_of("bn_act_backward", x);
  const auto run = v.dtype == kFloat64 ? backward<double> : backward<float>;
  return run(v, dy, x, weight, bias, residual, mean, var, mask, batch_stats, eps,
             parse_act(v.op, "act", act), need_dresidual);
}

}  // namespace fusedres
