// Adds up the parts of a reduction, and turns the sums into coefficients of the apply pass.
#pragma once

#include "stream.cuh"

namespace fusedres {
namespace cuda {

struct FinalizeParams {
  int64_t c, parts;
  int64_t part_length, run_length, parts_of_run;  // values: parts of a run are equal but the last
  int64_t period, padding;  // kPadded: the last `padding` of every `period` values are none
  double count;             // values of a channel
  double eps;
  const void* part1;   // acc_t [parts, C]
  const void* part2;   // acc_t [parts, C]
  const void* given1;  // acc_t [C]: mean and var instead of parts; backward: the saved ones
  const void* given2;
  const void* weight;  // acc_t [C] or null
  void* out1;          // acc_t [C]: mean; backward: dbias
  void* out2;          // acc_t [C]: var; backward: dweight
  void* scale;         // acc_t [C]: weight * rstd
  void* q;             // acc_t [C]: backward
  void* r;
};

constexpr int kFinalizeChannels = 32;
constexpr int kFinalizeLanes = kThreads / kFinalizeChannels;

// The sums over parts of two values, in double: every kFinalizeLanes-th part in a thread, then the
// threads of a channel in order. add(part) adds one part to the thread's. True in the thread that
// has the result.
template <typename Add>
__device__ __forceinline__ bool sum_parts(const FinalizeParams& f, int64_t channel, double* a,
                                          double* b, Add add) {
  FUSEDRES_SHARED(double, first, kThreads);
  FUSEDRES_SHARED(double, second, kThreads);
  const int lane = static_cast<int>(threadIdx.x) / kFinalizeChannels;
  if (channel < f.c) {
    for (int64_t part = lane; part < f.parts; part += kFinalizeLanes) add(part);
  }
  first[threadIdx.x] = *a;
  second[threadIdx.x] = *b;
  __syncthreads();
  if (lane != 0 || channel >= f.c) return false;
  for (int i = 1; i < kFinalizeLanes; ++i) {
    *a += first[i * kFinalizeChannels + threadIdx.x];
    *b += second[i * kFinalizeChannels + threadIdx.x];
  }
  return true;
}

__device__ __forceinline__ int64_t finalize_channel() {
  return static_cast<int64_t>(blockIdx.x) * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
}

template <typename S>
__device__ __forceinline__ S scale_of(const FinalizeParams& f, int64_t channel, S var) {
  const S weight = f.weight == nullptr ? S(1) : static_cast<const S*>(f.weight)[channel];
  return weight * bn_rstd(var, f.eps);
}

// Values of a part.
template <bool kPadded>
__device__ __forceinline__ double part_count(const FinalizeParams& f, int64_t part) {
  const int64_t begin = (part - quotient(part, f.parts_of_run) * f.parts_of_run) * f.part_length;
  const int64_t left = f.run_length - begin;
  int64_t values = left < f.part_length ? left : f.part_length;
  if (kPadded) {
    values -= f.padding * (quotient(begin + values, f.period) - quotient(begin, f.period));
  }
  return static_cast<double>(values);
}

// The mean of a channel's values in a part.
template <typename S, bool kPadded = false>
__device__ __forceinline__ double part_mean(const FinalizeParams& f, int64_t channel,
                                            int64_t part) {
  const double sum = static_cast<double>(static_cast<const S*>(f.part1)[part * f.c + channel]);
  return sum / part_count<kPadded>(f, part);
}

// Adds a part's deviations from a shift: of its values, and of their squares.
template <typename S, bool kPadded = false>
__device__ __forceinline__ void add_moments(const FinalizeParams& f, int64_t channel, int64_t part,
                                            double shift, double* off, double* square) {
  const double n = part_count<kPadded>(f, part);
  const double d = part_mean<S, kPadded>(f, channel, part) - shift;
  *off += n * d;
  *square += static_cast<double>(static_cast<const S*>(f.part2)[part * f.c + channel]) + n * d * d;
}

template <typename S>
__device__ __forceinline__ void set_statistics(const FinalizeParams& f, int64_t channel,
                                               double shift, double off, double square) {
  const double found = (square - off * off / f.count) / f.count;
  const S var = static_cast<S>(found < 0 ? 0 : found);  // keeps NaN
  static_cast<S*>(f.out1)[channel] = static_cast<S>(shift + off / f.count);
  static_cast<S*>(f.out2)[channel] = var;
  static_cast<S*>(f.scale)[channel] = scale_of(f, channel, var);
}

// Adds a part's sums of u and of u * (x - mean).
template <typename S>
__device__ __forceinline__ void add_sums(const FinalizeParams& f, int64_t channel, int64_t part,
                                         double* dbias, double* sum_ux) {
  *dbias += static_cast<double>(static_cast<const S*>(f.part1)[part * f.c + channel]);
  *sum_ux += static_cast<double>(static_cast<const S*>(f.part2)[part * f.c + channel]);
}

// q and r as in bn_math.h.
template <typename S>
__device__ __forceinline__ void set_gradients(const FinalizeParams& f, int64_t channel,
                                              double dbias, double sum_ux) {
  const S var = static_cast<const S*>(f.given2)[channel];
  const S rstd = bn_rstd(var, f.eps);
  const S scale = scale_of(f, channel, var);
  const double dweight = sum_ux * static_cast<double>(rstd);
  static_cast<S*>(f.out1)[channel] = static_cast<S>(dbias);
  static_cast<S*>(f.out2)[channel] = static_cast<S>(dweight);
  static_cast<S*>(f.scale)[channel] = scale;
  static_cast<S*>(f.q)[channel] = bn_backward_q(scale, rstd, dweight, f.count);
  static_cast<S*>(f.r)[channel] = bn_backward_r(scale, dbias, f.count);
}

// Computes: mean and biased variance of each channel from its parts, scale = weight * rstd
// Reads:    part1 (sums), part2 (squared deviations) [parts, C]
// Writes:   out1 (mean), out2 (var), scale [C]
// Traffic:  2*parts*C*sizeof(acc_t) bytes
// Split:    one block = 32 channels; double sums in a fixed order, around the first part's mean
template <typename S>
__global__ void __launch_bounds__(kThreads)
    bn_stats_finalize_kernel(const __grid_constant__ FinalizeParams f) {
  const int64_t channel = finalize_channel();
  const double shift = channel < f.c ? part_mean<S>(f, channel, 0) : 0.0;
  double off = 0;
  double square = 0;
  const auto add = [&](int64_t part) { add_moments<S>(f, channel, part, shift, &off, &square); };
  if (sum_parts(f, channel, &off, &square, add)) set_statistics<S>(f, channel, shift, off, square);
}

// Computes: scale = weight * rstd of given statistics; copies them to out1, out2 if wanted
// Reads:    given1, given2, weight [C]
// Writes:   scale, out1, out2 [C]
// Traffic:  up to 6*C*sizeof(acc_t) bytes
// Split:    one thread = one channel
template <typename S>
__global__ void __launch_bounds__(kThreads)
    bn_scale_kernel(const __grid_constant__ FinalizeParams f) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= f.c) return;
  const S var = static_cast<const S*>(f.given2)[channel];
  static_cast<S*>(f.scale)[channel] = scale_of(f, channel, var);
  if (f.out1 == nullptr) return;
  static_cast<S*>(f.out1)[channel] = static_cast<const S*>(f.given1)[channel];
  static_cast<S*>(f.out2)[channel] = var;
}

