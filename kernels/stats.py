"""Per-channel mean and variance of x: partial moments of chunks of pixels, then one merge."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import Config, View, cdiv, launch, power_of_2
from .tile import aligned, locate, spread, sum_pixels, tile, tiles_here

# The first is the default. None was measured on a GPU yet.
CONFIGS = (Config(4096, 64, 4), Config(8192, 64, 8), Config(2048, 64, 4), Config(4096, 128, 4))
MERGE_CHANNELS, MERGE_PARTS = 16, 64


@triton.jit
def add_tile(mean, m2, x, inside, before, count, NHWC: tl.constexpr):
    """Mean and M2 of ``before`` values a channel and of a tile with ``count`` more, merged."""
    tile_mean = sum_pixels(x, NHWC) / count
    deviation = tl.where(inside, x - spread(tile_mean, NHWC), 0.0)
    # Chan, Golub and LeVeque 1983, eq. 2.1
    delta = tile_mean - mean
    share = count / (before + count)
    mean += delta * share
    m2 += sum_pixels(deviation * deviation, NHWC) + delta * delta * (before * share)
    return mean, m2


# Computes: mean and M2 = sum (x - mean)^2 of BLOCK_C channels over a chunk of pixels
# Reads:    x [N, C, HW] once
# Writes:   mean, m2 [N, chunks, C] fp32
# Traffic:  N*C*HW*sizeof(x) bytes, + 8*N*chunks*C (below 1% of it)
# Split:    one program = BLOCK_C channels of a chunk, tile by tile: a tile's mean, its deviations
#           from that (both in registers), then Chan's merge with the tiles before it in fp32


@triton.jit(do_not_specialize=["C", "HW", "tiles"])
def bn_stats_kernel(
    x_ptr, mean_ptr, m2_ptr, C, HW, tiles,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    C, HW = aligned(C, HW, NHWC, ALIGN)
    n, c0, first, part = locate(tl.program_id(0), C, HW, tiles, NHWC, BLOCK_C, BLOCK_HW)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(tiles_here(first, HW, tiles, BLOCK_HW)):
        i0 = first + t * BLOCK_HW
        start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
        x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(HW - i0, BLOCK_HW).to(tl.float32)
        mean, m2 = add_tile(mean, m2, x, inside, 1.0 * t * BLOCK_HW, count, NHWC)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    tl.store(mean_ptr + part * C + offs_c, mean, mask=offs_c < C)
    tl.store(m2_ptr + part * C + offs_c, m2, mask=offs_c < C)


# Computes: mean and biased variance of a channel from its partial moments
# Reads:    part_mean, part_m2 [parts, C] fp32; of every ``chunks`` parts the last is shorter
# Writes:   mean, var [C] fp32
# Traffic:  8*parts*C bytes
# Split:    one program = BLOCK_C channels; fp64 sums in a fixed order, around the first part's mean


@triton.jit(do_not_specialize=["parts", "chunks", "C", "HW", "chunk"])
def bn_stats_merge_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, var_ptr, parts, chunks, C, HW, chunk,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    shift = tl.load(part_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float64)
    total = tl.zeros((BLOCK_C,), tl.float64)  # of the values less the shift
    square = tl.zeros((BLOCK_C,), tl.float64)
    number = tl.zeros((BLOCK_C,), tl.float64)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & mask_c[None, :]
        offs = p[:, None].to(tl.int64) * C + offs_c[None, :]
        count = tl.minimum(HW - (p % chunks) * chunk, chunk)
        count = tl.where(p < parts, count, 0).to(tl.float64)[:, None]
        mean = tl.load(part_mean_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        m2 = tl.load(part_m2_ptr + offs, mask=inside, other=0.0).to(tl.float64)
        delta = tl.where(inside, mean - shift[None, :], 0.0)
        total += tl.sum(count * delta, 0)
        square += tl.sum(m2 + count * delta * delta, 0)
        number += tl.sum(tl.broadcast_to(count, (BLOCK_P, BLOCK_C)), 0)
    mean = total / number
    tl.store(mean_ptr + offs_c, (shift + mean).to(tl.float32), mask=mask_c)
    var = tl.maximum(square / number - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(var_ptr + offs_c, var.to(tl.float32), mask=mask_c)


@dataclass(frozen=True)
class Moments:
    """Mean and M2 of chunks of pixels: [n * ceil(pixels / chunk), C] fp32 each.

    Args:
        chunk: pixels of a chunk; the last one of an image is shorter.
        pixels: of an image.
    """

    mean: Tensor
    m2: Tensor
    chunk: int
    pixels: int


def moments(view: View) -> Moments:
    """Partial moments of the view's tensor; per image if the view tells images apart."""

    def work(config: Config) -> Moments:
        flags = view.flags(config)
        chunk = view.chunk(flags)
        parts = view.n * cdiv(view.hw, chunk)
        found = Moments(view.new(parts, view.c), view.new(parts, view.c), chunk, view.hw)
        launch(
            bn_stats_kernel, view.programs(flags, chunk), view.x, found.mean, found.m2,
            view.c, view.hw, chunk // flags["BLOCK_HW"], device=view.x.device, warps=config.warps,
            **flags,
        )  # fmt: skip
        return found

    return tuning.run(view.key("bn_stats"), CONFIGS, work, view.x.device)


def batch_statistics(
    found: Moments, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] fp32 over everything; NaN without values, as PyTorch's."""
    parts, c = found.mean.shape
    mean, var = into or (found.mean.new_empty(c) for _ in "mv")
    block_c = min(MERGE_CHANNELS, power_of_2(c))
    launch(
        bn_stats_merge_kernel, cdiv(c, block_c), found.mean, found.m2, mean, var, parts,
        cdiv(found.pixels, found.chunk), c, found.pixels, found.chunk, device=mean.device, warps=4,
        BLOCK_P=MERGE_PARTS, BLOCK_C=block_c,
    )  # fmt: skip
    return mean, var
