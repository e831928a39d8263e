// What sm_90a has beyond prim.cuh: warpgroup matrix products (wgmma) that read shared memory by
// themselves, tensor copies (TMA) that form im2col tiles on the way, registers that move between
// warpgroups. Like prim.cuh's, each primitive has a branch for the device and one for the host
// simulator. Facts: PTX ISA, chapters wgmma, cp.async.bulk.tensor and "Im2col mode"; the bits of a
// descriptor and the order of the corners also from CUTLASS (mma_sm90_desc.hpp,
// copy_traits_sm90_im2col.hpp).
#pragma once

#include <cuda.h>

#include <type_traits>

#include "prim.cuh"

// Kernels that use this header are empty for other architectures.
#if defined(FUSEDRES_CUDA_ON_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSEDRES_HAS_WGMMA
#endif

namespace fusedres {
namespace cuda {

// --- registers: a warpgroup's share, a multiple of 8 from 24 to 256. All its warps must call this.

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg's range");
#if !defined(FUSEDRES_CUDA_ON_HOST)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg's range");
#if !defined(FUSEDRES_CUDA_ON_HOST)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// --- shared memory as the copies swizzle it: in groups of 1024 bytes. A block's dynamic shared
// memory may begin at any multiple of 128 bytes: a launch asks for kSwizzleSlack more, and the
// kernel begins at_swizzle.

constexpr int kSwizzleBytes = 1024;
constexpr int kSwizzleSlack = kSwizzleBytes - 128;

template <typename T>
__device__ __forceinline__ T* at_swizzle(T* shared) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  const uint64_t address = sim::shared_address(shared);
#else
  const uint32_t address = shared_address(shared);
#endif
  return reinterpret_cast<T*>(reinterpret_cast<char*>(shared) + (0 - address) % kSwizzleBytes);
}

// --- tensor copies: a box of a tensor that a map describes (tensor_map.cuh) to shared memory, at
// an address that is a multiple of 1024; its bytes arrive at the barrier. Beyond the tensor: zeros.

__device__ __forceinline__ void tensor_copy(void* shared, const CUtensorMap* map, int x0, int x1,
                                            uint64_t* barrier) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::tensor_copy(shared, map, {x0, x1}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1)
      : "memory");
#endif
}

__device__ __forceinline__ void tensor_copy(void* shared, const CUtensorMap* map, int x0, int x1,
                                            int x2, uint64_t* barrier) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::tensor_copy(shared, map, {x0, x1, x2}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
#endif
}

// Of an image tensor [N, H, W, C]: the map's number of pixels from (n, h, w) on, in steps of its
// strides within its bounding box, each shifted by the offsets.
struct Pixel {
  int n, h, w;
};
__device__ __forceinline__ void tensor_copy_im2col(void* shared, const CUtensorMap* map, int c,
                                                   const Pixel& at, int offset_h, int offset_w,
                                                   uint64_t* barrier) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::tensor_copy_im2col(shared, map, {c, at.w, at.h, at.n}, {offset_w, offset_h}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(at.w), "r"(at.h), "r"(at.n),
      "h"(static_cast<uint16_t>(offset_w)), "h"(static_cast<uint16_t>(offset_h))
      : "memory");
#endif
}

// --- wgmma: d [64, N] += a [64, 16] * b [N, 16] transposed, by the 128 threads of a warpgroup

// An operand in shared memory: rows of 128 bytes (64 values), swizzled in 128 bytes, 8 rows every
// 1024 bytes; from `tile`, a multiple of 1024. Bits 0-13: address / 16; 16-29: not used by this
// layout; 32-45: the 1024 bytes / 16; 62-63: 1, the swizzle.
__device__ __forceinline__ uint64_t wgmma_operand(const void* tile) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  const uint64_t address = sim::shared_address(tile);
#else
  const uint64_t address = shared_address(tile);
#endif
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// The operand 16 * k values further along its rows: the swizzle is of addresses, so they just add.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int k) { return operand + 2 * k; }

