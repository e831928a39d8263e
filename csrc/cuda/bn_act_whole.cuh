// bn_act in one cooperative launch, for a tensor that fits in the registers and the shared memory
// of all SMs: every block keeps its tile on the chip between the statistics and the apply pass, so
// that x (and dy) is read once. The grid meets twice: behind the parts of the sums, whose channels
// all warps then share, and behind the coefficients that they find. The tiles: whole_tile.cuh.
#pragma once

#include "stream_apply.cuh"
#include "whole_tile.cuh"

namespace fusedres {
namespace cuda {

// Computes: mean, var of the batch, and y = act((x - mean) * rstd * weight + bias + residual)
// Reads:    x, residual [N, C, HW] once each
// Writes:   y [N, C, HW], mask one bit an element, mean, var [C]
// Traffic:  (2 + has_residual)*N*C*HW*sizeof(T) (+ N*C*HW/8) bytes, + parts below 1% of it
// Split:    one block = a tile of rows and up to 256 channels; of a thread's rows the first are in
//           registers, the others in shared memory
template <typename T, bool kPlanar, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_fwd_whole_kernel(const __grid_constant__ StreamParams a,
                            const __grid_constant__ FinalizeParams f) {
  using S = acc_of<T>;
  constexpr int kOwn = kOwnPacks<T, 1>;
  constexpr bool kPadded = kPlanar && !kWide;
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  const WholeLane<kPlanar> lane = whole_lane<kPlanar>(a.tiling);
  const auto spot = [&](int k) { return spot_of<kWide>(a.tiling, lane, k); };
  Kept<T, kOwn> x{static_cast<const T*>(a.x), {tile}, {}};
  const int middle = keep<kWide>(a, lane, x);
  Moments<S> mine[kLaneChannels<kPlanar>] = {};
  if constexpr (kPlanar) {
    as_they_come<kOwn, kAny>(middle, lane.count, [&](int k, auto where) {
      add_pack<kWide>(&mine[0], x.take(k, where), spot(k).n);
    });
  } else {
    Pack<S> first[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) first[k] = x.take(k, InRegisters());
    if (lane.count > 0) add_rows(mine, first, lane.count < kOwn ? lane.count : kOwn);
    copy_async_wait<1>();
    nhwc_moments(kOwn, middle, mine, [&](int k) { return x.take(k, InShared()); });
    copy_async_wait<0>();
    nhwc_moments(middle, lane.count, mine, [&](int k) { return x.take(k, InShared()); });
  }
  write_parts(a, lane, mine, static_cast<S>(lane.count));
  meet(a.tiling);
  for_own_channels(a.tiling, lane, [&](int64_t channel) {
    const double shift = part_mean<S, kPadded>(f, channel, 0);
    double off = 0, square = 0;
    warp_parts(f, &off, &square, [&](int64_t part) {
      add_moments<S, kPadded>(f, channel, part, shift, &off, &square);
    });
    if (threadIdx.x % 32 == 0) set_statistics<S>(f, channel, shift, off, square);
  });
  meet(a.tiling);
  const Affine<S, kPlanar> affine(a, lane, 0);
  const auto residual_at = [&](int k) -> Pack<S> {
    if (k >= lane.count) return {};
    const Spot s = spot(k);
    return residual_of<T, kWide>(a, s.at, s.n);
  };
  const auto apply = [&](int k, auto where, const Pack<S>& residual) {
    const Spot s = spot(k);
    apply_forward<T, kPlanar, kWide, kAny>(a, affine, x.take(k, where), residual, s.at, s.byte,
                                           s.n);
  };
  if constexpr (kAny) {
    Pack<S> residual = residual_at(0);
#pragma unroll 1
    for (int k = 0; k < lane.count; ++k) {
      const Pack<S> next = residual_at(k + 1);
      apply(k, Anywhere(), residual);
      residual = next;
    }
    return;
  }
  const auto batch = [&](int k0, auto packs, auto where) {
    constexpr int kCount = decltype(packs)::value;  // whose residuals a thread waits for together
    Pack<S> residual[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) residual[j] = residual_at(k0 + j);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (k0 + j < lane.count) apply(k0 + j, where, residual[j]);
    }
  };
  batch(0, std::integral_constant<int, kOwn>(), InRegisters());
  constexpr int kAtOnce = 4;
  for (int k = kOwn; k < lane.count; k += kAtOnce) {
    batch(k, std::integral_constant<int, kAtOnce>(), InShared());
  }
}

// Computes: dweight, dbias, dx and dresidual at once (stream_bwd_reduce, stream_bwd_apply)
// Reads:    dy, x [N, C, HW] once; mask, or residual, twice if u needs it
// Writes:   dx, dresidual [N, C, HW]; dweight, dbias [C]
// Traffic:  (3 + needs_dresidual)*N*C*HW*sizeof(T) (+ N*C*HW/4) bytes, + parts below 1% of it
// Split:    as the forward's
template <typename T, bool kPlanar, bool kWide, bool kAny>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_bwd_whole_kernel(const __grid_constant__ StreamParams a,
                            const __grid_constant__ FinalizeParams f) {
  using S = acc_of<T>;
  constexpr int kOwn = kOwnPacks<T, 2>, kChannels = kLaneChannels<kPlanar>;
  FUSEDRES_DYNAMIC_SHARED(uint4, tile);
  FUSEDRES_SHARED(S, scale, kBlockChannels);
  const WholeLane<kPlanar> lane = whole_lane<kPlanar>(a.tiling);
  const auto spot = [&](int k) { return spot_of<kWide>(a.tiling, lane, k); };
  uint4* const tile_of_dy = tile + shared_packs(a.tiling, kOwn) * Held<T>::kWords * kThreads;
  Kept<T, kOwn> x{static_cast<const T*>(a.x), {tile}, {}};
  Kept<T, kOwn> dy{static_cast<const T*>(a.dy), {tile_of_dy}, {}};
  const int middle = keep<kWide>(a, lane, x, dy);
  const int64_t channel = lane.channel0 + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < a.tiling.tx * kChannels && channel < f.c) {
    scale[threadIdx.x] = scale_of(f, channel, static_cast<const S*>(f.given2)[channel]);
  }
  __syncthreads();
  Affine<S, kPlanar> affine(a, lane, 0);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) affine.scale.v[i] = scale[lane.x * kChannels + i];
  const auto gradient = [&](const Spot& s, const Pack<S>& x_k, const Pack<S>& dy_k) {
    return gradient_at_z<T, kPlanar, kWide, kAny>(a, affine, dy_k, x_k, s.at, s.byte, s.n);
  };
  Sums<S> mine[kPack] = {};
  as_they_come<kOwn, kAny>(middle, lane.count, [&](int k, auto where) {
    const Spot s = spot(k);
    const Pack<S> x_k = x.take(k, where);
    const Pack<S> u = gradient(s, x_k, dy.take(k, where));
    add_gradients<S, kWide>(mine, u, x_k, affine.center, s.n);
  });
  write_parts(a, lane, mine, S(0));
  meet(a.tiling);
  for_own_channels(a.tiling, lane, [&](int64_t c) {
    double dbias = 0, sum_ux = 0;
    warp_parts(f, &dbias, &sum_ux, [&](int64_t part) { add_sums<S>(f, c, part, &dbias, &sum_ux); });
    if (threadIdx.x % 32 == 0) set_gradients<S>(f, c, dbias, sum_ux);
  });
  meet(a.tiling);
  const BackwardMap<S, kPlanar> map{affine.scale, coefficients<S, kPlanar>(lane, a.q, 0, S(0)),
                                    coefficients<S, kPlanar>(lane, a.r, 0, S(0))};
  const bool has_q = a.q != nullptr;
  const auto apply = [&](int k, auto where) {
    const Spot s = spot(k);
    const Pack<S> x_k = x.take(k, where);
    const Pack<S> u = gradient(s, x_k, dy.take(k, where));
    apply_backward<T, kPlanar, kWide>(a, affine, map, has_q, has_q, u, x_k, s.at, s.n);
  };
  if constexpr (kAny) {
#pragma unroll 1
    for (int k = 0; k < lane.count; ++k) apply(k, Anywhere());
    return;
  }
  in_registers<kOwn>(lane.count, apply);
  for (int k = kOwn; k < lane.count; ++k) apply(k, InShared());
}

