// Tiles that stay on the chip between two passes over them: a thread's packs, as they were in
// global memory. Only the thread that asked for a pack takes it, so no barrier is needed.
#pragma once

#include <type_traits>

#include "pack.cuh"

namespace fusedres {
namespace cuda {

// A pack as it lies in memory.
template <typename T>
struct RawPack {
  static constexpr int kWords = kPack * static_cast<int>(sizeof(T)) / 16;
  uint4 words[kWords];

  __device__ __forceinline__ Pack<acc_of<T>> unpacked() const {
    Pack<acc_of<T>> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] = to_acc(reinterpret_cast<const T*>(words)[i]);
    return out;
  }
};

// In the block's dynamic shared memory.
template <typename T>
struct Held {
  static constexpr int kWords = RawPack<T>::kWords;
  uint4* at;

  // Asks for the k-th pack, which is there once this thread has waited for its copies.
  __device__ __forceinline__ void fetch(int k, const T* from) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      copy_async(&at[(k * kWords + w) * kThreads + threadIdx.x],
                 reinterpret_cast<const uint4*>(from) + w, true);
    }
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k) const {
    RawPack<T> raw;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      raw.words[w] = at[(k * kWords + w) * kThreads + threadIdx.x];
    }
    return raw.unpacked();
  }
};

// The first kOwn packs in registers, the others in shared memory.
template <typename T, int kOwn>
struct Kept {
  Held<T> others;
  RawPack<T> own[kOwn];

  // The first of them, `step` elements apart.
  __device__ __forceinline__ void load(const T* from, int64_t step, int count) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int w = 0; w < Held<T>::kWords; ++w) {
        own[k].words[w] = uint4{};
        if (k < count) own[k].words[w] = reinterpret_cast<const uint4*>(from + k * step)[w];
      }
    }
  }
  __device__ __forceinline__ void fetch(int k, const T* from) const {
    others.fetch(k - kOwn, from);
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k) const { return others.take(k - kOwn); }
};

// Calls ask(k) for packs `first` to `count`, in two groups of copies; returns where the second
// begins.
template <typename Ask>
__device__ __forceinline__ int fetch_in_two(int first, int count, Ask ask) {
  const int middle = first < count ? first + (count - first) / 2 : first;
  for (int k = first; k < middle; ++k) ask(k);
  copy_async_commit();
  for (int k = middle; k < count; ++k) ask(k);
  copy_async_commit();
  return middle;
}

// f(k, how many) for packs 0 to count, kAtOnce of them together as long as there are so many.
template <int kAtOnce, typename F>
__device__ __forceinline__ void in_batches(int count, F f) {
  int k = 0;
  for (; k + kAtOnce <= count; k += kAtOnce) f(k, std::integral_constant<int, kAtOnce>());
  for (; k < count; ++k) f(k, std::integral_constant<int, 1>());
}

}  // namespace cuda
}  // namespace fusedres
