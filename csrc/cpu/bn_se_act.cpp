// bn_se_act: z = bn(x), y = act(z * gate(mlp(mean_hw z)) + residual), and its backward. One pass
// over x gives BN's statistics and the squeeze, one writes y; the backward has one of each too
// (PERFORMANCE: with S1 = mean_hw x and the sums of u and u * x for every (n, c), the rest is
// arithmetic on [N, C]).
#include "bn_host.h"
#include "se_host.h"

namespace fusedres {
namespace {

// y = act((x - center) * scale + bias + residual) with scale, bias [N, C]; pooled = mean_hw z.
template <typename acc_t>
struct GatedBn {
  BnCoefficients<acc_t> bn;
  std::vector<acc_t> pooled, gate, scale, bias;

  GatedBn(const View& v, BnCoefficients<acc_t> coefficients, const acc_t* squeezed)
      : bn(std::move(coefficients)),
        pooled(static_cast<size_t>(v.n * v.c)),
        gate(pooled.size()),
        scale(pooled.size() + kPad),
        bias(pooled.size() + kPad) {
    for (size_t i = 0; i < pooled.size(); ++i) {
      const size_t c = i % static_cast<size_t>(v.c);
      pooled[i] = (squeezed[i] - bn.center[c]) * bn.scale[c] + bn.bias[c];
    }
  }
  void set_gate(const View& v, Gate kind, const acc_t* logits) {
    for (size_t i = 0; i < gate.size(); ++i) {
      const size_t c = i % static_cast<size_t>(v.c);
      gate[i] = gate_forward(kind, logits[i]);
      scale[i] = bn.scale[c] * gate[i];
      bias[i] = bn.bias[c] * gate[i];
    }
  }
  void set(StreamParams* p) const {
    p->center = bn.center.data();
    p->scale = scale.data();
    p->bias = bias.data();
  }
};

template <typename acc_t>
Tensors7 forward(const View& v, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                 const Tensor& w1, const OptTensor& b1, const Tensor& w2, const OptTensor& b2,
                 const OptTensor& residual, const OptTensor& mean_in, const OptTensor& var_in,
                 bool batch_stats, double eps, Act se_act, Gate gate, Act act, bool save_mask) {
  const SeWeights<acc_t> w(v, w1, w2);
  const void* residual_data = data_like(v, x, "residual", residual);
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = new_mask(v, x, save_mask);
  Tensor mean = new_acc(v, x, {v.c});
  Tensor var = new_acc(v, x, {v.c});
  Tensor squeezed = new_acc(v, x, {v.n, v.c});
  Tensor hidden = new_acc(v, x, {v.n, w.r});
  Tensor logits = new_acc(v, x, {v.n, v.c});
  const Pair stats = moments(v, x.const_data_ptr(), true, !mean_in.has_value());
  std::copy(stats.first.begin(), stats.first.end(), acc_data<acc_t>(squeezed));
  bn_statistics<acc_t>(v, x, mean_in, var_in, batch_stats, &stats, acc_data<acc_t>(mean),
                       acc_data<acc_t>(var));
  GatedBn<acc_t> k(
      v, bn_coefficients<acc_t>(v, weight, bias, acc_data<acc_t>(mean), acc_data<acc_t>(var), eps),
      acc_data<acc_t>(squeezed));
  se_mlp_forward<acc_t>(v, k.pooled.data(), w, b1, b2, se_act, acc_data<acc_t>(hidden),
                        acc_data<acc_t>(logits));
  k.set_gate(v, gate, acc_data<acc_t>(logits));
  StreamParams p = stream_params(v, apply_plan(v, true, save_mask), true);
  k.set(&p);
  p.x = x.const_data_ptr();
  p.residual = residual_data;
  p.out = y.mutable_data_ptr();
  p.act = act;
  set_mask(v, nullptr, save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, &p);
  launch(kernels().fwd_apply[v.dtype][fwd_act(act)], p);
  return {y, mean, var, squeezed, hidden, logits, mask};
}

// dz = u * g + dp / HW, and BN's backward of it as coefficients of u and x - mean.
template <typename acc_t>
struct Coefficients {
  std::vector<acc_t> p, q, r;
  Coefficients(const View& v, const GatedBn<acc_t>& k, const Pair& sums,
               const std::vector<acc_t>& dpooled, const acc_t* squeezed, acc_t* dweight,
               acc_t* dbias)
      : p(k.scale), q(k.scale.size()), r(k.scale.size()) {
    const size_t channels = static_cast<size_t>(v.c);
    const double count = static_cast<double>(std::max<int64_t>(1, v.count()));
    const double hw = static_cast<double>(std::max<int64_t>(1, v.hw));
    for (size_t c = 0; c < channels; ++c) {
      double sum_dz = 0;
      double sum_dz_x = 0;  // of dz * (x - mean)
      for (size_t i = c; i < k.gate.size(); i += channels) {
        const double g = static_cast<double>(k.gate[i]);
        const double dp = static_cast<double>(dpooled[i]);
        sum_dz += g * sums.first[i] + dp;
        sum_dz_x += g * sums.second[i] + dp * (static_cast<double>(squeezed[i]) - k.bn.center[c]);
      }
      const double dw = sum_dz_x * static_cast<double>(k.bn.rstd[c]);
      const acc_t a = k.bn.scale[c];
      for (size_t i = c; i < k.gate.size(); i += channels) {
        q[i] = bn_backward_q(a, k.bn.rstd[c], dw, count);
        r[i] = static_cast<acc_t>(a * (static_cast<double>(dpooled[i]) / hw - sum_dz / count));
      }
      dweight[c] = static_cast<acc_t>(dw);
      dbias[c] = static_cast<acc_t>(sum_dz);
    }
  }
  // running statistics do not depend on x
  void set_fixed_statistics(const View& v, const GatedBn<acc_t>& k,
                            const std::vector<acc_t>& dpooled) {
    const acc_t hw = static_cast<acc_t>(std::max<int64_t>(1, v.hw));
    for (size_t i = 0; i < k.gate.size(); ++i) {
      r[i] = k.bn.scale[i % static_cast<size_t>(v.c)] * (dpooled[i] / hw);
    }
  }
};

template <typename acc_t>
Tensors8 backward(const View& v, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                  const OptTensor& bias, const Tensor& w1, const Tensor& w2,
                  const OptTensor& residual, const Tensor& mean_in, const Tensor& var_in,
                  const Tensor& squeezed_in, const Tensor& hidden, const Tensor& logits_in,
                  const Tensor& mask, bool batch_stats, double eps, Act se_act, Gate gate, Act act,
                  bool need_dresidual) {
  const SeWeights<acc_t> w(v, w1, w2);
  const SeGradients out(v, x, w.r);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dresidual = new_empty_like(x, need_dresidual);
  Tensor dweight = new_acc(v, x, {v.c});
  Tensor dbias = new_acc(v, x, {v.c});
  const auto mean = read_parameter<acc_t>(v.op, "mean", mean_in, {v.c});
  const auto var = read_parameter<acc_t>(v.op, "var", var_in, {v.c});
  const acc_t* squeezed = saved_data<acc_t>(v, "squeezed", squeezed_in, v.c);
  const acc_t* logits = saved_data<acc_t>(v, "logits", logits_in, v.c);
  GatedBn<acc_t> k(v, bn_coefficients<acc_t>(v, weight, bias, mean.data(), var.data(), eps),
                   squeezed);
  k.set_gate(v, gate, logits);
  StreamParams p = stream_params(v, Plan{}, true);
  k.set(&p);
  p.x = x.const_data_ptr();
  p.dy = data_like(v, x, "dy", dy);
  p.residual = data_like(v, x, "residual", residual);
  p.mask_in = mask_data(v, mask);
  p.act = act;
  const UMode mode = u_mode(act, p.mask_in);
  const Pair sums = gradient_sums(v, true, mode, p);
  std::vector<acc_t> dlogits(k.gate.size());
  for (size_t i = 0; i < dlogits.size(); ++i) {
    const size_t c = i % static_cast<size_t>(v.c);
    const double dgate = k.bn.scale[c] * sums.second[i] + k.bn.bias[c] * sums.first[i];
    dlogits[i] = gate_backward(gate, logits[i], static_cast<acc_t>(dgate));
  }
  const auto dpooled = se_mlp_backward<acc_t>(
      v, dlogits, k.pooled.data(), saved_data<acc_t>(v, "hidden", hidden, w.r), w, se_act, out);
  Coefficients<acc_t> dz(v, k, sums, dpooled, squeezed, acc_data<acc_t>(dweight),
                         acc_data<acc_t>(dbias));
  if (!batch_stats) dz.set_fixed_statistics(v, k, dpooled);
  p.plan = apply_plan(v, true, p.mask_in != nullptr);
  p.out = dx.mutable_data_ptr();
  p.dresidual = need_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  p.p = dz.p.data();
  p.q = batch_stats ? dz.q.data() : nullptr;
  p.r = dz.r.data();
  set_mask(v, p.mask_in, nullptr, &p);
  launch(kernels().bwd_apply[v.dtype][mode], p);
  return {dx, dweight, dbias, out.dw1, out.db1, out.dw2, out.db2, dresidual};
}

}  // namespace

Tensors7 bn_se_act(Tensor x, OptTensor weight, OptTensor bias, Tensor w1, OptTensor b1, Tensor w2,
                   OptTensor b2, OptTensor residual, OptTensor mean, OptTensor var,
                   bool batch_stats, double eps, std::string se_act, std::string gate,
                   std::string act, bool save_mask) {
  const View v = view_of("bn_se_act", x);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  const auto run = v.dtype == kFloat64 ? forward<double> : forward<float>;
  return run(v, x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, eps,
             parse_act(v.op, "se_act", se_act), parse_gate(v.op, gate), parsed, save_mask);
}

Tensors8 bn_se_act_backward(Tensor dy, Tensor x, OptTensor weight, OptTensor bias, Tensor w1,
                            Tensor w2, OptTensor residual, Tensor mean, Tensor var, Tensor squeezed,
                            Tensor hidden, Tensor logits, Tensor mask, bool batch_stats, double eps,
                            std::string se_act, std::string gate, std::string act,
                            bool need_dresidual) {
  const View v = view_of("bn_se_act_backward", x);
  const auto run = v.dtype == kFloat64 ? backward<double> : backward<float>;
  return run(v, dy, x, weight, bias, w1, w2, residual, mean, var, squeezed, hidden, logits, mask,
             batch_stats, eps, parse_act(v.op, "se_act", se_act), parse_gate(v.op, gate),
             parse_act(v.op, "act", act), need_dresidual);
}

}  // namespace fusedres
