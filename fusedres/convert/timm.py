"""timm: ResNet's blocks and stem with every option, legacy SENet, SK-ResNet, ConvNormAct, SE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..blocks import layers
from ..blocks.recognise import SE, hooked
from .activations import act_name
from .forwards import (
    effective_se,
    pointwise_se,
    residual_block,
    run,
    squeeze_excite_forward,
)
from .recipe import Recipe


def basic_block(self: nn.Module, x: Tensor) -> Tensor:
    body = (
        *(self.conv1, self.bn1, active(self.drop_block), self.act1, self.aa),
        *(self.conv2, self.bn2, self.se),
    )
    return _residual_block(self, x, body, self.act2)


def bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    body = (
        *(self.conv1, self.bn1, self.act1),
        *(self.conv2, self.bn2, active(self.drop_block), self.act2, self.aa),
        *(self.conv3, self.bn3, self.se),
    )
    return _residual_block(self, x, body, self.act3)


def selective_kernel_basic(self: nn.Module, x: Tensor) -> Tensor:
    return _residual_block(self, x, (self.conv1, self.conv2, self.se), self.act)


def selective_kernel_bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    return _residual_block(self, x, (self.conv1, self.conv2, self.conv3, self.se), self.act)


def senet_block(self: nn.Module, x: Tensor) -> Tensor:
    # The published weights were trained with this ReLU between bn2 and the squeeze-excite.
    body = (self.conv1, self.bn1, self.relu, self.conv2, self.bn2, self.relu, self.se_module)
    return residual_block(x, body, skip=self.downsample, act=self.relu, promotes=True)


def senet_bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    body = (
        *(self.conv1, self.bn1, self.relu),
        *(self.conv2, self.bn2, self.relu),
        *(self.conv3, self.bn3, self.se_module),
    )
    return residual_block(x, body, skip=self.downsample, act=self.relu, promotes=True)


def resnet_forward_features(self: nn.Module, x: Tensor) -> Tensor:
    x = self.maxpool(run(x, (self.conv1, self.bn1, self.act1)))
    stages = [self.layer1, self.layer2, self.layer3, self.layer4]
    if self.grad_checkpointing and not torch.jit.is_scripting():
        from timm.models._manipulate import checkpoint_seq

        return checkpoint_seq(stages, x, flatten=True)
    for stage in stages:
        x = stage(x)
    return x


def conv_norm_act_members(module: nn.Module) -> tuple[nn.Module | None, ...]:
    return module.conv, module.bn, getattr(module, "aa", None)


def conv_norm_act(self: nn.Module, x: Tensor) -> Tensor:
    return run(x, conv_norm_act_members(self))


def batch_norm_act(self: nn.Module, x: Tensor) -> Tensor:
    act = own_act(self)
    if act is None or x.dim() != 4:
        return self.original_forward(x)
    return layers.batch_norm_act(self, x, None, act)


def own_act(norm: nn.Module) -> str | None:
    """The activation of a BatchNormAct2d, if nothing else follows the norm in it."""
    return act_name(norm.act) if act_name(norm.drop) == "identity" else None


def _residual_block(
    block: nn.Module,
    x: Tensor,
    body: tuple[nn.Module | None, ...],
    act: nn.Module,
    promotes: bool = False,
) -> Tensor:
    """The end that timm's blocks share: drop path, shortcut, activation."""
    drop_path, scale = drops_of(block)
    body = (*body, drop_path)
    branch = dict(row_scale=scale, promotes=promotes)
    return residual_block(x, body, skip=block.downsample, act=act, **branch)


def drops_of(block: nn.Module) -> tuple[nn.Module | None, Callable[[Tensor], Tensor] | None]:
    """A block's drop path: as a module that must run, or as what draws the samples' factors."""
    drop_path = active(block.drop_path)
    if drop_path is not None and is_drop_path(drop_path):
        return None, row_scale(drop_path)
    return drop_path, None


def is_drop_path(module: nn.Module) -> bool:
    from timm.layers import DropPath

    return type(module).forward is DropPath.forward and hooked(module) is None


def active(drop: nn.Module | None) -> nn.Module | None:
    """A drop-block or drop-path module, or None where it would return its input."""
    if drop is None or hooked(drop) is not None:
        return drop
    from timm.layers import DropBlock2d

    known = type(drop).forward is DropBlock2d.forward or is_drop_path(drop)
    return None if known and not (drop.training and drop.drop_prob) else drop


