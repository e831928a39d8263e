"""Pre-activation networks: ResNet V2 with timm's keys, and Wide ResNet for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import checks
from .blocks import DropPath, PreActBasicBlock, PreActBottleneck, PreActStage
from .blocks.drop_path import check_drop_path, linear_decay
from .blocks.preact import advance
from .blocks.preact_sum import Sum, norm_relu
from .blocks.resnet import conv1x1
from .blocks.unit import materialise, track_all

__all__ = [
    "PreActResNet",
    "WideResNet",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "wide_resnet28_10",
    "wide_resnet40_2",
]


def _stage(
    block: Callable[..., nn.Module], inplanes: int, planes: int, stride: int,
    rates: list[float], mode: str, project: bool, residual: bool, **kwargs,
) -> PreActStage:  # fmt: skip
    """Blocks of one width; the first has the stride, and a projection if ``project``."""
    blocks = []
    for rate in rates:
        downsample = None
        if residual and project and not blocks:
            conv = conv1x1(inplanes, planes * block.expansion, stride)
            downsample = nn.Sequential(OrderedDict(conv=conv))
        drop_path = DropPath(rate, mode) if rate and residual else 0.0
        options = dict(drop_path=drop_path, residual=residual, **kwargs)
        blocks.append(block(inplanes, planes, stride if not blocks else 1, downsample, **options))
        inplanes = planes * block.expansion
    return PreActStage(*blocks)


def _rates(drop_path_rate: float, mode: str, layers: list[int]) -> list[list[float]]:
    check_drop_path(drop_path_rate, mode)
    rates = iter(linear_decay(drop_path_rate, sum(layers)))
    return [[next(rates) for _ in range(depth)] for depth in layers]


def _normed(norm: nn.Module, relu: nn.Module, x: Sum) -> Tensor:
    """The norm and ReLU behind the last block."""
    batches: list = []
    y = materialise(norm_relu(x, norm, relu, batches))
    track_all(batches)
    return y


class PreActResNet(nn.Module):
    """ResNet V2 (He et al. 2016b): timm's resnetv2 with batch norm, its state dict and outputs.

    Args:
        block: PreActBasicBlock or PreActBottleneck.
        layers: blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start every block as the identity: its last convolution is zero.
        drop_path_rate, drop_path_mode, residual: as for ResNet.
        norm_layer: called with a number of channels; default nn.BatchNorm2d.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "row",
        residual: bool = True,
    ):
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(OrderedDict(zip(("conv", "pool"), stem, strict=True)))
        self.stages, inplanes = nn.Sequential(), 64
        for i, rates in enumerate(_rates(drop_path_rate, drop_path_mode, layers)):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            project = stride != 1 or inplanes != planes * block.expansion
            common = rates, drop_path_mode, project, residual
            stage = _stage(block, inplanes, planes, stride, *common, norm_layer=norm_layer)
            self.stages.append(stage)
            inplanes = planes * block.expansion
        self.norm = (norm_layer or nn.BatchNorm2d)(inplanes)
        self.relu = nn.ReLU()
        head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(inplanes, num_classes, 1)
        self.head = nn.Sequential(OrderedDict(zip(("pool", "fc"), head, strict=True)))
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if m is self.head.fc:
                nn.init.normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and hasattr(m, "zero_init_last"):
                m.zero_init_last()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        state = Sum(self.stem(x))
        for stage in self.stages:
            state = advance(stage, state, True)
        return torch.flatten(self.head(_normed(self.norm, self.relu, state)), 1)


class WideResNet(nn.Module):
    """Wide ResNet for 32x32 images (Zagoruyko and Komodakis 2016, table 1).

    Keys: conv1, layer1 to layer3 (``blocks.i`` as PreActBasicBlock), bn, fc.

    Args:
        depth: 6 * n + 4 with n blocks in each of the three stages.
        width: k, the factor on 16, 32 and 64 channels.
        num_classes: outputs of the last layer.
        dropout: probability, inside every block (0.3 in the paper).
        drop_path_rate, drop_path_mode, residual: as for ResNet.

    Raises:
        ValueError: depth is not 6 * n + 4; a width or num_classes below 1; a dropout or
            drop_path_rate outside [0, 1]. TypeError: no numbers.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        dropout: float = 0.0,
        *,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "row",
        residual: bool = True,
    ):
        super().__init__()
        for name, number in dict(depth=depth, width=width, num_classes=num_classes).items():
            checks.size(name, number)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: wanted 6 * n + 4 for some n >= 1, got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        inplanes, options = 16, dict(dropout=dropout)
        depths = [(depth - 4) // 6] * 3
        for i, rates in enumerate(_rates(drop_path_rate, drop_path_mode, depths)):
            planes, stride = 16 * 2**i * width, 1 if i == 0 else 2
            common = rates, drop_path_mode, stride != 1 or inplanes != planes, residual
            stage = _stage(PreActBasicBlock, inplanes, planes, stride, *common, **options)
            setattr(self, f"layer{i + 1}", stage)
            inplanes = planes
        self.bn = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        state = Sum(self.conv1(x))
        for stage in (self.layer1, self.layer2, self.layer3):
            state = advance(stage, state, True)
        x = _normed(self.bn, self.relu, state)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _preact(name: str, block: type[nn.Module], layers: list[int]) -> Callable[..., PreActResNet]:
    def build(**kwargs) -> PreActResNet:
        return PreActResNet(block, layers, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} with fusedres.{block.__name__}; keyword arguments: PreActResNet."
    return build


def _wide(name: str, depth: int, width: int) -> Callable[..., WideResNet]:
    def build(**kwargs) -> WideResNet:
        return WideResNet(depth, width, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"WRN-{depth}-{width} for 32x32 images; keyword arguments: WideResNet."
    return build


preact_resnet18 = _preact("preact_resnet18", PreActBasicBlock, [2, 2, 2, 2])
preact_resnet34 = _preact("preact_resnet34", PreActBasicBlock, [3, 4, 6, 3])
preact_resnet50 = _preact("preact_resnet50", PreActBottleneck, [3, 4, 6, 3])
preact_resnet101 = _preact("preact_resnet101", PreActBottleneck, [3, 4, 23, 3])
preact_resnet152 = _preact("preact_resnet152", PreActBottleneck, [3, 8, 36, 3])
wide_resnet28_10 = _wide("wide_resnet28_10", 28, 10)
wide_resnet40_2 = _wide("wide_resnet40_2", 40, 2)
