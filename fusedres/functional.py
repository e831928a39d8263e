"""The stateless functions: arguments checked, then one op.

Every function takes tensors ``[N, C, ...]`` in any memory format, in float32, float64, bfloat16 or
float16, and returns the format PyTorch would; per-channel parameters may have another floating
dtype. Sums are kept in float32 (float64 for float64) and rounded once at the store; results are
bitwise equal from run to run and for any number of threads. All but ``conv_bn_act`` are
differentiable twice.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import checks
from .functional_gates import highway, lstm_cell
from .functional_norm import add_layer_norm, add_rms_norm, dropout_add
from .functional_residual import residual_add, residual_mix
from .layout import dense, dense_like
from .ops import bn_act, bn_se_act
from .ops import conv_bn_act as conv_bn_act_op
from .ops import squeeze_excite as squeeze_excite_op
from .running_stats import update_running_stats

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm_act",
    "batch_norm_se_act",
    "conv_bn_act",
    "dropout_add",
    "highway",
    "lstm_cell",
    "residual_add",
    "residual_mix",
    "squeeze_excite",
]


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """``act((input - mean) / sqrt(var + eps) * weight + bias + residual)``.

    Args:
        input: [N, C, ...]; not changed.
        running_mean, running_var: [C]; the statistics used when not training; updated in place
            (variance unbiased) when training, after the result has been computed.
        weight, bias: [C]; default: ones and zeros.
        training: normalise with the batch's statistics.
        momentum: the new statistics' share in the running ones.
        eps: added to the variance.
        residual: of input's shape, dtype and device; added before the activation.
        act: relu, identity, relu6, leaky_relu (slope 0.01), silu, gelu or hardswish.

    Returns:
        A new tensor of input's shape, dtype and format.

    Raises:
        TypeError: a tensor is not floating-point, or residual's dtype is not input's.
        ValueError: a wrong shape, act, momentum or eps; one value per channel in training.
        RuntimeError: a parameter of another length than C or on another device; no running
            statistics when not training (types and wording of F.batch_norm).

    Traffic: training reads input twice, residual once, writes once (eager: up to 8 passes).
    Source: Ioffe and Szegedy 2015, algorithm 1; ``reference.bn_act``.
    """
    checks.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    checks.like("residual", residual, input)
    checks.activation("act", act)
    mean, var = (None, None) if training else (running_mean, running_var)
    x = dense(input)
    save_mask = bn_act.saves_mask(act, residual) and _wants_grad(input, weight, bias, residual)
    y, mean, var, _ = bn_act.op(
        x, weight, bias, dense_like(residual, x), mean, var, training, eps, act, save_mask
    )
    if training:
        update_running_stats(running_mean, running_var, mean, var, input.shape, momentum)
    return y


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """``act(bn(conv2d(input, weight, bias)) + residual)`` with running statistics, for inference.

    Batch norm is folded into the weight, which is packed once and kept until it or a statistic
    changes.

    Args:
        input: [N, C, H, W]; not changed.
        weight: [K, C / groups, R, S], of input's dtype.
        bias: [K] or None, of input's dtype.
        running_mean, running_var, bn_weight, bn_bias: [K].
        stride, padding, dilation, groups: as in F.conv2d.
        residual: [N, K, H', W'] of input's dtype.
        act: as in ``batch_norm_act``.

    Raises:
        TypeError, ValueError: as in ``batch_norm_act``.
        RuntimeError: gradients are on and a tensor requires grad; whatever F.conv2d raises for
            operands that do not fit.

    Numerics: a NaN that meets oneDNN's fused ReLU becomes 0, where PyTorch keeps it.
    Traffic: reads input, residual and weight, writes once (eager: up to 8 passes more).
    Source: ``reference.conv_bn_act``.
    """
    checks.floating("input", input)
    if input.dim() != 4:
        raise ValueError(f"input: wanted 4 dimensions [N, C, H, W], got {tuple(input.shape)}")
    checks.bn_numbers(None, eps)
    checks.activation("act", act)
    checks.no_grad_wanted(
        "conv_bn_act", input=input, weight=weight, bias=bias, residual=residual,
        bn_weight=bn_weight, bn_bias=bn_bias,
    )  # fmt: skip
    stride, padding, dilation = (_pair(v) for v in (stride, padding, dilation))
    shape = _conv_shape(input, weight, bias, stride, padding, dilation, groups)
    params = dict(
        running_mean=running_mean, running_var=running_var, bn_weight=bn_weight, bn_bias=bn_bias
    )
    for name, p in params.items():
        if p is not None:
            checks.floating(name, p)
        checks.per_channel(name, p, weight.shape[0])
        checks.same_device(name, p, input)
    if residual is not None:
        checks.same_device("residual", residual, input)
        result = torch.empty(shape, dtype=input.dtype, device="meta")
        checks.like("residual", residual.to("meta"), result)
    return conv_bn_act_op.op(
        input, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, eps,
        stride, padding, dilation, groups, act,
    )  # fmt: skip


def _conv_shape(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> torch.Size:
    """The result's shape; raises F.conv2d's own errors for operands that do not fit."""
    operands = input, weight, bias
    like = all(t is None or (t.dtype, t.device) == (input.dtype, input.device) for t in operands)
    shapes = tuple(None if t is None else t.shape for t in operands)
    if not like:
        shape = None
    elif torch.compiler.is_compiling():  # whose sizes may be symbols, which no cache knows
        shape = _shape_on_meta(shapes, input.dtype, geometry)
    else:
        key = tuple(tuple(g) if isinstance(g, list) else g for g in geometry)
        shape = _cached_shape(shapes, input.dtype, key)
    # On a real device PyTorch words the error better.
    return torch.conv2d(*operands, *geometry).shape if shape is None else shape


def _shape_on_meta(shapes: tuple, dtype: torch.dtype, geometry: tuple) -> torch.Size | None:
    """The shape of F.conv2d's result; None where it raises."""
    operands = (None if s is None else torch.empty(s, dtype=dtype, device="meta") for s in shapes)
    try:
        return torch.conv2d(*operands, *geometry).shape
    except RuntimeError:
        return None


