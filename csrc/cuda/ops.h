// The operators that have CUDA kernels, with the CPU ones' arguments and results.
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

}  // namespace cuda
}  // namespace fusedres
