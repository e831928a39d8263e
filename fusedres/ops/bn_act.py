"""``bn_act``: batch norm, residual add and activation in two reads of x and one write of y.

The op is functional: it returns the statistics it used, and the caller updates the running ones.
For the backward it keeps x (which the convolution before it wrote anyway) and one bit an element;
without a residual not even that, because the sign of ``z`` follows from x again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import in_layout, mask_shape, memory_format, pack_mask, unpack_mask
from .define import Traffic, by_reference, define, empty_mask, numel_bytes, vjp

SCHEMA = (
    "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var,"
    " bool batch_stats, float eps, str act, bool save_mask)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "bn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor mean, Tensor var, Tensor mask, bool batch_stats, float eps, str act,"
    " bool need_dresidual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
STATS_SCHEMA = "bn_stats(Tensor x) -> (Tensor mean, Tensor var)"


# --- reference and fake kernels, with the arguments and results of the schemas


def _reference(x, weight, bias, residual, mean, var, batch_stats, eps, act, save_mask):
    y, z = reference.bn_act(x, weight, bias, residual, mean, var, batch_stats, eps, act)
    if batch_stats:
        mean, var = reference.bn_stats(x)
    acc = reference.acc_dtype(x.dtype)
    mask = empty_mask(x)
    if save_mask:
        mask = pack_mask(reference.activation_mask(z, act), like=x)
    return y, mean.to(acc, copy=True), var.to(acc, copy=True), mask


def _fake(x, weight, bias, residual, mean, var, batch_stats, eps, act, save_mask):
    mask = x.new_empty(mask_shape(x), dtype=torch.uint8) if save_mask else empty_mask(x)
    return torch.empty_like(x), *fake_stats(x), mask


def fake_stats(x):
    shape, acc = (x.shape[1],), reference.acc_dtype(x.dtype)
    return x.new_empty(shape, dtype=acc), x.new_empty(shape, dtype=acc)


def _fake_backward(
    dy, x, weight, bias, residual, mean, var, mask, batch_stats, eps, act, need_dresidual
):
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    return torch.empty_like(x), *fake_stats(x), dresidual


# --- autograd


def saves_mask(act: str, residual: Tensor | None) -> bool:
    """A mask pays where z cannot be had from x alone and the derivative is one bit."""
    return residual is not None and act in reference.MASKED_ACTS


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, _, _, ctx.batch_stats, ctx.eps, ctx.act, save_mask = inputs
    _, mean, var, mask = output
    ctx.has_residual = residual is not None
    ctx.layout = memory_format(x)
    # A residual is kept only for an activation whose derivative no mask can hold.
    keep = residual if not save_mask and ctx.act != "identity" else None
    ctx.save_for_backward(x, weight, bias, keep, mean, var, mask)
    ctx.mark_non_differentiable(mean, var, mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    none = [None] * 6
    if dy is None:
        return None, None, None, None, *none
    x, weight, bias, residual, mean, var, mask = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    # The mask is in x's layout, and hooks on saved tensors may hand out x in another.
    dy, x, residual = in_layout(ctx.layout, dy, x, residual)
    if by_reference("bn_act", x):
        inputs = (x, weight, bias, residual)
        return *_differentiable_backward(ctx, dy, inputs, mean, var, mask, needed), *none
    dx, dweight, dbias, dresidual = backward_op(
        dy, x, weight, bias, residual, mean, var, mask, ctx.batch_stats, ctx.eps, ctx.act,
        needed[3] and ctx.act != "identity",
    )  # fmt: skip
    if ctx.act == "identity":
        dresidual = dy
    return (
        dx if needed[0] else None,
        dweight.to(weight.dtype) if needed[1] else None,
        dbias.to(bias.dtype) if needed[2] else None,
        dresidual if needed[3] else None,
        *none,
    )


def _differentiable_backward(ctx, dy, inputs, mean, var, mask, needed):
    x, weight, bias, residual = inputs
    if ctx.has_residual and residual is None:  # its value is in the mask: any value will do
        residual = torch.zeros_like(x)
    bits = unpack_mask(mask, x) if mask.numel() else None

    def fn(x, weight, bias, residual):
        if bits is None:
            stats = mean, var, ctx.batch_stats, ctx.eps, ctx.act
            return reference.bn_act(x, weight, bias, residual, *stats)[0]
        z = reference.batch_norm(x, weight, bias, mean, var, ctx.batch_stats, ctx.eps)
        return reference.masked_activation(z + residual, ctx.act, bits)

    return vjp(fn, (x, weight, bias, residual), needed, dy)


# --- memory traffic, in bytes


def bytes_moved(x, weight, bias, residual, mean, var, batch_stats, eps, act, save_mask) -> int:
    """Statistics read x once (unless given); the apply pass reads x, residual and writes y."""
    passes = 2 + (residual is not None) + (batch_stats and mean is None)
    return passes * numel_bytes(x) + (x.numel() // 8 if save_mask else 0)


def eager_bytes(x, weight, bias, residual, mean, var, batch_stats, eps, act, save_mask) -> int:
    """Eager PyTorch: statistics R, normalise RW, residual add RRW, activation RW."""
    passes = (
        2 + (batch_stats and mean is None) + 3 * (residual is not None) + 2 * (act != "identity")
    )
    return passes * numel_bytes(x)


def backward_bytes_moved(
    dy, x, weight, bias, residual, mean, var, mask, batch_stats, eps, act, need_dresidual
) -> int:
    """Reduce reads dy, x, mask or residual; apply reads them again, writes dx and dresidual."""
    passes = 5 + bool(need_dresidual) + 2 * (residual is not None)
    return passes * numel_bytes(x) + 2 * mask.numel()


def backward_eager_bytes(
    dy, x, weight, bias, residual, mean, var, mask, batch_stats, eps, act, need_dresidual
) -> int:
    """Eager PyTorch: activation backward RRW, batch norm backward RR + RRW."""
    return (5 + 3 * (act != "identity")) * numel_bytes(x)


op = define(
    SCHEMA,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(
        bytes_moved,
        eager_bytes,
        flops=lambda x, *_: 8 * x.numel(),
        held=(1, lambda x, *_: numel_bytes(x)),  # which is read once
    ),
)
stats_op = define(
    STATS_SCHEMA,
    reference=reference.bn_stats,
    fake=fake_stats,
    traffic=Traffic(numel_bytes, numel_bytes, flops=lambda x: 4 * x.numel()),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved,
        backward_eager_bytes,
        flops=lambda dy, *_: 12 * dy.numel(),
        held=(1, lambda dy, *_: 2 * numel_bytes(dy)),  # and x
    ),
)
