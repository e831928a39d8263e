// Shuffles, votes and reductions of a warp.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace sim {

template <typename T>
T shuffle(unsigned mask, T value, Shuffle kind, int argument, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_shuffle(mask, bits, kind, argument, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace sim

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return sim::shuffle(mask, value, sim::Shuffle::kIndex, lane, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return sim::shuffle(mask, value, sim::Shuffle::kXor, lanes, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return sim::shuffle(mask, value, sim::Shuffle::kUp, static_cast<int>(lanes), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return sim::shuffle(mask, value, sim::Shuffle::kDown, static_cast<int>(lanes), width);
}

inline void __syncwarp(unsigned mask = ~0u) { sim::warp_barrier(mask); }
inline unsigned __activemask() { return sim::active_lanes(); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return sim::warp_ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return sim::warp_reduce(mask, v, sim::Reduce::kAdd);
}
inline int __reduce_add_sync(unsigned mask, int v) {
  return static_cast<int>(sim::warp_reduce(mask, static_cast<unsigned>(v), sim::Reduce::kAdd));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return sim::warp_reduce(mask, v, sim::Reduce::kMin);
}
inline int __reduce_min_sync(unsigned mask, int v) {
  return static_cast<int>(
      sim::warp_reduce(mask, static_cast<unsigned>(v), sim::Reduce::kMinSigned));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return sim::warp_reduce(mask, v, sim::Reduce::kMax);
}
inline int __reduce_max_sync(unsigned mask, int v) {
  return static_cast<int>(
      sim::warp_reduce(mask, static_cast<unsigned>(v), sim::Reduce::kMaxSigned));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) {
  return sim::warp_reduce(mask, v, sim::Reduce::kAnd);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return sim::warp_reduce(mask, v, sim::Reduce::kOr);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) {
  return sim::warp_reduce(mask, v, sim::Reduce::kXor);
}
