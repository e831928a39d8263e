"""What pre-activation blocks are written in: sums with statistics, norm first, addition last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks, dispatch, observers
from ..layout import conv_memory_format, dense
from ..ops import bn_act, conv_bn_act, conv_stats, residual_add
from ..ops.convolution import conv_shape
from ..ops.define import PLAIN
from ..running_stats import normalised
from .chain import Scale, add_act
from .recognise import NormPart, act_of, geometry_of, norm_of, symbolic, wants_grad
from .residual_scale import ResidualScale
from .training import NO_PROLOGUE
from .unit import Batch, Pending, State, activate, materialise, misfit, operands, value


@dataclass(frozen=True)
class Sum:
    """A block's result and, where a norm will want them, its mean and variance."""

    value: Tensor  # [N, C, H, W]
    mean: Tensor | None = None  # [C]
    var: Tensor | None = None  # [C]


def norm_relu(
    state: Sum, norm: nn.Module | NormPart, act: nn.Module | str, batches: list[Batch]
) -> State:
    """``act(norm(.))`` of a sum: pending in training, one pass in inference."""
    x = state.value
    found = "tracing" if symbolic(x) else norm_of(norm)
    name = act_of(act)
    if not isinstance(found, str):
        found = _norm_misfit(x, found.weight, found.running_mean) or found
    if isinstance(found, str) or name is None:
        reason = found if isinstance(found, str) else f"{type(act).__name__} has no fused form"
        observers.notify(observers.Event("norm", "unfused", reason))
        return activate(normalised(norm, x), act)
    x = dense(x)
    if not found.batch_stats:
        pending = Pending(x, found, name, found.running_mean, found.running_var)
        return pending if wants_grad(x, found.weight, found.bias) else materialise(pending)
    checks.more_than_one_value(x)
    mean, var = state.mean, state.var
    if mean is None:
        mean, var = bn_act.stats_op(x.detach())
    batches.append((found, mean, var, x.shape))
    return Pending(x, found, name, mean, var)


def _norm_misfit(x: Tensor, *params: Tensor | None) -> str | None:
    if x.dim() != 4 or x.dtype not in dispatch.DTYPES:
        return f"the input has {x.dim()} dimensions of {x.dtype}"
    if any(p is not None and (len(p) != x.shape[1] or p.device != x.device) for p in params):
        return "the norm does not fit the input"
    return None


def add_convolution(
    state: State,
    conv: nn.Module,
    residual: Tensor | None,
    scale: Scale | None,
    stats: bool,
    scaling: ResidualScale | None = None,
) -> Sum:
    """``scale * conv(state) + residual``: the end of a block."""
    geometry = "tracing" if symbolic(value(state)) else geometry_of(conv)
    if not isinstance(geometry, str):
        geometry = misfit(conv, value(state)) or geometry
    if isinstance(geometry, str):
        observers.notify(observers.Event("conv", "unfused", geometry))
        return _added(conv(materialise(state)), residual, scale, scaling)
    x, weight, bias = operands(value(state), conv)
    shape = conv_shape(x.shape, weight, geometry)
    fits = residual is not None and (residual.shape, residual.dtype) == (shape, x.dtype)
    if residual is None or not fits:
        prologue = state.prologue if isinstance(state, Pending) else NO_PROLOGUE
        own = stats and residual is None and scale is None and scaling is None
        y, mean, var = conv_stats.op(x, *prologue, weight, bias, *geometry, own)
        return Sum(y, mean, var) if own else _added(y, residual, scale, scaling)
    plain = scale is None and scaling is None and isinstance(state, Tensor)
    if plain and not wants_grad(x, weight, bias, residual):
        if x.device.type == "cpu":
            weight, bias = conv.weight, conv.bias  # packed once, under autocast too
        identity = _identity_norm(weight)
        y = conv_bn_act.op(x, weight, bias, residual, *identity, 0.0, *geometry, "identity")
        return Sum(y)
    prologue = state.prologue if isinstance(state, Pending) else NO_PROLOGUE
    y = dense(conv_stats.op(x, *prologue, weight, bias, *geometry, False)[0])
    if not dispatch.has_kernel("residual_add", y, instead="residual_mix"):
        return _added(y, residual, scale, scaling)
    residual = residual.contiguous(memory_format=conv_memory_format(x, weight))
    rows = None if scale is None else scale(y).view(-1, 1)
    gain = shortcut_gain = None
    if scaling is not None:
        gain, factor = scaling.weight.expand(y.shape[1]), scaling.of_shortcut(y)
        shortcut_gain = None if factor is None else factor.expand(y.shape[1])
    none, numbers = (None,) * 3, (False, False, 0.0, 0.0, "identity", False, stats)
    maps = (gain, *none), (shortcut_gain, *none)
    y, _, mean, var = residual_add.op(y, *maps[0], residual, *maps[1], rows, *numbers)
    return Sum(y, mean, var) if stats else Sum(y)


def add_by_module(branch: Tensor, residual: Tensor, scaling: nn.Module | None) -> Sum:
    """The end of a block whose drop path has been called, or whose scale must be."""
    return _added(branch, residual, None) if scaling is None else Sum(scaling(branch, residual))


def _added(
    branch: Tensor,
    residual: Tensor | None,
    scale: Scale | None,
    scaling: ResidualScale | None = None,
) -> Sum:
    factors = scale and scale(branch)
    if scaling is not None:
        branch, residual = scaling.of_branch(branch), residual * scaling.shortcut
    if residual is None or symbolic(branch):
        return Sum(add_act(branch, residual, None, factors))  # of which the trace promotes
    if residual.dtype != branch.dtype:
        branch = branch.to(torch.promote_types(branch.dtype, residual.dtype))  # a + b
    return Sum(add_act(branch, residual, None, factors))


_constants: dict[tuple, tuple[None, None, Tensor, Tensor]] = {}


def _identity_norm(weight: Tensor) -> tuple[None, None, Tensor, Tensor]:
    """A norm that changes nothing. The same tensors each time: a packed weight knows its norm."""
    key = weight.shape[0], weight.device
    found = _constants.get(key) if type(weight) in PLAIN else None
    if found is None:
        with torch.inference_mode(False):
            zeros = torch.zeros(weight.shape[0], device=weight.device)
            found = None, None, zeros, torch.ones_like(zeros)
        if type(weight) in PLAIN and type(zeros) is Tensor:  # not those of a tracer
            _constants[key] = found
    return found
