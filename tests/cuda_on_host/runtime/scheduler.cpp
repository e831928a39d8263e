// Runs a grid: cluster after cluster, or all blocks at once if the launch is cooperative. Fibers
// that can run do so in forward, reverse or random order, until they wait.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sim {

State state;

namespace {

size_t volume(const dim3& d) { return static_cast<size_t>(d.x) * d.y * d.z; }

uint3 index_in(const dim3& d, size_t i) {
  return {static_cast<unsigned>(i % d.x), static_cast<unsigned>(i / d.x % d.y),
          static_cast<unsigned>(i / d.x / d.y)};
}

template <typename T>
void arrange(std::vector<T>* items) {
  if (state.order == Order::kReverse) std::reverse(items->begin(), items->end());
  if (state.order == Order::kRandom) {
    std::shuffle(items->begin(), items->end(), state.random);
  }
}

// Without arguments and namespaces; where the loader knows no name, "the kernel".
std::string kernel_name(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "the kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  name = name.substr(0, name.find_first_of("<("));
  const size_t space = name.find_last_of(" :");
  return space == std::string::npos ? name : name.substr(space + 1);
}

using Blocks = std::vector<std::unique_ptr<Block>>;

void fill_block(Block* block, size_t* slots, size_t turn) {
  const size_t threads = volume(blockDim);
  block->fibers.resize(threads);
  block->warps.resize((threads + 31) / 32);
  block->alive = threads;
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.block = block;
    fiber.rank = static_cast<unsigned>(i);
    fiber.index = index_in(blockDim, i);
    block->warps[i / 32].alive |= 1u << i % 32;
    // Another stack than the same thread of the block before: see own_stack() in contexts.cpp.
    start_fiber(&fiber, *slots + (i + turn) % threads);
    block->ready.push_back(&fiber);
  }
  *slots += threads;
}

void free_blocks(Blocks* blocks) {
  for (const auto& block : *blocks) {
    for (Fiber& fiber : block->fibers) finish_fiber(&fiber);
    free_shared(block.get());
  }
  blocks->clear();
  state.copies.clear();
}

std::string where_they_wait(const Blocks& blocks) {
  std::map<std::string, std::pair<const Fiber*, size_t>> sites;  // a thread, and how many
  for (const auto& block : blocks) {
    for (const Fiber& fiber : block->fibers) {
      if (fiber.done) continue;
      auto& entry = sites[fiber.waits_at.text()];
      if (entry.second++ == 0) entry.first = &fiber;
    }
  }
  std::string text;
  for (const auto& [site, entry] : sites) {
    text += (text.empty() ? "" : "; ") + std::to_string(entry.second) + " at " + site + " (" +
            place(*entry.first) + ")";
  }
  return text;
}

// Lets every fiber that can run do so once.
void run_ready(Block* block) {
  std::vector<Fiber*> batch;
  batch.swap(block->ready);
  arrange(&batch);
  for (Fiber* fiber : batch) {
    resume(fiber);
    while (state.order == Order::kReverse && land_a_copy()) continue;
    if (!state.error.empty()) return;
  }
  if (block->alive == 0) free_shared(block);
}

void run_blocks(const Blocks& blocks) {
  std::vector<Block*> turn;
  for (const auto& block : blocks) turn.push_back(block.get());
  while (state.error.empty()) {
    bool ran = false;
    arrange(&turn);
    if (state.order == Order::kReverse) std::reverse(turn.begin(), turn.end());
    for (Block* block : turn) {
      if (block->ready.empty()) continue;
      ran = true;
      run_ready(block);
      if (!state.error.empty()) return;
      if (state.order == Order::kRandom && state.random() % 4 == 0) land_a_copy();
    }
    const bool alive = std::any_of(turn.begin(), turn.end(), [](Block* b) { return b->alive > 0; });
    if (!alive) return;
    if (!ran && !land_a_copy()) note_error("deadlock: " + where_they_wait(blocks));
  }
}

struct Attributes {
  dim3 cluster{1, 1, 1};
  bool cooperative = false;
};

Attributes attributes_of(const cudaLaunchConfig_t& config) {
  Attributes found;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      found.cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    } else if (a.id == cudaLaunchAttributeCooperative) {
      found.cooperative = a.val.cooperative != 0;
    }
  }
  return found;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, const Attributes& a) {
  const size_t threads = volume(config.blockDim);
  const size_t cluster = volume(a.cluster);
  const dim3& grid = config.gridDim;
  if (threads == 0 || threads > 1024 || volume(grid) == 0 || cluster == 0 || cluster > 8 ||
      grid.y > 65535 || grid.z > 65535 || grid.x % a.cluster.x != 0 || grid.y % a.cluster.y != 0 ||
      grid.z % a.cluster.z != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (cluster > 1 && state.major < 9) return cudaErrorNotSupported;
  const auto limit = state.shared_limits.find(kernel);
  const bool set = limit != state.shared_limits.end();
  const size_t allowed = set ? static_cast<size_t>(limit->second) : kDefaultShared;
  if (config.dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  int clusters = 1;
  if (cluster > 1) cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (clusters == 0) return cudaErrorInvalidClusterSize;
  if (!a.cooperative) return cudaSuccess;
  int resident = 0;
  occupancy_of(&resident, kernel, static_cast<int>(threads), config.dynamicSmemBytes);
  return volume(grid) <= static_cast<size_t>(resident) * static_cast<size_t>(state.sms)
             ? cudaSuccess
             : cudaErrorCooperativeLaunchTooLarge;
}

void run_grid(const dim3& cluster_dim) {
  const size_t size = volume(cluster_dim);
  const dim3 grid(gridDim.x / cluster_dim.x, gridDim.y / cluster_dim.y, gridDim.z / cluster_dim.z);
  std::vector<size_t> clusters(volume(grid));
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  arrange(&clusters);
  std::vector<std::unique_ptr<Cluster>> alive;
  Blocks blocks;
  size_t slots = 0;
  for (const size_t c : clusters) {
    const uint3 at = index_in(grid, c);
    alive.push_back(std::make_unique<Cluster>());
    for (size_t rank = 0; rank < size; ++rank) {
      const uint3 in = index_in(cluster_dim, rank);
      blocks.push_back(std::make_unique<Block>());
      Block* block = blocks.back().get();
      block->index = {at.x * cluster_dim.x + in.x, at.y * cluster_dim.y + in.y,
                      at.z * cluster_dim.z + in.z};
      block->rank = static_cast<unsigned>(rank);
      block->cluster = alive.back().get();
      alive.back()->blocks.push_back(block);
      fill_block(block, &slots, c * 37);
    }
    if (!state.cooperative) {
      run_blocks(blocks);
      free_blocks(&blocks);
      alive.clear();
      slots = 0;
    }
    if (!state.error.empty()) break;
  }
  if (state.cooperative && state.error.empty()) run_blocks(blocks);
  free_blocks(&blocks);
  free_used_fibers();
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  const Attributes attributes = attributes_of(config);
  const cudaError_t refused = check(config, kernel, attributes);
  if (refused != cudaSuccess) return refused;
  if (!state.error.empty()) return cudaErrorLaunchFailure;  // sticky, as on a GPU
  Unseen quiet;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  state.thread = thread;
  state.kernel = kernel_name(kernel);
  const size_t cluster = volume(attributes.cluster);
  state.launched += state.kernel + " " + std::to_string(cluster) + "\n";
  state.blocks = volume(config.gridDim);
  state.shared_bytes = config.dynamicSmemBytes;
  state.shared_allowed = state.shared_limits.count(kernel) != 0
                             ? static_cast<size_t>(state.shared_limit)
                             : kDefaultShared;
  state.cooperative = attributes.cooperative;
  state.grid_barrier = {};
  state.started.release();
  run_grid(attributes.cluster);
  state.finished.acquire();
  return state.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void note_error(const std::string& problem) {
  if (state.error.empty()) state.error = state.kernel + ": " + problem;
}

void fail(const std::string& problem) {
  note_error(problem);
  for (;;) leave();  // the scheduler abandons this fiber
}

void wake(Fiber* fiber) { fiber->block->ready.push_back(fiber); }

void wait(const Site& at) {
  state.current->waits_at = at;
  leave();
}

std::string place(const Fiber& fiber) {
  const auto text = [](const uint3& i) {
    return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z);
  };
  return "thread " + text(fiber.index) + " of block " + text(fiber.block->index);
}

std::string Site::text() const {
  if (file == nullptr) return name;
  const char* slash = std::strrchr(file, '/');
  const char* base = slash == nullptr ? file : slash + 1;
  return std::string(name) + " (" + base + ":" + std::to_string(line) + ")";
}

bool Site::operator==(const Site& other) const {
  return line == other.line && std::strcmp(name, other.name) == 0 &&
         (file == other.file || text() == other.text());
}

}  // namespace sim

// By the shared memory and the registers of the SMs that a cluster can spread over.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const auto cluster = static_cast<int>(sim::volume(sim::attributes_of(*config).cluster));
  int of_sm = 0;
  const auto threads = static_cast<int>(sim::volume(config->blockDim));
  const cudaError_t error = occupancy_of(&of_sm, kernel, threads, config->dynamicSmemBytes);
  *clusters = of_sm * sim::state.cluster_sms / cluster;
  return error;
}
