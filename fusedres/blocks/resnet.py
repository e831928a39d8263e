"""ResNet's blocks (He et al. 2016), with torchvision's arguments, attributes and state dict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .. import checks, observers
from .chain import Shortcut, Triple, activate_copy, add_act, chain
from .drop_path import DropPath, drop_plan, must_call_drop_path, must_call_scale, set_shortcut
from .layers import SqueezeExcite
from .residual_scale import ResidualScale


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1):
    return nn.Conv2d(
        inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1):
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class _Block(nn.Module):
    """What the blocks share: torchvision's class as a base, once torchvision is there."""

    expansion: int
    _torchvision_name: str
    downsample: nn.Module | None
    drop_path: DropPath | None
    residual: bool
    residual_scale: ResidualScale | None

    def __new__(cls, *args, **kwargs):
        _adopt_torchvision(cls)
        return super().__new__(cls)

    def _add_to_shortcut(self, x: Tensor, *triples: Triple) -> Tensor:
        """``relu(drop_path(se(branch(x))) + shortcut(x))``; the branch alone if not residual."""
        se, scaling = getattr(self, "se", None), self.residual_scale
        if not self.residual:
            return chain(x, *triples, se=se)
        projected = Shortcut.of(x, self.downsample)
        calls_drop = must_call_drop_path(self)
        runs, scale = (True, None) if calls_drop else drop_plan(self, x)
        if not runs:
            return activate_copy(projected.settled(), self.relu)
        branch = partial(chain, x, *triples[:-1], (*triples[-1][:2], None), se=se)
        if (reason := calls_drop or must_call_scale(self)) is not None:
            observers.notify(observers.Event("shortcut", "unfused", reason))
            y = self.drop_path(branch()) if calls_drop else branch(scale=scale)
            if scaling is None:
                return add_act(y, projected.settled(), self.relu)
            return activate_copy(scaling(y, projected.settled()), self.relu)
        if scaling is None:
            return chain(x, *triples, se=se, residual=projected, scale=scale)
        if se is None and scaling.shortcut == 1:
            gain = scaling.weight
            return chain(x, *triples, residual=projected, scale=scale, gain=gain)
        y = branch()
        y = scaling(y, projected.settled(), None if scale is None else scale(y))
        return activate_copy(y, self.relu)

    def zero_init_last(self) -> None:
        """Start as the identity: the last norm's weight is set to zero (timm's hook)."""
        last = self.bn3 if hasattr(self, "bn3") else self.bn2
        if getattr(last, "weight", None) is not None:
            nn.init.zeros_(last.weight)


def _adopt_torchvision(cls: type) -> None:
    # torchvision's zero_init_residual looks for instances of its own classes. It is not imported
    # for that: a torchvision ResNet can only be asking if torchvision is loaded already.
    peer = getattr(sys.modules.get("torchvision.models.resnet"), cls._torchvision_name, None)
    owner = next(c for c in cls.__mro__ if "_torchvision_name" in c.__dict__)
    if peer is not None and not issubclass(owner, peer):
        owner.__bases__ = (*owner.__bases__, peer)


class BasicBlock(_Block):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``: drop-in for torchvision's.

    Args:
        inplanes: channels of the input.
        planes: channels of both 3x3 convolutions.
        stride: of the first convolution.
        downsample: module for the shortcut (1x1 conv and norm), or None for the identity.
        groups, base_width, dilation: only 1, 64, 1, as in torchvision.
        norm_layer: called with a number of channels; default nn.BatchNorm2d.
        drop_path: stochastic depth: a probability, or a DropPath.
        residual: False leaves the shortcut out: a plain network, for comparison.
        residual_scale: a ResidualScale of the branch and the shortcut.

    Raises:
        ValueError: groups or base_width is not 1 and 64; a drop_path outside [0, 1]; a downsample
            or drop_path without residual.
        NotImplementedError: dilation > 1.
    """

    expansion = 1
    _torchvision_name = "BasicBlock"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        drop_path: float | DropPath = 0.0,
        residual: bool = True,
        residual_scale: ResidualScale | None = None,
    ):
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        set_shortcut(self, planes, downsample, drop_path, residual, residual_scale)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]."""
        return self._add_to_shortcut(
            x,
            (self.conv1, self.bn1, self.relu),
            (self.conv2, self.bn2, self.relu),
        )


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions around a narrow middle: drop-in for torchvision's.

    ResNet's, Wide ResNet's (base_width=128) and ResNeXt's (groups=32, base_width=4). The stride is
    on the 3x3 convolution (ResNet V1.5). Arguments as for BasicBlock; ``planes`` is a quarter of
    the output's channels.
    """

    expansion = 4
    _torchvision_name = "Bottleneck"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        drop_path: float | DropPath = 0.0,
        residual: bool = True,
        residual_scale: ResidualScale | None = None,
    ):
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        out = planes * self.expansion
        set_shortcut(self, out, downsample, drop_path, residual, residual_scale)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        return self._add_to_shortcut(
            x,
            (self.conv1, self.bn1, self.relu),
            (self.conv2, self.bn2, self.relu),
            (self.conv3, self.bn3, self.relu),
        )


class SEBasicBlock(BasicBlock):
    """BasicBlock with squeeze-excite before the addition (Hu et al. 2018, figure 3).

    Arguments as for BasicBlock; keyword ``reduction``: channels over squeezed channels. The
    submodule is ``se``, with fc1 and fc2.
    """

    def __init__(self, inplanes: int, planes: int, *args, reduction: int = 16, **kwargs):
        _check_reduction(reduction)
        super().__init__(inplanes, planes, *args, **kwargs)
        channels = planes * self.expansion
        self.se = SqueezeExcite(channels, max(1, channels // reduction))


class SEBottleneck(Bottleneck):
    """Bottleneck with squeeze-excite before the addition; arguments as for SEBasicBlock."""

    def __init__(self, inplanes: int, planes: int, *args, reduction: int = 16, **kwargs):
        _check_reduction(reduction)
        super().__init__(inplanes, planes, *args, **kwargs)
        channels = planes * self.expansion
        self.se = SqueezeExcite(channels, max(1, channels // reduction))


def _check_reduction(reduction: int) -> None:
    checks.size("reduction", reduction)
