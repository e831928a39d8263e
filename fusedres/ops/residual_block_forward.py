"""What a residual block computes, as ``residual_block`` strings the step ops together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import conv_memory_format, dense
from . import bn_act, conv_stats
from .conv_tail import Tail, tail_op
from .convolution import Geometry


@dataclass(frozen=True)
class Link:
    """A convolution and the norm behind it, besides their tensors.

    ``act`` follows where another convolution reads the norm's result.
    """

    geometry: Geometry
    batch_stats: bool
    eps: float
    act: str


@dataclass(frozen=True)
class Block:
    """What a block is besides its tensors.

    Args:
        ops: the step ops that it strings together, besides ``conv_stats``.
        links: the residual branch.
        side: the shortcut's projection, or None.
        joint: whether the addition applies the projection's norm.
        adds_x: whether the shortcut starts from x; else from a tensor of its own, if there is one.
        act: behind the addition.
        se: (act, gate) of a squeeze-excite before the addition.
        dtype: that autocast casts the convolutions' parameters to, None without autocast.
        recompute: whether the backward repeats the last convolution.
        save_mask: whether ``act`` leaves a mask for the backward.
    """

    ops: tuple[str, ...]
    links: tuple[Link, ...]
    side: Link | None
    joint: bool
    adds_x: bool
    act: str
    se: tuple[str, str] | None
    dtype: torch.dtype | None
    recompute: bool
    save_mask: bool

    @property
    def tail(self) -> Tail:
        last, side = self.links[-1], self.side if self.joint else None
        numbers = None if side is None else (side.batch_stats, side.eps)
        return Tail(last.batch_stats, last.eps, self.act, self.se, numbers)


# A link's tensors: weight and bias of the convolution, weight and bias of the norm, and its running
# mean and variance where it uses those. They come last, behind x, shortcut, scale and the MLP.
TENSORS = 6
FIRST = 7
NO_NORM = (None, None, None, None, False, 0.0, "identity")
NO_SIDE = (None, None, None, None)


class Part(NamedTuple):
    """A link with its tensors, in pairs."""

    link: Link
    conv: Sequence[Tensor | None]
    norm: Sequence[Tensor | None]
    running: Sequence[Tensor | None]

    def prologue(self, stats: Sequence[Tensor | None]) -> tuple:
        """The norm and activation, for the convolution that reads the raw result."""
        return *self.norm, *stats, self.link.batch_stats, self.link.eps, self.link.act


class Run(NamedTuple):
    """What a forward computes and its backward uses; ``raws`` and ``stats`` are of all links."""

    y: Tensor | None
    raws: list[Tensor | None]
    stats: list[Sequence[Tensor | None]]
    residual: Tensor | None  # as it was added
    rest: list[Tensor]  # the squeeze-excite's vectors, and the mask


def parts_of(block: Block, tensors: Sequence[Tensor | None]) -> list[Part]:
    """One for each link of the branch, and one for the projection."""
    links = block.links if block.side is None else (*block.links, block.side)
    starts = range(FIRST, len(tensors), TENSORS)
    pairs = [(tensors[i : i + 2], tensors[i + 2 : i + 4], tensors[i + 4 : i + 6]) for i in starts]
    return [Part(link, *three) for link, three in zip(links, pairs, strict=True)]


def operands(block: Block, part: Part) -> Sequence[Tensor | None]:
    """Weight and bias of a convolution as it takes them."""
    if block.dtype is None:
        return part.conv
    return [None if t is None else t.to(block.dtype) for t in part.conv]


def flat(mlp: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The weights of 1x1 convolutions as matrices."""
    return [t.flatten(1) if t is not None and t.dim() == 4 else t for t in mlp]


class _Reader:
    """Convolves raw results, whose statistics are taken when somebody reads them.

    Where no kernel takes them with the convolution before, nor applies the norm in the one behind,
    that is one call for both.
    """

    def __init__(self, block: Block, parts: list[Part]):
        self.block, self.parts = block, parts
        self.raws: list[Tensor | None] = [None] * len(parts)
        self.stats: list[Sequence[Tensor] | None] = [
            None if part.link.batch_stats else part.running for part in parts
        ]

    def convolve(self, i: int, x: Tensor, before: int | None) -> None:
        """Link ``i`` on the raw result of link ``before``; on ``x`` itself if that is None."""
        part = self.parts[i]
        norm = NO_NORM if before is None else self.parts[before].prologue((None, None))
        conv, geometry = operands(self.block, part), part.link.geometry
        parted = conv_stats.in_parts(x, *norm[:2], norm[-1], *conv, geometry, before is not None)
        if before is not None and parted:
            x, norm = self.normalised(before), NO_NORM
        elif before is not None:
            norm = self.parts[before].prologue(self.statistics(before))
        stats = part.link.batch_stats and not parted
        # With squeeze-excite the pass that squeezes gives batch norm's statistics as well.
        stats = stats and (self.block.se is None or i != len(self.block.links) - 1)
        raw, *batch = conv_stats.op(x, *norm, *conv, *geometry, stats)
        self.raws[i] = raw
        if stats:
            self.stats[i] = batch

    def normalised(self, i: int) -> Tensor:
        """The result of link ``i`` behind its norm and activation."""
        weight, bias, *numbers = self.parts[i].prologue(self.stats[i] or (None, None))
        y, *stats, _ = bn_act.op(dense(self.raws[i]), weight, bias, None, *numbers, False)
        self.stats[i] = self.stats[i] or stats
        return y

    def statistics(self, i: int) -> Sequence[Tensor]:
        """Those of the raw result of link ``i``."""
        if self.stats[i] is None:
            self.stats[i] = bn_act.stats_op(dense(self.raws[i]))
        return self.stats[i]


def forward(block: Block, tensors: Sequence[Tensor | None]) -> Run:
    """``act(scale * se(branch(x)) + shortcut)``, step op by step op.

    Args:
        tensors: x, shortcut, scale, the MLP's four, and ``TENSORS`` for each link.
    """
    x, shortcut, scale, *mlp = tensors[:FIRST]
    parts, last = parts_of(block, tensors), len(block.links) - 1
    reader, tail = _Reader(block, parts), block.tail
    residual, side = x if block.adds_x else shortcut, NO_SIDE
    for i in range(last):
        reader.convolve(i, x, i - 1 if i else None)
        x = reader.raws[i]
    if block.side is not None:
        reader.convolve(last + 1, residual, None)
        if block.joint:
            residual = reader.raws[-1]
            side = *parts[-1].norm, *reader.statistics(last + 1)
        else:
            residual = reader.normalised(last + 1)
    if residual is not None:
        layout = conv_memory_format(x, parts[last].conv[0])
        residual = residual.contiguous(memory_format=layout)
    reader.convolve(last, x, last - 1 if last else None)
    raw = reader.raws[last] = dense(reader.raws[last])
    adds = tail.side is not None or scale is not None  # by an op that takes no statistics
    stats = reader.statistics(last) if adds else reader.stats[last] or (None, None)
    y, mean, var, *rest = tail_op(
        raw, tail, parts[last].norm, flat(mlp), residual, stats, side, scale, block.save_mask
    )
    reader.stats[last] = mean, var
    return Run(y, reader.raws, reader.stats, residual, rest)
