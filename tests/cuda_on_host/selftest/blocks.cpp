// Barriers of a block, shared and global memory, atomics.
#include "cases.h"

using fusedres::cuda::launch;

namespace {

enum class Bug { kNone, kNoBarrier, kNoSecondBarrier, kOneBehind };

constexpr int kBlock = 128;

// One block sums one row: threads, then warps through shared memory.
template <Bug kBug>
__global__ void row_sum_kernel(const float* x, float* y, int n) {
  FUSEDRES_SHARED(float, warp_sums, kBlock / 32);
  const int end = n + (kBug == Bug::kOneBehind);
  float sum = 0;
  for (int i = threadIdx.x; i < end; i += kBlock) sum += x[blockIdx.x * n + i];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  if (kBug != Bug::kNoBarrier) __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int i = 0; i < kBlock / 32; ++i) sum += warp_sums[i];
  y[blockIdx.x] = sum;
}

template <Bug kBug>
cudaError_t row_sum(bool* right) {
  constexpr int kRows = 3;
  constexpr int kCols = 200;
  const std::vector<float> x = integers(kRows * kCols);
  std::vector<float> y(kRows);
  const auto error =
      launch(row_sum_kernel<kBug>, {kRows, kBlock}, nullptr, x.data(), y.data(), kCols);
  *right = true;
  for (int row = 0; row < kRows; ++row) {
    float sum = 0;
    for (int i = 0; i < kCols; ++i) sum += x[row * kCols + i];
    *right = *right && y[row] == sum;
  }
  return error;
}

constexpr int kTile = 8;

// A tiled product of square matrices, the tiles in dynamic shared memory.
template <Bug kBug>
__global__ void matmul_kernel(const float* a, const float* b, float* c, int n) {
  FUSEDRES_DYNAMIC_SHARED(float, tiles);
  float* tile_a = tiles;
  float* tile_b = tiles + kTile * kTile + (kBug == Bug::kOneBehind);
  const int row = blockIdx.x * kTile + threadIdx.x / kTile;
  const int in_row = threadIdx.x / kTile;
  const int in_col = threadIdx.x % kTile;
  for (int col0 = 0; col0 < n; col0 += kTile) {
    float sum = 0;
    for (int t = 0; t < n; t += kTile) {
      tile_a[threadIdx.x] = a[row * n + t + in_col];
      tile_b[threadIdx.x] = b[(t + in_row) * n + col0 + in_col];
      if (kBug != Bug::kNoBarrier) __syncthreads();
      for (int k = 0; k < kTile; ++k)
        sum += tile_a[in_row * kTile + k] * tile_b[k * kTile + in_col];
      if (kBug != Bug::kNoSecondBarrier) __syncthreads();
    }
    c[row * n + col0 + in_col] = sum;
  }
}

template <Bug kBug>
cudaError_t matmul(bool* right) {
  constexpr int kN = 2 * kTile;
  const std::vector<float> a = integers(kN * kN);
  const std::vector<float> b(a.rbegin(), a.rend());
  std::vector<float> c(kN * kN);
  const auto error = launch(matmul_kernel<kBug>, {2, kTile * kTile, 2 * kTile * kTile * 4}, nullptr,
                            a.data(), b.data(), c.data(), kN);
  *right = true;
  for (int i = 0; i < kN * kN; ++i) {
    float sum = 0;
    for (int k = 0; k < kN; ++k) sum += a[i / kN * kN + k] * b[k * kN + i % kN];
    *right = *right && c[i] == sum;
  }
  return error;
}

