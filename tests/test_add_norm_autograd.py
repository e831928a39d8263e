"""add_norm under autograd, torch.library's checks and torch.compile."""

from __future__ import annotations

import pytest
import torch

import fusedres
from cases import backends, channels, randn
from harness import check, check_derivatives
from test_add_norm import fused, plain, tensors_of


@backends
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_derivatives(norm, backend):
    tensors = tensors_of((3, 2, 7), 1, torch.float64, norm=norm)
    with fusedres.backend(backend):
        check_derivatives(fused(norm, dropout=0.3, drop_path=0.3), tensors)


@pytest.mark.parametrize("wanted", ["y", "sum"])
def test_gradient_of_one_result(wanted):
    """Where the loss sees one of the two results, the other has no gradient."""
    pick = 0 if wanted == "y" else 1
    tensors = tensors_of((3, 4, 9), 1, torch.float32)

    def of(run):
        return lambda **t: run(**t)[pick]

    for name in ("weight", "bias") if wanted == "sum" else ():
        tensors[name].requires_grad_(False)
    constants = ("weight", "bias") if wanted == "sum" else ()
    check(of(fused()), of(plain()), tensors, constants=constants, sums=dict(weight=12, bias=12))


@pytest.mark.parametrize(
    "backend,norm",
    [("native", "layer"), ("native", "rms"), ("native", "none"), ("reference", "layer")],
)
def test_opcheck(backend, norm):
    t = tensors_of((6, 10), 1, torch.float32, norm=norm)
    leaves = [None if p is None else p.requires_grad_() for p in t.values()]
    keep, rows = torch.rand(6, 10) > 0.2, torch.tensor([0.0, 2.0] * 3)
    with fusedres.backend(backend):
        torch.library.opcheck(torch.ops.fusedres.add_norm, (*leaves, keep, rows, 1.25, 1e-5, norm))
        torch.library.opcheck(torch.ops.fusedres.add_norm, (*leaves, None, None, 1.0, 1e-5, norm))


def test_opcheck_of_the_backward():
    total, dy, dsum = (randn((6, 10)) for _ in range(3))
    mean, rstd = total.mean(1), total.std(1)
    args = total, dy, dsum, channels(10), mean, rstd, torch.rand(6, 10) > 0.2, None, 1.25, "layer"
    torch.library.opcheck(torch.ops.fusedres.add_norm_backward, args)


def test_compile():
    tensors = tensors_of((2, 6, 20), 1, torch.float32)
    compiled = torch.compile(fused_without_seed, fullgraph=True, backend="aot_eager")
    check(compiled, plain(), tensors, sums=dict(weight=12, bias=12))


def fused_without_seed(x, residual, weight, bias):
    return torch.stack(fusedres.functional.add_layer_norm(x, residual, weight.shape, weight, bias))
