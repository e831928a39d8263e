"""torchvision: blocks of ResNet, RegNet and DenseNet, ResNet's stem, squeeze-excite.

``Conv2dNormActivation`` and ``BottleneckTransform`` are Sequentials: ``sequential`` runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocks.densenet import pre_norm_conv, run_dense_block
from ..blocks.recognise import SE
from .forwards import pointwise_se, residual_block, run, squeeze_excite_forward
from .recipe import Recipe


def basic_block(self: nn.Module, x: Tensor) -> Tensor:
    body = (self.conv1, self.bn1, self.relu, self.conv2, self.bn2)
    return residual_block(x, body, skip=self.downsample, act=self.relu)


def bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    body = (
        *(self.conv1, self.bn1, self.relu),
        *(self.conv2, self.bn2, self.relu),
        *(self.conv3, self.bn3),
    )
    return residual_block(x, body, skip=self.downsample, act=self.relu)


def resnet_forward_impl(self: nn.Module, x: Tensor) -> Tensor:
    x = self.maxpool(run(x, (self.conv1, self.bn1, self.relu)))
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
        x = stage(x)
    return self.fc(torch.flatten(self.avgpool(x), 1))


def regnet_block(self: nn.Module, x: Tensor) -> Tensor:
    return residual_block(x, (self.f,), skip=self.proj, act=self.activation, promotes=True)


def dense_block(self: nn.Module, init_features: Tensor) -> Tensor:
    return run_dense_block(init_features, list(self.values()))


def transition(self: nn.Module, x: Tensor) -> Tensor:
    return self.pool(pre_norm_conv(x, self.norm, self.relu, self.conv))


def _is_transition(module: nn.Module) -> bool:
    return [name for name, _ in module.named_children()] == ["norm", "relu", "conv", "pool"]


def squeeze_excite(module: nn.Module) -> SE | str:
    return pointwise_se(
        module.fc1, module.activation, module.fc2, module.scale_activation, module.avgpool
    )


RECIPES = (
    Recipe(
        "torchvision.models.resnet.BasicBlock",
        reads="conv1 bn1 relu conv2 bn2 downsample",
        forward=basic_block,
    ),
    Recipe(
        "torchvision.models.resnet.Bottleneck",
        reads="conv1 bn1 relu conv2 bn2 conv3 bn3 downsample",
        forward=bottleneck,
    ),
    Recipe(
        "torchvision.models.resnet.ResNet",
        reads="conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool torch flatten fc",
        forward=resnet_forward_impl,
        method="_forward_impl",
    ),
    Recipe(
        "torchvision.models.regnet.ResBottleneckBlock",
        reads="proj f activation",
        forward=regnet_block,
    ),
    Recipe(
        "torchvision.models.densenet._DenseBlock",
        reads="items append torch cat",
        forward=dense_block,
    ),
    Recipe(
        "torchvision.models.densenet._Transition",
        reads=None,  # nn.Sequential's own forward
        forward=transition,
        suits=_is_transition,
    ),
    Recipe(
        "torchvision.ops.misc.SqueezeExcitation",
        reads="_scale",
        forward=squeeze_excite_forward,
        also=("_scale",),
        se=squeeze_excite,
    ),
)
