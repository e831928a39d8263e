// With selftest/*.cpp and nvcc instead of the simulator: the same kernels, and so the device's
// branch of each primitive, on a GPU (tests/test_cuda_gpu.py). What kernels point to lies in
// vectors, so those are in memory that both sides see; CUDA_LAUNCH_BLOCKING=1 makes a launch wait.
#include <cuda_runtime.h>

#include <cstdlib>

void* operator new(std::size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, bytes + 1) != cudaSuccess) std::abort();
  return memory;
}
void operator delete(void*) noexcept {}  // the program ends soon
void operator delete(void*, std::size_t) noexcept {}

extern "C" void sim_set_order(int, unsigned long long) {}
extern "C" const char* sim_take_error() { return ""; }
