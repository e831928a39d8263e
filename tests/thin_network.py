"""A network with every kind of block, thin enough to be compared with float64 in a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusedres


def network() -> nn.Module:
    """Every kind of block, thin; batch norm with parameters and statistics of its own."""
    down = [nn.Sequential(nn.Conv2d(c, 2 * c, 1, 2), nn.BatchNorm2d(2 * c)) for c in (8, 16)]
    model = nn.Sequential(
        fusedres.ConvBNAct2d(3, 8, 3),
        nn.MaxPool2d(3, 2, 1),
        fusedres.BasicBlock(8, 16, 2, down[0]),
        fusedres.Bottleneck(16, 4),
        fusedres.SEBottleneck(16, 8, 2, down[1]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 24, 24).to(dtype)
