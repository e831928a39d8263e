"""``bn_act``, ``bn_stats`` and ``bn_act_backward`` on Triton.

Training: three launches (partial statistics, their merge, apply), running statistics: one.
Backward: three (partial sums, their merge, apply). Small tensors take one each, and x is read once:
a program holds all pixels of its channels in registers (few pixels, channels_last), or all programs
are on the chip together and hold all tiles (``bn_act_grid``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bn_act_grid, passes, tuning
from .activations import act_forward, act_mask
from .launch import Config, View, cdiv, launch, power_of_2
from .passes import Incoming, Norm
from .stats import MERGE_CHANNELS, MERGE_PARTS, batch_statistics, moments
from .stream import bn_scale, gradient_tile
from .tile import load_channels, mask_tile, pack_bits, spread, sum_pixels, tile

# Up to so many pixels a program holds 16 channels in registers: 32 values a thread of 16 warps. 16
# channels are a 32-byte sector in 16 bits. A choice by size alone, not measured.
WHOLE_PIXELS, WHOLE_CHANNELS = 1024, 16


@dataclass(frozen=True)
class Launches:
    """How an op that could be one launch is carried out."""

    number: int


AT_ONCE, STREAMED = Launches(1), Launches(3)

# Computes: mean, var of the batch; y = act(a * (x - mean) + bias + residual) unless y is None
# Reads:    x, residual [HW, C] once
# Writes:   y [HW, C], mask one bit an element, mean, var [C]
# Traffic:  (2 or 3)*HW*C*sizeof(x) + HW*C/8 bytes
# Split:    one program = all pixels of BLOCK_C channels in registers: their mean, then their
#           deviations from it, summed as trees in fp32


@triton.jit(do_not_specialize=["C", "HW"])
def bn_act_fwd_whole_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, C, HW, eps,
    ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C = C // ALIGN * ALIGN
    c0 = tl.program_id(0).to(tl.int64) * BLOCK_C
    offs_c = tl.arange(0, BLOCK_C)
    start, offs, inside = tile(0, c0, 0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    mean = sum_pixels(x, NHWC) / HW
    centered = tl.where(inside, x - spread(mean, NHWC), 0.0)
    var = sum_pixels(centered * centered, NHWC) / HW
    tl.store(mean_ptr + c0 + offs_c, mean, mask=offs_c < C - c0)
    tl.store(var_ptr + c0 + offs_c, var, mask=offs_c < C - c0)
    if y_ptr is not None:
        a = tl.rsqrt(var + eps) * load_channels(weight_ptr, c0, C, BLOCK_C, 1.0)
        bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
        z = centered * spread(a, NHWC) + spread(bias, NHWC)
        if residual_ptr is not None:
            z += tl.load(residual_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        y = act_forward(z, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start + offs, y, mask=inside)
        if mask_ptr is not None:
            bits = pack_bits(act_mask(z, ACT) & inside)
            start, offs, inside = mask_tile(0, c0, 0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
            tl.store(mask_ptr + start + offs, bits, mask=inside)


# Computes: dweight, dbias, dx and dresidual at once (stream_bwd_reduce, stream_bwd_apply)
# Reads:    dy, x [HW, C] once; mask, or residual, if z needs it
# Writes:   dx, dresidual [HW, C]; dweight, dbias [C] fp32
# Traffic:  (3 or 4)*HW*C*sizeof(x) + HW*C/8 bytes
# Split:    as the forward's


@triton.jit(do_not_specialize=["C", "HW"])
def bn_act_bwd_whole_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    dweight_ptr, dbias_ptr, dx_ptr, dresidual_ptr, C, HW, eps, BATCH_STATS: tl.constexpr,
    ACT: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C = C // ALIGN * ALIGN
    c0 = tl.program_id(0).to(tl.int64) * BLOCK_C
    offs_c = tl.arange(0, BLOCK_C)
    _, rstd, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    center = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    shift = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    u, centered = gradient_tile(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, center, a, shift, 0, c0, 0, C, HW,
        ACT, NHWC, WIDE, BLOCK_C, BLOCK_HW,
    )  # fmt: skip
    dbias = sum_pixels(u, NHWC)
    dweight = sum_pixels(u * centered, NHWC) * rstd
    tl.store(dweight_ptr + c0 + offs_c, dweight, mask=offs_c < C - c0)
    tl.store(dbias_ptr + c0 + offs_c, dbias, mask=offs_c < C - c0)
    dx = u
    if BATCH_STATS:
        dx -= spread(dbias / HW, NHWC) + centered * spread(rstd * (dweight / HW), NHWC)
    start, offs, inside = tile(0, c0, 0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    dx *= spread(a, NHWC)
    tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + start + offs, u.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums(
    part_u_ptr, part_ux_ptr, offs_c, parts, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """fp64 sums over the parts of u and u * (x - mean), in a fixed order."""
    sum_u = tl.zeros((BLOCK_C,), tl.float64)
    sum_ux = tl.zeros((BLOCK_C,), tl.float64)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & (offs_c < C)[None, :]
        offs = p[:, None].to(tl.int64) * C + offs_c[None, :]
        u = tl.load(part_u_ptr + offs, mask=inside, other=0.0)
        ux = tl.load(part_ux_ptr + offs, mask=inside, other=0.0)
        sum_u += tl.sum(u.to(tl.float64), 0)
        sum_ux += tl.sum(ux.to(tl.float64), 0)
    return sum_u, sum_ux


# Computes: dbias = sum u, dweight = rstd * sum u * (x - mean)
# Reads:    part_u, part_ux [parts, C] fp32; var [C]
# Writes:   dweight, dbias [C] fp32
# Traffic:  8*parts*C bytes
# Split:    one program = BLOCK_C channels; fp64 sums in a fixed order


@triton.jit(do_not_specialize=["parts", "C"])
def bn_act_bwd_merge_kernel(
    part_u_ptr, part_ux_ptr, var_ptr, dweight_ptr, dbias_ptr, parts, C, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_u, sum_ux = gradient_sums(part_u_ptr, part_ux_ptr, offs_c, parts, C, BLOCK_P, BLOCK_C)
    var = tl.load(var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float64)
    dweight = sum_ux / tl.sqrt(var + eps)
    tl.store(dweight_ptr + offs_c, dweight.to(tl.float32), mask=mask_c)
    tl.store(dbias_ptr + offs_c, sum_u.to(tl.float32), mask=mask_c)


def fits_registers(view: View) -> bool:
    """Whether one program can hold all values of its channels."""
    return view.nhwc and view.hw <= WHOLE_PIXELS


def _whole(kernel, view: View, *args, **flags) -> None:
    """Launch a kernel whose programs hold all pixels of their channels."""
    pixels = power_of_2(view.hw)
    launch(
        kernel, cdiv(view.c, WHOLE_CHANNELS), *args, device=view.x.device,
        warps=min(16, max(4, pixels * WHOLE_CHANNELS // 1024)), **flags, NHWC=True,
        ALIGN=math.gcd(view.c, 16), WIDE=False, BLOCK_C=WHOLE_CHANNELS, BLOCK_HW=pixels,
    )  # fmt: skip


def _ways(view: View, config: Config) -> list[Launches]:
    """The default first: one launch where every tile has a multiprocessor. Not measured."""
    return [AT_ONCE, STREAMED] if bn_act_grid.fits(view, config) else [STREAMED]


def backward_at_once(view: View) -> bool:
    """Whether the backward is one launch where nothing was measured."""
    return fits_registers(view) or _ways(view, bn_act_grid.BACKWARD)[0] is AT_ONCE


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    view = View("bn_stats", x, images=False)
    if not x.numel():
        return passes.no_statistics(view)
    if not fits_registers(view):
        return _large_stats(view)
    mean, var = view.new(view.c), view.new(view.c)
    none = [None] * 5
    _whole(bn_act_fwd_whole_kernel, view, x, *none, mean, var, view.c, view.hw, 0.0, ACT="identity")
    return mean, var


def _large_stats(view: View) -> tuple[Tensor, Tensor]:
    def work(way: Launches) -> tuple[Tensor, Tensor]:
        return bn_act_grid.statistics(view) if way is AT_ONCE else batch_statistics(moments(view))

    ways = _ways(view, bn_act_grid.FORWARD)
    return tuning.run(view.key("bn_stats_at_once"), ways, work, view.x.device)


def bn_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, batch_stats: bool, eps: float, act: str,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("bn_act", x, images=False)
    view.operand("residual", residual)
    norm = Norm.of(view, weight, bias, mean, var, batch_stats, eps)
    y, mask = torch.empty_like(x), view.new_mask(save_mask)
    if not x.numel():
        mean, var = passes.no_statistics(view) if norm.mean is None else (norm.mean, norm.var)
        return y, mean.to(torch.float32, copy=True), var.to(torch.float32, copy=True), mask
    if norm.mean is not None:
        saved = view.new(view.c), view.new(view.c)
        passes.apply(view, y, mask, norm, residual=residual, act=act, saved=saved)
        return y, *saved, mask
    if fits_registers(view):
        mean, var = view.new(view.c), view.new(view.c)
        _whole(
            bn_act_fwd_whole_kernel, view, x, residual, y, mask if save_mask else None,
            norm.weight, norm.bias, mean, var, view.c, view.hw, eps, ACT=act,
        )  # fmt: skip
        return y, mean, var, mask

    def work(way: Launches) -> tuple[Tensor, Tensor]:
        if way is AT_ONCE:
            bits = mask if save_mask else None
            return bn_act_grid.forward(view, residual, y, bits, norm, act)
        mean, var = batch_statistics(moments(view))
        passes.apply(view, y, mask, norm.with_statistics(mean, var), residual=residual, act=act)
        return mean, var

    key = view.key("bn_act", act, residual is not None, save_mask)
    mean, var = tuning.run(key, _ways(view, bn_act_grid.FORWARD), work, x.device)
    return y, mean, var, mask


def bn_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, mask: Tensor, batch_stats: bool, eps: float, act: str,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = View("bn_act_backward", x, images=False)
    norm = Norm.of(view, weight, bias, mean, var, batch_stats, eps)
    given = Incoming.of(view, dy, residual, mask, act)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    if not x.numel():
        zeros = torch.zeros(view.c, dtype=torch.float32, device=x.device)
        return dx, zeros, zeros.clone(), dresidual
    if fits_registers(view):
        dweight, dbias = view.new(view.c), view.new(view.c)
        _whole(
            bn_act_bwd_whole_kernel, view, dy, x, residual, given.mask, *norm.pointers, dweight,
            dbias, dx, dresidual if need_dresidual else None, view.c, view.hw, eps,
            BATCH_STATS=batch_stats, ACT=act,
        )  # fmt: skip
        return dx, dweight, dbias, dresidual

    def work(way: Launches) -> tuple[Tensor, Tensor]:
        if way is AT_ONCE:
            return bn_act_grid.backward(view, given, norm, dx, dresidual)
        return _streamed_backward(view, given, norm, dx, dresidual)

    key = view.key("bn_act_backward", act, residual is not None, given.mask is not None)
    ways = _ways(view, bn_act_grid.BACKWARD)
    dweight, dbias = tuning.run(key, ways, work, x.device)
    return dx, dweight, dbias, dresidual


def _streamed_backward(
    view: View, given: Incoming, norm: Norm, dx: Tensor, dresidual: Tensor
) -> tuple[Tensor, Tensor]:
    """Write dx, and dresidual if it is not empty; dweight and dbias."""
    sum_u, sum_ux, _ = passes.reduce(view, given, norm)
    dweight, dbias = merged(sum_u, sum_ux, norm)
    through = (dweight, dbias) if norm.batch_stats else None
    passes.backward_apply(view, given, norm, dx, dresidual, through=through)
    return dweight, dbias


def merged(sum_u: Tensor, sum_ux: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """dweight and dbias, from sums of u and u * (x - mean) over parts: [parts, C] fp32."""
    parts, c = sum_u.shape
    dweight, dbias = torch.empty_like(sum_u[0]), torch.empty_like(sum_u[0])
    block_c = min(MERGE_CHANNELS, power_of_2(c))
    launch(
        bn_act_bwd_merge_kernel, cdiv(c, block_c), sum_u, sum_ux, norm.var, dweight, dbias, parts,
        c, norm.eps, device=sum_u.device, warps=4, BLOCK_P=MERGE_PARTS, BLOCK_C=block_c,
    )  # fmt: skip
    return dweight, dbias
