// The operators that have CUDA kernels, with the CPU ones' arguments and results.
#pragma once

#include "../ops.h"

namespace fusedres {
namespace cuda {

decltype(fusedres::residual_mix) residual_mix;
decltype(fusedres::residual_mix_backward) residual_mix_backward;

}  // namespace cuda
}  // namespace fusedres
