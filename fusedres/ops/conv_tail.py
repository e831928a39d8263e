"""A block's last convolution and its tail as one autograd node that keeps no convolution result.

The last 1x1 convolution of a bottleneck writes the largest tensor of the block from its smallest
one. Keeping that tensor for batch norm's backward costs 2 or 4 bytes an element; repeating the
convolution costs 2*C_in flops an element, which are dearer in 32 bits than in 16. Up to so many
input channels the repeat is cheap (3% of a ResNet-50 step's arithmetic for stages 1 and 2 together,
1% for stage 1) and frees the largest tensors of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import dispatch
from ..layout import dense, in_layout, memory_format, unpack_mask
from ..reference import masked_activation
from . import bn_act, bn_se_act, conv_stats, residual_add
from .convolution import Geometry, convolution
from .define import transformed, vjp


def recompute_max_channels(dtype: torch.dtype) -> int:
    """Up to how many input channels the last 1x1 convolution is repeated in the backward."""
    return 128 if dtype.itemsize <= 2 else 64


@dataclass(frozen=True)
class Tail:
    """What follows the convolution, besides its tensors."""

    batch_stats: bool
    eps: float
    act: str
    se: tuple[str, str] | None = None  # (se_act, gate)
    side: tuple[bool, float] | None = None  # (batch_stats, eps) of a norm on the residual


def worth_recomputing(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether repeating a convolution in the backward is cheaper than keeping its result."""
    # The compiler decides by itself what to keep; functorch's levels do not survive a nested vjp.
    if torch.compiler.is_compiling() or transformed():
        return False
    if dispatch.choose("bn_act", x).backend == "reference":
        return False
    pointwise = weight.shape[2:].numel() == 1 and geometry[0] == [1, 1] and geometry[3] == 1
    expands = weight.shape[0] >= 2 * weight.shape[1]
    return pointwise and expands and weight.shape[1] <= recompute_max_channels(x.dtype)


def tail_op(
    raw, tail: Tail, norm, mlp, residual, stats, side, scale, save_mask: bool
) -> tuple[Tensor, ...]:
    """``bn_act``, ``bn_se_act`` with an MLP, or ``residual_add`` with a scale or a norm on the
    residual (which need the statistics); ``(y, mean, var, *rest, mask)``."""
    if tail.side is not None or scale is not None:
        y, mask, *_ = residual_add.op(
            raw, *norm, *stats, residual, *side, scale, *_numbers(tail), tail.act, save_mask, False
        )
        return y, *stats, mask
    if tail.se is None:
        return bn_act.op(
            raw, *norm, residual, *stats, tail.batch_stats, tail.eps, tail.act, save_mask
        )
    return bn_se_act.op(
        raw, *norm, *mlp, residual, *stats, tail.batch_stats, tail.eps, *tail.se, tail.act,
        save_mask,
    )  # fmt: skip


def _numbers(tail: Tail) -> tuple[bool, bool, float, float]:
    side_batch_stats, side_eps = tail.side or (False, 0.0)
    return tail.batch_stats, side_batch_stats, tail.eps, side_eps


def conv_tail(
    x, bn, weight, bias, geometry, tail: Tail, norm, mlp, residual, stats, side, scale, save_mask
):
    """``tail(conv(act(bn(x))))``.

    Args:
        bn: (weight, bias, mean, var, batch_stats, eps, act) of the norm before the convolution.
        norm: (weight, bias) of the norm behind it; stats: its running (mean, var) where those
            are to be used, else (None, None).
        mlp: (w1, b1, w2, b2), all None without squeeze-excite.
        side: (weight, bias, mean, var) of a norm on the residual, all None without one.
        scale: [N, 1] factors of the normalised result, or None; it gets no gradient.
        save_mask: whether the tail's activation leaves a mask for the backward.

    Returns:
        y, and the mean and variance that normalised it.
    """
    spec = tail, geometry, bn[4:], save_mask
    tensors = *bn[:4], weight, bias, *norm, *mlp, residual, *stats, *side, scale
    return _ConvTail.apply(spec, x, *tensors)[:3]


def _forward(spec, x, *tensors):
    tail, geometry, rest, save_mask = spec
    bn, (weight, bias), norm, mlp, residual, stats, side, scale = _split(tensors)
    # With squeeze-excite the pass that squeezes gives batch norm's statistics as well.
    in_conv = tail.batch_stats and tail.se is None
    raw, *batch = conv_stats.op(x, *bn, *rest, weight, bias, *geometry, in_conv)
    stats = batch if in_conv else stats
    return tail_op(dense(raw), tail, norm, mlp, residual, stats, side, scale, save_mask)


def _split(tensors):
    """prologue, convolution, norm, mlp, residual, running statistics, its norm, scale."""
    t = tensors
    return t[:4], t[4:6], t[6:8], t[8:12], t[12], t[13:15], t[15:19], t[19]