def row_scale(drop_path: nn.Module) -> Callable[[Tensor], Tensor]:
    """Draws what DropPath multiplies its samples by, from the same random numbers."""

    def draw(x: Tensor) -> Tensor:
        keep = 1 - drop_path.drop_prob
        drawn = x.new_empty(x.shape[0]).bernoulli_(keep)
        drawn = drawn.to(torch.promote_types(x.dtype, torch.float32))
        return drawn / keep if keep > 0 and drop_path.scale_by_keep else drawn

    return draw


def squeeze_excite(module: nn.Module) -> SE | str:
    if act_name(module.bn) != "identity":
        return "squeeze-excite with a norm inside"
    return pointwise_se(module.fc1, module.act, module.fc2, module.gate, pool=_pool(module))


def effective_squeeze_excite(module: nn.Module) -> SE | str:
    return effective_se(module.fc, module.gate, _pool(module))


def _pool(module: nn.Module) -> str:
    return "mean_max" if module.add_maxpool else "mean"


def regnet_bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    body = self.conv1, self.conv2, self.se, self.conv3
    if self.downsample is None:  # a block without a shortcut
        return self.act3(run(x, body))
    return _residual_block(self, x, body, self.act3, promotes=True)


def senet_squeeze_excite(module: nn.Module) -> SE | str:
    return pointwise_se(module.fc1, module.relu, module.fc2, module.sigmoid)


def efficientnet_squeeze_excite(module: nn.Module) -> SE | str:
    return pointwise_se(module.conv_reduce, module.act1, module.conv_expand, module.gate)


def _se(peer: str, reads: str, se: Callable[[nn.Module], SE | str]) -> Recipe:
    return Recipe(peer, reads=reads, forward=squeeze_excite_forward, se=se)


RECIPES = (
    Recipe(
        "timm.models.resnet.BasicBlock",
        reads="conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path downsample act2",
        forward=basic_block,
    ),
    Recipe(
        "timm.models.resnet.Bottleneck",
        reads="conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path downsample act3",
        forward=bottleneck,
    ),
    Recipe(
        "timm.models.resnet.ResNet",
        reads="conv1 bn1 act1 maxpool grad_checkpointing torch jit is_scripting checkpoint_seq "
        "layer1 layer2 layer3 layer4",
        forward=resnet_forward_features,
        method="forward_features",
    ),
    Recipe(
        "timm.models.sknet.SelectiveKernelBasic",
        reads="conv1 conv2 se drop_path downsample act",
        forward=selective_kernel_basic,
    ),
    Recipe(
        "timm.models.sknet.SelectiveKernelBottleneck",
        reads="conv1 conv2 conv3 se drop_path downsample act",
        forward=selective_kernel_bottleneck,
    ),
    Recipe(
        "timm.models.senet.Bottleneck",
        reads="conv1 bn1 relu conv2 bn2 conv3 bn3 downsample se_module",
        forward=senet_bottleneck,
    ),
    Recipe(
        "timm.models.senet.SEResNetBlock",
        reads="conv1 bn1 relu conv2 bn2 downsample se_module",
        forward=senet_block,
    ),
    Recipe(
        "timm.models.regnet.Bottleneck",
        reads="conv1 conv2 se conv3 downsample drop_path act3",
        forward=regnet_bottleneck,
    ),
    Recipe(
        "timm.layers.conv_bn_act.ConvNormAct",
        reads="conv bn getattr aa",
        forward=conv_norm_act,
        members=conv_norm_act_members,
    ),
    Recipe(
        "timm.layers.norm_act.BatchNormAct2d",
        reads="_assert ndim momentum training track_running_stats num_batches_tracked add_ float "
        "running_mean running_var F batch_norm weight bias eps drop act",
        forward=batch_norm_act,
        own_act=own_act,
    ),
    _se("timm.models.senet.SEModule", "mean fc1 relu fc2 sigmoid", senet_squeeze_excite),
    _se(
        "timm.layers.squeeze_excite.SEModule",
        "mean add_maxpool amax fc1 act bn fc2 gate",
        squeeze_excite,
    ),
    _se(
        "timm.layers.squeeze_excite.EffectiveSEModule",
        "mean add_maxpool amax fc gate",
        effective_squeeze_excite,
    ),
    _se(
        "timm.models._efficientnet_blocks.SqueezeExcite",
        "mean conv_reduce act1 conv_expand gate",
        efficientnet_squeeze_excite,
    ),
)
