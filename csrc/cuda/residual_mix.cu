// residual_mix on CUDA: tensors in, params, launch. The kernels: residual_mix.cuh.
#include "host.h"
#include "ops.h"
#include "residual_mix.cuh"

namespace fusedres {
namespace cuda {
namespace {

ResidualMixParams mix_params(const View& v, double alpha, double beta, Act act,
                             const Parameter& row_scale) {
  ResidualMixParams p = params_of<ResidualMixParams>(v);
  p.alpha = alpha;
  p.beta = beta;
  p.act = act;
  p.row_scale = row_scale.data();
  return p;
}

}  // namespace

Tensors2 residual_mix(Tensor branch, Tensor shortcut, OptTensor gate, OptTensor row_scale,
                      double alpha, double beta, std::string act, bool save_mask) {
  const View v = view_of("residual_mix", branch, kHere);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  const OnDevice device(v);
  const Parameter scales(v, "row_scale", row_scale, {v.n});
  ResidualMixParams p = mix_params(v, alpha, beta, parsed, scales);
  p.branch = branch.const_data_ptr();
  p.shortcut = data_like(v, branch, "shortcut", shortcut);
  p.gate = data_like(v, branch, "gate", gate);
  Tensor y = torch::stable::empty_like(branch);
  Tensor mask = new_mask(v, branch, save_mask);
  if (v.numel() == 0) return {y, mask};
  p.y = y.mutable_data_ptr();
  p.mask_out = static_cast<uint8_t*>(data_or_null(mask));
  check_launch(v, launch_residual_mix_forward(p, device.stream()));
  return {y, mask};
}

Tensors3 residual_mix_backward(Tensor dy, OptTensor branch, OptTensor shortcut, OptTensor gate,
                               OptTensor row_scale, Tensor mask, double alpha, double beta,
                               std::string act) {
  const View v = view_of("residual_mix_backward", dy, kHere);
  const Act parsed = parse_act(v.op, "act", act);
  const OnDevice device(v);
  const Parameter scales(v, "row_scale", row_scale, {v.n});
  ResidualMixParams p = mix_params(v, alpha, beta, parsed, scales);
  p.dy = dy.const_data_ptr();
  p.branch = data_like(v, dy, "branch", branch);
  p.shortcut = data_like(v, dy, "shortcut", shortcut);
  p.gate = data_like(v, dy, "gate", gate);
  p.mask = mask_data(v, mask);
  Tensor dbranch = torch::stable::empty_like(dy);
  Tensor dshortcut = torch::stable::empty_like(dy);
  Tensor dgate = new_empty_like(dy, gate.has_value());
  if (v.numel() == 0) return {dbranch, dshortcut, dgate};
  const bool needs_inputs = gate.has_value() || (parsed != Act::kIdentity && p.mask == nullptr);
  STD_TORCH_CHECK(!needs_inputs || (branch.has_value() && shortcut.has_value()), v.op,
                  ": branch and shortcut are required with a gate, or without a mask for ", act);
  p.dbranch = dbranch.mutable_data_ptr();
  p.dshortcut = dshortcut.mutable_data_ptr();
  p.dgate = data_or_null(dgate);
  check_launch(v, launch_residual_mix_backward(p, device.stream()));
  return {dbranch, dshortcut, dgate};
}

}  // namespace cuda
}  // namespace fusedres
