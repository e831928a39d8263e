// What kernels call in the runtime (../../runtime/*.cpp). The runtime is compiled without
// sanitizers, so that ThreadSanitizer sees the kernels' accesses and none of the simulator's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace sim {

// --- barriers; a site is "file:line"
void block_barrier(const char* file, int line);
void named_barrier(int id, int threads);
void cluster_barrier(const char* file, int line);
void grid_barrier(const char* file, int line);

// --- shared memory
void* find_shared(const void* key, size_t bytes, const char* name);
void* dynamic_shared();
void* peer_address(const void* shared, unsigned rank);
template <size_t kBytes, typename Declaration>
void* shared_array(Declaration, const char* name) {
  static char key;  // one for each declaration and each instantiation of its kernel
  return find_shared(&key, kBytes, name);
}

// --- the thread's place
unsigned thread_rank();   // in the block
unsigned cluster_rank();  // of the block in its cluster
unsigned cluster_blocks();

// --- warps: every lane of `mask` must make the same call
enum class Shuffle { kIndex, kXor, kUp, kDown };
enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor, kMinSigned, kMaxSigned };
void warp_barrier(unsigned mask);
uint64_t warp_shuffle(unsigned mask, uint64_t value, Shuffle kind, int argument, int width);
unsigned warp_ballot(unsigned mask, bool predicate);
unsigned warp_reduce(unsigned mask, unsigned value, Reduce kind);
unsigned active_lanes();

// --- copies, mbarriers and tensor cores: see csrc/cuda/prim.cuh
void copy_async(void* shared, const void* global, int bytes, int bytes_there);
void copy_async_commit();
void copy_async_wait(int groups_left);
void load_matrices(uint32_t (&words)[4], const uint4& row);
void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier, int expected_bytes);
void mbarrier_wait(uint64_t* barrier, int parity);
void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);

}  // namespace sim

#define __syncthreads() sim::block_barrier(__FILE__, __LINE__)
