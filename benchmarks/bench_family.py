"""Blocks of the other convolutional residual systems against their peers' own: training step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import fusedres

from .model_cases import Work
from .plain import import_torchvision
from .suites import BATCH, params, systems

CHANNELS, SIZE = 64, 56


class Seeded(nn.Module):
    """A block that draws the same numbers in every call, so that results can be compared."""

    def __init__(self, block: nn.Module, drop: nn.Module | None = None):
        super().__init__()
        self.block, self.drop = block, drop

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        if self.drop is None:
            return self.block(x)
        b = self.block
        out = self.drop(b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x))))))
        return b.relu(out + x)


class PlainLayerScale(nn.Module):
    """torchvision's BasicBlock with LayerScale before the addition."""

    def __init__(self):
        super().__init__()
        block = import_torchvision().BasicBlock(CHANNELS, CHANNELS)
        for name, module in block.named_children():
            setattr(self, name, module)
        self.residual_scale = nn.Module()
        self.residual_scale.weight = nn.Parameter(torch.full((CHANNELS,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out * self.residual_scale.weight.view(-1, 1, 1) + x)


def _projected(block: Callable[..., nn.Module]) -> nn.Module:
    conv = nn.Conv2d(CHANNELS, 2 * CHANNELS, 1, 2, bias=False)
    return block(CHANNELS, 2 * CHANNELS, 2, nn.Sequential(conv, nn.BatchNorm2d(2 * CHANNELS)))


def _plain_projected() -> nn.Module:
    return _projected(import_torchvision().BasicBlock)


def _plain_stochastic_depth() -> nn.Module:
    block = import_torchvision().BasicBlock(CHANNELS, CHANNELS)
    from torchvision.ops import StochasticDepth

    return Seeded(block, StochasticDepth(0.2, "row"))


def _fused_stochastic_depth() -> nn.Module:
    return Seeded(fusedres.BasicBlock(CHANNELS, CHANNELS, drop_path=0.2))


def _timm_preactivation() -> nn.Module:
    import_torchvision()  # timm needs it
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import PreActBasic

    layers = dict(conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    return nn.Sequential(OrderedDict(
        (str(i), PreActBasic(CHANNELS, CHANNELS, **layers)) for i in range(2)
    ))  # fmt: skip


class PreActivation(fusedres.blocks.PreActStage):
    """Two blocks that hand their statistics on, with nn.Sequential's keys."""

    def __init__(self):
        nn.Module.__init__(self)
        for i in range(2):
            self.add_module(str(i), fusedres.PreActBasicBlock(CHANNELS, CHANNELS))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.children())


def _fused_layer_scale() -> nn.Module:
    scale = fusedres.ResidualScale(CHANNELS, init=0.1)
    return fusedres.BasicBlock(CHANNELS, CHANNELS, residual_scale=scale)


SYSTEMS = {
    "projection": (_plain_projected, partial(_projected, fusedres.BasicBlock)),
    "stochastic_depth": (_plain_stochastic_depth, _fused_stochastic_depth),
    "preactivation": (_timm_preactivation, PreActivation),
    "layer_scale": (PlainLayerScale, _fused_layer_scale),
}


def _works() -> list[Work]:
    x = BATCH["cpu"], CHANNELS, SIZE, SIZE
    return [Work(name, plain, fused, x, leaf=True) for name, (plain, fused) in SYSTEMS.items()]


@params(systems(_works()))
def test_family_training(race, spec):
    race(spec)
