// residual_mix: y = act(alpha * row_scale[n] * branch + beta * shortcut), with an optional gate,
// and its backward. One launch each. The contract of the params and launches: launch.cuh.
#pragma once

#include "pack.cuh"

namespace fusedres {
namespace cuda {

struct ResidualMixParams {
  Dtype dtype;
  bool planar;
  int64_t n, c, hw;
  double alpha, beta;
  Act act;
  // Backward: branch and shortcut may be null unless there is a gate, or an act without a mask.
  const void* branch;     // [N, C, HW] scalar_t, like all activations
  const void* shortcut;   // [N, C, HW]
  const void* gate;       // [N, C, HW] or null
  const void* row_scale;  // [N] acc_t or null
  void* y;                // [N, C, HW]
  uint8_t* mask_out;      // or null
  const void* dy;         // [N, C, HW]
  const uint8_t* mask;    // or null: u comes from branch and shortcut again
  void* dbranch;          // [N, C, HW]
  void* dshortcut;        // [N, C, HW]
  void* dgate;            // [N, C, HW]; null without a gate
};

// The tensor as runs of memory, cut into packs: all of it, or one a mask row whose bits do not fill
// bytes, or one an image that has a scale of its own.
struct MixSplit {
  int64_t packs;        // of the whole tensor
  int64_t run;          // elements
  int64_t run_packs;    // packs of a run
  int64_t image_packs;  // packs of an image
  int width;            // bytes of an access
};

struct MixPlace {
  int64_t at;  // element
  int n;       // elements of the pack
  int64_t image;
};

__device__ __forceinline__ MixPlace mix_place(const MixSplit& s, int64_t pack) {
  MixPlace place{pack * kPack, kPack, 0};
  if (s.image_packs != s.packs) place.image = quotient(pack, s.image_packs);
  const int64_t run = s.run_packs == s.packs ? 0 : quotient(pack, s.run_packs);
  const int64_t first = (pack - run * s.run_packs) * kPack;
  place.at = run * s.run + first;
  if (s.run - first < kPack) place.n = static_cast<int>(s.run - first);
  return place;
}

constexpr int kMixPacks = 4;  // of a thread; not measured

// Calls f(pack, place) for the packs of this thread: kAtOnce of them have their loads in flight.
template <int kAtOnce, typename F>
__device__ __forceinline__ void for_each_mix_pack(const MixSplit& s, F f) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kMixPacks) + threadIdx.x;
#pragma unroll kAtOnce
  for (int i = 0; i < kMixPacks; ++i) {
    const int64_t pack = first + i * kThreads;
    if (pack < s.packs) f(pack, mix_place(s, pack));
  }
}

template <typename S>
struct MixFactors {
  S branch, shortcut;  // alpha * row_scale[n], beta
};

template <typename S>
__device__ __forceinline__ MixFactors<S> mix_factors(const ResidualMixParams& p, int64_t image) {
  const S* scale = static_cast<const S*>(p.row_scale);
  const double row = scale == nullptr ? 1.0 : static_cast<double>(scale[image]);
  return {static_cast<S>(p.alpha * row), static_cast<S>(p.beta)};
}

// What multiplies branch and shortcut in element i.
template <typename S>
__device__ __forceinline__ MixFactors<S> gated(const MixFactors<S>& f, bool has_gate, S gate) {
  if (!has_gate) return f;
  return {gate * f.branch, (S(1) - gate) * f.shortcut};
}

// Computes: y = act(f * branch + beta * shortcut), f = alpha * row_scale[n]; with a gate g:
//           y = act(f * g * branch + beta * (1 - g) * shortcut)   (Srivastava et al. 2015, eq. 3)
// Reads:    branch, shortcut, gate [N, C, HW] once each
// Writes:   y [N, C, HW] once; mask once, if wanted
// Traffic:  (3 + has_gate)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes; eager moves 8, or 16 with a gate
// Split:    one thread = four packs, a block's width apart; acc_t arithmetic, one rounding at the
//           store
template <typename T, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kWide>)
    residual_mix_fwd_kernel(const __grid_constant__ ResidualMixParams p,
                            const __grid_constant__ MixSplit s) {
  using S = acc_of<T>;
  const T* branch_in = static_cast<const T*>(p.branch);
  const T* shortcut_in = static_cast<const T*>(p.shortcut);
  const T* gate_in = static_cast<const T*>(p.gate);
  for_each_mix_pack<kAny ? 1 : kMixPacks>(s, [&](int64_t pack, const MixPlace& at) {
    const MixFactors<S> f = mix_factors<S>(p, at.image);
    const Pack<S> branch = load_pack<T, kWide>(branch_in + at.at, s.width, at.n);
    const Pack<S> shortcut = load_pack<T, kWide>(shortcut_in + at.at, s.width, at.n);
    Pack<S> gate{};
    if (gate_in != nullptr) gate = load_pack<T, kWide>(gate_in + at.at, s.width, at.n);
    Pack<S> z;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const MixFactors<S> g = gated(f, gate_in != nullptr, gate[i]);
      z[i] = g.branch * branch[i] + g.shortcut * shortcut[i];
    }
    if (p.mask_out != nullptr) p.mask_out[pack] = mask_byte(p.act, z, at.n);
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] = activate<kAny>(p.act, z[i]);
    store_pack<T, kWide>(static_cast<T*>(p.y) + at.at, z, s.width, at.n);
  });
}

