"""Squeeze-excite with one layer, a max-pool squeeze and other gates, alone, in blocks and fused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm import layers
from timm.models import regnet, resnet
from torch import nn
from torchvision import models

import fusedres
import zoo
from cases import backends, layouts, randn
from harness import Unchanged
from modules import block_pair, check_module, twins

X = (3, 16, 7, 5)


def pair(kind: str, pool: str, gate: str):
    options = dict(add_maxpool=pool == "mean_max", gate_layer=gate)
    if kind == "effective":
        ours = fusedres.EffectiveSqueezeExcite(16, pool=pool, gate=gate)
        return twins(ours, layers.EffectiveSEModule(16, **options))
    ours = fusedres.SqueezeExcite(16, 8, pool=pool, gate=gate)
    return twins(ours, layers.SEModule(16, rd_channels=8, **options))


CASES = [
    ("effective", "mean", "hard_sigmoid"), ("effective", "mean_max", "sigmoid"),
    ("plain", "mean_max", "sigmoid"), ("plain", "mean_max", "hard_sigmoid"),
    ("plain", "mean", "hard_sigmoid"),
]  # fmt: skip


@backends
@pytest.mark.parametrize(
    "layout,case", list(zip(("NCHW", "NHWC", "NHWC", "NCHW", "NHWC"), CASES, strict=True))
)
def test_a_module_is_timms(case, layout, backend):
    ours, peer = pair(*case)
    assert list(ours.state_dict()) == list(peer.state_dict())
    with fusedres.backend(backend):
        check_module(ours, peer, randn(X, layout=layout))
        with torch.no_grad():
            check_module(ours, peer, randn(X, layout=layout), graded=False)
        check_module(fusedres.unfuse(ours), peer, randn(X, layout=layout))


# PyTorch's own gradient of hardsigmoid is exact to float32 only, whatever the dtype, and it has no
# second derivative.
@pytest.mark.parametrize("dtype,case", [
    (torch.bfloat16, CASES[0]), (torch.bfloat16, CASES[1]), (torch.float64, CASES[1]),
    (torch.float64, CASES[2]),
])  # fmt: skip
def test_modules_of_another_dtype(case, dtype):
    ours, peer = (m.to(dtype) for m in pair(*case))
    check_module(ours, peer, randn((8, 16, 9, 9), dtype, "NHWC"))


@layouts
@pytest.mark.parametrize("case", CASES[:3])
def test_residual_and_activation_in_the_same_pass(case, layout):
    ours, peer = pair(*case)

    class Added(nn.Module):
        def __init__(self, se):
            super().__init__()
            self.se = se

        def forward(self, x, residual):
            if self.se is ours:
                return ours(x, residual, "relu")
            return torch.relu(self.se(x) + residual)

    x, residual = (randn(X, layout=layout) for _ in range(2))
    check_module(Added(ours), Added(peer), x, residual)
    ops = [r.op for r in fusedres.explain(Added(ours), x, residual).rows]
    assert ops == ["squeeze", "residual_add"]


def test_second_derivatives():
    for case in CASES[1:3]:
        ours, peer = (m.double() for m in pair(*case))
        x, found = randn(X, torch.float64).requires_grad_(), []
        for m in (ours, peer):
            (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), list(m.parameters())))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("make,message", [
    (lambda: fusedres.SqueezeExcite(8, pool="max"), "pool: wanted one of 'mean', 'mean_max', got"),
    (lambda: fusedres.EffectiveSqueezeExcite(8, gate="tanh"), "gate: wanted one of"),
])  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    se = fusedres.EffectiveSqueezeExcite(8)
    with Unchanged(se), pytest.raises((ValueError, RuntimeError)):
        se(randn((2, 7, 4, 4)))


@pytest.mark.parametrize("training", [True, False])
def test_in_a_block_of_ours(training):
    fused, plain = block_pair("SEBottleneck", stride=2, reduction=4)
    fused.se, plain.se = fusedres.EffectiveSqueezeExcite(32), layers.EffectiveSEModule(32)
    fused, plain = twins(fused, plain)
    fused.train(training), plain.train(training)
    check_module(fused, plain, randn((4, 16, 7, 7), layout="NHWC"))


# --- fused from other libraries


def fused_reasons(model, x):
    return zoo.unfused_reasons(fusedres.fuse(model).train(), x)


@pytest.mark.parametrize("attn", [
    partial(layers.EffectiveSEModule, gate_layer="sigmoid"),
    partial(layers.EffectiveSEModule, gate_layer="sigmoid", add_maxpool=True),
    partial(layers.SEModule, add_maxpool=True),
])  # fmt: skip
def test_timms_blocks_run_fused(attn):
    model = resnet.Bottleneck(32, 8, attn_layer=attn)
    x = zoo.images(3, 7, channels=32)
    zoo.assert_same_network(model, x)
    assert fused_reasons(model, x) == set()


@pytest.mark.parametrize("stride,drop_path", [(1, 0.0), (2, 0.0), (1, 0.5)])
def test_timms_regnet_y(stride, drop_path):
    block = regnet.Bottleneck(
        24, 32 if stride == 2 else 24, stride=stride, group_size=8, se_ratio=0.25,
        drop_path_rate=drop_path, dilation=(1, 1),
    )  # fmt: skip
    x = zoo.images(4, 8, channels=24)
    zoo.assert_same_network(block, x)
    assert "" in zoo.swapped(block)


def test_timms_regnet_block_without_a_shortcut():
    block = regnet.Bottleneck(24, 32, stride=2, group_size=8, se_ratio=0.25, downsample="")
    assert block.downsample is None
    zoo.assert_same_network(block, zoo.images(4, 8, channels=24))


def test_torchvisions_regnet_y_runs_fused():
    """Squeeze-excite stands before the last 1x1 convolution."""
    options = dict(
        norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU, group_width=8, se_ratio=0.25
    )
    block = models.regnet.ResBottleneckBlock(24, 32, 2, **options)
    x = zoo.images(4, 8, channels=24)
    zoo.assert_same_network(block, x)
    assert fused_reasons(block, x) == set()
    ops = [r.op for r in fusedres.explain(fusedres.fuse(copy.deepcopy(block)), x).rows]
    assert ops.count("squeeze_excite") == 1 and ops[-1] == "residual_add"


# --- ResNeXt


def test_grouped_convolutions_do_not_fall_back():
    model = fusedres.models.resnext50_32x4d(num_classes=3)
    x = zoo.images(2, 33)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            rows = fusedres.explain(model.train(training), x).rows
        assert {r.reason for r in rows} == {None}
    peer = timm.create_model("resnext50_32x4d", num_classes=3, layers=(1, 1, 1, 1))
    assert zoo.unfused_reasons(fusedres.fuse(peer), x) == set()
