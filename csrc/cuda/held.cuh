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

  // As load_pack reads it.
  template <bool kWide>
  __device__ __forceinline__ static RawPack read(const T* from, int width, int n) {
    RawPack raw{};
    copy_pack<T, kWide>(from, reinterpret_cast<T*>(raw.words), width, n);
    return raw;
  }
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

  __device__ __forceinline__ uint4* word(int k, int w) const {
    return &at[(k * kWords + w) * kThreads + threadIdx.x];
  }
  // Asks for the k-th pack, which is there once this thread has waited for its copies.
  __device__ __forceinline__ void fetch(int k, const T* from) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      copy_async(word(k, w), reinterpret_cast<const uint4*>(from) + w, true);
    }
  }
  __device__ __forceinline__ void put(int k, const RawPack<T>& raw) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) *word(k, w) = raw.words[w];
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k) const {
    RawPack<T> raw;
#pragma unroll
    for (int w = 0; w < kWords; ++w) raw.words[w] = *word(k, w);
    return raw.unpacked();
  }
};

struct InRegisters {};  // of a k that the compiler knows
struct InShared {};
struct Anywhere {};

// A thread's packs of a tensor: the first kOwn in registers, the others in shared memory.
template <typename T, int kOwn>
struct Kept {
  const T* from;
  Held<T> others;
  RawPack<T> own[kOwn];

  // Those in shared memory, which read(k) brings through registers, some of them together.
  template <typename Read>
  __device__ __forceinline__ void fill(int count, Read read) const {
    constexpr int kAtOnce = 4;
    for (int k = kOwn; k < count; k += kAtOnce) {
      RawPack<T> raw[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (k + j < count) raw[j] = read(k + j);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (k + j < count) others.put(k + j - kOwn, raw[j]);
      }
    }
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k, InRegisters) const {
    return own[k].unpacked();
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k, InShared) const {
    return others.take(k - kOwn);
  }
  __device__ __forceinline__ Pack<acc_of<T>> take(int k, Anywhere) const {
    if (k >= kOwn) return others.take(k - kOwn);
    RawPack<T> raw = own[0];
#pragma unroll
    for (int j = 1; j < kOwn; ++j) raw = k == j ? own[j] : raw;
    return raw.unpacked();
  }
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

// f(k, where it is) for those of a thread's packs that are in registers.
template <int kOwn, typename F>
__device__ __forceinline__ void in_registers(int count, F f) {
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (k < count) f(k, InRegisters());
  }
}

// f(k, where it is) for all of a thread's packs, as fetch_in_two's groups come. kOnce: compiles f,
// where it is long, once for all of them.
template <int kOwn, bool kOnce, typename F>
__device__ __forceinline__ void as_they_come(int middle, int count, F f) {
  if constexpr (kOnce) {
    copy_async_wait<1>();
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      if (k == middle) copy_async_wait<0>();
      f(k, Anywhere());
    }
    return;
  }
  in_registers<kOwn>(count, f);
  copy_async_wait<1>();
  for (int k = kOwn; k < middle; ++k) f(k, InShared());
  copy_async_wait<0>();
  for (int k = middle; k < count; ++k) f(k, InShared());
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
