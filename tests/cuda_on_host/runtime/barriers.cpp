// Barriers of a block, a cluster and the grid. They are stricter than a GPU: all threads of a
// barrier must come to the same line, and none may have returned.
#include "state.h"

namespace sim {

void meet(Barrier* barrier, size_t threads, const Site& site, bool orders) {
  Unseen quiet;
  if (!barrier->waiting.empty() && !(barrier->site == site)) {
    fail("divergent barrier: " + place(*state.current) + " is at " + site.text() + ", " +
         place(*barrier->waiting.front()) + " at " + barrier->site.text());
  }
  Token& token = barrier->tokens[barrier->phase & 1];
  barrier->site = site;
  barrier->waiting.push_back(state.current);
  if (orders) token.release();
  if (barrier->waiting.size() == threads) {
    ++barrier->phase;
    for (Fiber* fiber : barrier->waiting) wake(fiber);
    barrier->waiting.clear();
  }
  wait(site);
  if (orders) token.acquire();
}

namespace {

void check_all_alive(const Block& block, const Site& site) {
  if (block.alive == block.fibers.size()) return;
  for (const Fiber& fiber : block.fibers) {
    if (!fiber.done) continue;
    fail("divergent barrier: " + place(fiber) + " has returned, " + place(*state.current) +
         " waits at " + site.text());
  }
}

void check_nobody_at(const Barrier& barrier, const Fiber& finished) {
  if (barrier.waiting.empty()) return;
  fail("divergent barrier: " + place(finished) + " has returned, " +
       place(*barrier.waiting.front()) + " waits at " + barrier.site.text());
}

}  // namespace

void block_barrier(const char* file, int line) {
  const Site site{"__syncthreads", file, line};
  Block* block = state.current->block;
  check_all_alive(*block, site);
  meet(&block->barriers[0], block->fibers.size(), site);
}

// Partners of a named barrier may be at different lines, as a producer and its consumers are.
void named_barrier(int id, int threads) {
  Block* block = state.current->block;
  if (id < 1 || id > 15 || threads <= 0 || threads % 32 != 0 ||
      static_cast<size_t>(threads) > block->fibers.size()) {
    fail("named_barrier(" + std::to_string(id) + ", " + std::to_string(threads) +
         "): wanted an id from 1 to 15 and whole warps of the block");
  }
  meet(&block->barriers[id], static_cast<size_t>(threads), {"named_barrier", nullptr, id});
}

void cluster_barrier(const char* file, int line) {
  const Site site{"cluster.sync", file, line};
  Cluster* cluster = state.current->block->cluster;
  size_t threads = 0;
  for (const Block* block : cluster->blocks) {
    check_all_alive(*block, site);
    threads += block->fibers.size();
  }
  meet(&cluster->barrier, threads, site);
}

void grid_barrier(const char* file, int line) {
  const Site site{"grid.sync", file, line};
  if (!state.cooperative) fail("grid.sync in a launch that is not cooperative");
  const Block* block = state.current->block;
  check_all_alive(*block, site);
  meet(&state.grid_barrier, state.blocks * block->fibers.size(), site);
}

void check_no_one_waits_for(const Fiber& finished) {
  check_nobody_at(finished.block->barriers[0], finished);
  check_nobody_at(finished.block->cluster->barrier, finished);
  if (state.cooperative) check_nobody_at(state.grid_barrier, finished);
  const Warp& warp = finished.block->warps[finished.rank / 32];
  for (const auto& [mask, operation] : warp.pending) {
    if ((mask >> finished.rank % 32 & 1u) != 0) {
      fail("divergent warp: " + place(finished) + " has returned, others wait for it in " +
           operation.name);
    }
  }
}

}  // namespace sim