_cached_shape = lru_cache(maxsize=4096)(_shape_on_meta)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def squeeze_excite(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    act: str = "relu",
    gate: str = "sigmoid",
    post_act: str = "identity",
) -> Tensor:
    """``post_act(input * gate(w2 act(w1 mean(input) + b1) + b2) + residual)``.

    Args:
        input: [N, C, H, W] (or any [N, C, ...] with at least one axis behind C).
        w1: [R, C] or [R, C, 1, 1]; w2: [C, R] or [C, R, 1, 1]; b1: [R]; b2: [C].
        residual: of input's shape, dtype and device.
        act: activation of the R hidden channels.
        gate: "sigmoid" or "hard_sigmoid".
        post_act: activation of the sum.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``batch_norm_act``.

    Traffic: reads input twice and residual once, writes once (eager: up to 8 passes).
    Source: Hu et al. 2018, equations 2 to 4; ``reference.squeeze_excite``.
    """
    checks.floating("input", input)
    if input.dim() < 3:
        raise ValueError(f"input: wanted at least 3 dimensions, got {tuple(input.shape)}")
    w1, w2 = checks.squeeze_excite(input, w1, b1, w2, b2, act, gate, post_act)
    checks.like("residual", residual, input)
    save_mask = bn_act.saves_mask(post_act, residual) and _wants_grad(
        input, w1, b1, w2, b2, residual
    )
    x = dense(input)
    return squeeze_excite_op.op(
        x, w1, b1, w2, b2, dense_like(residual, x), act, gate, post_act, save_mask
    )[0]


def batch_norm_se_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    se_act: str = "relu",
    gate: str = "sigmoid",
    act: str = "relu",
) -> Tensor:
    """``act(z * gate(w2 se_act(w1 mean(z) + b1) + b2) + residual)`` with ``z = bn(input)``.

    The tail of a squeeze-excite block; arguments and errors are those of ``batch_norm_act`` and
    ``squeeze_excite``.

    Traffic: reads input twice and residual once, writes once, exactly as ``batch_norm_act``: the
        squeeze follows from the sums that batch norm takes anyway (eager: up to 11 passes).
    Source: ``reference.bn_se_act``.
    """
    checks.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.dim() < 3:
        raise ValueError(f"input: wanted at least 3 dimensions, got {tuple(input.shape)}")
    w1, w2 = checks.squeeze_excite(input, w1, b1, w2, b2, se_act, gate, act)
    checks.like("residual", residual, input)
    mean, var = (None, None) if training else (running_mean, running_var)
    params = weight, bias, w1, b1, w2, b2
    save_mask = bn_act.saves_mask(act, residual) and _wants_grad(input, *params, residual)
    x = dense(input)
    y, mean, var, *_ = bn_se_act.op(
        x, *params, dense_like(residual, x), mean, var, training, eps, se_act, gate, act, save_mask
    )
    if training:
        update_running_stats(running_mean, running_var, mean, var, input.shape, momentum)
    return y
