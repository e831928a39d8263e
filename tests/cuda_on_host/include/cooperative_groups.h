// Stands in for CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    sim::block_barrier(file, line);
  }
  unsigned thread_rank() const { return sim::thread_rank(); }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
};
inline thread_block this_thread_block() { return {}; }

struct grid_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    sim::grid_barrier(file, line);
  }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    sim::cluster_barrier(file, line);
  }
  unsigned block_rank() const { return sim::cluster_rank(); }
  unsigned num_blocks() const { return sim::cluster_blocks(); }
  template <typename T>
  T* map_shared_rank(T* shared, unsigned rank) const {
    return static_cast<T*>(sim::peer_address(shared, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

template <unsigned kSize>
struct thread_block_tile {
  static_assert(kSize <= 32 && (kSize & (kSize - 1)) == 0, "a tile is a power of two of lanes");
  unsigned thread_rank() const { return sim::thread_rank() % kSize; }
  unsigned meta_group_rank() const { return sim::thread_rank() / kSize; }
  static constexpr unsigned num_threads() { return kSize; }
  void sync() const { __syncwarp(mask()); }
  template <typename T>
  T shfl(T v, int lane) const {
    return __shfl_sync(mask(), v, lane, kSize);
  }
  template <typename T>
  T shfl_xor(T v, unsigned lanes) const {
    return __shfl_xor_sync(mask(), v, static_cast<int>(lanes), kSize);
  }
  template <typename T>
  T shfl_up(T v, unsigned lanes) const {
    return __shfl_up_sync(mask(), v, lanes, kSize);
  }
  template <typename T>
  T shfl_down(T v, unsigned lanes) const {
    return __shfl_down_sync(mask(), v, lanes, kSize);
  }
  unsigned ballot(int p) const { return __ballot_sync(mask(), p) >> first(); }
  int any(int p) const { return __any_sync(mask(), p); }
  int all(int p) const { return __all_sync(mask(), p); }

 private:
  static unsigned first() { return sim::thread_rank() % 32 / kSize * kSize; }
  static unsigned mask() { return (kSize == 32 ? ~0u : (1u << kSize % 32) - 1) << first(); }
};
template <unsigned kSize>
thread_block_tile<kSize> tiled_partition(const thread_block&) {
  return {};
}

}  // namespace cooperative_groups
