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


def _torchvision_bottleneck(**options) -> nn.Module:
    return import_torchvision().Bottleneck(4 * CHANNELS, CHANNELS, **options)


def _regnety() -> nn.Module:
    """Squeeze-excite before the last 1x1 convolution, groups of 32 channels."""
    import_torchvision()
    from torchvision.models.regnet import ResBottleneckBlock

    width = 4 * CHANNELS
    return ResBottleneckBlock(width, width, 1, nn.BatchNorm2d, nn.ReLU, 32, 1.0, 0.25)


def _timm_bottleneck(stride: int = 1, **options) -> nn.Module:
    import_torchvision()
    from timm.models.resnet import Bottleneck, downsample_avg

    shortcut = None
    if stride > 1:
        shortcut = downsample_avg(4 * CHANNELS, 8 * CHANNELS, 1, stride)
    return Bottleneck(4 * CHANNELS, stride * CHANNELS, stride, shortcut, **options)


def _anti_aliased() -> nn.Module:
    import_torchvision()
    from timm.layers import BlurPool2d

    return _timm_bottleneck(2, aa_layer=BlurPool2d)


def _timm_effective_se() -> nn.Module:
    import_torchvision()
    from timm.layers import EffectiveSEModule

    return EffectiveSEModule(4 * CHANNELS)


def _converted(make: Callable[[], nn.Module]) -> tuple[Callable, Callable]:
    """A peer's own block, and what ``fuse`` makes of it."""
    return make, lambda: fusedres.fuse(make())


WIDE, RESNEXT = dict(base_width=128), dict(groups=32, base_width=4)
SYSTEMS = {
    "projection": (_plain_projected, partial(_projected, fusedres.BasicBlock)),
    "stochastic_depth": (_plain_stochastic_depth, _fused_stochastic_depth),
    "preactivation": (_timm_preactivation, PreActivation),
    "layer_scale": (PlainLayerScale, _fused_layer_scale),
}
# On four times the channels: bottlenecks, and what stands in one.
BOTTLENECKS = {
    "wide": (
        partial(_torchvision_bottleneck, **WIDE),
        partial(fusedres.Bottleneck, 4 * CHANNELS, CHANNELS, **WIDE),
    ),
    "resnext": (
        partial(_torchvision_bottleneck, **RESNEXT),
        partial(fusedres.Bottleneck, 4 * CHANNELS, CHANNELS, **RESNEXT),
    ),
    "regnety": _converted(_regnety),
    "anti_aliased": _converted(_anti_aliased),
    "effective_se": (
        _timm_effective_se, partial(fusedres.EffectiveSqueezeExcite, 4 * CHANNELS)
    ),
}  # fmt: skip
# No larger one: a rounding turns one of its ReLUs in one execution and not in another.
HALVING = {"resnet_d": _converted(partial(_timm_bottleneck, 2))}


def _works(makers: dict[str, tuple], channels: int, size: int) -> list[Work]:
    x = BATCH["cpu"], channels, size, size
    return [Work(name, plain, fused, x, leaf=True) for name, (plain, fused) in makers.items()]


WORKS = (
    *_works(SYSTEMS, CHANNELS, SIZE),
    *_works(BOTTLENECKS, 4 * CHANNELS, SIZE // 2),
    *_works(HALVING, 4 * CHANNELS, SIZE // 4),
)


@params(systems(WORKS))
def test_family_training(race, spec):
    race(spec)
