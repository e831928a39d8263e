"""The steps of a dense block: ``dense_store``, ``dense_load``, ``dense_grad``, ``dense_finish``.

Layers read a growing slice of one buffer of channels, [N, LD, ...], and their gradients are added
into another. One launch each; ``dense_store`` and ``dense_grad`` have a second one, which merges
their sums: a channel's statistics are taken once, when it is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .activations import act_backward, act_forward
from .bn_act import gradient_sums
from .dense_slice import Slice, slice_tile
from .launch import Config, cdiv, launch, power_of_2
from .passes import no_statistics
from .stats import CONFIGS as STORE_CONFIGS
from .stats import MERGE_CHANNELS, MERGE_PARTS, Moments, add_tile, batch_statistics
from .stream import APPLY_CONFIGS, bn_scale
from .tile import aligned, load_channels, locate, spread, sum_pixels, tiles_here

# One: dense_grad adds in place, which a measurement cannot repeat. Not measured on a GPU yet.
GRAD_CONFIGS = (Config(4096, 64, 8),)


# Computes: the slice of the buffer becomes x; mean and M2 of x over chunks of pixels, if wanted
# Reads:    x [N, C, HW] once
# Writes:   C channels of the buffer [N, LD, HW] once; mean, m2 [N, chunks, C] fp32
# Traffic:  2*N*C*HW*sizeof(x) bytes; moments below 1% of it
# Split:    one program = BLOCK_C channels of a chunk; moments as in bn_stats_kernel


@triton.jit(do_not_specialize=["C", "LD", "HW", "tiles"])
def dense_store_kernel(
    x_ptr, y_ptr, mean_ptr, m2_ptr, C, LD, HW, tiles,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, first, part = locate(tl.program_id(0), C, HW, tiles, NHWC, BLOCK_C, BLOCK_HW)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(tiles_here(first, HW, tiles, BLOCK_HW)):
        i0 = first + t * BLOCK_HW
        at, at_y, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        tl.store(y_ptr + at_y, x, mask=inside)
        if mean_ptr is not None:
            count = tl.minimum(HW - i0, BLOCK_HW).to(tl.float32)
            before = 1.0 * t * BLOCK_HW
            mean, m2 = add_tile(mean, m2, x.to(tl.float32), inside, before, count, NHWC)
    if mean_ptr is not None:
        offs_c = c0 + tl.arange(0, BLOCK_C)
        tl.store(mean_ptr + part * C + offs_c, mean, mask=offs_c < C)
        tl.store(m2_ptr + part * C + offs_c, m2, mask=offs_c < C)


# Computes: h = relu(a * (x - mean) + bias), a = weight / sqrt(var + eps)
# Reads:    x, the first C channels of the buffer [N, LD, HW], once
# Writes:   h [N, C, HW] once
# Traffic:  2*N*C*HW*sizeof(x) bytes; eager moves 7 (concatenation, statistics, norm, ReLU)
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "LD", "HW"])
def dense_load_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, h_ptr, C, LD, HW, eps,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, _ = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    at, at_x, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    z = (x - spread(mean, NHWC)) * spread(a, NHWC) + spread(bias, NHWC)
    tl.store(h_ptr + at, act_forward(z, "relu").to(h_ptr.dtype.element_ty), mask=inside)


# Computes: dx += a * u, u = dh * relu'(a * (x - mean) + bias); sums of u and u * (x - mean) over
#           chunks of pixels
# Reads:    dh [N, C, HW], x and dx, the first C channels of their buffers, once
# Writes:   dx once; sum_u, sum_ux [N, chunks, C] fp32
# Traffic:  4*N*C*HW*sizeof(x) bytes; sums below 1% of it; eager moves 11
# Split:    one program = BLOCK_C channels of a chunk; a tile of at most 256 pixels is summed as a
#           tree, then added to the program's sums in fp32


@triton.jit(do_not_specialize=["C", "LD", "HW", "tiles"])
def dense_grad_kernel(
    dx_ptr, dh_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, sum_u_ptr, sum_ux_ptr,
    C, LD, HW, tiles, eps, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, first, part = locate(tl.program_id(0), C, HW, tiles, NHWC, BLOCK_C, BLOCK_HW)
    _, _, a = bn_scale(weight_ptr, var_ptr, c0, C, eps, BLOCK_C)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    bias = load_channels(bias_ptr, c0, C, BLOCK_C, 0.0)
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_ux = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(tiles_here(first, HW, tiles, BLOCK_HW)):
        i0 = first + t * BLOCK_HW
        at, at_x, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        u = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, x - spread(mean, NHWC), 0.0)
        u = act_backward(centered * spread(a, NHWC) + spread(bias, NHWC), u, "relu")
        dx = tl.load(dx_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        dx += u * spread(a, NHWC)
        tl.store(dx_ptr + at_x, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        sum_u += sum_pixels(u, NHWC)
        sum_ux += sum_pixels(u * centered, NHWC)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(sum_u_ptr + part * C + offs_c, sum_u, mask=offs_c < C)
    tl.store(sum_ux_ptr + part * C + offs_c, sum_ux, mask=offs_c < C)


# Computes: dbias = sum u, dweight = rstd * sum u * (x - mean); adds batch norm's q and r
#           (csrc/bn_math.h) of the layer to those of its channels, if wanted
# Reads:    part_u, part_ux [parts, C] fp32; weight, var, q, r [C]
# Writes:   dweight, dbias, q, r [C] fp32
# Traffic:  8*parts*C bytes
# Split:    one program = BLOCK_C channels; fp64 sums in a fixed order


@triton.jit(do_not_specialize=["parts", "C", "count"])
def dense_grad_merge_kernel(
    part_u_ptr, part_ux_ptr, weight_ptr, var_ptr, dweight_ptr, dbias_ptr, q_ptr, r_ptr,
    parts, C, count, eps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_u, sum_ux = gradient_sums(part_u_ptr, part_ux_ptr, offs_c, parts, C, BLOCK_P, BLOCK_C)
    var = tl.load(var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + eps)
    dweight = sum_ux * rstd
    tl.store(dweight_ptr + offs_c, dweight.to(tl.float32), mask=mask_c)
    tl.store(dbias_ptr + offs_c, sum_u.to(tl.float32), mask=mask_c)
    if q_ptr is not None:
        share = rstd / count
        if weight_ptr is not None:
            share *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
        q = tl.load(q_ptr + offs_c, mask=mask_c, other=0.0) - (share * rstd * dweight).to(
            tl.float32
        )
        r = tl.load(r_ptr + offs_c, mask=mask_c, other=0.0) - (share * sum_u).to(tl.float32)
        tl.store(q_ptr + offs_c, q, mask=mask_c)
        tl.store(r_ptr + offs_c, r, mask=mask_c)


# Computes: dy = dx + q * (x - mean) + r for the channels that one layer wrote
# Reads:    C channels of x and dx in their buffers [N, LD, HW], once
# Writes:   dy [N, C, HW] once
# Traffic:  3*N*C*HW*sizeof(x) bytes
# Split:    one program = one tile; fp32 arithmetic, one rounding at the store


@triton.jit(do_not_specialize=["C", "LD", "HW"])
def dense_finish_kernel(
    dx_ptr, x_ptr, mean_ptr, q_ptr, r_ptr, dy_ptr, C, LD, HW,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    LD, _ = aligned(LD, HW, NHWC, ALIGN)
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, i0, _ = locate(tl.program_id(0), C, HW, 1, NHWC, BLOCK_C, BLOCK_HW)
    at, at_x, inside = slice_tile(n, c0, i0, C, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dx_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    mean = load_channels(mean_ptr, c0, C, BLOCK_C, 0.0)
    q = load_channels(q_ptr, c0, C, BLOCK_C, 0.0)
    r = load_channels(r_ptr, c0, C, BLOCK_C, 0.0)
    dy = dx + ((x - spread(mean, NHWC)) * spread(q, NHWC) + spread(r, NHWC))
    tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=inside)


def dense_store(
    buffer: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, start: int
) -> None:
    view = Slice("dense_store", buffer, start, x.shape[1])
    view.like("x", x)
    mean, var = view.numbers(mean=mean, var=var)
    if not x.numel():
        for into, none in zip((mean, var), no_statistics(view), strict=True):
            if into is not None:
                into.copy_(none)
        return

    def work(config: Config) -> Moments | None:
        flags = view.flags(config)
        chunk = view.chunk(flags)
        parts, found = view.n * cdiv(view.hw, chunk), None
        if mean is not None:
            found = Moments(view.new(parts, view.c), view.new(parts, view.c), chunk, view.hw)
        launch(
            dense_store_kernel, view.programs(flags, chunk), x, view.of(buffer),
            found and found.mean, found and found.m2, view.c, view.ld, view.hw,
            chunk // flags["BLOCK_HW"], device=x.device, warps=config.warps, **flags,
        )  # fmt: skip
        return found

    key = view.key("dense_store", view.ld, mean is not None)
    found = tuning.run(key, STORE_CONFIGS, work, x.device)
    if found is not None:
        batch_statistics(found, into=(mean, var))


def dense_load(
    h: Tensor, buffer: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    view = Slice("dense_load", buffer, 0, h.shape[1])
    view.like("h", h)
    norm = view.parameters(mean=mean, var=var, weight=weight, bias=bias)
    if not h.numel():
        return

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            dense_load_kernel, view.programs(flags, flags["BLOCK_HW"]), buffer, *norm, h, view.c,
            view.ld, view.hw, eps, device=h.device, warps=config.warps, **flags,
        )  # fmt: skip

    tuning.run(view.key("dense_load", view.ld), APPLY_CONFIGS, work, h.device)


def dense_grad(
    dbuffer: Tensor, q: Tensor | None, r: Tensor | None, dh: Tensor, buffer: Tensor, mean: Tensor,
    var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    view = Slice("dense_grad", buffer, 0, dh.shape[1])
    view.operand("dbuffer", dbuffer)
    view.like("dh", dh)
    norm = view.parameters(mean=mean, var=var, weight=weight, bias=bias)
    deferred = view.numbers(q=q, r=r)
    dweight, dbias = view.new(view.c), view.new(view.c)
    if not dh.numel():
        return dweight.zero_(), dbias.zero_()

    def work(config: Config) -> tuple[Tensor, Tensor]:
        flags = view.flags(config)
        chunk = view.chunk(flags)
        parts = view.n * cdiv(view.hw, chunk)
        sums = view.new(parts, view.c), view.new(parts, view.c)
        launch(
            dense_grad_kernel, view.programs(flags, chunk), dbuffer, dh, buffer, *norm, *sums,
            view.c, view.ld, view.hw, chunk // flags["BLOCK_HW"], eps, device=dh.device,
            warps=config.warps, **flags,
        )  # fmt: skip
        return sums

    sums = tuning.run(view.key("dense_grad", view.ld), GRAD_CONFIGS, work, dh.device)
    block_c = min(MERGE_CHANNELS, power_of_2(view.c))
    launch(
        dense_grad_merge_kernel, cdiv(view.c, block_c), *sums, norm[2], norm[1], dweight, dbias,
        *deferred, sums[0].shape[0], view.c, view.count, eps, device=dh.device, warps=4,
        BLOCK_P=MERGE_PARTS, BLOCK_C=block_c,
    )  # fmt: skip
    return dweight, dbias


def dense_finish(
    dbuffer: Tensor, buffer: Tensor, mean: Tensor, q: Tensor, r: Tensor, start: int, channels: int
) -> Tensor:
    view = Slice("dense_finish", buffer, start, channels)
    view.operand("dbuffer", dbuffer)
    numbers = view.parameters(mean=mean, q=q, r=r)
    dy = view.dense()
    if not dy.numel():
        return dy

    def work(config: Config) -> None:
        flags = view.flags(config)
        launch(
            dense_finish_kernel, view.programs(flags, flags["BLOCK_HW"]), view.of(dbuffer),
            view.of(buffer), *numbers, dy, view.c, view.ld, view.hw, device=dy.device,
            warps=config.warps, **flags,
        )  # fmt: skip

    tuning.run(view.key("dense_finish", view.ld), APPLY_CONFIGS, work, dy.device)
    return dy
