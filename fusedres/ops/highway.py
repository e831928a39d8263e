"""``highway``: ``act(h) * t + x * c`` with gates given as logits, one launch.

``parts`` holds h, t and (uncoupled) c side by side, as the one GEMM or convolution that makes them
writes them; each row of it is one row of ``x``. Kept for the backward are these two: the
activation and the gates are computed again.
"""

from __future__ import annotations

import torch

from .. import reference
from .define import Traffic, by_reference, define, numel_bytes, vjp

SCHEMA = "highway(Tensor parts, Tensor x, str act, bool coupled) -> Tensor"
BACKWARD_SCHEMA = (
    "highway_backward(Tensor dy, Tensor parts, Tensor x, str act, bool coupled)"
    " -> (Tensor dparts, Tensor dx)"
)


def _fake(parts, x, act, coupled):
    return torch.empty_like(x)


def _fake_backward(dy, parts, x, act, coupled):
    return torch.empty_like(parts), torch.empty_like(x)


def _setup_context(ctx, inputs, output):
    parts, x, ctx.act, ctx.coupled = inputs
    ctx.save_for_backward(parts, x)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy):
    if dy is None:
        return None, None, None, None
    parts, x = ctx.saved_tensors
    dy, needed = dy.contiguous(), ctx.needs_input_grad[:2]
    if by_reference("highway", x):

        def fn(parts, x):
            return reference.highway(parts, x, ctx.act, ctx.coupled)

        grads = vjp(fn, (parts, x), needed, dy)
    else:
        grads = backward_op(dy, parts, x, ctx.act, ctx.coupled)
        grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return *grads, None, None


def bytes_moved(parts, x, act, coupled) -> int:
    """Reads the parts and x, writes y."""
    return numel_bytes(parts) + 2 * numel_bytes(x)


def eager_bytes(parts, x, act, coupled) -> int:
    """Eager: activation RW, gate RW, 1 - gate or carry gate RW, two products RRW, add RRW."""
    return (13 + 2 * (act != "identity")) * numel_bytes(x)


def backward_bytes_moved(dy, parts, x, act, coupled) -> int:
    """Reads dy, the parts and x, writes a gradient for each."""
    return 3 * numel_bytes(x) + 2 * numel_bytes(parts)


def backward_eager_bytes(dy, parts, x, act, coupled) -> int:
    """Eager: four products RRW, two gates RRW, accumulation RRW, activation RRW."""
    return (18 + 3 * (act != "identity")) * numel_bytes(x)


op = define(
    SCHEMA,
    reference=reference.highway,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(bytes_moved, eager_bytes, flops=lambda parts, x, *_: 20 * x.numel()),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved, backward_eager_bytes, flops=lambda dy, *_: 30 * dy.numel()
    ),
)
