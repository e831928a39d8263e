"""verify: correct models pass in every dtype and mode, planted bugs fail, nothing is touched."""

from __future__ import annotations

import collections
import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import accuracy
import fusedres
from fusedres import reference
from fusedres.blocks import unit
from fusedres.convert import fuse
from fusedres.ops import bn_act, packing
from fusedres.report import verify
from fusedres.report.accuracy import errors
from fusedres.report.execute import on_plain_modules, summed_elements
from fusedres.report.kinks import Kinks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


def network() -> nn.Module:
    """Every kind of block, thin; batch norm with parameters and statistics of its own."""
    down = [nn.Sequential(nn.Conv2d(c, 2 * c, 1, 2), nn.BatchNorm2d(2 * c)) for c in (8, 16)]
    model = nn.Sequential(
        fusedres.ConvBNAct2d(3, 8, 3),
        nn.MaxPool2d(3, 2, 1),
        fusedres.BasicBlock(8, 16, 2, down[0]),
        fusedres.Bottleneck(16, 4),
        fusedres.SEBottleneck(16, 8, 2, down[1]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 24, 24).to(dtype)


def failing(verification) -> set[str]:
    assert not verification.ok
    return {row.name for row in verification.rows if not row.ok}


# --- what is right passes


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_correct_network_passes(dtype, train):
    model, x = network().to(dtype), images(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        found = verify(model, x, train=train)
        assert found.ok, str(found)
    names = {row.name for row in found.rows}
    assert {"output", "buffer 0.bn.running_mean", "buffer 0.bn.num_batches_tracked"} <= names
    wanted = {"gradient of 0.conv.weight", "gradient of 7.bias", "gradient of input 0"}
    assert wanted <= names if train else not any(n.startswith("gradient") for n in names)
    assert all(0 < row.bound < 10 for row in found.rows if row.name == "output")


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_correct_network_passes_under_autocast(train):
    with torch.autocast("cpu", torch.bfloat16):
        found = verify(network(), images(), train=train)
    assert found.ok, str(found)
    (output,) = (row for row in found.rows if row.name == "output")
    assert output.errors.l2_eager > 100 * EPS  # eager too ran in bfloat16


def test_correct_model_passes():
    model = fusedres.models.resnet18(num_classes=10)
    found = verify(model, torch.randn(2, 3, 40, 40), train=True)
    assert found.ok, found.table(10)


def test_fused_model_passes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for train in (False, True):
        assert verify(fuse(model), images(), train=train).ok


def test_length_of_the_sums():
    model = on_plain_modules(network())
    model(images())
    lengths = summed_elements(model)
    assert lengths["gradient of 0.conv.weight"] == lengths["gradient of 0.bn.bias"] == 4 * 24 * 24
    assert lengths["gradient of 2.conv2.weight"] == 4 * 6 * 6
    assert lengths["gradient of 4.se.fc1.weight"] == lengths["gradient of 7.bias"] == 4


def test_gradient_that_cancels_passes():
    """A bias before a batch norm has no gradient: all there is, in every execution, is rounding."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    for dtype in DTYPES:
        model.to(dtype)
        assert verify(fuse(model), images(dtype), train=True).ok


def test_random_layers_draw_alike():
    model = nn.Sequential(network()[:3], nn.Dropout(0.5), fusedres.Bottleneck(16, 4))
    assert verify(model, images(), train=True).ok


# --- what is wrong does not


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


@pytest.mark.parametrize("statistic", ["mean", "var"])
def test_wrong_running_statistic_fails(statistic, monkeypatch):
    update = unit.update_running_stats

    def wrong(running_mean, running_var, mean, var, x, momentum):
        scale = {"mean": 1.0, "var": 1.0, statistic: 1.01}
        update(running_mean, running_var, mean * scale["mean"], var * scale["var"], x, momentum)

    monkeypatch.setattr(unit, "update_running_stats", wrong)
    names = failing(verify(network(), images(), train=True))
    assert names and all(name.endswith(f"running_{statistic}") for name in names)


def test_batch_counted_twice_fails(monkeypatch):
    track = unit.track

    def wrong(norm, *args):
        track(norm, *args)
        norm.module.num_batches_tracked.add_(1)

    monkeypatch.setattr("fusedres.blocks.training.track", wrong)
    assert all("num_batches" in n for n in failing(verify(network(), images(), train=True)))


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

    def __init__(self, wrong):
        super().__init__()
        self.linear, self.wrong = nn.Linear(4, 4), wrong

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


# --- interface


def test_model_inputs_and_random_state_are_untouched():
    model = network()
    model[0].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    x = images().requires_grad_()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    before = {n: (t.detach().clone(), t._version) for n, t in tensors.items()}
    modes = [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    for train in (False, True):
        with torch.no_grad():
            verify(model, x, train=train)
            assert not torch.is_grad_enabled()
    for name, t in tensors.items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1], name
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert x.grad is None and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


class Named(collections.OrderedDict):
    """A mapping that pytree does not know, as model outputs may be."""


class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = fusedres.BasicBlock(8, 8)

    def forward(self, x, scale):
        y = self.block(x)
        hidden = (x, [y * scale["by"]])
        return Named(logits=y.mean((2, 3)), hidden=hidden, label=y.argmax(1), loss=None)


def test_nested_inputs_and_outputs():
    scale = {"by": torch.tensor(2.0), "count": torch.tensor(3)}
    found = verify(ManyOutputs(), torch.randn(2, 8, 6, 6), scale, train=True)
    assert found.ok, str(found)
    names = [row.name for row in found.rows if row.name.startswith("output")]
    assert names == ["output.logits", "output.hidden 0", "output.hidden 1 0", "output.label"]
    inputs = [row.name for row in found.rows if row.name.startswith("gradient of input")]
    assert inputs == ["gradient of input 0", "gradient of input 1"]


class Nothing(nn.Module):
    def forward(self, x):
        return None


def test_errors():
    with pytest.raises(TypeError, match="wanted a torch.nn.Module, got int"):
        verify(3, images())
    with pytest.raises(ValueError, match="returns tensors"):
        verify(Nothing(), images())
    with pytest.raises(RuntimeError, match="channels"):
        verify(network(), torch.randn(2, 5, 8, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        verify(fusedres.BasicBlock(3, 3), torch.randn(1, 3, 1, 1), train=True)


@pytest.mark.parametrize("rich", [True, False])
def test_table(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    right = reference.batch_norm
    good = verify(network(), images())
    monkeypatch.setattr(reference, "batch_norm", lambda *args: 1.01 * right(*args))
    with fusedres.backend("reference"):
        bad = verify(network(), images())
    assert len(str(good).splitlines()) == 2 + len(good.rows) + 1
    assert f"all {len(good.rows)} ok" in str(good) and "FAIL" not in str(good)
    assert f"1 of {len(bad.rows)} FAIL" in str(bad)
    lines = bad.table(worst=3).splitlines()
    assert len(lines) == 2 + 3 and "output" in lines[2] and "FAIL" in lines[2]


# --- the rule


def test_rule():
    ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -4.0 + 2**-10])
    out = torch.tensor([1.0 + 2**-9, -4.0])
    found = errors(out, ref, eager)
    norm = 17**0.5
    assert (found.max_error, found.max_eager) == (2**-9, 2**-10)
    assert found.max_bound == pytest.approx(2 * 2**-10 + 4 * EPS * 4, rel=1e-12)
    assert found.l2_error == pytest.approx(2**-9 / norm)
    assert found.l2_bound == pytest.approx(2 * 2**-10 / norm + 4 * EPS, rel=1e-12)
    assert found.ok and 0.9 < found.ratio < 1
    assert not errors(out, ref, ref.float()).ok
    assert not errors(ref.float() * (1 + 3 * 2**-10), ref, eager).ok
    sums = errors(out, ref, eager, gradient=True, count=100)
    assert sums.max_bound == pytest.approx(3 * 2**-10 + 4 * EPS * 10 * 4, rel=1e-12)
    assert errors(out, ref, [ref.float(), eager]) == found
    scaled = errors(out, ref, eager, scale=8.0)
    assert scaled.max_bound == pytest.approx(2 * 2**-10 + 4 * EPS * 8, rel=1e-12)
    assert scaled.l2_bound == pytest.approx((2 * 2**-10 + 4 * EPS * 8 * 2**0.5) / norm, rel=1e-12)


def test_rule_takes_the_l2_norm_as_well():
    ref = torch.zeros(1000, dtype=torch.float64)
    eager, out = ref.float(), ref.float()
    eager[0], out[:] = 1.0, 1.0
    found = errors(out, ref, eager)
    assert found.max_error <= found.max_bound and not found.ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rule_for_values_that_are_not_finite(value):
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    bad = torch.tensor([1.0, value])
    assert not errors(bad, ref, ref.float()).ok
    assert errors(bad, ref, bad).ok  # eager overflows there as well
    assert errors(bad, bad.double(), bad).ok
    assert not errors(ref.float(), bad.double(), bad).ok


def test_rule_for_integers_and_empty_tensors():
    one = torch.tensor(1)
    assert errors(one, one.double(), one).ok
    assert not errors(one + 1, one.double(), one).ok
    empty = torch.empty(0, 3)
    assert errors(empty, empty.double(), empty).ok
    with pytest.raises(ValueError, match=r"out: wanted ref's shape \(0, 3\), got \(2,\)"):
        errors(torch.ones(2), empty.double(), empty)


def test_one_rule_for_the_tests_and_for_verify():
    assert accuracy.errors is errors


# --- kinks


IN_PLACE = {
    "function": lambda z: F.relu(z),
    "module": lambda z: nn.ReLU()(z),
    "method": lambda z: z.relu(),
    "module in place": lambda z: nn.ReLU(inplace=True)(z * 1),
    "in place, by position": lambda z: F.relu(z * 1, True),
    "method in place": lambda z: (z * 1).relu_(),
}


def sides(fn, z: Tensor, other: Tensor) -> list[list[float]]:
    """fn's derivative at z, and on either side of it, when ``other`` was recorded."""
    kinks = Kinks()
    with kinks.recording():
        fn(other.clone())
    z = z.clone().requires_grad_()
    with kinks.moving():
        y = fn(z)
    assert torch.equal(y, fn(z.detach()))
    found = []
    for sign in (0, 1, -1):
        with kinks.side(sign):
            found.append(torch.autograd.grad(y.sum(), z, retain_graph=True)[0].tolist())
    return found


@pytest.mark.parametrize("fn", IN_PLACE.values(), ids=IN_PLACE)
def test_only_units_within_rounding_change_sides(fn):
    z = torch.tensor([-1.0, -1e-8, 0.0, 1e-8, 1.0], dtype=torch.float64)
    assert sides(fn, z, z + 2e-8) == [[0, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    exact = [0, 0, 0, 1, 1]
    assert sides(fn, z, z) == [exact, exact, exact]


def test_in_place_functions_still_write_their_input():
    kinks = Kinks()
    with kinks.recording(), torch.no_grad():
        for fn in (nn.ReLU(inplace=True), torch.relu_, lambda z: F.relu6(z, True)):
            z = torch.tensor([-1.0, 1.0])
            assert fn(z) is z and z.tolist() == [0, 1]


def test_other_kinks():
    z = torch.tensor([-1e-8, 3.0, 6 + 1e-8, 7.0], dtype=torch.float64)
    assert sides(nn.ReLU6(), z, z + 2e-8) == [[0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    pixels = torch.tensor([[[[1.0, 1 + 1e-9], [0.0, 0.5]]]], dtype=torch.float64)
    _, one, other = sides(nn.MaxPool2d(2), pixels, pixels + 1e-6)
    picked = [[[[1, 0], [0, 0]]]], [[[[0, 1], [0, 0]]]]
    assert sorted((one, other)) == sorted(picked)


def test_unit_that_flips_does_not_fail():
    """Ours stops a gradient that the reference passes, within rounding: that is no bug."""

    def flipped(y):
        return torch.where(y.abs() < 1e-6, (y * 0).detach(), y)

    class Tie(OnlyWhenFused):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = Tie(flipped)
    x = torch.randn(3, 4)
    with torch.no_grad():
        exact = copy.deepcopy(model.linear).double()(x.double())
        model.linear.bias[0] += 1e-8 - exact[1, 0].item()
    assert verify(model, x, train=True).ok
    model.wrong = lambda y: torch.where(y.abs() < y.abs().median(), (y * 0).detach(), y)
    assert not verify(model, x, train=True).ok
