"""transformers: the layers of ResNet and RegNet."""

from __future__ import annotations

from torch import Tensor, nn

from ..blocks.recognise import SE
from .forwards import pointwise_se, residual_block, run, squeeze_excite_forward
from .recipe import Recipe

RESNET = "transformers.models.resnet.modeling_resnet"
REGNET = "transformers.models.regnet.modeling_regnet"


def conv_layer_members(module: nn.Module) -> tuple[nn.Module, ...]:
    return module.convolution, module.normalization, module.activation


def conv_layer(self: nn.Module, hidden_state: Tensor) -> Tensor:
    return run(hidden_state, conv_layer_members(self))


def shortcut_members(module: nn.Module) -> tuple[nn.Module, ...]:
    return module.convolution, module.normalization


def shortcut_layer(self: nn.Module, hidden_state: Tensor) -> Tensor:
    return run(hidden_state, shortcut_members(self))


def residual_layer(self: nn.Module, hidden_state: Tensor) -> Tensor:
    body = (self.layer,)
    return residual_block(hidden_state, body, skip=self.shortcut, act=self.activation)


def squeeze_excite(module: nn.Module) -> SE | str:
    if len(module.attention) != 4:
        return "squeeze-excite of another number of layers"
    return pointwise_se(*module.attention, module.attention, module.pooler)


def _residual(name: str) -> Recipe:
    return Recipe(name, reads="layer shortcut activation", forward=residual_layer)


def _conv_layer(name: str) -> Recipe:
    reads = "convolution normalization activation"
    return Recipe(name, reads=reads, forward=conv_layer, members=conv_layer_members)


def _shortcut(name: str) -> Recipe:
    reads = "convolution normalization"
    return Recipe(name, reads=reads, forward=shortcut_layer, members=shortcut_members)


RECIPES = (
    _residual(f"{RESNET}.ResNetBasicLayer"),
    _residual(f"{RESNET}.ResNetBottleNeckLayer"),
    _residual(f"{REGNET}.RegNetXLayer"),
    _residual(f"{REGNET}.RegNetYLayer"),
    _conv_layer(f"{RESNET}.ResNetConvLayer"),
    _conv_layer(f"{REGNET}.RegNetConvLayer"),
    _shortcut(f"{RESNET}.ResNetShortCut"),
    _shortcut(f"{REGNET}.RegNetShortCut"),
    Recipe(
        f"{REGNET}.RegNetSELayer",
        reads="pooler attention",
        forward=squeeze_excite_forward,
        se=squeeze_excite,
    ),
)
