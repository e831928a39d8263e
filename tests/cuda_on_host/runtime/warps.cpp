// Warp operations. The last lane of the mask to arrive computes every lane's result. Only
// __syncwarp() orders memory; a kernel that relies on a shuffle for that has a race.
#include <cstdio>
#include <cstring>

#include "state.h"

namespace sim {
namespace {

struct Lanes {
  Fiber* first;  // lane 0
  unsigned mask;
  bool has(int lane) const { return (mask >> lane & 1u) != 0; }
  Exchanged& operator[](int lane) const { return first[lane].lane; }
};

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

template <typename Finish>
uint64_t exchange(unsigned mask, const char* name, const Exchanged& mine, Finish finish) {
  Unseen quiet;
  Fiber* self = state.current;
  Warp& warp = self->block->warps[self->rank / 32];
  const unsigned lane = self->rank % 32;
  if ((mask >> lane & 1u) == 0) {
    fail(std::string("divergent warp: ") + place(*self) + " calls " + name +
         " with a mask that lacks it, " + hex(mask));
  }
  const size_t left = self->block->fibers.size() - (self->rank - lane);
  if (left < 32) mask &= (1u << left) - 1;  // a last warp that is not full
  if ((mask & ~warp.alive) != 0) {
    fail(std::string("divergent warp: ") + place(*self) + " waits in " + name +
         " for lanes that have returned, " + hex(mask & ~warp.alive));
  }
  WarpOperation& operation = warp.pending[mask];
  if (operation.arrived == 0) {
    operation.mask = mask;
    operation.name = name;
  } else if (std::strcmp(operation.name, name) != 0) {
    fail(std::string("divergent warp: ") + place(*self) + " calls " + name + ", others " +
         operation.name + " with the same mask");
  }
  operation.arrived |= 1u << lane;
  self->lane = mine;
  if (operation.arrived != mask) {
    wait({name});
    return self->lane.result;
  }
  warp.pending.erase(mask);
  Fiber* first = self - lane;
  finish(Lanes{first, mask});
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0 && &first[i] != self) wake(&first[i]);
  }
  return self->lane.result;
}

int source_lane(const Exchanged& e, Shuffle kind, int lane) {
  const int first = lane & ~(e.width - 1);
  switch (kind) {
    case Shuffle::kIndex:
      return first | (e.argument & (e.width - 1));
    case Shuffle::kXor: {
      const int from = lane ^ e.argument;
      return (from & ~(e.width - 1)) > first ? lane : from;
    }
    case Shuffle::kUp:
      return lane - e.argument >= first ? lane - e.argument : lane;
    default:
      return lane + e.argument < first + e.width ? lane + e.argument : lane;
  }
}

unsigned combine(Reduce kind, unsigned a, unsigned b) {
  switch (kind) {
    case Reduce::kAdd:
      return a + b;
    case Reduce::kMin:
      return b < a ? b : a;
    case Reduce::kMax:
      return a < b ? b : a;
    case Reduce::kAnd:
      return a & b;
    case Reduce::kOr:
      return a | b;
    case Reduce::kXor:
      return a ^ b;
    case Reduce::kMinSigned:
      return static_cast<int>(b) < static_cast<int>(a) ? b : a;
    default:
      return static_cast<int>(a) < static_cast<int>(b) ? b : a;
  }
}

}  // namespace

uint64_t warp_shuffle(unsigned mask, uint64_t value, Shuffle kind, int argument, int width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync",
                                      "__shfl_down_sync"};
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("a shuffle's width must be a power of two up to 32, got " + std::to_string(width));
  }
  return exchange(mask, names[static_cast<int>(kind)], {value, 0, argument, width},
                  [kind](const Lanes& lanes) {
                    for (int i = 0; i < 32; ++i) {
                      if (!lanes.has(i)) continue;
                      const int from = source_lane(lanes[i], kind, i);
                      if (!lanes.has(from)) {
                        fail("a shuffle reads lane " + std::to_string(from) +
                             ", which is not in its mask " + hex(lanes.mask));
                      }
                      lanes[i].result = lanes[from].value;
                    }
                  });
}

unsigned warp_ballot(unsigned mask, bool predicate) {
  return static_cast<unsigned>(
      exchange(mask, "__ballot_sync", {predicate, 0, 0, 32}, [](const Lanes& lanes) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (lanes.has(i) && lanes[i].value ? 1u : 0u) << i;
        for (int i = 0; i < 32; ++i) {
          if (lanes.has(i)) lanes[i].result = bits;
        }
      }));
}

unsigned warp_reduce(unsigned mask, unsigned value, Reduce kind) {
  return static_cast<unsigned>(
      exchange(mask, "__reduce_sync", {value, 0, 0, 32}, [kind](const Lanes& lanes) {
        bool first = true;
        unsigned total = 0;
        for (int i = 0; i < 32; ++i) {
          if (!lanes.has(i)) continue;
          const unsigned v = static_cast<unsigned>(lanes[i].value);
          total = first ? v : combine(kind, total, v);
          first = false;
        }
        for (int i = 0; i < 32; ++i) {
          if (lanes.has(i)) lanes[i].result = total;
        }
      }));
}

void warp_barrier(unsigned mask) {
  Unseen quiet;
  Fiber* self = state.current;
  Barrier& barrier = self->block->warps[self->rank / 32].barriers[mask];
  Token& token = barrier.tokens[barrier.phase & 1];
  token.release();
  exchange(mask, "__syncwarp", {}, [&barrier](const Lanes&) { ++barrier.phase; });
  token.acquire();
}

void collect(const char* name, uint64_t value, const std::function<void(const uint64_t*)>& finish) {
  exchange(~0u, name, {value, 0, 0, 32}, [&](const Lanes& lanes) {
    if (lanes.mask != ~0u) fail(std::string(name) + ": wanted a whole warp");
    uint64_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = lanes[i].value;
    finish(values);
  });
}

unsigned active_lanes() { return state.current->block->warps[state.current->rank / 32].alive; }

}  // namespace sim
