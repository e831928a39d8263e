"""Scaled residuals: LayerScale, SkipInit, ReZero and x / L, alone and in blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from cases import backends, layouts, randn
from fusedres import observers
from harness import Unchanged
from modules import check_module, randomise

X = (4, 16, 7, 7)
FORMS = {
    "LayerScale": lambda: fusedres.ResidualScale(16, init=0.3),
    "SkipInit": lambda: fusedres.ResidualScale(init=0.5),
    "x / L": lambda: fusedres.ResidualScale(init=1.0, shortcut=0.25, learnable=False),
}


class ByHand(nn.Module):
    """The formulas in plain PyTorch, on the modules of one of our blocks."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        b, s = self.block, self.block.residual_scale
        weight = s.weight.view(-1, 1, 1)
        if hasattr(b, "norm1"):
            h = torch.relu(b.norm1(x))
            out = b.conv2(torch.relu(b.norm2(b.conv1(h))))
            skipped = x if b.downsample is None else b.downsample(h)
            return weight * out + s.shortcut * skipped
        out = b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x)))))
        out = b.se(out) if hasattr(b, "se") else out
        skipped = x if b.downsample is None else b.downsample(x)
        return torch.relu(weight * out + s.shortcut * skipped)


class Ours(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


def pair(name: str, form: str, project: bool = False):
    down = None
    if project:
        norm = nn.BatchNorm2d(16) if name != "PreActBasicBlock" else nn.Identity()
        down = nn.Sequential(nn.Conv2d(16, 16, 1, 2), norm)
    block = getattr(fusedres, name)(16, 16, 2 if project else 1, down, residual_scale=FORMS[form]())
    randomise(block)
    return Ours(block), ByHand(copy.deepcopy(block))


@backends
@layouts
@pytest.mark.parametrize("form", FORMS)
def test_the_module(form, layout, backend):
    scaling = FORMS[form]()

    class Formula(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = copy.deepcopy(scaling)

        def forward(self, branch, x):
            s = self.scaling
            return torch.relu(s.weight.view(-1, 1, 1) * branch + s.shortcut * x)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = scaling

        def forward(self, branch, x):
            return self.scaling(branch, x, act="relu")

    branch, x = (randn(X, layout=layout) for _ in range(2))
    with fusedres.backend(backend):
        check_module(Module(), Formula(), branch, x)
    check_module(fusedres.unfuse(Module()), Formula(), branch, x)


@backends
@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 4, 8), (6, 8)])
def test_tokens(shape, backend):
    class Formula(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = fusedres.ResidualScale(8, init=0.3, shortcut=0.5, dim=-1)

        def forward(self, branch, x):
            scale = torch.arange(float(len(x))).to(x).view(-1, *[1] * (x.dim() - 1))
            return torch.relu(scale * self.scaling.weight * branch + 0.5 * x)

    class Module(Formula):
        def forward(self, branch, x):
            return self.scaling(branch, x, torch.arange(float(len(x))), act="relu")

    branch, x = randn(shape), randn(shape)
    with fusedres.backend(backend):
        check_module(Module(), Formula(), branch, x)
    check_module(fusedres.unfuse(Module()), Formula(), branch, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name,project", [
    ("BasicBlock", False), ("BasicBlock", True), ("SEBasicBlock", False),
    ("PreActBasicBlock", False), ("PreActBasicBlock", True),
])  # fmt: skip
def test_blocks(name, project, form):
    ours, formula = pair(name, form, project)
    x = randn(X, layout="NHWC")
    check_module(ours, formula, x, steps=2)
    ours.eval(), formula.eval()
    with torch.no_grad():
        check_module(ours, formula, x, graded=False)
    check_module(
        Ours(fusedres.unfuse(ours.block).train()), ByHand(copy.deepcopy(ours.block)).train(), x
    )


def ops_of(block, x, **kwargs):
    events = []
    with observers.observe(events.append):
        block(x, **kwargs)
    return [e.op for e in events]


