// The batch norm and activation before a convolution, for the sm_90a kernel: a consumer reads its
// rows of x from the stage (ldmatrix), transforms them in registers, and multiplies from there.
// Taps outside of the image are zeros whatever the norm makes of zero.
#pragma once

#include "conv_sm90_mainloop.cuh"

namespace fusedres {
namespace cuda {

// As many channels as shared memory has room for besides the stages: 2 * 8 KiB.
constexpr int64_t kConvNormChannels = 2048;
static_assert(sizeof(ConvStages<256>) + kConvNormChannels * 8 + kSwizzleSlack <= 227 * 1024,
              "what a block of sm_90 can have");

#if defined(FUSEDRES_HAS_WGMMA)

// Scale and shift of all channels; zeros for those that only a box has. All threads of the block.
__device__ __forceinline__ void conv_norms(const ConvIn& in, int channels, float* table) {
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kConvThreads) {
    float scale = 0.0f;
    float shift = 0.0f;
    if (c < in.shape.channels) {
      scale = (in.bn_weight == nullptr ? 1.0f : in.bn_weight[c]) * bn_rstd(in.bn_var[c], in.eps);
      shift = (in.bn_bias == nullptr ? 0.0f : in.bn_bias[c]) - in.bn_mean[c] * scale;
    }
    table[c] = scale;
    table[channels + c] = shift;
  }
}

// Words of a fragment: i has channels c and the next of row i % 2, i / 2 * 8 further on.
template <typename T>
__device__ __forceinline__ void conv_normed(Act act, const float* scales, const float* shifts,
                                            int c, const bool (&inside)[2], uint32_t (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + c + i / 2 * 8);
    const float2 shift = *reinterpret_cast<const float2*>(shifts + c + i / 2 * 8);
    const float low = activate<false>(act, half_of<T>(words[i], 0) * scale.x + shift.x);
    const float high = activate<false>(act, half_of<T>(words[i], 1) * scale.y + shift.y);
    words[i] = inside[i % 2] ? two_of(low, high, T{}) : 0u;
  }
}

// conv_multiply of act(bn(x)). The two warpgroups overlap: one transforms, the other multiplies.
template <typename T, int kColumns>
__device__ __forceinline__ void conv_multiply_normed(const ConvSm90& a, int64_t row,
                                                     ConvStages<kColumns>* s,
                                                     Ring<ConvStages<kColumns>::kStages>* ring,
                                                     float (&sums)[kColumns / 2]) {
  const ConvShape& g = a.in.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = (static_cast<int>(threadIdx.x) / 32 - 4) * 16 + lane % 16;  // its row to load
  const int channels = a.c_steps * kBoxChannels;
  const float* const scales = reinterpret_cast<const float*>(s + 1) + lane % 4 * 2;
  const Corner corners[2] = {corner_of(g, row), corner_of(g, row + 8)};
  Tap tap{0, 0, 0};
  for (int step = 0; step < a.steps; ++step) {
    bool inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) inside[i] = corners[i].sees(g, tap.dh(g), tap.dw(g));
    mbarrier_wait(&s->full[ring->stage], ring->parity);
    const unsigned char* const x = s->x[ring->stage] + first * (kBoxChannels * 2);
    const uint64_t weight = wgmma_operand(s->weight[ring->stage]);
    uint32_t words[kBoxChannels / 16][4];
#pragma unroll
    for (int k = 0; k < kBoxChannels / 16; ++k) {
      load_matrices(words[k], x + ((2 * k + lane / 16) ^ (first % 8)) * 16);
      conv_normed<T>(a.in.act, scales, scales + channels, tap.c + 16 * k, inside, words[k]);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBoxChannels / 16; ++k) {
      wgmma<T>(sums, words[k], operand_at(weight, k), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(sums);
    __syncwarp();  // all lanes have read their rows
    if (lane == 0) mbarrier_arrive(&s->empty[ring->stage]);
    ring->advance();
    tap.c += kBoxChannels;
    if (tap.c < channels) continue;
    tap.c = 0;
    if (++tap.kw < g.kw) continue;
    tap.kw = 0;
    ++tap.kh;
  }
}

#endif

}  // namespace cuda
}  // namespace fusedres
