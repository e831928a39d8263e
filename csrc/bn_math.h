// Formulas of batch normalisation, activations and gates, written once for the host and the device.
//
// Everything here has internal linkage (FUSEDRES_HD is static): the header is compiled into
// translation units with different instruction sets, and a shared inline function would be merged
// by the linker into one copy that an older CPU may not be able to run.
//
// V is float, double, or a vector type that has the arithmetic operators, comparisons, select(),
// exp_of() and erf_of().
#pragma once

#if defined(__CUDACC__)
#define FUSEDRES_HD static __host__ __device__ __forceinline__
#define FUSEDRES_LIBM(name) name
#else
#define FUSEDRES_HD static inline __attribute__((always_inline))
#define FUSEDRES_LIBM(name) __builtin_##name
#endif

namespace fusedres {

enum class Act : int { kIdentity, kRelu, kRelu6, kLeakyRelu, kSilu, kGelu, kHardswish };
enum class Gate : int { kSigmoid, kHardSigmoid };

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default

FUSEDRES_HD float exp_of(float v) { return FUSEDRES_LIBM(expf)(v); }
FUSEDRES_HD double exp_of(double v) { return FUSEDRES_LIBM(exp)(v); }
FUSEDRES_HD float erf_of(float v) { return FUSEDRES_LIBM(erff)(v); }
FUSEDRES_HD double erf_of(double v) { return FUSEDRES_LIBM(erf)(v); }
FUSEDRES_HD float select(bool m, float a, float b) { return m ? a : b; }
FUSEDRES_HD double select(bool m, double a, double b) { return m ? a : b; }

template <typename V>
FUSEDRES_HD V sigmoid(V z) {
  return V(1) / (V(1) + exp_of(V(0) - z));
}

// min(max(z, 0), 6) that keeps NaN, as torch's relu6 does.
template <typename V>
FUSEDRES_HD V clamp_0_6(V z) {
  return select(z <= V(0), V(0), select(z >= V(6), V(6), z));
}

template <typename V>
FUSEDRES_HD V act_forward(Act act, V z) {
  switch (act) {
    case Act::kRelu:
      return select(z <= V(0), V(0), z);  // relu(NaN) = NaN
    case Act::kRelu6:
      return clamp_0_6(z);
    case Act::kLeakyRelu:
      return select(z <= V(0), z * V(kLeakySlope), z);
    case Act::kSilu:
      return z / (V(1) + exp_of(V(0) - z));
    case Act::kGelu:
      return z * V(0.5) * (V(1) + erf_of(z * V(0.70710678118654752440)));
    case Act::kHardswish:
      return z * clamp_0_6(z + V(3)) / V(6);
    default:
      return z;
  }
}

// dy * act'(z). The piecewise activations select instead of multiplying by zero, so that an
// infinite dy does not turn into NaN where the gradient is cut.
template <typename V>
FUSEDRES_HD V act_backward(Act act, V z, V dy) {
  switch (act) {
    case Act::kRelu:
      return select(z <= V(0), V(0), dy);
    case Act::kRelu6:
      return select(z <= V(0), V(0), select(z >= V(6), V(0), dy));
    case Act::kLeakyRelu:
      return select(z <= V(0), dy * V(kLeakySlope), dy);
    case Act::kSilu: {
      const V s = sigmoid(z);
      return dy * (s * (V(1) + z * (V(1) - s)));
    }
    case Act::kGelu: {
      const V cdf = V(0.5) * (V(1) + erf_of(z * V(0.70710678118654752440)));
      const V pdf = exp_of(z * z * V(-0.5)) * V(0.39894228040143267794);
      return dy * (cdf + z * pdf);
    }
    case Act::kHardswish:
      return select(z <= V(-3), V(0), select(z >= V(3), dy, dy * (z / V(3) + V(0.5))));
    default:
      return dy;
  }
}

template <typename V>
FUSEDRES_HD V gate_forward(Gate gate, V z) {
  return gate == Gate::kSigmoid ? sigmoid(z) : clamp_0_6(z + V(3)) / V(6);
}

// dgate * gate'(z)
template <typename V>
FUSEDRES_HD V gate_backward(Gate gate, V z, V dgate) {
  if (gate == Gate::kSigmoid) {
    const V s = sigmoid(z);
    return dgate * s * (V(1) - s);
  }
  return select(z <= V(-3), V(0), select(z >= V(3), V(0), dgate / V(6)));
}

// 1 / sqrt(var + eps), evaluated in double and rounded once: forward and backward get the same
// bits.
template <typename acc_t>
FUSEDRES_HD acc_t bn_rstd(acc_t var, double eps) {
  return static_cast<acc_t>(1.0 / FUSEDRES_LIBM(sqrt)(static_cast<double>(var) + eps));
}

// The backward of y = (x - mean) * rstd * weight + bias over M values, as coefficients of
//   dx = p * u + q * (x - mean) + r,   u = d(loss)/dy:
// p = a, q = -a * rstd * dweight / M, r = -a * dbias / M with a = weight * rstd
// (Ioffe and Szegedy 2015, section 3, with the sums over u and u * xhat factored out).
template <typename acc_t>
FUSEDRES_HD acc_t bn_backward_q(acc_t a, acc_t rstd, double dweight, double count) {
  return static_cast<acc_t>(-static_cast<double>(a) * rstd * dweight / count);
}
template <typename acc_t>
FUSEDRES_HD acc_t bn_backward_r(acc_t a, double dbias, double count) {
  return static_cast<acc_t>(-static_cast<double>(a) * dbias / count);
}

}  // namespace fusedres
