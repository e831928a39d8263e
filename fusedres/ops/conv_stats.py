"""``conv_stats``: convolution with the previous batch norm and activation applied on the way in.

``conv(act(bn(x)))`` and the batch statistics of its result. What is kept for the backward is the
raw x alone: the activation that the convolution saw is computed again when it is needed. This is
what makes a block in training hold one tensor a convolution instead of two.

On a GPU a kernel can do all of it (kernels/conv_stats.py, csrc/cuda/conv_stats.cuh): the norm is
applied as x is loaded, the sums are taken of the tile that is stored; a second launch adds them.
"""

from __future__ import annotations

from .. import reference
from ..layout import dense
from . import bn_act, conv_grad
from .bn_act import fake_stats
from .convolution import conv_flops, conv_numel, convolution, convolution_backward
from .define import OwnKernel, Traffic, by_reference, define, numel_bytes, vjp

SCHEMA = (
    "conv_stats(Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var,"
    " bool batch_stats, float eps, str act, Tensor weight, Tensor? bias, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool stats)"
    " -> (Tensor y, Tensor y_mean, Tensor y_var)"
)


OWN = OwnKernel(
    SCHEMA.replace(") ->", ", int variant) ->"),
    convolution=lambda *args: (args[0], args[8], args[10:14]),
)


def _composed(
    x, bn_weight, bn_bias, mean, var, batch_stats, eps, act, weight, bias,
    stride, padding, dilation, groups, stats,
):  # fmt: skip
    bn = bn_weight, bn_bias, mean, var, batch_stats, eps, act
    y = convolution(prologue(x, *bn), weight, bias, (stride, padding, dilation, groups))
    if not stats:
        return y, *_no_stats(x)
    return y, *bn_act.stats_op(dense(y))


def prologue(x, bn_weight, bn_bias, mean, var, batch_stats, eps, act):
    """``act(bn(x))``, or x itself where there is no batch norm before the convolution."""
    if mean is None:
        return x
    return bn_act.op(x, bn_weight, bn_bias, None, mean, var, batch_stats, eps, act, False)[0]


def in_parts(x, bn_weight, bn_bias, act, weight, bias, geometry, normed: bool) -> bool:
    """Whether the norm before the convolution and the statistics behind it are calls of their own.

    The norm's statistics need not be known yet.
    """
    if not op.planned(x):
        return True
    some = x.new_empty(x.shape[1] if normed else 0, dtype=reference.acc_dtype(x.dtype))
    mean = var = some if normed else None
    bn = bn_weight, bn_bias, mean, var, True, 0.0, act
    return op.in_parts(x, *bn, weight, bias, *geometry, True)


def _no_stats(x):
    acc = reference.acc_dtype(x.dtype)
    return x.new_empty(0, dtype=acc), x.new_empty(0, dtype=acc)


def _fake(
    x, bn_weight, bn_bias, mean, var, batch_stats, eps, act, weight, bias,
    stride, padding, dilation, groups, stats,
):  # fmt: skip
    y = convolution(x, weight, bias, (stride, padding, dilation, groups))
    return y, *(fake_stats(y) if stats else _no_stats(x))


def _setup_context(ctx, inputs, output):
    x, bn_weight, bn_bias, mean, var, ctx.batch_stats, ctx.eps, ctx.act, weight, bias = inputs[:10]
    ctx.geometry = tuple(inputs[10:14])
    # The caller may update running statistics in place before the backward: keep the values.
    if mean is not None and not ctx.batch_stats:
        mean, var = mean.clone(), var.clone()
    ctx.save_for_backward(x, bn_weight, bn_bias, mean, var, weight, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 15
    x, bn_weight, bn_bias, mean, var, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needed = needs[0], needs[1], needs[2], needs[8], needs[9]
    bn = mean, var, ctx.batch_stats, ctx.eps, ctx.act
    inputs = x, bn_weight, bn_bias, weight, bias
    if by_reference("conv_stats", x):
        grads = _differentiable_backward(ctx, dy, inputs, bn, needed)
    else:
        grads = backward(dy, inputs, bn, ctx.geometry, needed)
    dx, dbn_weight, dbn_bias, dweight, dbias = grads
    return dx, dbn_weight, dbn_bias, *[None] * 5, dweight, dbias, *[None] * 5


def backward(dy, inputs, bn, geometry, needed, h=None):
    """Gradients of ``inputs = (x, bn_weight, bn_bias, weight, bias)``; h: act(bn(x)) if known."""
    x, bn_weight, bn_bias, weight, bias = inputs
    if h is None and not needed[3]:
        h = x  # only the weight's gradient reads the values
    through_bn = bn[0] is not None and any(needed[:3])
    by_x = any(needed[:3])
    if through_bn and conv_grad.op.planned(dy):
        args = weight, x, bn_weight, bn_bias, *bn, *geometry
        *grads, made = conv_grad.op(dense(dy), *args, h is None)
        by_x, h = False, made if h is None else h
    elif h is None:
        h = prologue(x, bn_weight, bn_bias, *bn)
    which = [by_x, needed[3], needed[4]]
    dh, dweight, dbias = None, None, None
    if any(which):
        dh, dweight, dbias = convolution_backward(dy, h, weight, bias is not None, geometry, which)
    if not through_bn:
        return dh, None, None, dweight, dbias
    if by_x:
        grads = conv_grad.through_norm(dh, x, bn_weight, bn_bias, *bn)
    dx, dbn_weight, dbn_bias = grads
    dbn_weight = dbn_weight.to(bn_weight.dtype) if needed[1] else None
    dbn_bias = dbn_bias.to(bn_bias.dtype) if needed[2] else None
    return dx if needed[0] else None, dbn_weight, dbn_bias, dweight, dbias


def _differentiable_backward(ctx, dy, inputs, bn, needed):
    def fn(x, bn_weight, bn_bias, weight, bias):
        before = None if bn[0] is None else (bn_weight, bn_bias, *bn)
        return reference.conv_stats(x, before, weight, bias, *ctx.geometry)[0]

    return vjp(fn, inputs, needed, dy)


def bytes_moved(*args) -> int:
    """The convolution itself; its prologue and statistics are ops of their own on a CPU."""
    x, weight, geometry = args[0], args[8], tuple(args[10:14])
    y_bytes = conv_numel(x, weight, geometry) * x.element_size()
    return numel_bytes(x) + y_bytes + numel_bytes(weight)


def fused_eager_bytes(*args) -> int:
    """Eager besides the convolution: the norm before it RW, its activation RW, statistics R."""
    x, mean, act, stats = args[0], args[3], args[7], args[14]
    before = 0 if mean is None else 2 + 2 * (act != "identity")
    y_bytes = conv_numel(x, args[8], tuple(args[10:14])) * x.element_size()
    return bytes_moved(*args) + before * numel_bytes(x) + stats * y_bytes


def flops(*args) -> int:
    return conv_flops(args[0], args[8], tuple(args[10:14]))


op = define(
    SCHEMA,
    composed=_composed,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    traffic=Traffic(bytes_moved, eager_bytes=bytes_moved, flops=flops),
    fused_traffic=Traffic(bytes_moved, eager_bytes=fused_eager_bytes, flops=flops, launches=2),
    own=OWN,
)
