// bn_act: y = act((x - mean) * rstd * weight + bias + residual), its backward, and bn_stats.
// Streaming passes, or one cooperative launch (bn_act_whole.cuh) where the tensor fits on the chip.
// The contract of the params and launches: launch.cuh.
#pragma once

#include "bn_act_whole.cuh"

namespace fusedres {
namespace cuda {

enum class BnVariant : int { kBySize, kStreaming, kWhole };

struct BnActParams {
  Dtype dtype;
  int variant;  // a BnVariant; kWhole fails with cudaErrorNotSupported where it does not fit
  bool planar;
  bool batch_stats;  // backward: whether the statistics depend on x
  int64_t n, c, hw;
  double eps;
  Act act;
  const void* x;         // [N, C, HW] scalar_t, like all activations
  const void* residual;  // or null
  const void* weight;    // [C] acc_t or null: ones
  const void* bias;      // [C] acc_t or null: zeros
  // Forward: null, or the statistics to use instead of the batch's. Backward: the saved ones.
  const void* given_mean;  // [C] acc_t
  const void* given_var;   // [C] acc_t
  void* y;                 // forward; null: the statistics alone (bn_stats)
  void* mean;              // [C] acc_t, the statistics that were used
  void* var;               // [C] acc_t, biased
  uint8_t* mask_out;       // or null
  const void* dy;
  const uint8_t* mask;  // or null: u comes from x, and the residual, again
  void* dx;
  void* dresidual;  // or null
  void* dweight;    // [C] acc_t
  void* dbias;      // [C] acc_t
  void* workspace;
};

template <typename T>
StreamParams bn_stream_params(const BnActParams& p) {
  StreamParams a{};
  a.tiling = tiling_of(p.planar, p.n, p.c, p.hw, false);
  a.x = p.x;
  a.dy = p.dy;
  a.residual = p.residual;
  a.mask = p.mask;
  a.mask_out = p.mask_out;
  a.bias = p.bias;
  a.act = p.act;
  a.width = access_width(a.tiling.cols * static_cast<int64_t>(sizeof(T)), p.x, p.residual, p.y,
                         p.dy, p.dx, p.dresidual);
  return a;
}

// Where the parts and coefficients of a call lie in its workspace.
struct BnScratch {
  void *part1, *part2, *scale, *q, *r;
  int64_t bytes;
  BnScratch(const BnActParams& p, bool parts) {
    const int64_t acc = p.dtype == kFloat64 ? 8 : 4;
    const int64_t sums = parts ? tiling_of(p.planar, p.n, p.c, p.hw, false).parts() : 0;
    Workspace w(p.workspace);
    part1 = w.take(sums * p.c * acc);
    part2 = w.take(sums * p.c * acc);
    scale = w.take(p.c * acc);
    q = w.take(p.c * acc);
    r = w.take(p.c * acc);
    bytes = w.used();
  }
};

inline FinalizeParams finalize_params(const BnActParams& p, const Tiling& t, const BnScratch& s) {
  FinalizeParams f{};
  f.c = p.c;
  f.parts = t.parts();
  f.part_length = p.planar ? t.segment * kPack : t.tile_rows;
  f.run_length = p.planar ? p.hw : t.rows;
  f.parts_of_run = p.planar ? t.segments : t.tiles;
  f.count = static_cast<double>(p.n * p.hw);
  f.eps = p.eps;
  f.part1 = s.part1;
  f.part2 = s.part2;
  f.given1 = p.given_mean;
  f.given2 = p.given_var;
  f.weight = p.weight;
  f.scale = s.scale;
  f.q = s.q;
  f.r = s.r;
  return f;
}

// Puts a tiling in `a` in which kTensors are on the chip, if they are to be: where they fit, and
// all blocks are resident together.
template <typename T, int kTensors>
cudaError_t choose_whole(const BnActParams& p, WholeKernel kernel, StreamParams* a, bool* whole,
                         int64_t* shared_bytes) {
  *whole = false;
  if (p.variant == static_cast<int>(BnVariant::kStreaming)) return cudaSuccess;
  Device device;
  cudaError_t error = read_device(&device);
  if (error != cudaSuccess) return error;
  const bool wanted = p.variant == static_cast<int>(BnVariant::kWhole);
  const Tiling t = whole_tiling<T, kTensors>(*a, device, shared_bytes);
  int64_t resident = 0;
  if (t.tiles > 0) {
    error =
        resident_blocks(reinterpret_cast<const void*>(kernel), *shared_bytes, device, &resident);
  }
  *whole = t.tiles > 0 && whole_blocks(t) <= resident;
  if (*whole) a->tiling = t;
  return error == cudaSuccess && wanted && !*whole ? cudaErrorNotSupported : error;
}

template <typename T>
cudaError_t bn_act_forward(const BnActParams& p, cudaStream_t stream) {
  using S = acc_of<T>;
  const BnScratch scratch(p, p.given_mean == nullptr);
  StreamParams a = bn_stream_params<T>(p);
  a.part1 = scratch.part1;
  a.part2 = scratch.part2;
  a.center = p.mean;
  a.scale = scratch.scale;
  a.out = p.y;
  FinalizeParams f = finalize_params(p, a.tiling, scratch);
  f.out1 = p.mean;
  f.out2 = p.var;
  cudaError_t error = cudaSuccess;
  if (p.given_mean != nullptr) {
    error = launch_scale<S>(f, stream);
  } else {
    bool whole = false;
    int64_t shared_bytes = 0;
    const WholeKernel kernel = whole_forward<T>(a);
    if (p.y != nullptr) error = choose_whole<T, 1>(p, kernel, &a, &whole, &shared_bytes);
    if (error != cudaSuccess) return error;
    if (whole) return launch_whole(kernel, a, f, shared_bytes, stream);
    error = stream_stats<T>(a, stream);
    if (error == cudaSuccess) error = launch_finalize(bn_stats_finalize_kernel<S>, f, stream);
  }
  if (error != cudaSuccess || p.y == nullptr) return error;
  return forward_apply<T>(a, stream);
}

template <typename T>
cudaError_t bn_act_backward(const BnActParams& p, cudaStream_t stream) {
  using S = acc_of<T>;
  const BnScratch scratch(p, true);
  StreamParams a = bn_stream_params<T>(p);
  a.part1 = scratch.part1;
  a.part2 = scratch.part2;
  a.center = p.given_mean;
  a.scale = scratch.scale;
  FinalizeParams f = finalize_params(p, a.tiling, scratch);
  f.out1 = p.dbias;
  f.out2 = p.dweight;
  a.q = p.batch_stats ? scratch.q : nullptr;
  a.r = p.batch_stats ? scratch.r : nullptr;
  a.out = p.dx;
  a.dresidual = p.dresidual;
  bool whole = false;
  int64_t shared_bytes = 0;
  const WholeKernel kernel = whole_backward<T>(a);
  cudaError_t error = choose_whole<T, 2>(p, kernel, &a, &whole, &shared_bytes);
  if (error != cudaSuccess) return error;
  if (whole) {
    a.scale = nullptr;  // it makes that itself
    return launch_whole(kernel, a, f, shared_bytes, stream);
  }
  if (finds_z(a)) error = launch_scale<S>(f, stream);
  if (error == cudaSuccess) error = backward_reduce<T>(a, stream);
  if (error == cudaSuccess) error = launch_finalize(bn_bwd_finalize_kernel<S>, f, stream);
  if (error != cudaSuccess) return error;
  a.p = scratch.scale;
  return backward_apply<T>(a, stream);
}

inline int64_t bn_act_forward_workspace(const BnActParams& p) {
  return BnScratch(p, p.given_mean == nullptr).bytes;
}

inline int64_t bn_act_backward_workspace(const BnActParams& p) { return BnScratch(p, true).bytes; }

inline cudaError_t launch_bn_act_forward(const BnActParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, bn_act_forward, p, stream);
}

inline cudaError_t launch_bn_act_backward(const BnActParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, bn_act_backward, p, stream);
}

}  // namespace cuda
}  // namespace fusedres
