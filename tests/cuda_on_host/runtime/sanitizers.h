// What AddressSanitizer and ThreadSanitizer must be told of fibers and of synchronisation. The
// runtime is built with -DSIM_ASAN or -DSIM_TSAN when the kernels are built with the sanitizer.
#pragma once

#include <cstddef>

#if defined(SIM_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* from, size_t size);
}
#endif
#if defined(SIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void __tsan_read_range(void* from, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace sim {

// Orders what came before a release of it ahead of what follows an acquire. The address matters.
struct Token {
  char at = 0;
  void release() {
#if defined(SIM_TSAN)
    __tsan_release(&at);
#endif
  }
  void acquire() {
#if defined(SIM_TSAN)
    __tsan_acquire(&at);
#endif
  }
};

// ThreadSanitizer sees malloc, free and memcpy even in code that it did not compile.
inline void ignore_accesses(bool on) {
#if defined(SIM_TSAN)
  if (on) {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  } else {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  (void)on;
#endif
}

// While it lives, the current fiber makes no accesses.
struct Unseen {
  Unseen() { ignore_accesses(true); }
  ~Unseen() { ignore_accesses(false); }
  Unseen(const Unseen&) = delete;
};

// Inside an Unseen: the current fiber's accesses count after all.
struct Seen {
  Seen() { ignore_accesses(false); }
  ~Seen() { ignore_accesses(true); }
  Seen(const Seen&) = delete;
};

}  // namespace sim
