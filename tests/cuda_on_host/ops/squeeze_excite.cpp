#include "../../../csrc/cuda/squeeze_excite.cuh"

#include "entry.h"

SIM_ENTRY(squeeze_excite_forward, SqueezeExciteParams, squeeze_excite_forward_workspace(p))
SIM_ENTRY(squeeze_excite_backward, SqueezeExciteParams, squeeze_excite_backward_workspace(p))
