// squeeze_excite: y = post_act(x * gate(mlp(mean_hw x)) + residual), and its backward. One launch
// that reads x (and dy) once where a cluster's shared memory holds an image
// (squeeze_excite_cluster.cuh, _bwd.cuh), or streaming passes. The contract of the params and
// launches: launch.cuh.
#pragma once

#include "squeeze_excite_cluster_bwd.cuh"
#include "stream_reduce.cuh"

namespace fusedres {
namespace cuda {

enum class SeVariant : int { kBySize, kStreaming, kCluster };

struct SqueezeExciteParams {
  Dtype dtype;
  int variant;  // an SeVariant; kCluster fails with cudaErrorNotSupported where it does not fit
  bool planar;
  int64_t n, c, hw, r;
  Act act;  // of the MLP
  Gate gate;
  Act post_act;
  const void* x;         // [N, C, HW] scalar_t, like all activations
  const void* residual;  // or null
  const void* w1;        // [R, C] acc_t
  const void* b1;        // [R] acc_t or null
  const void* w2;        // [C, R] acc_t
  const void* b2;        // [C] acc_t or null
  // Forward: results. Backward: what the forward saved.
  void* squeezed;  // [N, C] acc_t: mean of x
  void* hidden;    // [N, R] acc_t before act
  void* logits;    // [N, C] acc_t before the gate
  void* y;
  uint8_t* mask_out;  // or null
  const void* dy;
  const uint8_t* mask;  // or null: u comes from x, and the residual, again
  void* dx;
  void* dresidual;  // or null
  void* dw1;        // acc_t, like the other gradients of the MLP
  void* db1;
  void* dw2;
  void* db2;
  void* workspace;
};

template <typename T>
StreamParams se_stream_params(const SqueezeExciteParams& p) {
  StreamParams a{};
  a.tiling = tiling_of(p.planar, p.n, p.c, p.hw, true);
  a.per_image = true;
  a.x = p.x;
  a.dy = p.dy;
  a.residual = p.residual;
  a.mask = p.mask;
  a.mask_out = p.mask_out;
  a.act = p.post_act;
  a.width = access_width(a.tiling.cols * static_cast<int64_t>(sizeof(T)), p.x, p.residual, p.y,
                         p.dy, p.dx, p.dresidual);
  return a;
}

struct SeScratch {
  void *part1, *part2, *gates, *dlogits, *dhidden, *dpooled;
  int64_t bytes;
  explicit SeScratch(const SqueezeExciteParams& p) {
    const int64_t acc = p.dtype == kFloat64 ? 8 : 4;
    const int64_t parts = tiling_of(p.planar, p.n, p.c, p.hw, true).parts();
    Workspace w(p.workspace);
    part1 = w.take(parts * p.c * acc);
    part2 = w.take(parts * p.c * acc);
    gates = w.take(p.n * p.c * acc);
    dlogits = w.take(p.n * p.c * acc);
    dhidden = w.take(p.n * p.r * acc);
    dpooled = w.take(p.n * p.c * acc);
    bytes = w.used();
  }
};

struct ImageSumsParams {
  int64_t n, c, parts_of_image;
  const void* parts;  // acc_t [N * parts_of_image, C]
  double divisor;
  void* out;           // [N, C]
  const void* logits;  // [N, C]: out = gate'(logits) * sum; or null
  Gate gate;
};

// Computes: out[n, c] = sum of an image's parts / divisor, through gate' if logits are given
// Reads:    parts [N * parts_of_image, C]
// Writes:   out [N, C]
// Traffic:  parts*C*sizeof(acc_t) bytes
// Split:    one thread = one (n, c); double sums in a fixed order
template <typename S>
__global__ void __launch_bounds__(kThreads)
    se_image_sums_kernel(const __grid_constant__ ImageSumsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.n * p.c) return;
  const int64_t image = quotient(i, p.c);
  const S* from = static_cast<const S*>(p.parts) + image * p.parts_of_image * p.c + i - image * p.c;
  double sum = 0;
  for (int64_t k = 0; k < p.parts_of_image; ++k) sum += static_cast<double>(from[k * p.c]);
  S out = static_cast<S>(sum / p.divisor);
  if (p.logits != nullptr) out = gate_backward(p.gate, static_cast<const S*>(p.logits)[i], out);
  static_cast<S*>(p.out)[i] = out;
}

struct GatesParams {
  int64_t count;
  const void* logits;
  void* gates;
  Gate gate;
};

// Computes: gates = gate(logits)
// Reads:    logits [N, C]
// Writes:   gates [N, C]
// Traffic:  2*N*C*sizeof(acc_t) bytes
// Split:    one thread = one value
template <typename S>
__global__ void __launch_bounds__(kThreads) se_gates_kernel(const __grid_constant__ GatesParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  static_cast<S*>(p.gates)[i] = gate_forward(p.gate, static_cast<const S*>(p.logits)[i]);
}

inline MlpParams se_mlp_params(const SqueezeExciteParams& p, const SeScratch& s) {
  MlpParams m{};
  m.n = p.n;
  m.c = p.c;
  m.r = p.r;
  m.act = p.act;
  m.gate = p.gate;
  m.w1 = p.w1;
  m.b1 = p.b1;
  m.w2 = p.w2;
  m.b2 = p.b2;
  m.pooled = p.squeezed;
  m.hidden = p.hidden;
  m.logits = p.logits;
  m.gates = s.gates;
  m.dlogits = s.dlogits;
  m.dhidden = s.dhidden;
  m.dpooled = s.dpooled;
  m.divisor = static_cast<double>(p.hw);
  m.dw1 = p.dw1;
  m.db1 = p.db1;
  m.dw2 = p.dw2;
  m.db2 = p.db2;
  return m;
}

template <typename S>
cudaError_t launch_image_sums(const ImageSumsParams& p, cudaStream_t stream) {
  return launch(se_image_sums_kernel<S>, {cdiv(p.n * p.c, kThreads)}, stream, p);
}

// Whether a cluster is to hold `held` tensors of an image, and its arrays; then *m says how. A
// smaller cluster takes the place of one that the device cannot run. Where
// the weights are more traffic from the L2 cache than x is from memory (stage 4), the streaming
// passes read them for eight images at a time. The factor is not measured.
template <typename T>
cudaError_t choose_cluster(const SqueezeExciteParams& p, const StreamParams& a, int held,
                           SeClusterKernel kernel, int64_t (*arrays)(const SeClusterParams&),
                           SeClusterParams* m, int64_t* shared_bytes) {
  *m = {p.n, p.c, p.hw, p.r};
  m->held = held;
  if (p.variant == static_cast<int>(SeVariant::kStreaming)) return cudaSuccess;
  Device device;
  cudaError_t error = read_device(&device);
  if (error != cudaSuccess) return error;
  const bool wanted = p.variant == static_cast<int>(SeVariant::kCluster);
  const int64_t weights = 2 * p.c * p.r * static_cast<int64_t>(sizeof(float));
  const int64_t image = p.c * p.hw * static_cast<int64_t>(sizeof(T));
  int most = device.major >= 9 ? 8 : 1;
  if (!wanted && weights > 2 * image) most = 0;
  for (; most > 0; most = m->cluster / 2) {
    se_cluster_split(a, device, most, static_cast<int>(sizeof(T)), arrays, m, shared_bytes);
    if (m->cluster <= 1) break;
    bool can = false;
    error = can_run_cluster(reinterpret_cast<const void*>(kernel),
                            se_cluster_shape(*m, *shared_bytes), &can);
    if (error != cudaSuccess) return error;
    if (can) break;
  }
  if (wanted && m->cluster == 0) return cudaErrorNotSupported;
  m->w1 = p.w1;
  m->b1 = p.b1;
  m->w2 = p.w2;
  m->b2 = p.b2;
  m->squeezed = p.squeezed;
  m->hidden = p.hidden;
  m->logits = p.logits;
  m->act = p.act;
  m->gate = p.gate;
  return cudaSuccess;
}

template <typename T>
cudaError_t squeeze_excite_forward(const SqueezeExciteParams& p, cudaStream_t stream) {
  using S = acc_of<T>;
  const SeScratch scratch(p);
  StreamParams a = se_stream_params<T>(p);
  a.part1 = scratch.part1;
  a.part2 = scratch.part2;
  SeClusterParams m;
  int64_t shared_bytes = 0;
  const SeClusterKernel kernel = se_forward_kernel<T>(a);
  cudaError_t error = choose_cluster<T>(p, a, 1, kernel, SeArrays<S>::bytes, &m, &shared_bytes);
  if (error == cudaSuccess && m.cluster > 0) {
    a.out = p.y;
    return launch(kernel, se_cluster_shape(m, shared_bytes), stream, a, m);
  }
  if (error == cudaSuccess) error = stream_stats<T>(a, stream);
  ImageSumsParams sums{p.n, p.c, a.tiling.parts() / p.n, scratch.part1};
  sums.divisor = static_cast<double>(p.hw);
  sums.out = p.squeezed;
  if (error == cudaSuccess) error = launch_image_sums<S>(sums, stream);
  if (error == cudaSuccess) error = mlp_forward<S>(se_mlp_params(p, scratch), stream);
  if (error != cudaSuccess) return error;
  a.scale = scratch.gates;
  a.out = p.y;
  return forward_apply<T>(a, stream);
}

template <typename T>
cudaError_t squeeze_excite_backward(const SqueezeExciteParams& p, cudaStream_t stream) {
  using S = acc_of<T>;
  const SeScratch scratch(p);
  StreamParams a = se_stream_params<T>(p);
  a.part1 = scratch.part1;
  a.part2 = scratch.part2;
  a.out = p.dx;
  a.dresidual = p.dresidual;
  SeClusterParams m;
  int64_t shared_bytes = 0;
  const int held = finds_z(a) ? 2 : 1;
  const SeClusterKernel kernel = se_backward_kernel<T>(a);
  cudaError_t error =
      choose_cluster<T>(p, a, held, kernel, SeBackwardArrays<S>::bytes, &m, &shared_bytes);
  if (error != cudaSuccess) return error;
  if (m.cluster > 0) {
    m.dlogits = scratch.dlogits;
    m.dhidden = scratch.dhidden;
    error = launch(kernel, se_cluster_shape(m, shared_bytes), stream, a, m);
    if (error != cudaSuccess) return error;
    return mlp_weight_gradients<S>(se_mlp_params(p, scratch), stream);
  }
  a.scale = scratch.gates;
  const GatesParams gates{p.n * p.c, p.logits, scratch.gates, p.gate};
  error = launch(se_gates_kernel<S>, {cdiv(gates.count, kThreads)}, stream, gates);
  if (error == cudaSuccess) error = backward_reduce<T>(a, stream);
  ImageSumsParams sums{p.n, p.c, a.tiling.parts() / p.n, scratch.part2};  // dgate: of u * x
  sums.divisor = 1;
  sums.out = scratch.dlogits;
  sums.logits = p.logits;
  sums.gate = p.gate;
  if (error == cudaSuccess) error = launch_image_sums<S>(sums, stream);
  if (error == cudaSuccess) error = mlp_backward<S>(se_mlp_params(p, scratch), stream);
  if (error != cudaSuccess) return error;
  a.p = scratch.gates;
  a.r = scratch.dpooled;
  return backward_apply<T>(a, stream);
}

// squeeze_excite.cu; bn_se_act.cuh includes this file and launches neither
FUSEDRES_INSTANCES(extern template, squeeze_excite_forward, SqueezeExciteParams);
FUSEDRES_INSTANCES(extern template, squeeze_excite_backward, SqueezeExciteParams);

inline int64_t squeeze_excite_forward_workspace(const SqueezeExciteParams& p) {
  return SeScratch(p).bytes;
}

inline int64_t squeeze_excite_backward_workspace(const SqueezeExciteParams& p) {
  return SeScratch(p).bytes;
}

inline cudaError_t launch_squeeze_excite_forward(const SqueezeExciteParams& p,
                                                 cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, squeeze_excite_forward, p, stream);
}

inline cudaError_t launch_squeeze_excite_backward(const SqueezeExciteParams& p,
                                                  cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, squeeze_excite_backward, p, stream);
}

}  // namespace cuda
}  // namespace fusedres
