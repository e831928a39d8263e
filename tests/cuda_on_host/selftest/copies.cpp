// cp.async rings and ldmatrix.
#include <cuda_fp16.h>

#include "cases.h"

using fusedres::cuda::launch;

namespace {

enum class Bug {
  kNone,
  kNoWait,
  kWaitForOneLess,
  kNoCommit,
  kNoBarrier,
  kNoLastBarrier,
  kMisaligned
};

constexpr int kThreads = 64;
constexpr int kStage = kThreads * 4;  // floats: a copy a thread
constexpr int kStages = 3;

// Adds up tiles that come through a ring; each thread reads what another one copied. Of the last
// tile half is not there.
template <Bug kBug>
__global__ void async_ring_kernel(const float* x, float* y, int tiles) {
  FUSEDRES_SHARED(float, ring, kStages* kStage);
  const int me = static_cast<int>(threadIdx.x);
  const auto copy = [&](int t) {
    const int from = t * kStage + me * 4 + (kBug == Bug::kMisaligned ? 1 : 0);
    if (t < tiles) {
      const bool there = t + 1 < tiles || me < kThreads / 2;
      fusedres::cuda::copy_async(ring + t % kStages * kStage + me * 4, x + from, there);
    }
    if (kBug != Bug::kNoCommit) fusedres::cuda::copy_async_commit();
  };
  for (int t = 0; t < kStages - 1; ++t) copy(t);
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    if (kBug == Bug::kWaitForOneLess) {
      fusedres::cuda::copy_async_wait<kStages - 1>();
    } else if (kBug != Bug::kNoWait) {
      fusedres::cuda::copy_async_wait<kStages - 2>();
    }
    if (kBug != Bug::kNoBarrier) __syncthreads();
    if (kBug != Bug::kNoLastBarrier) copy(t + kStages - 1);
    for (int i = 0; i < 4; ++i) sum += ring[t % kStages * kStage + (kThreads - 1 - me) * 4 + i];
    if (kBug == Bug::kNoLastBarrier) copy(t + kStages);  // into the stage that others still read
  }
  y[me] = sum;
}

template <Bug kBug>
cudaError_t async_ring(bool* right) {
  constexpr int kTiles = 5;
  const std::vector<float> x = integers(kTiles * kStage);  // at a multiple of 16 bytes
  std::vector<float> y(kThreads);
  const auto error =
      launch(async_ring_kernel<kBug>, {1, kThreads}, nullptr, x.data(), y.data(), kTiles);
  *right = true;
  for (int i = 0; i < kThreads; ++i) {
    const int from = (kThreads - 1 - i) * 4;
    float sum = 0;
    for (int t = 0; t < kTiles; ++t) {
      for (int j = 0; j < 4; ++j) {
        if (t + 1 < kTiles || from < kStage / 2) sum += x[t * kStage + from + j];
      }
    }
    *right = *right && y[i] == sum;
  }
  return error;
}

// Four matrices of eight rows and columns; every lane has its words of each.
__global__ void matrices_kernel(const uint16_t* x, uint32_t* y) {
  FUSEDRES_SHARED(uint16_t, shared, 4 * 64);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = x[lane * 8 + i];
  __syncwarp();
  uint32_t words[4];
  fusedres::cuda::load_matrices(words, shared + lane * 8);
  for (int m = 0; m < 4; ++m) y[m * 32 + lane] = words[m];
}

cudaError_t matrices(bool* right) {
  std::vector<uint16_t> x(4 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i * 257);
  std::vector<uint32_t> y(4 * 32);
  const auto error =
      launch(matrices_kernel, {1, 32}, nullptr, static_cast<const uint16_t*>(x.data()), y.data());
  *right = true;
  for (int m = 0; m < 4; ++m) {
    for (int lane = 0; lane < 32; ++lane) {  // row lane / 4, columns lane % 4 * 2 and the next
      const uint16_t* from = &x[m * 64 + lane / 4 * 8 + lane % 4 * 2];
      *right = *right && y[m * 32 + lane] == (from[0] | static_cast<uint32_t>(from[1]) << 16);
    }
  }
  return error;
}

}  // namespace

std::vector<Case> copy_cases() {
  return {
      {"async_ring", async_ring<Bug::kNone>},
      {"async_ring_without_wait", async_ring<Bug::kNoWait>},
      {"async_ring_waits_for_one_less", async_ring<Bug::kWaitForOneLess>},
      {"async_ring_without_commit", async_ring<Bug::kNoCommit>},
      {"async_ring_without_barrier", async_ring<Bug::kNoBarrier>},
      {"async_ring_overtakes_its_readers", async_ring<Bug::kNoLastBarrier>},
      {"async_ring_misaligned", async_ring<Bug::kMisaligned>},
      {"matrices", matrices},
  };
}
