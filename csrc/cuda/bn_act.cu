// bn_act and bn_stats on CUDA: tensors in, params, launch. The kernels: bn_act.cuh.
#include "bn_act.cuh"
#include "host.h"
#include "ops.h"

namespace fusedres {
namespace cuda {
namespace {

void launch_forward(const View& v, const Tensor& x, const OnDevice& device, BnActParams* p) {
  Tensor workspace = new_workspace(x, bn_act_forward_workspace(*p));
  p->workspace = data_or_null(workspace);
  check_launch(v, launch_bn_act_forward(*p, device.stream()));
}

}  // namespace

Tensors2 bn_stats(Tensor x) {
  const View v = view_of("bn_stats", x, kHere);
  const OnDevice device(v);
  Tensor mean = new_acc(v, x, {v.c});
  Tensor var = new_acc(v, x, {v.c});
  if (v.numel() == 0) {
    zero_all(mean, var);
    return {mean, var};
  }
  BnActParams p = params_of<BnActParams>(v);
  p.x = x.const_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  launch_forward(v, x, device, &p);
  return {mean, var};
}

Tensors4 bn_act(Tensor x, OptTensor weight, OptTensor bias, OptTensor residual, OptTensor mean_in,
                OptTensor var_in, bool batch_stats, double eps, std::string act, bool save_mask) {
  const View v = view_of("bn_act", x, kHere);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  check_statistics(v, mean_in, var_in, batch_stats);
  const OnDevice device(v);
  const Parameter weights(v, "weight", weight, {v.c});
  const Parameter biases(v, "bias", bias, {v.c});
  const Parameter given_mean(v, "mean", mean_in, {v.c});
  const Parameter given_var(v, "var", var_in, {v.c});
  BnActParams p = params_of<BnActParams>(v);
  p.eps = eps;
  p.act = parsed;
  p.x = x.const_data_ptr();
  p.residual = data_like(v, x, "residual", residual);
  p.weight = weights.data();
  p.bias = biases.data();
  p.given_mean = given_mean.data();
  p.given_var = given_var.data();
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_acc(v, x, {v.c});
  Tensor var = new_acc(v, x, {v.c});
  Tensor mask = new_mask(v, x, save_mask);
  if (v.numel() == 0) {
    given_mean.copy_or_zero(&mean);
    given_var.copy_or_zero(&var);
    return {y, mean, var, mask};
  }
  p.y = y.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  p.mask_out = static_cast<uint8_t*>(data_or_null(mask));
  launch_forward(v, x, device, &p);
  return {y, mean, var, mask};
}

Tensors4 bn_act_backward(Tensor dy, Tensor x, OptTensor weight, OptTensor bias, OptTensor residual,
                         Tensor mean, Tensor var, Tensor mask, bool batch_stats, double eps,
                         std::string act, bool need_dresidual) {
  const View v = view_of("bn_act_backward", x, kHere);
  const OnDevice device(v);
  const Parameter weights(v, "weight", weight, {v.c});
  const Parameter biases(v, "bias", bias, {v.c});
  const Parameter saved_mean(v, "mean", mean, {v.c});
  const Parameter saved_var(v, "var", var, {v.c});
  BnActParams p = params_of<BnActParams>(v);
  p.batch_stats = batch_stats;
  p.eps = eps;
  p.act = parse_act(v.op, "act", act);
  p.x = x.const_data_ptr();
  p.dy = data_like(v, x, "dy", dy);
  p.residual = data_like(v, x, "residual", residual);
  p.mask = mask_data(v, mask);
  p.weight = weights.data();
  p.bias = biases.data();
  p.given_mean = saved_mean.data();
  p.given_var = saved_var.data();
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = new_acc(v, x, {v.c});
  Tensor dbias = new_acc(v, x, {v.c});
  Tensor dresidual = new_empty_like(x, need_dresidual);
  if (v.numel() == 0) {
    zero_all(dweight, dbias);
    return {dx, dweight, dbias, dresidual};
  }
  p.dx = dx.mutable_data_ptr();
  p.dresidual = data_or_null(dresidual);
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  Tensor workspace = new_workspace(x, bn_act_backward_workspace(p));
  p.workspace = data_or_null(workspace);
  check_launch(v, launch_bn_act_backward(p, device.stream()));
  return {dx, dweight, dbias, dresidual};
}

}  // namespace cuda
}  // namespace fusedres
