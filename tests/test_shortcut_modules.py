"""A block's drop path and residual scale are modules: hooked or of another class, they are called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fusedres
from cases import randn
from fusedres import observers
from modules import check_module, randomise

X = (4, 16, 7, 7)
blocks = pytest.mark.parametrize(
    "name", ["BasicBlock", "Bottleneck", "SEBasicBlock", "PreActBasicBlock", "PreActBottleneck"]
)


class Halved(fusedres.DropPath):
    """A drop path with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Subtracted(fusedres.ResidualScale):
    """A scale with a forward of its own, and with fewer arguments."""

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) - branch


class ByHand(nn.Module):
    """A block in plain PyTorch: its modules, called one after the other."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, x: Tensor) -> Tensor:
        b, h = self.block, x
        pre_activation = hasattr(b, "norm1")
        for i in range(1, 4 if hasattr(b, "conv3") else 3):
            conv = getattr(b, f"conv{i}")
            if pre_activation:
                h = conv(torch.relu(getattr(b, f"norm{i}")(h)))
            else:
                h = getattr(b, f"bn{i}")(conv(torch.relu(h) if i > 1 else h))
        h = b.se(h) if hasattr(b, "se") else h
        h = h if b.drop_path is None else b.drop_path(h)
        y = h + x if b.residual_scale is None else b.residual_scale(h, x)
        return y if pre_activation else torch.relu(y)


class Called(nn.Module):
    """A block under the keys of ``ByHand``."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def block_of(name: str, drop_path=0.0, residual_scale=None) -> nn.Module:
    planes = 16 if "Basic" in name else 4
    options = dict(drop_path=drop_path, residual_scale=residual_scale)
    return randomise(getattr(fusedres, name)(16, planes, **options))


def reasons_of(block: nn.Module, x: Tensor) -> list[str]:
    events: list[observers.Event] = []
    with observers.observe(events.append):
        block(x)
    return [e.reason for e in events if e.op == "shortcut"]


@blocks
@pytest.mark.parametrize("which", ["drop path", "scale", "both"])
def test_a_forward_of_their_own(name, which):
    drop = Halved(0.5) if which != "scale" else fusedres.DropPath(0.0)
    scaling = Subtracted(16, init=0.7) if which != "drop path" else None
    block, x = block_of(name, drop, scaling), randn(X, layout="NHWC")
    check_module(Called(block), ByHand(block), x, steps=2)
    assert reasons_of(block, x)[0].endswith("has a forward of its own")
    plain = ByHand(block)
    check_module(Called(fusedres.unfuse(block)), plain, x)


@blocks
def test_hooks_are_called_and_may_change_the_result(name):
    block, x = block_of(name, fusedres.DropPath(0.0), fusedres.ResidualScale(16)), randn(X)
    plain = ByHand(block)
    for b in (block, plain.block):
        b.drop_path.register_forward_hook(lambda module, args, y: 3 * y)
        b.residual_scale.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))
    check_module(Called(block), plain, x)
    assert reasons_of(block, x) == ["DropPath has hooks"]


@blocks
def test_another_module_in_the_place_of_drop_path(name):
    block, x = block_of(name), randn(X)
    block.drop_path = nn.Hardtanh(-0.5, 0.5)
    check_module(Called(block), ByHand(block), x)


@blocks
def test_a_hook_that_is_removed_costs_nothing_any_more(name):
    block, x = block_of(name, fusedres.DropPath(0.5)), randn(X)
    block.drop_path.register_forward_hook(lambda module, args, y: None).remove()
    assert not reasons_of(block, x)


@blocks
def test_in_batch_mode_the_drop_comes_before_the_branch_hooks_or_not(name):
    block = block_of(name, fusedres.DropPath(1.0, "batch"), fusedres.ResidualScale(16))
    called = []
    for module in (block.drop_path, block.residual_scale):
        module.register_forward_hook(lambda module, args, y: called.append(module))
    x = randn(X).relu()
    for b in (block, fusedres.unfuse(block)):
        assert torch.equal(b(x), x) and not called