__global__ void static_overrun_kernel(float* y, int n) {
  FUSEDRES_SHARED(float, values, 32);
  values[threadIdx.x + n] = 1;
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

cudaError_t static_overrun(bool* right) {
  std::vector<float> y(32);
  *right = true;
  return launch(static_overrun_kernel, {1, 32}, nullptr, y.data(), 1);
}

__global__ void misaligned_vector_kernel(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

cudaError_t misaligned_vector(bool* right) {
  alignas(16) static float x[4 * 32 + 1];
  std::vector<float> y(32);
  *right = true;
  return launch(misaligned_vector_kernel, {1, 32}, nullptr, static_cast<const float*>(x + 1),
                y.data());
}

__global__ void barrier_for_some_kernel(float* y) {
  if (threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void barriers_at_two_lines_kernel(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}

__global__ void barriers_of_two_kinds_kernel(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    fusedres::cuda::named_barrier(1, 64);
  }
  y[threadIdx.x] = 1;
}

template <void (*kKernel)(float*)>
cudaError_t on_64_threads(bool* right) {
  std::vector<float> y(64);
  const auto error = launch(kKernel, {1, 64}, nullptr, y.data());
  *right = true;
  return error;
}

// Warp 0 hands values to warp 1 through a named barrier.
__global__ void named_barrier_kernel(float* y) {
  FUSEDRES_SHARED(float, values, 32);
  if (threadIdx.x < 32) {
    values[threadIdx.x] = 1;
    fusedres::cuda::named_barrier(3, 64);
  } else {
    fusedres::cuda::named_barrier(3, 64);
    y[threadIdx.x - 32] = values[63 - threadIdx.x];
  }
}

cudaError_t named_barriers(bool* right) {
  std::vector<float> y(32);
  const auto error = launch(named_barrier_kernel, {1, 64}, nullptr, y.data());
  *right = y == std::vector<float>(32, 1.0f);
  return error;
}

template <bool kAtomic>
__global__ void count_kernel(float* sum, int* count, unsigned* largest) {
  if (kAtomic) {
    atomicAdd(sum, 0.5f);
    atomicAdd(count, 1);
    atomicMax(largest, threadIdx.x);
  } else if (threadIdx.x % 32 == 0) {
    *sum += 0.5f;
  }
}

template <bool kAtomic>
cudaError_t count(bool* right) {
  std::vector<float> sum(1);
  std::vector<int> n(1);
  std::vector<unsigned> largest(1);
  const auto error =
      launch(count_kernel<kAtomic>, {2, 64}, nullptr, sum.data(), n.data(), largest.data());
  *right = kAtomic ? sum[0] == 64.0f && n[0] == 128 && largest[0] == 63 : sum[0] == 2.0f;
  return error;
}

__global__ void one_result_of_all_blocks_kernel(float* y) {
  if (threadIdx.x == 0) *y = static_cast<float>(gridDim.x);
}

cudaError_t race_of_blocks(bool* right) {
  float y = 0;
  const auto error = launch(one_result_of_all_blocks_kernel, {2, 32}, nullptr, &y);
  *right = y == 2.0f;
  return error;
}

cudaError_t too_much_shared(bool* right) {
  *right = false;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 50 * 1024;  // more than 48 KiB must be asked for
  const float* none = nullptr;
  return cudaLaunchKernelEx(&config, matmul_kernel<Bug::kNone>, none, none,
                            static_cast<float*>(nullptr), 0);
}

__global__ void static_and_dynamic_kernel(float* y) {
  FUSEDRES_SHARED(float, part, 64);
  FUSEDRES_DYNAMIC_SHARED(float, whole);
  whole[threadIdx.x] = part[threadIdx.x] = 1;
  if (threadIdx.x == 0) *y = part[0] + whole[0];
}

// A static array counts against the default.
cudaError_t too_much_shared_together(bool* right) {
  *right = false;
  float y = 0;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 48 * 1024;
  return cudaLaunchKernelEx(&config, static_and_dynamic_kernel, &y);
}

}  // namespace

std::vector<Case> block_cases() {
  return {
      {"row_sum", row_sum<Bug::kNone>},
      {"row_sum_without_barrier", row_sum<Bug::kNoBarrier>},
      {"row_sum_one_behind", row_sum<Bug::kOneBehind>},
      {"matmul", matmul<Bug::kNone>},
      {"matmul_without_barrier", matmul<Bug::kNoBarrier>},
      {"matmul_without_second_barrier", matmul<Bug::kNoSecondBarrier>},
      {"matmul_one_behind", matmul<Bug::kOneBehind>},
      {"static_overrun", static_overrun},
      {"misaligned_vector", misaligned_vector},
      {"barrier_for_some", on_64_threads<barrier_for_some_kernel>},
      {"barriers_at_two_lines", on_64_threads<barriers_at_two_lines_kernel>},
      {"barriers_of_two_kinds", on_64_threads<barriers_of_two_kinds_kernel>},
      {"named_barriers", named_barriers},
      {"atomics", count<true>},
      {"race_without_atomics", count<false>},
      {"race_of_blocks", race_of_blocks},
      {"too_much_shared", too_much_shared},
      {"too_much_shared_together", too_much_shared_together},
  };
}