@pytest.mark.parametrize("name", ["BasicBlock", "PreActBasicBlock"])
def test_it_costs_no_pass(name):
    x = randn(X)
    scaled, plain = pair(name, "LayerScale")[0], getattr(fusedres, name)(16, 16)
    assert ops_of(scaled, x) == ops_of(plain, x)
    with torch.no_grad():
        assert ops_of(scaled.eval(), x)[:2] == ops_of(plain.eval(), x)[:2]


def test_a_folded_weight_follows_the_gain():
    ours, formula = pair("BasicBlock", "LayerScale")
    ours.eval(), formula.eval()
    x = randn(X)
    with torch.no_grad():
        for value in (0.3, 0.7, 0.7):
            for m in (ours, formula):
                m.block.residual_scale.weight.fill_(value)
            check_module(ours, formula, x, graded=False)


def test_a_block_that_starts_as_the_identity():
    block = fusedres.PreActBasicBlock(16, 16, residual_scale=fusedres.ResidualScale())
    x = randn(X).requires_grad_()
    y = block(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert block.residual_scale.weight.grad.abs() > 0
    assert block.conv2.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("make,error,message", [
    (lambda: fusedres.ResidualScale(0), ValueError, "channels: wanted a number >= 1, got 0"),
    (lambda: fusedres.BasicBlock(8, 8, residual_scale=0.1), TypeError, "residual_scale: wanted a fus"),
    (lambda: fusedres.BasicBlock(8, 8, residual=False, residual_scale=fusedres.ResidualScale()),
     ValueError, "residual: wanted True"),
    (lambda: fusedres.ResidualScale(8, dim=2), ValueError, "dim: wanted 1 or -1, got 2"),
    (lambda: fusedres.BasicBlock(8, 8, residual_scale=fusedres.ResidualScale(8, dim=-1)),
     ValueError, "residual_scale: wanted dim=1 in a block, got -1"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
    scaling = fusedres.ResidualScale(5)
    with Unchanged(scaling), pytest.raises(ValueError, match="weight: wanted shape"):
        scaling(randn(X), randn(X))
    tokens = fusedres.ResidualScale(5, dim=-1)
    with pytest.raises(ValueError, match=r"scale: wanted shape \(2,\), got \(3,\)"):
        tokens(randn((2, 3, 5)), randn((2, 3, 5)), torch.ones(3))
    with pytest.raises(ValueError, match=r"x: wanted shape \(2, 3, 5\), got \(2, 4, 5\)"):
        tokens(randn((2, 3, 5)), randn((2, 4, 5)))


@pytest.mark.parametrize("dim", [1, -1])
def test_traces_keep_the_scale(dim):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = fusedres.ResidualScale(6, init=0.3, dim=dim)

        def forward(self, branch, x, scale):
            return self.scaling(branch, x, scale)

    def inputs(n: int, tokens: int):
        shape = (n, 6, tokens) if dim == 1 else (n, tokens, 6)
        return randn(shape), randn(shape), torch.rand(n)

    adds = Adds()
    for traced in (torch.fx.symbolic_trace(adds), torch.jit.trace(adds, inputs(2, 3))):
        other = inputs(4, 5)
        torch.testing.assert_close(traced(*other), adds(*other))


def test_a_tangent_goes_through_a_frozen_block():
    block = fusedres.BasicBlock(8, 8, residual_scale=fusedres.ResidualScale(8, 0.5)).eval()
    randomise(block)
    block.requires_grad_(False)
    x, params = randn((2, 8, 5, 5)), dict(block.named_parameters())
    ones = {name: torch.ones_like(p) for name, p in params.items()}

    def tangent(module):
        def fn(given):
            return torch.func.functional_call(module, given, (x,))

        return torch.func.jvp(fn, (params,), (ones,))[1]

    torch.testing.assert_close(tangent(block), tangent(fusedres.unfuse(block)))
