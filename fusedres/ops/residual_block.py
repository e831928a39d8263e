"""A residual block as one autograd node: ``act(norm(conv(... act(norm(conv(x)))) + shortcut(x))``.

The node strings the step ops together, forward and backward, and gives their bits. What it keeps is
what they keep: its input, the convolutions' raw results (not the last where repeating it is cheap),
vectors, and one bit an element. Under autocast it keeps the parameters where the step ops keep
copies of them in the reduced dtype. Autograd's machinery runs once a block, not once for each
convolution, cast and tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ..layout import dense, in_layout, memory_format, unpack_mask
from ..reference import masked_activation
from . import bn_act, conv_stats
from .conv_tail import tail_backward
from .convolution import convolution
from .define import by_reference, empty_mask, vjp
from .residual_block_forward import (
    FIRST,
    NO_NORM,
    NO_SIDE,
    TENSORS,
    Block,
    Run,
    flat,
    forward,
    operands,
    parts_of,
)


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


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, *tensors):
        # Running statistics may be updated in place before the backward: keep the values.
        tensors = [
            t.clone() if t is not None and i >= FIRST and (i - FIRST) % TENSORS >= 4 else t
            for i, t in enumerate(tensors)
        ]
        if block.dtype is None:
            run = forward(block, tensors)
        else:
            with torch.autocast(tensors[0].device.type, enabled=False):  # the casts are made here
                run = forward(block, tensors)
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
        run = Run(None, list(raws), pairs, residual, rest)
        del raws
        return None, *_Backward(block, tensors, needed, run, ctx.layout).grads(dy)


class _Backward:
    """The gradients, from the block's end to its start."""

    def __init__(self, block, tensors, needed, run: Run, layout: torch.memory_format):
        self.block, self.tensors, self.needed, self.run = block, tensors, needed, run
        self.layout = layout
        self.parts = parts_of(block, tensors)
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
            return self.tensors[0], NO_NORM
        return self.run.raws[i - 1], self.parts[i - 1].prologue(self.run.stats[i - 1])

    def _tail(self, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the last raw result and of what was added; what its convolution read."""
        block, run, last = self.block, self.run, len(self.block.links) - 1
        part, h, raw, side = self.parts[last], None, run.raws[last], NO_SIDE
        if block.recompute:
            x, before = self._before(last)
            h = conv_stats.prologue(x, *before)
            raw = convolution(h, *operands(block, part), part.link.geometry)
        residual = run.residual
        if block.joint:
            residual, side = run.raws[-1], (*self.parts[-1].norm, *run.stats[-1])
        # The mask is in the result's layout; hooks on saved tensors may change that of others.
        raw, dy, residual = in_layout(self.layout, raw, dy, residual)
        mlp, scale = self.tensors[3:FIRST], self.tensors[2]
        adds = block.side is not None or self.needed[0 if block.adds_x else 1]
        d, dnorm, dmlp, dresidual, dside = tail_backward(
            dy, raw, block.tail, part.norm, flat(mlp), *run.stats[last], run.rest, residual, side,
            scale, adds,
        )  # fmt: skip
        self._put(last, 2, dnorm)
        if block.joint:
            self._put(-1, 2, dside)
        self.found[3:FIRST] = [
            None if t is None else g.view_as(t) for g, t in zip(dmlp, mlp, strict=True)
        ]
        return d, h, dresidual

    def _put(self, i: int, offset: int, grads: Sequence[Tensor | None]) -> None:
        """Gradients of tensors of link ``i``, in their dtypes."""
        start = FIRST + i % len(self.parts) * TENSORS + offset
        for k, g in enumerate(grads, start):
            self.found[k] = None if g is None else g.to(self.tensors[k].dtype)

    def _link(self, i: int, d: Tensor, h: Tensor | None) -> Tensor | None:
        """The gradient of what link ``i`` reads; h: that, normalised and activated, if known."""
        x, before = self._before(i)
        start = FIRST + i * TENSORS
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
        return self._convolution(-1, d, self.tensors[into], NO_NORM, needs)

    def _convolution(self, i: int, d: Tensor, x: Tensor, before, needs, h=None) -> Tensor | None:
        start = FIRST + i % len(self.parts) * TENSORS
        inputs = x, *before[:2], *operands(self.block, self.parts[i])
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
        y = forward(replace(block, act=act, save_mask=False), tensors).y
        return masked_activation(y, block.act, unpack_mask(mask, dy)) if masked else y

    return vjp(fn, tensors, needed, dy)
