// Binds the CPU implementations to the schemas that fusedres/ops/*.py define; those for CUDA are
// bound in cuda/registration.cpp.
#include <torch/csrc/stable/library.h>

#include "build_info.h"
#include "cpu/isa.h"
#include "ops.h"

namespace fusedres {

int64_t cpu_isa() { return kernels().id; }

}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&fusedres::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fusedres::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&fusedres::bn_act_backward));
  m.impl("squeeze_excite", TORCH_BOX(&fusedres::squeeze_excite));
  m.impl("squeeze_excite_backward", TORCH_BOX(&fusedres::squeeze_excite_backward));
  m.impl("bn_se_act", TORCH_BOX(&fusedres::bn_se_act));
  m.impl("bn_se_act_backward", TORCH_BOX(&fusedres::bn_se_act_backward));
  m.impl("residual_add", TORCH_BOX(&fusedres::residual_add));
  m.impl("residual_add_backward", TORCH_BOX(&fusedres::residual_add_backward));
  m.impl("residual_mix", TORCH_BOX(&fusedres::residual_mix));
  m.impl("residual_mix_backward", TORCH_BOX(&fusedres::residual_mix_backward));
  m.impl("add_norm", TORCH_BOX(&fusedres::add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&fusedres::add_norm_backward));
  m.impl("highway", TORCH_BOX(&fusedres::highway));
  m.impl("highway_backward", TORCH_BOX(&fusedres::highway_backward));
  m.impl("lstm_cell", TORCH_BOX(&fusedres::lstm_cell));
  m.impl("lstm_cell_backward", TORCH_BOX(&fusedres::lstm_cell_backward));
  m.impl("dense_store", TORCH_BOX(&fusedres::dense_store));
  m.impl("dense_load", TORCH_BOX(&fusedres::dense_load));
  m.impl("dense_grad", TORCH_BOX(&fusedres::dense_grad));
  m.impl("dense_finish", TORCH_BOX(&fusedres::dense_finish));
  m.impl("fingerprint", TORCH_BOX(&fusedres::fingerprint));
}

// No tensor argument, so no key to dispatch on: "cpu_isa() -> int" is 0, 1 or 2 for portable, avx2
// or avx512; "cuda_inside() -> str": build_info.h.
STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fusedres::cpu_isa));
  m.impl("cuda_inside", TORCH_BOX(&fusedres::cuda_inside));
}
