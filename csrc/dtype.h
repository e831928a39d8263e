// The dtypes of activations, in the order in which tables of kernels are indexed.
#pragma once

namespace fusedres {

enum Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

}  // namespace fusedres
