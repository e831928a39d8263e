// conv_stats on CUDA: tensors in, params, launches. The kernels: conv_stats.cuh.
#include "conv_host.h"
#include "conv_stats.cuh"
#include "ops.h"

namespace fusedres {
namespace cuda {

Tensors3 conv_stats(Tensor x, OptTensor bn_weight, OptTensor bn_bias, OptTensor mean, OptTensor var,
                    bool, double eps, std::string act, Tensor weight, OptTensor bias,
                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool stats, int64_t variant) {
  const View v = conv_view("conv_stats", x);
  const OnDevice device(v);
  ConvStatsParams p{};
  const Convolution conv(v, x, weight, {stride, padding, dilation, groups}, variant, &p);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), v.op,
                  ": mean and var must be given together");
  const Parameter biases(v, "bias", bias, {p.k});
  const Parameter bn_weights(v, "bn_weight", bn_weight, {p.c});
  const Parameter bn_biases(v, "bn_bias", bn_bias, {p.c});
  const Parameter means(v, "mean", mean, {p.c});
  const Parameter vars(v, "var", var, {p.c});
  p.eps = eps;
  p.act = parse_act(v.op, "act", act);
  p.bias = biases.data();
  p.bn_weight = bn_weights.data();
  p.bn_bias = bn_biases.data();
  p.mean = means.data();
  p.var = vars.data();
  Tensor y_mean = new_acc(v, x, {stats ? p.k : 0});
  Tensor y_var = new_acc(v, x, {stats ? p.k : 0});
  if (conv.y.numel() == 0) {
    zero_all(y_mean, y_var);
    return {conv.y, y_mean, y_var};
  }
  p.y_mean = data_or_null(y_mean);
  p.y_var = data_or_null(y_var);
  Tensor workspace = new_workspace(x, conv_stats_forward_workspace(p));
  p.workspace = data_or_null(workspace);
  check_launch(v, launch_conv_stats_forward(p, device.stream()));
  return {conv.y, y_mean, y_var};
}

}  // namespace cuda
}  // namespace fusedres
