"""The passes of ``residual_add``: ``y = act(scale[n, c] * A(x) + B(shortcut))``, where A and B are
maps ``(t - center) * a + bias`` of a channel: a batch norm, an affine map or the identity.
"""

import triton
import triton.language as tl

from .activations import act_backward, act_backward_masked, act_forward, act_mask
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


@triton.jit
def map_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, c0, C, eps, BLOCK_C: tl.constexpr):
    """center, rstd, a and bias of the map A(x) = (x - center) * a + bias; a = weight * rstd"""
    rstd = tl.full((BLOCK_C,), 1.0, tl.float32)
    if var_ptr is not None:
        rstd = tl.rsqrt(load_channels(var_ptr, c0, C, BLOCK_C, 1.0) + eps)
    a = rstd * load_channels(weight_ptr, c0, C, BLOCK_C, 1.0)
    bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    return load_channels(mean_ptr, c0, C, BLOCK_C, 0.0), rstd, a, bias


@triton.jit
def factors_of(scale_ptr, n, c0, C, BLOCK_C: tl.constexpr):
    if scale_ptr is None:
        return tl.full((BLOCK_C,), 1.0, tl.float32)
    else:
        return load_channels(scale_ptr + n * C, c0, C, BLOCK_C, 1.0)


# Computes: y = act(scale[n, c] * A(x) + B(shortcut)), and act's derivative as one bit
# Reads:    x, shortcut [N, C, HW] once; scale [N, C], the maps' parameters [C], cached
# Writes:   y [N, C, HW] once, mask one bit an element
# Traffic:  (2 or 3)*N*C*HW*sizeof(x) + N*C*HW/8 bytes
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "HW"])
def residual_add_fwd_kernel(
    x_ptr, shortcut_ptr, y_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    side_mean_ptr, side_var_ptr, side_weight_ptr, side_bias_ptr, scale_ptr, C, HW, eps, side_eps,
    ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, c0, i0, _ = locate(pid, C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    center, _, a, bias = map_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, c0, C, eps, BLOCK_C)
    factor = factors_of(scale_ptr, n, c0, C, BLOCK_C)
    z = (x - spread(center, NHWC)) * spread(a * factor, NHWC) + spread(bias * factor, NHWC)
    if shortcut_ptr is not None:
        s = tl.load(shortcut_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        center, _, b, bias = map_of(
            side_mean_ptr, side_var_ptr, side_weight_ptr, side_bias_ptr, c0, C, side_eps, BLOCK_C
        )
        z += (s - spread(center, NHWC)) * spread(b, NHWC) + spread(bias, NHWC)
    y = act_forward(z, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + offs, y, mask=inside)
    if mask_ptr is not None:
        bits = pack_bits(act_mask(z, ACT) & inside)
        start, offs, inside = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        tl.store(mask_ptr + start + offs, bits, mask=inside)


@triton.jit
def gradient_of_sum(
    dy_ptr, x_ptr, shortcut_ptr, mask_ptr, scale_ptr, branch, side, n, c0, i0, C, HW,
    ACT: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """u = dy * act'(z) of a tile, and both operands less their centers; 0 outside and if absent."""
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    u = tl.load(dy_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    x = tl.zeros_like(u)
    s = tl.zeros_like(u)
    if x_ptr is not None:
        x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - spread(branch[0], NHWC), 0.0)
    if shortcut_ptr is not None:
        s = tl.load(shortcut_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(inside, s - spread(side[0], NHWC), 0.0)
    if ACT != "identity":
        if mask_ptr is not None:
            first, bytes_, present = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
            passes = unpack_bits(tl.load(mask_ptr + first + bytes_, mask=present, other=0))
            u = act_backward_masked(passes, u, ACT)
        else:
            factor = factors_of(scale_ptr, n, c0, C, BLOCK_C)
            z = x * spread(branch[2] * factor, NHWC) + spread(branch[3] * factor, NHWC)
            if shortcut_ptr is not None:
                z += s * spread(side[2], NHWC) + spread(side[3], NHWC)
            u = act_backward(z, u, ACT)
    return u, x, s


# Computes: sums over chunks of pixels of u, u * (x - center) and u * (shortcut - its center)
# Reads:    dy, x, shortcut [N, C, HW] once; mask, or what z is found from
# Writes:   part_u, part_ux, part_us [N, chunks, C] fp32
# Traffic:  (2 or 3)*N*C*HW*sizeof(dy) + N*C*HW/8 bytes; sums below 1% of it
# Split:    one program = BLOCK_C channels of a chunk; a tile of at most 256 pixels is summed as a
#           tree, then added to the program's sums in fp32


@triton.jit(do_not_specialize=["C", "HW", "tiles"])
def residual_add_bwd_reduce_kernel(
    dy_ptr, x_ptr, shortcut_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    side_mean_ptr, side_var_ptr, side_weight_ptr, side_bias_ptr, scale_ptr, part_u_ptr,
    part_ux_ptr, part_us_ptr, C, HW, tiles, eps, side_eps,
    ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, first, part = locate(tl.program_id(0), C, HW, tiles, NHWC, BLOCK_C, BLOCK_HW)
    branch = map_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, c0, C, eps, BLOCK_C)
    side = map_of(
        side_mean_ptr, side_var_ptr, side_weight_ptr, side_bias_ptr, c0, C, side_eps, BLOCK_C
    )
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_ux = tl.zeros((BLOCK_C,), tl.float32)
    sum_us = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(tiles_here(first, HW, tiles, BLOCK_HW)):
        u, x, s = gradient_of_sum(
            dy_ptr, x_ptr, shortcut_ptr, mask_ptr, scale_ptr, branch, side, n, c0,
            first + t * BLOCK_HW, C, HW, ACT, NHWC, WIDE, BLOCK_C, BLOCK_HW,
        )  # fmt: skip
        sum_u += sum_pixels(u, NHWC)
        sum_ux += sum_pixels(u * x, NHWC)
        sum_us += sum_pixels(u * s, NHWC)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(part_u_ptr + part * C + offs_c, sum_u, mask=offs_c < C)
    tl.store(part_ux_ptr + part * C + offs_c, sum_ux, mask=offs_c < C)
    tl.store(part_us_ptr + part * C + offs_c, sum_us, mask=offs_c < C)


# Computes: dx = a * (scale * u - dbias / M - (x - center) * rstd * dweight / M), dshortcut likewise
#           (Ioffe and Szegedy 2015, section 3); without the last two terms where the map's
#           statistics are not the batch's
# Reads:    dy [N, C, HW] once; x, shortcut where a sum goes through them; mask, or what z needs
# Writes:   dx, dshortcut [N, C, HW] once
# Traffic:  (2 to 5)*N*C*HW*sizeof(dy) + N*C*HW/8 bytes
# Split:    one program = one tile, from the end of the tensor to its beginning


@triton.jit(do_not_specialize=["C", "HW", "count"])
def residual_add_bwd_apply_kernel(
    dy_ptr, x_ptr, shortcut_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    side_mean_ptr, side_var_ptr, side_weight_ptr, side_bias_ptr, scale_ptr, dweight_ptr,
    dbias_ptr, dside_weight_ptr, dside_bias_ptr, dx_ptr, dshortcut_ptr, C, HW, count, eps,
    side_eps, ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, c0, i0, _ = locate(pid, C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    branch = map_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, c0, C, eps, BLOCK_C)
    side = map_of(
        side_mean_ptr, side_var_ptr, side_weight_ptr, side_bias_ptr, c0, C, side_eps, BLOCK_C
    )
    u, x, s = gradient_of_sum(
        dy_ptr, x_ptr, shortcut_ptr, mask_ptr, scale_ptr, branch, side, n, c0, i0, C, HW,
        ACT, NHWC, WIDE, BLOCK_C, BLOCK_HW,
    )  # fmt: skip
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    dx = u * spread(factors_of(scale_ptr, n, c0, C, BLOCK_C), NHWC)
    if dweight_ptr is not None:
        dx -= mean_part(x, dweight_ptr, dbias_ptr, branch[1], c0, C, count, NHWC, BLOCK_C)
    dx *= spread(branch[2], NHWC)
    tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dshortcut_ptr is not None:
        if dside_weight_ptr is not None:
            u -= mean_part(
                s, dside_weight_ptr, dside_bias_ptr, side[1], c0, C, count, NHWC, BLOCK_C
            )
        u *= spread(side[2], NHWC)
        tl.store(dshortcut_ptr + start + offs, u.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mean_part(
    x, dweight_ptr, dbias_ptr, rstd, c0, C, count, NHWC: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """What the gradient loses because mean and variance follow x."""
    slope = rstd * (load_channels(dweight_ptr, c0, C, BLOCK_C, 0.0) / count)
    shift = load_channels(dbias_ptr, c0, C, BLOCK_C, 0.0) / count
    return x * spread(slope, NHWC) + spread(shift, NHWC)


# Computes: dweight = rstd * sum scale * u * (x - center), dbias = sum scale * u, and the same of
#           the shortcut's map, which is not scaled
# Reads:    part_u, part_ux, part_us [N, chunks, C] fp32; scale [N, C]; var, side_var [C]
# Writes:   four gradients [C] fp32
# Traffic:  (12 or 16)*N*chunks*C bytes
# Split:    one program = BLOCK_C channels; fp64 sums in a fixed order


@triton.jit(do_not_specialize=["parts", "chunks", "C"])
def residual_add_bwd_merge_kernel(
    part_u_ptr, part_ux_ptr, part_us_ptr, scale_ptr, var_ptr, side_var_ptr, dweight_ptr,
    dbias_ptr, dside_weight_ptr, dside_bias_ptr, parts, chunks, C, eps, side_eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dbias = tl.zeros((BLOCK_C,), tl.float64)
    dweight = tl.zeros((BLOCK_C,), tl.float64)
    dside_bias = tl.zeros((BLOCK_C,), tl.float64)
    dside_weight = tl.zeros((BLOCK_C,), tl.float64)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & mask_c[None, :]
        offs = p[:, None].to(tl.int64) * C + offs_c[None, :]
        u = tl.load(part_u_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        ux = tl.load(part_ux_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        us = tl.load(part_us_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        dside_bias += tl.sum(u, 0)
        dside_weight += tl.sum(us, 0)
        if scale_ptr is not None:
            rows = (p // chunks)[:, None] * C + offs_c[None, :]
            factor = tl.load(scale_ptr + rows, mask=inside, other=0.0).to(tl.float64)
            u *= factor
            ux *= factor
        dbias += tl.sum(u, 0)
        dweight += tl.sum(ux, 0)
    if var_ptr is not None:
        dweight /= tl.sqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float64) + eps)
    if side_var_ptr is not None:
        var = tl.load(side_var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float64)
        dside_weight /= tl.sqrt(var + side_eps)
    tl.store(dweight_ptr + offs_c, dweight.to(tl.float32), mask=mask_c)
    tl.store(dbias_ptr + offs_c, dbias.to(tl.float32), mask=mask_c)
    tl.store(dside_weight_ptr + offs_c, dside_weight.to(tl.float32), mask=mask_c)
    tl.store(dside_bias_ptr + offs_c, dside_bias.to(tl.float32), mask=mask_c)


# Computes: dscale[n, c] = sum over an image of u * A(x) = a * sum u * (x - center) + bias * sum u
# Reads:    part_u, part_ux [N, chunks, C] fp32; the map's parameters [C]
# Writes:   dscale [N, C] fp32
# Traffic:  8*N*chunks*C bytes
# Split:    one program = BLOCK_C channels of an image; fp32 sums in a fixed order


@triton.jit(do_not_specialize=["chunks", "C"])
def residual_add_bwd_scale_kernel(
    part_u_ptr, part_ux_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, dscale_ptr, chunks, C, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    c_blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // c_blocks).to(tl.int64)
    c0 = tl.program_id(0) % c_blocks * BLOCK_C
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_ux = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, chunks):
        start = (n * chunks + part) * C
        sum_u += load_channels(part_u_ptr + start, c0, C, BLOCK_C, 0.0)
        sum_ux += load_channels(part_ux_ptr + start, c0, C, BLOCK_C, 0.0)
    _, _, a, bias = map_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, c0, C, eps, BLOCK_C)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(dscale_ptr + n * C + offs_c, a * sum_ux + bias * sum_u, mask=offs_c < C)
