// Compiled once for each instruction set (setup.py passes -DFUSEDRES_ISA and the flags). No
// standard C++ header and no torch header may be included here: see simd.h.
#include "dense_kernels.h"
#include "gate_kernels.h"
#include "isa.h"
#include "mix_kernels.h"
#include "mlp_kernels.h"
#include "norm_kernels.h"
#include "simd.h"
#include "stream_apply.h"
#include "stream_reduce.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// Reads a parameter of any floating dtype into the accumulator's type.
template <typename T, typename S>
void to_acc_kernel(const void* from, void* to, int64_t n) {
  const T* p = static_cast<const T*>(from);
  S* out = static_cast<S*>(to);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    acc_of<T> lanes[kLanes];
    store(lanes, count == kLanes ? load(p + i) : load_n<true>(p + i, count));
    for (int k = 0; k < count; ++k) out[i + k] = static_cast<S>(lanes[k]);
  }
}

}  // namespace

#define FR_DTYPES(entry) {entry(float), entry(double), entry(BFloat16), entry(Half)}
#define FR_STATS(T) {affine_fwd_stats_kernel<T, false>, affine_fwd_stats_kernel<T, true>}
#define FR_FWD(T)                                                                  \
  {affine_fwd_apply_kernel<T, kFwdIdentity>, affine_fwd_apply_kernel<T, kFwdRelu>, \
   affine_fwd_apply_kernel<T, kFwdAny>}
#define FR_REDUCE(T)                                                             \
  {affine_bwd_reduce_kernel<T, kUIdentity>, affine_bwd_reduce_kernel<T, kUMask>, \
   affine_bwd_reduce_kernel<T, kURelu>, affine_bwd_reduce_kernel<T, kUAny>}
#define FR_APPLY(T)                                                            \
  {affine_bwd_apply_kernel<T, kUIdentity>, affine_bwd_apply_kernel<T, kUMask>, \
   affine_bwd_apply_kernel<T, kURelu>, affine_bwd_apply_kernel<T, kUAny>}
#define FR_MIX_FWD(T) residual_mix_fwd_kernel<T>
#define FR_MIX_BWD(T) residual_mix_bwd_kernel<T>
#define FR_NORM_FWD(T) add_norm_fwd_kernel<T>
#define FR_NORM_BWD(T) add_norm_bwd_kernel<T>
#define FR_HIGHWAY_FWD(T) highway_fwd_kernel<T>
#define FR_HIGHWAY_BWD(T) highway_bwd_kernel<T>
#define FR_LSTM_FWD(T) lstm_fwd_kernel<T>
#define FR_LSTM_BWD(T) lstm_bwd_kernel<T>
#define FR_DENSE_LOAD(T) dense_load_kernel<T>
#define FR_DENSE_GRAD(T) dense_grad_kernel<T>
#define FR_DENSE_FINISH(T) dense_finish_kernel<T>
#define FR_TO_ACC(T) {to_acc_kernel<T, float>, to_acc_kernel<T, double>}

extern const KernelTable kTable = {
    FUSEDRES_ISA_ID,
    FR_DTYPES(FR_STATS),
    FR_DTYPES(FR_FWD),
    FR_DTYPES(FR_REDUCE),
    FR_DTYPES(FR_APPLY),
    FR_DTYPES(FR_MIX_FWD),
    FR_DTYPES(FR_MIX_BWD),
    FR_DTYPES(FR_NORM_FWD),
    FR_DTYPES(FR_NORM_BWD),
    FR_DTYPES(FR_HIGHWAY_FWD),
    FR_DTYPES(FR_HIGHWAY_BWD),
    FR_DTYPES(FR_LSTM_FWD),
    FR_DTYPES(FR_LSTM_BWD),
    FR_DTYPES(FR_DENSE_LOAD),
    FR_DTYPES(FR_DENSE_GRAD),
    FR_DTYPES(FR_DENSE_FINISH),
    {matmul_nt_kernel<float>, matmul_nt_kernel<double>},
    {matmul_nn_kernel<float>, matmul_nn_kernel<double>},
    {matmul_tn_kernel<float>, matmul_tn_kernel<double>},
    FR_DTYPES(FR_TO_ACC),
};

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
