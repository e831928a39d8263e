"""The passes over x that batch norm and squeeze-excite share.

All ops of this form are ``y = act(z + residual)`` with ``z = (a * (x - mean) + bias) * g``, where
``a = weight / sqrt(var + eps)`` of the channel and ``g`` is the gate of the image and channel;
either of the two may be absent. Written ``scale = a * g`` and ``shift = bias * g``.
"""

import triton
import triton.language as tl

from .activations import act_backward, act_backward_masked, act_forward, act_mask, gate_forward
from .launch import Config
from .tile import (
    aligned,
    load_channels,
    locate,
    mask_tile,
    pack_bits,
    spread,
    sum_pixels,
    tile,
    tiles_here,
    unpack_bits,
)

# The first is the default. None was measured on a GPU yet.
APPLY_CONFIGS = (Config(4096, 64, 4), Config(8192, 128, 8), Config(2048, 64, 4))
REDUCE_CONFIGS = (Config(4096, 64, 4), Config(8192, 64, 8), Config(2048, 64, 4))


@triton.jit
def bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C: tl.constexpr):
    """Variance, rstd and a of BLOCK_C channels; ones without batch norm"""
    if var_ptr is None:
        one = tl.full((BLOCK_C,), 1.0, tl.float32)
        return one, one, one
    else:
        var = load_channels(var_ptr, c0, C, BLOCK_C, 1.0)
        rstd = tl.rsqrt(var + eps)
        return var, rstd, rstd * load_channels(weight_ptr, c0, C, BLOCK_C, 1.0)


@triton.jit
def gate_of(logits_ptr, n, c0, C, GATE: tl.constexpr, BLOCK_C: tl.constexpr):
    if logits_ptr is None:
        return tl.full((BLOCK_C,), 1.0, tl.float32)
    else:
        return gate_forward(load_channels(logits_ptr + n * C, c0, C, BLOCK_C, 0.0), GATE)


