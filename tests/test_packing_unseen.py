"""Packed weights: writes that autograd's version counter does not see, and who owns an entry."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import fusedres
from cases import randn
from fusedres.ops import packing
from harness import same_bits
from modules import check_module, randomise
from test_packing import CountPackings, X, inference_pair

FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", FUSED)
def test_a_single_value_that_a_fused_optimizer_writes_is_seen(optimizer):
    layers = fusedres.ConvBNAct2d(64, 64, 3).eval(), fusedres.ConvBNAct2d(64, 64, 3).eval()
    x = randn((2, 64, 8, 8))
    with torch.no_grad():
        before = [layer(x) for layer in layers]
    weight = layers[0].conv.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[5, 40, 1, 1] = 1.0
    version = weight._version
    FUSED[optimizer]([weight]).step()
    with torch.no_grad(), CountPackings() as packed:
        after = [layer(x) for layer in layers]
        assert same_bits(after[0], copy.deepcopy(layers[0])(x))
    assert weight._version == version and not same_bits(before[0], after[0])
    assert same_bits(before[1], after[1])
    assert packed.count == 2  # the layer that was written to, and the copy


def test_a_compiled_step_of_a_fused_optimizer():
    layer, x = fusedres.ConvBNAct2d(64, 64, 3).eval(), randn((2, 64, 8, 8))
    with torch.no_grad():
        before = layer(x)
    optimizer = FUSED["SGD"]([layer.conv.weight])
    layer.conv.weight.grad = torch.zeros_like(layer.conv.weight)
    layer.conv.weight.grad[5, 40, 1, 1] = 1.0
    torch.compile(optimizer.step, backend="eager")()
    with torch.no_grad():
        after = layer(x)
        assert same_bits(after, copy.deepcopy(layer)(x)) and not same_bits(after, before)


def test_values_written_through_the_vector_that_holds_all_parameters():
    layer, x = fusedres.ConvBNAct2d(64, 64, 3).eval(), randn((2, 64, 8, 8))
    flat = nn.utils.parameters_to_vector(layer.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, layer.parameters())
    with torch.no_grad():
        before = layer(x)
        flat[1000] += 1
        after = layer(x)
        assert same_bits(after, copy.deepcopy(layer)(x)) and not same_bits(after, before)


def test_tensors_may_be_swapped():
    """What torch.__future__'s switch for conversions does; it refuses weak references."""
    fused, plain = inference_pair()
    x = randn(X)
    with torch.no_grad():
        check_module(fused, plain, x, graded=False)
        for block in (fused, plain):
            other = nn.Parameter(block.conv1.weight * 0.5)
            torch.utils.swap_tensors(block.conv1.weight, other)
        check_module(fused, plain, x, graded=False)


def test_one_convolution_under_several_norms_is_packed_once_for_each():
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    heads = [nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU()) for _ in range(3)]
    plain = nn.ModuleList(heads).eval()
    for head in plain:
        randomise(head)
    fused, x = fusedres.fuse(plain), randn(X)
    with torch.no_grad():
        for a, b in zip(fused, plain, strict=True):
            check_module(a, b, x, graded=False)
        with CountPackings() as again:
            for head in fused:
                head(x)
        assert again.count == 0
        entries = packing._cache[fused[0][0].weight.untyped_storage()]
        assert len(entries) == 3
        del fused[2], head, a, b
        gc.collect()
        fused[0][1].running_mean = torch.zeros(16)
        fused[0](x)
        assert len(entries) == 2  # those of norms that are gone go with the next one


def test_what_was_folded_from_tensors_that_are_gone_is_let_go():
    """A gain that moves makes a new weight of the norm each time; the statistics stay."""
    block = fusedres.BasicBlock(16, 16, residual_scale=fusedres.ResidualScale(16, 0.5)).eval()
    x = randn(X)
    with torch.no_grad():
        for _ in range(6):
            block.residual_scale.weight.mul_(0.9)
            block(x)
    assert len(packing._cache[block.conv2.weight.untyped_storage()]) <= 2
