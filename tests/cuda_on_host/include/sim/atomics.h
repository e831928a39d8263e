// Atomics, as the compiler's own: ThreadSanitizer knows them. They order memory more strongly than
// a GPU's relaxed atomics do, so a missing __threadfence() is not found.
#pragma once

#include <cstring>
#include <type_traits>

namespace sim {

template <typename T>
using Same = typename std::common_type<T>::type;  // no deduction from this argument

template <typename T, typename Update>
T update_atomically(T* at, Update update) {
  T before;
  __atomic_load(at, &before, __ATOMIC_ACQUIRE);
  for (;;) {
    T after = update(before);
    if (__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
      return before;
    }
  }
}

}  // namespace sim

template <typename T>
T atomicAdd(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return static_cast<T>(old + v); });
}
template <typename T>
T atomicSub(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return static_cast<T>(old - v); });
}
template <typename T>
T atomicExch(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T) { return v; });
}
template <typename T>
T atomicMin(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return v < old ? v : old; });
}
template <typename T>
T atomicMax(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return old < v ? v : old; });
}
template <typename T>
T atomicAnd(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return old & v; });
}
template <typename T>
T atomicOr(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return old | v; });
}
template <typename T>
T atomicXor(T* at, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return old ^ v; });
}
template <typename T>
T atomicCAS(T* at, sim::Same<T> compare, sim::Same<T> v) {
  return sim::update_atomically(at, [=](T old) { return old == compare ? v : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
