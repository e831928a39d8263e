"""Products with a weight: PyTorch's values in every dtype, by float32 where the CPU has none."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear as plain

import fusedres
from cases import randn, sliced
from fusedres import observers
from fusedres.blocks.products import linear
from fusedres.ops.convolution import upcasts
from harness import check, check_derivatives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tensors_of(dtype, bias=True, rows=7):
    weight, b = randn((5, 6), dtype), randn((5,), dtype) if bias else None
    return dict(x=randn((rows, 6), dtype), weight=weight, bias=b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias, dtype):
    check(linear, plain, tensors_of(dtype, bias), sums=dict(weight=7, bias=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_larger_tensor(dtype):
    tensors = tensors_of(dtype)
    view, around = sliced(tensors["x"])
    before = around.clone()
    check(linear, plain, tensors | dict(x=view), sums=dict(weight=7, bias=7))
    assert torch.equal(around.isnan(), before.isnan())
    assert linear(**tensors_of(dtype, rows=0)).shape == (0, 5)


def test_derivatives():
    check_derivatives(linear, tensors_of(torch.float64))


def test_the_detour_is_taken_where_it_is_needed():
    for dtype in DTYPES:
        events = []
        with observers.observe(events.append):
            linear(**tensors_of(dtype))
        took = any(e.op == "conv_stats" for e in events)
        assert took == upcasts(torch.empty(0, dtype=dtype))


def test_under_autocast():
    layer, x = fusedres.Highway(6), randn((4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, layer.weight, layer.bias).dtype == torch.bfloat16
        layer(x).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
