"""A block as one autograd node: the bits of the step ops, and when it stands back."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fusedres
from cases import randn
from fusedres import dispatch, triton_kernels
from harness import assert_same_bits
from modules import block_pair, check_module, results
from triton_cases import triton_on

NODE = "_ResidualBlockBackward"
X = (3, 16, 8, 8)

CASES = {
    "basic": dict(name="BasicBlock", planes=16, project=False),
    "basic_stride": dict(name="BasicBlock", stride=2),
    "bottleneck": dict(name="Bottleneck", planes=4, project=False),
    "bottleneck_stride": dict(name="Bottleneck", stride=2),
    "bottleneck_grouped": dict(name="Bottleneck", planes=16, groups=4, base_width=16),
    "se_basic": dict(name="SEBasicBlock", stride=2, reduction=4),
    "se_bottleneck": dict(name="SEBottleneck", planes=4, project=False, reduction=4),
    "drop_path": dict(name="Bottleneck", stride=2, drop_path=0.5),
    "drop_path_identity": dict(name="BasicBlock", planes=16, project=False, drop_path=0.5),
    "layer_scale": dict(name="Bottleneck", residual_scale="channels"),
    "not_residual": dict(name="BasicBlock", project=False, residual=False),
    "layer": None,
}
cases = pytest.mark.parametrize("case", CASES)


def block_of(case: str) -> nn.Module:
    options = dict(CASES[case] or {})
    torch.manual_seed(5)
    if not options:
        return fusedres.ConvBNAct2d(16, 24, 3, stride=2, act="silu")
    if "residual_scale" in options:
        options["residual_scale"] = fusedres.ResidualScale(32, init=0.7)
    cls, project = getattr(fusedres, options.pop("name")), options.pop("project", True)
    planes, stride = options.pop("planes", 8), options.pop("stride", 1)
    down = None
    if project:
        out = planes * cls.expansion
        down = nn.Sequential(nn.Conv2d(16, out, 1, stride, bias=True), nn.BatchNorm2d(out))
    return cls(16, planes, stride, down, **options)


def nodes(y: Tensor) -> Counter:
    """How many nodes of each name are behind ``y``, without those of the leaves."""
    found, todo = {}, [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = type(node).__name__
            todo += [parent for parent, _ in node.next_functions]
    return Counter(name for name in found.values() if name != "AccumulateGrad")


def both(block: nn.Module, x: Tensor, run=results) -> tuple[dict, dict]:
    """What the node and what the step ops give, from the same random numbers."""
    found = []
    for context in (contextlib.nullcontext(), dispatch.step_by_step()):
        twin = copy.deepcopy(block)
        torch.manual_seed(11)
        with context:
            found.append(run(twin, x))
    return found[0], found[1]


@cases
@pytest.mark.parametrize("dtype,layout,training", [
    (torch.float32, "NHWC", True), (torch.float32, "NCHW", False), (torch.float64, "NCHW", True),
    (torch.bfloat16, "NHWC", True), (torch.float16, "NHWC", False), ("autocast", "NHWC", True),
], ids=lambda v: str(v).removeprefix("torch."))  # fmt: skip
def test_the_bits_are_those_of_the_step_ops(case, dtype, layout, training):
    casts = dtype == "autocast"
    dtype = torch.float32 if casts else dtype
    block, x = block_of(case).to(dtype).train(training), randn(X, dtype, layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        node, steps = both(block, x)
        assert nodes(block(x.requires_grad_()))[NODE] == 1
    assert_same_bits(node, steps)


@pytest.mark.parametrize("case", ["basic_stride", "bottleneck", "se_bottleneck"])
def test_one_node_a_block(case):
    block, x = block_of(case), randn(X).requires_grad_()
    assert nodes(block(x)) == {NODE: 1}
    with dispatch.step_by_step():
        steps = nodes(block(x))
    assert NODE not in steps and steps.total() >= 3


# --- when it stands back


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace_conv(block: nn.Module) -> None:
    block.conv2 = Doubled(8, 8, 3, padding=1, bias=False)


FALLBACKS = {
    "hook on a norm": lambda b: b.bn1.register_forward_hook(lambda m, args, out: out * 0.5),
    "hook on a convolution": lambda b: b.conv1.register_forward_hook(lambda m, args, out: out + 1),
    "hook on the projection": lambda b: b.downsample[0].register_forward_hook(
        lambda m, a, y: y + 1
    ),
    "parametrized": lambda b: nn.utils.parametrizations.weight_norm(b.conv1),
    "replaced convolution": _replace_conv,
    "group norm": lambda b: setattr(b, "bn2", nn.GroupNorm(2, 8)),
    "frozen front": lambda b: b.conv1.requires_grad_(False),
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_what_is_no_plain_block_runs_step_by_step(why):
    """And gives PyTorch's results, with every hook called."""
    fused, plain = block_pair("BasicBlock", stride=2)
    for block in (fused, plain):
        FALLBACKS[why](block)
    plain.load_state_dict(fused.state_dict())
    x = randn((3, 16, 9, 9))
    assert NODE not in nodes(copy.deepcopy(fused)(x))
    check_module(fused, plain, x)


def test_frozen_norms_and_evaluated_blocks_are_one_node():
    fused, plain = block_pair("Bottleneck", stride=2)
    for block in (fused, plain):
        block.bn2.eval()
        block.bn1.requires_grad_(False)
    x = randn(X, layout="NHWC")
    assert nodes(copy.deepcopy(fused)(x.clone().requires_grad_())) == {NODE: 1}
    check_module(fused, plain, x, steps=2)


