// residual_mix: y = act(alpha * row_scale[n] * branch + beta * shortcut), with an optional gate.
#include "../ops.h"
#include "host.h"

namespace fusedres {
namespace {

constexpr int64_t kRowElements = 4096;  // a run of elements where mask rows need no respect
constexpr int64_t kItemElements = 32768;

MixParams mix_params(const View& v, bool with_mask) {
  MixParams p{};
  p.images = v.n;
  p.image_elems = v.c * v.hw;
  const int64_t cols = v.mask_cols();
  if (with_mask && cols % 8 != 0) {
    p.row_len = cols;
    p.mask_row_bytes = v.mask_row_bytes();
  } else {
    p.row_len = kRowElements;
    p.mask_row_bytes = kRowElements / 8;
  }
  p.rows = (p.image_elems + p.row_len - 1) / p.row_len;
  p.mask_image_bytes = v.mask_rows() / v.n * v.mask_row_bytes();
  p.rows_per_item = std::max<int64_t>(1, kItemElements / p.row_len);
  p.items_per_image = (p.rows + p.rows_per_item - 1) / p.rows_per_item;
  return p;
}

void launch_mix(MixFn fn, const MixParams& p) {
  parallel_items(p.images * p.items_per_image, std::min(kItemElements, p.image_elems),
                 [&](int64_t begin, int64_t end) { fn(p, begin, end); });
}

// alpha * row_scale[n] for every image, in the accumulator's type
template <typename acc_t>
std::vector<acc_t> image_scales(const View& v, const OptTensor& row_scale, double alpha) {
  auto scales = read_parameter<acc_t>(v.op, "row_scale", row_scale, {v.n}, acc_t(1));
  for (acc_t& s : scales) s = static_cast<acc_t>(alpha * static_cast<double>(s));
  return scales;
}

template <typename acc_t>
void run(const View& v, const OptTensor& row_scale, double alpha, MixFn fn, MixParams p) {
  const auto scales = image_scales<acc_t>(v, row_scale, alpha);
  p.alpha = scales.data();
  if (v.numel() > 0) launch_mix(fn, p);
}

}  // namespace

Tensors2 residual_mix(Tensor branch, Tensor shortcut, OptTensor gate, OptTensor row_scale,
                      double alpha, double beta, std::string act, bool save_mask) {
  const View v = view_of("residual_mix", branch);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  Tensor y = torch::stable::empty_like(branch);
  Tensor mask = new_mask(v, branch, save_mask);
  const void* shortcut_data = data_like(v, branch, "shortcut", shortcut);
  const void* gate_data = data_like(v, branch, "gate", gate);
  if (v.numel() == 0) return {y, mask};
  MixParams p = mix_params(v, save_mask);
  p.branch = branch.const_data_ptr();
  p.shortcut = shortcut_data;
  p.gate = gate_data;
  p.y = y.mutable_data_ptr();
  p.mask_out = save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  p.beta = beta;
  p.act = parsed;
  const auto launch = v.dtype == kFloat64 ? run<double> : run<float>;
  launch(v, row_scale, alpha, kernels().mix_fwd[v.dtype], p);
  return {y, mask};
}

Tensors3 residual_mix_backward(Tensor dy, OptTensor branch, OptTensor shortcut, OptTensor gate,
                               OptTensor row_scale, Tensor mask, double alpha, double beta,
                               std::string act) {
  const View v = view_of("residual_mix_backward", dy);
  const Act parsed = parse_act(v.op, "act", act);
  Tensor dbranch = torch::stable::empty_like(dy);
  Tensor dshortcut = torch::stable::empty_like(dy);
  Tensor dgate = new_empty_like(dy, gate.has_value());
  const uint8_t* mask_in = mask_data(v, mask);
  const bool needs_inputs = gate.has_value() || (parsed != Act::kIdentity && mask_in == nullptr);
  const void* branch_data = data_like(v, dy, "branch", branch);
  const void* shortcut_data = data_like(v, dy, "shortcut", shortcut);
  const void* gate_data = data_like(v, dy, "gate", gate);
  if (v.numel() == 0) return {dbranch, dshortcut, dgate};
  STD_TORCH_CHECK(!needs_inputs || (branch_data != nullptr && shortcut_data != nullptr), v.op,
                  ": branch and shortcut are required with a gate, or without a mask for ", act);
  MixParams p = mix_params(v, mask_in != nullptr);
  p.dy = dy.const_data_ptr();
  p.branch = branch_data;
  p.shortcut = shortcut_data;
  p.gate = gate_data;
  p.dbranch = dbranch.mutable_data_ptr();
  p.dshortcut = dshortcut.mutable_data_ptr();
  p.dgate = gate.has_value() ? dgate.mutable_data_ptr() : nullptr;
  p.mask_in = mask_in;
  p.beta = beta;
  p.act = parsed;
  const auto launch = v.dtype == kFloat64 ? run<double> : run<float>;
  launch(v, row_scale, alpha, kernels().mix_bwd[v.dtype], p);
  return {dbranch, dshortcut, dgate};
}

}  // namespace fusedres
