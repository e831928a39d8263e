// Stands in for CUDA's header of this name: CUDA C++ kernels compile with a host compiler and run
// on the CPU, one fiber a CUDA thread. See ../README.md.
#pragma once

#include "sim/atomics.h"
#include "sim/hopper.h"
#include "sim/intrinsics.h"
#include "sim/launch.h"
#include "sim/runtime.h"
#include "sim/types.h"
#include "sim/warp.h"
