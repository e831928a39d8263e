#include "host.h"

namespace fusedres {

template <typename acc_t>
std::vector<acc_t> read_parameter(const char* op, const char* name, const Tensor& t,
                                  const std::vector<int64_t>& shape) {
  check_shape(op, name, t, shape);
  const Dtype dtype = checked_dtype(op, name, t);
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  const int64_t n = t.numel();
  std::vector<acc_t> values(static_cast<size_t>(n + kPad));
  kernels().to_acc[dtype][sizeof(acc_t) == sizeof(double)](dense.const_data_ptr(), values.data(),
                                                           n);
  return values;
}

template <typename acc_t>
std::vector<acc_t> read_parameter(const char* op, const char* name, const OptTensor& t,
                                  const std::vector<int64_t>& shape, acc_t otherwise) {
  if (t.has_value()) return read_parameter<acc_t>(op, name, *t, shape);
  return std::vector<acc_t>(static_cast<size_t>(shape[0] + kPad), otherwise);
}

template std::vector<float> read_parameter(const char*, const char*, const Tensor&,
                                           const std::vector<int64_t>&);
template std::vector<double> read_parameter(const char*, const char*, const Tensor&,
                                            const std::vector<int64_t>&);
template std::vector<float> read_parameter(const char*, const char*, const OptTensor&,
                                           const std::vector<int64_t>&, float);
template std::vector<double> read_parameter(const char*, const char*, const OptTensor&,
                                            const std::vector<int64_t>&, double);

FwdAct fwd_act(Act act) {
  return act == Act::kIdentity ? kFwdIdentity : act == Act::kRelu ? kFwdRelu : kFwdAny;
}

UMode u_mode(Act act, const uint8_t* mask) {
  if (act == Act::kIdentity) return kUIdentity;
  if (mask != nullptr) return kUMask;
  return act == Act::kRelu ? kURelu : kUAny;
}

}  // namespace fusedres
