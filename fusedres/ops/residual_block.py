"""A residual block as one autograd node: ``act(norm(conv(... act(norm(conv(x)))) + shortcut(x))``.

The node strings the step ops together, forward and backward, and gives their bits. What it keeps is
what they keep: its input, the convolutions' raw results (not the last where repeating it is cheap),
vectors, and one bit an element. Under autocast it keeps the parameters where the step ops keep
copies of them in the reduced dtype. Autograd's machinery runs once a block, not once for each
convolution, cast and tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import conv_memory_format, dense, in_layout, memory_format, unpack_mask
from ..reference import masked_activation
from . import bn_act, conv_stats
from .conv_tail import Tail, tail_backward, tail_op
from .convolution import Geometry, convolution
from .define import by_reference, empty_mask, vjp


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
_FIRST = 7
_NO_NORM = (None, None, None, None, False, 0.0, "identity")
_NO_SIDE = (None, None, None, None)


def residual_block(
    block: Block,
    x: Tensor,
    shortcut: Tensor | None,
    scale: Tensor | None,
    mlp: Sequence[Tensor | None],
    links: Sequence[Sequence[Tensor | None]],
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """``act(scale * se(branch(x)) + shortcut)``.

    Args:
        x: [N, C, H, W] in the dtype of the convolutions.
        shortcut: what the shortcut starts from where that is not x, in the same dtype.
        scale: [N, 1] factors of the branch, or None; it gets no gradient.
        mlp: (w1, b1, w2, b2) of a squeeze-excite, matrices or those of 1x1 convolutions; or Nones.
        links: ``TENSORS`` for each link of the branch and for the projection.

    Returns:
        The result, and for each link the mean and variance that its norm used.
    """
    tensors = x, shortcut, scale, *mlp, *chain.from_iterable(links)
    y, *stats = _ResidualBlock.apply(block, *tensors)
    return y, list(zip(stats[::2], stats[1::2], strict=True))


class _Part(NamedTuple):
    """A link with its tensors, in pairs."""

    link: Link
    conv: Sequence[Tensor | None]
    norm: Sequence[Tensor | None]
    running: Sequence[Tensor | None]

    def prologue(self, stats: Sequence[Tensor | None]) -> tuple:
        """The norm and activation, for the convolution that reads the raw result."""
        return *self.norm, *stats, self.link.batch_stats, self.link.eps, self.link.act


class _Run(NamedTuple):
    """What a forward computes and its backward uses; ``raws`` and ``stats`` are of all links."""

    y: Tensor | None
    raws: list[Tensor | None]
    stats: list[Sequence[Tensor | None]]
    residual: Tensor | None  # as it was added
    rest: list[Tensor]  # the squeeze-excite's vectors, and the mask


def _parts(block: Block, tensors: Sequence[Tensor | None]) -> list[_Part]:
    """One for each link of the branch, and one for the projection."""
    links = block.links if block.side is None else (*block.links, block.side)
    starts = range(_FIRST, len(tensors), TENSORS)
    pairs = [(tensors[i : i + 2], tensors[i + 2 : i + 4], tensors[i + 4 : i + 6]) for i in starts]
    return [_Part(link, *three) for link, three in zip(links, pairs, strict=True)]


def _operands(block: Block, part: _Part) -> list[Tensor | None]:
    """Weight and bias of a convolution as it takes them."""
    return [t if t is None or block.dtype is None else t.to(block.dtype) for t in part.conv]


def _flat(mlp: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t.flatten(1) if t is not None and t.dim() == 4 else t for t in mlp]


class _Reader:
    """Convolves raw results, whose statistics are taken when somebody reads them.

    Where no kernel takes them with the convolution before, nor applies the norm in the one behind,
    that is one call for both.
    """

    def __init__(self, block: Block, parts: list[_Part]):
        self.block, self.parts = block, parts
        self.raws: list[Tensor | None] = [None] * len(parts)
        self.stats: list[Sequence[Tensor] | None] = [
            None if part.link.batch_stats else part.running for part in parts
        ]

    def convolve(self, i: int, x: Tensor, before: int | None) -> None:
        """Link ``i`` on the raw result of link ``before``; on ``x`` itself if that is None."""
        part = self.parts[i]
        norm = _NO_NORM if before is None else self.parts[before].prologue((None, None))
        operands, geometry = _operands(self.block, part), part.link.geometry
        parted = conv_stats.in_parts(
            x, *norm[:2], norm[-1], *operands, geometry, before is not None
        )
        if before is not None and parted:
            x, norm = self.normalised(before), _NO_NORM
        elif before is not None:
            norm = self.parts[before].prologue(self.statistics(before))
        stats = part.link.batch_stats and not parted
        # With squeeze-excite the pass that squeezes gives batch norm's statistics as well.
        stats = stats and (self.block.se is None or i != len(self.block.links) - 1)
        raw, *batch = conv_stats.op(x, *norm, *operands, *geometry, stats)
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


def _forward(block: Block, tensors: Sequence[Tensor | None]) -> _Run:
    x, shortcut, scale, *mlp = tensors[:_FIRST]
    parts, last = _parts(block, tensors), len(block.links) - 1
    reader, tail = _Reader(block, parts), block.tail
    residual, side = x if block.adds_x else shortcut, _NO_SIDE
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
        raw, tail, parts[last].norm, _flat(mlp), residual, stats, side, scale, block.save_mask
    )
    reader.stats[last] = mean, var
    return _Run(y, reader.raws, reader.stats, residual, rest)


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, *tensors):
        # Running statistics may be updated in place before the backward: keep the values.
        tensors = [
            t.clone() if t is not None and i >= _FIRST and (i - _FIRST) % TENSORS >= 4 else t
            for i, t in enumerate(tensors)
        ]
        with torch.autocast(tensors[0].device.type, enabled=False):  # the casts are made here
            run = _forward(block, tensors)
        ctx.block, ctx.layout = block, memory_format(run.y)
        raws, residual, last = list(run.raws), None, len(block.links) - 1
        if block.recompute:
            raws[last] = None
        if not block.save_mask and block.act != "identity" and not block.joint:
            residual = run.residual
        if block.side is None and residual is None:
            tensors[1] = None
        stats = list(chain.from_iterable(run.stats))
        ctx.save_for_backward(*tensors, *raws, *stats, residual, *run.rest)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return run.y, *stats

    @staticmethod
    def backward(ctx, dy, *_):
        count = len(ctx.needs_input_grad)
        if dy is None:
            return (None,) * count
        block, saved, needed = ctx.block, ctx.saved_tensors, ctx.needs_input_grad[1:]
        links = len(block.links) + (block.side is not None)
        ends = count - 1, count - 1 + links, count - 1 + 3 * links
        tensors, raws, stats = (
            saved[start:end] for start, end in zip((0, *ends), ends, strict=False)
        )
        residual, *rest = saved[ends[-1] :]
        del saved
        ctx.maybe_clear_saved_tensors()  # what has been read is freed on the way
        if any(by_reference(op, dy) for op in block.ops):
            dy, *_ = in_layout(ctx.layout, dy)
            return None, *_as_graph(block, tensors, rest[-1], dy, needed)
        pairs = list(zip(stats[::2], stats[1::2], strict=True))
        run = _Run(None, list(raws), pairs, residual, rest)
        del raws
        return None, *_Backward(block, tensors, needed, run, ctx.layout).grads(dy)


class _Backward:
    """The gradients, from the block's end to its start."""

    def __init__(self, block, tensors, needed, run: _Run, layout: torch.memory_format):
        self.block, self.tensors, self.needed, self.run = block, tensors, needed, run
        self.layout = layout
        self.parts = _parts(block, tensors)
        self.found: list[Tensor | None] = [None] * len(tensors)

    def grads(self, dy: Tensor) -> list[Tensor | None]:
        """One for each tensor; raw results are let go when they have been read."""
        block, raws, found = self.block, self.run.raws, self.found
        last, into = len(block.links) - 1, 0 if block.adds_x else 1
        d, h, dshortcut = self._tail(dy)
        raws[last] = None
        if block.side is not None:
            dshortcut = self._projection(dshortcut)
            raws[-1] = None
        for i in reversed(range(last + 1)):
            d, h = self._link(i, d, h), None
            if i > 0:
                raws[i - 1] = None
        if self.needed[0]:
            found[0] = d
        if self.needed[into] and dshortcut is not None:
            # In place: d is this node's own. The other may be dy.
            found[into] = dshortcut if found[into] is None else d.add_(dshortcut)
        return [g if need else None for g, need in zip(found, self.needed, strict=True)]

    def _before(self, i: int) -> tuple[Tensor, tuple]:
        """What link ``i`` reads, and the norm and activation on it."""
        if i == 0:
            return self.tensors[0], _NO_NORM
        return self.run.raws[i - 1], self.parts[i - 1].prologue(self.run.stats[i - 1])

    def _tail(self, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the last raw result and of what was added; what its convolution read."""
        block, run, last = self.block, self.run, len(self.block.links) - 1
        part, h, raw, side = self.parts[last], None, run.raws[last], _NO_SIDE
        if block.recompute:
            x, before = self._before(last)
            h = conv_stats.prologue(x, *before)
            raw = convolution(h, *_operands(block, part), part.link.geometry)
        residual = run.residual
        if block.joint:
            residual, side = run.raws[-1], (*self.parts[-1].norm, *run.stats[-1])
        # The mask is in the result's layout; hooks on saved tensors may change that of others.
        raw, dy, residual = in_layout(self.layout, raw, dy, residual)
        mlp, scale = self.tensors[3:_FIRST], self.tensors[2]
        adds = block.side is not None or self.needed[0 if block.adds_x else 1]
        d, dnorm, dmlp, dresidual, dside = tail_backward(
            dy, raw, block.tail, part.norm, _flat(mlp), *run.stats[last], run.rest, residual, side,
            scale, adds,
        )  # fmt: skip
        self._put(last, 2, dnorm)
        if block.joint:
            self._put(-1, 2, dside)
        self.found[3:_FIRST] = [
            None if t is None else g.view_as(t) for g, t in zip(dmlp, mlp, strict=True)
        ]
        return d, h, dresidual

    def _put(self, i: int, offset: int, grads: Sequence[Tensor | None]) -> None:
        """Gradients of tensors of link ``i``, in their dtypes."""
        start = _FIRST + i % len(self.parts) * TENSORS + offset
        for k, g in enumerate(grads, start):
            self.found[k] = None if g is None else g.to(self.tensors[k].dtype)

    def _link(self, i: int, d: Tensor, h: Tensor | None) -> Tensor | None:
        """The gradient of what link ``i`` reads; h: that, normalised and activated, if known."""
        x, before = self._before(i)
        start = _FIRST + i * TENSORS
        if i == 0:
            needs = self.needed[0], False, False
        else:
            needs = True, *self.needed[start - TENSORS + 2 : start - TENSORS + 4]
        return self._convolution(i, d, x, before, needs, h)

    def _projection(self, d: Tensor) -> Tensor | None:
        """The gradient of what the shortcut starts from; d: of what was added."""
        into = 0 if self.block.adds_x else 1
        if not self.block.joint:
            part, raw = self.parts[-1], self.run.raws[-1]
            weight, bias, mean, var, *numbers = part.prologue(self.run.stats[-1])
            d, *dnorm, _ = bn_act.backward_op(
                dense(d, like=raw), raw, weight, bias, None, mean, var, empty_mask(raw), *numbers,
                False,
            )  # fmt: skip
            self._put(
                -1, 2, [None if p is None else g for p, g in zip(part.norm, dnorm, strict=True)]
            )
        needs = self.needed[into], False, False
        return self._convolution(-1, d, self.tensors[into], _NO_NORM, needs)

    def _convolution(self, i: int, d: Tensor, x: Tensor, before, needs, h=None) -> Tensor | None:
        start = _FIRST + i % len(self.parts) * TENSORS
        inputs = x, *before[:2], *_operands(self.block, self.parts[i])
        which = *needs, *self.needed[start : start + 2]
        dx, dweight, dbias, *dconv = conv_stats.backward(
            d, inputs, before[2:], self.parts[i].link.geometry, which, h
        )
        self._put(i, 0, dconv)
        if before[2] is not None:
            self._put(i - 1, 2, (dweight, dbias))
        return dx


def _as_graph(block, tensors, mask, dy, needed) -> list[Tensor | None]:
    """The same gradients, as a graph: the step ops are differentiated instead of this node."""
    masked, tensors = mask.numel() > 0, list(tensors)
    if needed[1] and tensors[1] is None:  # its value is in the mask, or not needed
        tensors[1] = torch.zeros_like(dy)

    def fn(*tensors):
        act = "identity" if masked else block.act
        y = _forward(replace(block, act=act, save_mask=False), tensors).y
        return masked_activation(y, block.act, unpack_mask(mask, dy)) if masked else y

    return vjp(fn, tensors, needed, dy)
