"""``add_norm`` and its backward on Triton.

Forward: one launch. Backward: one, with a norm two (the partial sums of the parameters' gradients
are merged), three for rows of more than BLOCK numbers, whose parameters' gradients take a pass of
their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import REDUCE_PROGRAMS, cdiv, launch, power_of_2
from .norm_rows import (
    add_norm_bwd_kernel,
    add_norm_bwd_merge_kernel,
    add_norm_bwd_reduce_kernel,
    add_norm_fwd_kernel,
)
from .stats import MERGE_CHANNELS, MERGE_PARTS

# Columns of a block, and values of a tile; larger tiles of the backward spill. Not measured.
BLOCK, TILE, BACKWARD_TILE = 4096, 4096, 2048
COLUMNS, ROWS = 64, 64  # of a tile of the parameters' gradients where rows are long


def _blocks(d: int, tile: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(BLOCK, max(16, power_of_2(d)))
    return max(1, min(64, tile // columns)), columns


def _checked(op: str, x: Tensor, **operands: Tensor | None) -> None:
    """Everything has x's shape and rows in memory, or is a parameter of its rows or columns."""
    wanted = {"row_scale": (x.shape[0],), "weight": (x.shape[1],), "bias": (x.shape[1],)}
    for name, t in operands.items():
        shape = wanted.get(name, tuple(x.shape))
        if t is not None and (t.shape != shape or not t.is_contiguous()):
            raise ValueError(
                f"{op}: {name}: wanted contiguous {shape}, got {tuple(t.shape)} with strides"
                f" {t.stride()}"
            )


def _new(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def add_norm(
    branch: Tensor, shortcut: Tensor, weight: Tensor | None, bias: Tensor | None,
    keep: Tensor | None, row_scale: Tensor | None, scale: float, eps: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weight, bias, row_scale = (
        None if t is None else t.contiguous() for t in (weight, bias, row_scale)
    )
    operands = dict(branch=branch, shortcut=shortcut, weight=weight, bias=bias, keep=keep)
    _checked("add_norm", branch, **operands, row_scale=row_scale)
    rows, d = branch.shape
    y = branch.new_empty(0) if norm == "none" else torch.empty_like(branch)
    total = torch.empty_like(branch)
    mean = _new(branch, rows if norm == "layer" else 0)
    rstd = _new(branch, 0 if norm == "none" else rows)
    if branch.numel():
        block_r, block_d = _blocks(d, TILE)
        launch(
            add_norm_fwd_kernel, cdiv(rows, block_r), branch, shortcut, weight, bias, keep,
            row_scale, y, total, mean, rstd, rows, d, scale, eps, device=y.device, warps=4,
            NORM=norm, BLOCK_R=block_r, BLOCK_D=block_d,
        )  # fmt: skip
    return y, total, mean, rstd


def add_norm_backward(
    sum: Tensor, dy: Tensor | None, dsum: Tensor | None, weight: Tensor | None, mean: Tensor,
    rstd: Tensor, keep: Tensor | None, row_scale: Tensor | None, scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weight, row_scale = (None if t is None else t.contiguous() for t in (weight, row_scale))
    operands = dict(sum=sum, dy=dy, dsum=dsum, weight=weight, keep=keep, row_scale=row_scale)
    _checked("add_norm_backward", sum, **operands)
    rows, d = sum.shape
    scaled = keep is not None or row_scale is not None or scale != 1.0
    dshortcut = torch.empty_like(sum)
    dbranch = torch.empty_like(sum) if scaled else sum.new_empty(0)
    dweight, dbias = (_new(sum, 0 if dy is None else d).zero_() for _ in "wb")
    if not sum.numel():
        return dbranch, dshortcut, dweight, dbias
    block_r, block_d = _blocks(d, BACKWARD_TILE)
    tiles = cdiv(cdiv(rows, block_r), REDUCE_PROGRAMS)
    programs = cdiv(cdiv(rows, block_r), tiles)
    mean = mean if mean.numel() else None
    parts = None, None
    if dy is not None and d <= block_d:
        parts = _new(sum, programs, d), _new(sum, programs, d)
    launch(
        add_norm_bwd_kernel, programs, sum, dy, dsum, weight, mean, rstd, keep, row_scale,
        dbranch if scaled else None, dshortcut, *parts, rows, d, tiles, scale, device=sum.device,
        warps=8, NORM=norm, BLOCK_R=block_r, BLOCK_D=block_d,
    )  # fmt: skip
    if dy is not None:
        _parameters(sum, dy, mean, rstd, parts, dweight, dbias)
    return dbranch, dshortcut, dweight, dbias


def _parameters(total, dy, mean, rstd, parts, dweight, dbias) -> None:
    """Write dweight and dbias: merge their parts, which long rows do not have yet."""
    rows, d = total.shape
    if parts[0] is None:
        blocks = cdiv(d, COLUMNS)
        tiles = cdiv(cdiv(rows, ROWS) * blocks, REDUCE_PROGRAMS)
        chunks = cdiv(cdiv(rows, ROWS), tiles)
        parts = _new(total, chunks, d), _new(total, chunks, d)
        launch(
            add_norm_bwd_reduce_kernel, chunks * blocks, total, dy, mean, rstd, *parts, rows, d,
            tiles, device=total.device, warps=4, BLOCK_R=ROWS, BLOCK_D=COLUMNS,
        )  # fmt: skip
    launch(
        add_norm_bwd_merge_kernel, cdiv(d, MERGE_CHANNELS), *parts, dweight, dbias,
        parts[0].shape[0], d, device=total.device, warps=4, BLOCK_P=MERGE_PARTS,
        BLOCK_D=MERGE_CHANNELS,
    )  # fmt: skip
