"""Highway networks (Srivastava et al. 2015): a residual block whose two paths have gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks, reference
from .. import functional as F
from .products import linear, same_conv2d
from .recognise import symbolic


class _Gated(nn.Module):
    """What both highways share: one weight whose rows are h, then t, then (uncoupled) c.

    As in nn.LSTM one parameter holds all gates, so that one product makes them and no weight is
    ever put together.
    """

    def _reset(self, channels: int, fan_in: int, gate_bias: float) -> None:
        bound = fan_in**-0.5  # nn.Linear's and nn.Conv2d's own initialisation
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is None:
            return
        nn.init.uniform_(self.bias[:channels], -bound, bound)
        nn.init.constant_(self.bias[channels : 2 * channels], gate_bias)
        nn.init.constant_(self.bias[2 * channels :], -gate_bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, act={self.act!r}, coupled={self.coupled}"


def _check(channels: int, act: str, bias: bool, gate_bias: float) -> None:
    checks.size("channels", channels)
    checks.activation("act", act)
    checks.finite("gate_bias", gate_bias)
    if not bias and gate_bias != 0:
        raise ValueError(f"gate_bias: wanted 0 without a bias, got {gate_bias}")


class Highway(_Gated):
    """``y = act(W_h x + b_h) * t + x * (1 - t)``, ``t = sigmoid(W_t x + b_t)``.

    Uncoupled, the carry gate ``sigmoid(W_c x + b_c)`` stands for ``1 - t``. With both gates open
    this is a residual block.

    State dict: ``weight`` [2C, C] and ``bias`` [2C] (uncoupled 3C), whose rows are h, t, c.

    Args:
        channels: C, of the input and the result.
        act: activation of the transform.
        coupled: one gate for both paths.
        bias: whether there is one.
        gate_bias: t starts at it and c at its negative: below zero the layer starts by carrying
            its input (section 2.2 of the paper).

    Raises:
        ValueError: an unknown act; channels < 1; a gate_bias without bias, or none that is finite.
        TypeError: channels is no whole number, gate_bias no number; in the forward another dtype
            than the weight's (RuntimeError: another device).
    """

    def __init__(
        self, channels: int, *, act: str = "relu", coupled: bool = True, bias: bool = True,
        gate_bias: float = -2.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _check(channels, act, bias, gate_bias)
        self.channels, self.act, self.coupled = channels, act, coupled
        rows = (2 if coupled else 3) * channels
        self.weight = nn.Parameter(torch.empty(rows, channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(self.weight.new_empty(rows)) if bias else None
        with torch.no_grad():
            self._reset(channels, channels, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] -> the same shape."""
        if symbolic(x):
            return plain(self, x)
        checks.layer_input("x", x, self.weight)
        if x.dim() < 1 or x.shape[-1] != self.channels:
            raise ValueError(f"x: wanted shape [..., {self.channels}], got {tuple(x.shape)}")
        rows = x.reshape(-1, self.channels)
        parts = linear(rows, self.weight, self.bias)
        return F.highway(parts, rows.to(parts.dtype), act=self.act, coupled=self.coupled).view(
            x.shape
        )


class HighwayConv2d(_Gated):
    """A highway layer whose transform and gates are one convolution of the same size.

    State dict: ``weight`` [2C, C, k, k] and ``bias`` [2C] (uncoupled 3C), whose rows are h, t, c.

    Args:
        channels: C, of the input and the result.
        kernel_size: odd: the result has the input's size.
        Others: as for Highway.

    Raises:
        ValueError: as for Highway; an even kernel_size.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, *, act: str = "relu", coupled: bool = True,
        bias: bool = True, gate_bias: float = -2.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _check(channels, act, bias, gate_bias)
        checks.size("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: wanted an odd number >= 1, got {kernel_size}")
        self.channels, self.act, self.coupled = channels, act, coupled
        self.kernel_size = kernel_size
        shape = (2 if coupled else 3) * channels, channels, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(self.weight.new_empty(shape[0])) if bias else None
        with torch.no_grad():
            self._reset(channels, channels * kernel_size**2, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> the same shape."""
        if symbolic(x):
            return plain(self, x)
        checks.layer_input("x", x, self.weight)
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: wanted shape [N, {self.channels}, H, W], got {tuple(x.shape)}")
        parts = same_conv2d(x, self.weight, self.bias)
        return F.highway(parts, x.to(parts.dtype), act=self.act, coupled=self.coupled)


def plain(layer: Highway | HighwayConv2d, x: Tensor) -> Tensor:
    """The layer in PyTorch's own functions, for traces and ``unfuse``."""
    maps = isinstance(layer, HighwayConv2d)
    if maps:
        parts = torch.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size // 2)
    else:
        parts = nn.functional.linear(x, layer.weight, layer.bias)
    parts = parts.split(layer.channels, 1 if maps else -1)
    h, t = parts[0], torch.sigmoid(parts[1])
    carry = 1 - t if layer.coupled else torch.sigmoid(parts[2])
    return reference.ACTIVATIONS[layer.act](h) * t + x.to(h.dtype) * carry
