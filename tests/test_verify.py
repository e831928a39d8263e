"""verify: correct models pass in every dtype and mode, and nothing is touched."""

from __future__ import annotations

import collections
import sys

import pytest
import torch
from torch import nn

import fusedres
from fusedres import reference
from fusedres.convert import fuse
from fusedres.report import verify
from fusedres.report.execute import on_plain_modules, summed_elements
from thin_network import images, network

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


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
    assert len(str(good).splitlines()) == 3 + min(12, len(good.rows)) + 1
    assert len(good.table().splitlines()) == 2 + len(good.rows)
    assert f"all {len(good.rows)} ok" in str(good) and "FAIL" not in str(good)
    assert f"1 of {len(bad.rows)} FAIL" in str(bad)
    lines = bad.table(worst=3).splitlines()
    assert len(lines) == 2 + 3 and "output" in lines[2] and "FAIL" in lines[2]
