// The convolution kernels of sm_90a, compiled once for the ops that use them.
#include "conv_sm90_launch.cuh"

namespace fusedres {
namespace cuda {

template cudaError_t launch_conv_sm90<__nv_bfloat16>(const ConvIn&, const ConvOut&, const Device&,
                                                     Dtype, int, cudaStream_t);
#if !defined(FUSEDRES_FEW_DTYPES)
template cudaError_t launch_conv_sm90<__half>(const ConvIn&, const ConvOut&, const Device&, Dtype,
                                              int, cudaStream_t);
#endif

}  // namespace cuda
}  // namespace fusedres
