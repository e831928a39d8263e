"""The demo's network, and the plain PyTorch blocks that the fused ones are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Block = Callable[..., nn.Module]


class PlainBasicBlock(nn.Module):
    """torchvision's BasicBlock: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)``."""

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.scale(self.bn2(self.conv2(out)))
        out += identity
        return self.relu(out)

    def scale(self, out: Tensor) -> Tensor:
        return out


class PlainSqueezeExcite(nn.Module):
    """``x * sigmoid(fc2(relu(fc1(mean_hw(x)))))``."""

    def __init__(self, channels: int, squeeze_channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(squeezed))))


class PlainSEBasicBlock(PlainBasicBlock):
    """PlainBasicBlock with squeeze-excite before the shortcut is added."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        reduction: int = 16,
    ):
        super().__init__(inplanes, planes, stride, downsample)
        self.se = PlainSqueezeExcite(planes, planes // reduction)

    def scale(self, out: Tensor) -> Tensor:
        return self.se(out)


class DigitsNet(nn.Module):
    """A residual network for 16x16 grey images: two stages of basic blocks, one of SE blocks."""

    def __init__(self, basic_block: Block, se_block: Block, width: int = 32, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer1 = self._stage(basic_block, width, width, stride=1)
        self.layer2 = self._stage(basic_block, width, 2 * width, stride=2)
        self.layer3 = self._stage(se_block, 2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(block: Block, inplanes: int, planes: int, stride: int) -> nn.Sequential:
        downsample = None
        if stride != 1:
            conv = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))
        return nn.Sequential(block(inplanes, planes, stride, downsample), block(planes, planes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))
