"""Where a program's tile lies in memory, and the bit mask that goes with it.

Kernels see a dense tensor as ``n`` images: ``[HW, C]`` each in memory (NHWC), or ``[C, HW]``
(NCHW). A tile is two-dimensional in memory order, so its last axis is contiguous: the channels are
axis 1 where NHWC, axis 0 where not. Vectors along the channels are ``[BLOCK_C]`` and are spread
over a tile.

Addresses are a 64-bit start of the tile plus 32-bit offsets inside it; WIDE makes the offsets 64
bits for rows so long that a tile spans 2**31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def locate(
    pid, C, HW, tiles, NHWC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr
):  # fmt: skip
    """Image, first channel and first pixel of program ``pid``, and which of all chunks it has.

    A program has BLOCK_C channels of a chunk of ``tiles`` times BLOCK_HW pixels. Consecutive
    programs are neighbours in memory. Everything is a 64-bit integer.
    """
    c_blocks = tl.cdiv(C, BLOCK_C)
    chunks = tl.cdiv(tl.cdiv(HW, BLOCK_HW), tiles)
    if NHWC:
        c_block = pid % c_blocks
        part = pid // c_blocks
        n = part // chunks
        chunk = part % chunks
    else:
        chunk = pid % chunks
        c_block = pid // chunks % c_blocks
        n = pid // chunks // c_blocks
        part = n * chunks + chunk
    first = chunk.to(tl.int64) * tiles * BLOCK_HW
    return n.to(tl.int64), c_block.to(tl.int64) * BLOCK_C, first, part.to(tl.int64)


@triton.jit
def tiles_here(first, HW, tiles, BLOCK_HW: tl.constexpr):
    """How many tiles a program that starts at pixel ``first`` has: the last chunk has fewer."""
    return tl.minimum(tl.cdiv(HW - first, BLOCK_HW), tiles).to(tl.int32)


@triton.jit
def aligned(C, HW, NHWC: tl.constexpr, ALIGN: tl.constexpr):
    """C and HW, such that the compiler knows that a row of memory is a multiple of ALIGN."""
    if NHWC:
        C = C // ALIGN * ALIGN
    else:
        HW = HW // ALIGN * ALIGN
    return C, HW


@triton.jit
def tile(
    n, c0, i0, C, HW,
    NHWC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """Address of a tile's first element, offsets of all from there, and which are in the tensor."""
    c = tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_HW)
    in_c = c < C - c0
    in_hw = i < HW - i0
    if WIDE:
        c = c.to(tl.int64)
        i = i.to(tl.int64)
    if NHWC:
        start = (n * HW + i0) * C + c0
        offs = i[:, None] * C + c[None, :]
        inside = in_hw[:, None] & in_c[None, :]
    else:
        start = (n * C + c0) * HW + i0
        offs = c[:, None] * HW + i[None, :]
        inside = in_c[:, None] & in_hw[None, :]
    return start, offs, inside


@triton.jit
def mask_tile(
    n, c0, i0, C, HW,
    NHWC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """The same for the tile's bytes in a bit mask ``[rows, ceil(cols / 8)]`` (layout.pack_mask)."""
    if NHWC:
        return tile(n, c0 // 8, i0, (C + 7) // 8, HW, NHWC, WIDE, BLOCK_C // 8, BLOCK_HW)
    else:
        return tile(n, c0, i0 // 8, C, (HW + 7) // 8, NHWC, WIDE, BLOCK_C, BLOCK_HW // 8)


@triton.jit
def pack_bits(passes):
    """[A, B] of booleans -> [A, B/8] bytes; bit k of byte j is column 8*j + k."""
    A: tl.constexpr = passes.shape[0]
    B: tl.constexpr = passes.shape[1]
    bits = tl.reshape(passes.to(tl.int32), (A, B // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed):
    """[A, B] bytes -> [A, 8*B] booleans"""
    A: tl.constexpr = packed.shape[0]
    B: tl.constexpr = packed.shape[1]
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (A, 8 * B)) != 0


@triton.jit
def spread(v, NHWC: tl.constexpr):
    """[BLOCK_C] -> a vector along the channel axis of a tile"""
    return tl.expand_dims(v, 0 if NHWC else 1)


@triton.jit
def sum_pixels(t, NHWC: tl.constexpr):
    """Sums of a tile over its pixels: [BLOCK_C]"""
    return tl.sum(t, 0 if NHWC else 1)


@triton.jit
def load_channels(ptr, c0, C, BLOCK_C: tl.constexpr, other: tl.constexpr):
    """[BLOCK_C] fp32 of a per-channel vector of any dtype; ``other`` where it is None or ends."""
    offs = tl.arange(0, BLOCK_C)
    if ptr is None:
        return tl.full((BLOCK_C,), other, tl.float32)
    else:
        return tl.load(ptr + c0 + offs, mask=offs < C - c0, other=other).to(tl.float32)
