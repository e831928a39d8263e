"""One file an op: schema, fake kernel, autograd, memory traffic. Importing this defines all."""

from . import (
    add_norm,
    bn_act,
    bn_se_act,
    conv_bn_act,
    conv_grad,
    conv_stats,
    dense_block,
    highway,
    lstm_cell,
    residual_add,
    residual_mix,
    squeeze_excite,
)

__all__ = [
    "add_norm",
    "bn_act",
    "bn_se_act",
    "conv_bn_act",
    "conv_grad",
    "conv_stats",
    "residual_add",
    "dense_block",
    "highway",
    "lstm_cell",
    "residual_mix",
    "squeeze_excite",
]
