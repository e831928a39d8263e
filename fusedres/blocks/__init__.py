"""Drop-in modules. Their ``forward`` is written in the functions of ``chain``."""

from .densenet import DenseBlock, DenseLayer, Transition
from .drop_path import DropPath
from .highway import Highway, HighwayConv2d
from .layers import BatchNormAct2d, ConvBNAct2d, EffectiveSqueezeExcite, SqueezeExcite
from .lstm import ResidualLSTMCell
from .mlp import DenselyConnectedMLP, ResidualMLP
from .preact import PreActBasicBlock, PreActBottleneck, PreActStage
from .residual_scale import ResidualScale
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
    "DenselyConnectedMLP",
    "DropPath",
    "EffectiveSqueezeExcite",
    "Highway",
    "HighwayConv2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActStage",
    "ResidualLSTMCell",
    "ResidualMLP",
    "ResidualScale",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
    "TransformerEncoderLayer",
    "Transition",
]
