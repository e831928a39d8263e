// selftest CASE [forward|reverse|random [SEED]]: runs one of the simulator's own kernels, right or
// with a planted bug. Exits with 0: right values; 1: wrong values; 2: the simulator stopped it.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cases.h"

extern "C" void sim_set_order(int order, unsigned long long seed);
extern "C" const char* sim_take_error();

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  const std::string order = argc > 2 ? argv[2] : "forward";
  const int number = order == "forward" ? 0 : order == "reverse" ? 1 : 2;
  sim_set_order(number, argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  for (const Case& c : all_cases()) {
    if (wanted != c.name) continue;
    bool right = false;
    const cudaError_t error = c.run(&right);
    if (error != cudaSuccess) {
      std::printf("stopped: %s; %s\n", cudaGetErrorString(error), sim_take_error());
      return 2;
    }
    std::puts(right ? "right" : "wrong values");
    return right ? 0 : 1;
  }
  for (const Case& c : all_cases()) std::puts(c.name);
  return 64;
}
