"""What highway and lstm_cell share: rows of pre-activations side by side, as one GEMM wrote them.

A row of ``parts [rows, PARTS * C]`` belongs to a row of ``x [rows, C]``. In the terms of tile.py
rows are pixels of one image, and their columns are its channels.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, View
from .tile import aligned, locate, tile

# The first is the default: 8 elements a thread of every part. None was measured on a GPU yet.
CONFIGS = (Config(1024, 1024, 4), Config(2048, 1024, 8))


@triton.jit
def tanh(z):
    """tanh, with a relative error of some units in the last place for small arguments too."""
    e = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - e) / (1.0 + e)
    # Below 0.3 the difference cancels; the continued fraction of tanh (Lambert 1761) to its fifth
    # denominator is off by less than 2e-10 of it there.
    s = z * z
    small = z * (945.0 + s * (105.0 + s)) / (945.0 + s * (420.0 + s * 15.0))
    return tl.where(tl.abs(z) < 0.3, small, tl.where(z < 0.0, -large, large))


@triton.jit
def rows_tile(
    C, rows, PARTS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """Addresses of this program's tile in x and in the first part, and which are in them.

    Also C, the distance from one part to the next.
    """
    C, _ = aligned(C, rows, True, ALIGN)
    _, c0, i0, _ = locate(tl.program_id(0), C, rows, 1, True, BLOCK_C, BLOCK_HW)
    start, offs, inside = tile(0, c0, i0, C, rows, True, WIDE, BLOCK_C, BLOCK_HW)
    first, part_offs, _ = tile(0, c0, i0, PARTS * C, rows, True, WIDE, BLOCK_C, BLOCK_HW)
    return start + offs, first + part_offs, inside, C


@triton.jit
def load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, at, value, inside):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


class Rows(View):
    """x [rows, C], and how many parts of C numbers a row of pre-activations has."""

    def __init__(self, op: str, x: Tensor, name: str, parts: Tensor, count: int):
        super().__init__(op, x, images=False)
        self.parts = count
        wanted = x.shape[0], count * x.shape[1]
        if x.dim() != 2 or parts.shape != wanted or not parts.is_contiguous():
            raise ValueError(
                f"{op}: {name}: wanted contiguous {wanted} for x {tuple(x.shape)}, got"
                f" {tuple(parts.shape)} with strides {parts.stride()}"
            )
        if parts.dtype != x.dtype or parts.device != x.device:
            raise TypeError(
                f"{op}: {name}: wanted {x.dtype} on {x.device}, got {parts.dtype} on {parts.device}"
            )

    def flags(self, config: Config) -> dict[str, int | bool]:
        flags = super().flags(config)
        flags["PARTS"] = self.parts
        flags["WIDE"] = self.parts * self.c * flags["BLOCK_HW"] >= 2**31
        flags["ALIGN"] = math.gcd(self.c, 16)
        return flags
