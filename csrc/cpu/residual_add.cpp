// residual_add: y = act(scale[n, c] * A(x) + B(shortcut)), where A and B are batch norms,
// per-channel affine maps or the identity; its backward. The moments of y are taken while it is
// written.
#include "bn_host.h"

namespace fusedres {
namespace {

// One of the two operands' maps: (t - center) * scale + bias.
struct Map {
  OptTensor weight, bias, mean, var;
  bool batch_stats;
  double eps;
  bool identity() const { return !weight.has_value() && !bias.has_value() && !mean.has_value(); }
};

template <typename acc_t>
BnCoefficients<acc_t> coefficients(const View& v, const Map& m) {
  const size_t size = static_cast<size_t>(v.c + kPad);
  if (m.mean.has_value()) {
    STD_TORCH_CHECK(m.var.has_value(), v.op, ": mean and var must be given together");
    const auto mean = read_parameter<acc_t>(v.op, "mean", *m.mean, {v.c});
    const auto var = read_parameter<acc_t>(v.op, "var", *m.var, {v.c});
    return bn_coefficients<acc_t>(v, m.weight, m.bias, mean.data(), var.data(), m.eps);
  }
  return {std::vector<acc_t>(size),
          read_parameter<acc_t>(v.op, "weight", m.weight, {v.c}, acc_t(1)),
          read_parameter<acc_t>(v.op, "bias", m.bias, {v.c}, acc_t(0)),
          std::vector<acc_t>(size, acc_t(1))};
}

// scale [N, 1] or [N, C] as [N, C]; one group of ones when there is none.
template <typename acc_t>
std::vector<acc_t> image_scale(const View& v, const OptTensor& scale) {
  if (!scale.has_value()) return std::vector<acc_t>(static_cast<size_t>(v.c), acc_t(1));
  const int64_t width = scale->dim() == 2 && scale->size(1) == 1 ? 1 : v.c;
  const auto given = read_parameter<acc_t>(v.op, "scale", *scale, {v.n, width});
  std::vector<acc_t> all(static_cast<size_t>(v.n * v.c));
  for (size_t i = 0; i < all.size(); ++i)
    all[i] = given[width == 1 ? i / static_cast<size_t>(v.c) : i];
  return all;
}

template <typename acc_t>
struct ResidualAdd {
  const View& v;
  bool per_image;
  BnCoefficients<acc_t> main, side;
  std::vector<acc_t> image, scale, bias;  // [N, C], or [C] without an image scale

  ResidualAdd(const View& view, const Map& a, const Map& b, const OptTensor& image_scale_in)
      : v(view),
        per_image(image_scale_in.has_value()),
        main(coefficients<acc_t>(view, a)),
        side(coefficients<acc_t>(view, b)),
        image(image_scale<acc_t>(view, image_scale_in)),
        scale(image.size() + kPad),
        bias(image.size() + kPad) {
    for (size_t i = 0; i < image.size(); ++i) {
      const size_t c = i % static_cast<size_t>(v.c);
      scale[i] = main.scale[c] * image[i];
      bias[i] = main.bias[c] * image[i];
    }
  }
  StreamParams params(const Plan& plan, const Map& b, Act act) const {
    StreamParams p = stream_params(v, plan, per_image);
    p.center = main.center.data();
    p.scale = scale.data();
    p.bias = bias.data();
    p.act = act;
    if (!b.identity()) {
      p.res_center = side.center.data();
      p.res_scale = side.scale.data();
      p.res_bias = side.bias.data();
    }
    return p;
  }
};

template <typename acc_t>
Tensors4 forward(const View& v, const Tensor& x, const Map& a, const OptTensor& shortcut,
                 const Map& b, const OptTensor& scale, Act act, bool save_mask, bool stats) {
  const ResidualAdd<acc_t> k(v, a, b, scale);
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = new_mask(v, x, save_mask);
  Tensor mean = new_acc(v, x, {stats ? v.c : 0});
  Tensor var = new_acc(v, x, {stats ? v.c : 0});
  StreamParams p = k.params(apply_plan(v, k.per_image, save_mask), b, act);
  p.x = x.const_data_ptr();
  p.residual = data_like(v, x, "shortcut", shortcut);
  p.out = y.mutable_data_ptr();
  set_mask(v, nullptr, save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, &p);
  const StreamFn apply = kernels().fwd_apply[v.dtype][fwd_act(act)];
  if (!stats) {
    launch(apply, p);
    return {y, mask, mean, var};
  }
  const Pair moments = apply_with_moments(v, k.per_image, apply, p);
  const double count = static_cast<double>(std::max<int64_t>(1, v.count()));
  for (size_t c = 0; c < static_cast<size_t>(v.c); ++c) {
    acc_data<acc_t>(mean)[c] = static_cast<acc_t>(moments.first[c]);
    const double var_c = moments.second[c] / count;
    acc_data<acc_t>(var)[c] = static_cast<acc_t>(var_c < 0 ? 0 : var_c);  // NaN stays NaN
  }
  return {y, mask, mean, var};
}

// Gradients of one map's weight and bias, and its operand's as p * u + q * (t - center) + r.
template <typename acc_t>
struct MapGradient {
  Tensor dweight, dbias;  // [C] acc_t
  std::vector<acc_t> p, q, r;

