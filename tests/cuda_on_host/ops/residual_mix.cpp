#include "../../../csrc/cuda/residual_mix.cuh"

#include "entry.h"

SIM_ENTRY(residual_mix_forward, ResidualMixParams, 0)
SIM_ENTRY(residual_mix_backward, ResidualMixParams, 0)
