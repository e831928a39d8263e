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

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        const std::vector<int64_t>& wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  for (size_t i = 0; same && i < wanted.size(); ++i) {
    same = t.size(static_cast<int64_t>(i)) == wanted[i];
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", shape_of(wanted), ", got ",
                  shape_of(t));
  check_cpu(op, name, t);
}

}  // namespace fusedres
