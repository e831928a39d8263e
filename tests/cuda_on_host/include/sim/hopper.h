// What kernels for sm_90a call in the runtime: see csrc/cuda/hopper.cuh.
#pragma once

#include <cstdint>
#include <initializer_list>

struct CUtensorMap_st;

namespace sim {

// An address in the block's shared memory as descriptors hold it.
uint64_t shared_address(const void* shared);

// Coordinates: the innermost dimension first.
void tensor_copy(void* shared, const CUtensorMap_st* map, std::initializer_list<int> at,
                 uint64_t* barrier);
void tensor_copy_im2col(void* shared, const CUtensorMap_st* map, std::initializer_list<int> at,
                        std::initializer_list<int> offsets, uint64_t* barrier);

// Every thread of a warpgroup must make the same calls.
void wgmma_fence();
void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool adds, bool bfloat16);
void wgmma(float* d, int columns, const uint32_t (&a)[4], uint64_t b, bool adds, bool bfloat16);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace sim
