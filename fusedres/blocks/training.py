"""Units where gradients or batch statistics are wanted: raw results stay pending until read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks, dispatch, observers
from ..layout import conv_memory_format, dense
from ..ops import conv_stats
from ..ops.bn_act import saves_mask
from ..ops.conv_tail import Tail, conv_tail, tail_op, worth_recomputing
from ..ops.convolution import conv_shape
from .recognise import SE, se_of, wants_grad
from .unit import Batch, Pending, State, Unit, activate, materialise, operands, value

NO_PROLOGUE = (None, None, None, None, False, 0.0, "identity")


def convolve(unit: Unit, state: State) -> Pending:
    """The unit's convolution of ``state``; its own norm and activation are left pending."""
    raw, mean, var = _convolution(unit, state, unit.norm.batch_stats)
    if unit.norm.batch_stats:
        checks.more_than_one_value(raw)
    else:
        mean, var = unit.norm.running_mean, unit.norm.running_var
    return Pending(raw, unit.norm, unit.act, mean, var)


def _convolution(unit: Unit, state: State, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The raw result, with its mean and variance if ``stats`` are wanted."""
    prologue = state.prologue if isinstance(state, Pending) else NO_PROLOGUE
    x, weight, bias = operands(value(state), unit.conv)
    return conv_stats.op(x, *prologue, weight, bias, *unit.geometry, stats)


def tail(
    unit: Unit,
    state: State,
    residual: State | None,
    se: nn.Module | None,
    scale: Tensor | None,
    batches: list[Batch],
) -> Tensor | None:
    """The last unit with squeeze-excite, residual and activation; None where they do not fit."""
    mlp = None if se is None else se_of(se)
    if isinstance(mlp, str):
        observers.notify(observers.Event("squeeze_excite", "unfused", mlp))
        return None
    if mlp is not None and not mlp.has_op:  # the gate needs the norm's result
        return None
    norm, params = unit.norm, _mlp_params(mlp)
    x, weight, bias = operands(value(state), unit.conv)
    out = conv_shape(x.shape, weight, unit.geometry)
    side, side_norm = (None,) * 4, None
    if mlp is not None:
        residual = materialise(residual)
    if residual is not None:
        if value(residual).shape != out or value(residual).device != x.device:
            return None
        joint = dispatch.has_kernel("residual_add", x, instead="bn_act")
        if scale is not None and not joint:
            return None
        if joint and isinstance(residual, Pending) and residual.raw.dtype == x.dtype:
            *side, batch_stats, eps, _ = residual.prologue
            side_norm, residual = (batch_stats, eps), residual.raw
        layout = conv_memory_format(x, weight)
        residual = materialise(residual).to(x.dtype).contiguous(memory_format=layout)
    if norm.batch_stats and min(out) >= 0:  # else the convolution raises
        checks.more_than_one_value(torch.empty(out, device="meta"))
    spec = Tail(norm.batch_stats, norm.eps, unit.act, mlp and (mlp.act, mlp.gate), side_norm)
    affine = norm.weight, norm.bias
    graded = wants_grad(x, weight, bias, *affine, *params, residual, *side[:2], *_graded(state))
    save_mask = graded and saves_mask(unit.act, residual)
    recompute = graded and worth_recomputing(x, weight, unit.geometry)
    if recompute and isinstance(state, Pending) and (save_mask or unit.act == "identity"):
        stats = (None, None) if norm.batch_stats else (norm.running_mean, norm.running_var)
        y, mean, var = conv_tail(
            x, state.prologue, weight, bias, unit.geometry, spec, affine, params, residual, stats,
            side, scale, save_mask,
        )  # fmt: skip
        batches.append((norm, mean, var, y.shape))
    else:
        # With squeeze-excite the pass that squeezes gives batch norm's statistics as well.
        in_conv = norm.batch_stats and mlp is None
        raw, *stats = _convolution(unit, state, in_conv)
        if not in_conv:
            stats = (None, None) if norm.batch_stats else (norm.running_mean, norm.running_var)
        raw = dense(raw)
        done = tail_op(raw, spec, affine, params, residual, stats, side, scale, save_mask)
        y, mean, var = done[:3]
        batches.append((norm, mean, var, y.shape))
    return y if unit.then is None else activate(y, unit.then)


def _mlp_params(se: SE | None) -> tuple:
    return (None,) * 4 if se is None else (se.w1.flatten(1), se.b1, se.w2.flatten(1), se.b2)


def _graded(state: State) -> tuple[Tensor | None, ...]:
    return (state.norm.weight, state.norm.bias) if isinstance(state, Pending) else ()
