// Binds the CUDA implementations to the schemas that fusedres/ops/*.py define.
#include <torch/csrc/stable/library.h>

#include "launched.h"
#include "ops.h"

namespace fusedres {
namespace cuda {

int64_t cuda_launches() { return launched_by_thread; }

}  // namespace cuda
}  // namespace fusedres

// The host simulator runs the same operators on CPU tensors (tests/cuda_glue.py).
#if defined(FUSEDRES_CUDA_ON_HOST)
STABLE_TORCH_LIBRARY_IMPL(fusedres_on_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CUDA, m) {
#endif
  m.impl("bn_stats", TORCH_BOX(&fusedres::cuda::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fusedres::cuda::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&fusedres::cuda::bn_act_backward));
  m.impl("squeeze_excite", TORCH_BOX(&fusedres::cuda::squeeze_excite));
  m.impl("squeeze_excite_backward", TORCH_BOX(&fusedres::cuda::squeeze_excite_backward));
  m.impl("bn_se_act", TORCH_BOX(&fusedres::cuda::bn_se_act));
  m.impl("bn_se_act_backward", TORCH_BOX(&fusedres::cuda::bn_se_act_backward));
  m.impl("residual_mix", TORCH_BOX(&fusedres::cuda::residual_mix));
  m.impl("residual_mix_backward", TORCH_BOX(&fusedres::cuda::residual_mix_backward));
  m.impl("conv_bn_act", TORCH_BOX(&fusedres::cuda::conv_bn_act));
  m.impl("conv_stats", TORCH_BOX(&fusedres::cuda::conv_stats));
}

// "cuda_launches() -> int"
#if defined(FUSEDRES_CUDA_ON_HOST)
STABLE_TORCH_LIBRARY_IMPL(fusedres_on_host, CompositeExplicitAutograd, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CompositeExplicitAutograd, m) {
#endif
  m.impl("cuda_launches", TORCH_BOX(&fusedres::cuda::cuda_launches));
}
