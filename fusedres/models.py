"""ResNet, Wide ResNet, ResNeXt, SE-ResNet and DenseNet: torchvision's keys and initialisation.

The networks of other forms have files of their own; every model is found here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, Bottleneck, DropPath, SEBasicBlock, SEBottleneck
from .blocks.chain import chain
from .blocks.drop_path import check_drop_path, linear_decay
from .blocks.resnet import conv1x1
from .densenet import DenseNet, densenet121, densenet161, densenet169, densenet201
from .preact import (
    PreActResNet,
    WideResNet,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    wide_resnet28_10,
    wide_resnet40_2,
)

__all__ = [
    "DenseNet",
    "PreActResNet",
    "ResNet",
    "WideResNet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "se_resnet101",
    "se_resnet152",
    "se_resnet18",
    "se_resnet34",
    "se_resnet50",
    "wide_resnet101_2",
    "wide_resnet28_10",
    "wide_resnet40_2",
    "wide_resnet50_2",
]


class ResNet(nn.Module):
    """torchvision.models.ResNet: the same arguments, state dict, initialisation and outputs.

    Args:
        block: BasicBlock, Bottleneck or a class with their arguments and ``expansion``.
        layers: blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start every block as the identity (Goyal et al. 2017).
        groups, width_per_group: of the 3x3 convolutions in Bottleneck.
        replace_stride_with_dilation: for stages 2 to 4, keep the resolution and dilate.
        norm_layer: called with a number of channels; default nn.BatchNorm2d.
        drop_path_rate: stochastic depth of the last block, linearly less towards the first.
        drop_path_mode: "row" or "batch", as for DropPath.
        residual: False leaves every shortcut out: the plain network of the same depth.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "row",
        residual: bool = True,
    ):
        super().__init__()
        dilate = replace_stride_with_dilation or [False] * 3
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None "
                f"or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        check_drop_path(drop_path_rate, drop_path_mode)
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._residual, self._drop_path_mode = residual, drop_path_mode
        self._drop_rates = linear_decay(drop_path_rate, sum(layers))  # of the blocks to come
        self.groups, self.base_width = groups, width_per_group
        self.inplanes, self.dilation = 64, 1
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False) -> nn.Sequential:
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if self._residual and (stride != 1 or self.inplanes != planes * block.expansion):
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                self._norm_layer(planes * block.expansion),
            )
        shared = dict(groups=self.groups, base_width=self.base_width, norm_layer=self._norm_layer)
        layers = [
            block(
                self.inplanes, planes, stride, downsample,
                dilation=previous_dilation, **shared, **self._shortcut_arguments(),
            )
        ]  # fmt: skip
        self.inplanes = planes * block.expansion
        layers += [
            block(
                self.inplanes, planes,
                dilation=self.dilation, **shared, **self._shortcut_arguments(),
            )
            for _ in range(1, blocks)
        ]  # fmt: skip
        return nn.Sequential(*layers)

    def _shortcut_arguments(self) -> dict:
        """The next block's, where they are not the default: other libraries' blocks lack them."""
        rate, arguments = self._drop_rates.pop(0), {}
        if rate:
            arguments["drop_path"] = DropPath(rate, self._drop_path_mode)
        return arguments if self._residual else arguments | {"residual": False}

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.weight is not None:
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if zero_init_residual:
            for m in self.modules():
                if hasattr(m, "zero_init_last"):
                    m.zero_init_last()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        x = chain(x, (self.conv1, self.bn1, self.relu))
        x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _resnet(name: str, block: type[nn.Module], layers: list[int], **fixed) -> Callable[..., ResNet]:
    """A constructor of one model; keyword arguments go to ResNet."""

    def build(**kwargs) -> ResNet:
        return ResNet(block, layers, **fixed, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} with fusedres.{block.__name__}; keyword arguments as for ResNet."
    return build


resnet18 = _resnet("resnet18", BasicBlock, [2, 2, 2, 2])
resnet34 = _resnet("resnet34", BasicBlock, [3, 4, 6, 3])
resnet50 = _resnet("resnet50", Bottleneck, [3, 4, 6, 3])
resnet101 = _resnet("resnet101", Bottleneck, [3, 4, 23, 3])
resnet152 = _resnet("resnet152", Bottleneck, [3, 8, 36, 3])
resnext50_32x4d = _resnet("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4)
resnext101_32x8d = _resnet(
    "resnext101_32x8d", Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8
)
resnext101_64x4d = _resnet(
    "resnext101_64x4d", Bottleneck, [3, 4, 23, 3], groups=64, width_per_group=4
)
wide_resnet50_2 = _resnet("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], width_per_group=128)
wide_resnet101_2 = _resnet("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], width_per_group=128)
se_resnet18 = _resnet("se_resnet18", SEBasicBlock, [2, 2, 2, 2])
se_resnet34 = _resnet("se_resnet34", SEBasicBlock, [3, 4, 6, 3])
se_resnet50 = _resnet("se_resnet50", SEBottleneck, [3, 4, 6, 3])
se_resnet101 = _resnet("se_resnet101", SEBottleneck, [3, 4, 23, 3])
se_resnet152 = _resnet("se_resnet152", SEBottleneck, [3, 8, 36, 3])
