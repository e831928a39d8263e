"""Memory layouts: which of the two dense forms a tensor is in, and the bit mask that goes with it.

Kernels see a tensor as a matrix of its memory order: ``[N*H*W, C]`` when the channels are
innermost (channels_last, or nothing behind the channel), ``[N*C, H*W]`` otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import observers


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense format PyTorch would give an elementwise result of ``x``."""
    if x.dim() == 4 and not x.is_contiguous():
        if x.is_contiguous(memory_format=torch.channels_last) or _channels_innermost(x):
            return torch.channels_last
    return torch.contiguous_format


def _channels_innermost(x: Tensor) -> bool:
    # A slice of a channels_last tensor is not dense, but PyTorch's result for it is channels_last.
    n, c, h, w = x.stride()
    return c == 1 and c < w <= h <= n and x.shape[1] > 1


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x`` itself when it is dense in the format of ``like`` (default: its own), else a copy."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        return x  # vmap knows no memory formats, and ops are plain PyTorch there
    layout = memory_format(x if like is None else like)
    y = x.contiguous(memory_format=layout)
    if y is not x and not compiling and observers.observed():
        name = str(layout).removeprefix("torch.").removesuffix("_format")
        reason = f"strides {x.stride()} are not {name}, which the next op reads"
        moved = 2 * x.numel() * x.element_size()
        observers.notify(observers.Event("copy", "aten", reason, 1, moved, moved))
    return y


def dense_like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """An optional second operand, dense in the format of ``x``."""
    return None if t is None else dense(t, like=x)


def in_layout(layout: torch.memory_format, *tensors: Tensor | None) -> list[Tensor | None]:
    """Optional tensors, dense in ``layout``."""
    return [None if t is None else t.contiguous(memory_format=layout) for t in tensors]


def rows_cols(x: Tensor) -> tuple[int, int]:
    """The shape of the matrix that a dense ``x [N, C, ...]`` is in memory."""
    channels, inner = x.shape[1], math.prod(x.shape[2:])
    planar = x.shape[0] * channels, inner
    interleaved = x.shape[0] * inner, channels
    if inner == 1 or memory_format(x) == torch.channels_last:
        return interleaved
    return planar


def mask_shape(x: Tensor) -> tuple[int, int]:
    """``[rows, ceil(cols / 8)]``: one bit an element, each row padded to a byte."""
    rows, cols = rows_cols(x)
    return rows, (cols + 7) // 8


def pack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Pack a boolean ``mask`` of ``like``'s shape into bytes; bit k of byte j is column 8*j + k."""
    rows, cols = rows_cols(like)
    mask = dense(mask, like)
    flat = mask.permute(0, 2, 3, 1) if memory_format(like) == torch.channels_last else mask
    bits = torch.nn.functional.pad(flat.reshape(rows, cols).to(torch.uint8), (0, -cols % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=like.device)
    return (bits.view(rows, (cols + 7) // 8, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """The boolean mask of ``like``'s shape and format that ``pack_mask`` packed."""
    rows, cols = rows_cols(like)
    shifts = torch.arange(8, dtype=torch.uint8, device=like.device)
    bits = ((packed[..., None] >> shifts) & 1).view(rows, -1)[:, :cols].bool()
    if memory_format(like) == torch.channels_last:
        n, c, h, w = like.shape
        return bits.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return bits.reshape(like.shape)


def conv_memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The format of PyTorch's ``conv2d(x, weight)``: channels_last if either operand is."""
    if torch.channels_last in (_suggested(x), _suggested(weight)):
        return torch.channels_last
    return torch.contiguous_format


def _suggested(x: Tensor) -> torch.memory_format:
    # ATen's suggest_memory_format: by strides alone, so that size-1 dimensions are not ambiguous.
    if x.dim() != 4:
        return torch.contiguous_format
    smallest = 0
    if x.stride(1) == 0:
        return torch.contiguous_format
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or x.stride(d) < smallest:
            return torch.contiguous_format
        if d == 0 and smallest == x.stride(1):
            return torch.contiguous_format
        smallest = x.stride(d) * max(1, x.shape[d])
    return torch.channels_last
