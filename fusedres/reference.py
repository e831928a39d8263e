"""What every fused op means, in plain PyTorch.

This file is the specification. Run in float64 on upcast inputs it is the truth that every other
execution is measured against; run in the tested dtype it is what PyTorch's own modules compute,
whose error bounds ours. It is differentiable, and the double backward of every op is autograd's
own derivative of these functions. It imports torch alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}
# F.hardsigmoid has no second derivative; this is its formula.
GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": lambda x: F.relu6(x + 3) / 6}

# Activations whose derivative takes two values: one saved bit an element gives the backward.
MASKED_ACTS = ("relu", "relu6", "leaky_relu")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of ``dtype`` values are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _acc(x: Tensor, *params: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.to(acc_dtype(x.dtype)) for p in params]


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance: ``x [N, C, ...] -> [C], [C]``."""
    dims = [d for d in range(x.dim()) if d != 1]
    if x.numel() == 0:  # var_mean would warn
        return tuple(
            x.new_full((x.shape[1],), float("nan"), dtype=acc_dtype(x.dtype)) for _ in "mv"
        )
    var, mean = torch.var_mean(x.to(acc_dtype(x.dtype)), dims, correction=0)
    return mean, var


def activation_mask(z: Tensor, act: str) -> Tensor:
    """True where the activation passes the gradient.

    NaN passes, as in PyTorch; for relu6 as in its scalar code, where its vectorised code gives 0
    (PyTorch 2.13 on a CPU: which one an element meets depends on its place in the tensor).
    """
    mask = ~(z <= 0)
    return mask & ~(z >= 6) if act == "relu6" else mask


def masked_activation(z: Tensor, act: str, mask: Tensor) -> Tensor:
    """``act(z)`` up to a constant, with its derivative taken from ``mask`` instead of ``z``."""
    return torch.where(mask, z, z * (0.01 if act == "leaky_relu" else 0.0))


def batch_norm(x, weight, bias, mean, var, batch_stats, eps) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the batch's or the given statistics."""
    weight, bias, mean, var = _acc(x, weight, bias, mean, var)
    if batch_stats:
        mean = var = None  # the batch's own: F.batch_norm differentiates through them
    return F.batch_norm(x, mean, var, weight, bias, training=batch_stats, eps=eps)


def bn_act(x, weight, bias, residual, mean, var, batch_stats, eps, act) -> tuple[Tensor, Tensor]:
    """``act(bn(x) + residual)``; returns the result and the pre-activation ``z``."""
    z = batch_norm(x, weight, bias, mean, var, batch_stats, eps)
    z = z if residual is None else z + residual
    return ACTIVATIONS[act](z), z


def se_logits(p: Tensor, w1, b1, w2, b2, act: str) -> tuple[Tensor, Tensor]:
    """The squeeze-excite MLP on squeezed channels ``p [N, C]``: hidden [N, R] and logits [N, C]."""
    w1, b1, w2, b2 = _acc(p, w1, b1, w2, b2)
    hidden = F.linear(p, w1, b1)
    return hidden, F.linear(ACTIVATIONS[act](hidden), w2, b2)


def squeeze_excite(x, w1, b1, w2, b2, residual, act, gate, post_act) -> tuple[Tensor, ...]:
    """``post_act(x * gate(w2 act(w1 mean_hw(x) + b1) + b2) + residual)``  (Hu et al. 2018, eq. 3).

    Returns the result, its pre-activation, and the MLP's hidden and logits (before act and gate).
    """
    spatial = list(range(2, x.dim()))
    hidden, logits = se_logits(x.to(acc_dtype(x.dtype)).mean(spatial), w1, b1, w2, b2, act)
    gates = GATES[gate](logits).to(x.dtype)
    z = x * gates[(...,) + (None,) * len(spatial)]
    z = z if residual is None else z + residual
    return ACTIVATIONS[post_act](z), z, hidden, logits


def bn_se_act(
    x, weight, bias, w1, b1, w2, b2, residual, mean, var, batch_stats, eps, se_act, gate, act
) -> tuple[Tensor, ...]:
    """``act(bn(x) * gate(bn(x)) + residual)``: an SE block's tail; returns as squeeze_excite."""
    z = batch_norm(x, weight, bias, mean, var, batch_stats, eps)
    return squeeze_excite(z, w1, b1, w2, b2, residual, se_act, gate, act)


