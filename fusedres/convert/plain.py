"""This library's own modules without its ops, for ``unfuse``: plain PyTorch, the same state dict.

The squeeze-excite and norm inside a block are modules of their own and have their own recipes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..blocks.chain import Scale
from ..blocks.drop_path import drop_plan, must_call_drop_path
from ..reference import ACTIVATIONS
from .recipe import Recipe


def basic_block(self: nn.Module, x: Tensor) -> Tensor:
    def branch() -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))

    return _add_shortcut(self, branch, x)


def bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    def branch() -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))

    return _add_shortcut(self, branch, x)


def _add_shortcut(block: nn.Module, branch: Callable[[], Tensor], x: Tensor) -> Tensor:
    by_module = must_call_drop_path(block) is not None
    runs, scale = (True, None) if by_module else drop_plan(block, x)
    if not runs:
        return block.relu(x.clone() if block.downsample is None else block.downsample(x))
    out = branch()
    if hasattr(block, "se"):
        out = block.se(out)
    if not block.residual:
        return block.relu(out)
    out = _dropped(block, out, scale, by_module)
    shortcut = x if block.downsample is None else block.downsample(x)
    # torchvision adds into the branch: its dtype
    return block.relu(_sum(block, out, shortcut.to(out.dtype)))


def _dropped(block: nn.Module, out: Tensor, scale: Scale | None, by_module: bool) -> Tensor:
    if by_module:
        return block.drop_path(out)
    return out if scale is None else out * scale(out).to(out.dtype).view(-1, 1, 1, 1)


def _sum(block: nn.Module, branch: Tensor, shortcut: Tensor) -> Tensor:
    scaling = block.residual_scale
    return branch + shortcut if scaling is None else scaling(branch, shortcut)


def preact_block(self: nn.Module, x: Tensor) -> Tensor:
    by_module = must_call_drop_path(self) is not None
    runs, scale = (True, None) if by_module else drop_plan(self, x)
    if not runs and self.downsample is None:
        return x
    h = self.relu(self.norm1(x))
    shortcut = x if self.downsample is None else self.downsample(h)
    if not runs:
        return shortcut
    out = self.relu(self.norm2(self.conv1(h)))
    if hasattr(self, "conv3"):
        out = self.conv3(self.relu(self.norm3(self.conv2(out))))
    else:
        out = self.conv2(out if self.dropout is None else self.dropout(out))
    if not self.residual:
        return out
    return _sum(self, _dropped(self, out, scale, by_module), shortcut)


def preact_stage(self: nn.Module, x: Tensor) -> Tensor:
    return self.blocks(x)


def preact_resnet(self: nn.Module, x: Tensor) -> Tensor:
    x = self.relu(self.norm(self.stages(self.stem(x))))
    return torch.flatten(self.head(x), 1)


def wide_resnet(self: nn.Module, x: Tensor) -> Tensor:
    x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
    return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


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


def residual_scale(
    self: nn.Module, branch: Tensor, x: Tensor, scale: Tensor | None = None, act: str = "identity"
) -> Tensor:
    branch = self.of_branch(branch)
    if scale is not None:
        branch = branch * scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    return ACTIVATIONS[act](branch + x * self.shortcut)


def _add_act(x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    return ACTIVATIONS[act or "identity"](x if residual is None else x + residual.to(x.dtype))


RECIPES = (
    Recipe("fusedres.blocks.resnet.BasicBlock", reads=None, forward=basic_block),
    Recipe("fusedres.blocks.resnet.Bottleneck", reads=None, forward=bottleneck),
    Recipe("fusedres.models.ResNet", reads=None, forward=resnet),
    Recipe("fusedres.blocks.residual_scale.ResidualScale", reads=None, forward=residual_scale),
    Recipe("fusedres.blocks.preact.PreActBasicBlock", reads=None, forward=preact_block),
    Recipe("fusedres.blocks.preact.PreActBottleneck", reads=None, forward=preact_block),
    Recipe("fusedres.blocks.preact.PreActStage", reads=None, forward=preact_stage),
    Recipe("fusedres.preact.PreActResNet", reads=None, forward=preact_resnet),
    Recipe("fusedres.preact.WideResNet", reads=None, forward=wide_resnet),
    Recipe("fusedres.blocks.layers.BatchNormAct2d", reads=None, forward=batch_norm_act),
    Recipe("fusedres.blocks.layers.ConvBNAct2d", reads=None, forward=conv_bn_act),
    Recipe("fusedres.blocks.layers.SqueezeExcite", reads=None, forward=squeeze_excite),
    Recipe("fusedres.blocks.layers.EffectiveSqueezeExcite", reads=None, forward=squeeze_excite),
)
