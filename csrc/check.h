// Argument checks: each message names the operator and the argument, what was wanted, what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fusedres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

// Where a tensor must be: the index of a CUDA device, or one of these.
constexpr int32_t kCpu = -1;
constexpr int32_t kAnyCuda = -2;

inline std::string name_of_device(int32_t device) {
  if (device == kCpu) return "the CPU";
  return device == kAnyCuda ? "a CUDA device" : "cuda:" + std::to_string(device);
}

inline void check_device(const char* op, const char* name, const Tensor& t, int32_t device) {
  const bool there = device == kCpu
                         ? t.is_cpu()
                         : t.is_cuda() && (device == kAnyCuda || t.get_device_index() == device);
  STD_TORCH_CHECK(there, op, ": ", name, " must be on ", name_of_device(device));
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        const std::vector<int64_t>& wanted, int32_t device = kCpu) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  for (size_t i = 0; same && i < wanted.size(); ++i) {
    same = t.size(static_cast<int64_t>(i)) == wanted[i];
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", shape_of(wanted), ", got ",
                  shape_of(t));
  check_device(op, name, t, device);
}

}  // namespace fusedres
