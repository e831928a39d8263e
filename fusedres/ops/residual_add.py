"""``residual_add``: ``act(scale[n, c] * A(x) + B(shortcut))``, the end of a residual block.

A and B are batch norms, per-channel affine maps or the identity; what a block does to its branch
and its shortcut before it adds them (the norm of a projection, stochastic depth, LayerScale,
SkipInit, a channel gate) happens while the operands are read for the addition. The statistics of
the sum, which a pre-activation block's first norm needs, are taken while it is written.
"""

from __future__ import annotations

import torch

from .. import reference
from ..layout import in_layout, mask_shape, memory_format, pack_mask, unpack_mask
from .bn_act import fake_stats
from .define import Traffic, by_reference, define, empty_mask, numel_bytes, vjp

SCHEMA = (
    "residual_add(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var,"
    " Tensor? shortcut, Tensor? shortcut_weight, Tensor? shortcut_bias, Tensor? shortcut_mean,"
    " Tensor? shortcut_var, Tensor? scale, bool batch_stats, bool shortcut_batch_stats, float eps,"
    " float shortcut_eps, str act, bool save_mask, bool stats)"
    " -> (Tensor y, Tensor mask, Tensor y_mean, Tensor y_var)"
)
BACKWARD_SCHEMA = (
    "residual_add_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? bias, Tensor? mean,"
    " Tensor? var, Tensor? shortcut, Tensor? shortcut_weight, Tensor? shortcut_bias,"
    " Tensor? shortcut_mean, Tensor? shortcut_var, Tensor? scale, Tensor mask, bool batch_stats,"
    " bool shortcut_batch_stats, float eps, float shortcut_eps, str act, bool need_sums,"
    " bool need_shortcut_sums, bool need_dshortcut)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dshortcut, Tensor dshortcut_weight,"
    " Tensor dshortcut_bias, Tensor dscale)"
)

# Positions among the arguments: what is differentiated, and the statistics.
_GRADED = (0, 1, 2, 5, 6, 7, 10)
_STATISTICS = (3, 4, 8, 9)


def maps(args) -> tuple[tuple, tuple]:
    """``(weight, bias, mean, var, batch_stats, eps)`` of the branch and of the shortcut."""
    return (*args[1:5], args[11], args[13]), (*args[6:10], args[12], args[14])


def _reference(*args):
    x, shortcut, scale, act, save_mask, stats = args[0], args[5], args[10], *args[15:18]
    branch_map, shortcut_map = maps(args)
    y, z = reference.residual_add(x, branch_map, shortcut, shortcut_map, scale, act)
    mask = pack_mask(reference.activation_mask(z, act), like=x) if save_mask else empty_mask(x)
    return y, mask, *(reference.bn_stats(y) if stats else no_stats(x))


def no_stats(x):
    acc = reference.acc_dtype(x.dtype)
    return x.new_empty(0, dtype=acc), x.new_empty(0, dtype=acc)


def _fake(*args):
    x, save_mask, stats = args[0], args[16], args[17]
    mask = x.new_empty(mask_shape(x), dtype=torch.uint8) if save_mask else empty_mask(x)
    return torch.empty_like(x), mask, *(fake_stats(x) if stats else no_stats(x))


def _fake_backward(dy, *args):
    scale, need_sums, need_dshortcut = args[10], args[17], args[19]
    n = dy.shape[0] if scale is not None and need_sums else 0
    dscale = dy.new_empty((n, dy.shape[1]), dtype=reference.acc_dtype(dy.dtype))
    grads = torch.empty_like(dy), *fake_stats(dy)
    dshortcut = torch.empty_like(dy) if need_dshortcut else dy.new_empty(0)
    return *grads, dshortcut, *fake_stats(dy), dscale


# --- autograd


