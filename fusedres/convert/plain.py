"""This library's own modules without its ops, for ``unfuse``: plain PyTorch, the same state dict.

The squeeze-excite and norm inside a block are modules of their own and have their own recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..reference import ACTIVATIONS
from .recipe import Recipe


def basic_block(self: nn.Module, x: Tensor) -> Tensor:
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    return _add_shortcut(self, out, x)


def bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.relu(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    return _add_shortcut(self, out, x)


def _add_shortcut(block: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    if hasattr(block, "se"):
        out = block.se(out)
    shortcut = x if block.downsample is None else block.downsample(x)
    return block.relu(out + shortcut.to(out.dtype))  # torchvision adds into the branch: its dtype


def resnet(self: nn.Module, x: Tensor) -> Tensor:
    x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
        x = stage(x)
    return self.fc(torch.flatten(self.avgpool(x), 1))


def batch_norm_act(self: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return _add_act(nn.BatchNorm2d.forward(self, x), residual, self.act)


def conv_bn_act(self: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return _add_act(self.bn(self.conv(x)), residual, self.act)


def squeeze_excite(
    self: nn.Module, x: Tensor, residual: Tensor | None = None, post_act: str | None = None
) -> Tensor:
    return _add_act(self._modules_only(x), residual, post_act)


def _add_act(x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    return ACTIVATIONS[act or "identity"](x if residual is None else x + residual.to(x.dtype))


RECIPES = (
    Recipe("fusedres.blocks.resnet.BasicBlock", reads=None, forward=basic_block),
    Recipe("fusedres.blocks.resnet.Bottleneck", reads=None, forward=bottleneck),
    Recipe("fusedres.models.ResNet", reads=None, forward=resnet),
    Recipe("fusedres.blocks.layers.BatchNormAct2d", reads=None, forward=batch_norm_act),
    Recipe("fusedres.blocks.layers.ConvBNAct2d", reads=None, forward=conv_bn_act),
    Recipe("fusedres.blocks.layers.SqueezeExcite", reads=None, forward=squeeze_excite),
)
