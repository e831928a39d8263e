"""``add_norm``: residual add and the norm behind it, with dropout and drop path in the same pass.

Both results are written: the sum, which the residual stream goes on with, and its norm. Kept for
the backward are the sum (which the stream keeps anyway), two numbers a row and, with dropout, one
byte an element where eager keeps one number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .define import Traffic, by_reference, define, numel_bytes, vjp

SCHEMA = (
    "add_norm(Tensor branch, Tensor shortcut, Tensor? weight, Tensor? bias, Tensor? keep,"
    " Tensor? row_scale, float scale, float eps, str norm)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)"
)
BACKWARD_SCHEMA = (
    "add_norm_backward(Tensor sum, Tensor? dy, Tensor? dsum, Tensor? weight, Tensor mean,"
    " Tensor rstd, Tensor? keep, Tensor? row_scale, float scale, str norm)"
    " -> (Tensor dbranch, Tensor dshortcut, Tensor dweight, Tensor dbias)"
)


def _reference(branch, shortcut, weight, bias, keep, row_scale, scale, eps, norm):
    total = reference.scaled_add(branch, shortcut, keep, row_scale, scale)
    if norm == "none":
        return branch.new_empty(0), total, *(_statistic(branch, 0) for _ in "mr")
    return reference.norm(total, weight, bias, eps, norm), total, *_statistics(total, eps, norm)


def _statistics(total: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    x = total.to(reference.acc_dtype(total.dtype))
    if norm == "rms":
        return _statistic(total, 0), (x.square().mean(1) + eps).rsqrt()
    mean = x.mean(1)
    return mean, ((x - mean[:, None]).square().mean(1) + eps).rsqrt()


def _statistic(x: Tensor, n: int) -> Tensor:
    return x.new_empty(n, dtype=reference.acc_dtype(x.dtype))


def _fake(branch, shortcut, weight, bias, keep, row_scale, scale, eps, norm):
    y = branch.new_empty(0) if norm == "none" else torch.empty_like(branch)
    rows = branch.shape[0]
    mean, rstd = rows if norm == "layer" else 0, 0 if norm == "none" else rows
    return y, torch.empty_like(branch), _statistic(branch, mean), _statistic(branch, rstd)


def scales_branch(keep: Tensor | None, row_scale: Tensor | None, scale: float) -> bool:
    """Whether the two operands have different gradients."""
    return keep is not None or row_scale is not None or scale != 1.0


def _fake_backward(total, dy, dsum, weight, mean, rstd, keep, row_scale, scale, norm):
    scaled = scales_branch(keep, row_scale, scale)
    dbranch = torch.empty_like(total) if scaled else total.new_empty(0)
    params = 0 if dy is None else total.shape[1]
    return dbranch, torch.empty_like(total), _statistic(total, params), _statistic(total, params)


def _setup_context(ctx, inputs, output):
    _, _, weight, bias, keep, row_scale, ctx.scale, ctx.eps, ctx.norm = inputs
    y, total, mean, rstd = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(total, weight, bias, mean, rstd, keep, row_scale)
    ctx.mark_non_differentiable(mean, rstd, *([y] if ctx.norm == "none" else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dsum, *_):
    if dy is None and dsum is None:
        return (None,) * 9
    total, weight, bias, mean, rstd, keep, row_scale = ctx.saved_tensors
    dy, dsum = (None if d is None else d.contiguous() for d in (dy, dsum))
    if by_reference("add_norm", total):
        grads = _differentiable_backward(ctx, dy, dsum, total, weight, bias, keep, row_scale)
    else:
        dbranch, dshortcut, dweight, dbias = backward_op(
            total, dy, dsum, weight, mean, rstd, keep, row_scale, ctx.scale, ctx.norm
        )
        if not scales_branch(keep, row_scale, ctx.scale):
            dbranch = dshortcut
        grads = dbranch, dshortcut, *_parameter_gradients(ctx, dy, weight, dweight, dbias)
    grads = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:4], strict=True)]
    return *grads, None, None, None, None, None


def _parameter_gradients(ctx, dy, weight, dweight, dbias):
    if dy is None:
        return None, None
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)


def _differentiable_backward(ctx, dy, dsum, total, weight, bias, keep, row_scale):
    """The sum is an output of this node: what is differentiable in it is so in both operands."""
    dtotal, dweight, dbias = dsum, None, None
    if dy is not None:
        needed = True, weight is not None, bias is not None

        def fn(total, weight, bias):
            return reference.norm(total, weight, bias, ctx.eps, ctx.norm)

        dnorm, dweight, dbias = vjp(fn, (total, weight, bias), needed, dy)
        dtotal = dnorm if dsum is None else dnorm + dsum
    dbranch = dtotal
    if scales_branch(keep, row_scale, ctx.scale):
        dbranch = reference.scaled(dtotal, keep, row_scale, ctx.scale)
    return dbranch, dtotal, dweight, dbias


def bytes_moved(branch, shortcut, weight, bias, keep, row_scale, scale, eps, norm) -> int:
    """Reads branch, shortcut and one byte of keep; writes the sum and, with a norm, y."""
    passes = 3 + (norm != "none")
    return passes * numel_bytes(branch) + (0 if keep is None else keep.numel())


def eager_bytes(branch, shortcut, weight, bias, keep, row_scale, scale, eps, norm) -> int:
    """Eager: dropout draws W, scales RW and multiplies RRW; drop path RW; add RRW; norm RW."""
    passes = 3 + 2 * (norm != "none") + 6 * (keep is not None) + 2 * (row_scale is not None)
    return passes * numel_bytes(branch)


def backward_bytes_moved(total, dy, dsum, weight, mean, rstd, keep, row_scale, scale, norm) -> int:
    """Reads the sum, dy, dsum and keep; writes dshortcut and, where it differs, dbranch."""
    passes = 1 + 2 * (dy is not None) + (dsum is not None)
    passes += scales_branch(keep, row_scale, scale)
    return passes * numel_bytes(total) + (0 if keep is None else keep.numel())


def backward_eager_bytes(total, dy, dsum, weight, mean, rstd, keep, row_scale, scale, norm) -> int:
    """Eager: norm RRW and RR for its parameters, accumulation RRW, dropout RRW, drop path RW."""
    passes = 5 * (dy is not None) + 3 * (dy is not None and dsum is not None)
    passes += 3 * (keep is not None) + 2 * (row_scale is not None)
    return passes * numel_bytes(total)


op = define(
    SCHEMA,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(bytes_moved, eager_bytes, flops=lambda branch, *_: 10 * branch.numel()),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved, backward_eager_bytes, flops=lambda total, *_: 14 * total.numel()
    ),
)
