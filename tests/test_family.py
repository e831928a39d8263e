"""What the modules of all residual systems share: named errors that change nothing, and traces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from cases import randn
from fusedres.blocks.chain import chain
from harness import Unchanged

MAPS = (2, 8, 6, 6)
ROWS = (3, 8)
LAYERS = {
    "Highway": (lambda: fusedres.Highway(8), ROWS),
    "HighwayConv2d": (lambda: fusedres.HighwayConv2d(8, coupled=False), MAPS),
    "ResidualMLP": (lambda: fusedres.ResidualMLP(8, 2, cross_coupled=True), ROWS),
    "DenselyConnectedMLP": (lambda: fusedres.DenselyConnectedMLP(8, 4, 3, 2), ROWS),
}
BLOCKS = {
    "PreActBasicBlock": lambda **to: fusedres.PreActBasicBlock(8, 8, **to),
    "PreActBottleneck": lambda **to: fusedres.PreActBottleneck(8, 2, **to),
    "BasicBlock": lambda **to: fusedres.BasicBlock(8, 8, **to),
}
SCALED = fusedres.ResidualScale
MODELS = fusedres.models

# arguments that no module takes: (made so, error, message)
BAD = [
    (lambda: fusedres.DropPath("0.1"), TypeError, "p: wanted a probability from 0 to 1, got str"),
    (lambda: fusedres.DropPath(float("nan")), ValueError, "p: wanted a probability .* got nan"),
    (lambda: fusedres.DropPath(0.1, ["row"]), ValueError, r"mode: wanted one of .* got \['row'\]"),
    (lambda: fusedres.DropPath(0.1, generator=5), TypeError, "generator: wanted a torch.Generator"),
    (lambda: fusedres.AddRMSNorm(8, drop_path=None), TypeError, "drop_path: wanted .* got NoneType"),
    (lambda: fusedres.AddLayerNorm(8, batch_dim=-1), ValueError, "batch_dim: wanted a number >= 0"),
    (lambda: MODELS.resnet18(drop_path_rate="1"), TypeError, "drop_path_rate: wanted .* got str"),
    (lambda: MODELS.resnet18(drop_path_mode="x"), ValueError, "drop_path_mode: wanted one of"),
    (lambda: MODELS.preact_resnet18(drop_path_mode="x"), ValueError, "drop_path_mode: wanted one"),
    (lambda: MODELS.WideResNet(10, 1, num_classes=0), ValueError, "num_classes: wanted a number >="),
    (lambda: MODELS.WideResNet(10, 1.5), TypeError, "width: wanted a whole number, got 1.5"),
    (lambda: MODELS.WideResNet("10", 1), TypeError, "depth: wanted a whole number, got '10'"),
    (lambda: fusedres.Highway("8"), TypeError, "channels: wanted a whole number, got '8'"),
    (lambda: fusedres.Highway(8, gate_bias="x"), TypeError, "gate_bias: wanted a number, got str"),
    (lambda: fusedres.HighwayConv2d(8, (3, 3)), TypeError, "kernel_size: wanted a whole number"),
    (lambda: fusedres.ResidualMLP(8, 2.5), TypeError, "depth: wanted a whole number, got 2.5"),
    (lambda: fusedres.SqueezeExcite(0), ValueError, "channels: wanted a number >= 1, got 0"),
    (lambda: fusedres.SqueezeExcite(8, 0), ValueError, "squeeze_channels: wanted a number >= 1"),
    (lambda: fusedres.EffectiveSqueezeExcite("8"), TypeError, "channels: wanted a whole number"),
    (lambda: fusedres.SEBottleneck(8, 8, reduction=1.5), TypeError, "reduction: wanted a whole"),
    (lambda: SCALED(init=float("nan")), ValueError, "init: wanted a finite number, got nan"),
    (lambda: SCALED(shortcut="1"), TypeError, "shortcut: wanted a number, got str"),
    (lambda: BLOCKS["BasicBlock"](residual="no"), TypeError, "residual: wanted True or False, got"),
]  # fmt: skip


@pytest.mark.parametrize("make,error,message", BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_scale_of_other_channels_than_the_blocks(name):
    BLOCKS[name](residual_scale=SCALED(8))
    with pytest.raises(ValueError, match="residual_scale: wanted 1 or 8 channels, got 5"):
        BLOCKS[name](residual_scale=SCALED(5))


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_that_does_not_fit_the_weights(name):
    make, shape = LAYERS[name]
    layer = make()
    for x, error, message in (
        ("x", TypeError, "x: wanted a tensor, got str"),
        (torch.ones(shape, dtype=torch.int64), TypeError, "x: wanted a floating-point tensor"),
        (randn(shape, torch.float64), TypeError, "x: wanted dtype torch.float32 .* got .*float64"),
        (randn(shape).to("meta"), RuntimeError, "x: wanted device cpu .* got meta"),
        (torch.tensor(1.0), ValueError, r"x: wanted shape \[.*, got \(\)"),
    ):
        with Unchanged(layer), pytest.raises(error, match=message):
            layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(shape).bfloat16()).dtype == torch.bfloat16


def test_drop_path_of_integers():
    for x, error in ((torch.ones(3, dtype=torch.int64), TypeError), (torch.ones(()), ValueError)):
        state = torch.get_rng_state()
        with pytest.raises(error, match="x: wanted"):
            fusedres.DropPath(0.3)(x)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_norm_that_raises_has_counted_nothing(name):
    """PyTorch's own batch norm counts the batch first."""
    block = BLOCKS[name]()
    for x in (randn((2, 7, 6, 6)), torch.ones(MAPS, dtype=torch.int64), randn(MAPS).to("meta")):
        with Unchanged(block), pytest.raises(Exception, match="."):
            block(x)


# --- a system of one's own


class AddedTwice(nn.Module):
    """``relu(z + bn2(conv2(z)))`` with ``z = relu(x + bn1(conv1(x)))``: in no list of the library."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in "ab")
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = chain(x, (self.conv1, self.bn1, "relu"), residual=x)
        branch = chain(z, (self.conv2, self.bn2, None))
        return fusedres.functional.residual_add(branch, z, act="relu")


def test_a_new_system_needs_its_own_file_only():
    model, x = nn.Sequential(AddedTwice(), AddedTwice()), randn(MAPS)
    for training in (True, False):
        result = fusedres.verify(model, x, train=training)
        assert result.ok, str(result)
    rows = fusedres.explain(model, x).rows
    assert {"conv_stats", "bn_act", "residual_add"} <= {row.op for row in rows}
    assert {row.backend for row in rows} == {"native"}


# --- traces


@pytest.mark.parametrize("name", [*BLOCKS, *LAYERS])
def test_symbolic_traces_see_pytorchs_modules(name):
    make, shape = LAYERS.get(name, (None, MAPS))
    if make is None:
        scaling = SCALED(8, 0.5, shortcut=0.5)
        model = nn.Sequential(BLOCKS[name](residual_scale=scaling), BLOCKS[name]())
    else:
        model = nn.Sequential(make())
    x = randn(shape)
    for training in (True, False):
        model.train(training)
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
        assert not any("fusedres" in str(node.target) for node in traced.graph.nodes)
        torch.testing.assert_close(traced(x), copy.deepcopy(model)(x))
