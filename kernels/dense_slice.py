"""Some channels of a buffer [N, LD, ...], beside a dense tensor of as many channels."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, View, vector
from .tile import tile


@triton.jit
def slice_tile(
    n, c0, i0, C, LD, HW, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """Addresses of a tile in a dense tensor of the slice's C channels, and in the buffer of LD."""
    start, offs, inside = tile(n, c0, i0, C, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    first, buffer_offs, _ = tile(n, c0, i0, LD, HW, NHWC, WIDE, BLOCK_C, BLOCK_HW)
    return start + offs, first + buffer_offs, inside


class Slice(View):
    """Some channels of a buffer [N, LD, ...]: ``c`` of its ``ld``, from ``start`` on."""

    def __init__(self, op: str, buffer: Tensor, start: int, channels: int):
        super().__init__(op, buffer, images=False)
        if buffer.dim() != 4:
            raise ValueError(f"{op}: buffer: wanted 4 dimensions, got {buffer.dim()}")
        self.start, self.ld, self.c = start, self.c, channels
        if not 0 <= start <= start + channels <= self.ld:
            raise ValueError(
                f"{op}: channels: wanted some of the buffer's {self.ld}, got {start} to"
                f" {start + channels}"
            )

    def flags(self, config: Config) -> dict[str, int | bool]:
        flags = super().flags(config)
        if self.nhwc:
            flags["ALIGN"] = math.gcd(self.c, self.ld, 16)
            flags["WIDE"] = self.ld * flags["BLOCK_HW"] >= 2**31
        return flags

    def of(self, buffer: Tensor) -> Tensor:
        """The slice, whose first element's address a kernel is given."""
        return buffer.narrow(1, self.start, self.c)

    def dense(self) -> Tensor:
        """A new tensor of the slice's shape."""
        return torch.empty_like(self.of(self.x))

    def like(self, name: str, t: Tensor) -> None:
        """Check a tensor of the slice's shape: it must lie in memory as the buffer does."""
        wanted = (self.images, self.c, *self.x.shape[2:])
        layout = torch.channels_last if self.nhwc else torch.contiguous_format
        if t.shape != wanted or t.dtype != self.x.dtype:
            raise ValueError(
                f"{self.op}: {name}: wanted {self.x.dtype} {wanted}, got {t.dtype} {tuple(t.shape)}"
            )
        if t.numel() and not t.is_contiguous(memory_format=layout):
            raise ValueError(
                f"{self.op}: {name}: wanted the buffer's memory layout (strides"
                f" {self.x.stride()}), got strides {t.stride()}"
            )

    def parameters(self, **named: Tensor | None) -> list[Tensor | None]:
        return [vector(self.op, name, t, self.c) for name, t in named.items()]

    def numbers(self, **named: Tensor | None) -> list[Tensor | None]:
        """The slice's part of numbers a channel of the buffer, which a kernel changes in place."""
        end = self.start + self.c
        for name, t in named.items():
            fits = t is None or (t.dim() == 1 and len(t) >= end and t.is_contiguous())
            if not fits or (t is not None and t.dtype != torch.float32):
                raise ValueError(
                    f"{self.op}: {name}: wanted contiguous torch.float32, [{end}] or longer, got"
                    f" {t.dtype} {tuple(t.shape)}"
                )
        return [None if t is None else t[self.start : end] for t in named.values()]
