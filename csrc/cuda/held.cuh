// A tile that stays on the chip between two passes over it.
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

// A thread's packs in the block's dynamic shared memory, as they were in global memory. Only the
// thread that put a pack there takes it, so no barrier is needed.
template <typename T>
struct Held {
  static constexpr int kWords = kPack * static_cast<int>(sizeof(T)) / 16;
  uint4* at;

  // The k-th pack from global memory, kept.
  __device__ __forceinline__ Pack<acc_of<T>> keep(int k, const T* from) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      at[(k * kWords + w) * kThreads + threadIdx.x] = reinterpret_cast<const uint4*>(from)[w];
    }
    return take(k);
  }
  // Asks for the k-th pack, which is there once this thread has waited for its copies.
  __device__ __forceinline__ void fetch(int k, const T* from) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      copy_async(&at[(k * kWords + w) * kThreads + threadIdx.x],
                 reinterpret_cast<const uint4*>(from) + w, true);
    }
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k) const {
    alignas(16) T raw[kPack];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      reinterpret_cast<uint4*>(raw)[w] = at[(k * kWords + w) * kThreads + threadIdx.x];
    }
    Pack<acc_of<T>> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] = to_acc(raw[i]);
    return out;
  }
};

}  // namespace cuda
}  // namespace fusedres
