// Fibers: stacks, and the switch between them.
#include <sys/mman.h>

#include "state.h"

// Saves the registers that a call preserves on the stack, the stack pointer in *from, and goes on
// with those of the other stack.
extern "C" void sim_switch_stacks(void** from, void* to);
#if defined(__x86_64__)
__asm__(R"(
.text
.globl sim_switch_stacks
.hidden sim_switch_stacks
.type sim_switch_stacks, @function
sim_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl sim_switch_stacks
.hidden sim_switch_stacks
.type sim_switch_stacks, %function
sim_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the simulator knows x86-64 and AArch64"
#endif

namespace sim {
namespace {

#if defined(SIM_ASAN) || defined(SIM_TSAN)
constexpr size_t kStack = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGuard = 4096;

std::vector<char*> stacks;
#if defined(SIM_TSAN)
std::deque<Token> stack_tokens;
// TSan's fibers are dear to make. One is not used again in a launch: two blocks that race would
// look like one thread. Launches are ordered, so between them that hides nothing. TSan has room for
// about 8000 in all.
std::vector<void*> idle_fibers, used_fibers;
constexpr size_t kUsedFibers = 4000;

void* new_fiber() {
  if (idle_fibers.empty()) return __tsan_create_fiber(0);
  void* fiber = idle_fibers.back();
  idle_fibers.pop_back();
  return fiber;
}
#endif

#if defined(SIM_ASAN)
const void* scheduler_bottom;
size_t scheduler_size;
#endif

char* stack_of(size_t slot) {
  while (stacks.size() <= slot) {
    void* p = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) return nullptr;
    stacks.push_back(static_cast<char*>(p) + kGuard);
#if defined(SIM_TSAN)
    stack_tokens.emplace_back();
#endif
  }
  return stacks[slot];
}

void switch_contexts(Context* from, Context* to, bool for_good) {
#if defined(SIM_ASAN)
  const bool to_scheduler = to->stack == nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from->fake_stack,
                                 to_scheduler ? scheduler_bottom : to->stack,
                                 to_scheduler ? scheduler_size : kStack);
#endif
#if defined(SIM_TSAN)
  constexpr unsigned kNoSynchronisation = 1;
  if (from->stack == nullptr) from->tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to->tsan, kNoSynchronisation);
#endif
  (void)for_good;
  sim_switch_stacks(&from->stack_pointer, to->stack_pointer);
#if defined(SIM_ASAN)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from->fake_stack, &bottom, &size);
  if (from->stack != nullptr) {  // every fiber is resumed by the scheduler
    scheduler_bottom = bottom;
    scheduler_size = size;
  }
#endif
}

// ThreadSanitizer knows nothing of stacks that are used again: the next owner follows the last.
void own_stack(void (Token::*step)()) {
#if defined(SIM_TSAN)
  (stack_tokens[state.current->context.slot].*step)();
#else
  (void)step;
#endif
}

// Where a fiber begins.
void fiber_main() {
#if defined(SIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  state.started.acquire();
  own_stack(&Token::acquire);
  state.thread();
  own_stack(&Token::release);
  state.finished.release();
  Fiber* self = state.current;
  {
    Unseen quiet;
    self->done = true;
    --self->block->alive;
    self->block->warps[self->rank / 32].alive &= ~(1u << self->rank % 32);
    check_no_one_waits_for(*self);
  }
  state.current = nullptr;
  switch_contexts(&self->context, &state.scheduler, true);
  __builtin_trap();
}

}  // namespace

void start_fiber(Fiber* fiber, size_t slot) {
  Context& context = fiber->context;
  context.slot = slot;
  context.stack = stack_of(slot);
  if (context.stack == nullptr) {
    note_error("no memory for the stacks of so many threads");
    return;
  }
  void** top = reinterpret_cast<void**>(context.stack + kStack);
#if defined(SIM_ASAN)
  __asan_unpoison_memory_region(context.stack, kStack);
#endif
#if defined(__x86_64__)
  *--top = nullptr;  // no caller; and the ABI's alignment at a function's entry
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  top -= 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(fiber_main);  // x30
#endif
  context.stack_pointer = top;
#if defined(SIM_TSAN)
  context.tsan = new_fiber();
#endif
}

void finish_fiber(Fiber* fiber) {
#if defined(SIM_TSAN)
  if (fiber->context.tsan != nullptr) used_fibers.push_back(fiber->context.tsan);
  if (used_fibers.size() >= kUsedFibers) free_used_fibers();
#endif
  fiber->context = {};
}

void free_used_fibers() {
#if defined(SIM_TSAN)
  idle_fibers.insert(idle_fibers.end(), used_fibers.begin(), used_fibers.end());
  used_fibers.clear();
#endif
}

void resume(Fiber* fiber) {
  state.current = fiber;
  threadIdx = fiber->index;
  blockIdx = fiber->block->index;
  switch_contexts(&state.scheduler, &fiber->context, false);
}

void leave() {
  Fiber* self = state.current;
  state.current = nullptr;
  switch_contexts(&self->context, &state.scheduler, false);
}

}  // namespace sim
