"""Packed weights: made once, never used after anything they were made from has changed."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from accuracy import assert_as_accurate_as_eager
from cases import randn
from fusedres.ops import packing
from harness import same_bits
from modules import block_pair, check_module

X = (2, 16, 6, 6)


class CountPackings(TorchDispatchMode):
    """How many weights oneDNN lays out inside the context."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reorder_convolution_weight" in str(func)
        return func(*args, **(kwargs or {}))


def inference_pair(name: str = "BasicBlock", **options):
    return tuple(b.eval() for b in block_pair(name, stride=2, **options))


def optimizer_step(block: nn.Module) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def training_step(block: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():  # the batch changes the running statistics only
        block.train()(randn(X))
    block.eval()


def replace_weight(block: nn.Module) -> None:
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 0.5)


def replace_data(block: nn.Module) -> None:
    block.conv1.weight.data = block.conv1.weight.data * 0.5


def load_other_state(block: nn.Module) -> None:
    block.load_state_dict({n: t * 2 for n, t in block.state_dict().items()})


def swap_channels(block: nn.Module) -> None:
    """A permutation of the values: any sum over them stays what it was."""
    block.conv1.weight.data.copy_(block.conv1.weight.data.flip(0))


CHANGES = {
    "weight_in_place": lambda b: b.conv1.weight.mul_(0.5),
    "weight_through_data": lambda b: b.conv1.weight.data.mul_(0.5),
    "weight_channels_swapped": swap_channels,
    "weight_sign_through_data": lambda b: b.conv2.weight.data.neg_(),
    "weight_object": replace_weight,
    "weight_storage": replace_data,
    "bn_weight_in_place": lambda b: b.bn1.weight.add_(0.5),
    "bn_weight_through_data": lambda b: b.bn2.weight.data.add_(0.5),
    "bn_bias_through_data": lambda b: b.bn1.bias.data.neg_(),
    "running_mean_in_place": lambda b: b.bn2.running_mean.add_(0.5),
    "running_mean_through_data": lambda b: b.bn1.running_mean.data.zero_(),
    "running_var_through_data": lambda b: b.bn1.running_var.data.mul_(3),
    "running_var_object": lambda b: setattr(b.bn1, "running_var", b.bn1.running_var * 3),
    "eps": lambda b: setattr(b.bn1, "eps", 0.1),
    "stride": lambda b: (
        setattr(b.conv1, "stride", (1, 1)),
        setattr(b.downsample[0], "stride", (1, 1)),
    ),
    "shortcut": lambda b: b.downsample[0].weight.data.mul_(0.5),
    "optimizer_step": optimizer_step,
    "training_step": training_step,
    "load_state_dict": load_other_state,
    "reset_parameters": lambda b: b.bn1.reset_parameters(),
    "dtype_and_back": lambda b: b.bfloat16().float(),
    "memory_format": lambda b: b.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    fused, plain = inference_pair()
    x = randn(X, layout="NHWC")
    with torch.no_grad():
        before = check_module(fused, plain, x, graded=False)["y"]
        for block in (fused, plain):
            CHANGES[change](block)
        after = check_module(fused, plain, x, graded=False)["y"]
    assert change in ("memory_format",) or not same_bits(before, after)


PARTS = {
    "filter": lambda w: w[5].zero_(),
    "last_filter": lambda w: w[-1].mul_(2),
    "input_channel": lambda w: w[:, 11].neg_(),
    "last_input_channel": lambda w: w[:, -1].zero_(),
    "tap": lambda w: w[:, :, 2, 1].zero_(),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [(24, 96), (96, 24)])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_written_through_data_is_seen(part, channels, layout):
    """Of a weight that is too large to be looked at whole."""
    layer = fusedres.ConvBNAct2d(*channels, 3).eval()
    if layout == "NHWC":
        layer = layer.to(memory_format=torch.channels_last)
    x = randn((2, channels[0], 5, 5))
    with torch.no_grad():
        before = layer(x)
        PARTS[part](layer.conv.weight.data)
        after = layer(x)
        assert not same_bits(before, after)
        assert same_bits(after, copy.deepcopy(layer)(x))


def test_alternating_training_and_inference():
    fused, plain = inference_pair("Bottleneck")
    optimizers = [torch.optim.SGD(b.parameters(), lr=0.01) for b in (fused, plain)]
    x = randn(X)
    for _ in range(3):
        for block, optimizer in zip((fused, plain), optimizers, strict=True):
            optimizer.zero_grad()
            block.train()(x).square().mean().backward()
            optimizer.step()
            block.eval()
        plain.load_state_dict(fused.state_dict())
        with torch.no_grad():
            check_module(fused, plain, x, graded=False)


def test_a_weight_is_packed_once():
    fused, _ = inference_pair()
    x = randn(X)
    with torch.no_grad():
        with CountPackings() as first:
            fused(x)
        with CountPackings() as second:
            fused(x + 1)
    assert (first.count, second.count) == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_packs_the_weight_itself_once(dtype):
    fused, plain = inference_pair()
    x = randn(X)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        with CountPackings() as first:
            fused(x)
        with CountPackings() as second:
            out = fused(x)
        eager = plain(x)
    assert (first.count, second.count) == (3, 0)
    with torch.no_grad():
        assert_as_accurate_as_eager(out, plain.double()(x.double()), eager)


def test_inference_mode():
    fused, plain = inference_pair()
    x = randn(X)
    with torch.inference_mode():
        check_module(fused, plain, x, graded=False)
        made_inside = copy.deepcopy(fused)
        first = made_inside(x)
        with CountPackings() as again:
            made_inside(x)
        assert again.count == 0
        made_inside.conv1.weight.mul_(0.5)  # a tensor without a version counter
        assert not same_bits(made_inside(x), first)
        plain.conv1.weight.data.mul_(0.5)
        fused.conv1.weight.data.mul_(0.5)
        check_module(fused, plain, x, graded=False)


def test_a_weight_that_is_computed():
    """A parametrisation makes a new weight tensor in every call."""
    fused, plain = inference_pair()
    for block in (fused, plain):
        nn.utils.parametrizations.weight_norm(block.conv1)
    x = randn(X)
    check_module(fused, plain, x)
    with torch.no_grad():
        check_module(fused, plain, x, graded=False)
        for block in (fused, plain):
            block.conv1.parametrizations.weight.original0.mul_(0.5)
        check_module(fused, plain, x, graded=False)
    check_module(fused.train(), plain.train(), x, steps=2)


def test_a_packed_weight_lives_as_long_as_its_source():
    gc.collect()
    held = len(packing._cache)
    fused, _ = inference_pair()
    with torch.no_grad():
        fused(randn(X))
    assert len(packing._cache) == held + 3
    del fused
    gc.collect()
    assert len(packing._cache) == held


def test_inference_in_several_threads():
    fused, _ = inference_pair("SEBottleneck")
    inputs = [randn((1, 16, 5 + i, 6)) for i in range(4)]
    with torch.no_grad():
        wanted = [fused(x) for x in inputs]
    fresh, found = copy.deepcopy(fused), [None] * 4

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[i] = fresh(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
