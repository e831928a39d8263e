#include "view.h"

namespace fusedres {
namespace {

bool dtype_of(ScalarType type, Dtype* out) {
  switch (type) {
    case ScalarType::Float:
      *out = kFloat32;
      return true;
    case ScalarType::Double:
      *out = kFloat64;
      return true;
    case ScalarType::BFloat16:
      *out = kBFloat16;
      return true;
    case ScalarType::Half:
      *out = kFloat16;
      return true;
    default:
      return false;
  }
}

}  // namespace

Dtype checked_dtype(const char* op, const char* name, const Tensor& t) {
  Dtype dtype = kFloat32;
  STD_TORCH_CHECK(dtype_of(t.scalar_type(), &dtype), op, ": ", name,
                  " must be float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return dtype;
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

View view_of(const char* op, const Tensor& x, int32_t device) {
  check_device(op, "x", x, device);
  View v{};
  v.op = op;
  v.device = device == kCpu ? kCpu : x.get_device_index();
  v.dtype = checked_dtype(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have 2 or more dimensions, got ", shape_of(x));
  v.n = x.size(0);
  v.c = x.size(1);
  v.hw = 1;
  for (int64_t i = 2; i < x.dim(); ++i) v.hw *= x.size(i);
  const bool contiguous = x.is_contiguous();
  STD_TORCH_CHECK(contiguous || is_channels_last(x) || v.numel() == 0, op,
                  ": x must be dense, contiguous or channels_last, got shape ", shape_of(x));
  v.planar = contiguous && v.hw != 1;
  return v;
}

const void* data_like(const View& v, const Tensor& x, const char* name, const Tensor& t) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, v.op, ": ", name, " must have the shape ", shape_of(x), " of x, got ",
                  shape_of(t));
  check_device(v.op, name, t, v.device);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), v.op, ": ", name, " must have the dtype ",
                  torch::headeronly::toString(x.scalar_type()), " of x, got ",
                  torch::headeronly::toString(t.scalar_type()));
  const bool laid_out = v.planar || v.hw == 1
                            ? t.is_contiguous() || (v.hw == 1 && is_channels_last(t))
                            : is_channels_last(t);
  STD_TORCH_CHECK(laid_out || v.numel() == 0, v.op, ": ", name,
                  " must have the memory layout of x (", v.planar ? "contiguous" : "channels_last",
                  ")");
  return t.const_data_ptr();
}

const void* data_like(const View& v, const Tensor& x, const char* name, const OptTensor& t) {
  return t.has_value() ? data_like(v, x, name, *t) : nullptr;
}

const uint8_t* mask_data(const View& v, const Tensor& mask) {
  if (mask.numel() == 0) return nullptr;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte, v.op, ": mask must be uint8, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  check_shape(v.op, "mask", mask, {v.mask_rows(), v.mask_row_bytes()}, v.device);
  STD_TORCH_CHECK(mask.is_contiguous(), v.op, ": mask must be contiguous");
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

Tensor new_mask(const View& v, const Tensor& x, bool wanted) {
  if (!wanted) return torch::stable::new_empty(x, {0}, ScalarType::Byte);
  return torch::stable::new_empty(x, {v.mask_rows(), v.mask_row_bytes()}, ScalarType::Byte);
}

Act parse_act(const char* op, const char* name, const std::string& act) {
  static const char* const names[] = {"identity", "relu", "relu6",    "leaky_relu",
                                      "silu",     "gelu", "hardswish"};
  for (int i = 0; i < 7; ++i) {
    if (act == names[i]) return static_cast<Act>(i);
  }
  STD_TORCH_CHECK(false, op, ": ", name,
                  " must be relu, identity, relu6, leaky_relu, silu, gelu or hardswish, got ", act);
}

Gate parse_gate(const char* op, const std::string& gate) {
  if (gate == "sigmoid") return Gate::kSigmoid;
  STD_TORCH_CHECK(gate == "hard_sigmoid", op, ": gate must be sigmoid or hard_sigmoid, got ", gate);
  return Gate::kHardSigmoid;
}

Tensor new_acc(const View& v, const Tensor& x, std::vector<int64_t> sizes) {
  const ScalarType type = v.dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x, sizes, type);
}

Tensor new_empty_like(const Tensor& x, bool wanted) {
  return wanted ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
}

}  // namespace fusedres