using WholeKernel = void (*)(StreamParams, FinalizeParams);

// The instantiation for a layout, alignment and activation. None for float64, of which no tensor
// has a tiling, and none for NHWC where it is not aligned.
#define FUSEDRES_WHOLE_KERNEL(kernel, T, a, any)                                               \
  (!(a).tiling.planar ? ((any) ? kernel<T, false, true, true> : kernel<T, false, true, false>) \
   : !is_wide(a)      ? kernel<T, true, false, true>                                           \
   : (any)            ? kernel<T, true, true, true>                                            \
                      : kernel<T, true, true, false>)

template <typename T>
WholeKernel whole_forward(const StreamParams& a) {
  if constexpr (sizeof(T) < 8) {
    return FUSEDRES_WHOLE_KERNEL(bn_act_fwd_whole_kernel, T, a, needs_any(a.act));
  } else {
    return nullptr;
  }
}

template <typename T>
WholeKernel whole_backward(const StreamParams& a) {
  if constexpr (sizeof(T) < 8) {
    return FUSEDRES_WHOLE_KERNEL(bn_act_bwd_whole_kernel, T, a, finds_z(a) && needs_any(a.act));
  } else {
    return nullptr;
  }
}

inline cudaError_t launch_whole(WholeKernel kernel, const StreamParams& a, FinalizeParams f,
                                int64_t shared_bytes, cudaStream_t stream) {
  set_parts(a.tiling, &f);
  LaunchShape shape{whole_blocks(a.tiling)};
  shape.shared_bytes = shared_bytes;
  shape.cooperative = true;
  return launch(kernel, shape, stream, a, f);
}

}  // namespace cuda
}  // namespace fusedres
