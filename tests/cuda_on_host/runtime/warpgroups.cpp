// wgmma: products that run as late as the program allows, when a warpgroup waits for them. Until
// then the accumulators are poisoned and the operands are in use.
#include <algorithm>
#include <cstring>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"
#include "../include/sim/hopper.h"
#include "descriptors.h"
#include "state.h"

namespace sim {
namespace {

constexpr int kLanes = 128;
constexpr int kRows = 64;
constexpr int kDepth = 16;

struct Product {
  uint64_t a, b;  // a: 0 in registers
  int columns;
  bool adds, bfloat16;
  bool operator==(const Product& o) const {
    return a == o.a && b == o.b && columns == o.columns && adds == o.adds && bfloat16 == o.bfloat16;
  }
};

// The accumulator of a lane while products use it.
struct Held {
  std::vector<float> sums;
  size_t last;  // the product that is to finish it
};

struct Started {
  Product product;
  size_t number, group;
  int issued = 0;
  std::vector<float>* sums[kLanes];  // of each lane
  uint32_t words[kLanes][4];         // a in registers
};

struct Lane {
  size_t products = 0, groups = 0;  // that it has started, committed
  bool fenced = false;
  std::map<float*, Held> held;
};

}  // namespace

struct Warpgroup {
  std::deque<Started> running;
  Lane lanes[kLanes];
  Barrier waiting;
};

namespace {

constexpr uint32_t kPoison = ~0u;  // a NaN

Warpgroup& own(const char* what, Lane** lane) {
  const Fiber& self = *state.current;
  const unsigned first = self.rank / kLanes * kLanes;
  if (first + kLanes > self.block->fibers.size()) {
    fail(std::string(what) + ": wanted a warpgroup, 128 threads");
  }
  std::shared_ptr<Warpgroup>& group = self.block->warpgroups[first];
  if (group == nullptr) group = std::make_shared<Warpgroup>();
  *lane = &group->lanes[self.rank % kLanes];
  return *group;
}

// f(host address of 16 bytes, row, half) for an operand.
template <typename F>
void for_chunks(const Block& block, uint64_t bits, int rows, F f) {
  const Operand operand(bits);
  for (int row = 0; row < rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      f(shared_at(block, operand.address(row, half), 16, "wgmma"), row, half);
    }
  }
}

void check_operand(const Block& block, uint64_t bits, int rows) {
  const Operand operand(bits);
  if (operand.swizzle != 1 || operand.base != 0) {
    fail("wgmma: the simulator knows descriptors with the swizzle of 128 bytes and no base offset");
  }
  if (operand.start % 1024 >= 128) {
    fail("wgmma: wanted an operand that starts in the first row of a swizzle's 1024 bytes");
  }
  for_chunks(block, bits, rows, [&](const char* at, int, int) { check_no_copy_to(block, at, 16); });
}

float half_of(const char* at, bool bfloat16) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

std::vector<float> values_of(const Block& block, uint64_t bits, int rows, bool bfloat16) {
  std::vector<float> values(static_cast<size_t>(rows) * kDepth);
  for_chunks(block, bits, rows, [&](const char* at, int row, int half) {
    for (int i = 0; i < 8; ++i) {
      values[row * kDepth + half * 8 + i] = half_of(at + 2 * i, bfloat16);
    }
  });
  return values;
}

// From the lanes' words, as for mma.m16n8k16 in each warp.
std::vector<float> values_in_registers(const Started& s) {
  std::vector<float> values(static_cast<size_t>(kRows) * kDepth);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8;
      const char* words = reinterpret_cast<const char*>(s.words[lane]);
      values[row * kDepth + i / 4 * 8 + lane % 4 * 2 + i % 2] =
          half_of(words + 2 * i, s.product.bfloat16);
    }
  }
  return values;
}

// PTX ISA, wgmma, "Register Fragments": warp w has rows 16 * w to 16 * w + 15, as of an mma.
void multiply(const Block& block, const Started& s) {
  const Product& p = s.product;
  const std::vector<float> a =
      p.a == 0 ? values_in_registers(s) : values_of(block, p.a, kRows, p.bfloat16);
  const std::vector<float> b = values_of(block, p.b, p.columns, p.bfloat16);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = p.adds ? (*s.sums[lane])[i] : 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += a[row * kDepth + k] * b[column * kDepth + k];
      (*s.sums[lane])[i] = sum;
    }
  }
}

// The last thread that waits runs the groups before `end`.
void run_groups(Warpgroup* group, size_t end) {
  while (!group->running.empty() && group->running.front().group < end) {
    const Started& next = group->running.front();
    if (next.issued != kLanes) fail("wgmma: some threads of the warpgroup did not start a product");
    multiply(*state.current->block, next);
    group->running.pop_front();
  }
}