class _ConvTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, *tensors):
        y, mean, var, *rest = _forward(spec, x, *tensors)
        if not spec[0].batch_stats:  # they may be the arguments themselves
            mean, var = mean.clone(), var.clone()
        ctx.spec, ctx.layout = spec, memory_format(y)
        tail, _, (bn_batch_stats, *_), _ = spec
        kept = list(tensors)
        if tail.side is None:  # the residual's value is in the mask, or (identity) not needed
            kept[12] = None
        # Running statistics may be updated in place before the backward: keep the values.
        running = [13, 14]
        running += [] if bn_batch_stats else [2, 3]
        running += [17, 18] if tail.side is not None and not tail.side[0] else []
        for i in running:
            kept[i] = None if kept[i] is None else kept[i].clone()
        ctx.save_for_backward(x, *kept, mean, var, *rest)
        ctx.mark_non_differentiable(mean, var, *rest)
        ctx.set_materialize_grads(False)
        return y, mean, var, *rest

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 22
        x, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        tensors, (mean, var, *rest) = saved[:20], saved[20:]
        if torch.is_grad_enabled():
            dy, *_ = in_layout(ctx.layout, dy)
            return None, *_backward_of_backward(ctx.spec, x, tensors, rest[-1], dy, needed)
        tail, geometry, bn_rest, _ = ctx.spec
        bn, (weight, bias), norm, mlp, residual, _, side, scale = _split(tensors)
        h = conv_stats.prologue(x, *bn, *bn_rest)
        # The mask is in the result's layout; hooks on saved tensors may change that of x.
        raw, dy, residual = in_layout(
            ctx.layout, convolution(h, weight, bias, geometry), dy, residual
        )
        draw, dnorm, dmlp, dresidual, dside = tail_backward(
            dy, raw, tail, norm, mlp, mean, var, rest, residual, side, scale, needed[13]
        )
        inputs = x, *bn[:2], weight, bias
        which = needed[0], needed[1], needed[2], needed[5], needed[6]
        statistics = *bn[2:], *bn_rest
        dx, dbn_weight, dbn_bias, dweight, dbias = conv_stats.backward(
            draw, inputs, statistics, geometry, which, h
        )
        grads = dx, dbn_weight, dbn_bias, None, None, dweight, dbias, *dnorm, *dmlp, dresidual
        grads = *grads, None, None, *dside, None, None, None
        return None, *(g if need else None for g, need in zip(grads, needed, strict=True))


def tail_backward(dy, raw, tail, norm, mlp, mean, var, rest, residual, side, scale, needs_residual):
    """Gradients of (raw, norm, mlp, residual, the residual's norm).

    ``residual`` is used where it has a norm, or where its activation leaves no mask.
    """
    want = needs_residual and tail.act != "identity"
    if tail.side is not None or scale is not None:
        normed = tail.side is not None
        draw, *dnorm, dresidual, dside_weight, dside_bias, _ = residual_add.backward_op(
            dy, raw, *norm, mean, var, residual, *side, scale, *rest, *_numbers(tail), tail.act,
            True, normed, needs_residual,
        )  # fmt: skip
        params, grads = (*norm, *side[:2]), (*dnorm, dside_weight, dside_bias)
        cast = [None if p is None else g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
        return draw, cast[:2], [None] * 4, dresidual, cast[2:]
    if tail.se is None:
        draw, dweight, dbias, dresidual = bn_act.backward_op(
            dy, raw, *norm, residual, mean, var, *rest, tail.batch_stats, tail.eps, tail.act, want
        )
        dmlp = [None] * 4
    else:
        draw, dweight, dbias, *dmlp, dresidual = bn_se_act.backward_op(
            dy, raw, *norm, mlp[0], mlp[2], residual, mean, var, *rest,
            tail.batch_stats, tail.eps, *tail.se, tail.act, want,
        )  # fmt: skip
    if tail.act == "identity":
        dresidual = dy
    params = (*norm, *mlp)
    grads = (dweight, dbias, *dmlp)
    cast = [None if p is None else g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
    return draw, cast[:2], cast[2:], dresidual, [None] * 2


def _backward_of_backward(spec, x, tensors, mask, dy, needed):
    """The same gradients, as a graph: the step ops are differentiated instead of this node."""
    tail, *others = spec
    has_residual = mask.numel() > 0

    def fn(x, *tensors):
        linear = replace(tail, act="identity")
        act = linear if has_residual else tail
        y = _forward((act, *others[:2], False), x, *tensors)[0]
        return masked_activation(y, tail.act, unpack_mask(mask, dy)) if has_residual else y

    tensors = list(tensors)
    if needed[13] and tensors[12] is None:
        tensors[12] = torch.zeros_like(dy)
    return vjp(fn, (x, *tensors), needed, dy)
