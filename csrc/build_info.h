#pragma once

#include <string>

namespace fusedres {

// The CUDA release and the architectures of the kernels inside: "13.0:80,90a"; empty without any.
std::string cuda_inside();

}  // namespace fusedres
