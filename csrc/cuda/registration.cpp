// Binds the CUDA implementations to the schemas that fusedres/ops/*.py define.
#include <torch/csrc/stable/library.h>

#include "ops.h"

// The simulator's library (tests/cuda_on_host/) runs the same operators on CPU tensors.
#if defined(FUSEDRES_CUDA_ON_HOST)
STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CUDA, m) {
#endif
  m.impl("residual_mix", TORCH_BOX(&fusedres::cuda::residual_mix));
  m.impl("residual_mix_backward", TORCH_BOX(&fusedres::cuda::residual_mix_backward));
}