  // sums over the channel of du and du * (t - center), where du is the gradient of the map's result
  MapGradient(const View& v, const Tensor& like, const BnCoefficients<acc_t>& k,
              const std::vector<double>& sum, const std::vector<double>& sum_t)
      : dweight(new_acc(v, like, {v.c})), dbias(new_acc(v, like, {v.c})), p(k.scale), q(p), r(p) {
    const double count = static_cast<double>(std::max<int64_t>(1, v.count()));
    for (size_t c = 0; c < sum.size(); ++c) {
      const double dw = sum_t[c] * static_cast<double>(k.rstd[c]);
      q[c] = bn_backward_q(k.scale[c], k.rstd[c], dw, count);
      r[c] = bn_backward_r(k.scale[c], sum[c], count);
      acc_data<acc_t>(dweight)[c] = static_cast<acc_t>(dw);
      acc_data<acc_t>(dbias)[c] = static_cast<acc_t>(sum[c]);
    }
  }
};

// [C] -> [N, C], for coefficients that the kernels take for each image
template <typename acc_t>
void repeat_images(const View& v, std::vector<acc_t>* values) {
  std::vector<acc_t> all(static_cast<size_t>(v.n * v.c + kPad));
  for (size_t i = 0; i < static_cast<size_t>(v.n * v.c); ++i) {
    all[i] = (*values)[i % static_cast<size_t>(v.c)];
  }
  values->swap(all);
}

// What the reduction gives: sums over each channel for both maps, and the gradient of the scale.
struct ChannelSums {
  std::vector<double> du, du_x, u, u_shortcut;
};

template <typename acc_t>
ChannelSums channel_sums(const ResidualAdd<acc_t>& k, UMode mode, const StreamParams& p,
                         bool need_sums, bool need_shortcut_sums, const Tensor& dscale) {
  const size_t channels = static_cast<size_t>(k.v.c);
  ChannelSums s{std::vector<double>(channels), std::vector<double>(channels),
                std::vector<double>(channels), std::vector<double>(channels)};
  if (!need_sums && !need_shortcut_sums) return s;
  std::vector<double> third(k.image.size());
  const Pair sums = gradient_sums(k.v, k.per_image, mode, p, need_shortcut_sums ? &third : nullptr);
  for (size_t i = 0; i < k.image.size(); ++i) {
    const size_t c = i % channels;
    s.du[c] += static_cast<double>(k.image[i]) * sums.first[i];
    s.du_x[c] += static_cast<double>(k.image[i]) * sums.second[i];
    s.u[c] += sums.first[i];
    s.u_shortcut[c] += third[i];
    if (dscale.numel() > 0) {
      acc_data<acc_t>(dscale)[i] =
          static_cast<acc_t>(k.main.scale[c] * sums.second[i] + k.main.bias[c] * sums.first[i]);
    }
  }
  return s;
}

template <typename acc_t>
Tensors7 backward(const View& v, const Tensor& dy, const OptTensor& x, const Map& a,
                  const OptTensor& shortcut, const Map& b, const OptTensor& scale,
                  const Tensor& mask, Act act, bool need_sums, bool need_shortcut_sums,
                  bool need_dshortcut) {
  const ResidualAdd<acc_t> k(v, a, b, scale);
  Tensor dx = torch::stable::empty_like(dy);
  Tensor dshortcut = new_empty_like(dy, need_dshortcut);
  Tensor dscale = new_acc(v, dy, {scale.has_value() && need_sums ? v.n : 0, v.c});
  StreamParams p = k.params(Plan{}, b, act);
  p.dy = dy.const_data_ptr();
  p.x = data_like(v, dy, "x", x);
  p.residual = data_like(v, dy, "shortcut", shortcut);
  p.mask_in = mask_data(v, mask);
  const UMode mode = u_mode(act, p.mask_in);
  const bool reads_x = need_sums || need_shortcut_sums || mode >= kURelu;
  STD_TORCH_CHECK(!reads_x || x.has_value() || v.numel() == 0, v.op, ": x is required");
  STD_TORCH_CHECK(shortcut.has_value() || !need_shortcut_sums, v.op, ": shortcut is required");
  const ChannelSums sums = channel_sums(k, mode, p, need_sums, need_shortcut_sums, dscale);
  MapGradient<acc_t> main(v, dy, k.main, sums.du, sums.du_x);
  MapGradient<acc_t> side(v, dy, k.side, sums.u, sums.u_shortcut);
  p.plan = apply_plan(v, k.per_image, p.mask_in != nullptr);
  p.out = dx.mutable_data_ptr();
  p.dresidual = need_dshortcut ? dshortcut.mutable_data_ptr() : nullptr;
  p.p = k.scale.data();
  if (a.batch_stats) {
    if (k.per_image) {
      repeat_images(v, &main.q);
      repeat_images(v, &main.r);
    }
    p.q = main.q.data();
    p.r = main.r.data();
  }
  p.res_p = b.identity() ? nullptr : side.p.data();
  p.res_q = b.batch_stats ? side.q.data() : nullptr;
  p.res_r = b.batch_stats ? side.r.data() : nullptr;
  set_mask(v, p.mask_in, nullptr, &p);
  launch(kernels().bwd_apply[v.dtype][mode], p);
  return {dx, main.dweight, main.dbias, dshortcut, side.dweight, side.dbias, dscale};
}

}  // namespace

Tensors4 residual_add(Tensor x, OptTensor weight, OptTensor bias, OptTensor mean, OptTensor var,
                      OptTensor shortcut, OptTensor shortcut_weight, OptTensor shortcut_bias,
                      OptTensor shortcut_mean, OptTensor shortcut_var, OptTensor scale,
                      bool batch_stats, bool shortcut_batch_stats, double eps, double shortcut_eps,
                      std::string act, bool save_mask, bool stats) {
  const View v = view_of("residual_add", x);
  const Act parsed = parse_act(v.op, "act", act);
  STD_TORCH_CHECK(!save_mask || has_mask(parsed), v.op, ": ", act, " has no mask to save");
  const Map a{weight, bias, mean, var, batch_stats, eps};
  const Map b{shortcut_weight, shortcut_bias,        shortcut_mean,
              shortcut_var,    shortcut_batch_stats, shortcut_eps};
  const auto run = v.dtype == kFloat64 ? forward<double> : forward<float>;
  return run(v, x, a, shortcut, b, scale, parsed, save_mask, stats);
}

Tensors7 residual_add_backward(Tensor dy, OptTensor x, OptTensor weight, OptTensor bias,
                               OptTensor mean, OptTensor var, OptTensor shortcut,
                               OptTensor shortcut_weight, OptTensor shortcut_bias,
                               OptTensor shortcut_mean, OptTensor shortcut_var, OptTensor scale,
                               Tensor mask, bool batch_stats, bool shortcut_batch_stats, double eps,
                               double shortcut_eps, std::string act, bool need_sums,
                               bool need_shortcut_sums, bool need_dshortcut) {
  const View v = view_of("residual_add_backward", dy);
  const Map a{weight, bias, mean, var, batch_stats, eps};
  const Map b{shortcut_weight, shortcut_bias,        shortcut_mean,
              shortcut_var,    shortcut_batch_stats, shortcut_eps};
  const auto run = v.dtype == kFloat64 ? backward<double> : backward<float>;
  return run(v, dy, x, a, shortcut, b, scale, mask, parse_act(v.op, "act", act), need_sums,
             need_shortcut_sums, need_dshortcut);
}

}  // namespace fusedres
