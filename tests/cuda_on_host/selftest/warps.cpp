// Shuffles, votes, reductions and mma, against what the programming guide says of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cases.h"

using fusedres::cuda::launch;

namespace {

__global__ void shuffles_kernel(int* y) {
  const int lane = threadIdx.x;
  y[0 * 32 + lane] = __shfl_sync(~0u, lane, lane / 4, 8);
  y[1 * 32 + lane] = __shfl_xor_sync(~0u, lane, 5);
  y[2 * 32 + lane] = __shfl_up_sync(~0u, lane, 3, 16);
  y[3 * 32 + lane] = __shfl_down_sync(~0u, lane, 3, 16);
  const double wide = __shfl_xor_sync(~0u, lane + 0.5, 1);  // 8 bytes
  y[4 * 32 + lane] = static_cast<int>(wide * 2);
  if (lane < 8) y[5 * 32 + lane] = __shfl_sync(0xffu, lane, 7);
}

cudaError_t shuffles(bool* right) {
  std::vector<int> y(6 * 32, -1);
  const auto error = launch(shuffles_kernel, {1, 32}, nullptr, y.data());
  *right = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int in_16 = lane % 16;
    const int wanted[6] = {lane / 8 * 8 + lane / 4 % 8,  lane ^ 5,
                           in_16 >= 3 ? lane - 3 : lane, in_16 + 3 < 16 ? lane + 3 : lane,
                           (lane ^ 1) * 2 + 1,           lane < 8 ? 7 : -1};
    for (int i = 0; i < 6; ++i) *right = *right && y[i * 32 + lane] == wanted[i];
  }
  return error;
}

__global__ void votes_kernel(unsigned* y) {
  const int lane = threadIdx.x;
  const unsigned full = 0xffffu;  // a block of 16 threads: half a warp
  const unsigned odd = __ballot_sync(full, lane % 2);
  const int any = __any_sync(full, lane == 9);
  const int all = __all_sync(full, lane < 15);
  const unsigned sum = __reduce_add_sync(full, static_cast<unsigned>(lane));
  const int least = __reduce_min_sync(full, lane - 4);
  const unsigned most = __reduce_max_sync(full, static_cast<unsigned>(lane));
  const unsigned either = __reduce_or_sync(full, 1u << lane);
  if (lane != 3) return;
  const unsigned found[] = {odd, unsigned(any), unsigned(all), sum, unsigned(least), most, either};
  for (int i = 0; i < 7; ++i) y[i] = found[i];
}

cudaError_t votes(bool* right) {
  std::vector<unsigned> y(7);
  const auto error = launch(votes_kernel, {1, 16}, nullptr, y.data());
  *right = y == std::vector<unsigned>{0xaaaau, 1, 0, 120, unsigned(-4), 15, 0xffffu};
  return error;
}

__global__ void shuffle_outside_mask_kernel(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

__global__ void two_operations_kernel(int* y) {
  y[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : __any_sync(~0u, 1);
}

__global__ void lane_has_returned_kernel(int* y) {
  if (threadIdx.x == 7) return;
  y[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

// A shuffle is no barrier for memory; __syncwarp() is.
template <bool kBarrier>
__global__ void through_shared_kernel(int* y) {
  FUSEDRES_SHARED(int, values, 32);
  values[threadIdx.x] = threadIdx.x;
  if (kBarrier) {
    __syncwarp();
  } else {
    __shfl_xor_sync(~0u, 1, 1);
  }
  y[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <void (*kKernel)(int*)>
cudaError_t on_a_warp(bool* right) {
  std::vector<int> y(32);
  const auto error = launch(kKernel, {1, 32}, nullptr, y.data());
  *right = true;
  for (int i = 0; i < 32; ++i) *right = *right && y[i] == (i ^ 1);
  return error;
}

template <typename T>
T rounded(float v);
template <>
__half rounded(float v) {
  return __float2half_rn(v);
}
template <>
__nv_bfloat16 rounded(float v) {
  return __float2bfloat16_rn(v);
}

constexpr int kDepth = 32;

// c [16, 8] = a [16, kDepth] * b [8, kDepth] transposed
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  const int group = threadIdx.x / 4;
  const int t = threadIdx.x % 4;
  const auto two = [](const T* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
  };
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < kDepth; k += 16) {
    const T* row = a + group * kDepth + k + t * 2;
    const T* column = b + group * kDepth + k + t * 2;
    const uint32_t fragment_a[4] = {two(row), two(row + 8 * kDepth), two(row + 8),
                                    two(row + 8 * kDepth + 8)};
    const uint32_t fragment_b[2] = {two(column), two(column + 8)};
    fusedres::cuda::mma_m16n8k16(d, fragment_a, fragment_b, T{});
  }
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

template <typename T>
cudaError_t mma(bool* right) {
  const std::vector<float> values = integers(24 * kDepth);
  std::vector<T> a, b;
  for (int i = 0; i < 24 * kDepth; ++i) (i < 16 * kDepth ? a : b).push_back(rounded<T>(values[i]));
  std::vector<float> c(16 * 8);
  const auto error = launch(mma_kernel<T>, {1, 32}, nullptr, a.data(), b.data(), c.data());
  *right = true;
  for (int i = 0; i < 16 * 8; ++i) {
    float sum = 0;
    for (int k = 0; k < kDepth; ++k) {
      sum += values[i / 8 * kDepth + k] * values[(16 + i % 8) * kDepth + k];
    }
    *right = *right && c[i] == sum;
  }
  return error;
}

}  // namespace

std::vector<Case> warp_cases() {
  return {
      {"shuffles", shuffles},
      {"votes", votes},
      {"shuffle_outside_mask", on_a_warp<shuffle_outside_mask_kernel>},
      {"two_operations", on_a_warp<two_operations_kernel>},
      {"lane_has_returned", on_a_warp<lane_has_returned_kernel>},
      {"through_shared", on_a_warp<through_shared_kernel<true>>},
      {"shuffle_as_barrier", on_a_warp<through_shared_kernel<false>>},
      {"mma_bfloat16", mma<__nv_bfloat16>},
      {"mma_float16", mma<__half>},
  };
}
