"""``squeeze_excite``: squeeze, excitation MLP, scale, residual add and activation as one op.

The backward needs the squeezed channels and the MLP's two pre-activations, all of them [N, C] or
smaller, besides x; neither ``x * gate`` nor the gate's broadcast is ever kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import in_layout, mask_shape, memory_format, pack_mask, unpack_mask
from .define import Traffic, by_reference, define, empty_mask, numel_bytes, vjp

SCHEMA = (
    "squeeze_excite(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual,"
    " str act, str gate, str post_act, bool save_mask)"
    " -> (Tensor y, Tensor squeezed, Tensor hidden, Tensor logits, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "squeeze_excite_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? residual,"
    " Tensor squeezed, Tensor hidden, Tensor logits, Tensor mask,"
    " str act, str gate, str post_act, bool need_dresidual)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dresidual)"
)


def _reference(x, w1, b1, w2, b2, residual, act, gate, post_act, save_mask):
    outputs = reference.squeeze_excite(x, w1, b1, w2, b2, residual, act, gate, post_act)
    y, z, hidden, logits = outputs
    squeezed = x.to(reference.acc_dtype(x.dtype)).mean(list(range(2, x.dim())))
    mask = pack_mask(reference.activation_mask(z, post_act), x) if save_mask else empty_mask(x)
    return y, squeezed, hidden, logits, mask


def fake_mlp(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of squeezed [N, C], hidden [N, R] and logits [N, C]."""
    acc = reference.acc_dtype(x.dtype)
    n, c, r = x.shape[0], x.shape[1], w1.shape[0]
    return tuple(x.new_empty((n, width), dtype=acc) for width in (c, r, c))


