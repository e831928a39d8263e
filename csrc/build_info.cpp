// What this library was built with; csrc/build.py defines FUSEDRES_CUDA_INSIDE.
#include "build_info.h"

namespace fusedres {

std::string cuda_inside() { return FUSEDRES_CUDA_INSIDE; }

}  // namespace fusedres
