// mbarriers, and the bulk copies that complete on them.
#include <algorithm>
#include <cstring>

#include "../include/sim/hopper.h"
#include "state.h"

namespace sim {
namespace {

Mbarrier* find(uint64_t* barrier, const char* what) {
  auto& known = state.current->block->mbarriers;
  const auto found = known.find(barrier);
  if (found == known.end()) fail(std::string(what) + ": the mbarrier is not initialised");
  return &found->second;
}

void end_phase_if_complete(Mbarrier* m) {
  if (m->pending != 0 || m->bytes != 0) return;
  m->pending = m->arrivals;
  m->phase ^= 1;
  for (Fiber* fiber : m->waiting) wake(fiber);
  m->waiting.clear();
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int arrivals) {
  Unseen quiet;
  if (arrivals < 1) fail("mbarrier_init: wanted at least one arrival");
  state.current->block->mbarriers[barrier] = {};
  Mbarrier& m = state.current->block->mbarriers[barrier];
  m.arrivals = m.pending = arrivals;
}

void mbarrier_arrive(uint64_t* barrier, int expected_bytes) {
  Unseen quiet;
  Mbarrier* m = find(barrier, "mbarrier_arrive");
  if (m->pending == 0) fail("mbarrier: more arrivals than expected in one phase");
  m->tokens[m->phase].release();
  m->bytes += expected_bytes;
  --m->pending;
  end_phase_if_complete(m);
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  Unseen quiet;
  Mbarrier* m = find(barrier, "mbarrier_wait");
  while (m->phase == parity) {
    m->waiting.push_back(state.current);
    wait({"mbarrier_wait"});
  }
  m->tokens[parity].acquire();
}

void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  Unseen quiet;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (bytes <= 0 || bytes % 16 != 0 || !aligned(shared) || !aligned(global)) {
    fail("bulk_copy: wanted addresses and a size that are multiples of 16 bytes");
  }
  start_copy(static_cast<char*>(shared), static_cast<size_t>(bytes), barrier, [=] {
    Seen copying;
    std::memcpy(shared, global, static_cast<size_t>(bytes));
  });
}

// From now until it lands, what is there is undefined.
void start_copy(char* to, size_t bytes, uint64_t* barrier, std::function<void()> write) {
  Block* block = state.current->block;
  find(barrier, "a copy");
  check_not_multiplied(*block, to, bytes);
  shared_at(*block, shared_address(to), bytes, "a copy");
  std::memset(to, 0xff, bytes);
  state.copies.push_back({to, bytes, std::move(write), block, barrier, std::make_unique<Token>()});
  state.copies.back().issued->release();
  if (state.order != Order::kReverse) return;
  wake(state.current);  // behind the copy: the scheduler lands it first
  wait({"a copy"});
}

void check_no_copy_to(const Block& block, const char* from, size_t bytes) {
  for (const BulkCopy& copy : state.copies) {
    if (copy.block != &block || from + bytes <= copy.to || copy.to + copy.bytes <= from) continue;
    fail("wgmma reads shared memory that a copy has yet to fill");
  }
}

// Called by the scheduler; for ThreadSanitizer the copy is an access of the scheduler's.
bool land_a_copy() {
  if (state.copies.empty()) return false;
  const BulkCopy copy = std::move(state.copies.front());
  state.copies.pop_front();
  Mbarrier& m = copy.block->mbarriers[copy.barrier];
  copy.issued->acquire();
  copy.write();
  m.tokens[m.phase].release();
  m.bytes -= static_cast<int>(copy.bytes);
  end_phase_if_complete(&m);
  return true;
}

}  // namespace sim
