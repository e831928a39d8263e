// conv_bn_act on CUDA: tensors in, params, launch. The kernels: conv_bn_act.cuh.
#include "conv_bn_act.cuh"
#include "conv_host.h"
#include "ops.h"

namespace fusedres {
namespace cuda {

Tensor conv_bn_act(Tensor x, Tensor weight, OptTensor bias, OptTensor residual, OptTensor bn_weight,
                   OptTensor bn_bias, Tensor mean, Tensor var, double eps,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, std::string act,
                   int64_t variant) {
  const View v = conv_view("conv_bn_act", x);
  const OnDevice device(v);
  ConvBnActParams p{};
  const Convolution conv(v, x, weight, {stride, padding, dilation, groups}, variant, &p);
  const Parameter biases(v, "bias", bias, {p.k});
  const Parameter bn_weights(v, "bn_weight", bn_weight, {p.k});
  const Parameter bn_biases(v, "bn_bias", bn_bias, {p.k});
  const Parameter means(v, "mean", mean, {p.k});
  const Parameter vars(v, "var", var, {p.k});
  p.eps = eps;
  p.act = parse_act(v.op, "act", act);
  p.bias = biases.data();
  p.bn_weight = bn_weights.data();
  p.bn_bias = bn_biases.data();
  p.mean = means.data();
  p.var = vars.data();
  OptTensor added;
  if (residual.has_value()) {
    check_shape(v.op, "residual", *residual, {p.n, p.k, p.p, p.q}, v.device);
    added = nhwc(v, "residual", *residual, x);
    p.residual = added->const_data_ptr();
  }
  if (conv.y.numel() == 0) return conv.y;
  check_launch(v, launch_conv_bn_act_forward(p, device.stream()));
  return conv.y;
}

}  // namespace cuda
}  // namespace fusedres
