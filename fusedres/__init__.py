"""Residual networks, faster and unchanged: fused drop-in blocks for torch.nn."""

from . import functional, models
from .blocks import (
    BasicBlock,
    BatchNormAct2d,
    Bottleneck,
    ConvBNAct2d,
    DropPath,
    EffectiveSqueezeExcite,
    PreActBasicBlock,
    PreActBottleneck,
    SEBasicBlock,
    SEBottleneck,
    SqueezeExcite,
)
from .convert import fuse, unfuse
from .dispatch import backend, backends
from .report import Explanation, Verification, explain, verify

__version__ = "0.1.0"
__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "DropPath",
    "EffectiveSqueezeExcite",
    "Explanation",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "Verification",
    "backend",
    "backends",
    "explain",
    "functional",
    "fuse",
    "models",
    "unfuse",
    "verify",
]
