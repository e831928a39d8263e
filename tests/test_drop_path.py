"""Stochastic depth: the module, blocks and networks with it, and what the tail of a block runs."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fusedres
import zoo
from accuracy import assert_as_accurate_as_eager
from cases import backends, layouts, randn
from fusedres import observers
from fusedres.convert.forwards import residual_block
from harness import Unchanged
from modules import PLAIN_BLOCKS, block_pair, check_module, projection, randomise, results, twins

X = (8, 16, 7, 7)


class Dropped(nn.Module):
    """A torchvision block whose branch goes through torchvision's StochasticDepth."""

    def __init__(self, block: nn.Module, p: float, mode: str):
        super().__init__()
        self.block, self.drop = block, torchvision.ops.StochasticDepth(p, mode)

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        torch.manual_seed(5)
        out = b.relu(b.bn1(b.conv1(x)))
        if hasattr(b, "conv3"):
            out = b.bn3(b.conv3(b.relu(b.bn2(b.conv2(out)))))
        else:
            out = b.bn2(b.conv2(out))
        out = self.drop(b.se(out) if hasattr(b, "se") else out)
        return b.relu(out + (x if b.downsample is None else b.downsample(x)))


class Seeded(nn.Module):
    """One of our blocks under the same seed and keys as ``Dropped``."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return self.block(x)


def pair(name: str, p: float, mode: str = "row", project: bool = True):
    planes, made = 16 if "Basic" in name else 4, []
    for cls in (getattr(fusedres, name), PLAIN_BLOCKS[name]):
        down = projection(16, planes * cls.expansion, 2) if project else None
        options = (
            dict(drop_path=fusedres.DropPath(p, mode)) if cls.__module__[:5] == "fused" else {}
        )
        made.append(cls(16, planes, 2 if project else 1, down, **options))
    return twins(Seeded(made[0]), Dropped(made[1], p, mode))


# --- the module


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_it_is_torchvisions(p, dtype, mode):
    ours, peer = fusedres.DropPath(p, mode), torchvision.ops.StochasticDepth(p, mode)
    for shape in ((16, 3, 5, 5), (16, 3)):
        x, found = randn(shape, dtype), []
        for module in (ours, peer):
            torch.manual_seed(2)
            found.append(module(x))
        ref = x.double() * (found[1].double() != 0) / max(1 - p, 0.1)
        assert_as_accurate_as_eager(found[0], ref, found[1])
    assert ours.eval()(x) is x


def test_it_is_timms():
    for keep in (True, False):
        ours, peer = fusedres.DropPath(0.4, "row", keep), timm.layers.DropPath(0.4, keep)
        x, found = randn((32, 3, 4, 4)), []
        for module in (ours, peer):
            torch.manual_seed(2)
            found.append(module(x) != 0)
        assert torch.equal(*found)


def test_a_generator_makes_it_reproducible():
    x = torch.ones(64, 2, 3, 3)
    draws = []
    for _ in range(2):
        torch.randn(7)  # the global generator moves on
        drop = fusedres.DropPath(0.5, generator=torch.Generator().manual_seed(3))
        draws.append((drop(x), drop(x)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(*draws[0])


@pytest.mark.parametrize("make,error,message", [
    (lambda: fusedres.DropPath(1.5), ValueError, "p: wanted a probability from 0 to 1, got 1.5"),
    (lambda: fusedres.DropPath(0.1, "rows"), ValueError, "mode: wanted one of 'row', 'batch', got"),
    (lambda: fusedres.BasicBlock(8, 8, drop_path=-1), ValueError, "drop_path: wanted a probability"),
    (lambda: fusedres.BasicBlock(8, 8, drop_path="a"), TypeError, "drop_path: wanted .* got str"),
    (lambda: fusedres.BasicBlock(8, 8, drop_path=0.1, residual=False), ValueError, "residual: want"),
    (lambda: fusedres.Bottleneck(8, 8, 1, nn.Conv2d(8, 32, 1), residual=False), ValueError, "resid"),
    (lambda: fusedres.models.resnet18(drop_path_rate=2), ValueError, "drop_path_rate: wanted"),
    (lambda: fusedres.models.resnet18(drop_path_rate=0.1, drop_path_mode="x"), ValueError, "mode:"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- in a block


@backends
@pytest.mark.parametrize("layout,project", [("NCHW", True), ("NHWC", False), ("NHWC", True)])
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "SEBottleneck"])
def test_a_block_against_torchvisions_stochastic_depth(name, layout, project, backend):
    fused, plain = pair(name, 0.5, project=project)
    x = randn(X, layout=layout)
    with fusedres.backend(backend):
        check_module(fused, plain, x, steps=2)
        fused.eval(), plain.eval()
        check_module(fused, plain, x)


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_certain_and_impossible_drops(p, mode):
    fused, plain = pair("BasicBlock", p, mode, project=False)
    x = randn(X, layout="NHWC")
    with torch.no_grad(), Unchanged(x):
        out, eager = fused(x), plain(x)
    ref = copy.deepcopy(plain).double()(x.double())
    assert_as_accurate_as_eager(out, ref.detach(), eager)
    if p == 1.0:
        assert torch.equal(out, torch.relu(x))


def test_batch_mode_skips_the_work_of_a_dropped_block():
    fused, plain = pair("Bottleneck", 0.5, "batch")
    x = randn(X, layout="NHWC")
    kept = []
    for seed in range(8):
        for block in (fused, plain):
            block.train()
        events, before = [], int(fused.block.bn1.num_batches_tracked)
        torch.manual_seed(seed)
        with observers.observe(events.append):
            y = fused.block(x)
        torch.manual_seed(seed)
        ran = bool(torch.empty(1).bernoulli_(0.5))
        kept.append(ran)
        convolutions = [e for e in events if e.op == "conv_stats"]
        assert len(convolutions) == (4 if ran else 1)  # the projection is always run
        assert int(fused.block.bn1.num_batches_tracked) == before + ran
        if not ran:
            y.sum().backward()
            assert fused.block.conv1.weight.grad is None
            assert fused.block.downsample[0].weight.grad is not None
            fused.zero_grad()
    assert set(kept) == {True, False}


@layouts
def test_no_pass_of_its_own(layout):
    """Scale, both norms, addition and ReLU are one op, forward and backward."""
    for name in ("BasicBlock", "Bottleneck"):
        fused, _ = pair(name, 0.5)
        events = []
        with observers.observe(events.append):
            y = fused(randn(X, layout=layout))
            forward = [e.op for e in events]
            y.sum().backward()
        convolutions = 3 if name == "BasicBlock" else 4
        tails = [op for op in forward if op not in ("conv_stats", "bn_stats")]
        prologues = convolutions - 2  # each inner convolution's, applied as it reads
        assert tails == ["bn_act"] * prologues + ["residual_add"]
        assert [e.op for e in events].count("residual_add_backward") == 1
        assert not any(e.reason for e in events)


def test_a_projection_is_applied_by_the_addition():
    fused, _ = block_pair("BasicBlock", stride=2)
    events = []
    with observers.observe(events.append):
        fused(randn(X))
    assert [e.op for e in events if e.op not in ("conv_stats", "bn_stats")] == [
        "bn_act", "residual_add",
    ]  # fmt: skip
    events.clear()
    with observers.observe(events.append), torch.no_grad():
        fused.eval()(randn(X))
    assert {e.op for e in events} == {"conv_bn_act"}


def test_second_derivatives_through_a_block():
    fused, plain = (b.double() for b in pair("Bottleneck", 0.5))
    x, found = randn((4, 16, 5, 5), torch.float64).requires_grad_(), []
    for block in (fused, plain):
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(block.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_into_one_graph():
    for mode in ("row", "batch"):
        fused, _ = pair("BasicBlock", 0.5, mode)
        compiled = torch.compile(fused.block, fullgraph=True, backend="aot_eager")
        y = compiled(randn(X))
        y.sum().backward()
        assert all(p.grad is not None for p in fused.parameters())


# --- in a network


def test_a_network_against_timms():
    """The linear schedule and the random numbers are timm's; the parameters by their order."""
    options = dict(num_classes=5, drop_path_rate=0.6)
    peer = timm.create_model("resnet18", **options)
    ours = fusedres.models.resnet18(**options)
    ours.load_state_dict(peer.state_dict())
    blocks = [m for m in peer.modules() if isinstance(m, timm.models.resnet.BasicBlock)]
    wanted = [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]
    drops = [m for m in ours.modules() if isinstance(m, fusedres.BasicBlock)]
    found = [0.0 if b.drop_path is None else b.drop_path.p for b in drops]
    assert torch.allclose(torch.tensor(found), torch.tensor(wanted))
    randomise(peer)
    ours.load_state_dict(peer.state_dict())
    x = zoo.images(6, 40)
    for dtype in (torch.float64,):
        pair_ = [m.to(dtype).train() for m in (ours, peer)]
        torch.testing.assert_close(*(zoo.train_step(m, x.to(dtype)) for m in pair_))


