"""explain: every row of a forward, honest sums, and a model that is left as it was."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules import module as global_hooks

import fusedres
from fusedres.convert import fuse
from fusedres.report import explain


def block(**kwargs) -> nn.Module:
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return fusedres.BasicBlock(8, 16, 2, downsample, **kwargs)


def images(channels: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8)


def listed(explanation) -> list[tuple[str, str, str]]:
    return [(r.module, r.op, r.backend) for r in explanation.rows]


def test_inference_of_a_block_is_one_call_a_convolution():
    model = nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    with torch.no_grad():
        found = explain(model, images())
    assert listed(found) == [
        ("0", "conv_bn_act", "onednn"),
        ("0", "conv_bn_act", "onednn"),
        ("0", "conv_bn_act", "onednn"),
        ("1", "AdaptiveAvgPool2d", "torch"),
        ("3", "Linear", "torch"),
    ]
    assert [r.reason for r in found.rows] == [None] * 5
    assert 0.8 < found.fused < 1
    x, y = 4 * 2 * 8 * 64, 4 * 2 * 16 * 16
    projection, first, second = 4 * 8 * 16, 4 * 8 * 16 * 9, 4 * 16 * 16 * 9
    moved = [x + first + y, x + projection + y, y + second + 2 * y]
    eager = [x + first + 5 * y, x + projection + 3 * y, y + second + 8 * y]
    assert [r.bytes_moved for r in found.rows[:3]] == moved
    assert [r.eager_bytes for r in found.rows[:3]] == eager


def test_training_of_a_block():
    found = explain(nn.Sequential(block()).train(), images())
    assert {r.module for r in found.rows} == {"0"}
    native = [r.op for r in found.rows if r.backend == "native"]
    assert native.count("bn_act") == 1  # the first norm's
    assert native.count("residual_add") == 1  # the tail, with the projection's norm
    assert [r.op for r in found.rows].count("conv_stats") == 3
    assert found.fused == 1 and found.bytes_moved < found.eager_bytes


def test_totals_are_sums_of_the_rows():
    found = explain(nn.Sequential(block(), nn.MaxPool2d(2)), images())
    for field in ("launches", "bytes_moved", "eager_bytes"):
        assert getattr(found, field) == sum(getattr(row, field) for row in found.rows) > 0
    fused = sum(r.eager_bytes for r in found.rows if r.backend != "torch")
    assert found.fused == fused / found.eager_bytes


def test_a_module_of_pytorch_counts_inputs_outputs_and_parameters():
    (row,) = explain(nn.Linear(5, 3), torch.randn(4, 5)).rows
    moved = 4 * (4 * 5 + 4 * 3 + 5 * 3 + 3)
    assert (row.bytes_moved, row.eager_bytes, row.launches) == (moved, moved, 1)
    assert (row.module, row.op, row.backend, row.reason) == ("", "Linear", "torch", None)
    (row,) = explain(nn.ReLU(inplace=True), torch.randn(4, 5)).rows
    assert row.bytes_moved == 4 * 2 * 20
    assert row.reason == "not in a fused block"


def test_modules_that_hand_their_input_on_have_no_row():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Flatten()).eval()
    assert explain(model, images()).rows == ()


def test_reasons_of_unfused_parts():
    found = explain(nn.Sequential(block(norm_layer=lambda c: nn.GroupNorm(4, c))), images())
    reason = "GroupNorm is not a batch norm of this library or PyTorch"
    reasons = {(r.module, r.op): r.reason for r in found.rows if r.backend == "torch"}
    assert reasons == {
        ("0.conv1", "Conv2d"): reason,
        ("0.bn1", "GroupNorm"): reason,
        ("0.conv2", "Conv2d"): reason,
        ("0.bn2", "GroupNorm"): reason,
        ("0.relu", "ReLU"): "not in a fused block",
    }
    # Each module once: the notice of the two that follow it has no row of its own.
    assert not [r for r in found.rows if r.backend == "unfused"]
    assert ("0", "residual_mix", "native") in listed(found)
    assert 0 < found.fused < 1


def test_hooks_of_a_module_are_a_reason():
    model = fusedres.SEBasicBlock(8, 8).eval()
    model.se.fc1.register_forward_hook(lambda *args: None)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = explain(model, images())
        rows = [(r.module, r.op, r.reason) for r in found.rows if r.backend in ("torch", "unfused")]
        assert rows == [(f"se.fc{i}", "Conv2d", "Conv2d has hooks") for i in (1, 2)]


class Gate(nn.Module):
    """A squeeze-excite without modules of PyTorch inside."""

    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def test_a_foreign_part_keeps_its_reason():
    model = fusedres.BasicBlock(8, 8).eval()
    model.se = Gate()
    with torch.no_grad():
        found = explain(model, images())
    (row,) = [r for r in found.rows if r.module == "se"]
    assert (row.op, row.backend) == ("Gate", "torch")
    assert row.reason == "Gate is not a squeeze-excite with a fused form"


def test_a_plain_network_is_not_fused():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    found = explain(model, images())
    reason = "not in a fused block: call fusedres.fuse on the model"
    assert [r.reason for r in found.rows] == [reason] * 3
    assert found.fused == 0 and found.bytes_moved == found.eager_bytes > 0
    fused = explain(fuse(model), images())
    assert fused.fused == 1
    assert "Conv2d" not in {r.op for r in fused.rows}


def test_an_unfused_model_of_this_library_can_be_fused_again():
    model = fusedres.unfuse(fusedres.models.resnet18(num_classes=5))
    reasons = {r.reason for r in explain(model, torch.randn(2, 3, 32, 32)).rows}
    assert reasons == {"not in a fused block: call fusedres.fuse on the model", None}


class Own(nn.Module):
    """A model's own module, which ``fuse`` cannot know."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x))


