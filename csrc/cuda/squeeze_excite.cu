// squeeze_excite on CUDA: tensors in, params, launch. The kernels: squeeze_excite.cuh.
#include "host.h"
#include "ops.h"
#include "squeeze_excite.cuh"

namespace fusedres {
namespace cuda {

FUSEDRES_INSTANCES(template, squeeze_excite_forward, SqueezeExciteParams);
FUSEDRES_INSTANCES(template, squeeze_excite_backward, SqueezeExciteParams);

Tensors5 squeeze_excite(Tensor x, Tensor w1, OptTensor b1, Tensor w2, OptTensor b2,
                        OptTensor residual, std::string act, std::string gate, std::string post_act,
                        bool save_mask) {
  const View v = view_of("squeeze_excite", x, kHere);
  const Act parsed = parse_act(v.op, "post_act", post_act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", post_act, " has no mask to save");
  const OnDevice device(v);
  SqueezeExciteParams p = params_of<SqueezeExciteParams>(v);
  p.r = squeezed_channels(v, w1);
  const Parameter weight1(v, "w1", w1, {p.r, v.c});
  const Parameter bias1(v, "b1", b1, {p.r});
  const Parameter weight2(v, "w2", w2, {v.c, p.r});
  const Parameter bias2(v, "b2", b2, {v.c});
  p.act = parse_act(v.op, "act", act);
  p.gate = parse_gate(v.op, gate);
  p.post_act = parsed;
  p.x = x.const_data_ptr();
  p.residual = data_like(v, x, "residual", residual);
  p.w1 = weight1.data();
  p.b1 = bias1.data();
  p.w2 = weight2.data();
  p.b2 = bias2.data();
  Tensor y = torch::stable::empty_like(x);
  Tensor squeezed = new_acc(v, x, {v.n, v.c});
  Tensor hidden = new_acc(v, x, {v.n, p.r});
  Tensor logits = new_acc(v, x, {v.n, v.c});
  Tensor mask = new_mask(v, x, save_mask);
  if (v.numel() == 0) {
    zero_all(squeezed, hidden, logits);
    return {y, squeezed, hidden, logits, mask};
  }
  p.y = y.mutable_data_ptr();
  p.squeezed = squeezed.mutable_data_ptr();
  p.hidden = data_or_null(hidden);
  p.logits = logits.mutable_data_ptr();
  p.mask_out = static_cast<uint8_t*>(data_or_null(mask));
  Tensor workspace = new_workspace(x, squeeze_excite_forward_workspace(p));
  p.workspace = data_or_null(workspace);
  check_launch(v, launch_squeeze_excite_forward(p, device.stream()));
  return {y, squeezed, hidden, logits, mask};
}

Tensors6 squeeze_excite_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, OptTensor residual,
                                 Tensor squeezed, Tensor hidden, Tensor logits, Tensor mask,
                                 std::string act, std::string gate, std::string post_act,
                                 bool need_dresidual) {
  const View v = view_of("squeeze_excite_backward", x, kHere);
  const OnDevice device(v);
  SqueezeExciteParams p = params_of<SqueezeExciteParams>(v);
  p.r = squeezed_channels(v, w1);
  const Parameter weight1(v, "w1", w1, {p.r, v.c});
  const Parameter weight2(v, "w2", w2, {v.c, p.r});
  p.act = parse_act(v.op, "act", act);
  p.gate = parse_gate(v.op, gate);
  p.post_act = parse_act(v.op, "post_act", post_act);
  p.x = x.const_data_ptr();
  p.dy = data_like(v, x, "dy", dy);
  p.residual = data_like(v, x, "residual", residual);
  p.mask = mask_data(v, mask);
  p.w1 = weight1.data();
  p.w2 = weight2.data();
  p.squeezed = saved_data(v, "squeezed", squeezed, v.c);
  p.hidden = saved_data(v, "hidden", hidden, p.r);
  p.logits = saved_data(v, "logits", logits, v.c);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dresidual = new_empty_like(x, need_dresidual);
  Tensor dw1 = new_acc(v, x, {p.r, v.c});
  Tensor db1 = new_acc(v, x, {p.r});
  Tensor dw2 = new_acc(v, x, {v.c, p.r});
  Tensor db2 = new_acc(v, x, {v.c});
  if (v.numel() == 0) {
    zero_all(dw1, db1, dw2, db2);
    return {dx, dw1, db1, dw2, db2, dresidual};
  }
  p.dx = dx.mutable_data_ptr();
  p.dresidual = data_or_null(dresidual);
  p.dw1 = data_or_null(dw1);
  p.db1 = data_or_null(db1);
  p.dw2 = data_or_null(dw2);
  p.db2 = db2.mutable_data_ptr();
  Tensor workspace = new_workspace(x, squeeze_excite_backward_workspace(p));
  p.workspace = data_or_null(workspace);
  check_launch(v, launch_squeeze_excite_backward(p, device.stream()));
  return {dx, dw1, db1, dw2, db2, dresidual};
}

}  // namespace cuda
}  // namespace fusedres