def test_fuse_unfuse_explain_and_verify():
    model = fusedres.models.resnet18(num_classes=3, drop_path_rate=0.4, drop_path_mode="batch")
    x = zoo.images(4, 40)
    verified = fusedres.verify(model, x, train=True)
    assert verified.ok, str(verified)
    plain = fusedres.unfuse(model)
    assert "residual_add" in {r.op for r in fusedres.explain(model, x).rows}
    assert not {r.op for r in fusedres.explain(plain, x).rows} & {"residual_add", "bn_act"}
    for seed in (1, 2):
        found = []
        for m in (copy.deepcopy(model).double(), copy.deepcopy(plain).double()):
            torch.manual_seed(seed)
            found.append(results(m, x.double()))
        torch.testing.assert_close(*found)


def test_a_sum_in_float32_under_autocast_drops_the_branch():
    """timm's ``a + b`` of a bfloat16 branch and a float32 shortcut."""
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    x, drawn = randn((2, 4, 5, 5)), []

    def nothing(branch):
        drawn.append(branch.dtype)
        return torch.zeros(len(branch), dtype=branch.dtype)

    with torch.autocast("cpu", torch.bfloat16):
        y = residual_block(x, body, skip=None, act=nn.Identity(), row_scale=nothing, promotes=True)
    assert torch.equal(y, x) and drawn == [torch.bfloat16]
