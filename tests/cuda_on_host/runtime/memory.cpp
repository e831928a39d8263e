// Shared memory: an allocation of its own for every array of every block, so that AddressSanitizer
// sees its bounds, poisoned with NaN, and gone when the block has returned.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../include/sim/hopper.h"
#include "state.h"

namespace sim {
namespace {

const char dynamic_key = 0;

}  // namespace

void* find_shared(const void* key, size_t bytes, const char* name) {
  Block* block = state.current->block;
  for (const SharedArray& array : block->shared) {
    if (array.key == key) return array.data;
  }
  Unseen quiet;
  // A GPU refuses the launch; here a static array is known when it is first used.
  size_t declared = key == &dynamic_key ? bytes : state.shared_bytes + bytes;
  for (const SharedArray& array : block->shared) {
    declared += array.key == &dynamic_key ? 0 : array.bytes;
  }
  if (declared > state.shared_allowed) {
    fail("shared memory: " + std::to_string(declared) + " bytes, the kernel may have " +
         std::to_string(state.shared_allowed));
  }
  void* data = nullptr;
  if (posix_memalign(&data, 1024, bytes) != 0) fail("no memory for shared memory");
  std::memset(data, 0xff, bytes);
  // a page apart, so that an address beyond an array is in none; CUDA promises no dynamic one more
  // than 128 bytes of alignment
  uint64_t address = 0;
  for (const SharedArray& array : block->shared) {
    address = std::max(address, (array.address + array.bytes + 2047) / 1024 * 1024);
  }
  if (key == &dynamic_key) address += 128;
  block->shared.push_back({key, static_cast<char*>(data), bytes, name, address});
  return data;
}

uint64_t shared_address(const void* shared) {
  const char* at = static_cast<const char*>(shared);
  for (const SharedArray& array : state.current->block->shared) {
    if (at >= array.data && at < array.data + array.bytes) {
      return array.address + static_cast<uint64_t>(at - array.data);
    }
  }
  fail("shared_address: the address is not in this block's shared memory");
}

char* shared_at(const Block& block, uint64_t address, size_t bytes, const char* what) {
  for (const SharedArray& array : block.shared) {
    if (address < array.address || address + bytes > array.address + array.bytes) continue;
    return array.data + (address - array.address);
  }
  fail(std::string(what) + ": bytes " + std::to_string(address) + " to " +
       std::to_string(address + bytes) + " are in no array of the block's shared memory");
}

void* dynamic_shared() {
  if (state.shared_bytes == 0) fail("dynamic shared memory: the launch asked for none");
  return find_shared(&dynamic_key, state.shared_bytes, "dynamic shared memory");
}

void* peer_address(const void* shared, unsigned rank) {
  const Fiber& self = *state.current;
  const Cluster& cluster = *self.block->cluster;
  if (rank >= cluster.blocks.size()) {
    fail("map_shared_rank: rank " + std::to_string(rank) + " in a cluster of " +
         std::to_string(cluster.blocks.size()));
  }
  const char* address = static_cast<const char*>(shared);
  for (const SharedArray& mine : self.block->shared) {
    if (address < mine.data || address > mine.data + mine.bytes) continue;
    const Block& peer = *cluster.blocks[rank];
    for (const SharedArray& theirs : peer.shared) {
      if (theirs.key == mine.key) return theirs.data + (address - mine.data);
    }
    fail("map_shared_rank: block " + std::to_string(rank) + " of the cluster has " +
         (peer.alive == 0 ? "returned" : "not declared") + ", " + mine.name +
         " is not there: a cluster.sync is missing");
  }
  fail("map_shared_rank: the address is not in this block's shared memory");
}

void free_shared(Block* block) {
  Unseen quiet;
  for (const SharedArray& array : block->shared) {
    std::memset(array.data, 0xff, array.bytes);
    std::free(array.data);
  }
  block->shared.clear();
}

unsigned thread_rank() { return state.current->rank; }
unsigned cluster_rank() { return state.current->block->rank; }
unsigned cluster_blocks() {
  return static_cast<unsigned>(state.current->block->cluster->blocks.size());
}

}  // namespace sim
