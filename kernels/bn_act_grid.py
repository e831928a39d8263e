"""``bn_act`` and its backward in one launch, where all tiles of a tensor are on the chip at once.

Every program keeps one tile in registers, stores its sums, waits for the programs that have the
same channels, and goes on with the sums of all: x is read once. The launch is a cooperative one, so
a program that is waited for is running. The counters that programs meet at are zeroed before each.

In the interpreter programs run one after another: there a launch is two, the part before the
meeting and the part behind it, which loads its tile again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import act_forward, act_mask
from .launch import Config, View, cdiv, launch, programs_at_once
from .passes import Incoming, Norm
from .stats import add_tile
from .stream import bn_scale, gradient_tile
from .tile import aligned, load_channels, locate, mask_tile, pack_bits, spread, sum_pixels, tile

# 64 values of x a thread; 32 of x and dy, since more of them spill. Not measured.
FORWARD, BACKWARD = Config(16384, 64, 8), Config(8192, 64, 8)
BLOCK_PARTS = 8


@triton.jit
def meet(arrived_ptr, parts):
    """Wait for all programs that have a part of these channels."""
    tl.debug_barrier()  # one thread speaks for the stores of all
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < parts:
        pass
    tl.debug_barrier()


@triton.jit
def load_parts(ptr, p0, parts, c0, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_P, BLOCK_C] of what programs stored, zeros where there is none; past the L1."""
    p = p0 + tl.arange(0, BLOCK_P)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    inside = (p < parts)[:, None] & (offs_c < C)[None, :]
    offs = p[:, None].to(tl.int64) * C + offs_c[None, :]
    return tl.load(ptr + offs, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_parts(ptr, parts, c0, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of all parts of BLOCK_C channels, in a fixed order"""
    total = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        total += tl.sum(load_parts(ptr, p0, parts, c0, C, BLOCK_P, BLOCK_C), 0)
    return total


@triton.jit
def pixels_of(p0, parts, HW, BLOCK_P: tl.constexpr, BLOCK_HW: tl.constexpr):
    """[BLOCK_P, 1] how many pixels a part has, 0 where there is none; an image's last has fewer."""
    p = p0 + tl.arange(0, BLOCK_P)
    pixels = tl.minimum(HW - p % tl.cdiv(HW, BLOCK_HW) * BLOCK_HW, BLOCK_HW)
    return tl.where(p < parts, pixels, 0).to(tl.float32)[:, None]


@triton.jit
def merge_moments(
    mean_ptr, m2_ptr, parts, c0, C, HW, count,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance in fp32: the mean, then its error and the deviations from it.

    Chan, Golub and LeVeque 1983, eqs. 1.7 (the error's share of the variance) and 2.1.
    """
    total = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        pixels = pixels_of(p0, parts, HW, BLOCK_P, BLOCK_HW)
        total += tl.sum(pixels * load_parts(mean_ptr, p0, parts, c0, C, BLOCK_P, BLOCK_C), 0)
    mean = total / count
    error = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        pixels = pixels_of(p0, parts, HW, BLOCK_P, BLOCK_HW)
        m2 = load_parts(m2_ptr, p0, parts, c0, C, BLOCK_P, BLOCK_C)
        delta = load_parts(mean_ptr, p0, parts, c0, C, BLOCK_P, BLOCK_C) - mean[None, :]
        delta = tl.where(pixels > 0.0, delta, 0.0)
        error += tl.sum(pixels * delta, 0)
        square += tl.sum(m2 + pixels * delta * delta, 0)
    error /= count
    var = tl.maximum(square / count - error * error, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean + error, var


# Computes: mean, var of the batch; y = act(a * (x - mean) + bias + residual) unless y is None
# Reads:    x, residual [N, C, HW] once; the parts of all programs, from the L2
# Writes:   y [N, C, HW] once, mask one bit an element; mean, var [C]; part_mean, part_m2 [parts, C]
# Traffic:  (2 or 3)*N*C*HW*sizeof(x) + N*C*HW/8 bytes
# Split:    one program = one tile, in registers from the load to the store; all run at once


@triton.jit(do_not_specialize=["parts", "C", "HW"])
def bn_act_fwd_grid_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, part_mean_ptr,
    part_m2_ptr, arrived_ptr, parts, C, HW, count, eps, ACT: tl.constexpr, PHASE: tl.constexpr,
    BLOCK_P: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, part = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + start + offs, mask=inside, other=0.0)
    if PHASE != "behind":
        none = tl.zeros((BLOCK_C,), tl.float32)
        pixels = tl.minimum(HW - i0, BLOCK_HW).to(tl.float32)
        mean, m2 = add_tile(none, none, x.to(tl.float32), inside, 0.0, pixels, NHWC)
        tl.store(part_mean_ptr + part * C + offs_c, mean, mask=offs_c < C)
        tl.store(part_m2_ptr + part * C + offs_c, m2, mask=offs_c < C)
    if PHASE == "all":
        meet(arrived_ptr + c0 // BLOCK_C, parts)
    if PHASE != "before":
        mean, var = merge_moments(
            part_mean_ptr, part_m2_ptr, parts, c0, C, HW, count, BLOCK_P, BLOCK_C, BLOCK_HW
        )
        tl.store(mean_ptr + offs_c, mean, mask=(offs_c < C) & (part == 0))
        tl.store(var_ptr + offs_c, var, mask=(offs_c < C) & (part == 0))
        if y_ptr is not None:
            a = tl.rsqrt(var + eps) * load_channels(weight_ptr, c0, C, BLOCK_C, 1.0)
            z = (x.to(tl.float32) - spread(mean, NHWC)) * spread(a, NHWC)
            if bias_ptr is not None:
                z += spread(load_channels(bias_ptr, c0, C, BLOCK_C, 0.0), NHWC)
            if residual_ptr is not None:
                z += tl.load(residual_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
            y = act_forward(z, ACT).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + start + offs, y, mask=inside)
            if mask_ptr is not None:
                bits = pack_bits(act_mask(z, ACT) & inside)
                start, offs, inside = mask_tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
                tl.store(mask_ptr + start + offs, bits, mask=inside)


# Computes: dweight, dbias, dx and dresidual at once (stream_bwd_reduce, stream_bwd_apply)
# Reads:    dy, x [N, C, HW] once; mask, or residual, if z needs it; the parts of all programs
# Writes:   dx, dresidual [N, C, HW] once; dweight, dbias [C]; part_u, part_ux [parts, C]
# Traffic:  (3 or 4)*N*C*HW*sizeof(x) + N*C*HW/8 bytes
# Split:    as the forward's


@triton.jit(do_not_specialize=["parts", "C", "HW"])
def bn_act_bwd_grid_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, dweight_ptr,
    dbias_ptr, dx_ptr, dresidual_ptr, part_u_ptr, part_ux_ptr, arrived_ptr, parts, C, HW, count,
    eps, BATCH_STATS: tl.constexpr, ACT: tl.constexpr, PHASE: tl.constexpr, BLOCK_P: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, part = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    _, rstd, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    center = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    shift = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    u, centered = gradient_tile(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, center, a, shift, n, c0, i0, C, HW,
        ACT, NHWC, WIDE, BLOCK_C, BLOCK_HW,
    )  # fmt: skip
    if PHASE != "behind":
        at = part * C + offs_c
        tl.store(part_u_ptr + at, sum_pixels(u, NHWC), mask=offs_c < C)
        tl.store(part_ux_ptr + at, sum_pixels(u * centered, NHWC), mask=offs_c < C)
    if PHASE == "all":
        meet(arrived_ptr + c0 // BLOCK_C, parts)
    if PHASE != "before":
        dbias = sum_parts(part_u_ptr, parts, c0, C, BLOCK_P, BLOCK_C)
        dweight = sum_parts(part_ux_ptr, parts, c0, C, BLOCK_P, BLOCK_C) * rstd
        tl.store(dweight_ptr + offs_c, dweight, mask=(offs_c < C) & (part == 0))
        tl.store(dbias_ptr + offs_c, dbias, mask=(offs_c < C) & (part == 0))
        dx = u
        if BATCH_STATS:
            dx -= spread(dbias / count, NHWC) + centered * spread(rstd * (dweight / count), NHWC)
        dx *= spread(a, NHWC)
        start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + start + offs, u.to(dx_ptr.dtype.element_ty), mask=inside)


def fits(view: View, config: Config) -> bool:
    """Whether the device runs the programs of all tiles at once."""
    flags = view.flags(config)
    return view.programs(flags, flags["BLOCK_HW"]) <= programs_at_once(view.x.device)


def _meeting(kernel, config: Config, view: View, *args, eps: float, **flags) -> None:
    """Launch a kernel whose programs meet; ``args`` are those before its parts."""
    tiles = view.flags(config)
    parts = view.n * cdiv(view.hw, tiles["BLOCK_HW"])
    sums = view.new(parts, view.c), view.new(parts, view.c)
    groups = cdiv(view.c, tiles["BLOCK_C"])
    arrived = torch.zeros(groups, dtype=torch.int32, device=view.x.device)
    launch(
        kernel, parts * groups, *args, *sums, arrived, parts, view.c, view.hw, float(view.count),
        eps, device=view.x.device, warps=config.warps, meeting=True, BLOCK_P=BLOCK_PARTS, **flags,
        **tiles,
    )  # fmt: skip


def statistics(view: View) -> tuple[Tensor, Tensor]:
    """The batch's mean and variance: those of ``forward``, bit for bit."""
    return forward(view, None, None, None, Norm(), "identity")


def forward(
    view: View, residual: Tensor | None, y: Tensor | None, mask: Tensor | None, norm: Norm, act: str
) -> tuple[Tensor, Tensor]:
    """Write y and the bit mask; the batch's mean and variance."""
    mean, var = view.new(view.c), view.new(view.c)
    _meeting(
        bn_act_fwd_grid_kernel, FORWARD, view, view.x, residual, y, mask, norm.weight, norm.bias,
        mean, var, eps=norm.eps, ACT=act,
    )  # fmt: skip
    return mean, var


def backward(
    view: View, given: Incoming, norm: Norm, dx: Tensor, dresidual: Tensor
) -> tuple[Tensor, Tensor]:
    """Write dx, and dresidual if it is not empty; dweight and dbias."""
    dweight, dbias = view.new(view.c), view.new(view.c)
    _meeting(
        bn_act_bwd_grid_kernel, BACKWARD, view, given.dy, view.x, given.residual, given.mask,
        *norm.pointers, dweight, dbias, dx, dresidual if dresidual.numel() else None,
        eps=norm.eps, BATCH_STATS=norm.batch_stats, ACT=given.act,
    )  # fmt: skip
    return dweight, dbias
