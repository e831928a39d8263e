// Tensor copies, tiled and im2col, and wgmma: against loops over the tensors.
#include "../../../csrc/cuda/hopper.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../../csrc/cuda/tensor_map.cuh"
#include "cases.h"

using namespace fusedres::cuda;

namespace {

enum class Bug {
  kNone,
  kNoFullWait,
  kEarlyRelease,
  kNoWait,
  kNoFence,
  kWritesInFlight,
  kNoOperandStep,
  kWrongStride,
  kThreadMissing,
  kBeyondShared,
  kBeyondTensor,
  kNotAtSwizzle,
};

template <typename T>
T small(int i) {
  const float v = static_cast<float>(i * 37 % 17 - 8);
  if constexpr (std::is_same<T, __half>::value) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}
__host__ __device__ float number(__half v) { return __half2float(v); }
__host__ __device__ float number(__nv_bfloat16 v) { return __bfloat162float(v); }

constexpr int kRows = 64;
constexpr int kStages = 2;

template <int kColumns>
struct Stages {
  unsigned char a[kStages][kRows * 128], b[kStages][kColumns * 128];
  uint64_t full[kStages], empty[kStages];
};

template <int kColumns>
__device__ void produce(const CUtensorMap& a, const CUtensorMap& b, int steps, Bug bug,
                        Stages<kColumns>* s) {
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    mbarrier_wait(&s->empty[stage], (step / kStages & 1) ^ 1);
    mbarrier_arrive_expect(&s->full[stage], (kRows + kColumns) * 128);
    const int shift = bug == Bug::kBeyondShared ? kStages * (kRows + kColumns) * 128 : 0;
    tensor_copy(s->a[stage] + shift, &a, step * 64, 0, &s->full[stage]);
    tensor_copy(s->b[stage], &b, step * 64, 0, 0, &s->full[stage]);
  }
}

// c [64, kColumns] = a [64, depth] * b [kColumns, depth] transposed; one warpgroup copies.
template <typename T, int kColumns, Bug bug>
__global__ void __launch_bounds__(256, 1)
    product_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                   int steps, float* c) {
  FUSEDRES_DYNAMIC_SHARED(Stages<kColumns>, shared);
  Stages<kColumns>* const s = bug == Bug::kNotAtSwizzle ? shared : at_swizzle(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s->full[i], 1);
      mbarrier_init(&s->empty[i], 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    give_registers<40>();
    if (threadIdx.x == 128) produce(a, b, steps, bug, s);
    return;
  }
  take_registers<232>();
  float d[kColumns / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    if (bug != Bug::kNoFullWait) mbarrier_wait(&s->full[stage], step / kStages & 1);
    uint64_t operand_b = wgmma_operand(s->b[stage]);
    if (bug == Bug::kWrongStride) operand_b ^= uint64_t{(1024 ^ 2048) >> 4} << 32;
    if (bug != Bug::kNoFence) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      if (bug == Bug::kThreadMissing && threadIdx.x == 77) continue;
      const int at = bug == Bug::kNoOperandStep ? 0 : k;
      wgmma<T>(d, operand_at(wgmma_operand(s->a[stage]), at), operand_at(operand_b, k),
               step > 0 || k > 0);
    }
    wgmma_commit();
    if (bug == Bug::kWritesInFlight) d[3] = 0;
    const auto release = [&] {
      if (threadIdx.x % 32 == 0) mbarrier_arrive(&s->empty[stage]);
    };
    if (bug == Bug::kEarlyRelease) release();
    if (bug != Bug::kNoWait || step + 1 < steps) wgmma_wait<0>(d);
    if (bug != Bug::kEarlyRelease) release();
  }
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    c[(row + i / 2 % 2 * 8) * kColumns + column] = d[i];
  }
}

// Depth 168 is no multiple of 64, and 50 columns of b are zeros.
template <typename T, int kColumns, Bug bug>
cudaError_t product(bool* right) {
  constexpr int kDepth = 168;
  constexpr int kThere = kColumns - 50;
  std::vector<T> a(kRows * kDepth), b(kThere * kDepth);  // at multiples of 16 bytes
  for (int i = 0; i < kRows * kDepth; ++i) a[i] = small<T>(i);
  for (int i = 0; i < kThere * kDepth; ++i) b[i] = small<T>(i + 3);
  std::vector<float> c(kRows * kColumns);
  CUtensorMap map_a, map_b;
  const int beyond = bug == Bug::kBeyondTensor;
  cudaError_t error =
      tiled_map(&map_a, fusedres::kBFloat16, a.data(), 2, {kDepth + 8 * beyond, kRows, 0}, kRows);
  if (error != cudaSuccess) return error;
  error = tiled_map(&map_b, fusedres::kBFloat16, b.data(), 3, {kDepth, 1, kThere}, kColumns);
  if (error != cudaSuccess) return error;
  error =
      launch(product_kernel<T, kColumns, bug>, {1, 256, sizeof(Stages<kColumns>) + kSwizzleSlack},
             nullptr, map_a, map_b, (kDepth + 63) / 64, c.data());
  *right = true;
  for (int i = 0; i < kRows * kColumns; ++i) {
    float sum = 0;
    for (int k = 0; k < kDepth && i % kColumns < kThere; ++k) {
      sum += number(a[i / kColumns * kDepth + k]) * number(b[i % kColumns * kDepth + k]);
    }
    *right = *right && c[i] == sum;
  }
  return error;
}

