"""Dense blocks, transformer residuals, highway, LSTM cell and perceptrons: training step.

Against torchvision's, PyTorch's own, or the modules as they are usually written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import fusedres

from .model_cases import Work
from .plain import import_torchvision
from .suites import params, systems


class AddNorm(nn.Module):
    """A branch and a shortcut, one behind the other in x, added and normalised."""

    def __init__(self, norm: type[nn.Module], fused: bool):
        super().__init__()
        self.norm, self.fused = norm(768), fused

    def forward(self, x: Tensor) -> Tensor:
        branch, shortcut = x.unbind(0)
        return self.norm(branch, shortcut)[0] if self.fused else self.norm(shortcut + branch)


def _encoder_layer(kind: type[nn.Module], norm_first: bool) -> nn.Module:
    options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first)
    return kind(384, 6, 1536, **options)


class EagerHighway(fusedres.Highway):
    """A product for the transform and one for the gate, as highway networks are usually written."""

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.weight.chunk(2), self.bias.chunk(2)
        h, t = (nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        t = torch.sigmoid(t)
        return torch.relu(h) * t + x * (1 - t)


class EagerHighwayConv2d(fusedres.HighwayConv2d):
    """A convolution for the transform and one for the gate."""

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.weight.chunk(2), self.bias.chunk(2)
        conv = partial(nn.functional.conv2d, x, padding=self.kernel_size // 2)
        h, t = (conv(w, b) for w, b in zip(weights, biases, strict=True))
        t = torch.sigmoid(t)
        return torch.relu(h) * t + x * (1 - t)


class Cell(nn.Module):
    """The output of a cell; its state starts as zeros."""

    def __init__(self, kind: Callable[..., nn.Module]):
        super().__init__()
        self.cell = kind(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class EagerOriginalCell(fusedres.ResidualLSTMCell):
    """``c' = c + i * g``, as it is usually written."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = x.new_zeros(len(x), self.hidden_size)
        gates = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        gates = gates + nn.functional.linear(c, self.weight_hh, self.bias_hh)
        i, g, o = gates.chunk(3, 1)
        c = c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class EagerResidualMLP(fusedres.ResidualMLP):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x) + x)
        return x


class EagerDenseMLP(fusedres.DenselyConnectedMLP):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.output(x)


def _dense_block(fused: bool, layers: int, channels: int) -> nn.Module:
    kind = fusedres.DenseBlock if fused else _torchvision()._DenseBlock
    return kind(layers, channels, bn_size=4, growth_rate=32, drop_rate=0.0)


def _torchvision():
    import_torchvision()
    from torchvision.models import densenet

    return densenet


def _work(name, plain, fused, shape) -> Work:
    return Work(name, plain, fused, shape, leaf=True)


def _layer(name: str, norm_first: bool) -> Work:
    kinds = nn.TransformerEncoderLayer, fusedres.TransformerEncoderLayer
    makers = (partial(_encoder_layer, kind, norm_first) for kind in kinds)
    return _work(name, *makers, (8, 197, 384))


def _dense(name: str, layers: int, channels: int, size: int) -> Work:
    makers = (partial(_dense_block, fused, layers, channels) for fused in (False, True))
    return _work(name, *makers, (4, channels, size, size))


_norms = ((nn.LayerNorm, fusedres.AddLayerNorm), (nn.RMSNorm, fusedres.AddRMSNorm))
_layer_norms, _rms_norms = (
    (partial(AddNorm, plain, False), partial(AddNorm, fused, True)) for plain, fused in _norms
)
_cells = (partial(Cell, kind) for kind in (nn.LSTMCell, fusedres.ResidualLSTMCell))
_original = (
    partial(Cell, partial(kind, forget_gate=False))
    for kind in (EagerOriginalCell, fusedres.ResidualLSTMCell)
)
_residual_mlps = (partial(kind, 256, 12) for kind in (EagerResidualMLP, fusedres.ResidualMLP))
_highways = (partial(kind, 512) for kind in (EagerHighway, fusedres.Highway))
_convs = (partial(kind, 64) for kind in (EagerHighwayConv2d, fusedres.HighwayConv2d))
_mlps = (partial(kind, 256, 128, 10, 12) for kind in (EagerDenseMLP, fusedres.DenselyConnectedMLP))
WORKS = (
    _work("add_layer_norm", *_layer_norms, (2, 4096, 768)),
    _work("add_rms_norm", *_rms_norms, (2, 4096, 768)),
    _layer("encoder_layer_post_norm", False),
    _layer("encoder_layer_pre_norm", True),
    # No larger one: a rounding that turns one ReLU of millions moves a gradient, and the executions
    # of PyTorch itself then differ by far more than the accuracy rule allows.
    _dense("dense_block", 6, 256, 14),
    _work("highway", *_highways, (1024, 512)),
    _work("highway_conv", *_convs, (8, 64, 28, 28)),
    _work("lstm_cell", *_cells, (64, 256)),
    _work("lstm_cell_no_forget_gate", *_original, (64, 256)),
    _work("residual_mlp", *_residual_mlps, (1024, 256)),
    _work("dense_mlp", *_mlps, (1024, 256)),
)


@params(systems(WORKS))
def test_residuals_training(race, spec):
    race(spec)
