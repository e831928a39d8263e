// Convolution on Hopper: an implicit GEMM whose operands the copy engine brings in (TMA, im2col)
// and whose products a warpgroup starts from shared memory (wgmma). Rows are pixels of the result,
// columns its channels, the inner dimension the window's taps times x's channels, 64 at a time.
//
// A block is persistent: one warpgroup of which one thread asks for copies, two that multiply, 64
// rows each. They meet at two mbarriers a stage: `full` when its bytes are there, `empty` when all
// warps that read it are done. The producer runs ahead into the next tile while the others store.
#pragma once

#include "conv.cuh"
#include "hopper.cuh"
#include "tensor_map.cuh"

namespace fusedres {
namespace cuda {

constexpr int kConvRows = 128;       // of a tile
constexpr int kConvConsumers = 256;  // threads
constexpr int kConvThreads = 128 + kConvConsumers;
constexpr int kConvWarps = kConvConsumers / 32;  // that consume
constexpr int kConvBarrier = 1;                  // named barrier of the consumers

// 192 KiB of stages; 8 of them cover more than 500 ns at the rate of 64 columns
// (docs/performance.md)
constexpr int conv_stages(int columns) { return columns == 64 ? 8 : columns == 128 ? 6 : 4; }

// A convolution as the kernel sees it.
struct ConvSm90 {
  ConvOut out;
  int64_t rows, tiles, column_tiles;
  int pixels, width;   // of an image of the result, of a row of it
  int c_steps, steps;  // of a tap, of all
  bool im2col;         // else x is a matrix [rows, C]
  Window window;
};

// A block's shared memory. The stages are where the swizzle wants them, at multiples of 1024.
template <int kColumns>
struct ConvStages {
  static constexpr int kStages = conv_stages(kColumns);
  static constexpr int kXBytes = kConvRows * kBoxChannels * 2;
  static constexpr int kWeightBytes = kColumns * kBoxChannels * 2;
  unsigned char x[kStages][kXBytes];
  unsigned char weight[kStages][kWeightBytes];
  uint64_t full[kStages], empty[kStages];
  Coefficient<kColumns> table;
  MomentTable<kConvWarps, kColumns> moments;
};

// Which stage is next; a phase of its barriers has the parity of the round.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

#if defined(FUSEDRES_HAS_WGMMA)

// One thread: asks for the boxes of all tiles of this block.
template <int kColumns>
__device__ __forceinline__ void conv_produce(const CUtensorMap& x_map,
                                             const CUtensorMap& weight_map, const ConvSm90& a,
                                             ConvStages<kColumns>* s) {
  using Stages = ConvStages<kColumns>;
  Ring<Stages::kStages> ring;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int part = static_cast<int>(quotient(tile, a.column_tiles));
    const int channel = static_cast<int>(tile - part * a.column_tiles) * kColumns;
    const int row = part * kConvRows;
    const int image = row / a.pixels;
    const int line = row % a.pixels / a.width;
    const Pixel corner{image, line * a.window.stride[0] - a.window.pad[0],
                       row % a.pixels % a.width * a.window.stride[1] - a.window.pad[1]};
    int c = 0;
    int tap = 0;
    int tap_h = 0;  // offsets of the tap
    int tap_w = 0;
    for (int step = 0; step < a.steps; ++step) {
      uint64_t* const full = &s->full[ring.stage];
      mbarrier_wait(&s->empty[ring.stage], ring.parity ^ 1);  // the first round passes
      mbarrier_arrive_expect(full, Stages::kXBytes + Stages::kWeightBytes);
      if (a.im2col) {
        tensor_copy_im2col(s->x[ring.stage], &x_map, c, corner, tap_h, tap_w, full);
      } else {
        tensor_copy(s->x[ring.stage], &x_map, c, row, full);
      }
      tensor_copy(s->weight[ring.stage], &weight_map, c, tap, channel, full);
      ring.advance();
      c += kBoxChannels;
      if (c < a.c_steps * kBoxChannels) continue;
      c = 0;
      ++tap;
      tap_w += a.window.dilation[1];
      if (tap_w < a.window.taps[1] * a.window.dilation[1]) continue;
      tap_w = 0;
      tap_h += a.window.dilation[0];
    }
  }
}

// The sums of one tile: 64 rows in a warpgroup.
template <typename T, int kColumns>
__device__ __forceinline__ void conv_multiply(const ConvSm90& a, ConvStages<kColumns>* s,
                                              Ring<ConvStages<kColumns>::kStages>* ring,
                                              float (&sums)[kColumns / 2]) {
  const bool leads = threadIdx.x % 32 == 0;
  const int own = static_cast<int>(threadIdx.x) / 128 - 1;
  int before = 0;  // the stage of the products that may still run
  for (int step = 0; step < a.steps; ++step) {
    mbarrier_wait(&s->full[ring->stage], ring->parity);
    const uint64_t x = wgmma_operand(s->x[ring->stage] + own * (64 * kBoxChannels * 2));
    const uint64_t weight = wgmma_operand(s->weight[ring->stage]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBoxChannels / 16; ++k) {
      wgmma<T>(sums, operand_at(x, k), operand_at(weight, k), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>(sums);
    if (step > 0 && leads) mbarrier_arrive(&s->empty[before]);
    before = ring->stage;
    ring->advance();
  }
  wgmma_wait<0>(sums);
  if (leads) mbarrier_arrive(&s->empty[before]);
}

// A warpgroup's share of all tiles of this block.
template <typename T, int kColumns, bool kAny>
__device__ __forceinline__ void conv_consume(const ConvSm90& a, ConvStages<kColumns>* s) {
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const auto meet = [] { named_barrier(kConvBarrier, kConvConsumers); };
  Ring<ConvStages<kColumns>::kStages> ring;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t part = quotient(tile, a.column_tiles);
    const OutTile out{part, (tile - part * a.column_tiles) * kColumns, a.out.channels, 0,
                      thread / 32};
    meet();  // nobody reads the tables of the tile before any more
    coefficients(a.out, out, thread, kConvConsumers, &s->table);
    float sums[1][kColumns / 8][4];
    conv_multiply<T>(a, s, &ring, reinterpret_cast<float (&)[kColumns / 2]>(sums));
    const auto row_of = [&](int, int h) {
      const int64_t row = part * kConvRows + thread / 32 * 16 + 8 * h + thread % 32 / 4;
      return row < a.rows ? row : -1;
    };
    meet();  // the coefficients are there
    store_tile<T, true, kAny>(a.out, out, s->table, sums, row_of);
    if (a.out.part1 != nullptr) {
      tile_moments(a.out, out, thread, kConvConsumers, sums, row_of, &s->moments, meet);
    }
  }
}

#endif

// Computes: y = act(scale * conv(x) + shift + residual); sums and M2 of tiles of y
// Reads:    x [N, H, W, C] once a tap and block of columns, from the L2 after the first; weight
//           [K, KH, KW, C], from the L2; residual [N, P, Q, K] once; the channels' parameters [K]
// Writes:   y [N, P, Q, K] once; part1, part2 [tiles, K] fp32 where wanted
// Traffic:  (N*H*W*C + (1 + has_residual)*N*P*Q*K + K*KH*KW*C)*2 bytes (+ 8*K*N*P*Q/128)
// Split:    one block = tiles of 128 pixels and kColumns channels, columns first: neighbours read
//           the same pixels; fp32 sums in tensor cores, one rounding at the store
template <typename T, int kColumns, bool kAny>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ ConvSm90 a) {
#if defined(FUSEDRES_HAS_WGMMA)
  using Stages = ConvStages<kColumns>;
  FUSEDRES_DYNAMIC_SHARED(Stages, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages::kStages; ++i) {
      mbarrier_init(&s->full[i], 1);
      mbarrier_init(&s->empty[i], kConvWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  // 65536 registers for 384 threads are 168 each; the producer's warpgroup needs few of them
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) conv_produce(x_map, weight_map, a, s);
  } else {
    take_registers<232>();
    conv_consume<T, kColumns, kAny>(a, s);
  }
#endif
}

// --- launches

// Whether this library has the kernels: one for sm_90 without the a runs on the same GPUs.
#if defined(FUSEDRES_CUDA_ON_HOST) || defined(FUSEDRES_SM90A)
constexpr bool kHasConvSm90 = true;
#else
constexpr bool kHasConvSm90 = false;
#endif

inline Window window_of(const ConvShape& g) {
  const auto two = [](int64_t h, int64_t w, int (&out)[2]) {
    out[0] = static_cast<int>(h);
    out[1] = static_cast<int>(w);
  };
  Window w{};
  two(g.kh, g.kw, w.taps);
  two(g.stride_h, g.stride_w, w.stride);
  two(g.pad_h, g.pad_w, w.pad);
  two(g.dilation_h, g.dilation_w, w.dilation);
  return w;
}

// A window of one tap that moves by one pixel: x is the matrix [rows, C].
inline bool is_matrix(const ConvShape& g) {
  return g.kh * g.kw == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

// Why conv_sm90_kernel cannot do this, or null.
inline const char* why_not_conv_sm90(const ConvIn& in, const ConvOut& out, const Device& device) {
  const ConvShape& g = in.shape;
  if (!kHasConvSm90 || device.major != 9) return "wgmma is sm_90a's";
  if (g.groups != 1) return "the tensor maps are of all channels";
  if (in.bn_mean != nullptr) return "wgmma reads x as it is in memory";
  if (!is_wide(in, out)) return "the copy engine wants rows and addresses of 16 bytes";
  if (g.rows() + kConvRows > INT32_MAX) return "the copy engine's coordinates have 32 bits";
  return is_matrix(g) ? nullptr : why_no_im2col(window_of(g));
}

// The columns of conv_sm90_kernel's tiles, or 0 for another kernel. Unless it was asked for it runs
// where x has 64 channels, a whole box. The widest tile that the channels fill and of which every
// multiprocessor has one; activations other than relu are rare: they have one tile. Not measured.
inline int conv_sm90_columns(int asked, const ConvIn& in, const ConvOut& out,
                             const Device& device) {
  const ConvShape& g = in.shape;
  const int first = static_cast<int>(ConvVariant::kSm90x64);
  if (asked >= first) return 64 << (asked - first);
  if (asked != 0 || g.c < kBoxChannels || why_not_conv_sm90(in, out, device) != nullptr) return 0;
  if (needs_any(out.act)) return 128;
  const int64_t parts = cdiv(g.rows(), kConvRows);
  if (g.k > 128 && parts * cdiv(g.k, 256) >= device.sms) return 256;
  return g.k > 64 && parts * cdiv(g.k, 128) >= device.sms ? 128 : 64;
}

template <typename T, int kColumns, bool kAny>
cudaError_t launch_conv_sm90_tile(const ConvIn& in, const ConvOut& out, const Device& device,
                                  Dtype dtype, cudaStream_t stream) {
  const ConvShape& g = in.shape;
  ConvSm90 a{};
  a.out = out;
  a.rows = g.rows();
  a.column_tiles = cdiv(g.k, kColumns);
  a.tiles = cdiv(a.rows, kConvRows) * a.column_tiles;
  a.pixels = static_cast<int>(g.p * g.q);
  a.width = static_cast<int>(g.q);
  a.c_steps = static_cast<int>(cdiv(g.c, kBoxChannels));
  a.steps = static_cast<int>(g.kh * g.kw) * a.c_steps;
  a.im2col = !is_matrix(g);
  a.window = window_of(g);
  CUtensorMap x_map, weight_map;
  cudaError_t error = a.im2col
                          ? im2col_map(&x_map, dtype, in.x, g.n, g.h, g.w, g.c, a.window, kConvRows)
                          : tiled_map(&x_map, dtype, in.x, 2, {g.c, a.rows, 0}, kConvRows);
  if (error != cudaSuccess) return error;
  error = tiled_map(&weight_map, dtype, in.weight, 3, {g.c, g.kh * g.kw, g.k}, kColumns);
  if (error != cudaSuccess) return error;
  LaunchShape shape{a.tiles < device.sms ? a.tiles : device.sms, kConvThreads};
  shape.shared_bytes = sizeof(ConvStages<kColumns>);
  return launch(conv_sm90_kernel<T, kColumns, kAny>, shape, stream, x_map, weight_map, a);
}

// Runs a convolution in tiles of `columns` columns: 64, 128 or 256, as conv_sm90_columns says. `in`
// and `out` as for the other kernels; part1 and part2 have a row for each kConvRows pixels.
template <typename T>
cudaError_t launch_conv_sm90(const ConvIn& in, const ConvOut& out, const Device& device,
                             Dtype dtype, int columns, cudaStream_t stream) {
  if (why_not_conv_sm90(in, out, device) != nullptr) return cudaErrorNotSupported;
#if defined(FUSEDRES_FEW_DTYPES)  // sanitizers of the host simulator: one tile stands for all
  (void)columns;
  const auto run = launch_conv_sm90_tile<T, 64, true>;
#else
  const bool any = needs_any(out.act);
  const auto run = any              ? launch_conv_sm90_tile<T, 128, true>
                   : columns == 64  ? launch_conv_sm90_tile<T, 64, false>
                   : columns == 128 ? launch_conv_sm90_tile<T, 128, false>
                                    : launch_conv_sm90_tile<T, 256, false>;
#endif
  return run(in, out, device, dtype, stream);
}

// Compiled once, in conv_sm90.cu.
extern template cudaError_t launch_conv_sm90<__nv_bfloat16>(const ConvIn&, const ConvOut&,
                                                            const Device&, Dtype, int,
                                                            cudaStream_t);
extern template cudaError_t launch_conv_sm90<__half>(const ConvIn&, const ConvOut&, const Device&,
                                                     Dtype, int, cudaStream_t);

}  // namespace cuda
}  // namespace fusedres