constexpr int kPixels = 40;

// One box; the threads read it back through the swizzle.
__global__ void im2col_kernel(const __grid_constant__ CUtensorMap map, int c, Pixel at, int tap_h,
                              int tap_w, bool waits, float* y) {
  FUSEDRES_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const box = at_swizzle(shared);
  FUSEDRES_SHARED(uint64_t, full, 1);
  if (threadIdx.x == 0) mbarrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, kPixels * 128);
    tensor_copy_im2col(box, &map, c, at, tap_h, tap_w, full);
  }
  if (waits) mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < kPixels * 64; i += 128) {
    const int byte = i * 2 ^ (i / 64 % 8) << 4;
    y[i] = number(*reinterpret_cast<const __nv_bfloat16*>(box + byte));
  }
  mbarrier_wait(full, 0);  // the copy lands before the block is gone
}

// Every tap of a window over two images, from two pixels.
cudaError_t im2col(bool* right, const Window& window, bool waits = true) {
  constexpr int kN = 2, kH = 5, kW = 7, kC = 72;
  std::vector<__nv_bfloat16> x(kN * kH * kW * kC);
  for (int i = 0; i < kN * kH * kW * kC; ++i) x[i] = small<__nv_bfloat16>(i);
  CUtensorMap map;
  *right = why_no_im2col(window) == nullptr;
  cudaError_t error =
      im2col_map(&map, fusedres::kBFloat16, x.data(), kN, kH, kW, kC, window, kPixels);
  const auto out = [&](int i, int size) {
    return (size + 2 * window.pad[i] - window.dilation[i] * (window.taps[i] - 1) - 1) /
               window.stride[i] +
           1;
  };
  const int p = out(0, kH);
  const int q = out(1, kW);
  for (int first = 0; first < 12 && error == cudaSuccess; first += 11) {
    for (int tap = 0; tap < window.taps[0] * window.taps[1]; ++tap) {
      const int tap_h = tap / window.taps[1] * window.dilation[0];
      const int tap_w = tap % window.taps[1] * window.dilation[1];
      const auto corner = [&](int pixel) {
        return Pixel{pixel / q / p, pixel / q % p * window.stride[0] - window.pad[0],
                     pixel % q * window.stride[1] - window.pad[1]};
      };
      std::vector<float> y(kPixels * 64);
      error = launch(im2col_kernel, {1, 128, kPixels * 128 + kSwizzleSlack}, nullptr, map, 16,
                     corner(first), tap_h, tap_w, waits, y.data());
      for (int i = 0; i < kPixels * 64; ++i) {
        const Pixel at = corner(first + i / 64);
        const int h = at.h + tap_h;
        const int w = at.w + tap_w;
        const int c = 16 + i % 64;
        const bool inside = at.n < kN && h >= 0 && h < kH && w >= 0 && w < kW && c < kC;
        const float wanted = inside ? number(x[((at.n * kH + h) * kW + w) * kC + c]) : 0.0f;
        *right = *right && y[i] == wanted;
      }
    }
  }
  return error;
}

cudaError_t im2col_3x3(bool* right) { return im2col(right, {{3, 3}, {1, 1}, {1, 1}, {1, 1}}); }
cudaError_t im2col_strided(bool* right) { return im2col(right, {{3, 2}, {2, 1}, {1, 0}, {1, 2}}); }
cudaError_t im2col_without_wait(bool* right) {
  return im2col(right, {{1, 1}, {1, 1}, {0, 0}, {1, 1}}, false);
}

cudaError_t misaligned_map(bool* right) {
  alignas(16) static __nv_bfloat16 x[8 * 9];
  CUtensorMap map;
  *right = false;
  return tiled_map(&map, fusedres::kBFloat16, x + 1, 2, {8, 8, 0}, 8);
}

template <Bug kBug>
constexpr auto wrong = product<__nv_bfloat16, 64, kBug>;

}  // namespace

std::vector<Case> hopper_cases() {
  return {
      {"wgmma_bfloat16", product<__nv_bfloat16, 64, Bug::kNone>},
      {"wgmma_float16", product<__half, 128, Bug::kNone>},
      {"wgmma_256", product<__nv_bfloat16, 256, Bug::kNone>},
      {"wgmma_without_full_wait", wrong<Bug::kNoFullWait>},
      {"wgmma_early_release", wrong<Bug::kEarlyRelease>},
      {"wgmma_without_wait", wrong<Bug::kNoWait>},
      {"wgmma_without_fence", wrong<Bug::kNoFence>},
      {"wgmma_writes_in_flight", wrong<Bug::kWritesInFlight>},
      {"wgmma_without_operand_step", wrong<Bug::kNoOperandStep>},
      {"wgmma_wrong_stride", wrong<Bug::kWrongStride>},
      {"wgmma_thread_missing", wrong<Bug::kThreadMissing>},
      {"copy_beyond_shared", wrong<Bug::kBeyondShared>},
      {"copy_beyond_tensor", wrong<Bug::kBeyondTensor>},
      {"copy_not_at_swizzle", wrong<Bug::kNotAtSwizzle>},
      {"im2col_3x3", im2col_3x3},
      {"im2col_strided", im2col_strided},
      {"im2col_without_wait", im2col_without_wait},
      {"misaligned_map", misaligned_map},
  };
}
