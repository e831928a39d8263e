"""``conv_grad``: the gradient by x of ``conv(act(bn(x)))``, and by the batch norm's parameters.

What a convolution behind a norm needs in the backward besides its weight's gradient. The weight's
needs ``act(bn(x))``, which nobody keeps; the op makes it on the way.

On a GPU a kernel can do it with the convolution (kernels/conv_grad.py): the activation's derivative
and the sums of batch norm's backward are taken of the tile that is stored, and act(bn(x)) is stored
beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import dense
from . import bn_act
from .bn_act import fake_stats
from .convolution import conv_flops, convolution_backward
from .define import Traffic, define, empty_mask, numel_bytes

SCHEMA = (
    "conv_grad(Tensor dy, Tensor weight, Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor mean,"
    " Tensor var, bool batch_stats, float eps, str act, int[] stride, int[] padding,"
    " int[] dilation, int groups, bool make_h)"
    " -> (Tensor dx, Tensor dbn_weight, Tensor dbn_bias, Tensor h)"
)


def _composed(
    dy, weight, x, bn_weight, bn_bias, mean, var, batch_stats, eps, act,
    stride, padding, dilation, groups, make_h,
):  # fmt: skip
    bn = bn_weight, bn_bias, mean, var, batch_stats, eps, act
    geometry = stride, padding, dilation, groups
    dh, *_ = convolution_backward(dy, x, weight, False, geometry, [True, False, False])
    return *through_norm(dh, x, *bn), _activated(x, *bn) if make_h else x.new_empty(0)


def through_norm(dh, x, bn_weight, bn_bias, mean, var, batch_stats, eps, act) -> list[Tensor]:
    """Gradients of x, bn_weight and bn_bias; dh: that of ``act(bn(x))``."""
    *grads, _ = bn_act.backward_op(
        dense(dh, like=x), x, bn_weight, bn_bias, None, mean, var, empty_mask(x), batch_stats, eps,
        act, False,
    )  # fmt: skip
    return grads


def _activated(x, bn_weight, bn_bias, mean, var, batch_stats, eps, act) -> Tensor:
    return bn_act.op(x, bn_weight, bn_bias, None, mean, var, batch_stats, eps, act, False)[0]


def _fake(
    dy, weight, x, bn_weight, bn_bias, mean, var, batch_stats, eps, act,
    stride, padding, dilation, groups, make_h,
):  # fmt: skip
    h = torch.empty_like(x) if make_h else x.new_empty(0)
    return torch.empty_like(x), *fake_stats(x), h


def bytes_moved(dy, weight, x, *_) -> int:
    """The convolution itself; the rest are ops of their own."""
    return numel_bytes(dy) + numel_bytes(weight) + numel_bytes(x)


def fused_bytes(dy, weight, x, *args) -> int:
    """The convolution reads x and writes act(bn(x)) as well; the apply pass is RRW."""
    batch_stats, make_h = args[4], args[-1]
    return bytes_moved(dy, weight, x) + (1 + make_h + 3 * batch_stats) * numel_bytes(x)


def fused_eager_bytes(dy, weight, x, *args) -> int:
    """Eager besides the convolution: activation backward RRW, batch norm backward RR + RRW."""
    through_act = 3 * (args[6] != "identity")
    return bytes_moved(dy, weight, x) + (through_act + 5) * numel_bytes(x)


def flops(dy, weight, x, *args) -> int:
    return conv_flops(x, weight, tuple(args[7:11]))


op = define(
    SCHEMA,
    composed=_composed,
    fake=_fake,
    traffic=Traffic(bytes_moved, eager_bytes=bytes_moved, flops=flops),
    fused_traffic=Traffic(fused_bytes, eager_bytes=fused_eager_bytes, flops=flops, launches=3),
)
