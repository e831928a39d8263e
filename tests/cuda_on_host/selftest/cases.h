// The simulator's own kernels. A case is a kernel, right or with one planted bug.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <vector>

#include "../../../csrc/cuda/launch.cuh"

struct Case {
  const char* name;
  cudaError_t (*run)(bool* right);
};

std::vector<Case> block_cases();   // blocks.cpp: barriers, shared and global memory, atomics
std::vector<Case> warp_cases();    // warps.cpp: shuffles, votes, reductions, mma
std::vector<Case> copy_cases();    // copies.cpp: cp.async, ldmatrix
std::vector<Case> wide_cases();    // grids.cpp: grids, clusters, mbarriers
std::vector<Case> hopper_cases();  // hopper.cpp: tensor copies, wgmma

inline std::vector<Case> all_cases() {
  std::vector<Case> all;
  for (const auto& part :
       {block_cases(), warp_cases(), copy_cases(), wide_cases(), hopper_cases()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

// Small integers: every sum of them is exact, so that results can be compared with ==.
inline std::vector<float> integers(size_t n) {
  std::vector<float> v(n);
  for (size_t i = 0; i < n; ++i) v[i] = static_cast<float>(i * 37 % 101) - 50.0f;
  return v;
}
