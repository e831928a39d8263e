"""``lstm_cell``: all gates of an LSTM cell, its new state and its output in one launch.

``gates`` holds the pre-activations i, f, g, o side by side (PyTorch's order), or i, g, o: without a
forget gate the state is a residual stream, ``c' = c + i * g``. Kept for the backward are the
pre-activations, as the GEMM wrote them, and c; gates and c' are computed again.
"""

from __future__ import annotations

import torch

from .. import reference
from .define import Traffic, by_reference, define, numel_bytes, vjp

SCHEMA = "lstm_cell(Tensor gates, Tensor c, bool forget_gate) -> (Tensor h, Tensor c_new)"
BACKWARD_SCHEMA = (
    "lstm_cell_backward(Tensor gates, Tensor c, Tensor? dh, Tensor? dc, bool forget_gate)"
    " -> (Tensor dgates, Tensor dc_before)"
)


def _fake(gates, c, forget_gate):
    return torch.empty_like(c), torch.empty_like(c)


def _fake_backward(gates, c, dh, dc, forget_gate):
    return torch.empty_like(gates), torch.empty_like(c)


def _setup_context(ctx, inputs, output):
    gates, c, ctx.forget_gate = inputs
    ctx.save_for_backward(gates, c)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc):
    if dh is None and dc is None:
        return None, None, None
    gates, c = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    if by_reference("lstm_cell", c):
        # Both results as one, so that one vector-Jacobian product gives both gradients.
        found = [torch.zeros_like(c) if d is None else d for d in (dh, dc)]

        def fn(gates, c):
            return torch.stack(reference.lstm_cell(gates, c, ctx.forget_gate))

        grads = vjp(fn, (gates, c), needed, torch.stack(found))
    else:
        dh, dc = (None if d is None else d.contiguous() for d in (dh, dc))
        grads = backward_op(gates, c, dh, dc, ctx.forget_gate)
        grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return *grads, None


def bytes_moved(gates, c, forget_gate) -> int:
    """Reads the gates and c, writes h and the new c."""
    return numel_bytes(gates) + 3 * numel_bytes(c)


def eager_bytes(gates, c, forget_gate) -> int:
    """Eager: each gate RW, two products RRW (one without a forget gate), add RRW, tanh RW, RRW."""
    return (2 * (3 + forget_gate) + 3 * (3 + forget_gate) + 2) * numel_bytes(c)


def backward_bytes_moved(gates, c, dh, dc, forget_gate) -> int:
    """Reads the gates, c and the two gradients, writes those of the gates and of c."""
    given = sum(d is not None for d in (dh, dc))
    return 2 * numel_bytes(gates) + (2 + given) * numel_bytes(c)


def backward_eager_bytes(gates, c, dh, dc, forget_gate) -> int:
    """Eager: each product 2 RRW, each gate and tanh RRW, accumulation RRW, gates gathered RW."""
    products, gates_ = 2 + forget_gate, 3 + forget_gate
    return (6 * products + 3 * (gates_ + 1) + 3 + 2 * gates_) * numel_bytes(c)


op = define(
    SCHEMA,
    reference=reference.lstm_cell,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(bytes_moved, eager_bytes, flops=lambda gates, c, _: 60 * c.numel()),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved, backward_eager_bytes, flops=lambda gates, c, *_: 90 * c.numel()
    ),
)
