#include "../../../csrc/cuda/squeeze_excite.cuh"

#include "entry.h"

namespace fusedres {
namespace cuda {

FUSEDRES_INSTANCES(template, squeeze_excite_forward, SqueezeExciteParams);
FUSEDRES_INSTANCES(template, squeeze_excite_backward, SqueezeExciteParams);

}  // namespace cuda
}  // namespace fusedres

SIM_ENTRY(squeeze_excite_forward, SqueezeExciteParams, squeeze_excite_forward_workspace(p))
SIM_ENTRY(squeeze_excite_backward, SqueezeExciteParams, squeeze_excite_backward_workspace(p))