@pytest.mark.parametrize("frozen", [
    ["conv1", "bn2"], ["conv2", "downsample.0"], ["bn1", "bn3", "downsample.1"], ["downsample"],
    ["conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "downsample"],
], ids=",".join)  # fmt: skip
@pytest.mark.parametrize("input_too", [True, False])
def test_any_subset_of_gradients(frozen, input_too):
    block = block_of("bottleneck_stride")
    for name in frozen:
        block.get_submodule(name).requires_grad_(False)
    if not input_too and not any(p.requires_grad for p in block.parameters()):
        return

    def run(block, x):
        x = x.clone().requires_grad_(input_too)
        y = block(x)
        y.square().sum().backward()
        found = {"y": y.detach()} | {n: p.grad for n, p in block.named_parameters()}
        wanted = {"y"} | {n for n, p in block.named_parameters() if p.requires_grad}
        found = {n: g for n, g in found.items() if g is not None}
        assert found.keys() == wanted
        return found | ({"x": x.grad} if input_too else {})

    assert_same_bits(*both(block, randn(X), run))


def test_without_gradients_there_is_no_node():
    block, x = block_of("basic_stride"), randn(X)
    with torch.no_grad():
        y = block(x)
    assert not y.requires_grad
    assert_same_bits({"y": y}, {"y": block(x).detach()})


def test_the_reference_is_differentiated_step_by_step():
    block, x = block_of("bottleneck"), randn(X).requires_grad_()
    with fusedres.backend("reference"):
        assert NODE not in nodes(block(x))


def test_a_backward_on_another_backend_differentiates_the_steps():
    block, x = block_of("se_basic").double(), randn(X, torch.float64).requires_grad_()
    found = []
    for backend in ("auto", "reference"):
        y = block(x)
        assert nodes(y)[NODE] == 1
        with fusedres.backend(backend):
            found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("case", ["basic", "bottleneck_stride", "se_bottleneck", "drop_path"])
def test_second_derivatives_are_those_of_the_step_ops(case):
    def run(block, x):
        x = x.clone().requires_grad_()
        inputs = [x, *block.parameters()]
        grads = torch.autograd.grad(block(x).square().sum(), inputs, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        return dict(enumerate((*grads, *again)))

    node, steps = both(block_of(case).double(), randn(X, torch.float64), run)
    for i, value in node.items():
        torch.testing.assert_close(value, steps[i])


def test_the_hook_of_every_parameter_is_called_once():
    """What DistributedDataParallel hangs its buckets on."""
    block, calls = block_of("se_bottleneck"), Counter()
    for name, p in block.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.update([name]))
    block(randn(X)).sum().backward()
    assert calls == {n: 1 for n, _ in block.named_parameters()}


def test_one_backward_frees_the_graph():
    y = block_of("basic")(randn(X)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


# --- running statistics and launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_running_statistics_in_one_update_have_the_bits_of_one_each(dtype):
    block = block_of("bottleneck_stride").to(dtype)
    twin = copy.deepcopy(block)
    twin.bn1.momentum = 0.2  # not that of the others: each is updated by itself
    for _ in range(3):
        x = randn(X, dtype)
        block(x), twin(x)
    ours, theirs = (
        {n: b for n, b in m.named_buffers() if not n.startswith("bn1.running")}
        for m in (block, twin)
    )
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("momenta", [(0.1, 0.1), (0.1, 0.2), (None, 0.1), (None, None)])
def test_running_statistics_of_a_norm_that_stands_twice(momenta):
    fused, plain = block_pair("BasicBlock", planes=16, project=False)
    for block in (fused, plain):
        block.bn1.momentum, block.bn2.momentum = momenta
    check_module(fused, plain, randn(X), steps=2)
    for block in (fused, plain):
        block.bn2 = block.bn1
    check_module(fused, plain, randn(X), steps=2)


@contextlib.contextmanager
def launches() -> Iterator[list]:
    with triton_on("cpu"), triton_kernels.counted() as found:
        yield found


@pytest.mark.parametrize("case,node,steps", [
    ("basic", 2, 4),  # statistics and norm in one launch, twice
    ("basic_stride", 5, 6),  # the addition of two norms takes no statistics
    ("bottleneck", 7, 7),  # the 1x1 convolutions' kernels take them
    ("se_bottleneck", 11, 11),
])  # fmt: skip
def test_launches_on_triton(case, node, steps):
    block, x = block_of(case), randn((2, 16, 6, 6), layout="NHWC").requires_grad_()
    counts = []
    for context in (contextlib.nullcontext(), dispatch.step_by_step()):
        twin = copy.deepcopy(block)
        with context, launches() as found:
            y = twin(x)
        assert (NODE in nodes(y)) == (not counts)
        counts.append(len(found))
    assert counts == [node, steps]


def test_the_bits_on_triton():
    block, x = block_of("basic_stride"), randn((2, 16, 6, 6), layout="NHWC")
    with triton_on("cpu"):
        assert_same_bits(*both(block, x))


def test_explain_counts_the_calls_of_the_node():
    block, x = block_of("basic"), randn(X).requires_grad_()
    node = fusedres.explain(block, x)
    with dispatch.step_by_step():
        steps = fusedres.explain(block, x)
    assert [r.op for r in node.rows] == ["conv_stats", "bn_act", "conv_stats", "bn_act"]
    assert steps.launches - node.launches == 2  # bn_stats
    assert steps.bytes_moved == node.bytes_moved and node.fused == steps.fused
