"""Layers that fuse what follows them: BatchNormAct2d, ConvBNAct2d, SqueezeExcite."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks, observers, reference
from .. import functional as F
from ..running_stats import recomputing
from .chain import add_act, chain
from .recognise import SE, not_pointwise, symbolic
from .squeeze import squeeze_excite

POOLS = ("mean", "mean_max")


def batch_norm_act(norm: _BatchNorm, x: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """``act(bn(x) + residual)`` with a batch norm module's parameters, mode and statistics."""
    has_stats = norm.running_mean is not None and norm.running_var is not None
    training = norm.training or not has_stats
    counts = norm.training and norm.track_running_stats and not recomputing()
    counts = counts and norm.num_batches_tracked is not None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if counts and norm.momentum is None:  # cumulative average
        momentum = 1.0 / (norm.num_batches_tracked + 1).to(torch.float32)
    running = norm.running_mean, norm.running_var
    if norm.training and not norm.track_running_stats:
        running = None, None
    y = F.batch_norm_act(
        x, *running, norm.weight, norm.bias, training, momentum, norm.eps,
        residual=residual, act=act,
    )  # fmt: skip
    if counts:
        norm.num_batches_tracked.add_(1)  # last: an error above leaves it as it was
    return y


class BatchNormAct2d(nn.BatchNorm2d):
    """``act(bn(x) + residual)``: nn.BatchNorm2d with its successor's work done in the same pass.

    Parameters, buffers, state dict and semantics are nn.BatchNorm2d's.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for nn.BatchNorm2d.
        act: a name that ``fusedres.functional.batch_norm_act`` takes.

    Raises:
        ValueError: an unknown act; a negative momentum or eps.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: str = "relu",
        device=None,
        dtype=None,
    ):
        checks.bn_numbers(momentum, eps)
        checks.activation("act", act)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` and ``residual``: [N, C, H, W]; returns the same shape, dtype and format."""
        if symbolic(x):
            return add_act(_BatchNorm.forward(self, x), residual, self.act)
        self._check_input_dim(x)
        return batch_norm_act(self, x, residual, self.act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


class ConvBNAct2d(nn.Module):
    """``act(bn(conv(x)) + residual)``: one call in inference, only raw results kept in training.

    Submodules ``conv`` (nn.Conv2d without bias) and ``bn`` (nn.BatchNorm2d).

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as for nn.Conv2d.
        padding: as for nn.Conv2d; default: ``dilation * (kernel_size - 1) // 2``.
        act: a name that ``fusedres.functional.batch_norm_act`` takes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        dilation: int | tuple[int, int] = 1,
        *,
        act: str = "relu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        checks.activation("act", act)
        if padding is None:
            kernels, dilations = (nn.modules.utils._pair(v) for v in (kernel_size, dilation))
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernels, dilations, strict=True))
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias=False, device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x``: [N, C, H, W]; ``residual``: of the result's shape."""
        return chain(x, (self.conv, self.bn, self.act), residual=residual)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class SqueezeExcite(nn.Module):
    """``post_act(x * gate(fc2(act(fc1(mean(x))))) + residual)``  (Hu et al. 2018).

    Submodules ``fc1`` and ``fc2``, 1x1 nn.Conv2d with bias: torchvision's keys.

    Args:
        channels: C of the input.
        squeeze_channels: hidden channels; default: ``max(1, channels // 16)``.
        act: activation of the hidden channels.
        gate: "sigmoid" or "hard_sigmoid".
        pool: the squeeze: "mean", or "mean_max" for half the mean and half the largest value.

    Raises:
        ValueError: an unknown act, gate or pool; fewer than one channel.
        TypeError: channels that are no whole number.
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int | None = None,
        *,
        act: str = "relu",
        gate: str = "sigmoid",
        pool: str = "mean",
        device=None,
        dtype=None,
    ):
        super().__init__()
        checks.activation("act", act)
        checks.one_of("gate", gate, reference.GATES)
        checks.one_of("pool", pool, POOLS)
        checks.size("channels", channels)
        if squeeze_channels is None:
            squeeze_channels = max(1, channels // 16)
        checks.size("squeeze_channels", squeeze_channels)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1, device=device, dtype=dtype)
        self.act = act
        self.gate = gate
        self.pool = pool

    def forward(
        self, x: Tensor, residual: Tensor | None = None, post_act: str | None = None
    ) -> Tensor:
        """``x`` and ``residual``: [N, C, H, W]; ``post_act``: a name, or None for none."""
        parts = "tracing" if symbolic(x) else self.squeeze_excite_parts()
        if not isinstance(parts, str) and x.dim() != 4:
            parts = f"the input has {x.dim()} dimensions, not 4"
        if isinstance(parts, str):
            observers.notify(observers.Event("squeeze_excite", "unfused", parts))
            return add_act(self._modules_only(x), residual, post_act)
        return squeeze_excite(x, parts, residual, post_act or "identity")

    def squeeze_excite_parts(self) -> SE | str:
        """What a fused tail needs of this module, or why it must run by itself."""
        if (reason := not_pointwise(self.fc1) or not_pointwise(self.fc2)) is not None:
            return reason
        layers = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return SE(*layers, self.act, self.gate, self.pool)

    def _modules_only(self, x: Tensor) -> Tensor:
        hidden = reference.ACTIVATIONS[self.act](self.fc1(_squeezed(x, self.pool)))
        return x * reference.GATES[self.gate](self.fc2(hidden))

    def extra_repr(self) -> str:
        return f"act={self.act!r}, gate={self.gate!r}, pool={self.pool!r}"


def _squeezed(x: Tensor, pool: str) -> Tensor:
    mean = torch.nn.functional.adaptive_avg_pool2d(x, 1)
    return mean if pool == "mean" else 0.5 * mean + 0.5 * x.amax((2, 3), keepdim=True)


class EffectiveSqueezeExcite(SqueezeExcite):
    """``post_act(x * gate(fc(mean(x))) + residual)``: one layer, no bottleneck (Lee and Park 2020).

    Submodule ``fc``, a 1x1 nn.Conv2d with bias: timm's EffectiveSEModule.

    Args:
        channels: C of the input.
        gate, pool: as for SqueezeExcite.
    """

    def __init__(
        self,
        channels: int,
        *,
        gate: str = "hard_sigmoid",
        pool: str = "mean",
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)
        checks.one_of("gate", gate, reference.GATES)
        checks.one_of("pool", pool, POOLS)
        checks.size("channels", channels)
        self.fc = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.act, self.gate, self.pool = "identity", gate, pool

    def squeeze_excite_parts(self) -> SE | str:
        """What a fused tail needs of this module, or why it must run by itself."""
        if (reason := not_pointwise(self.fc)) is not None:
            return reason
        return SE(self.fc.weight, self.fc.bias, None, None, self.act, self.gate, self.pool)

    def _modules_only(self, x: Tensor) -> Tensor:
        return x * reference.GATES[self.gate](self.fc(_squeezed(x, self.pool)))
