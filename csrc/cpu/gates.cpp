// highway and lstm_cell: gated residuals over rows of pre-activations that one GEMM wrote.
#include "../ops.h"
#include "host.h"

namespace fusedres {
namespace {

constexpr int64_t kBlockColumns = 16384;  // a multiple of every vector and cache line

// `parts` holds `n` blocks of x's columns side by side in each row.
GateParams gate_params(const View& v, const Tensor& parts, const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && parts.is_contiguous(), v.op,
                  ": x and parts must be contiguous matrices, got ", shape_of(x), " and ",
                  shape_of(parts));
  check_shape(v.op, "parts", parts, {x.size(0), n * x.size(1)});
  STD_TORCH_CHECK(parts.scalar_type() == x.scalar_type(), v.op, ": parts must have the dtype ",
                  torch::headeronly::toString(x.scalar_type()), " of x, got ",
                  torch::headeronly::toString(parts.scalar_type()));
  GateParams p{};
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.count = n;
  p.ld = n * p.cols;
  p.block = std::min(kBlockColumns, std::max<int64_t>(1, p.cols));
  p.blocks = (p.cols + p.block - 1) / p.block;
  p.parts = parts.const_data_ptr();
  p.x = x.const_data_ptr();
  return p;
}

void launch_gates(GateFn fn, const View& v, const GateParams& p) {
  if (v.numel() == 0) return;
  // some twenty operations an element: a thread pays earlier than in a plain copy
  parallel_items(p.rows * p.blocks, 4 * p.block,
                 [&](int64_t begin, int64_t end) { fn(p, begin, end); });
}

}  // namespace

Tensor highway(Tensor parts, Tensor x, std::string act, bool coupled) {
  const View v = view_of("highway", x);
  GateParams p = gate_params(v, parts, x, coupled ? 2 : 3);
  Tensor y = torch::stable::empty_like(x);
  p.y = y.mutable_data_ptr();
  p.act = parse_act(v.op, "act", act);
  launch_gates(kernels().highway_fwd[v.dtype], v, p);
  return y;
}

Tensors2 highway_backward(Tensor dy, Tensor parts, Tensor x, std::string act, bool coupled) {
  const View v = view_of("highway_backward", x);
  GateParams p = gate_params(v, parts, x, coupled ? 2 : 3);
  Tensor dparts = torch::stable::empty_like(parts);
  Tensor dx = torch::stable::empty_like(x);
  p.dy = data_like(v, x, "dy", dy);
  p.dparts = dparts.mutable_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.act = parse_act(v.op, "act", act);
  launch_gates(kernels().highway_bwd[v.dtype], v, p);
  return {dparts, dx};
}

Tensors2 lstm_cell(Tensor gates, Tensor c, bool forget_gate) {
  const View v = view_of("lstm_cell", c);
  GateParams p = gate_params(v, gates, c, forget_gate ? 4 : 3);
  Tensor h = torch::stable::empty_like(c);
  Tensor c_new = torch::stable::empty_like(c);
  p.y = h.mutable_data_ptr();
  p.c = c_new.mutable_data_ptr();
  launch_gates(kernels().lstm_fwd[v.dtype], v, p);
  return {h, c_new};
}

Tensors2 lstm_cell_backward(Tensor gates, Tensor c, OptTensor dh, OptTensor dc, bool forget_gate) {
  const View v = view_of("lstm_cell_backward", c);
  GateParams p = gate_params(v, gates, c, forget_gate ? 4 : 3);
  Tensor dgates = torch::stable::empty_like(gates);
  Tensor dc_before = torch::stable::empty_like(c);
  p.dy = data_like(v, c, "dh", dh);
  p.dc = data_like(v, c, "dc", dc);
  p.dparts = dgates.mutable_data_ptr();
  p.dx = dc_before.mutable_data_ptr();
  launch_gates(kernels().lstm_bwd[v.dtype], v, p);
  return {dgates, dc_before};
}

}  // namespace fusedres
