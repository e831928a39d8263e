// add_norm: sum = shortcut + noise * branch and y = norm(sum), rows of [M, D]; its backward.
#include "../ops.h"
#include "host.h"

namespace fusedres {
namespace {

constexpr int64_t kTiles = 64;       // enough for the threads of a large CPU
constexpr int64_t kMinTileRows = 8;  // so that partial sums stay a small share of the traffic

Norm parse_norm(const char* op, const std::string& norm) {
  if (norm == "none") return Norm::kNone;
  if (norm == "rms") return Norm::kRms;
  STD_TORCH_CHECK(norm == "layer", op, ": norm must be layer, rms or none, got ", norm);
  return Norm::kLayer;
}

// Rows and columns, and the operands that scale the branch. Everything is a row-major matrix.
struct Matrix {
  View view;
  NormParams params;
};

Matrix matrix_of(const char* op, const Tensor& x, const OptTensor& keep, double scale,
                 const std::string& norm) {
  Matrix m{view_of(op, x), {}};
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op, ": x must be a contiguous matrix, got ",
                  shape_of(x));
  m.params.rows = x.size(0);
  m.params.cols = x.size(1);
  m.params.scale = scale;
  m.params.norm = parse_norm(op, norm);
  if (keep.has_value()) {
    check_shape(op, "keep", *keep, {x.size(0), x.size(1)});
    STD_TORCH_CHECK(keep->scalar_type() == ScalarType::Bool && keep->is_contiguous(), op,
                    ": keep must be a contiguous bool tensor, got ",
                    torch::headeronly::toString(keep->scalar_type()));
    m.params.keep = static_cast<const uint8_t*>(keep->const_data_ptr());
  }
  return m;
}

template <typename acc_t>
void forward(Matrix m, const OptTensor& weight, const OptTensor& bias, const OptTensor& row_scale) {
  const View& v = m.view;
  NormParams p = m.params;
  const auto scales = read_parameter<acc_t>(v.op, "row_scale", row_scale, {p.rows}, acc_t(1));
  const auto w = read_parameter<acc_t>(v.op, "weight", weight, {p.cols}, acc_t(1));
  const auto b = read_parameter<acc_t>(v.op, "bias", bias, {p.cols}, acc_t(0));
  p.row_scale = row_scale.has_value() ? scales.data() : nullptr;
  p.weight = w.data();
  p.bias = b.data();
  if (v.numel() == 0) return;
  parallel_items(p.rows, p.cols,
                 [&](int64_t begin, int64_t end) { kernels().norm_fwd[v.dtype](p, begin, end); });
}

// out[d] = the sum of the tiles' partials, in double, in the order of the tiles.
template <typename acc_t>
void merge(const std::vector<acc_t>& partials, int64_t tiles, int64_t ld, int64_t cols,
           acc_t* out) {
  parallel_items(cols, tiles, [&](int64_t begin, int64_t end) {
    std::vector<double> total(static_cast<size_t>(end - begin));
    for (int64_t t = 0; t < tiles; ++t) {
      const acc_t* row = partials.data() + t * ld + begin;
      for (size_t c = 0; c < total.size(); ++c) total[c] += static_cast<double>(row[c]);
    }
    for (size_t c = 0; c < total.size(); ++c) {
      out[begin + static_cast<int64_t>(c)] = static_cast<acc_t>(total[c]);
    }
  });
}

template <typename acc_t>
void backward(Matrix m, const OptTensor& weight, const Tensor& mean, const Tensor& rstd,
              const OptTensor& row_scale, bool has_dy, const Tensor& dweight, const Tensor& dbias) {
  const View& v = m.view;
  NormParams p = m.params;
  const auto scales = read_parameter<acc_t>(v.op, "row_scale", row_scale, {p.rows}, acc_t(1));
  const auto w = read_parameter<acc_t>(v.op, "weight", weight, {p.cols}, acc_t(1));
  std::vector<acc_t> means, rstds;
  if (p.norm == Norm::kLayer) means = read_parameter<acc_t>(v.op, "mean", mean, {p.rows});
  if (p.norm != Norm::kNone) rstds = read_parameter<acc_t>(v.op, "rstd", rstd, {p.rows});
  p.row_scale = row_scale.has_value() ? scales.data() : nullptr;
  p.weight = w.data();
  p.mean = means.data();
  p.rstd = rstds.data();
  // Tiles depend on the shape alone: sums are the same for any number of threads.
  p.tile_rows = std::min(kChain, std::max(kMinTileRows, (p.rows + kTiles - 1) / kTiles));
  const int64_t tiles = (p.rows + p.tile_rows - 1) / p.tile_rows;
  p.partial_ld = p.cols + kPad;
  const size_t size = has_dy ? static_cast<size_t>(tiles * p.partial_ld) : 0;
  std::vector<acc_t> sums_weight(size), sums_bias(size);
  p.partial_weight = sums_weight.data();
  p.partial_bias = sums_bias.data();
  if (v.numel() > 0) {
    parallel_items(tiles, p.tile_rows * p.cols,
                   [&](int64_t begin, int64_t end) { kernels().norm_bwd[v.dtype](p, begin, end); });
  }
  if (!has_dy) return;
  merge(sums_weight, tiles, p.partial_ld, p.cols, acc_data<acc_t>(dweight));
  merge(sums_bias, tiles, p.partial_ld, p.cols, acc_data<acc_t>(dbias));
}

}  // namespace

