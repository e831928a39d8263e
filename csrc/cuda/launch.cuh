// Launches, and the contract between the CUDA kernels and whoever calls them.
//
// csrc/cuda/<op>.cuh holds an op's kernels. It includes no torch header, so that nvcc, and g++ with
// the host simulator of tests/cuda_on_host/, compile the same text. It offers
//
//   struct <Op>Params;                                         forward and backward, raw pointers
//   int64_t <op>_<forward|backward>_workspace(const <Op>Params&);   bytes; absent if none is needed
//   cudaError_t launch_<op>_<forward|backward>(const <Op>Params&, cudaStream_t);
//
// in namespace fusedres::cuda. The struct is plain data: pointers, int64_t, int, double, bool, Act,
// Gate, Dtype. An op's forward and backward share it; a pointer that a direction does not use is
// null. What every op means by it:
//
//   dtype          of all activation tensors; acc_t is double for kFloat64, else float
//   planar         memory order: true NCHW (planes), false NHWC. One of hw == 1 is given as NHWC
//   n, c, hw       sizes; hw is the product of all dimensions behind the channel
//   activations    dense, in that order, at any address that their dtype allows
//   parameters     weight, bias, mean, ..., row_scale: acc_t, contiguous (the caller converts)
//   mask           uint8 [rows, ceil(cols / 8)] as in fusedres/layout.py; null where there is none
//   workspace      at least as many bytes as <op>_..._workspace says, 256-byte aligned (as the
//                  caching allocator's are); the content does not matter before or after
//   results        every element is written; none may overlap an input
//   variant        of an op that has several implementations: 0 lets shape and device choose
//
// The caller checks arguments, allocates, sets the device, and returns early on empty tensors. A
// launch allocates nothing and does not synchronise, so it can be captured in a CUDA graph; it
// returns the first error of its launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../bn_math.h"
#include "../dtype.h"
#include "launched.h"
#include "prim.cuh"

namespace fusedres {
namespace cuda {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 0x7fffffff;  // CUDA C++ guide, technical specifications: gridDim.x

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct LaunchShape {
  int64_t blocks;
  int threads = kThreads;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;
  bool cooperative = false;
  int64_t blocks_y = 1;
};

// Lets a kernel have `bytes` of dynamic shared memory. By default a block has 48 KiB, its static
// arrays included. The limit is the kernel's on this device, whoever launches it: it goes to the
// most that the device has, at once, so that no thread lowers what another is about to use.
inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  cudaFuncAttributes has{};
  cudaError_t error = cudaFuncGetAttributes(&has, kernel);
  if (error != cudaSuccess || bytes <= has.maxDynamicSharedSizeBytes) return error;
  int device = 0, most = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(has.sharedSizeBytes));
}

// A shape as the runtime takes it.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
    value.gridDim =
        dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y));
    value.blockDim = dim3(static_cast<unsigned>(shape.threads));
    value.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    value.stream = stream;
    value.attrs = attributes_;
    if (shape.cluster > 1) {
      cudaLaunchAttribute* const cluster = &attributes_[value.numAttrs++];
      cluster->id = cudaLaunchAttributeClusterDimension;
      cluster->val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      cudaLaunchAttribute* const cooperative = &attributes_[value.numAttrs++];
      cooperative->id = cudaLaunchAttributeCooperative;
      cooperative->val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // the config points into it
  cudaLaunchConfig_t value{};

 private:
  cudaLaunchAttribute attributes_[2];
};

// Starts kernel(args...).
template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Args... args) {
  if (shape.blocks > kMaxGrid || shape.blocks_y > 65535) return cudaErrorInvalidConfiguration;
  const cudaError_t refused =
      allow_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  if (refused != cudaSuccess) return refused;
  const LaunchConfig config(shape, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config.value, kernel, args...);
  if (error == cudaSuccess) ++launched_by_thread;
  return error;
}

// What the heuristics of the launches need to know of the current device.
struct Device {
  int sms = 0;
  int shared_bytes = 0;  // the most that a block can ask for
  int major = 0;         // compute capability; clusters exist from 9 on
  bool cooperative = false;
};

