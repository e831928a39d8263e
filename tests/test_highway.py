"""highway: the op, Highway and HighwayConv2d against the published formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from cases import arrange, backends, executions, layouts, randn, sliced
from fusedres import reference
from fusedres.ops.highway import backward_bytes_moved, bytes_moved
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_non_finite,
    check,
    check_derivatives,
    gradients,
)  # fmt: skip
from modules import compare, results

CASES = {
    "odd": ((5, 37), "NCHW", dict(act="relu")),
    "one_channel": ((4, 1), "NCHW", dict(act="identity", coupled=False)),
    "vectors": ((9, 64), "NCHW", dict(act="gelu")),
    "sequence": ((2, 24, 7), "NCHW", dict(act="relu", coupled=False)),
    "maps": ((2, 6, 5, 5), "NCHW", dict(act="silu")),
    "maps_nhwc": ((3, 17, 4, 3), "NHWC", dict(act="leaky_relu")),
    "1x1_nhwc": ((3, 9, 1, 1), "NHWC", dict(act="relu6", coupled=False)),
    "long_rows": ((1, 20000), "NCHW", dict(act="hardswish")),
}


def tensors_of(shape, layout, dtype, *, coupled=True, **_):
    n, c, *rest = shape
    parts = randn((n, (2 if coupled else 3) * c, *rest), dtype, layout)
    return dict(parts=parts, x=randn(shape, dtype, layout))


def fused(act="relu", coupled=True):
    return lambda parts, x: fusedres.functional.highway(parts, x, act=act, coupled=coupled)


def plain(act="relu", coupled=True):
    def fn(parts, x):
        h, t, *c = parts.chunk(2 if coupled else 3, 1)
        t = torch.sigmoid(t)
        return reference.ACTIVATIONS[act](h) * t + x * (1 - t if coupled else torch.sigmoid(*c))

    return fn


@executions
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, backend, dtype):
    shape, layout, options = CASES[case]
    with fusedres.backend(backend):
        check(fused(**options), plain(**options), tensors_of(shape, layout, dtype, **options))


@backends
def test_views_and_two_formats(backend):
    tensors = tensors_of((3, 8, 5, 4), "NHWC", torch.float32)
    views, buffers = zip(*(sliced(t) for t in tensors.values()), strict=True)
    with fusedres.backend(backend), Unchanged(*buffers):
        check(fused(), plain(), dict(zip(tensors, views, strict=True)))
    tensors["x"] = arrange(tensors["x"], "NCHW")
    with fusedres.backend(backend):
        out = gradients(fused(), tensors)
    assert (out["y"] - plain()(**tensors)).abs().max() < torch.finfo(torch.float32).eps * 100


@backends
@layouts
def test_empty_batch(layout, backend):
    with fusedres.backend(backend):
        out = gradients(fused(), tensors_of((0, 6, 3, 3), layout, torch.float32))
    assert {n: tuple(t.shape) for n, t in out.items()} == {
        "y": (0, 6, 3, 3), "dparts": (0, 12, 3, 3), "dx": (0, 6, 3, 3)
    }  # fmt: skip


@backends
@layouts
def test_derivatives(layout, backend):
    for options in (dict(act="silu"), dict(act="gelu", coupled=False)):
        with fusedres.backend(backend):
            tensors = tensors_of((2, 3, 2, 2), layout, torch.float64, **options)
            check_derivatives(fused(**options), tensors)


def test_opcheck_and_compile():
    parts, x, dy = randn((5, 12)), randn((5, 6)), randn((5, 6))
    leaves = parts.clone().requires_grad_(), x.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fusedres.highway, (*leaves, "relu", True))
    torch.library.opcheck(torch.ops.fusedres.highway_backward, (dy, parts, x, "silu", True))
    tensors = tensors_of((2, 6, 5, 5), "NHWC", torch.float32)
    check(torch.compile(fused(), fullgraph=True, backend="aot_eager"), plain(), tensors)


def test_same_bits_at_any_thread_count():
    assert_same_at_any_thread_count(fused(), tensors_of((64, 900), "NCHW", torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value):
    tensors = tensors_of((4, 19), "NCHW", torch.float32)
    tensors["x"][1, 2] = tensors["parts"][2, 3] = value
    assert_same_non_finite(gradients(fused(), tensors), gradients(plain(), tensors))


@pytest.mark.parametrize("change,error,message", [
    (dict(input=torch.zeros(3, 4).int()), TypeError, "input: wanted a floating-point tensor"),
    (dict(parts=torch.zeros(3, 9)), ValueError, r"parts: wanted shape \(3, 8\), got \(3, 9\)"),
    (dict(parts=torch.zeros(3, 8).double()), TypeError, "parts: wanted dtype torch.float32"),
    (dict(coupled=False), ValueError, r"parts: wanted shape \(3, 12\), got \(3, 8\)"),
    (dict(act="tan"), ValueError, "act: wanted one of .* got 'tan'"),
])  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        fusedres.functional.highway(
            **(dict(parts=torch.zeros(3, 8), input=torch.zeros(3, 4)) | change)
        )


def test_bytes_moved():
    parts, x = torch.empty(16, 32), torch.empty(16, 16)  # x: 1024 bytes
    assert bytes_moved(parts, x, "relu", True) == 4 * 1024  # RR (parts) R + W
    assert backward_bytes_moved(x, parts, x, "relu", True) == 7 * 1024  # RRRR + WWW


# --- the modules


class Published(nn.Module):
    """Equation 3 of Srivastava et al. with a layer for each gate."""

    def __init__(self, layer, act="relu", coupled=True):
        super().__init__()
        self.h, self.t = layer(), layer()
        self.c = None if coupled else layer()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x))
        c = 1 - t if self.c is None else torch.sigmoid(self.c(x))
        return reference.ACTIVATIONS[self.act](self.h(x)) * t + x * c

    def parameter(self, name: str) -> Tensor:
        gates = (self.h, self.t) if self.c is None else (self.h, self.t, self.c)
        return torch.cat([getattr(g, name) for g in gates])

    def gradient(self, name: str) -> Tensor:
        gates = (self.h, self.t) if self.c is None else (self.h, self.t, self.c)
        return torch.cat([getattr(g, name).grad for g in gates])


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients; those of the published layers under the names of ours."""
    found = results(module, x)
    if isinstance(module, Published):
        found = {n: v for n, v in found.items() if n in ("y", "dinput0")}
        found |= {f"d{n}": module.gradient(n) for n in ("weight", "bias")}
    return found