Tensors4 add_norm(Tensor branch, Tensor shortcut, OptTensor weight, OptTensor bias, OptTensor keep,
                  OptTensor row_scale, double scale, double eps, std::string norm) {
  Matrix m = matrix_of("add_norm", branch, keep, scale, norm);
  const View& v = m.view;
  const Norm kind = m.params.norm;
  Tensor y = new_empty_like(branch, kind != Norm::kNone);
  Tensor sum = torch::stable::empty_like(branch);
  Tensor mean = new_acc(v, branch, {kind == Norm::kLayer ? v.n : 0});
  Tensor rstd = new_acc(v, branch, {kind == Norm::kNone ? 0 : v.n});
  m.params.branch = branch.const_data_ptr();
  m.params.shortcut = data_like(v, branch, "shortcut", shortcut);
  m.params.y = y.mutable_data_ptr();
  m.params.sum = sum.mutable_data_ptr();
  m.params.mean = mean.mutable_data_ptr();
  m.params.rstd = rstd.mutable_data_ptr();
  m.params.eps = eps;
  (v.dtype == kFloat64 ? forward<double> : forward<float>)(m, weight, bias, row_scale);
  return {y, sum, mean, rstd};
}

Tensors4 add_norm_backward(Tensor sum, OptTensor dy, OptTensor dsum, OptTensor weight, Tensor mean,
                           Tensor rstd, OptTensor keep, OptTensor row_scale, double scale,
                           std::string norm) {
  Matrix m = matrix_of("add_norm_backward", sum, keep, scale, norm);
  const View& v = m.view;
  const bool scaled = keep.has_value() || row_scale.has_value() || scale != 1.0;
  Tensor dbranch = new_empty_like(sum, scaled);
  Tensor dshortcut = torch::stable::empty_like(sum);
  const int64_t params = dy.has_value() ? m.params.cols : 0;
  Tensor dweight = new_acc(v, sum, {params});
  Tensor dbias = new_acc(v, sum, {params});
  m.params.x = sum.const_data_ptr();
  m.params.dy = data_like(v, sum, "dy", dy);
  m.params.dsum = data_like(v, sum, "dsum", dsum);
  m.params.dshortcut = dshortcut.mutable_data_ptr();
  m.params.dbranch = scaled ? dbranch.mutable_data_ptr() : nullptr;
  (v.dtype == kFloat64 ? backward<double> : backward<float>)(m, weight, mean, rstd, row_scale,
                                                             dy.has_value(), dweight, dbias);
  return {dbranch, dshortcut, dweight, dbias};
}

}  // namespace fusedres
