"""Residual networks, faster and unchanged: fused drop-in blocks for torch.nn."""

from . import functional, models
from .blocks import (
    BasicBlock,
    BatchNormAct2d,
    Bottleneck,
    ConvBNAct2d,
    SEBasicBlock,
    SEBottleneck,
    SqueezeExcite,
)
from .dispatch import backend, backends

__version__ = "0.1.0"
__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "backend",
    "backends",
    "functional",
    "models",
]
