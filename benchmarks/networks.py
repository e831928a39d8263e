"""What a residual network computes, as shapes: its convolutions, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import fusedres

IMAGE = 224
Shape = tuple[int, int, int]  # [C, H, W]


@dataclass(frozen=True)
class Conv:
    """One convolution; x and y are its operand's and its result's shape without the batch."""

    x: Shape
    y: Shape
    kernel: int
    stride: int
    padding: int
    groups: int

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.y[0], self.x[0] // self.groups, self.kernel, self.kernel)


@dataclass(frozen=True)
class Block:
    """A residual block.

    Args:
        shortcut: the projection, None for the identity.
        squeeze: hidden channels of its squeeze-excite, 0 where there is none.
    """

    convs: tuple[Conv, ...]
    shortcut: Conv | None
    squeeze: int

    def all_convs(self) -> list[Conv]:
        return [*self.convs, *([] if self.shortcut is None else [self.shortcut])]

    @property
    def x(self) -> Shape:
        return self.convs[0].x

    @property
    def y(self) -> Shape:
        return self.convs[-1].y


@dataclass(frozen=True)
class Network:
    name: str
    stem: Conv
    pooled: Shape
    blocks: tuple[Block, ...]
    classes: int
    parameters: int

    @property
    def features(self) -> Shape:
        return self.blocks[-1].y

    def convs(self) -> Iterator[Conv]:
        yield self.stem
        for block in self.blocks:
            yield from block.all_convs()


@cache
def network(name: str, image: int = IMAGE) -> Network:
    """The shapes of ``fusedres.models.<name>`` on square images."""
    with torch.device("meta"):
        model = getattr(fusedres.models, name)()
    stem = _conv(model.conv1, (3, image, image))
    size = (stem.y[1] - 1) // 2 + 1  # the 3x3 max pooling with stride 2 and padding 1
    shape = pooled = (stem.y[0], size, size)
    blocks = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for module in stage:
            blocks.append(_block(module, shape))
            shape = blocks[-1].y
    parameters = sum(p.numel() for p in model.parameters())
    return Network(name, stem, pooled, tuple(blocks), model.fc.out_features, parameters)


def _conv(module: nn.Conv2d, x: Shape) -> Conv:
    kernel, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
    size = [(s + 2 * padding - kernel) // stride + 1 for s in x[1:]]
    return Conv(x, (module.out_channels, *size), kernel, stride, padding, module.groups)


def _block(module: nn.Module, x: Shape) -> Block:
    convs, shape = [], x
    for name in ("conv1", "conv2", "conv3"):
        if hasattr(module, name):
            convs.append(_conv(getattr(module, name), shape))
            shape = convs[-1].y
    shortcut = None if module.downsample is None else _conv(module.downsample[0], x)
    squeeze = module.se.fc1.out_channels if hasattr(module, "se") else 0
    return Block(tuple(convs), shortcut, squeeze)