# Computes: y = act((a * (x - mean) + bias) * g + residual), and act's derivative as one bit
# Reads:    x, residual [N, C, HW] once; mean, var, weight, bias [C], logits [N, C], cached
# Writes:   y [N, C, HW] once, mask one bit an element; mean and var of running statistics once
# Traffic:  (2 or 3)*N*C*HW*sizeof(x) + N*C*HW/8 bytes
# Split:    one program = one tile, from the end of the tensor to its beginning: what the pass
#           before read last is still in the L2. fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "HW"])
def stream_fwd_apply_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, logits_ptr,
    saved_mean_ptr, saved_var_ptr, C, HW, eps, ACT: tl.constexpr, GATE: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, c0, i0, _ = locate(pid, C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    g = gate_of(logits_ptr, n, c0, C, GATE, BLOCK_C)
    var, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    z = (x - spread(mean, NHWC)) * spread(a * g, NHWC)
    if bias_ptr is not None:
        z += spread(load_channels(bias_ptr, c0, C, BLOCK_C, 0.0) * g, NHWC)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    y = act_forward(z, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + offs, y, mask=inside)
    if mask_ptr is not None:
        bits = pack_bits(act_mask(z, ACT) & inside)
        start, offs, inside = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        tl.store(mask_ptr + start + offs, bits, mask=inside)
    if saved_mean_ptr is not None:
        if (n == 0) & (i0 == 0):
            offs_c = tl.arange(0, BLOCK_C)
            tl.store(saved_mean_ptr + c0 + offs_c, mean, mask=offs_c < C - c0)
            tl.store(saved_var_ptr + c0 + offs_c, var, mask=offs_c < C - c0)


@triton.jit
def gradient_tile(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, center, scale, shift, n, c0, i0, C, HW,
    ACT: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """u = dy * act'(z + residual) of a tile, and x - mean; both zero outside of the tensor."""
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    u = tl.load(dy_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    if x_ptr is None:
        centered = tl.zeros_like(u)
    else:
        centered = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, centered - spread(center, NHWC), 0.0)
    if ACT != "identity":
        if mask_ptr is not None:
            first, bytes_, present = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
            passes = unpack_bits(tl.load(mask_ptr + first + bytes_, mask=present, other=0))
            u = act_backward_masked(passes, u, ACT)
        else:
            z = centered * spread(scale, NHWC) + spread(shift, NHWC)
            if residual_ptr is not None:
                z += tl.load(residual_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
            u = act_backward(z, u, ACT)
    return u, centered


# Computes: sum u and sum u * (x - mean) over chunks of pixels, u = dy * act'(z + residual)
# Reads:    dy, x [N, C, HW] once; mask, or residual, if z needs it
# Writes:   sum_u, sum_ux [N, chunks, C] fp32
# Traffic:  2*N*C*HW*sizeof(x) + N*C*HW/8 bytes; sums below 1% of it
# Split:    one program = BLOCK_C channels of a chunk; a tile of at most 256 pixels is summed as a
#           tree, then added to the program's sums in fp32


@triton.jit(do_not_specialize=["C", "HW", "tiles"])
def stream_bwd_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, logits_ptr,
    sum_u_ptr, sum_ux_ptr, C, HW, tiles, eps, ACT: tl.constexpr, GATE: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, first, part = locate(tl.program_id(0), C, HW, tiles, NHWC, BLOCK_C, BLOCK_HW)
    g = gate_of(logits_ptr, n, c0, C, GATE, BLOCK_C)
    _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    center = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    shift = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0) * g
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_ux = tl.zeros((BLOCK_C,), tl.float32)
    # Hoisting out of the tiles costs registers: a spill on sm_120 (Triton 3.6).
    for t in tl.range(tiles_here(first, HW, tiles, BLOCK_HW), disable_licm=True):
        u, centered = gradient_tile(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, center, a * g, shift,
            n, c0, first + t * BLOCK_HW, C, HW, ACT, NHWC, WIDE, BLOCK_C, BLOCK_HW,
        )  # fmt: skip
        sum_u += sum_pixels(u, NHWC)
        sum_ux += sum_pixels(u * centered, NHWC)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(sum_u_ptr + part * C + offs_c, sum_u, mask=offs_c < C)
    tl.store(sum_ux_ptr + part * C + offs_c, sum_ux, mask=offs_c < C)


# Computes: dx = a * (g * u + dpooled / HW - dbias / M - (x - mean) * rstd * dweight / M)
#           dresidual = u                      (Ioffe and Szegedy 2015, section 3, in terms of u)
# Reads:    dy, x [N, C, HW] once; mask, or residual, if z needs it; x only where it is needed
# Writes:   dx, dresidual [N, C, HW] once
# Traffic:  (3 or 4)*N*C*HW*sizeof(x) + N*C*HW/8 bytes
# Split:    one program = one tile, from the end of the tensor to its beginning


@triton.jit(do_not_specialize=["C", "HW", "count"])
def stream_bwd_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, logits_ptr,
    dweight_ptr, dbias_ptr, dpooled_ptr, dx_ptr, dresidual_ptr, C, HW, pixels, count, eps,
    ACT: tl.constexpr, GATE: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, c0, i0, _ = locate(pid, C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    g = gate_of(logits_ptr, n, c0, C, GATE, BLOCK_C)
    _, rstd, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    center = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    shift = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0) * g
    u, centered = gradient_tile(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, center, a * g, shift, n, c0, i0, C, HW,
        ACT, NHWC, WIDE, BLOCK_C, BLOCK_HW,
    )  # fmt: skip
    dx = u * spread(a * g, NHWC)
    if dpooled_ptr is not None:
        dpooled = load_channels(dpooled_ptr + n * C, c0, C, BLOCK_C, 0.0)
        dx += spread(a * (dpooled / pixels), NHWC)
    if dweight_ptr is not None:
        dweight = load_channels(dweight_ptr, c0, C, BLOCK_C, 0.0)
        dbias = load_channels(dbias_ptr, c0, C, BLOCK_C, 0.0)
        dx -= centered * spread(a * (rstd * (dweight / count)), NHWC)
        dx -= spread(a * (dbias / count), NHWC)
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + start + offs, u.to(dx_ptr.dtype.element_ty), mask=inside)
