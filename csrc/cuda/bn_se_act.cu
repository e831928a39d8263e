// bn_se_act on CUDA: tensors in, params, launch. The kernels: bn_se_act.cuh.
#include "bn_se_act.cuh"
#include "host.h"
#include "ops.h"

namespace fusedres {
namespace cuda {

Tensors7 bn_se_act(Tensor x, OptTensor weight, OptTensor bias, Tensor w1, OptTensor b1, Tensor w2,
                   OptTensor b2, OptTensor residual, OptTensor mean_in, OptTensor var_in,
                   bool batch_stats, double eps, std::string se_act, std::string gate,
                   std::string act, bool save_mask) {
  const View v = view_of("bn_se_act", x, kHere);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  check_statistics(v, mean_in, var_in, batch_stats);
  const OnDevice device(v);
  BnSeActParams p = params_of<BnSeActParams>(v);
  p.r = squeezed_channels(v, w1);
  const Parameter weights(v, "weight", weight, {v.c});
  const Parameter biases(v, "bias", bias, {v.c});
  const Parameter weight1(v, "w1", w1, {p.r, v.c});
  const Parameter bias1(v, "b1", b1, {p.r});
  const Parameter weight2(v, "w2", w2, {v.c, p.r});
  const Parameter bias2(v, "b2", b2, {v.c});
  const Parameter given_mean(v, "mean", mean_in, {v.c});
  const Parameter given_var(v, "var", var_in, {v.c});
  p.eps = eps;
  p.se_act = parse_act(v.op, "se_act", se_act);
  p.gate = parse_gate(v.op, gate);
  p.act = parsed;
  p.x = x.const_data_ptr();
  p.residual = data_like(v, x, "residual", residual);
  p.weight = weights.data();
  p.bias = biases.data();
  p.w1 = weight1.data();
  p.b1 = bias1.data();
  p.w2 = weight2.data();
  p.b2 = bias2.data();
  p.given_mean = given_mean.data();
  p.given_var = given_var.data();
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_acc(v, x, {v.c});
  Tensor var = new_acc(v, x, {v.c});
  Tensor squeezed = new_acc(v, x, {v.n, v.c});
  Tensor hidden = new_acc(v, x, {v.n, p.r});
  Tensor logits = new_acc(v, x, {v.n, v.c});
  Tensor mask = new_mask(v, x, save_mask);
  if (v.numel() == 0) {
    given_mean.copy_or_zero(&mean);
    given_var.copy_or_zero(&var);
    zero_all(squeezed, hidden, logits);
    return {y, mean, var, squeezed, hidden, logits, mask};
  }
  p.y = y.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  p.squeezed = squeezed.mutable_data_ptr();
  p.hidden = data_or_null(hidden);
  p.logits = logits.mutable_data_ptr();
  p.mask_out = static_cast<uint8_t*>(data_or_null(mask));
  Tensor workspace = new_workspace(x, bn_se_act_forward_workspace(p));
  p.workspace = data_or_null(workspace);
  check_launch(v, launch_bn_se_act_forward(p, device.stream()));
  return {y, mean, var, squeezed, hidden, logits, mask};
}

Tensors8 bn_se_act_backward(Tensor dy, Tensor x, OptTensor weight, OptTensor bias, Tensor w1,
                            Tensor w2, OptTensor residual, Tensor mean, Tensor var, Tensor squeezed,
                            Tensor hidden, Tensor logits, Tensor mask, bool batch_stats, double eps,
                            std::string se_act, std::string gate, std::string act,
                            bool need_dresidual) {
  const View v = view_of("bn_se_act_backward", x, kHere);
  const OnDevice device(v);
  BnSeActParams p = params_of<BnSeActParams>(v);
  p.r = squeezed_channels(v, w1);
  const Parameter weights(v, "weight", weight, {v.c});
  const Parameter biases(v, "bias", bias, {v.c});
  const Parameter weight1(v, "w1", w1, {p.r, v.c});
  const Parameter weight2(v, "w2", w2, {v.c, p.r});
  const Parameter saved_mean(v, "mean", mean, {v.c});
  const Parameter saved_var(v, "var", var, {v.c});
  p.batch_stats = batch_stats;
  p.eps = eps;
  p.se_act = parse_act(v.op, "se_act", se_act);
  p.gate = parse_gate(v.op, gate);
  p.act = parse_act(v.op, "act", act);
  p.x = x.const_data_ptr();
  p.dy = data_like(v, x, "dy", dy);
  p.residual = data_like(v, x, "residual", residual);
  p.mask = mask_data(v, mask);
  p.weight = weights.data();
  p.bias = biases.data();
  p.w1 = weight1.data();
  p.w2 = weight2.data();
  p.given_mean = saved_mean.data();
  p.given_var = saved_var.data();
  p.squeezed = saved_data(v, "squeezed", squeezed, v.c);
  p.hidden = saved_data(v, "hidden", hidden, p.r);
  p.logits = saved_data(v, "logits", logits, v.c);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dresidual = new_empty_like(x, need_dresidual);
  Tensor dweight = new_acc(v, x, {v.c});
  Tensor dbias = new_acc(v, x, {v.c});
  Tensor dw1 = new_acc(v, x, {p.r, v.c});
  Tensor db1 = new_acc(v, x, {p.r});
  Tensor dw2 = new_acc(v, x, {v.c, p.r});
  Tensor db2 = new_acc(v, x, {v.c});
  if (v.numel() == 0) {
    zero_all(dweight, dbias, dw1, db1, dw2, db2);
    return {dx, dweight, dbias, dw1, db1, dw2, db2, dresidual};
  }
  p.dx = dx.mutable_data_ptr();
  p.dresidual = data_or_null(dresidual);
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  p.dw1 = data_or_null(dw1);
  p.db1 = data_or_null(db1);
  p.dw2 = data_or_null(dw2);
  p.db2 = db2.mutable_data_ptr();
  Tensor workspace = new_workspace(x, bn_se_act_backward_workspace(p));
  p.workspace = data_or_null(workspace);
  check_launch(v, launch_bn_se_act_backward(p, device.stream()));
  return {dx, dweight, dbias, dw1, db1, dw2, db2, dresidual};
}

}  // namespace cuda
}  // namespace fusedres
