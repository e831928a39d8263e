"""``bn_se_act``: batch norm, squeeze-excite, residual add and activation, the tail of an SE block.

Written z = a*x + b for the normalised tensor, its squeeze is ``a*mean(x) + b`` and the batch
statistics are averages of the per-image ones: a single pass over x feeds both, a second writes y.
The backward reduces (dy, x) to per-(n, c) sums once, from which batch norm's own reductions follow.
"""

from __future__ import annotations

import torch

from .. import reference
from ..layout import in_layout, mask_shape, memory_format, pack_mask, unpack_mask
from .bn_act import fake_stats
from .define import Traffic, by_reference, define, empty_mask, numel_bytes, vjp
from .squeeze_excite import cast_like, fake_mlp, fake_mlp_grads, mlp_bytes, mlp_flops

SCHEMA = (
    "bn_se_act(Tensor x, Tensor? weight, Tensor? bias, Tensor w1, Tensor? b1, Tensor w2,"
    " Tensor? b2, Tensor? residual, Tensor? mean, Tensor? var, bool batch_stats, float eps,"
    " str se_act, str gate, str act, bool save_mask)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor squeezed, Tensor hidden, Tensor logits,"
    " Tensor mask)"
)
BACKWARD_SCHEMA = (
    "bn_se_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor w1, Tensor w2,"
    " Tensor? residual, Tensor mean, Tensor var, Tensor squeezed, Tensor hidden, Tensor logits,"
    " Tensor mask, bool batch_stats, float eps, str se_act, str gate, str act,"
    " bool need_dresidual)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2,"
    " Tensor db2, Tensor dresidual)"
)


def _reference(
    x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, eps, se_act, gate, act,
    save_mask,
):  # fmt: skip
    y, z, hidden, logits = reference.bn_se_act(
        x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, eps, se_act, gate, act
    )
    acc = reference.acc_dtype(x.dtype)
    if batch_stats:
        mean, var = reference.bn_stats(x)
    squeezed = x.to(acc).mean(list(range(2, x.dim())))
    mask = pack_mask(reference.activation_mask(z, act), x) if save_mask else empty_mask(x)
    return y, mean.to(acc, copy=True), var.to(acc, copy=True), squeezed, hidden, logits, mask


def _fake(
    x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, eps, se_act, gate, act,
    save_mask,
):  # fmt: skip
    mask = x.new_empty(mask_shape(x), dtype=torch.uint8) if save_mask else empty_mask(x)
    return torch.empty_like(x), *fake_stats(x), *fake_mlp(x, w1), mask


def _fake_backward(dy, x, weight, bias, w1, w2, residual, *args):
    dresidual = torch.empty_like(x) if args[-1] else x.new_empty(0)
    return torch.empty_like(x), *fake_stats(x), *fake_mlp_grads(x, w1), dresidual


def _setup_context(ctx, inputs, output):
    x, weight, bias, w1, b1, w2, b2, residual, _, _, ctx.batch_stats, ctx.eps = inputs[:12]
    ctx.se_act, ctx.gate, ctx.act, save_mask = inputs[12:]
    _, mean, var, squeezed, hidden, logits, mask = output
    ctx.has_residual = residual is not None
    ctx.layout = memory_format(x)
    keep = residual if not save_mask and ctx.act != "identity" else None
    params = x, weight, bias, w1, b1, w2, b2, keep
    ctx.save_for_backward(*params, mean, var, squeezed, hidden, logits, mask)
    ctx.mark_non_differentiable(mean, var, squeezed, hidden, logits, mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 16
    x, weight, bias, w1, b1, w2, b2, residual, mean, var, *saved = ctx.saved_tensors
    squeezed, hidden, logits, mask = saved
    needed = ctx.needs_input_grad[:8]
    # The mask is in x's layout, and hooks on saved tensors may hand out x in another.
    dy, x, residual = in_layout(ctx.layout, dy, x, residual)
    if by_reference("bn_se_act", x):
        inputs = (x, weight, bias, w1, b1, w2, b2, residual)
        return *_differentiable_backward(ctx, dy, inputs, mean, var, mask, needed), *[None] * 8
    dx, dweight, dbias, dw1, db1, dw2, db2, dresidual = backward_op(
        dy, x, weight, bias, w1, w2, residual, mean, var, squeezed, hidden, logits, mask,
        ctx.batch_stats, ctx.eps, ctx.se_act, ctx.gate, ctx.act,
        needed[7] and ctx.act != "identity",
    )  # fmt: skip
    if ctx.act == "identity":
        dresidual = dy
    params = weight, bias, w1, b1, w2, b2
    grads = dx, *cast_like((dweight, dbias, dw1, db1, dw2, db2), params), dresidual
    grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return *grads, *[None] * 8


def _differentiable_backward(ctx, dy, inputs, mean, var, mask, needed):
    x, residual = inputs[0], inputs[7]
    bits = unpack_mask(mask, x) if mask.numel() else None
    if ctx.has_residual and residual is None:
        residual = torch.zeros_like(x)

    def fn(*tensors):
        act = ctx.act if bits is None else "identity"
        stats = mean, var, ctx.batch_stats, ctx.eps
        y = reference.bn_se_act(*tensors, *stats, ctx.se_act, ctx.gate, act)[0]
        return y if bits is None else reference.masked_activation(y, ctx.act, bits)

    return vjp(fn, (*inputs[:7], residual), needed, dy)


def bytes_moved(x, weight, bias, w1, b1, w2, b2, residual, *args) -> int:
    """One pass over x for both statistics and squeeze; one reads x, residual and writes y."""
    passes = 3 + (residual is not None)
    return passes * numel_bytes(x) + mlp_bytes(x, w1) + (x.numel() // 8 if args[-1] else 0)


def eager_bytes(x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, *args) -> int:
    """Eager: statistics R, normalise RW, mean R, scale RW, residual add RRW, activation RW."""
    act = args[-2]
    passes = (
        5 + (batch_stats and mean is None) + 3 * (residual is not None) + 2 * (act != "identity")
    )
    return passes * numel_bytes(x) + mlp_bytes(x, w1)


def backward_bytes_moved(dy, x, weight, bias, w1, w2, residual, *args) -> int:
    """Reduce reads dy and x; apply reads them again and writes dx and dresidual."""
    mask, need_dresidual = args[5], args[-1]
    passes = 5 + bool(need_dresidual) + 2 * (residual is not None)
    return passes * numel_bytes(x) + 2 * mlp_bytes(x, w1) + 2 * mask.numel()


def backward_eager_bytes(dy, x, weight, bias, w1, *args) -> int:
    """Eager: activation RRW, SE 6R + 4W, batch norm RR + RRW."""
    act = args[-2]
    return (15 + 3 * (act != "identity")) * numel_bytes(x) + 2 * mlp_bytes(x, w1)


op = define(
    SCHEMA,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(
        bytes_moved,
        eager_bytes,
        flops=lambda x, weight, bias, w1, *_: 8 * x.numel() + mlp_flops(x, w1),
    ),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved,
        backward_eager_bytes,
        flops=lambda dy, x, weight, bias, w1, *_: 14 * x.numel() + 2 * mlp_flops(x, w1),
    ),
)
