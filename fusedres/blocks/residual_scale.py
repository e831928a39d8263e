"""Scaled residuals: learnable factors on the branch, a constant one on the shortcut."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import checks, reference
from .. import functional as F
from ..ops.define import PLAIN, transformed
from .recognise import Norm, symbolic, wants_grad

# The memory of a gain -> the weight and bias that it was last folded into.
_products: WeakIdKeyDictionary = WeakIdKeyDictionary()


class ResidualScale(nn.Module):
    """``weight * branch + shortcut * x``, in the pass that adds the two.

    LayerScale: ``ResidualScale(channels, init=1e-6)`` (Touvron et al. 2021). SkipInit and ReZero:
    ``ResidualScale()``, one number that starts at zero (De and Smith 2020; Bachlechner et al.
    2021). ``x / L + f(x)``: ``ResidualScale(init=1.0, shortcut=1 / L, learnable=False)``.

    In a block (``residual_scale=``) behind a batch norm, ``weight`` becomes part of the norm's
    affine map; it costs nothing there.

    Args:
        channels: C for a weight of each channel; None for one number.
        init: the weight's first value.
        shortcut: a constant factor of the shortcut.
        learnable: whether ``weight`` is a parameter, or a buffer.
        dim: where the channels are: 1, or -1 for tokens [N, ..., C]. A block takes 1.

    Raises:
        ValueError: channels < 1; an init or shortcut that is not finite; another dim.
        TypeError: channels is no whole number, init or shortcut no number.
    """

    def __init__(
        self,
        channels: int | None = None,
        init: float = 0.0,
        shortcut: float = 1.0,
        learnable: bool = True,
        *,
        dim: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if channels is not None:
            checks.size("channels", channels)
        checks.finite("init", init)
        checks.finite("shortcut", shortcut)
        if type(dim) is not int or dim not in (1, -1):
            raise ValueError(f"dim: wanted 1 or -1, got {dim!r}")
        weight = torch.full((channels or 1,), float(init), device=device, dtype=dtype)
        if learnable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.shortcut, self.dim = float(shortcut), dim

    def forward(
        self, branch: Tensor, x: Tensor, scale: Tensor | None = None, act: str = "identity"
    ) -> Tensor:
        """``act(scale * weight * branch + shortcut * x)``.

        Args:
            branch, x: [N, C, ...], or [N, ..., C] with ``dim=-1``.
            scale: [N], stochastic depth's.
            act: as in ``fusedres.functional.batch_norm_act``.
        """
        if symbolic(branch):  # the number of dimensions may not be known
            f = self.of_branch(branch)
            f = f if scale is None else (f.movedim(0, -1) * scale.to(f.dtype)).movedim(-1, 0)
            return reference.ACTIVATIONS[act](f + x * self.shortcut)
        if self.dim == 1 or branch.dim() <= 2:
            return self._add(branch, x, scale, act)
        if x.shape != branch.shape:
            raise ValueError(f"x: wanted shape {tuple(branch.shape)}, got {tuple(x.shape)}")
        if scale is not None:  # a row is a token
            if scale.shape != branch.shape[:1]:
                wanted = tuple(branch.shape[:1])
                raise ValueError(f"scale: wanted shape {wanted}, got {tuple(scale.shape)}")
            scale = scale.view(-1, *[1] * (branch.dim() - 2)).expand(branch.shape[:-1]).flatten()
        return self._add(branch.flatten(0, -2), x.flatten(0, -2), scale, act).view(branch.shape)

    def _add(self, branch: Tensor, x: Tensor, scale: Tensor | None, act: str) -> Tensor:
        factors = dict(weight=self.weight, shortcut_weight=self.of_shortcut(branch))
        return F.residual_add(branch, x.to(branch.dtype), **factors, scale=scale, act=act)

    def of_branch(self, branch: Tensor) -> Tensor:
        """``weight * branch``."""
        weight = self.weight.to(branch.dtype)
        if self.dim == -1:
            return branch * weight
        if isinstance(branch, torch.fx.Proxy):
            return (branch.movedim(1, -1) * weight).movedim(-1, 1)
        return branch * weight.view(-1, *[1] * (branch.dim() - 2))

    def of_shortcut(self, branch: Tensor) -> Tensor | None:
        """The shortcut's factor as a tensor, None for one."""
        if self.shortcut == 1:
            return None
        return torch.full((1,), self.shortcut, dtype=self.weight.dtype, device=branch.device)

    def extra_repr(self) -> str:
        dim = "" if self.dim == 1 else f", dim={self.dim}"
        return f"{self.weight.numel()}, shortcut={self.shortcut:.3g}{dim}"


def scaled_norm(norm: Norm, gain: Tensor, channels: int) -> Norm:
    """The batch norm whose result is ``gain`` times that of ``norm``."""
    weight = gain.expand(channels) if norm.weight is None else norm.weight * gain
    bias = None if norm.bias is None else norm.bias * gain
    packs = weight.device.type == "cpu" and type(weight) in PLAIN and not transformed()
    if packs and not wants_grad(weight, bias) and not torch.compiler.is_compiling():
        weight, bias = _same_as_last(gain, weight, bias)
    return replace(norm, weight=weight, bias=bias)


def _same_as_last(gain: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """The tensors of the last call where they are equal: a packed weight knows them by identity."""
    last = _products.get(gain.untyped_storage())
    if last is not None and all(map(_equal, last, (weight, bias))):
        return last
    with torch.inference_mode(False):
        found = weight.detach().clone(), None if bias is None else bias.detach().clone()
    _products[gain.untyped_storage()] = found
    return found


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)