// Before the first product of a group: orders the accumulators behind what wrote them.
__device__ __forceinline__ void wgmma_fence() {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Makes a group of the products since the last one.
__device__ __forceinline__ void wgmma_commit() {
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kPending groups run. Only then may their operands be overwritten; d is there
// when none runs.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  (void)d;
  sim::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");  // no use before it
#endif
}

#if !defined(FUSEDRES_CUDA_ON_HOST)

#define FUSEDRES_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FUSEDRES_32(d, i) \
  FUSEDRES_8(d, i), FUSEDRES_8(d, i + 8), FUSEDRES_8(d, i + 16), FUSEDRES_8(d, i + 24)
#define FUSEDRES_64(d, i) FUSEDRES_32(d, i), FUSEDRES_32(d, i + 32)
#define FUSEDRES_128(d, i) FUSEDRES_64(d, i), FUSEDRES_64(d, i + 64)
#define FUSEDRES_REGISTERS_32                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSEDRES_REGISTERS_64                                                        \
  FUSEDRES_REGISTERS_32                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSEDRES_REGISTERS_128                                                                   \
  FUSEDRES_REGISTERS_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
// clang-format off
#define FUSEDRES_WGMMA(N, count, type, operands, adds_at, transposed, ...)                     \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred adds;\n"                                                                     \
      "setp.ne.b32 adds, %" adds_at ", 0;\n"                                                   \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." type "." type                           \
      " {" FUSEDRES_REGISTERS_##count "}, " operands ", adds, 1, 1, " transposed ";\n"         \
      "}"                                                                                      \
      : FUSEDRES_##count(d, 0)                                                                 \
      : __VA_ARGS__, "r"(static_cast<int>(adds)))
#define FUSEDRES_WGMMA_OF(count, N, operands, adds_at, transposed, ...)                        \
  if constexpr (kCount == count && std::is_same<T, __nv_bfloat16>::value) {                    \
    FUSEDRES_WGMMA(N, count, "bf16", operands, adds_at, transposed, __VA_ARGS__);              \
  } else if constexpr (kCount == count) {                                                      \
    FUSEDRES_WGMMA(N, count, "f16", operands, adds_at, transposed, __VA_ARGS__);               \
  }
// clang-format on

#endif

// Starts d = a * b, or with `adds` d += a * b. Lane 4 * g + t of warp w has of row 16 * w + g
// columns 8 * i + 2 * t and the next in d[4 * i] and d[4 * i + 1], of row + 8 in the other two.
template <typename T, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool adds) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128, "N is 64, 128 or 256");
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::wgmma(d, 2 * kCount, a, b, adds, std::is_same<T, __nv_bfloat16>::value);
#else
  FUSEDRES_WGMMA_OF(32, "64", "%32, %33", "34", "0, 0", "l"(a), "l"(b))
  FUSEDRES_WGMMA_OF(64, "128", "%64, %65", "66", "0, 0", "l"(a), "l"(b))
  FUSEDRES_WGMMA_OF(128, "256", "%128, %129", "130", "0, 0", "l"(a), "l"(b))
#endif
}

// The same with a in registers, in the layout of mma_m16n8k16 for a warp's 16 rows. They may be
// written again when the product has been waited for.
template <typename T, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b,
                                      bool adds) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128, "N is 64, 128 or 256");
#if defined(FUSEDRES_CUDA_ON_HOST)
  sim::wgmma(d, 2 * kCount, a, b, adds, std::is_same<T, __nv_bfloat16>::value);
#else
#define FUSEDRES_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
  FUSEDRES_WGMMA_OF(32, "64", "{%32, %33, %34, %35}, %36", "37", "0", FUSEDRES_INPUTS)
  FUSEDRES_WGMMA_OF(64, "128", "{%64, %65, %66, %67}, %68", "69", "0", FUSEDRES_INPUTS)
  FUSEDRES_WGMMA_OF(128, "256", "{%128, %129, %130, %131}, %132", "133", "0", FUSEDRES_INPUTS)
#undef FUSEDRES_INPUTS
#endif
}

}  // namespace cuda
}  // namespace fusedres
