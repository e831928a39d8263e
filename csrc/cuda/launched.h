#pragma once

#include <cstdint>

namespace fusedres {
namespace cuda {

// Kernels that this thread has launched so far; fusedres.explain takes the difference of a call.
inline thread_local int64_t launched_by_thread = 0;

}  // namespace cuda
}  // namespace fusedres
