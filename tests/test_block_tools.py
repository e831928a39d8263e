"""Blocks under the tools of PyTorch: hooks, copies, tracing, checkpointing, second derivatives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cases import randn
from harness import assert_same_bits
from modules import block_pair, check_module, compare, parameter_gradients, results

CASES = {
    "basic": dict(name="BasicBlock", stride=2),
    "bottleneck": dict(name="Bottleneck", planes=4, project=False),
    "se_bottleneck": dict(name="SEBottleneck", stride=2, reduction=4),
}
blocks = pytest.mark.parametrize("case", CASES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
X = (4, 16, 6, 6)


def pair_of(case: str, training: bool = True) -> tuple[nn.Module, nn.Module]:
    fused, plain = block_pair(**CASES[case])
    return fused.train(training), plain.train(training)


# --- hooks


@blocks
@modes
def test_forward_hooks_of_inner_modules_fire(training, case):
    fused, plain = pair_of(case, training)
    seen = {}

    def run(block, x):
        calls = seen.setdefault(block, [])
        for name, m in block.named_modules():
            if name and not list(m.children()):
                m.register_forward_hook(
                    lambda m, args, out, name=name: calls.append((name, tuple(out.shape)))
                )
        return results(block, x)

    compare(run, fused, plain, randn(X, layout="NHWC"))
    # torchvision's squeeze-excite has modules for its pooling and activations, ours does not.
    extra = "se.avgpool", "se.activation", "se.scale_activation"
    # The shortcut may run before the branch.
    assert sorted(seen[fused]) == sorted(c for c in seen[plain] if c[0] not in extra)


@pytest.mark.parametrize("where", ["conv1", "bn1", "relu", "conv2", "bn2", "downsample"])
def test_a_hook_may_replace_what_passes(where):
    fused, plain = pair_of("basic")
    for block in (fused, plain):
        module = getattr(block, where)
        module.register_forward_hook(lambda m, args, out: out * 0.5)
        module.register_forward_pre_hook(lambda m, args: (args[0] + 0.25,))
    check_module(fused, plain, randn(X))


@blocks
def test_backward_hooks_of_inner_modules_fire(case):
    fused, plain = pair_of(case)
    seen = {}
    for block in (fused, plain):
        calls = seen[block] = []
        # PyTorch refuses such hooks around in-place operations, torchvision's addition is one.
        block.relu.inplace = False
        for name in ("conv1", "bn1", "conv2"):
            getattr(block, name).register_full_backward_hook(
                lambda m, gi, go, name=name, calls=calls: calls.append((name, go[0].shape))
            )
        results(block, randn(X))
    assert seen[fused] == seen[plain]


def test_hooks_of_the_block_itself():
    fused, _ = pair_of("basic")
    seen = []
    fused.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    fused(randn(X))
    assert seen == [(4, 8, 3, 3)]


# --- copies


@blocks
@modes
def test_copies_are_the_same_block(training, case, tmp_path):
    block, _ = pair_of(case, training)
    x = randn(X)
    with torch.no_grad():
        block(x)  # whatever it keeps between calls exists by now
    torch.save(block, tmp_path / "block.pt")
    loaded = torch.load(tmp_path / "block.pt", weights_only=False)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded
    state = {n: t.clone() for n, t in block.state_dict().items()}
    first = results(block, x)
    for other in copies:
        assert type(other) is type(block)
        assert_same_bits(dict(other.state_dict()), state)
        assert_same_bits(results(other, x), first)


# --- tracing and functional calls


@blocks
@modes
def test_fx_symbolic_trace(training, case):
    fused, plain = pair_of(case, training)
    traced = torch.fx.symbolic_trace(fused)
    targets = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert {"conv1", "bn1", "relu", "conv2", "bn2"} <= targets
    check_module(traced, plain, randn(X))


@blocks
@modes
def test_functional_call(training, case):
    fused, plain = pair_of(case, training)
    before = {n: t.clone() for n, t in fused.state_dict().items()}

    def run(block, x):
        params = {n: (p.detach() * 1.5).requires_grad_() for n, p in block.named_parameters()}
        buffers = {n: b.clone() for n, b in block.named_buffers()}
        y = functional_call(block, (params, buffers), x)
        y.square().sum().backward()
        return {"y": y.detach()} | {f"d{n}": p.grad for n, p in params.items()} | buffers

    compare(run, fused, plain, randn(X))
    assert_same_bits(dict(fused.state_dict()), before)


@blocks
def test_torch_func_grad(case):
    def run(block, x):
        def loss(params):
            y = functional_call(block, params, x)
            return y.square().sum(), y

        grads, y = torch.func.grad(loss, has_aux=True)(dict(block.named_parameters()))
        return {"y": y} | {f"d{n}": g for n, g in grads.items()}

    compare(run, *pair_of(case, training=False), randn(X))


@blocks
def test_torch_func_per_sample_gradients_and_tangents(case):
    def run(block, x):
        params, buffers = dict(block.named_parameters()), dict(block.named_buffers())

        def loss(params, x):
            return functional_call(block, (params, buffers), x[None]).square().sum()

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        y, dy = torch.func.jvp(lambda x: functional_call(block, (params, buffers), x), (x,), (x,))
        with torch.no_grad():
            mapped = torch.func.vmap(lambda x: block(x[None]))(x)
        return {"y": y.detach(), "tangent": dy.detach(), "mapped": mapped} | {
            f"d{n}": g.detach() for n, g in grads.items()
        }

    compare(run, *pair_of(case, training=False), randn(X))


# --- recomputation and second derivatives


class Checkpointed(nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@blocks
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(reentrant, case):
    block, _ = pair_of(case)
    again, x = copy.deepcopy(block), randn(X)
    out = results(block, x)
    found = results(Checkpointed(again, reentrant), x)
    assert_same_bits({n.replace("block.", ""): t for n, t in found.items()}, out)
    assert out["bn1.num_batches_tracked"] == 1


@blocks
@modes
def test_gradient_penalty(training, case):
    """The derivative of the input gradient's norm: double backward through the whole block."""

    def run(block, x):
        x = x.clone().requires_grad_()
        y = block(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found = {"y": y.detach(), "dfirst": grad.detach(), "dsecond": x.grad}
        return found | parameter_gradients(block)

    compare(run, *pair_of(case, training), randn(X))


def test_two_forwards_before_one_backward():
    def run(block, x):
        y = block(block(x))
        (y.sum() + block(x).square().sum()).backward()
        return {"y": y.detach()} | parameter_gradients(block) | dict(block.named_buffers())

    compare(run, *pair_of("bottleneck"), randn(X))


def test_a_retained_graph_gives_the_same_gradients_twice():
    fused, _ = pair_of("se_bottleneck")
    x = randn(X).requires_grad_()
    y = fused(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert_same_bits({"dx": first}, {"dx": second})


@blocks
def test_frozen_parameters_get_no_gradient(case):
    fused, plain = pair_of(case)
    for block in (fused, plain):
        block.conv1.requires_grad_(False)
        block.bn2.requires_grad_(False)
    out = check_module(fused, plain, randn(X))
    assert "dconv1.weight" not in out and "dbn2.weight" not in out and "dbn1.weight" in out


def test_only_the_input_needs_a_gradient():
    fused, plain = (b.requires_grad_(False) for b in pair_of("bottleneck"))
    for training in (True, False):
        check_module(fused.train(training), plain.train(training), randn(X))
