"""Blocks under the tools of PyTorch: hooks, copies, tracing, checkpointing, compilers, DDP."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import randn
from harness import assert_same_bits
from modules import assert_as_accurate, block_pair, check_module, results
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres

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


def compare(out, eager, plain: nn.Module, x: torch.Tensor) -> None:
    """Results of our block and of torchvision's, made in the same way, by the accuracy rule."""
    truth = results(copy.deepcopy(plain).double(), x.double())
    truth = {n: t for n, t in truth.items() if n in out}
    assert_as_accurate(out, truth, eager, count=x.numel() // x.shape[1])


# --- hooks


@blocks
@modes
def test_forward_hooks_of_inner_modules_fire(training, case):
    fused, plain = pair_of(case, training)
    x = randn(X, layout="NHWC")
    ref = copy.deepcopy(plain).double()
    seen = {}
    for block in (fused, plain, ref):
        calls = seen[block] = []
        for name, m in block.named_modules():
            if not list(m.children()):
                m.register_forward_hook(
                    lambda m, args, out, name=name, calls=calls: calls.append((name, tuple(out.shape)))
                )
    out, eager = results(fused, x), results(plain, x)
    wanted = [c for c in seen[plain] if not c[0].startswith(("se.avgpool", "se.activ", "se.scale"))]
    # The shortcut may run before the branch; the squeeze-excite's activations are no modules here.
    assert sorted(seen[fused]) == sorted(wanted)
    assert_as_accurate(out, results(ref, x.double()), eager, count=144)


@pytest.mark.parametrize("where", ["conv1", "bn1", "relu", "conv2", "bn2", "downsample"])
def test_a_hook_may_replace_the_output(where):
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
        for name in ("conv1", "bn1", "conv2", "bn2"):
            getattr(block, name).register_full_backward_hook(
                lambda m, gi, go, name=name, calls=calls: calls.append((name, go[0].shape))
            )
        block.relu.inplace = False
    check_module(fused, plain, randn(X))
    assert seen[fused] == seen[plain][: len(seen[fused])]


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
    block(x)  # whatever it keeps between calls exists by now
    path = tmp_path / "block.pt"
    torch.save(block, path)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    loaded = torch.load(path, weights_only=False)
    state = {n: t.clone() for n, t in block.state_dict().items()}
    first = results(block, x)
    for other in (*copies, loaded):
        assert type(other) is type(block)
        assert_same_bits(other.state_dict(), state)
        assert_same_bits(results(other, x), first)


# --- tracing


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
    x = randn(X)
    params = {n: (p.detach() * 1.5).requires_grad_() for n, p in plain.named_parameters()}
    buffers = {n: b.clone() for n, b in plain.named_buffers()}
    before = {n: t.clone() for n, t in fused.state_dict().items()}
    plain.load_state_dict(plain.state_dict() | {n: p.detach() for n, p in params.items()})
    y = torch.func.functional_call(fused, (params, buffers), x)
    y.backward(torch.ones_like(y))
    found = {"y": y.detach()} | {f"d{n}": p.grad for n, p in params.items()} | buffers
    assert_same_bits(fused.state_dict(), before)
    ref = copy.deepcopy(plain).double()
    others = []
    for block in (ref, plain):
        block.zero_grad()
        out = block(x.to(next(block.parameters()).dtype))
        out.backward(torch.ones_like(out))
        grads = {f"d{n}": p.grad for n, p in block.named_parameters()}
        others.append({"y": out.detach()} | grads | dict(block.named_buffers()))
    assert_as_accurate(found, *others, count=144)


@blocks
def test_torch_func_grad(case):
    fused, plain = pair_of(case, training=False)
    x = randn(X)
    found = []
    for block in (fused, plain, copy.deepcopy(plain).double()):
        data = x.to(next(block.parameters()).dtype)

        def loss(params, block=block, data=data):
            return torch.func.functional_call(block, params, data).square().sum()

        found.append({"y": block(data).detach()} | {
            f"d{n}": g for n, g in torch.func.grad(loss)(dict(block.named_parameters())).items()
        })
    assert_as_accurate(found[0], found[2], found[1], count=144)


# --- recomputation and second derivatives


@blocks
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(reentrant, case):
    x = randn(X)
    block, _ = pair_of(case)
    again = copy.deepcopy(block)
    out, found = results(block, x), None

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = again

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    found = results(Checkpointed(), x)
    found = {n.replace("block.", ""): t for n, t in found.items()}
    assert_same_bits(found, out)
    assert out["bn1.num_batches_tracked"] == 1


@blocks
@modes
def test_gradient_penalty(training, case):
    """The derivative of the input gradient's norm: double backward through the whole block."""
    fused, plain = pair_of(case, training)
    x, found = randn(X), []
    for block in (fused, plain, copy.deepcopy(plain).double()):
        leaf = x.to(next(block.parameters()).dtype).requires_grad_()
        y = block(leaf)
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        grads = {f"d{n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "dpenalty": grad.detach(), "dinput": leaf.grad} | grads)
    out, eager, truth = found
    assert_as_accurate(out, truth, eager, count=144)


def test_two_forwards_before_one_backward():
    fused, plain = pair_of("bottleneck")
    x, found = randn(X), []
    for block in (fused, plain, copy.deepcopy(plain).double()):
        data = x.to(next(block.parameters()).dtype)
        y = block(block(data))
        (y.sum() + block(data).square().sum()).backward()
        grads = {f"d{n}": p.grad for n, p in block.named_parameters()}
        found.append({"y": y.detach()} | grads | dict(block.named_buffers()))
    assert_as_accurate(found[0], found[2], found[1], count=3 * 144)


def test_retained_graph_gives_the_same_gradients_twice():
    fused, _ = pair_of("se_bottleneck")
    x = randn(X).requires_grad_()
    y = fused(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert_same_bits({"dx": first}, {"dx": second})


# --- compilers and DDP


@pytest.mark.parametrize("case,training,compiler", [
    ("basic", True, "inductor"), ("se_bottleneck", True, "aot_eager"),
    ("bottleneck", False, "aot_eager"),
])  # fmt: skip
def test_compile(case, training, compiler):
    fused, plain = pair_of(case, training)
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    x = randn(X, layout="NHWC")
    out, eager = results(compiled, x), results(plain, x)
    out = {n.replace("_orig_mod.", ""): t for n, t in out.items()}
    truth = results(pair_of_double(plain, out), x.double())
    assert_as_accurate(out, truth, eager, count=144)


def pair_of_double(plain: nn.Module, out: dict) -> nn.Module:
    """``plain`` in float64, before the step it has just made."""
    ref = copy.deepcopy(plain).double()
    for m in ref.modules():
        if isinstance(m, nn.BatchNorm2d) and m.training:
            # one step from the statistics before: undo it
            raise AssertionError
    return ref
