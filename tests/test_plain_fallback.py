"""Convolutions and norms that PyTorch's own modules run, or refuse: result, error, state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusedres
from cases import randn
from harness import assert_same_bits

X = (2, 3, 9, 9)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def pair(change: Callable[[nn.Conv2d, nn.BatchNorm2d], None], **conv) -> list[nn.Sequential]:
    """Convolution, norm and activation after ``change``, fused and as they are."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, **conv), nn.BatchNorm2d(8), nn.ReLU())
    change(plain[0], plain[1])
    return [fusedres.fuse(copy.deepcopy(plain)), plain]


def unchanged(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    pass


@modes
@pytest.mark.parametrize(
    "conv", [dict(stride=(2,)), dict(padding=(1,)), dict(dilation=(2,))], ids=str
)
def test_one_number_for_both_axes(conv, training):
    fused, plain = (m.train(training) for m in pair(unchanged, **conv))
    x = randn(X)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
    assert all(row.backend != "unfused" for row in fusedres.explain(fused, x).rows)


def out_of_range(padding: int) -> Callable:
    def change(conv, norm):
        conv.padding = (padding, padding)

    return change


def with_bias(bias: torch.Tensor) -> Callable:
    def change(conv, norm):
        conv.bias = nn.Parameter(bias)

    return change


def with_norm(name: str, *shape: int) -> Callable:
    def change(conv, norm):
        value = torch.ones(shape)
        setattr(norm, name, nn.Parameter(value) if name in ("weight", "bias") else value)

    return change


def in_dtypes(of_conv: torch.dtype, of_norm: torch.dtype) -> Callable:
    def change(conv, norm):
        conv.to(of_conv), norm.to(of_norm)

    return change


REFUSED = {
    "stride": (unchanged, dict(stride=(0, 1)), torch.float32),
    "padding": (out_of_range(-1), {}, torch.float32),
    "bias of another size": (with_bias(torch.zeros(7)), {}, torch.float32),
    "bias of another dtype": (with_bias(torch.zeros(8, dtype=torch.bfloat16)), {}, torch.float32),
    "norm's bias": (with_norm("bias", 7), {}, torch.float32),
    "variance": (with_norm("running_var", 7), {}, torch.float32),
    "mean of two axes": (with_norm("running_mean", 8, 1), {}, torch.float32),
    "norm in bfloat16": (in_dtypes(torch.float32, torch.bfloat16), {}, torch.float32),
    "norm in float32": (in_dtypes(torch.float64, torch.float32), {}, torch.float64),
    "norm in float64": (in_dtypes(torch.bfloat16, torch.float64), {}, torch.bfloat16),
}


@modes
@pytest.mark.parametrize("change,conv,dtype", REFUSED.values(), ids=REFUSED)
def test_what_pytorch_refuses(change, conv, dtype, training):
    """In PyTorch's words; and where its norms count the batch that they refuse, ours do not."""
    told, (fused, plain) = [], pair(change, **conv)
    before = copy.deepcopy(fused.state_dict())
    for model in (fused, plain):
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            model.train(training)(randn(X).to(dtype))
        told.append(str(error.value))
    assert told[0] == told[1]
    assert_same_bits(fused.state_dict(), before)


def test_an_error_in_the_second_norm_leaves_the_first_as_it_was():
    block = fusedres.BasicBlock(4, 4).train()
    block.bn2.running_var = torch.ones(3)
    before = copy.deepcopy(block.bn1.state_dict())
    with pytest.raises(RuntimeError, match="running_var should contain 4 elements not 3"):
        block(randn((2, 4, 5, 5)))
    assert_same_bits(block.bn1.state_dict(), before)


@modes
def test_a_kernel_larger_than_the_image(training):
    for model in (*pair(unchanged), fusedres.ConvBNAct2d(3, 4, 5, padding=0)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Calculated padded input size"):
            model.train(training)(torch.ones(2, 3, 1, 1))


class Marked(torch.Tensor):
    """A subclass without a behaviour of its own."""


@pytest.mark.parametrize("index", [0, 1], ids=["convolution", "norm"])
def test_a_weight_of_a_subclass(index):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    fused = fusedres.fuse(plain)
    marked = plain[index].weight.detach().as_subclass(Marked)
    fused[index].weight = nn.Parameter(marked)
    x = randn(X)
    with torch.no_grad():
        torch.testing.assert_close(fused(x).as_subclass(torch.Tensor), plain(x))


@modes
def test_a_convolution_that_is_patched_on_the_instance(training):
    """As those do who want textures to tile."""

    def circular(x, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), "circular"), weight, bias)

    fused, plain = (m.train(training) for m in pair(unchanged))
    for m in (fused, plain):
        m[0]._conv_forward = circular
    x = randn(X)
    assert_same_bits({"y": fused(x)}, {"y": plain(x)})


PATCHES = {
    "Conv2d.forward": (nn.Conv2d, "forward"),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward"),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward"),
    "ReLU.forward": (nn.ReLU, "forward"),
}


@modes
@pytest.mark.parametrize("name", PATCHES)
def test_a_class_that_is_patched_after_this_library_was_imported(name, training, monkeypatch):
    fused, plain = (m.train(training) for m in pair(unchanged))
    cls, method = PATCHES[name]
    original = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda *args: 2 * original(*args), raising=True)
    x = randn(X)
    torch.testing.assert_close(fused(x), plain(x))
