"""verify: planted bugs fail, in the rows that they are in, and what only looks like one passes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres import reference
from fusedres.blocks import unit
from fusedres.ops import bn_act, packing
from fusedres.report import verify
from fusedres.report.kinks import Kinks
from thin_network import images, network


def failing(verification) -> set[str]:
    assert not verification.ok
    return {row.name for row in verification.rows if not row.ok}


def test_perturbed_folded_weight_fails(monkeypatch):
    fold = packing.fold

    def wrong(*args):
        weight, bias = fold(*args)
        weight[0, 0] *= 1.01
        return weight, bias

    model, x = network(), images()
    assert verify(model, x).ok
    monkeypatch.setattr(packing, "fold", wrong)
    assert "output" in failing(verify(model, x))


class SpoilsABuffer(nn.Module):
    """A network that is right but for a buffer, unless its modules have hooks."""

    def __init__(self, spoil):
        super().__init__()
        self.net, self.spoil = network(), spoil

    def forward(self, x):
        y = self.net(x)
        norm = self.net[2].bn1
        if not norm._forward_hooks:
            self.spoil(norm)
        return y


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("buffer", "spoil"),
    [
        ("running_mean", lambda norm: norm.running_mean.mul_(1.001)),
        ("running_var", lambda norm: norm.running_var[0].mul_(1.001)),
        ("num_batches_tracked", lambda norm: norm.num_batches_tracked.add_(1)),
    ],
    ids=["mean", "variance", "count"],
)
def test_wrong_running_statistic_fails(buffer, spoil, train):
    found = verify(SpoilsABuffer(spoil), images(), train=train)
    assert failing(found) == {f"buffer net.2.bn1.{buffer}"}


def test_reference_does_not_share_the_blocks_bookkeeping(monkeypatch):
    update = unit.update_running_stats

    def wrong(running_mean, running_var, mean, *args):
        update(running_mean, running_var, 1.01 * mean, *args)

    monkeypatch.setattr(unit, "update_running_stats", wrong)
    names = failing(verify(network(), images(), train=True))
    assert names and all(name.endswith("running_mean") for name in names)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_reference_kernel_off_by_one_percent_fails(train, monkeypatch):
    right = reference.batch_norm
    monkeypatch.setattr(reference, "batch_norm", lambda *args: 1.01 * right(*args))
    with fusedres.backend("reference"):
        assert "output" in failing(verify(network(), images(), train=train))


@pytest.fixture
def native_bn_act_off_by_one_percent():
    """The compiled kernel is replaced: the library's dispatch, not PyTorch's, must find it out."""

    def wrong(*args):
        y, *rest = bn_act._reference(*args)
        return 1.01 * y, *rest

    library = torch.library.Library("fusedres_native", "IMPL")
    library.impl("bn_act", wrong, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_native_kernel_off_by_one_percent_fails(native_bn_act_off_by_one_percent):
    assert "output" in failing(verify(network(), images(), train=True))


class GradientOffByOnePercent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy


def test_gradient_off_by_one_percent_fails(monkeypatch):
    right = reference.batch_norm
    monkeypatch.setattr(
        reference, "batch_norm", lambda *args: GradientOffByOnePercent.apply(right(*args))
    )
    with fusedres.backend("reference"):
        names = failing(verify(network(), images(), train=True))
    assert all(name.startswith("gradient") for name in names)
    assert "gradient of 4.bn3.weight" in names and "gradient of 0.conv.weight" in names


def test_bfloat16_finds_what_is_wrong_by_more_than_its_rounding(monkeypatch):
    right = reference.batch_norm
    monkeypatch.setattr(reference, "batch_norm", lambda *args: 1.2 * right(*args))
    with fusedres.backend("reference"):
        model, x = network().bfloat16(), images(torch.bfloat16)
        assert "output" in failing(verify(model, x, train=True))


class OnlyWhenFused(nn.Module):
    """Does something else unless a module of it has hooks, as a wrong fused block would."""

    def __init__(self, wrong, outputs=4):
        super().__init__()
        self.linear, self.wrong = nn.Linear(4, outputs), wrong

    def forward(self, x):
        y = self.linear(x)
        return y if self.linear._forward_hooks else self.wrong(y)


def test_lost_gradient_and_nan_fail():
    x = torch.randn(3, 4)
    lost = verify(OnlyWhenFused(lambda y: y.detach() + 0 * y), x, train=True)
    assert failing(lost) == {
        f"gradient of {n}" for n in ("linear.weight", "linear.bias", "input 0")
    }
    nan = verify(OnlyWhenFused(lambda y: y.masked_fill(y == y.max(), float("nan"))), x)
    assert failing(nan) == {"output"}
    assert verify(OnlyWhenFused(lambda y: y), x, train=True).ok


def test_unit_within_rounding_of_zero_is_no_bug(monkeypatch):
    """Ours stops a gradient at a ReLU that the reference, and eager, happen to pass."""

    class Tie(OnlyWhenFused):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = Tie(lambda y: torch.where(y.abs() < 1e-7, (0 * y).detach(), y), outputs=16)
    with torch.no_grad():
        model.linear.weight.normal_(std=100)
        model.linear.weight[0] = torch.tensor([1.0, -1.0, 2**-24, 0.0])  # the row gives 2^-24
        model.linear.bias[0] = 0
    x = torch.ones(1, 4)
    assert verify(model, x, train=True).ok
    monkeypatch.setattr(Kinks, "side", lambda self, sign: contextlib.nullcontext())
    names = {"gradient of linear.weight", "gradient of linear.bias", "gradient of input 0"}
    assert failing(verify(model, x, train=True)) & names