// Computes: with u = dy * act'(z): dbranch = f * g * u, dshortcut = beta * (1 - g) * u,
//           dgate = (f * branch - beta * shortcut) * u
// Reads:    dy once, and the mask; gate, branch, shortcut once where the formula has them
// Writes:   dbranch, dshortcut, dgate [N, C, HW] once each
// Traffic:  3*N*C*HW*sizeof(T) + N*C*HW/8 bytes; 7 tensors with a gate
// Split:    as the forward's
template <typename T, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads)
    residual_mix_bwd_kernel(const __grid_constant__ ResidualMixParams p,
                            const __grid_constant__ MixSplit s) {
  using S = acc_of<T>;
  const bool has_gate = p.gate != nullptr;
  const bool finds_z = p.mask == nullptr && p.act != Act::kIdentity;
  for_each_mix_pack<kAny ? 1 : kMixPacks>(s, [&](int64_t pack, const MixPlace& at) {
    const MixFactors<S> f = mix_factors<S>(p, at.image);
    const auto load = [&](const void* from) {
      return load_pack<T, kWide>(static_cast<const T*>(from) + at.at, s.width, at.n);
    };
    Pack<S> u = load(p.dy);
    Pack<S> branch{}, shortcut{}, gate{};
    if (has_gate || finds_z) {
      branch = load(p.branch);
      shortcut = load(p.shortcut);
    }
    if (has_gate) gate = load(p.gate);
    const unsigned bits = p.mask == nullptr ? 0u : p.mask[pack];
    Pack<S> dbranch, dshortcut, dgate;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const MixFactors<S> g = gated(f, has_gate, gate[i]);
      if (finds_z) {
        const S z = g.branch * branch[i] + g.shortcut * shortcut[i];
        u[i] = act_backward(kAny ? p.act : Act::kRelu, z, u[i]);
      } else if (p.mask != nullptr) {
        u[i] = masked_gradient(p.act, bits, i, u[i]);
      }
      dbranch[i] = g.branch * u[i];
      dshortcut[i] = g.shortcut * u[i];
      dgate[i] = (f.branch * branch[i] - f.shortcut * shortcut[i]) * u[i];
    }
    const auto store = [&](void* to, const Pack<S>& values) {
      store_pack<T, kWide>(static_cast<T*>(to) + at.at, values, s.width, at.n);
    };
    store(p.dbranch, dbranch);
    store(p.dshortcut, dshortcut);
    if (has_gate) store(p.dgate, dgate);
  });
}

inline MixSplit mix_split(const ResidualMixParams& p, const void* mask, int size) {
  const int64_t cols = p.planar ? p.hw : p.c;
  const int64_t image = p.c * p.hw;
  MixSplit s{};
  s.run = p.n * image;
  if (p.row_scale != nullptr) s.run = image;
  if (mask != nullptr && cols % kPack != 0) s.run = cols;
  s.run_packs = cdiv(s.run, kPack);
  s.packs = p.n * image / s.run * s.run_packs;
  s.image_packs = p.row_scale == nullptr ? s.packs : image / s.run * s.run_packs;
  s.width = access_width(s.run * size, p.branch, p.shortcut, p.gate, p.y, p.dy, p.dbranch,
                         p.dshortcut, p.dgate);
  return s;
}

using MixKernel = void (*)(ResidualMixParams, MixSplit);

inline cudaError_t launch_mix(const ResidualMixParams& p, const MixSplit& s, MixKernel kernel,
                              cudaStream_t stream) {
  return launch(kernel, {cdiv(s.packs, kThreads * kMixPacks)}, stream, p, s);
}

template <typename T>
cudaError_t residual_mix_forward(const ResidualMixParams& p, cudaStream_t stream) {
  const MixSplit s = mix_split(p, p.mask_out, sizeof(T));
  MixKernel kernel = residual_mix_fwd_kernel<T, false, true>;
  if constexpr (sizeof(T) < sizeof(double)) {  // float64 is for gradient checks
    const bool wide = s.width == 16 && s.run % kPack == 0;
    if (wide) kernel = residual_mix_fwd_kernel<T, true, true>;
    if (wide && !needs_any(p.act)) kernel = residual_mix_fwd_kernel<T, true, false>;
  }
  return launch_mix(p, s, kernel, stream);
}

template <typename T>
cudaError_t residual_mix_backward(const ResidualMixParams& p, cudaStream_t stream) {
  const MixSplit s = mix_split(p, p.mask, sizeof(T));
  MixKernel kernel = residual_mix_bwd_kernel<T, false, true>;
  if constexpr (sizeof(T) < sizeof(double)) {
    const bool wide = s.width == 16 && s.run % kPack == 0;
    if (wide) kernel = residual_mix_bwd_kernel<T, true, true>;
    if (wide && (p.mask != nullptr || !needs_any(p.act))) {
      kernel = residual_mix_bwd_kernel<T, true, false>;
    }
  }
  return launch_mix(p, s, kernel, stream);
}

inline cudaError_t launch_residual_mix_forward(const ResidualMixParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, residual_mix_forward, p, stream);
}

inline cudaError_t launch_residual_mix_backward(const ResidualMixParams& p, cudaStream_t stream) {
  return FUSEDRES_BY_DTYPE(p.dtype, residual_mix_backward, p, stream);
}

}  // namespace cuda
}  // namespace fusedres
