"""explain(backward=True): the ops of the backward, under the modules whose gradients they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import triton_kernels
from fusedres.report import explain
from harness import Unchanged
from test_explain import images
from triton_cases import triton_on


class WithStem(nn.Module):
    """Calls one layer's parts itself, as a torchvision model its stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = fusedres.BatchNormAct2d(8), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(fusedres.BasicBlock(8, 8), fusedres.SEBasicBlock(8, 8))

    def forward(self, x):
        stem = self.stem
        y = fusedres.functional.batch_norm_act(
            x, stem.running_mean, stem.running_var, stem.weight, stem.bias, self.training
        )
        return self.blocks(self.pool(y))


def test_rows_follow_those_of_the_forward():
    model, x = WithStem(), images().requires_grad_()
    forward = explain(model, x).rows
    found = explain(model, x, backward=True)
    assert found.rows[: len(forward)] == forward
    rows = found.rows[len(forward) :]
    assert [(r.module, r.op) for r in rows if r.op.endswith("backward")] == [
        ("blocks.1", "bn_se_act_backward"), ("blocks.1", "bn_act_backward"),
        ("blocks.0", "bn_act_backward"), ("blocks.0", "bn_act_backward"),
        ("", "bn_act_backward"),
    ]  # fmt: skip
    assert all(r.bytes_moved > 0 and r.fused for r in rows)
    assert f"{len(found.rows)} rows" in str(found)


def test_everything_is_left_as_it_was():
    model, x = WithStem(), images().requires_grad_()
    model(x).sum().backward()
    before = [p.grad.clone() for p in (x, *model.parameters())]
    with Unchanged(model, x):
        explain(model, x, backward=True)
    for p, grad in zip((x, *model.parameters()), before, strict=True):
        assert torch.equal(p.grad, grad)


def test_step_by_step_a_module_has_its_ops():
    model = nn.Sequential(fusedres.Bottleneck(16, 4), fusedres.PreActBasicBlock(16, 16))
    for one_node in (True, False):
        with fusedres.backend("auto") if one_node else fusedres.dispatch.step_by_step():
            rows = explain(model, torch.randn(2, 16, 4, 4), backward=True).rows
        backward = [r.module for r in rows if r.op.endswith("backward")]
        assert backward == sorted(backward, reverse=True) and set(backward) == {"0", "1"}


def test_on_the_reference_the_backward_is_pytorchs():
    with fusedres.backend("reference"):
        found = explain(WithStem(), images(), backward=True)
        assert found.rows == explain(WithStem(), images()).rows


def test_a_result_without_gradient():
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="backward: wanted a result that requires"),
    ):
        explain(WithStem(), images(), backward=True)


@pytest.mark.skipif(
    torch.cuda.is_available() or triton_kernels.missing() is not None,
    reason="Triton interprets nothing here",
)
def test_it_says_who_took_a_convolutions_gradient():
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with triton_on("cpu"):
        found = explain(fusedres.Bottleneck(16, 4), x, backward=True)
    told = [(r.backend, r.reason) for r in found.rows if r.op == "conv_grad"]
    why = "not measured (FUSEDRES_TUNE=1): batch norm's backward is one launch"
    assert told == [("aten", why)] * 2
