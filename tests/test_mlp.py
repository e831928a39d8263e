"""ResidualMLP and DenselyConnectedMLP against the formula on PyTorch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from cases import backends, randn
from fusedres import reference
from modules import check_module, compare, results
from test_memory import saved


class PlainResidual(fusedres.ResidualMLP):
    def forward(self, x):
        before = 0
        for layer in self.layers:
            z = layer(x) + x + before
            before = x if self.cross_coupled else 0
            x = reference.ACTIVATIONS[self.act](z)
        return x


class PlainDense(fusedres.DenselyConnectedMLP):
    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, reference.ACTIVATIONS[self.act](layer(x))], -1)
        return self.output(x)


def pair(ours, plain, *args, **kwargs):
    fused, twin = ours(*args, **kwargs), plain(*args, **kwargs)
    fused.load_state_dict(twin.state_dict())
    return fused, twin


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, dict(cross_coupled=True), dict(act="silu", bias=False)], ids=str
)
def test_residual(options, dtype, backend):
    modules = pair(fusedres.ResidualMLP, PlainResidual, 19, 3, **options)
    with fusedres.backend(backend):
        compare(results, *(m.to(dtype) for m in modules), randn((7, 19), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, dict(act="gelu"), dict(act="identity", bias=False), dict(act="leaky_relu")],
    ids=str,
)
def test_densely_connected(options, dtype):
    modules = pair(fusedres.DenselyConnectedMLP, PlainDense, 11, 7, 5, 4, **options)
    compare(results, *(m.to(dtype) for m in modules), randn((9, 11), dtype))
    with torch.no_grad():
        fused, plain = modules
        x = randn((9, 11), dtype)
        wanted = plain.double()(x.double())
        error = (fused(x) - wanted).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps * wanted.abs().max()


def test_any_number_of_dimensions():
    for modules, width in (
        (pair(fusedres.ResidualMLP, PlainResidual, 6, 2), 6),
        (pair(fusedres.DenselyConnectedMLP, PlainDense, 6, 4, 3, 2), 6),
    ):
        for shape in ((width,), (2, 3, width), (0, width)):
            fused, plain = modules
            assert fused(randn(shape)).shape == plain(randn(shape)).shape
        x = randn((2, 3, width))
        check_module(*modules, x)


def test_derivatives():
    module = fusedres.DenselyConnectedMLP(3, 2, 2, 2, act="gelu").double()
    parameters = dict(module.named_parameters())

    def of(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    inputs = [randn((3, 3), torch.float64), *parameters.values()]
    inputs = [t.detach().requires_grad_() for t in inputs]
    torch.autograd.gradcheck(of, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(of, inputs, fast_mode=True)


def test_memory_is_linear_in_depth():
    x = randn((64, 16)).requires_grad_()
    shares = []
    for depth in (2, 4, 8):
        fused, plain = pair(fusedres.DenselyConnectedMLP, PlainDense, 16, 16, 4, depth)
        ours, eager = (kept_bytes(m, x) for m in (fused, plain))
        assert ours == 4 * 64 * 16 * (depth + 1)
        shares.append(ours / eager)
    assert shares[0] > shares[1] > shares[2]


def kept_bytes(module: nn.Module, x) -> int:
    large, small = saved(module, x)
    return sum(large) + small


def test_compile_autocast_and_copies():
    for modules in (
        pair(fusedres.ResidualMLP, PlainResidual, 8, 2),
        pair(fusedres.DenselyConnectedMLP, PlainDense, 8, 4, 3, 2),
    ):
        fused, plain = modules
        compiled = copy.deepcopy(fused)
        compiled.compile(fullgraph=True, backend="aot_eager")
        check_module(compiled, copy.deepcopy(plain), randn((5, 8)))
        with torch.autocast("cpu", torch.bfloat16):
            y, eager = fused(randn((5, 8))), plain(randn((5, 8)))
        assert y.dtype == eager.dtype


@pytest.mark.parametrize("make,message", [
    (lambda: fusedres.ResidualMLP(0, 2), "features: wanted a number >= 1, got 0"),
    (lambda: fusedres.ResidualMLP(4, 2, act="tan"), "act: wanted one of"),
    (lambda: fusedres.DenselyConnectedMLP(4, 2, 2, 0), "depth: wanted a number >= 1, got 0"),
    (lambda: fusedres.ResidualMLP(4, 2)(torch.zeros(3, 5)), r"x: wanted shape \[..., 4\], got \(3, 5\)"),
    (lambda: fusedres.DenselyConnectedMLP(4, 2, 2, 1)(torch.zeros(3, 5)), r"x: wanted shape \[..., 4\]"),
])  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_explain_and_verify():
    model = nn.Sequential(fusedres.ResidualMLP(8, 2), fusedres.DenselyConnectedMLP(8, 4, 3, 2))
    x = randn((6, 8))
    rows = fusedres.explain(model, x).rows
    with fusedres.backend("native"):  # unasked, a CPU adds in place
        asked = fusedres.explain(model, x).rows
    assert [r.backend for r in asked if r.op == "residual_add"] == ["native"] * 2
    assert [r.backend for r in rows if r.op == "residual_add"] == ["aten"] * 2
    (dense,) = (r for r in rows if r.op == "dense_mlp")
    assert dense.launches == 2 and "one buffer" in dense.reason
    assert fusedres.verify(model, x, train=True).ok


def test_layers_with_hooks_or_of_other_classes_run_themselves():
    mlp, x = fusedres.DenselyConnectedMLP(4, 3, 2, depth=2), randn((5, 4))
    wanted, calls = mlp(x), []
    mlp.layers[1].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(mlp(x), wanted)
    assert calls == [1]
    mlp.layers[0] = nn.Sequential(mlp.layers[0])
    torch.testing.assert_close(mlp(x), wanted)
