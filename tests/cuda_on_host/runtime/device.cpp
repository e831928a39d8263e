// The device that the simulator is: its attributes, and what tests set.
#include <algorithm>

#include "state.h"

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = sim::state.sms;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = sim::state.major;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = sim::state.shared_limit;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const auto limit = sim::state.shared_limits.find(kernel);
  *attributes = {0, limit == sim::state.shared_limits.end() ? 0 : limit->second};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > sim::state.shared_limit) return cudaErrorInvalidValue;
  sim::state.shared_limits[kernel] = value;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    default:
      return "unknown error";
  }
}

// By threads and shared memory, and what a test says of the registers: a host compiler counts none.
cudaError_t occupancy_of(int* blocks, const void*, int threads, size_t shared_bytes) {
  if (threads < 1) return cudaErrorInvalidValue;
  const int by_threads = std::min(2048, 256 * sim::state.blocks_of_sm) / threads;
  const int each = static_cast<int>(shared_bytes) + 1024;  // the system's share of every block
  *blocks = std::min(by_threads, (sim::state.shared_limit + 1024) / each);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }  // no call of the simulator sets one

extern "C" {

void sim_set_order(int order, unsigned long long seed) {
  sim::state.order = static_cast<sim::Order>(order);
  sim::state.random.seed(seed);
}

void sim_set_device(int sms, int shared_limit, int major, int blocks_of_sm, int cluster_sms) {
  sim::state.sms = sms;
  sim::state.shared_limit = shared_limit;
  sim::state.major = major;
  sim::state.blocks_of_sm = blocks_of_sm;
  sim::state.cluster_sms = cluster_sms;
}

const char* sim_error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// The launches since the last call, a line each: kernel, blocks of a cluster.
const char* sim_take_launched() {
  static std::string taken;
  taken.swap(sim::state.launched);
  sim::state.launched.clear();
  return taken.c_str();
}

// What ended the last launch, or an empty string; forgotten once read.
const char* sim_take_error() {
  static std::string taken;
  taken.swap(sim::state.error);
  sim::state.error.clear();
  return taken.c_str();
}
}
