"""explain runs the model in the caller's modes, and leaves it as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

import fusedres
from fusedres import observers
from fusedres.report import explain
from test_explain import Fails, block, images


def test_explain_does_not_change_what_runs():
    model = nn.Sequential(block(), fusedres.SEBottleneck(16, 4), nn.Linear(4, 4))
    x = images()
    for mode in (True, False):
        heard = []
        with observers.observe(heard.append):
            model.train(mode)(x)
        expected = [(e.op, e.backend) for e in heard]
        rows = [(r.op, r.backend) for r in explain(model, x).rows if r.backend != "torch"]
        assert rows == expected


def test_modes_of_the_caller_are_respected():
    model = fusedres.BasicBlock(8, 8).eval()
    ops = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ops[grad] = {r.op for r in explain(model, images()).rows}
            assert torch.is_grad_enabled() == grad
    assert ops[False] == {"conv_bn_act"} and "conv_bn_act" not in ops[True]
    assert not model.training
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(model.train(), images())
    with torch.autocast("cpu", enabled=False):
        assert found.bytes_moved < explain(model, images()).bytes_moved


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(), block()).train()
    model.append(Fails() if fails else nn.Identity())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    x = images()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    before = {n: (t.clone(), t._version) for n, t in tensors.items()}
    grads = [p.grad.clone() for p in model.parameters()]
    random, hooks = torch.get_rng_state(), _global_hooks()

    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            explain(model, x)
    else:
        explain(model, x)

    after = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    for name, t in after.items():
        assert t is tensors[name]
        assert torch.equal(t, before[name][0]) and t._version == before[name][1], name
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert _global_hooks() == hooks and not observers.observed()


def _global_hooks() -> tuple[int, int]:
    return len(global_hooks._global_forward_hooks), len(global_hooks._global_forward_pre_hooks)
