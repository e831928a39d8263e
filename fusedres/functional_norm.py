"""Residual add and norm: ``fusedres.functional.add_layer_norm``, ``add_rms_norm``, ``dropout_add``.

Numerics as in ``fusedres.functional``. Statistics are taken of the sum as it is stored, so the
result is F.layer_norm's of that sum. Dropout draws what nn.Dropout draws from the same generator
in the same state, drop path what torchvision's stochastic_depth draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .ops import add_norm
from .reference import acc_dtype

__all__ = ["add_layer_norm", "add_rms_norm", "dropout_add"]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    training: bool = False,
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = residual + drop_path(dropout(input)); (layer_norm(s), s)``.

    Args:
        input: [..., *normalized_shape], the branch; not changed.
        residual: of input's shape and device; with another dtype the sum has the promoted one.
        normalized_shape: the last dimensions, as in F.layer_norm.
        weight, bias: [*normalized_shape]; default: ones and zeros.
        eps: added to the variance.
        dropout, drop_path: probabilities of dropping an element, and a sample, when training.
        batch_dim: the dimension of input that counts samples (drop path only).
        generator: for both; default: PyTorch's own.

    Returns:
        The norm and the sum, contiguous, of the sum's dtype.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: a shape that does not fit; a probability outside 0 to 1; a negative eps.
        RuntimeError: tensors on different devices.

    Traffic: reads both operands, writes both results (eager: 5 passes, 13 with both drops).
    Source: Ba et al. 2016, equation 3; ``reference.norm``.
    """
    drops = dropout, drop_path, training, batch_dim, generator
    return _add_norm("layer", input, residual, normalized_shape, weight, bias, eps, drops)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    training: bool = False,
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = residual + drop_path(dropout(input)); (rms_norm(s), s)``.

    Arguments, results and errors as for ``add_layer_norm``; ``eps`` None is the machine epsilon
    that F.rms_norm takes: float32's, in float64 its own.

    Source: Zhang and Sennrich 2019, equation 4; ``reference.norm``.
    """
    drops = dropout, drop_path, training, batch_dim, generator
    return _add_norm("rms", input, residual, normalized_shape, weight, None, eps, drops)


def dropout_add(
    input: Tensor,
    residual: Tensor,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    training: bool = False,
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``residual + drop_path(dropout(input))``; arguments and errors as for ``add_layer_norm``.

    Traffic: reads both operands and one byte of mask, writes once (eager: 9 passes with dropout).
    """
    drops = dropout, drop_path, training, batch_dim, generator
    return _add_norm("none", input, residual, input.shape[-1:], None, None, 0.0, drops)[1]


def _add_norm(norm, x, residual, normalized_shape, weight, bias, eps, drops):
    shape = _check(x, residual, normalized_shape, weight, bias, eps, drops)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if eps is None:
        eps = torch.finfo(acc_dtype(dtype)).eps  # float32's for 16 bits, as F.rms_norm's
    cols = math.prod(shape)
    keep, row_scale, scale = _draw(x, shape, drops)
    branch, shortcut = (t.to(dtype).reshape(-1, cols) for t in (x, residual))
    weight, bias = (None if p is None else p.reshape(-1) for p in (weight, bias))
    y, total, _, _ = add_norm.op(
        branch.contiguous(), shortcut.contiguous(), weight, bias, keep, row_scale, scale, eps, norm
    )
    return y if norm == "none" else y.view(x.shape), total.view(x.shape)


def _check(x, residual, normalized_shape, weight, bias, eps, drops) -> tuple[int, ...]:
    checks.floating("input", x)
    checks.floating("residual", residual)
    checks.same_device("residual", residual, x)
    if residual.shape != x.shape:
        wanted = f"{tuple(x.shape)} (the input's)"
        raise ValueError(f"residual: wanted shape {wanted}, got {tuple(residual.shape)}")
    if isinstance(normalized_shape, Tensor):
        raise TypeError("normalized_shape: wanted a whole number or several, got a tensor")
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        wanted = ", ".join(["...", *map(str, shape)])
        raise ValueError(f"input: wanted shape [{wanted}], got {tuple(x.shape)}")
    for name, p in dict(weight=weight, bias=bias).items():
        if p is None:
            continue
        checks.floating(name, p)
        checks.same_device(name, p, x)
        if tuple(p.shape) != shape:
            raise ValueError(f"{name}: wanted shape {shape}, got {tuple(p.shape)}")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps: wanted a number >= 0, got {eps}")
    dropout, drop_path, _, batch_dim, _ = drops
    for name, p in dict(dropout=dropout, drop_path=drop_path).items():
        checks.probability(name, p)
    outer = x.dim() - len(shape)
    if drop_path and not 0 <= batch_dim < outer:
        raise ValueError(f"batch_dim: wanted a number from 0 to {outer - 1}, got {batch_dim}")
    return shape


def _draw(x: Tensor, shape, drops) -> tuple[Tensor | None, Tensor | None, float]:
    """What survives: a mask [M, D], a factor for each row [M], and the factor of all elements."""
    dropout, drop_path, training, batch_dim, generator = drops
    keep = row_scale = None
    scale = 1.0
    if training and dropout > 0:
        # In the order of x's memory, as F.dropout draws.
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout, generator=generator)
        keep = keep.reshape(-1, math.prod(shape))
        scale = 0.0 if dropout == 1 else 1 / (1 - dropout)
    if training and drop_path > 0:
        rows = x.shape[: x.dim() - len(shape)]
        samples = [n if d == batch_dim else 1 for d, n in enumerate(rows)]
        row_scale = torch.empty(samples, dtype=acc_dtype(x.dtype), device=x.device)
        row_scale = row_scale.bernoulli_(1 - drop_path, generator=generator)
        row_scale = row_scale.expand(rows).reshape(-1)
        if drop_path < 1:
            row_scale = row_scale / (1 - drop_path)
    return keep, row_scale, scale
