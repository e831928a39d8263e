// What the host side of every CUDA operator shares: the device and stream that a launch goes to,
// parameters in the accumulator's type, scratch memory, and what becomes of a launch.
//
// tests/cuda_on_host/ compiles this for its simulator too, whose device memory is the CPU's.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "../view.h"
#include "launch.cuh"

#if !defined(FUSEDRES_CUDA_ON_HOST)
// In libtorch_cuda.so, which a torch for CPUs lacks: null there, and then never called.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace fusedres {
namespace cuda {

#if defined(FUSEDRES_CUDA_ON_HOST)
constexpr int32_t kHere = kCpu;
#else
constexpr int32_t kHere = kAnyCuda;
#endif

// While it lives, x's device is the current one; stream() is torch's current stream there.
class OnDevice {
 public:
#if defined(FUSEDRES_CUDA_ON_HOST)
  explicit OnDevice(const View&) {}
#else
  explicit OnDevice(const View& v) : guard_(v.device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(v.device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#if !defined(FUSEDRES_CUDA_ON_HOST)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// A parameter as contiguous acc_t: the tensor's own memory where it is that already, else a copy.
// It has to live until the launch that reads it has been started.
class Parameter {
 public:
  Parameter(const View& v, const char* name, const OptTensor& t, const std::vector<int64_t>& shape)
      : tensor_(t) {
    if (!t.has_value()) return;
    check_shape(v.op, name, *t, shape, v.device);
    checked_dtype(v.op, name, *t);
    const ScalarType acc = v.dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
    if (t->scalar_type() != acc) tensor_ = torch::stable::to(*tensor_, acc);
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
  }
  const void* data() const { return tensor_.has_value() ? tensor_->const_data_ptr() : nullptr; }
  void copy_or_zero(Tensor* to) const {
    if (tensor_.has_value()) {
      torch::stable::copy_(*to, *tensor_);
    } else {
      torch::stable::zero_(*to);
    }
  }

 private:
  OptTensor tensor_;
};

// Scratch memory beside x; freed for later launches on the same stream.
inline Tensor new_workspace(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
}

inline void* data_or_null(const Tensor& t) {
  return t.numel() == 0 ? nullptr : t.mutable_data_ptr();
}

// Results of an empty tensor: sums over nothing.
template <typename... Ts>
void zero_all(Ts&... tensors) {
  (torch::stable::zero_(tensors), ...);
}

// What the forward saved, [N, cols] acc_t: read in place.
inline void* saved_data(const View& v, const char* name, const Tensor& t, int64_t cols) {
  check_shape(v.op, name, t, {v.n, cols}, v.device);
  const ScalarType acc = v.dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.scalar_type() == acc && t.is_contiguous(), v.op, ": ", name,
                  " must be as the forward returned it: contiguous ",
                  torch::headeronly::toString(acc));
  return t.numel() == 0 ? nullptr : t.mutable_data_ptr();
}

inline void check_statistics(const View& v, const OptTensor& mean, const OptTensor& var,
                             bool batch_stats) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), v.op,
                  ": mean and var must be given together");
  STD_TORCH_CHECK(mean.has_value() || batch_stats, v.op,
                  ": mean and var are required unless batch_stats is true");
}

// The members that the params of all ops on activations have.
template <typename Params>
Params params_of(const View& v) {
  Params p{};
  p.dtype = v.dtype;
  p.planar = v.planar;
  p.n = v.n;
  p.c = v.c;
  p.hw = v.hw;
  return p;
}

// Squeezed channels R of the MLP's first weight [R, C].
inline int64_t squeezed_channels(const View& v, const Tensor& w1) {
  STD_TORCH_CHECK(w1.dim() == 2, v.op, ": w1 must have shape [R, C], got ", shape_of(w1));
  return w1.size(0);
}

#if !defined(FUSEDRES_CUDA_ON_HOST)

// Errors of the launch itself: nothing ran, and the device is as it was. Any other error (an
// illegal address, say) is of a kernel that ran before, and stays with the context.
inline bool was_refused(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
    case cudaErrorMemoryAllocation:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInsufficientDriver:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorSharedObjectInitFailed:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorInvalidClusterSize:
    case cudaErrorNotSupported:
      return true;
    default:
      return false;
  }
}

#endif

// fusedres/native.py knows a refused launch by these words.
inline void check_launch(const View& v, cudaError_t error) {
  if (error == cudaSuccess) return;
#if defined(FUSEDRES_CUDA_ON_HOST)
  STD_TORCH_CHECK(false, v.op, ": the launch was refused: ", cudaGetErrorString(error));
#else
  cudaGetLastError();  // or the next caller of CUDA would be told of it
  STD_TORCH_CHECK(false, v.op,
                  was_refused(error) ? ": the launch was refused: " : ": CUDA failed: ",
                  cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
#endif
}

}  // namespace cuda
}  // namespace fusedres