def fake_mlp_grads(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of dw1 [R, C], db1 [R], dw2 [C, R] and db2 [C]."""
    acc = reference.acc_dtype(x.dtype)
    c, r = x.shape[1], w1.shape[0]
    return tuple(x.new_empty(shape, dtype=acc) for shape in ((r, c), (r,), (c, r), (c,)))


def _fake(x, w1, b1, w2, b2, residual, act, gate, post_act, save_mask):
    mask = x.new_empty(mask_shape(x), dtype=torch.uint8) if save_mask else empty_mask(x)
    return torch.empty_like(x), *fake_mlp(x, w1), mask


def _fake_backward(
    dy, x, w1, w2, residual, squeezed, hidden, logits, mask, act, gate, post_act, need_dresidual
):
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    return torch.empty_like(x), *fake_mlp_grads(x, w1), dresidual


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, b2, residual, ctx.act, ctx.gate, ctx.post_act, save_mask = inputs
    _, squeezed, hidden, logits, mask = output
    ctx.has_residual = residual is not None
    ctx.layout = memory_format(x)
    keep = residual if not save_mask and ctx.post_act != "identity" else None
    ctx.save_for_backward(x, w1, b1, w2, b2, keep, squeezed, hidden, logits, mask)
    ctx.mark_non_differentiable(squeezed, hidden, logits, mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    x, w1, b1, w2, b2, residual, squeezed, hidden, logits, mask = ctx.saved_tensors
    needed = ctx.needs_input_grad[:6]
    # The mask is in x's layout, and hooks on saved tensors may hand out x in another.
    dy, x, residual = in_layout(ctx.layout, dy, x, residual)
    if by_reference("squeeze_excite", x):
        inputs = (x, w1, b1, w2, b2, residual)
        return *_differentiable_backward(ctx, dy, inputs, mask, needed), *[None] * 4
    dx, dw1, db1, dw2, db2, dresidual = backward_op(
        dy, x, w1, w2, residual, squeezed, hidden, logits, mask,
        ctx.act, ctx.gate, ctx.post_act, needed[5] and ctx.post_act != "identity",
    )  # fmt: skip
    if ctx.post_act == "identity":
        dresidual = dy
    grads = dx, *cast_like((dw1, db1, dw2, db2), (w1, b1, w2, b2)), dresidual
    grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return *grads, *[None] * 4


def cast_like(grads, params) -> list[Tensor | None]:
    return [None if p is None else g.to(p.dtype) for g, p in zip(grads, params, strict=True)]


def _differentiable_backward(ctx, dy, inputs, mask, needed):
    x, residual = inputs[0], inputs[5]
    bits = unpack_mask(mask, x) if mask.numel() else None
    if ctx.has_residual and residual is None:
        residual = torch.zeros_like(x)

    def fn(x, w1, b1, w2, b2, residual):
        mlp = x, w1, b1, w2, b2
        if bits is None:
            return reference.squeeze_excite(*mlp, residual, ctx.act, ctx.gate, ctx.post_act)[0]
        z = reference.squeeze_excite(*mlp, residual, ctx.act, ctx.gate, "identity")[0]
        return reference.masked_activation(z, ctx.post_act, bits)

    return vjp(fn, (*inputs[:5], residual), needed, dy)


def mlp_bytes(x: Tensor, w1: Tensor) -> int:
    """The two weight matrices once, and the [N, C] vectors between the passes."""
    acc = reference.acc_dtype(x.dtype).itemsize
    return 2 * numel_bytes(w1) + 3 * x.shape[0] * x.shape[1] * acc


def mlp_flops(x: Tensor, w1: Tensor) -> int:
    return 4 * x.shape[0] * w1.numel()


def bytes_moved(x, w1, b1, w2, b2, residual, act, gate, post_act, save_mask) -> int:
    """The squeeze reads x; the apply pass reads x and the residual and writes y."""
    passes = 3 + (residual is not None)
    return passes * numel_bytes(x) + mlp_bytes(x, w1) + (x.numel() // 8 if save_mask else 0)


def eager_bytes(x, w1, b1, w2, b2, residual, act, gate, post_act, save_mask) -> int:
    """Eager PyTorch: mean R, scale RW, residual add RRW, activation RW."""
    passes = 3 + 3 * (residual is not None) + 2 * (post_act != "identity")
    return passes * numel_bytes(x) + mlp_bytes(x, w1)


def backward_bytes_moved(
    dy, x, w1, w2, residual, squeezed, hidden, logits, mask, act, gate, post_act, need_dresidual
) -> int:
    """Reduce reads dy, x; apply reads dy (x too where z is recomputed) and writes dx, dresidual."""
    recomputed = not mask.numel() and post_act != "identity"
    passes = 4 + recomputed + bool(need_dresidual) + 2 * (residual is not None)
    return passes * numel_bytes(x) + 2 * mlp_bytes(x, w1) + 2 * mask.numel()


def backward_eager_bytes(
    dy, x, w1, w2, residual, squeezed, hidden, logits, mask, act, gate, post_act, need_dresidual
) -> int:
    """Eager: activation RRW, dx of the scale RW, its gate's RRW + R, mean's W, accumulation RRW."""
    return (10 + 3 * (post_act != "identity")) * numel_bytes(x) + 2 * mlp_bytes(x, w1)


def backward_bytes_held(
    dy, x, w1, w2, residual, squeezed, hidden, logits, mask, act, gate, post_act, need_dresidual
) -> int:
    """Of a cluster that holds dy, and x where z is recomputed: they are read once."""
    recomputed = not mask.numel() and post_act != "identity"
    return (1 + recomputed) * numel_bytes(x)


op = define(
    SCHEMA,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(
        bytes_moved,
        eager_bytes,
        flops=lambda x, w1, *_: 4 * x.numel() + mlp_flops(x, w1),
        held=(1, lambda x, *_: numel_bytes(x)),  # which is read once
    ),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved,
        backward_eager_bytes,
        flops=lambda dy, x, w1, *_: 6 * x.numel() + 2 * mlp_flops(x, w1),
        held=(2, backward_bytes_held),
    ),
)
