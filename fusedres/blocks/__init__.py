"""Drop-in modules. Their ``forward`` is written in the functions of ``chain``."""

from .drop_path import DropPath
from .layers import BatchNormAct2d, ConvBNAct2d, EffectiveSqueezeExcite, SqueezeExcite
from .preact import PreActBasicBlock, PreActBottleneck, PreActStage
from .resnet import BasicBlock, Bottleneck, SEBasicBlock, SEBottleneck

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "DropPath",
    "EffectiveSqueezeExcite",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActStage",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcite",
]
