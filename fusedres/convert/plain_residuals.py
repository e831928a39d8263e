"""Dense blocks, transformer residuals and gated residuals without this library's ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..blocks import highway, lstm, mlp
from ..blocks.transformer import drop_path_rows
from .recipe import Recipe


def dense_layer(self: nn.Module, input: Tensor | list[Tensor]) -> Tensor:
    x = torch.cat(input, 1) if isinstance(input, list | tuple) else input
    x = self.conv1(self.relu1(self.norm1(x)))
    x = self.conv2(self.relu2(self.norm2(x)))
    return F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x


def dense_block(self: nn.Module, init_features: Tensor) -> Tensor:
    features = [init_features]
    for layer in self.values():
        features.append(layer(features))
    return torch.cat(features, 1)


def dense_features(self: nn.Module, x: Tensor, act: str = "identity") -> Tensor:
    return reference.ACTIVATIONS[act](nn.Sequential.forward(self, x))


def add_norm(self: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    x = F.dropout(x, self.dropout, self.training)
    if self.training and self.drop_path:
        x = drop_path_rows(x, self.drop_path, self.batch_dim)
    total = residual + x
    norm = nn.LayerNorm if isinstance(self, nn.LayerNorm) else nn.RMSNorm
    return norm.forward(self, total), total


def encoder_layer(self: nn.Module, *args, **kwargs) -> Tensor:
    return nn.TransformerEncoderLayer.forward(self, *args, **kwargs)


_FORWARDS = {
    "blocks.densenet.DenseLayer": dense_layer,
    "blocks.densenet.DenseBlock": dense_block,
    "blocks.densenet.Transition": nn.Sequential.forward,
    "densenet.Features": dense_features,
    "blocks.transformer.AddLayerNorm": add_norm,
    "blocks.transformer.AddRMSNorm": add_norm,
    "blocks.transformer.TransformerEncoderLayer": encoder_layer,
    "blocks.highway.Highway": highway.plain,
    "blocks.highway.HighwayConv2d": highway.plain,
    "blocks.lstm.ResidualLSTMCell": lstm.plain,
    "blocks.mlp.ResidualMLP": mlp.plain_residual,
    "blocks.mlp.DenselyConnectedMLP": mlp.plain_dense,
}
RECIPES = tuple(
    Recipe(f"fusedres.{name}", reads=None, forward=forward) for name, forward in _FORWARDS.items()
)
