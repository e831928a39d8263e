// Cooperative grids, clusters with distributed shared memory, mbarriers with bulk copies.
#include "cases.h"

using fusedres::cuda::launch;
namespace cg = cooperative_groups;

namespace {

enum class Bug { kNone, kNoSync, kNoLastSync, kNoEmptyWait, kNoFullWait, kWrongPhase, kNoArrival };

// Every block adds up its part, then all parts.
template <Bug kBug>
__global__ void grid_sum_kernel(const float* x, float* parts, float* y, int each) {
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < each; ++i) sum += x[blockIdx.x * each + i];
    parts[blockIdx.x] = sum;
  }
  if (kBug != Bug::kNoSync) cg::this_grid().sync();
  if (threadIdx.x != 32) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
  y[blockIdx.x] = sum;
}

template <Bug kBug, bool kCooperative>
cudaError_t grid_sum(bool* right) {
  constexpr int kBlocks = 4;
  constexpr int kEach = 10;
  const std::vector<float> x = integers(kBlocks * kEach);
  std::vector<float> parts(kBlocks), y(kBlocks);
  fusedres::cuda::LaunchShape shape{kBlocks, 64};
  shape.cooperative = kCooperative;
  const auto error =
      launch(grid_sum_kernel<kBug>, shape, nullptr, x.data(), parts.data(), y.data(), kEach);
  float sum = 0;
  for (const float v : x) sum += v;
  *right = y == std::vector<float>(kBlocks, sum);
  return error;
}

cudaError_t grid_too_large(bool* right) {
  *right = false;
  fusedres::cuda::LaunchShape shape{1000, 1024};
  shape.cooperative = true;
  float* none = nullptr;
  return launch(grid_sum_kernel<Bug::kNone>, shape, nullptr, static_cast<const float*>(none), none,
                none, 0);
}

// The blocks of a cluster add up each other's part.
template <Bug kBug>
__global__ void cluster_sum_kernel(const float* x, float* y, int each) {
  FUSEDRES_SHARED(float, part, 1);
  const cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) {
    part[0] = 0;
    for (int i = 0; i < each; ++i) part[0] += x[blockIdx.x * each + i];
  }
  if (kBug != Bug::kNoSync) cluster.sync();
  if (threadIdx.x == 32) {
    float sum = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
      sum += *cluster.map_shared_rank(&part[0], (rank + cluster.block_rank()) % 4);
    }
    y[blockIdx.x] = sum;
  }
  if (kBug != Bug::kNoLastSync) cluster.sync();
}

template <Bug kBug>
cudaError_t cluster_sum(bool* right) {
  constexpr int kBlocks = 8;
  constexpr int kEach = 5;
  const std::vector<float> x = integers(kBlocks * kEach);
  std::vector<float> y(kBlocks);
  fusedres::cuda::LaunchShape shape{kBlocks, 64};
  shape.cluster = 4;
  const auto error = launch(cluster_sum_kernel<kBug>, shape, nullptr, x.data(), y.data(), kEach);
  *right = true;
  for (int b = 0; b < kBlocks; ++b) {
    float sum = 0;
    for (int i = 0; i < 4 * kEach; ++i) sum += x[b / 4 * 4 * kEach + i];
    *right = *right && y[b] == sum;
  }
  return error;
}

constexpr int kStage = 64;  // elements
constexpr int kStages = 2;
constexpr int kConsumers = 2;  // warps

// Warp 0 copies tiles into a ring, the other warps add them up.
template <Bug kBug>
__global__ void ring_kernel(const float* x, float* y, int tiles) {
  FUSEDRES_SHARED(float, ring, kStages* kStage);
  FUSEDRES_SHARED(uint64_t, full, kStages);
  FUSEDRES_SHARED(uint64_t, empty, kStages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      fusedres::cuda::mbarrier_init(&full[i], 1);
      fusedres::cuda::mbarrier_init(&empty[i], kConsumers);
    }
    fusedres::cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int t = 0; t < tiles && threadIdx.x == 0; ++t) {
      const int s = t % kStages;
      const int turn = t / kStages;
      if (turn > 0 && kBug != Bug::kNoEmptyWait) {
        fusedres::cuda::mbarrier_wait(&empty[s], (turn - 1) & 1);
      }
      fusedres::cuda::mbarrier_arrive_expect(&full[s], kStage * 4);
      fusedres::cuda::bulk_copy(ring + s * kStage, x + t * kStage, kStage * 4, &full[s]);
    }
    return;
  }
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    const int s = t % kStages;
    const int parity = t / kStages & 1;
    if (kBug != Bug::kNoFullWait) {
      fusedres::cuda::mbarrier_wait(&full[s], kBug == Bug::kWrongPhase ? parity ^ 1 : parity);
    }
    sum += ring[s * kStage + threadIdx.x - 32];
    __syncwarp();
    if (threadIdx.x % 32 == 0 && kBug != Bug::kNoArrival) {
      fusedres::cuda::mbarrier_arrive(&empty[s]);
    }
  }
  y[threadIdx.x - 32] = sum;
}

template <Bug kBug>
cudaError_t ring(bool* right) {
  constexpr int kTiles = 6;
  const std::vector<float> x = integers(kTiles * kStage);  // at a multiple of 16 bytes
  std::vector<float> y(kStage);
  const auto error =
      launch(ring_kernel<kBug>, {1, 32 + kStage}, nullptr, x.data(), y.data(), kTiles);
  *right = true;
  for (int i = 0; i < kStage; ++i) {
    float sum = 0;
    for (int t = 0; t < kTiles; ++t) sum += x[t * kStage + i];
    *right = *right && y[i] == sum;
  }
  return error;
}

}  // namespace

std::vector<Case> wide_cases() {
  return {
      {"grid_sum", grid_sum<Bug::kNone, true>},
      {"grid_sum_without_sync", grid_sum<Bug::kNoSync, true>},
      {"grid_sum_not_cooperative", grid_sum<Bug::kNone, false>},
      {"grid_too_large", grid_too_large},
      {"cluster_sum", cluster_sum<Bug::kNone>},
      {"cluster_sum_without_sync", cluster_sum<Bug::kNoSync>},
      {"cluster_sum_without_last_sync", cluster_sum<Bug::kNoLastSync>},
      {"ring", ring<Bug::kNone>},
      {"ring_without_empty_wait", ring<Bug::kNoEmptyWait>},
      {"ring_without_full_wait", ring<Bug::kNoFullWait>},
      {"ring_with_wrong_phase", ring<Bug::kWrongPhase>},
      {"ring_without_arrival", ring<Bug::kNoArrival>},
  };
}
