// The operators that have CUDA kernels, with the CPU ones' arguments and results. Convolutions have
// kernels here only; `variant` is a ConvVariant.
#pragma once

#include "../ops.h"

namespace fusedres {
namespace cuda {

decltype(fusedres::bn_stats) bn_stats;
decltype(fusedres::bn_act) bn_act;
decltype(fusedres::bn_act_backward) bn_act_backward;
decltype(fusedres::squeeze_excite) squeeze_excite;
decltype(fusedres::squeeze_excite_backward) squeeze_excite_backward;
decltype(fusedres::bn_se_act) bn_se_act;
decltype(fusedres::bn_se_act_backward) bn_se_act_backward;
decltype(fusedres::residual_mix) residual_mix;
decltype(fusedres::residual_mix_backward) residual_mix_backward;

Tensor conv_bn_act(Tensor x, Tensor weight, OptTensor bias, OptTensor residual, OptTensor bn_weight,
                   OptTensor bn_bias, Tensor mean, Tensor var, double eps,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, std::string act, int64_t variant);
Tensors3 conv_stats(Tensor x, OptTensor bn_weight, OptTensor bn_bias, OptTensor mean, OptTensor var,
                    bool batch_stats, double eps, std::string act, Tensor weight, OptTensor bias,
                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool stats, int64_t variant);

}  // namespace cuda
}  // namespace fusedres
