"""Modules and inputs that look like what can be fused, and are not: PyTorch's result or error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from cases import randn
from harness import Unchanged
from modules import block_pair


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 3


class Quarter(fusedres.SqueezeExcite):
    def forward(self, x, residual=None, post_act=None):
        return x * 0.25


def with_layer(name: str, layer: nn.Module) -> nn.Module:
    block = fusedres.SEBasicBlock(8, 8, reduction=2).eval()
    setattr(block.se, name, layer)
    return block


def with_se(se: nn.Module) -> nn.Module:
    block = fusedres.SEBasicBlock(8, 8).eval()
    block.se = se
    return block


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_layer("fc2", Scaled(4, 8, 1)),
        lambda: with_layer("fc1", nn.Sequential(nn.Conv2d(8, 4, 1))),
        lambda: with_layer("fc1", nn.Conv2d(8, 4, 1, groups=2)),
        lambda: with_layer("fc1", nn.Conv2d(8, 4, 3, padding=1)),
        lambda: with_se(Quarter(8)),
    ],
    ids=["subclass", "sequential", "grouped", "3x3", "own forward"],
)
def test_another_squeeze_excite(make):
    block, x = make(), randn((2, 8, 5, 5))
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            torch.testing.assert_close(block(x), fusedres.unfuse(block)(x))
    rows = fusedres.explain(block, x).rows
    assert any("plain 1x1" in (r.reason or "") or "own" in (r.reason or "") for r in rows)


def test_squeeze_excite_of_one_image():
    x = randn((8, 8, 8))
    for layer in (fusedres.SqueezeExcite(8, 2), fusedres.EffectiveSqueezeExcite(8)):
        torch.testing.assert_close(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_a_shortcut_larger_than_the_branch(name, training):
    planes = {"BasicBlock": 16, "Bottleneck": 4}[name]
    for block in block_pair(name, planes=planes, stride=8, project=False):
        with Unchanged(*([] if type(block) is not getattr(fusedres, name) else [block])):
            with pytest.raises(RuntimeError, match="output with shape .* doesn't match the broad"):
                block.train(training)(randn((2, 16, 8, 8)))


@pytest.mark.parametrize("eps", [-1.0, 0.0])
def test_an_epsilon_that_pytorch_refuses(eps):
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=eps))
    for model in (plain, fusedres.fuse(plain)):
        with pytest.raises(ValueError, match="eps"):
            model(torch.ones(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"eps: wanted a number > 0, got 0"):
        fusedres.BatchNormAct2d(4, eps=0.0)(torch.ones(2, 4, 3, 3))


@pytest.mark.parametrize("x", [[1.0], None, "x"], ids=["list", "None", "str"])
def test_an_input_that_is_no_tensor(x):
    for block in block_pair("BasicBlock"):
        with pytest.raises(TypeError, match="conv2d()"):
            block(x)


def test_a_fused_module_has_the_keywords_of_its_own_forward():
    plain = block_pair("BasicBlock")[1].eval()
    fused, x = fusedres.fuse(plain), randn((2, 16, 6, 6))
    with torch.no_grad():
        torch.testing.assert_close(fused(x=x), plain(x=x))
    for block in (plain, fused):
        with pytest.raises(TypeError, match="unexpected keyword argument 'image'"):
            block(image=x)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_an_infinity_reaches_the_running_mean(layout):
    x = randn((3, 4, 6, 6), layout=layout)
    x[0, 0, 0, 0], x[1, 1, 3, 3] = float("inf"), float("-inf")
    norms = nn.BatchNorm2d(4), fusedres.BatchNormAct2d(4)
    for norm in norms:
        norm(x)
    torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean)
    assert torch.equal(norms[1].running_var.isnan(), norms[0].running_var.isnan())


def test_fuse_refuses_what_holds_no_batch_norm():
    for norm in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)):
        with pytest.raises(ValueError, match="model: wanted .* followed by a batch norm in an"):
            fusedres.fuse(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()))
