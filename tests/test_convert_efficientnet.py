"""fuse and unfuse on timm's EfficientNet blocks, whose norms activate by themselves."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm import layers
from timm.models import _efficientnet_blocks as blocks
from torch import nn

import fusedres
import zoo
from fusedres import observers

SE = partial(blocks.SqueezeExcite, rd_ratio=0.25)
BLOCKS = {
    "depthwise": lambda: blocks.DepthwiseSeparableConv(16, 16, se_layer=SE, drop_path_rate=0.5),
    "inverted": lambda: blocks.InvertedResidual(16, 16, exp_ratio=3.0, se_layer=SE),
    "inverted, silu": lambda: blocks.InvertedResidual(16, 16, act_layer=nn.SiLU, drop_path_rate=0.5),
    "inverted, no shortcut": lambda: blocks.InvertedResidual(16, 24, stride=2, exp_ratio=2.0),
    "edge": lambda: blocks.EdgeResidual(16, 16, exp_ratio=2.0),
    "conv": lambda: blocks.ConvBnAct(16, 16, 3, skip=True),
    "same padding": lambda: blocks.InvertedResidual(16, 16, pad_type="same"),
    "anti-aliased": lambda: blocks.InvertedResidual(16, 24, stride=2, aa_layer=layers.BlurPool2d),
    "mish": lambda: blocks.EdgeResidual(16, 16, act_layer=nn.Mish),
}  # fmt: skip
X = zoo.images(4, 9, channels=16)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_the_same_fused(name):
    model = BLOCKS[name]()
    fused = zoo.assert_same_network(model, X)
    unfused = fusedres.unfuse(fused)
    zoo.assert_same_classes(unfused, model)
    zoo.assert_same_state(unfused, model)


@pytest.mark.parametrize("name,ops", [
    ("depthwise", ["conv_bn_act", "squeeze_excite", "conv_bn_act"]),
    ("inverted, silu", ["conv_bn_act"] * 3),
    ("edge", ["conv_bn_act"] * 2),
])  # fmt: skip
def test_norms_are_folded_in_inference(name, ops):
    """The activation and the addition are the convolutions' too."""
    fused, events = fusedres.fuse(BLOCKS[name]()).eval(), []
    with torch.no_grad(), observers.observe(events.append):
        fused(X)
    assert [e.op for e in events] == ops
    assert {e.backend for e in events} <= {"onednn", "native"}


def test_an_activation_without_an_op_says_so():
    (reason,) = zoo.unfused_reasons(fusedres.fuse(BLOCKS["mish"]()), X)
    assert reason.startswith("BatchNormAct2d is not a batch norm")


def test_a_block_with_a_forward_of_its_own_is_left_alone():
    model = blocks.CondConvResidual(16, 16, num_experts=2)
    assert "" not in zoo.swapped(model)


def test_every_norm_of_a_network_is_folded():
    """Its numbers are compared in test_convert_timm."""
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    fused = fusedres.fuse(model)
    with torch.no_grad():
        rows = [r for r in fusedres.explain(fused, zoo.images()).rows if r.op == "conv_bn_act"]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert len(rows) == norms - 1  # the stem's, which the network applies itself