def residual_mix(branch, shortcut, gate, row_scale, alpha, beta, act) -> tuple[Tensor, Tensor]:
    """``act(a * branch + beta * shortcut)``, or ``act(a*g*branch + beta*(1-g)*shortcut)``.

    ``a = alpha * row_scale[n]`` (stochastic depth, Huang et al. 2016); ``g`` is a highway
    network's transform gate (Srivastava et al. 2015, eq. 3). Returns the result and ``z``.
    """
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    if gate is not None:
        branch, shortcut = gate * branch, (1 - gate) * shortcut
    z = alpha * branch + beta * shortcut
    return ACTIVATIONS[act](z), z


def channel_map(x, weight, bias, mean, var, batch_stats, eps) -> Tensor:
    """A batch norm where there are statistics, else ``x * weight + bias`` for each channel."""
    if mean is not None:
        return batch_norm(x, weight, bias, mean, var, batch_stats, eps)
    shape = (-1, *[1] * (x.dim() - 2))
    weight, bias = (None if p is None else p.view(shape) for p in _acc(x, weight, bias))
    y = x if weight is None else x * weight
    return (y if bias is None else y + bias).to(x.dtype)


def residual_add(x, map, shortcut, shortcut_map, scale, act) -> tuple[Tensor, Tensor]:
    """``act(scale[n, c] * A(x) + B(shortcut))``; returns the result and the pre-activation.

    A and B are ``channel_map`` with ``(weight, bias, mean, var, batch_stats, eps)``: the norms of
    branch and projection shortcut, LayerScale, SkipInit. ``scale`` is [N, 1] (stochastic depth,
    Huang et al. 2016) or [N, C] (a squeeze-excite gate).
    """
    z = channel_map(x, *map)
    if scale is not None:
        z = z * scale.to(x.dtype)[(...,) + (None,) * (x.dim() - 2)]
    if shortcut is not None:
        z = z + channel_map(shortcut, *shortcut_map)
    return ACTIVATIONS[act](z), z


def scaled(branch, keep, row_scale, scale) -> Tensor:
    """``scale * s[m] * keep * branch``: dropout and drop path; ``branch [M, D]``."""
    if keep is not None:
        branch = branch * keep
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype)[:, None]
    return branch if scale == 1.0 else branch * scale


def scaled_add(branch, shortcut, keep, row_scale, scale) -> Tensor:
    """``shortcut + scale * s[m] * keep * branch``: a residual addition."""
    return shortcut + scaled(branch, keep, row_scale, scale)


def norm(x, weight, bias, eps, kind: str) -> Tensor:
    """Layer norm (Ba et al. 2016, eq. 3) or RMS norm (Zhang and Sennrich 2019, eq. 4) of rows."""
    z, weight, bias = _acc(x, x, weight, bias)
    if kind == "layer":
        return F.layer_norm(z, x.shape[-1:], weight, bias, eps).to(x.dtype)
    return F.rms_norm(z, x.shape[-1:], weight, eps).to(x.dtype)


def highway(parts, x, act, coupled) -> Tensor:
    """``act(h) * t + x * c``  (Srivastava et al. 2015, eq. 3; coupled: c = 1 - t).

    ``parts [M, 2D or 3D]`` holds h and the logits of t and c; ``x [M, D]``.
    """
    h, t, *c = parts.split(x.shape[1], 1)
    t = torch.sigmoid(t)
    return ACTIVATIONS[act](h) * t + x * (1 - t if coupled else torch.sigmoid(*c))


def lstm_cell(gates, c, forget_gate) -> tuple[Tensor, Tensor]:
    """``c' = f * c + i * g, h = o * tanh(c')``  (Gers et al. 2000; without f: Hochreiter 1997).

    ``gates [N, 4H or 3H]`` holds the pre-activations of i, f, g, o, or of i, g, o; ``c [N, H]``.
    """
    i, *f, g, o = gates.split(c.shape[1], 1)
    kept = torch.sigmoid(*f) * c if forget_gate else c
    c = kept + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def conv_stats(x, bn, weight, bias, stride, padding, dilation, groups) -> tuple[Tensor, ...]:
    """``conv(act(bn(x)))`` and the mean and biased variance of its result.

    ``bn`` is None or ``(weight, bias, mean, var, batch_stats, eps, act)``.
    """
    if bn is not None:
        w, b, mean, var, batch_stats, eps, act = bn
        x, _ = bn_act(x, w, b, None, mean, var, batch_stats, eps, act)
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y, *bn_stats(y)


def conv_bn_act(
    x, weight, bias, residual, bn_weight, bn_bias, mean, var, eps,
    stride, padding, dilation, groups, act,
) -> Tensor:  # fmt: skip
    """``act(bn(conv(x)) + residual)`` with running statistics."""
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return bn_act(y, bn_weight, bn_bias, residual, mean, var, False, eps, act)[0]
