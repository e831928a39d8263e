"""One file an op: schema, fake kernel, autograd, memory traffic. Importing this defines all."""

from . import (
    bn_act,
    bn_se_act,
    conv_bn_act,
    conv_stats,
    residual_add,
    residual_mix,
    squeeze_excite,
)

__all__ = [
    "bn_act",
    "bn_se_act",
    "conv_bn_act",
    "conv_stats",
    "residual_add",
    "residual_mix",
    "squeeze_excite",
]
