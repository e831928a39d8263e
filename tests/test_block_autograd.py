"""Blocks under autograd's less travelled ways: forward mode, graphs of gradients, saved tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, stack_module_state

import fusedres
from cases import randn
from harness import assert_same_bits
from modules import block_pair, compare, parameter_gradients, results

CASES = {
    "basic": dict(name="BasicBlock", planes=16, project=False),
    "bottleneck": dict(name="Bottleneck", planes=4, project=False),
    "se_basic": dict(name="SEBasicBlock", planes=16, project=False, reduction=4),
}
blocks = pytest.mark.parametrize("case", CASES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
X = (4, 16, 6, 6)


def pair_of(case: str, training: bool) -> tuple[nn.Module, nn.Module]:
    fused, plain = block_pair(**CASES[case])
    return fused.train(training), plain.train(training)


@blocks
@modes
def test_the_graph_of_gradients_of_a_block_applied_twice(training, case):
    fused, plain = pair_of(case, training)

    def run(block, x):
        block.zero_grad()
        y = block(block(x))
        loss = y.square().mean()
        grads = torch.autograd.grad(loss, list(block.parameters()), create_graph=True)
        return {"y": y.detach()} | {
            f"d{n}": g.detach() for (n, _), g in zip(block.named_parameters(), grads, strict=True)
        }

    compare(run, fused, plain, randn(X))


def test_the_graph_of_gradients_where_one_input_is_made_of_another():
    x = randn((2, 5, 4, 4)).double().requires_grad_()
    gate = x.sigmoid()
    w = torch.rand(5, dtype=torch.float64)
    ops = (
        lambda: fusedres.functional.batch_norm_act(
            x, None, None, w, None, True, residual=x, act="silu"
        ),
        lambda: fusedres.functional.residual_mix(x.sin(), x, gate=gate),
    )
    for op in ops:
        once, again = (
            torch.autograd.grad(op().square().sum(), x, create_graph=graph, retain_graph=True)[0]
            for graph in (False, True)
        )
        torch.testing.assert_close(again, once)


@blocks
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode(frozen, case):
    fused, plain = pair_of(case, training=False)
    for block in (fused, plain):
        block.requires_grad_(not frozen)

    def run(block, x):
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(block(forward_ad.make_dual(x, x.cos())))
            return {"y": y.primal.detach(), "tangent": y.tangent.detach()}

    compare(run, fused, plain, randn(X))


@blocks
def test_an_ensemble_by_vmap(case):
    members = [[b.double() for b in pair_of(case, training=False)] for _ in range(2)]
    x = randn(X).double()

    def ensemble(blocks):
        stacked = stack_module_state(list(blocks))
        return torch.vmap(lambda p, b: functional_call(blocks[0], (p, b), (x,)))(*stacked)

    fused, plain = (ensemble(blocks).detach() for blocks in zip(*members, strict=True))
    torch.testing.assert_close(fused, plain)


@blocks
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_saved_tensors_may_come_back_with_other_strides(layout, case):
    block, _ = pair_of(case, training=True)
    block, again, x = (
        block.double(),
        copy.deepcopy(block).double(),
        randn(X, layout=layout).double(),
    )
    wanted = results(block, x)
    with saved_tensors_hooks(lambda t: t.detach().contiguous().clone(), lambda t: t):
        found = results(again, x)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@blocks
def test_statistics_may_move_between_a_forward_in_eval_mode_and_its_backward(case):
    # PyTorch's own batch norm takes the statistics as they are at the backward (2.13).
    block, _ = pair_of(case, training=False)
    x, found = randn(X), []
    for trains_between in (False, True):
        block.eval().zero_grad()
        y = block(x)
        if trains_between:
            block.train()(x)
        y.square().sum().backward()
        found.append(parameter_gradients(block))
    assert_same_bits(*found)


@blocks
@modes
def test_meta_tensors_have_the_shape(training, case):
    fused, plain = (block.to("meta") for block in pair_of(case, training))
    x = torch.empty(X, device="meta")
    found, wanted = fused(x), plain(x)
    assert found.is_meta and found.shape == wanted.shape and found.stride() == wanted.stride()


@blocks
def test_an_optimizer_that_steps_inside_the_backward(case):
    """Each parameter changes as soon as its gradient is there; the node has read it by then."""

    def step(block):
        for p in block.parameters():
            optimizer = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
        for x in torch.arange(3 * 16 * 36.0).sin().view(3, 1, 16, 6, 6).double():
            block(torch.cat([x, x.flip(3)])).square().sum().backward()
            block.zero_grad()
        return dict(block.named_parameters())

    fused, plain = (block.double() for block in pair_of(case, training=True))
    found, wanted = step(fused), step(plain)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=lambda m, n=name: f"{n}: {m}")