def _setup_context(ctx, inputs, output):
    tensors, (*numbers, act, save_mask, _) = inputs[:11], inputs[11:]
    batch_stats, shortcut_batch_stats, *_ = numbers
    needs = ctx.needs_input_grad
    ctx.rest = *numbers, act
    ctx.layout = memory_format(tensors[0])
    # Sums over a channel are what every gradient but those of the two operands is made of.
    ctx.need_sums = batch_stats or any(needs[i] for i in (1, 2, 10))
    ctx.need_shortcut_sums = shortcut_batch_stats or any(needs[i] for i in (6, 7))
    ctx.has_shortcut = tensors[5] is not None
    recompute = act != "identity" and not save_mask
    kept = list(tensors)
    if not (ctx.need_sums or ctx.need_shortcut_sums or recompute):
        kept[0] = None
    if not (ctx.need_shortcut_sums or recompute):
        kept[5] = None
    for i, batch in zip(_STATISTICS, (batch_stats,) * 2 + (shortcut_batch_stats,) * 2, strict=True):
        # The caller may update running statistics in place before the backward.
        kept[i] = kept[i].clone() if kept[i] is not None and not batch else kept[i]
    ctx.save_for_backward(*kept, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    none = [None] * 18
    if dy is None:
        return tuple(none)
    *tensors, mask = ctx.saved_tensors
    # The mask is in x's layout, and hooks on saved tensors may hand out x in another.
    dy, tensors[0], tensors[5] = in_layout(ctx.layout, dy, tensors[0], tensors[5])
    needed = [ctx.needs_input_grad[i] for i in _GRADED]
    if by_reference("residual_add", dy):
        grads = _differentiable_backward(ctx, dy, tensors, mask, needed)
    else:
        sums = ctx.need_sums, ctx.need_shortcut_sums
        # Operands that are added as they are have one gradient.
        one = all(t is None for t in (*tensors[1:5], *tensors[6:]))
        found = backward_op(dy, *tensors, mask, *ctx.rest, *sums, ctx.has_shortcut and not one)
        grads = cast(found, tensors, needed)
        if one and needed[3]:
            grads[3] = found[0]
    for i, grad in zip(_GRADED, grads, strict=True):
        none[i] = grad
    return tuple(none)


def cast(found, tensors, needed) -> list:
    """The backward op's results in the form of the arguments they belong to."""
    *grads, dscale = found
    scale = tensors[10]
    if scale is not None and scale.shape[1] == 1:
        dscale = dscale.sum(1, keepdim=True)
    like = (None, tensors[1], tensors[2], None, tensors[6], tensors[7], scale)
    pairs = zip((*grads, dscale), like, needed, strict=True)
    return [(g if t is None else g.to(t.dtype)) if need else None for g, t, need in pairs]


def _differentiable_backward(ctx, dy, tensors, mask, needed):
    bits = unpack_mask(mask, dy) if mask.numel() else None
    statistics = [tensors[i] for i in _STATISTICS]
    inputs = [tensors[i] for i in _GRADED]
    for i, given in ((0, True), (3, ctx.has_shortcut)):
        if given and inputs[i] is None:  # not kept: it enters linearly, any value will do
            inputs[i] = torch.zeros_like(dy)

    def fn(x, weight, bias, shortcut, shortcut_weight, shortcut_bias, scale):
        act = ctx.rest[-1]
        branch = weight, bias, *statistics[:2], ctx.rest[0], ctx.rest[2]
        side = shortcut_weight, shortcut_bias, *statistics[2:], ctx.rest[1], ctx.rest[3]
        mapped = x, branch, shortcut, side, scale
        y, _ = reference.residual_add(*mapped, act if bits is None else "identity")
        return y if bits is None else reference.masked_activation(y, act, bits)

    return vjp(fn, inputs, needed, dy)


# --- memory traffic, in bytes


def bytes_moved(*args) -> int:
    """Reads x and shortcut, writes y; its statistics are taken from the cache."""
    passes = 2 + (args[5] is not None)
    return passes * numel_bytes(args[0]) + (args[0].numel() // 8 if args[16] else 0)


def eager_bytes(*args) -> int:
    """Eager: each map RW, the scale RW, the addition RRW, activation RW, statistics R."""
    scaled = [any(t is not None for t in args[i]) for i in (slice(1, 5), slice(6, 10))]
    passes = 2 * (sum(scaled) + (args[10] is not None) + (args[15] != "identity")) + args[17]
    return (passes + 3 * (args[5] is not None)) * numel_bytes(args[0])


def backward_bytes_moved(dy, *args) -> int:
    """Reduce and apply read dy and what was kept; apply writes a gradient for each operand."""
    reads = 1 + (args[0] is not None) + (args[5] is not None)
    passes = 2 if args[17] or args[18] else 1
    return (passes * reads + 1 + args[19]) * numel_bytes(dy) + passes * args[11].numel()


def backward_eager_bytes(dy, *args) -> int:
    """Eager: activation RRW; each batch norm RR + RRW, other map RW (and RR for its weight)."""
    total = 3 * (args[16] != "identity") + 2 * (args[10] is not None)
    for weight, mean in ((args[1], args[3]), (args[6], args[8])):
        total += 5 if mean is not None else 4 if weight is not None else 0
    return total * numel_bytes(dy)


op = define(
    SCHEMA,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(bytes_moved, eager_bytes, flops=lambda x, *_: 8 * x.numel()),
)
backward_op = define(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    traffic=Traffic(
        backward_bytes_moved, backward_eager_bytes, flops=lambda dy, *_: 14 * dy.numel()
    ),
)