inline cudaError_t read_device(Device* out) {
  int device = 0;
  int cooperative = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  read(&out->sms, cudaDevAttrMultiProcessorCount);
  read(&out->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&out->major, cudaDevAttrComputeCapabilityMajor);
  read(&cooperative, cudaDevAttrCooperativeLaunch);
  out->cooperative = cooperative != 0;
  return error;
}

// How many blocks of kThreads threads the device runs at once: all of a cooperative launch must be.
inline cudaError_t resident_blocks(const void* kernel, int64_t shared_bytes, const Device& device,
                                   int64_t* blocks) {
  int of_sm = 0;
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_sm, kernel, kThreads,
                                                          static_cast<size_t>(shared_bytes));
  }
  *blocks = static_cast<int64_t>(of_sm) * device.sms;
  return error;
}

// Whether the device can run a cluster of this shape: its blocks go to SMs of one neighbourhood, of
// which a part of a GPU (MIG) may have fewer.
inline cudaError_t can_run_cluster(const void* kernel, const LaunchShape& shape, bool* can) {
  int clusters = 0;
  cudaError_t error = allow_shared(kernel, shape.shared_bytes);
  if (error == cudaSuccess) {
    const LaunchConfig config(shape, nullptr);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.value);
  }
  if (error == cudaErrorInvalidClusterSize) {
    error = cudaSuccess;
    cudaGetLastError();  // or the next caller of CUDA would be told of it
  }
  *can = clusters > 0;
  return error;
}

// Hands out parts of a workspace; of none, to count what is needed.
class Workspace {
 public:
  explicit Workspace(void* at) : at_(static_cast<char*>(at)) {}
  void* take(int64_t bytes) {
    void* const part = at_ == nullptr ? nullptr : at_ + used_;
    used_ += cdiv(bytes, 256) * 256;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* at_;
  int64_t used_ = 0;
};

// Calls function<scalar_t>(...) for the scalar type of a Dtype; BY_HALF has those of 16 bits only.
//
// FUSEDRES_INSTANCES(extern template, function, Params) says, behind the definition of a pass that
// several ops launch, that it is compiled elsewhere: in the .cu that says the same with `template`.
// Without it every op's object holds all its kernels again.
#if defined(FUSEDRES_FEW_DTYPES)  // sanitizers of the host simulator: two types stand for all
#define FUSEDRES_BY_DTYPE(dtype, function, ...)                   \
  ((dtype) == ::fusedres::kFloat32 ? function<float>(__VA_ARGS__) \
                                   : function<__nv_bfloat16>(__VA_ARGS__))
#define FUSEDRES_BY_HALF(dtype, function, ...) \
  ((dtype) == ::fusedres::kBFloat16 ? function<__nv_bfloat16>(__VA_ARGS__) : cudaErrorNotSupported)
#define FUSEDRES_INSTANCES(kind, function, Params)               \
  kind cudaError_t function<float>(const Params&, cudaStream_t); \
  kind cudaError_t function<__nv_bfloat16>(const Params&, cudaStream_t)
#else
#define FUSEDRES_BY_HALF(dtype, function, ...)                              \
  ((dtype) == ::fusedres::kBFloat16  ? function<__nv_bfloat16>(__VA_ARGS__) \
   : (dtype) == ::fusedres::kFloat16 ? function<__half>(__VA_ARGS__)        \
                                     : cudaErrorNotSupported)
#define FUSEDRES_BY_DTYPE(dtype, function, ...)                              \
  ((dtype) == ::fusedres::kFloat32    ? function<float>(__VA_ARGS__)         \
   : (dtype) == ::fusedres::kBFloat16 ? function<__nv_bfloat16>(__VA_ARGS__) \
   : (dtype) == ::fusedres::kFloat16  ? function<__half>(__VA_ARGS__)        \
                                      : function<double>(__VA_ARGS__))
#define FUSEDRES_INSTANCES(kind, function, Params)                       \
  kind cudaError_t function<float>(const Params&, cudaStream_t);         \
  kind cudaError_t function<__nv_bfloat16>(const Params&, cudaStream_t); \
  kind cudaError_t function<__half>(const Params&, cudaStream_t);        \
  kind cudaError_t function<double>(const Params&, cudaStream_t)
#endif

}  // namespace cuda
}  // namespace fusedres
