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
    DenselyConnectedMLP,
    Highway,
    HighwayConv2d,
    ResidualLSTMCell,
    ResidualMLP,
    SEBasicBlock,
    SEBottleneck,
    SqueezeExcite,
    TransformerEncoderLayer,
    Transition,
)
from .convert import fuse, unfuse
from .dispatch import backend, backends
from .report import (
    Explanation,
    Propagation,
    Verification,
    explain,
    propagation,
    verify,
)

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
    "DenselyConnectedMLP",
    "Explanation",
    "Highway",
    "HighwayConv2d",
    "Propagation",
    "ResidualLSTMCell",
    "ResidualMLP",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "TransformerEncoderLayer",
    "Transition",
    "Verification",
    "backend",
    "backends",
    "explain",
    "functional",
    "fuse",
    "models",
    "propagation",
    "unfuse",
    "verify",
]
