"""Activations and gates as device functions, in fp32: the formulas of csrc/bn_math.h.

The piecewise ones select instead of multiplying by zero, so that NaN passes as it does in PyTorch
and an infinite gradient does not become NaN where it is cut.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def clamp_0_6(z):
    return tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))


@triton.jit
def act_forward(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACT == "relu6":
        z = clamp_0_6(z)
    elif ACT == "leaky_relu":
        z = tl.where(z <= 0.0, z * 0.01, z)
    elif ACT == "silu":
        z = z * sigmoid(z)
    elif ACT == "gelu":
        z = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "hardswish":
        z = z * clamp_0_6(z + 3.0) / 6.0
    else:
        tl.static_assert(ACT == "identity")
    return z


@triton.jit
def act_backward(z, dy, ACT: tl.constexpr):
    """dy * act'(z)"""
    if ACT == "relu":
        dy = tl.where(z <= 0.0, 0.0, dy)
    elif ACT == "relu6":
        dy = tl.where((z <= 0.0) | (z >= 6.0), 0.0, dy)
    elif ACT == "leaky_relu":
        dy = tl.where(z <= 0.0, dy * 0.01, dy)
    elif ACT == "silu":
        s = sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dy = dy * (cdf + z * tl.exp(z * z * -0.5) * 0.3989422804014327)
    elif ACT == "hardswish":
        dy = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, dy, dy * (z / 3.0 + 0.5)))
    else:
        tl.static_assert(ACT == "identity")
    return dy


@triton.jit
def act_mask(z, ACT: tl.constexpr):
    """Where the activation passes the gradient (reference.activation_mask)."""
    passes = ~(z <= 0.0)
    if ACT == "relu6":
        passes = passes & ~(z >= 6.0)
    return passes


@triton.jit
def act_backward_masked(passes, dy, ACT: tl.constexpr):
    """dy * act'(z), from act_mask(z)"""
    return tl.where(passes, dy, dy * 0.01 if ACT == "leaky_relu" else 0.0)


@triton.jit
def gate_forward(z, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return sigmoid(z)
    else:
        tl.static_assert(GATE == "hard_sigmoid")
        return clamp_0_6(z + 3.0) / 6.0


@triton.jit
def gate_backward(z, dgate, GATE: tl.constexpr):
    """dgate * gate'(z)"""
    if GATE == "sigmoid":
        s = sigmoid(z)
        return dgate * s * (1.0 - s)
    else:
        tl.static_assert(GATE == "hard_sigmoid")
        return tl.where((z <= -3.0) | (z >= 3.0), 0.0, dgate / 6.0)
