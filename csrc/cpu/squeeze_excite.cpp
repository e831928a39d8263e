// squeeze_excite: y = post_act(x * gate(mlp(mean_hw x)) + residual), and its backward.
#include "se_host.h"

namespace fusedres {
namespace {

// x * gate + residual in the streaming kernels' terms: center and bias are zero
template <typename acc_t>
struct GateCoefficients {
  std::vector<acc_t> gate, zero;
  GateCoefficients(const View& v, Gate kind, const acc_t* logits)
      : gate(static_cast<size_t>(v.n * v.c + kPad)), zero(gate.size()) {
    for (int64_t i = 0; i < v.n * v.c; ++i) {
      gate[static_cast<size_t>(i)] = gate_forward(kind, logits[i]);
    }
  }
  void set(StreamParams* p) const {
    p->center = p->bias = zero.data();
    p->scale = gate.data();
  }
};

template <typename acc_t>
Tensors5 forward(const View& v, const Tensor& x, const Tensor& w1, const OptTensor& b1,
                 const Tensor& w2, const OptTensor& b2, const OptTensor& residual, Act act,
                 Gate gate, Act post_act, bool save_mask) {
  const SeWeights<acc_t> w(v, w1, w2);
  const void* residual_data = data_like(v, x, "residual", residual);
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = new_mask(v, x, save_mask);
  Tensor squeezed = new_acc(v, x, {v.n, v.c});
  Tensor hidden = new_acc(v, x, {v.n, w.r});
  Tensor logits = new_acc(v, x, {v.n, v.c});
  acc_t* pooled = acc_data<acc_t>(squeezed);
  const Pair means = moments(v, x.const_data_ptr(), true, false);
  std::copy(means.first.begin(), means.first.end(), pooled);
  se_mlp_forward<acc_t>(v, pooled, w, b1, b2, act, acc_data<acc_t>(hidden),
                        acc_data<acc_t>(logits));
  const GateCoefficients<acc_t> k(v, gate, acc_data<acc_t>(logits));
  StreamParams p = stream_params(v, apply_plan(v, true, save_mask), true);
  k.set(&p);
  p.x = x.const_data_ptr();
  p.residual = residual_data;
  p.out = y.mutable_data_ptr();
  p.act = post_act;
  set_mask(v, nullptr, save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, &p);
  launch(kernels().fwd_apply[v.dtype][fwd_act(post_act)], p);
  return {y, squeezed, hidden, logits, mask};
}

template <typename acc_t>
Tensors6 backward(const View& v, const Tensor& dy, const Tensor& x, const Tensor& w1,
                  const Tensor& w2, const OptTensor& residual, const Tensor& squeezed,
                  const Tensor& hidden, const Tensor& logits, const Tensor& mask, Act act,
                  Gate gate, Act post_act, bool need_dresidual) {
  const SeWeights<acc_t> w(v, w1, w2);
  const SeGradients out(v, x, w.r);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dresidual = new_empty_like(x, need_dresidual);
  StreamParams p = stream_params(v, Plan{}, true);
  p.x = x.const_data_ptr();
  p.dy = data_like(v, x, "dy", dy);
  p.residual = data_like(v, x, "residual", residual);
  p.mask_in = mask_data(v, mask);
  p.act = post_act;
  const acc_t* saved_logits = saved_data<acc_t>(v, "logits", logits, v.c);
  const GateCoefficients<acc_t> k(v, gate, saved_logits);
  k.set(&p);
  const UMode mode = u_mode(post_act, p.mask_in);
  const Pair sums = gradient_sums(v, true, mode, p);  // second: dgate, the sum of u * x
  std::vector<acc_t> dlogits(static_cast<size_t>(v.n * v.c));
  for (size_t i = 0; i < dlogits.size(); ++i) {
    dlogits[i] = gate_backward(gate, saved_logits[i], static_cast<acc_t>(sums.second[i]));
  }
  std::vector<acc_t> r =
      se_mlp_backward<acc_t>(v, dlogits, saved_data<acc_t>(v, "squeezed", squeezed, v.c),
                             saved_data<acc_t>(v, "hidden", hidden, w.r), w, act, out);
  for (acc_t& value : r) value /= static_cast<acc_t>(std::max<int64_t>(1, v.hw));
  p.plan = apply_plan(v, true, p.mask_in != nullptr);
  p.out = dx.mutable_data_ptr();
  p.dresidual = need_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  p.p = k.gate.data();
  p.r = r.data();
  set_mask(v, p.mask_in, nullptr, &p);
  launch(kernels().bwd_apply[v.dtype][mode], p);
  return {dx, out.dw1, out.db1, out.dw2, out.db2, dresidual};
}

}  // namespace

Tensors5 squeeze_excite(Tensor x, Tensor w1, OptTensor b1, Tensor w2, OptTensor b2,
                        OptTensor residual, std::string act, std::string gate, std::string post_act,
                        bool save_mask) {
  const View v = view_of("squeeze_excite", x);
  const Act parsed = parse_act(v.op, "post_act", post_act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", post_act, " has no mask to save");
  const auto run = v.dtype == kFloat64 ? forward<double> : forward<float>;
  return run(v, x, w1, b1, w2, b2, residual, parse_act(v.op, "act", act), parse_gate(v.op, gate),
             parsed, save_mask);
}

Tensors6 squeeze_excite_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, OptTensor residual,
                                 Tensor squeezed, Tensor hidden, Tensor logits, Tensor mask,
                                 std::string act, std::string gate, std::string post_act,
                                 bool need_dresidual) {
  const View v = view_of("squeeze_excite_backward", x);
  const auto run = v.dtype == kFloat64 ? backward<double> : backward<float>;
  return run(v, dy, x, w1, w2, residual, squeezed, hidden, logits, mask,
             parse_act(v.op, "act", act), parse_gate(v.op, gate),
             parse_act(v.op, "post_act", post_act), need_dresidual);
}

}  // namespace fusedres
