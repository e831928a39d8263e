"""Sums of branch and shortcut: ``fusedres.functional.residual_add`` and ``residual_mix``.

Numerics as in ``fusedres.functional``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .layout import dense, dense_like
from .ops import residual_add as residual_add_op
from .ops import residual_mix as residual_mix_op

__all__ = ["residual_add", "residual_mix"]


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def residual_add(
    branch: Tensor,
    shortcut: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "identity",
) -> Tensor:
    """``act(scale[n, c] * (weight[c] * branch + bias[c]) + shortcut_weight[c] * shortcut)``.

    Every factor is differentiable and costs no pass over memory: LayerScale (``weight`` [C]),
    SkipInit and ReZero (``weight`` [1]), ``x / L`` (``shortcut_weight`` [1]), stochastic depth
    (``scale`` [N]), a channel gate (``scale`` [N, C]).

    Args:
        branch: [N, C, ...].
        shortcut: of branch's shape, dtype and device; None leaves it out.
        weight, bias, shortcut_weight: [C] or one element; any floating dtype.
        scale: [N], [N, 1] or [N, C]; any floating dtype.
        act: as in ``batch_norm_act``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``batch_norm_act``.

    Traffic: one read of each operand, one write.
    Source: Touvron et al. 2021, eq. 3 (LayerScale); De and Smith 2020 (SkipInit); Bachlechner et
        al. 2021 (ReZero); Huang et al. 2016; ``reference.residual_add``.
    """
    checks.floating("branch", branch)
    checks.at_least_2d("branch", branch)
    checks.like("shortcut", shortcut, branch)
    checks.activation("act", act)
    n, c = branch.shape[:2]
    factors = dict(weight=weight, bias=bias, shortcut_weight=shortcut_weight)
    for name, p in factors.items():
        if p is not None:
            checks.floating(name, p)
            checks.same_device(name, p, branch)
            if p.numel() != 1 and p.shape != (c,):
                raise ValueError(f"{name}: wanted shape ({c},) or (1,), got {tuple(p.shape)}")
            factors[name] = p.reshape(-1).expand(c)
    if scale is not None:
        checks.floating("scale", scale)
        checks.same_device("scale", scale, branch)
        if tuple(scale.shape) not in ((n,), (n, 1), (n, c)):
            wanted = f"({n},), ({n}, 1) or ({n}, {c})"
            raise ValueError(f"scale: wanted shape {wanted}, got {tuple(scale.shape)}")
        scale = scale.view(n, -1) if n else scale.new_empty(0, 1)
    x = dense(branch)
    save_mask = act in reference.MASKED_ACTS and _wants_grad(
        branch, shortcut, scale, *factors.values()
    )
    return residual_add_op.op(
        x, factors["weight"], factors["bias"], None, None, dense_like(shortcut, x),
        factors["shortcut_weight"], None, None, None, scale, False, False, 0.0, 0.0, act,
        save_mask, False,
    )[0]  # fmt: skip


def residual_mix(
    branch: Tensor,
    shortcut: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gate: Tensor | None = None,
    row_scale: Tensor | None = None,
    act: str = "identity",
) -> Tensor:
    """``act(alpha * s[n] * branch + beta * shortcut)``, gated: ``g`` and ``1 - g`` on the two.

    Args:
        branch: [N, ...], at least 2 dimensions.
        shortcut: of branch's shape, dtype and device.
        alpha, beta: factors of the two.
        gate: g, of branch's shape and dtype: a highway network's transform gate.
        row_scale: s, [N]: stochastic depth's factor of each image; it gets no gradient.
        act: as in ``batch_norm_act``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``batch_norm_act``.

    Traffic: one read of each operand, one write.
    Source: ``reference.residual_mix``.
    """
    checks.floating("branch", branch)
    checks.at_least_2d("branch", branch)
    checks.like("shortcut", shortcut, branch)
    checks.like("gate", gate, branch)
    checks.activation("act", act)
    if row_scale is not None:
        checks.floating("row_scale", row_scale)
        checks.same_device("row_scale", row_scale, branch)
        if row_scale.shape != branch.shape[:1]:
            wanted = tuple(branch.shape[:1])
            raise ValueError(f"row_scale: wanted shape {wanted}, got {tuple(row_scale.shape)}")
        row_scale = row_scale.detach()
    x = dense(branch)
    save_mask = act in reference.MASKED_ACTS and _wants_grad(branch, shortcut, gate)
    return residual_mix_op.op(
        x, dense_like(shortcut, x), dense_like(gate, x), row_scale, alpha, beta, act, save_mask
    )[0]
