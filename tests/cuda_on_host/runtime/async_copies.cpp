// cp.async: a copy lands when its group is waited for, or, as the order wants it, as soon as it was
// made. Until then its place holds NaN: nobody may read it, and for ThreadSanitizer it is written.
#include <cstring>

#include "state.h"

namespace sim {
namespace {

void land(const AsyncCopy& copy) {
  Seen copying;
  std::memcpy(copy.to, copy.from, copy.bytes_there);
  std::memset(static_cast<char*>(copy.to) + copy.bytes_there, 0, copy.bytes - copy.bytes_there);
}

bool is_early() {
  return state.order == Order::kReverse || (state.order == Order::kRandom && state.random() % 2);
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, int bytes_there) {
  Unseen quiet;
  const auto aligned = [bytes](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
  };
  if (!aligned(shared) || !aligned(global)) {
    fail("copy_async: wanted addresses that are multiples of " + std::to_string(bytes));
  }
  Fiber* self = state.current;
  const AsyncCopy copy{shared, global, static_cast<size_t>(bytes), static_cast<size_t>(bytes_there),
                       self->group};
  if (is_early()) {
    land(copy);
    return;
  }
  {
    Seen writing;
    std::memset(shared, 0xff, copy.bytes);
  }
  self->copies.push_back(copy);
}

void copy_async_commit() { ++state.current->group; }

void copy_async_wait(int groups_left) {
  Unseen quiet;
  Fiber* self = state.current;
  while (!self->copies.empty() && self->copies.front().group < self->group - groups_left) {
    land(self->copies.front());
    self->copies.pop_front();
  }
}

}  // namespace sim
