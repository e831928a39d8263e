#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fusedres {
namespace {

const KernelTable* choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  int level = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    level = 1;
#if !defined(FUSEDRES_NO_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      level = 2;
    }
#endif
  }
#if defined(FUSEDRES_NO_AVX512)
  const KernelTable* const tables[] = {&portable::kTable, &avx2::kTable};
#else
  const KernelTable* const tables[] = {&portable::kTable, &avx2::kTable, &avx512::kTable};
#endif
  const char* const names[] = {"portable", "avx2", "avx512"};
  if (const char* wanted = std::getenv("FUSEDRES_CPU_ISA")) {
    for (int i = 0; i < level; ++i) {
      if (std::strcmp(wanted, names[i]) == 0) level = i;
    }
  }
  return tables[level];
#else
  return &portable::kTable;
#endif
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* const table = choose();
  return *table;
}

}  // namespace fusedres