// For ThreadSanitizer a warp's first lane reads the operands: its own rows of a, all of b.
void note_reads(const Block& block, const Started& s) {
#if defined(SIM_TSAN)
  const unsigned warp = state.current->rank % kLanes / 32;
  if (state.current->rank % 32 != 0) return;
  const auto note = [](const char* at) {
    Seen reading;
    __tsan_read_range(const_cast<char*>(at), 16);
  };
  for_chunks(block, s.product.a, s.product.a == 0 ? 0 : kRows, [&](const char* at, int row, int) {
    if (static_cast<unsigned>(row) / 16 == warp) note(at);
  });
  for_chunks(block, s.product.b, s.product.columns, [&](const char* at, int, int) { note(at); });
#else
  (void)block, (void)s;
#endif
}

// Gives a lane the sums that are finished. What it wrote in the meantime is lost on a GPU.
void deliver(Lane* lane, size_t finished) {
  for (auto at = lane->held.begin(); at != lane->held.end();) {
    const auto& [d, held] = *at;
    if (held.last >= finished) {
      ++at;
      continue;
    }
    for (size_t i = 0; i < held.sums.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &d[i], sizeof bits);
      if (bits != kPoison)
        fail("wgmma: " + place(*state.current) + " wrote to an accumulator in use");
      d[i] = held.sums[i];
    }
    at = lane->held.erase(at);
  }
}

}  // namespace

void wgmma_fence() {
  Unseen quiet;
  Lane* lane;
  own("wgmma_fence", &lane);
  lane->fenced = true;
}

namespace {

void start(float* d, const Product& product, const uint32_t* words) {
  Unseen quiet;
  Lane* lane;
  Warpgroup& group = own("wgmma", &lane);
  const Block& block = *state.current->block;
  if (!lane->fenced)
    fail("wgmma: " + place(*state.current) + " has not called wgmma_fence in this group");
  const size_t number = lane->products++;
  auto found = std::find_if(group.running.begin(), group.running.end(),
                            [&](const Started& s) { return s.number == number; });
  if (found == group.running.end()) {
    if (words == nullptr) check_operand(block, product.a, kRows);
    check_operand(block, product.b, product.columns);
    group.running.push_back({product, number, lane->groups, 0, {}, {}});
    found = group.running.end() - 1;
  }
  if (!(found->product == product) || found->group != lane->groups) {
    fail("wgmma: " + place(*state.current) + " starts another product than its warpgroup");
  }
  const auto [at, is_new] = lane->held.try_emplace(d);
  if (is_new) {
    at->second.sums.assign(d, d + product.columns / 2);
    std::memset(d, 0xff, sizeof(float) * product.columns / 2);
  }
  at->second.last = number;
  found->sums[state.current->rank % kLanes] = &at->second.sums;
  if (words != nullptr) {
    std::copy(words, words + 4, found->words[state.current->rank % kLanes]);
  }
  ++found->issued;
}

}  // namespace

void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool adds, bool bfloat16) {
  start(d, {a, b, columns, adds, bfloat16}, nullptr);
}

void wgmma(float* d, int columns, const uint32_t (&a)[4], uint64_t b, bool adds, bool bfloat16) {
  start(d, {0, b, columns, adds, bfloat16}, a);
}

void wgmma_commit() {
  Unseen quiet;
  Lane* lane;
  own("wgmma_commit", &lane);
  ++lane->groups;
  lane->fenced = false;
}

void wgmma_wait(int pending) {
  Unseen quiet;
  Lane* lane;
  Warpgroup& group = own("wgmma_wait", &lane);
  const Block& block = *state.current->block;
  const size_t groups = lane->groups;
  const size_t kept = static_cast<size_t>(pending);
  const size_t done = groups > kept ? groups - kept : 0;  // groups that must be
  size_t finished = 0;                                    // products
  for (const Started& s : group.running) {
    if (s.group >= done) continue;
    finished = s.number + 1;
    note_reads(block, s);
  }
  if (group.waiting.waiting.size() + 1 == kLanes) {
    for (int i = 0; i < 2; ++i) {  // behind all that can run now, whatever the order
      wake(state.current);
      wait({"wgmma_wait"});
    }
    run_groups(&group, done);
  }
  // no barrier for memory: only what a warp itself waited for is ordered
  meet(&group.waiting, kLanes, {"wgmma_wait", nullptr, pending}, false);
  deliver(lane, finished);
}

// Called by who starts a copy.
void check_not_multiplied(const Block& block, const char* from, size_t bytes) {
  for (const auto& [first, group] : block.warpgroups) {
    for (const Started& s : group->running) {
      const auto check = [&](const char* at, int, int) {
        if (at + 16 <= from || from + bytes <= at) return;
        fail("a copy overwrites shared memory that a wgmma still reads");
      };
      for_chunks(block, s.product.a, s.product.a == 0 ? 0 : kRows, check);
      for_chunks(block, s.product.b, s.product.columns, check);
    }
  }
}

}  // namespace sim
