// Tensor maps: what the copy engine (TMA) has to know of a tensor. The driver encodes them, on the
// host, in a struct that a kernel takes as a parameter. The driver is asked for its functions when
// they are needed: this library loads where there is none.
//
// The tensors are of 16-bit values, dense, with the channels innermost. A box has 64 of them, the
// 128 bytes that the copy engine swizzles as wgmma reads them (hopper.cuh).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace fusedres {
namespace cuda {

constexpr int kBoxChannels = 64;

template <typename Function>
cudaError_t driver_function(const char* name, Function* out) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorInsufficientDriver;
  *out = reinterpret_cast<Function>(found);
  return cudaSuccess;
}

// For tensors of less than 128 KiB drivers up to 13.1 set a bit that must not be set (CUTLASS,
// copy_traits_sm90_tma.hpp and _im2col.hpp, clears it in the same way).
inline void correct_map_of_small_tensor(CUtensorMap* map, uint64_t bytes) {
#if defined(FUSEDRES_CUDA_ON_HOST)
  (void)map, (void)bytes;  // the simulator's maps have no such bits
#else
  int driver = 0;
  if (bytes >= 128 * 1024 || cudaDriverGetVersion(&driver) != cudaSuccess || driver > 13010) return;
  reinterpret_cast<uint64_t*>(map)[1] &= ~(uint64_t{1} << 21);
#endif
}

inline CUtensorMapDataType map_type(Dtype dtype) {
  return dtype == kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Of a dense tensor of 2 or 3 dimensions, the innermost first; boxes of 64 * ... * rows values.
inline cudaError_t tiled_map(CUtensorMap* map, Dtype dtype, const void* data, int rank,
                             const int64_t (&sizes)[3], int64_t rows) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  const cudaError_t error = driver_function("cuTensorMapEncodeTiled", &encode);
  if (error != cudaSuccess) return error;
  uint64_t dims[3], strides[3];  // strides in bytes, from the second dimension on
  uint64_t bytes = 2;
  uint32_t box[3] = {kBoxChannels, 1, 1};
  const uint32_t steps[3] = {1, 1, 1};
  for (int i = 0; i < rank; ++i) {
    dims[i] = static_cast<uint64_t>(sizes[i]);
    bytes *= dims[i];
    strides[i] = bytes;
  }
  box[rank - 1] = static_cast<uint32_t>(rows);
  const CUresult result =
      encode(map, map_type(dtype), rank, const_cast<void*>(data), dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  correct_map_of_small_tensor(map, bytes);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// How a convolution walks over images; height first.
struct Window {
  int taps[2], stride[2], pad[2], dilation[2];
};

// Of images [N, H, W, C]; boxes of `pixels` pixels under one tap of the window, 64 channels each.
// The box that a tap's pixels lie in goes from -pad to size + pad - dilation * (taps - 1); the
// corners have W first.
inline cudaError_t im2col_map(CUtensorMap* map, Dtype dtype, const void* data, int64_t n, int64_t h,
                              int64_t w, int64_t c, const Window& window, int64_t pixels) {
  decltype(&cuTensorMapEncodeIm2col) encode = nullptr;
  const cudaError_t error = driver_function("cuTensorMapEncodeIm2col", &encode);
  if (error != cudaSuccess) return error;
  const uint64_t dims[4] = {uint64_t(c), uint64_t(w), uint64_t(h), uint64_t(n)};
  const uint64_t strides[3] = {uint64_t(c) * 2, uint64_t(c * w) * 2, uint64_t(c * w * h) * 2};
  int lower[2], upper[2];
  for (int i = 0; i < 2; ++i) {
    lower[1 - i] = -window.pad[i];
    upper[1 - i] = window.pad[i] - window.dilation[i] * (window.taps[i] - 1);
  }
  const uint32_t steps[4] = {1, uint32_t(window.stride[1]), uint32_t(window.stride[0]), 1};
  const CUresult result =
      encode(map, map_type(dtype), 4, const_cast<void*>(data), dims, strides, lower, upper,
             kBoxChannels, static_cast<uint32_t>(pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  correct_map_of_small_tensor(map, strides[2] * dims[3]);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Why the copy engine cannot form a window's tiles, or null: offsets of a corner are 8 bits, a
// tap's 8 bits without a sign, strides at most 8 (cuTensorMapEncodeIm2col).
inline const char* why_no_im2col(const Window& window) {
  for (int i = 0; i < 2; ++i) {
    const int reach = window.dilation[i] * (window.taps[i] - 1);
    const int upper = window.pad[i] - reach;
    if (window.pad[i] > 128 || upper > 127 || upper < -128) return "the padding is too large";
    if (reach > 255) return "the window is too large";
    if (window.stride[i] > 8) return "the stride is more than 8";
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace fusedres