def pair_of(kind, act, coupled):
    if kind == "linear":
        layer, ours = lambda: nn.Linear(12, 12), fusedres.Highway(12, act=act, coupled=coupled)
    else:
        layer = lambda: nn.Conv2d(12, 12, 3, padding=1)  # noqa: E731
        ours = fusedres.HighwayConv2d(12, 3, act=act, coupled=coupled)
    plain = Published(layer, act, coupled)
    with torch.no_grad():
        ours.weight.copy_(plain.parameter("weight"))
        ours.bias.copy_(plain.parameter("bias"))
    return ours, plain


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_modules(kind, coupled):
    for act, dtype in (("relu", torch.float32), ("silu", torch.float64)):
        fused_module, plain_module = (m.to(dtype) for m in pair_of(kind, act, coupled))
        shape = (3, 5, 12) if kind == "linear" else (2, 12, 6, 5)
        compare(run, fused_module, plain_module, randn(shape, dtype))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_with_open_gates_it_is_a_residual_block(kind):
    """sigmoid(200) is 1: transform and carry gate let everything through, to the last bit."""
    module, _ = pair_of(kind, "relu", coupled=False)
    with torch.no_grad():
        module.weight[12:] = 0
        module.bias[12:] = 200
    x = randn((4, 12) if kind == "linear" else (2, 12, 5, 5))
    if kind == "linear":
        branch = F.linear(x, module.weight, module.bias)[:, :12]
    else:
        branch = F.conv2d(x, module.weight, module.bias, padding=1)[:, :12]
    assert torch.equal(module(x), F.relu(branch) + x)
    with torch.no_grad():
        module.bias[12:24] = -200  # the transform gate closed: the identity
    assert torch.equal(module(x), x)


def test_starts_by_carrying():
    for module in (
        fusedres.Highway(32),
        fusedres.HighwayConv2d(32),
        fusedres.Highway(32, coupled=False),
    ):
        assert module.bias[32:64].eq(-2).all() and module.bias[64:].eq(2).all()
        shape = (64, 32) if module.weight.dim() == 2 else (2, 32, 8, 8)
        x = torch.randn(shape)
        gate = torch.sigmoid(torch.tensor(-2.0))
        share = ((module(x) * x).sum() / x.square().sum()).item()
        assert 1 - 2 * gate < share < 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_and_copies(kind):
    module, plain_module = pair_of(kind, "relu", True)
    x = randn((4, 12) if kind == "linear" else (2, 12, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = copy.deepcopy(module)(x)
    truth = plain_module.double()(x.double())
    assert (y - truth).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert list(module.state_dict()) == ["weight", "bias"]


def test_module_errors():
    for make, message in (
        (lambda: fusedres.Highway(0), "channels: wanted a number >= 1, got 0"),
        (lambda: fusedres.Highway(4, act="tan"), "act: wanted one of"),
        (lambda: fusedres.Highway(4, bias=False), "gate_bias: wanted 0 without a bias, got -2.0"),
        (lambda: fusedres.HighwayConv2d(4, 2), "kernel_size: wanted an odd number >= 1, got 2"),
        (
            lambda: fusedres.Highway(4)(torch.zeros(3, 5)),
            r"x: wanted shape \[..., 4\], got \(3, 5\)",
        ),
        (lambda: fusedres.HighwayConv2d(4)(torch.zeros(3, 4)), "x: wanted shape"),
        (lambda: fusedres.Highway(4)(torch.tensor(1.0)), "x: wanted shape"),
        (lambda: fusedres.Highway(4, gate_bias=float("nan")), "gate_bias: wanted a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_explain_and_verify():
    model = nn.Sequential(fusedres.Highway(12), fusedres.Highway(12, coupled=False))
    x = randn((6, 12))
    rows = fusedres.explain(model, x).rows
    assert [r.backend for r in rows if r.op == "highway"] == ["native"] * 2
    assert fusedres.verify(model, x, train=True).ok