class Louder(torchvision.models.resnet.BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part,cause", [
    (Own(), "fuse does not know Own"),
    (Louder(8, 8), "Louder.forward is not the code of BasicBlock that fuse knows"),
    (nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()),
     "Sequential holds no convolution followed by a batch norm"),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_the_cause_of_a_part_that_fuse_left_alone(part, cause):
    model = nn.Sequential(torchvision.models.resnet.BasicBlock(8, 8), part)
    found = explain(fuse(model), images())
    left = [r for r in found.rows if r.backend == "torch"]
    assert left and all(r.reason == f"not in a fused block: {cause}" for r in left)


def test_a_data_parallel_is_looked_through_and_a_script_module_refused():
    model = block().eval()
    alone, wrapped = explain(model, images()), explain(nn.DataParallel(model), images())
    assert listed(wrapped) == [("module", *row[1:]) for row in listed(alone)]
    with pytest.raises(TypeError, match="model: wanted a torch.nn.Module in Python, got a Script"):
        explain(torch.jit.script(nn.Conv2d(8, 8, 1)), images())


@pytest.mark.parametrize("training", [False, True])
def test_the_reference_backend_moves_what_eager_moves(training):
    model = block().train(training)
    with torch.no_grad():
        auto = explain(model, images())
        with fusedres.backend("reference"):
            found = explain(model, images())
    assert found.fused == 0 < auto.fused
    assert found.bytes_moved == found.eager_bytes == auto.eager_bytes


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


class Tolerant(nn.Module):
    """Goes on when a part of it raises."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(Fails()), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.first(x)
        except RuntimeError:
            return self.second(x)


def test_a_part_that_raised_and_was_caught():
    assert listed(explain(Tolerant(), torch.ones(2, 4))) == [("second", "Linear", "torch")]


def test_a_module_that_runs_twice_has_two_rows():
    shared = nn.Linear(4, 4)
    names = [r.module for r in explain(nn.Sequential(shared, shared), torch.ones(2, 4)).rows]
    assert names == ["0", "0"]


@pytest.mark.parametrize("rich", [True, False])
def test_table_is_whole(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    model = nn.Sequential(block(norm_layer=lambda c: nn.GroupNorm(4, c)), nn.MaxPool2d(2))
    found = explain(model, images())
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.rows) + 1  # heading and rule; totals
    for row, line in zip(found.rows, lines[2:], strict=False):
        for cell in (row.module, row.op, row.backend, row.reason or ""):
            assert cell in line
    assert "total" in lines[-1] and str(found.launches) in lines[-1]
    assert f"{found.fused:.0%} of eager's traffic" in lines[-1]


def test_note_about_nan_where_onednn_has_the_relu():
    model = fusedres.BasicBlock(8, 8).eval()
    with torch.no_grad():
        assert "NaN becomes 0" in str(explain(model, images()))
        with fusedres.backend("reference"):
            assert "NaN" not in str(explain(model, images()))
    assert "NaN" not in str(explain(copy.deepcopy(model).train(), images()))


def test_wrong_model():
    with pytest.raises(TypeError, match="wanted a torch.nn.Module, got str"):
        explain("resnet50", images())


def test_a_global_hook_of_the_users_is_the_reason():
    handle = global_hooks.register_module_forward_hook(lambda *args: None)
    try:
        rows = explain(fusedres.BasicBlock(8, 8), images()).rows
    finally:
        handle.remove()
    assert not any(row.op in ("conv_stats", "bn_act") for row in rows)
    assert any(row.reason == "global module hooks are set" for row in rows)
    assert any(row.op == "conv_stats" for row in explain(fusedres.BasicBlock(8, 8), images()).rows)


def test_copies_of_tensors_that_are_not_dense_are_shown():
    model, x = fusedres.BatchNormAct2d(5), torch.randn(2, 5, 4, 6)[..., ::2]
    copied, norm = fusedres.explain(model, x).rows
    assert (copied.op, norm.op) == ("copy", "bn_act")
    assert copied.reason.startswith(f"strides {x.stride()} are not contiguous")
    assert copied.bytes_moved == 2 * 4 * x.numel()
    (alone,) = fusedres.explain(model, x.contiguous()).rows
    assert alone == norm
