// bn_se_act: z = bn(x), y = act(z * gate(mlp(mean_hw z)) + residual), and its backward: an SE
// block's tail in training, without a pass more than bn_act has. One pass over x gives the batch's
// statistics and, for each (n, c), the squeeze; the rest is arithmetic on [N, C], and one apply
// pass. The contract of the params and launches: launch.cuh.
#pragma once

#include "bn_se_vectors.cuh"
#include "squeeze_excite.cuh"

namespace fusedres {
namespace cuda {

struct BnSeActParams {
  Dtype dtype;
  bool planar;
  bool batch_stats;  // backward: whether the statistics depend on x
  int64_t n, c, hw, r;
  double eps;
  Act se_act;
  Gate gate;
  Act act;
  const void* x;         // [N, C, HW] scalar_t, like all activations
  const void* residual;  // or null
  const void* weight;    // [C] acc_t or null: ones
  const void* bias;      // [C] acc_t or null: zeros
  const void* w1;        // [R, C] acc_t
  const void* b1;        // [R] acc_t or null
  const void* w2;        // [C, R] acc_t
  const void* b2;        // [C] acc_t or null
  // Forward: null, or the statistics to use instead of the batch's. Backward: the saved ones.
  const void* given_mean;  // [C] acc_t
  const void* given_var;   // [C] acc_t
  void* mean;              // [C] acc_t, the statistics that were used
  void* var;               // [C] acc_t, biased
  // Forward: results. Backward: what the forward saved.
  void* squeezed;  // [N, C] acc_t: mean of x, not of z
  void* hidden;    // [N, R] acc_t before se_act
  void* logits;    // [N, C] acc_t before the gate
  void* y;
  uint8_t* mask_out;  // or null
  const void* dy;
  const uint8_t* mask;  // or null: u comes from x, and the residual, again
  void* dx;
  void* dresidual;  // or null
  void* dweight;    // [C] acc_t
  void* dbias;      // [C] acc_t
  void* dw1;        // acc_t, like the other gradients of the MLP
  void* db1;
  void* dw2;
  void* db2;
  void* workspace;
};

struct BnSeScratch {
  void *part1, *part2, *bn_scale;                            // [parts, C] twice, [C]
  void *pooled, *gates, *scale, *shift, *dlogits, *dpooled;  // [N, C]
  void *sum_u, *sum_ux, *q, *r;                              // [N, C]
  void* dhidden;                                             // [N, R]
  int64_t bytes;
  explicit BnSeScratch(const BnSeActParams& p) {
    const int64_t acc = p.dtype == kFloat64 ? 8 : 4;
    const int64_t parts = tiling_of(p.planar, p.n, p.c, p.hw, true).parts();
    Workspace w(p.workspace);
    part1 = w.take(parts * p.c * acc);
    part2 = w.take(parts * p.c * acc);
    bn_scale = w.take(p.c * acc);
    for (void** each :
         {&pooled, &gates, &scale, &shift, &dlogits, &dpooled, &sum_u, &sum_ux, &q, &r}) {
      *each = w.take(p.n * p.c * acc);
    }
    dhidden = w.take(p.n * p.r * acc);
    bytes = w.used();
  }
};

inline BnSeVectors bn_se_vectors(const BnSeActParams& p, const BnSeScratch& s) {
  BnSeVectors v{};
  v.n = p.n;
  v.c = p.c;
  v.hw = static_cast<double>(p.hw);
  v.eps = p.eps;
  v.batch_stats = p.batch_stats;
  v.gate = p.gate;
  v.bn_scale = s.bn_scale;
  v.bias = p.bias;
  v.squeezed = p.squeezed;
  v.logits = p.logits;
  v.pooled = s.pooled;
  v.gates = s.gates;
  v.scale = s.scale;
  v.shift = s.shift;
  v.sum_u = s.sum_u;
  v.sum_ux = s.sum_ux;
  v.dlogits = s.dlogits;
  v.dpooled = s.dpooled;
  v.dweight = p.dweight;
  v.dbias = p.dbias;
  v.q = s.q;
  v.r = s.r;
  return v;
}

inline MlpParams bn_se_mlp(const BnSeActParams& p, const BnSeScratch& s) {
  MlpParams m{p.n,  p.c,      p.r,      p.se_act, p.gate,  p.w1,      p.b1,      p.w2,
              p.b2, s.pooled, p.hidden, p.logits, s.gates, s.dlogits, s.dhidden, s.dpooled};
  m.divisor = static_cast<double>(p.hw);
  m.dw1 = p.dw1;
  m.db1 = p.db1;
  m.dw2 = p.dw2;
  m.db2 = p.db2;
  return m;
}

template <typename T>
StreamParams bn_se_stream_params(const BnSeActParams& p, const BnSeScratch& s) {
  SqueezeExciteParams tensors{};
  tensors.planar = p.planar;
  tensors.n = p.n;
  tensors.c = p.c;
  tensors.hw = p.hw;
  tensors.post_act = p.act;
  tensors.x = p.x;
  tensors.residual = p.residual;
  tensors.y = p.y;
  tensors.mask_out = p.mask_out;
  tensors.dy = p.dy;
  tensors.mask = p.mask;
  tensors.dx = p.dx;
  tensors.dresidual = p.dresidual;
  StreamParams a = se_stream_params<T>(tensors);
  a.part1 = s.part1;
  a.part2 = s.part2;
  a.scale = s.scale;
  a.bias = s.shift;
  return a;
}

inline FinalizeParams bn_se_finalize_params(const BnSeActParams& p, const BnSeScratch& s,
                                            const Tiling& t) {
  FinalizeParams f{};
  f.c = p.c;
  f.parts = t.parts();
  f.part_length = p.planar ? t.segment * kPack : t.tile_rows;
  f.run_length = p.hw;
  f.parts_of_run = p.planar ? t.segments : t.tiles;
  f.count = static_cast<double>(p.n * p.hw);
  f.eps = p.eps;
  f.part1 = s.part1;
  f.part2 = s.part2;
  f.given1 = p.given_mean;
  f.given2 = p.given_var;
  f.weight = p.weight;
  f.out1 = p.mean;
  f.out2 = p.var;
  f.scale = s.bn_scale;
  return f;
}

template <typename T>
cudaError_t bn_se_act_forward(const BnSeActParams& p, cudaStream_t stream) {
  using S = acc_of<T>;
  const BnSeScratch s(p);
  StreamParams a = bn_se_stream_params<T>(p, s);
  const FinalizeParams f = bn_se_finalize_params(p, s, a.tiling);
  BnSeVectors v = bn_se_vectors(p, s);
  v.mean = p.mean;
  cudaError_t error = stream_stats<T>(a, stream);
  ImageSumsParams sums{p.n, p.c, f.parts / p.n, s.part1, v.hw, p.squeezed, nullptr, p.gate};
  if (error == cudaSuccess) error = launch_image_sums<S>(sums, stream);
  if (error == cudaSuccess) {
    error = p.given_mean != nullptr ? launch_scale<S>(f, stream)
                                    : launch_finalize(bn_stats_finalize_kernel<S>, f, stream);
  }
  if (error == cudaSuccess) error = launch_vectors(bn_se_pool_kernel<S>, v, p.n * p.c, stream);
  if (error == cudaSuccess) error = mlp_forward<S>(bn_se_mlp(p, s), stream);
  if (error == cudaSuccess) {
    error = launch_vectors(bn_se_gate_kernel<S, false>, v, p.n * p.c, stream);
  }
  if (error != cudaSuccess) return error;
  a.center = p.mean;
  a.out = p.y;
  return forward_apply<T>(a, stream);
}

// What the forward did not keep: bn_scale, the pooled z, gates, and the coefficients of z.
template <typename S>
cudaError_t bn_se_again(const FinalizeParams& f, const BnSeVectors& v, cudaStream_t stream) {
  cudaError_t error = launch_scale<S>(f, stream);
  if (error == cudaSuccess) error = launch_vectors(bn_se_pool_kernel<S>, v, v.n * v.c, stream);
  if (error != cudaSuccess) return error;
  return launch_vectors(bn_se_gate_kernel<S, false>, v, v.n * v.c, stream);
}

template <typename T>
cudaError_t bn_se_act_backward(const BnSeActParams& p, cudaStream_t stream) {
  using S = acc_of<T>;
  const BnSeScratch s(p);
  StreamParams a = bn_se_stream_params<T>(p, s);
  const FinalizeParams f = bn_se_finalize_params(p, s, a.tiling);
  BnSeVectors v = bn_se_vectors(p, s);
  v.mean = a.center = p.given_mean;
  v.var = p.given_var;
  cudaError_t error = bn_se_again<S>(f, v, stream);
  if (error == cudaSuccess) error = backward_reduce<T>(a, stream);
  ImageSumsParams sums{p.n, p.c, f.parts / p.n, s.part1, 1.0, s.sum_u, nullptr, p.gate};
  if (error == cudaSuccess) error = launch_image_sums<S>(sums, stream);
  sums.parts = s.part2;
  sums.out = s.sum_ux;
  if (error == cudaSuccess) error = launch_image_sums<S>(sums, stream);
  if (error == cudaSuccess) {
    error = launch_vectors(bn_se_gate_kernel<S, true>, v, p.n * p.c, stream);
  }
  if (error == cudaSuccess) error = mlp_backward<S>(bn_se_mlp(p, s), stream);
  if (error == cudaSuccess) {
    error = launch_vectors(bn_se_bwd_finalize_kernel<S>, v, p.c, stream);
  }
  if (error != cudaSuccess) return error;
  a.p = s.scale;
  a.q = p.batch_stats ? s.q : nullptr;
  a.r = s.r;
  a.out = p.dx;
  a.dresidual = p.dresidual;
  return backward_apply<T>(a, stream);
}

inline int64_t bn_se_act_forward_workspace(const BnSeActParams& p) { return BnSeScratch(p).bytes; }

inline int64_t bn_se_act_backward_workspace(const BnSeActParams& p) { return BnSeScratch(p).bytes; }

inline cudaError_t launch_bn_se_act_forward(const BnSeActParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, bn_se_act_forward, p, stream);
}

inline cudaError_t launch_bn_se_act_backward(const BnSeActParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, bn_se_act_backward, p, stream);
}

}  // namespace cuda
}  // namespace fusedres