// Computes: dbias = sum u, dweight = rstd * sum u * (x - mean), and the coefficients of dx:
//           scale = weight * rstd, q, r (bn_math.h)
// Reads:    part1, part2 [parts, C]; given2 (var), weight [C]
// Writes:   out1 (dbias), out2 (dweight), scale, q, r [C]
// Traffic:  2*parts*C*sizeof(acc_t) bytes
// Split:    one block = 32 channels; double sums in a fixed order
template <typename S>
__global__ void __launch_bounds__(kThreads)
    bn_bwd_finalize_kernel(const __grid_constant__ FinalizeParams f) {
  const int64_t channel = finalize_channel();
  double dbias = 0;
  double sum_ux = 0;
  const auto add = [&](int64_t part) { add_sums<S>(f, channel, part, &dbias, &sum_ux); };
  if (sum_parts(f, channel, &dbias, &sum_ux, add)) set_gradients<S>(f, channel, dbias, sum_ux);
}

using FinalizeKernel = void (*)(FinalizeParams);

inline cudaError_t launch_finalize(FinalizeKernel kernel, const FinalizeParams& f,
                                   cudaStream_t stream) {
  return launch(kernel, {cdiv(f.c, kFinalizeChannels)}, stream, f);
}

template <typename S>
cudaError_t launch_scale(const FinalizeParams& f, cudaStream_t stream) {
  return launch(bn_scale_kernel<S>, {cdiv(f.c, kThreads)}, stream, f);
}

}  // namespace cuda
}  // namespace fusedres
