// What the host side and the instruction-set variants of the kernels share: plain structs, and a
// table of function pointers that each variant fills in. C headers only (see simd.h).
#pragma once

#include <stdint.h>

#include "../bn_math.h"
#include "../dtype.h"

namespace fusedres {

constexpr int64_t kChain = 128;        // longest fp32 chain of a sum before it is carried to fp64
constexpr int64_t kMaxColumns = 1024;  // columns of a reduction tile, and of a packed row
constexpr int64_t kPad = 16;           // readable elements behind every coefficient array

// How a dense tensor is cut. It is `groups` runs of memory; a group is [rows, cols] row-major.
//   NHWC, one set of coefficients:   1 group of N*HW rows, cols = C
//   NHWC, coefficients per image:    N groups of HW rows, cols = C
//   NCHW:                            N*C groups of HW rows, cols = 1
// `pack` rows are processed as one row of pack*cols columns, so that few or odd channels still fill
// vectors. A tile is tile_rows rows of one group, or a block of their columns. Nothing here depends
// on the number of threads: every sum has the same tiles in the same order.
struct Plan {
  int64_t groups, rows, cols;
  int64_t pack;
  int64_t tile_rows, tiles;       // tiles of a group, top to bottom
  int64_t col_block, col_blocks;  // blocks of a tile, left to right; 1 when pack > 1
  int64_t items() const { return groups * tiles * col_blocks; }
};

// How the gradient u = dy * act'(z) at the activation's input is found.
enum UMode : int { kUIdentity, kUMask, kURelu, kUAny, kUModes };
enum FwdAct : int { kFwdIdentity, kFwdRelu, kFwdAny, kFwdActs };

// Arguments of the streaming kernels. acc_t is float, or double for float64 tensors.
struct StreamParams {
  Plan plan;
  const void* x;  // scalar_t, in the plan's order, like every tensor here
  const void* dy;
  const void* residual;    // or null
  void* out;               // y or dx
  void* dresidual;         // or null
  const uint8_t* mask_in;  // or null
  uint8_t* mask_out;       // or null
  int64_t mask_row_bytes;  // bytes of a mask row, and of a packed row when pack > 1
  int64_t mask_group_bytes;
  const void* center;  // acc_t [center_groups, cols]: z = (x - center) * scale + bias
  const void* scale;   // acc_t [coef_groups, cols], like bias, p, q, r
  const void* bias;
  const void* p;  // dx = p * u + q * (x - center) + r; q is null when it is zero
  const void* q;
  const void* r;
  int64_t center_groups, coef_groups;  // group g reads set g % groups
  // The residual's own affine map: (residual - res_center) * res_scale + res_bias, and its gradient
  // dresidual = res_p * u + res_q * (residual - res_center) + res_r. All null: the identity.
  const void* res_center;  // acc_t [center_groups, cols], like the other five
  const void* res_scale;
  const void* res_bias;
  const void* res_p;
  const void* res_q;
  const void* res_r;
  Act act;
  double* partial1;  // [groups, tiles, cols]: mean, or sum of u
  double* partial2;  // squared deviations, or sum of u * (x - center)
  double* partial3;  // sum of u * (residual - res_center), or null
};

// Arguments of residual_mix: per image, `rows` rows of row_len elements, the last one shorter.
struct MixParams {
  int64_t images, image_elems, rows, row_len, rows_per_item, items_per_image;
  int64_t mask_row_bytes, mask_image_bytes;
  const void *dy, *branch, *shortcut, *gate;
  void *y, *dbranch, *dshortcut, *dgate;
  const uint8_t* mask_in;
  uint8_t* mask_out;
  const void* alpha;  // acc_t [images]: alpha * row_scale[n]
  double beta;
  Act act;
};

enum class Norm : int { kNone, kRms, kLayer };

// Arguments of add_norm: row-major matrices [rows, cols], statistics and scales acc_t.
struct NormParams {
  int64_t rows, cols, tile_rows, partial_ld;
  Norm norm;
  const void *branch, *shortcut;  // scalar_t
  const void *x, *dy, *dsum;      // scalar_t; x is the sum that the forward wrote
  const uint8_t* keep;            // 0 or 1 an element; or null
  const void *row_scale, *weight, *bias;
  void *y, *sum, *dshortcut, *dbranch;
  void *mean, *rstd;                    // [rows]
  void *partial_weight, *partial_bias;  // [tiles, partial_ld]
  double scale, eps;
};

// Arguments of highway and lstm_cell: scalar_t rows of `cols`, a row of parts holds `count` of
// them.
struct GateParams {
  int64_t rows, cols, count, ld;
  int64_t block, blocks;  // columns of an item, items a row
  const void *parts, *x, *dy, *dc;
  void *y, *c, *dparts, *dx;
  Act act;
};

// Arguments of the dense block's kernels. x is a slice of the buffer's channels, h is dense.
//   NHWC: `runs` rows of `cols` channels, x rows x_ld apart, one coefficient a column
//   NCHW: `runs` planes (image, channel) of `cols` pixels, one coefficient a plane
struct DenseParams {
  bool planar;
  int64_t runs, cols, channels;  // channels of the slice
  int64_t x_ld;                  // elements from one row, or image, of the buffer to the next
  int64_t tile_runs, partial_ld;
  const void *x, *dh, *dx_in;  // scalar_t; dx_in, dx have the layout of x
  void *h, *dx;
  const void *center, *scale, *bias, *q, *r;  // acc_t [channels]
  void *partial_weight, *partial_bias;        // acc_t [tiles, partial_ld]
};

// out[n, o] = bias[o] + sum_k a * w over small dense matrices, all acc_t, row-major.
struct MatmulParams {
  const void *a, *w, *bias;
  void* out;
  int64_t n, o, k;
};

using StreamFn = void (*)(const StreamParams&, int64_t begin, int64_t end);
using MixFn = void (*)(const MixParams&, int64_t begin, int64_t end);
using NormFn = void (*)(const NormParams&, int64_t begin, int64_t end);
using GateFn = void (*)(const GateParams&, int64_t begin, int64_t end);
using DenseFn = void (*)(const DenseParams&, int64_t begin, int64_t end);
using MatmulFn = void (*)(const MatmulParams&, int64_t begin, int64_t end);
using ConvertFn = void (*)(const void* from, void* to, int64_t n);

struct KernelTable {
  int id;                      // 0 portable, 1 avx2, 2 avx512
  StreamFn stats[kDtypes][2];  // [0] mean only, [1] mean and squared deviations
  StreamFn fwd_apply[kDtypes][kFwdActs];
  StreamFn bwd_reduce[kDtypes][kUModes];
  StreamFn bwd_apply[kDtypes][kUModes];
  MixFn mix_fwd[kDtypes];
  MixFn mix_bwd[kDtypes];
  NormFn norm_fwd[kDtypes];
  NormFn norm_bwd[kDtypes];
  GateFn highway_fwd[kDtypes];
  GateFn highway_bwd[kDtypes];
  GateFn lstm_fwd[kDtypes];
  GateFn lstm_bwd[kDtypes];
  DenseFn dense_load[kDtypes];
  DenseFn dense_grad[kDtypes];
  DenseFn dense_finish[kDtypes];
  MatmulFn matmul_nt[2];  // a [n, k], w [o, k]; range over o. [0] float, [1] double, also below
  MatmulFn matmul_nn[2];  // a [n, k], w [k, o]; range over blocks of 16 columns of o
  MatmulFn matmul_tn[2];  // a [n, o], w [n, k], out [o, k]; range over o
  ConvertFn to_acc[kDtypes][2];
};

namespace portable {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

// The fastest variant that this CPU can run; FUSEDRES_CPU_ISA lowers the choice.
const KernelTable& kernels();

}  // namespace fusedres
