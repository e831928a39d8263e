"""Drop-in modules. Their ``forward`` is written in the functions of ``chain``."""

from .layers import BatchNormAct2d, ConvBNAct2d, SqueezeExcite
from .resnet import BasicBlock, Bottleneck, SEBasicBlock, SEBottleneck
from .transformer import AddLayerNorm, AddRMSNorm, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "TransformerEncoderLayer",
]
