// What GCC's headers take from newer C++ and C libraries, for machines that have older ones:
// defined here, it is not looked for there. Linux with glibc 2.28 (manylinux_2_28) has
// GLIBCXX_3.4.25.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)

// Headers that know of these symbols are included above: defined under other names.
#define FUSEDRES_NAMED(name) asm(name) __attribute__((visibility("hidden"), used))

extern "C" {

// GLIBCXX_3.4.26: the constructors without arguments
void fusedres_ostringstream(void* at)
    FUSEDRES_NAMED("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void fusedres_ostringstream(void* at) { new (at) std::ostringstream(std::ios_base::out); }

void fusedres_stringstream(void* at)
    FUSEDRES_NAMED("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void fusedres_stringstream(void* at) {
  new (at) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// GLIBCXX_3.4.29
[[noreturn]] void fusedres_bad_array_new_length()
    FUSEDRES_NAMED("_ZSt28__throw_bad_array_new_lengthv");
void fusedres_bad_array_new_length() { throw std::bad_array_new_length(); }

// GLIBC_2.32: whether reference counts may do without atomic operations. Without it they did not.
extern char fusedres_single_threaded FUSEDRES_NAMED("__libc_single_threaded");
char fusedres_single_threaded = 0;
}

#endif
