"""Drop-in modules. Their ``forward`` is written in the functions of ``chain``."""

from .densenet import DenseBlock, DenseLayer, Transition
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
    "DenseBlock",
    "DenseLayer",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "Transition",
    "TransformerEncoderLayer",
]
