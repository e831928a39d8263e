"""The mainloop that the convolutions share: an implicit GEMM over tiles of output pixels.

The rows of the GEMM are output pixels, its columns the output channels of a group, and its inner
dimension the taps of the kernel times the input channels of a group. No matrix is formed: each step
loads the pixels that one tap sees (zeros outside of the image) and the weights of that tap. Input
and result are NHWC, the weight is [K, KH, KW, C / groups] in memory.

The gradient of an unstrided convolution by its input is a convolution of the result's gradient,
with the taps in opposite order and the channels' roles exchanged: TRANSPOSED reads the weight so.
"""

import triton
import triton.language as tl

from .activations import act_forward
from .stream import bn_scale
from .tile import load_channels, tile


@triton.jit
def part_of(pid, groups, K, BLOCK_N: tl.constexpr):
    """Which chunk of rows, which group and which of its channels program ``pid`` has.

    Neighbours share the rows: their pixels come from memory once, then from the L2.
    """
    blocks_n = tl.cdiv(K, BLOCK_N)
    k0 = pid % blocks_n * BLOCK_N
    return pid // blocks_n // groups, pid // blocks_n % groups, k0


@triton.jit
def bn_act_tile(
    x, mean_ptr, var_ptr, weight_ptr, bias_ptr, c0, C, eps,
    ACT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(bn(x)) of a tile [pixels, channels], rounded to x's dtype (stream_fwd_apply's formula)"""
    _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_K)
    mean = load_channels(mean_ptr, c0, C, BLOCK_K, 0.0)
    bias = load_channels(bias_ptr, c0, C, BLOCK_K, 0.0)
    z = (x.to(tl.float32) - mean[None, :]) * a[None, :] + bias[None, :]
    return act_forward(z, ACT).to(x.dtype)


@triton.jit
def gemm_tile(
    x_desc, weight_desc, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m0, k0, C, eps,
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A pointwise convolution's tile from tensor descriptors of x [M, C] and weight [K, C].

    TRANSPOSED: the weight is [C, K].
    """
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, C, BLOCK_K):
        x = x_desc.load([m0, c0])
        if mean_ptr is not None:  # beyond C both operands are zeros, and act(bn(0)) is finite
            x = bn_act_tile(
                x, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, c0, C, eps, ACT, BLOCK_K
            )
        if TRANSPOSED:
            weight = weight_desc.load([c0, k0])
        else:
            weight = weight_desc.load([k0, c0]).T
        out = tl.dot(x, weight, out, input_precision=PRECISION)
    return out


@triton.jit
def corners(
    offs_m, P, Q, stride_xn, stride_xh, stride_xw, stride_h, stride_w, pad_h, pad_w
):  # fmt: skip
    """Row and column of x under the first tap of each pixel, and its 64-bit offset from x."""
    h0 = offs_m // Q % P * stride_h - pad_h
    w0 = offs_m % Q * stride_w - pad_w
    offs = (offs_m // Q // P).to(tl.int64) * stride_xn
    return h0, w0, offs + h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw


@triton.jit
def conv_tile(
    x_ptr, weight_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m0, group, k0,
    M, C, K, H, W, P, Q, stride_xn, stride_xh, stride_xw, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, eps, ACT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PADDED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """conv(act(bn(x))) of BLOCK_M pixels from m0 and BLOCK_N channels from k0: fp32, 0 outside.

    C and K are channels of a group, H and W sizes of x, P and Q of the result. The padding is of
    act(bn(x)): taps outside of the image are zero whatever the norm makes of zero. TRANSPOSED: the
    weight is [groups * C, KH, KW, K], its last tap goes first.
    """
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_K)
    in_m = offs_m < M
    in_k = offs_k < K - k0
    h0, w0, pixels = corners(
        offs_m, P, Q, stride_xn, stride_xh, stride_xw, stride_h, stride_w, pad_h, pad_w
    )  # fmt: skip
    pixels += group * C
    if TRANSPOSED:
        weights = group.to(tl.int64) * (C * KH * KW * K) + k0 + offs_k
    else:
        weights = (group * K + k0).to(tl.int64) * (KH * KW * C) + offs_k * (KH * KW * C)
    c_blocks = tl.cdiv(C, BLOCK_K)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(KH * KW * c_blocks):
        c0 = step % c_blocks * BLOCK_K
        tap = step // c_blocks
        h = tap // KW * dilation_h
        w = tap % KW * dilation_w
        seen = in_m
        if PADDED:
            seen &= (h0 + h >= 0) & (h0 + h < H) & (w0 + w >= 0) & (w0 + w < W)
        in_c = offs_c < C - c0
        inside = seen[:, None] & in_c[None, :]
        seen_at = pixels + (h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw + c0)
        x = tl.load(x_ptr + seen_at[:, None] + offs_c[None, :], mask=inside, other=0.0)
        if mean_ptr is not None:
            x = bn_act_tile(
                x, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, group * C + c0, group * C + C,
                eps, ACT, BLOCK_K,
            )  # fmt: skip
            x = tl.where(inside, x, 0.0)
        if TRANSPOSED:
            taps = weights + (KH * KW - 1 - tap) * K
            rows = (c0 + offs_c) * (KH * KW * K)
        else:
            taps = weights + (tap * C + c0)
            rows = offs_c
        weight = tl.load(
            weight_ptr + taps[None, :] + rows[:, None],
            mask=in_c[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        out = tl.dot(x, weight, out, input_precision=PRECISION)
    return out


@triton.jit
def result_tile(
    m0, group, k0, groups, M, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where a tile lies in the result [M, groups * K] (tile.tile), and its first channel."""
    c0 = group * K + k0
    start, offs, inside = tile(
        0, c0, m0.to(tl.int64), groups * K, M, True, False, BLOCK_N, BLOCK_M
    )  # fmt: skip
    inside &= (tl.arange(0, BLOCK_N) < K - k0)[None, :]
    return start, offs, inside, c0
