"""Residual networks, faster and unchanged: fused drop-in blocks for torch.nn."""

from . import functional, models
from .blocks import (
    AddLayerNorm,
    AddRMSNorm,
    BasicBlock,
    BatchNormAct2d,
    Bottleneck,
    ConvBNAct2d,
    DenseBlock,
    DenseLayer,
    SEBasicBlock,
    SEBottleneck,
    SqueezeExcite,
    TransformerEncoderLayer,
    Transition,
)
from .convert import fuse, unfuse
from .dispatch import backend, backends
from .report import Explanation, Verification, explain, verify

__version__ = "0.1.0"
__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "DenseBlock",
    "DenseLayer",
    "Explanation",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "Transition",
    "TransformerEncoderLayer",
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
