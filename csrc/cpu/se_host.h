// The squeeze-excite MLP on the host: hidden = p @ w1.T + b1, logits = act(hidden) @ w2.T + b2.
#pragma once

#include "../ops.h"
#include "host.h"

namespace fusedres {

// A weight matrix as acc_t: the tensor's own memory when it already is, else a converted copy.
template <typename acc_t>
class Matrix {
 public:
  Matrix(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape)
      : tensor_(t) {
    const ScalarType same = sizeof(acc_t) == 8 ? ScalarType::Double : ScalarType::Float;
    check_shape(op, name, t, shape);
    if (t.scalar_type() == same && t.is_contiguous()) {
      data_ = static_cast<const acc_t*>(t.const_data_ptr());
    } else {
      copy_ = read_parameter<acc_t>(op, name, t, shape);
      data_ = copy_.data();
    }
  }
  const acc_t* data() const { return data_; }

 private:
  Tensor tensor_;  // keeps the memory alive
  std::vector<acc_t> copy_;
  const acc_t* data_;
};

template <typename acc_t>
struct SeWeights {
  int64_t r;
  Matrix<acc_t> w1, w2;
  SeWeights(const View& v, const Tensor& w1_in, const Tensor& w2_in)
      : r(squeezed_channels(v, w1_in)),
        w1(v.op, "w1", w1_in, {r, v.c}),
        w2(v.op, "w2", w2_in, {v.c, r}) {}

 private:
  static int64_t squeezed_channels(const View& v, const Tensor& w1) {
    STD_TORCH_CHECK(w1.dim() == 2, v.op, ": w1 must have shape [R, C], got ", shape_of(w1));
    return w1.size(0);
  }
};

// out = product of a and w; which: kernels().matmul_nt, _nn or _tn; items and their cost: isa.h.
template <typename acc_t>
void run_matmul(const MatmulFn* which, const acc_t* a, const acc_t* w, const acc_t* bias,
                acc_t* out, int64_t n, int64_t o, int64_t k, int64_t items) {
  const MatmulParams p{a, w, bias, out, n, o, k};
  const MatmulFn fn = which[sizeof(acc_t) == sizeof(double)];
  const int64_t work = std::max<int64_t>(1, n * o * k / 4 / std::max<int64_t>(1, items));
  parallel_items(items, work, [&](int64_t begin, int64_t end) { fn(p, begin, end); });
}

template <typename acc_t>
void se_mlp_forward(const View& v, const acc_t* pooled, const SeWeights<acc_t>& w,
                    const OptTensor& b1, const OptTensor& b2, Act act, acc_t* hidden,
                    acc_t* logits) {
  const auto bias1 = read_parameter<acc_t>(v.op, "b1", b1, {w.r}, acc_t(0));
  const auto bias2 = read_parameter<acc_t>(v.op, "b2", b2, {v.c}, acc_t(0));
  run_matmul(kernels().matmul_nt, pooled, w.w1.data(), bias1.data(), hidden, v.n, w.r, v.c, w.r);
  std::vector<acc_t> activated(static_cast<size_t>(v.n * w.r));
  for (size_t i = 0; i < activated.size(); ++i) activated[i] = act_forward(act, hidden[i]);
  run_matmul(kernels().matmul_nt, activated.data(), w.w2.data(), bias2.data(), logits, v.n, v.c,
             w.r, v.c);
}

// Column sums of [N, cols], in double
template <typename acc_t>
void sum_images(const std::vector<acc_t>& a, int64_t n, int64_t cols, acc_t* out) {
  std::vector<double> total(static_cast<size_t>(cols));
  for (int64_t i = 0; i < n * cols; ++i) {
    total[static_cast<size_t>(i % cols)] += static_cast<double>(a[static_cast<size_t>(i)]);
  }
  for (int64_t c = 0; c < cols; ++c) out[c] = static_cast<acc_t>(total[static_cast<size_t>(c)]);
}

struct SeGradients {
  Tensor dw1, db1, dw2, db2;  // acc_t
  SeGradients(const View& v, const Tensor& x, int64_t r)
      : dw1(new_acc(v, x, {r, v.c})),
        db1(new_acc(v, x, {r})),
        dw2(new_acc(v, x, {v.c, r})),
        db2(new_acc(v, x, {v.c})) {}
};

// From dlogits [N, C] to the gradients of the weights, and of pooled [N, C].
template <typename acc_t>
std::vector<acc_t> se_mlp_backward(const View& v, const std::vector<acc_t>& dlogits,
                                   const acc_t* pooled, const acc_t* hidden,
                                   const SeWeights<acc_t>& w, Act act, const SeGradients& out) {
  const size_t hidden_size = static_cast<size_t>(v.n * w.r);
  std::vector<acc_t> activated(hidden_size);
  std::vector<acc_t> dhidden(hidden_size);
  for (size_t i = 0; i < hidden_size; ++i) activated[i] = act_forward(act, hidden[i]);
  const KernelTable& table = kernels();
  const int64_t r_blocks = (w.r + 15) / 16;
  const int64_t c_blocks = (v.c + 15) / 16;
  run_matmul<acc_t>(table.matmul_tn, dlogits.data(), activated.data(), nullptr,
                    acc_data<acc_t>(out.dw2), v.c, w.r, v.n, v.c);
  sum_images(dlogits, v.n, v.c, acc_data<acc_t>(out.db2));
  run_matmul<acc_t>(table.matmul_nn, dlogits.data(), w.w2.data(), nullptr, dhidden.data(), v.n, w.r,
                    v.c, r_blocks);
  for (size_t i = 0; i < hidden_size; ++i) dhidden[i] = act_backward(act, hidden[i], dhidden[i]);
  run_matmul<acc_t>(table.matmul_tn, dhidden.data(), pooled, nullptr, acc_data<acc_t>(out.dw1), w.r,
                    v.c, v.n, w.r);
  sum_images(dhidden, v.n, w.r, acc_data<acc_t>(out.db1));
  std::vector<acc_t> dpooled(static_cast<size_t>(v.n * v.c + kPad));
  run_matmul<acc_t>(table.matmul_nn, dhidden.data(), w.w1.data(), nullptr, dpooled.data(), v.n, v.c,
                    w.r, c_blocks);
  return dpooled;
}

// A saved activation of the MLP, [N, cols] acc_t
template <typename acc_t>
const acc_t* saved_data(const View& v, const char* name, const Tensor& t, int64_t cols) {
  const ScalarType wanted = sizeof(acc_t) == 8 ? ScalarType::Double : ScalarType::Float;
  check_shape(v.op, name, t, {v.n, cols});
  STD_TORCH_CHECK(t.scalar_type() == wanted && t.is_contiguous(), v.op, ": ", name,
                  " must be contiguous ", torch::headeronly::toString(wanted), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  return static_cast<const acc_t*>(t.const_data_ptr());
}

}  // namespace fusedres
