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


class Wrapped(torch.Tensor):
    """As a quantised weight: it knows ``linear`` and little else."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.inner = weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is plain:
            return func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def networks():
    encoder = fusedres.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    mlp = fusedres.DenselyConnectedMLP(8, 4, 8, 2)
    return (encoder, encoder.linear1, randn((2, 3, 8))), (mlp, mlp.output, randn((6, 8)))


def test_a_weight_that_is_no_plain_tensor_is_its_own():
    for dtype in (torch.float32, torch.bfloat16):
        for model, layer, x in networks():
            model.to(dtype)
            wanted = model(x.to(dtype))
            layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
            torch.testing.assert_close(model(x.to(dtype)), wanted)


def test_a_layer_of_another_dtype_is_refused_as_by_pytorch():
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        for model, layer, x in networks():
            model.to(dtype), layer.to(other)
            with pytest.raises(RuntimeError, match="must have the same dtype"):
                model(x.to(dtype))


def test_a_forward_replaced_on_the_class_is_called(monkeypatch):
    forward, calls = torch.nn.Linear.forward, []

    def counting(self, x):
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    for dtype in (torch.float32, torch.bfloat16):
        for model, layer, x in networks():
            calls.clear()
            model.to(dtype)(x.to(dtype))
            assert layer in calls
