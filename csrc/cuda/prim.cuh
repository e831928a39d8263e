// Everything that is not plain CUDA C++: PTX, and what the host simulator spells differently. Each
// primitive has a branch for the device and one for the simulator (tests/cuda_on_host/), which
// calls the simulator's model of it.
//
// Kernels declare shared memory with the two macros below, never with __shared__: on the host an
// array then belongs to the block that runs, has its own bounds, and starts poisoned.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(FUSEDRES_CUDA_ON_HOST)

// An array of a block. As an argument of map_shared_rank it names that of another block.
#define FUSEDRES_SHARED(T, name, count) \
  T(&name)[count] = *static_cast<T(*)[count]>(sim::shared_array<sizeof(T) * (count)>([] {}, #name))
// The block's dynamic shared memory, as much as its launch asked for, at a multiple of 128 bytes.
#define FUSEDRES_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(sim::dynamic_shared())

#else

#define FUSEDRES_SHARED(T, name, count) __shared__ __align__(128) T name[count]
#define FUSEDRES_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char fusedres_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(fusedres_dynamic_shared)

#endif

namespace fusedres {
namespace cuda {

#if !defined(FUSEDRES_CUDA_ON_HOST)

// A shared-memory address as PTX counts it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

#endif

// What the compiler does not always see: for sm_100 and sm_120 it makes generic loads otherwise.
template <typename T>
__device__ __forceinline__ const T* in_global(const T* p) {
#if !defined(FUSEDRES_CUDA_ON_HOST)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// One access. nvcc takes a 16-byte store apart where it has the value in registers, as soon as a
// branch comes between. No "memory": no kernel reads again what it stores this way, and its next
// loads may go ahead.
__device__ __forceinline__ void store_16_bytes(void* global, const uint4& v) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  *static_cast<uint4*>(global) = v;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
#endif
}

// --- clusters: without them (below sm_90) a block is a cluster of its own

__device__ __forceinline__ void cluster_sync() {
#if defined(FUSEDRES_CUDA_ON_HOST) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// Where block `rank` of the cluster has what this block has at `shared`.
template <typename T>
__device__ __forceinline__ T* cluster_peer(T* shared, int rank) {
#if defined(FUSEDRES_CUDA_ON_HOST) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// Waits until `threads` threads (a multiple of 32) have come to barrier `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// --- mbarrier: PTX ISA 9.7.13.15. A phase ends when all arrivals and all expected bytes are in.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Makes the barriers that this thread initialised visible to other blocks and to bulk copies.
__device__ __forceinline__ void mbarrier_init_fence() {
#if !defined(FUSEDRES_CUDA_ON_HOST)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// Arrives, and lets the phase wait for `bytes` of bulk copies as well.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::mbarrier_arrive(barrier, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Waits until the phase of this parity (0, 1, 0, ...) has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Copies `bytes` (a multiple of 16, both addresses too) to shared memory; arrives at `barrier`.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::bulk_copy(shared, global, bytes, barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// --- asynchronous copies: PTX ISA 9.7.9.25.3. They are there for the thread that made them once it
// has waited for their group, and for others behind a barrier after that.

// 16 bytes from global to shared memory, both addresses multiples of 16; zeros if not `there`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::copy_async(shared, global, 16, there ? 16 : 0);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
#endif
}

// Closes the group of the copies since the last one.
__device__ __forceinline__ void copy_async_commit() {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the kLeft last ones.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::copy_async_wait(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// --- conversions

// Two values rounded to 16 bits each, the first in the lower half.
__device__ __forceinline__ uint32_t two_of(float low, float high, __nv_bfloat16) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits)
                                             << 16;
#else
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

__device__ __forceinline__ uint32_t two_of(float low, float high, __half) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
#else
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

// 16 bytes to global memory in one access: of a plain uint4, nvcc 13.0 may make four.
__device__ __forceinline__ void store_words(void* global, const uint32_t (&words)[4]) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  *static_cast<uint4*>(global) = uint4{words[0], words[1], words[2], words[3]};
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#endif
}

// --- matrices: PTX ISA 9.7.14.5.15. Lane 8 * i + r has the address of row r of matrix i, eight
// 16-bit elements; word i of lane 4 * r + t becomes elements 2 * t and 2 * t + 1 of that row.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  const uint4 mine = *static_cast<const uint4*>(row);
  sim::load_matrices(words, {mine.x, mine.y, mine.z, mine.w});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// --- tensor cores: d += a [16, 16] * b [16, 8], fragments as in PTX ISA 9.7.14.5.8

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::mma_m16n8k16(d, a, b, true);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::mma_m16n8k16(d, a, b, false);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace cuda
}  // namespace fusedres
