"""DenseNet with torchvision's keys and initialisation; ``fusedres.models`` has its names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import DenseBlock, Transition
from .blocks.chain import chain
from .blocks.layers import batch_norm_act
from .blocks.recognise import norm_of
from .blocks.unit import activate

__all__ = ["DenseNet", "densenet121", "densenet161", "densenet169", "densenet201"]


class Features(nn.Sequential):
    """torchvision's ``features``, and the activation behind it: the stem is one chain, norm5 and
    the activation one pass."""

    def forward(self, x: Tensor, act: str = "identity") -> Tensor:
        modules = dict(self.named_children())
        stem = [modules.pop(name, None) for name in ("conv0", "norm0", "relu0")]
        if None not in stem:
            x = chain(x, tuple(stem))
        norm = modules.pop("norm5", None)
        for module in modules.values():
            x = module(x)
        if norm is None or isinstance(x, torch.fx.Proxy) or isinstance(norm_of(norm), str):
            return activate(x if norm is None else norm(x), act)
        return batch_norm_act(norm, x, None, act)


class DenseNet(nn.Module):
    """torchvision.models.DenseNet: the same arguments, state dict, initialisation and outputs.

    Args:
        growth_rate: channels that each layer adds.
        block_config: layers in each of the blocks.
        num_init_features: channels of the stem.
        bn_size: channels of a bottleneck, in growth rates.
        drop_rate: dropout behind each dense layer; layers then run one by one in training.
        num_classes: outputs of the classifier.
        memory_efficient: keep less for the backward and compute more there (DenseLayer).
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, int, int, int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ):
        super().__init__()
        channels = num_init_features
        stem = OrderedDict(
            conv0=nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        self.features = Features(stem)
        for i, layers in enumerate(block_config):
            self.features.add_module(
                f"denseblock{i + 1}",
                DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, memory_efficient),
            )
            channels += layers * growth_rate
            if i != len(block_config) - 1:
                self.features.add_module(f"transition{i + 1}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
            elif isinstance(m, nn.Linear):
                nn.init.constant_(m.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        x = self.features(x, "relu")
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def _densenet(
    name: str, growth_rate: int, blocks: tuple[int, ...], init: int
) -> Callable[..., DenseNet]:
    def build(**kwargs) -> DenseNet:
        return DenseNet(growth_rate, blocks, init, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} with fusedres.DenseBlock; keyword arguments as for DenseNet."
    return build


densenet121 = _densenet("densenet121", 32, (6, 12, 24, 16), 64)
densenet161 = _densenet("densenet161", 48, (6, 12, 36, 24), 96)
densenet169 = _densenet("densenet169", 32, (6, 12, 32, 32), 64)
densenet201 = _densenet("densenet201", 32, (6, 12, 48, 32), 64)
