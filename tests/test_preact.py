"""Pre-activation blocks and networks against timm's resnetv2, Wide ResNet against the paper."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import resnetv2
from torch import nn

import fusedres
import zoo
from cases import backends, layouts, randn
from fusedres import observers
from fusedres.blocks.preact_sum import Sum
from harness import Unchanged, assert_same_bits
from modules import check_module, randomise, twins

X = (4, 32, 7, 7)
NAMES = ("PreActBasicBlock", "PreActBottleneck")
TIMMS = {
    "preact_resnet18": "resnetv2_18", "preact_resnet34": "resnetv2_34",
    "preact_resnet50": "resnetv2_50", "preact_resnet101": "resnetv2_101",
    "preact_resnet152": "resnetv2_152",
}  # fmt: skip


def pair(name: str, stride: int = 1, project: bool = True, **options):
    """One of our blocks and timm's, in the same state."""
    block, basic = getattr(fusedres, name), "Basic" in name
    out = 64 if project else 32
    down = nn.Sequential(OrderedDict(conv=nn.Conv2d(32, out, 1, stride, bias=False)))
    fused = block(32, out // block.expansion, stride, down if project else None, **options)
    peer = resnetv2.PreActBasic if basic else resnetv2.PreActBottleneck
    plain = peer(
        32, out, bottle_ratio=1.0 if basic else 0.25, stride=stride, conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d, proj_layer=resnetv2.DownsampleConv if project else None,
    )  # fmt: skip
    return twins(fused, plain)


CASES = {
    "basic": dict(name="PreActBasicBlock", project=False),
    "basic_stride": dict(name="PreActBasicBlock", stride=2),
    "bottleneck": dict(name="PreActBottleneck", project=False),
    "bottleneck_stride": dict(name="PreActBottleneck", stride=2),
}


@backends
@pytest.mark.parametrize("layout,case", list(zip(("NCHW", "NHWC") * 2, CASES, strict=True)))
def test_a_block_in_training_then_inference(case, layout, backend):
    fused, plain = pair(**CASES[case])
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = randn(X, layout=layout)
    with fusedres.backend(backend):
        check_module(fused, plain, x, steps=2)
        fused.eval(), plain.eval()
        check_module(fused, plain, x)
        with torch.no_grad():
            check_module(fused, plain, x, graded=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["basic_stride", "bottleneck"])
def test_blocks_of_another_dtype(case, dtype):
    fused, plain = (b.to(dtype) for b in pair(**CASES[case]))
    check_module(fused, plain, randn((32, 32, 7, 7), dtype, "NHWC"))


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(4, c), nn.InstanceNorm2d])
def test_other_norms_run_as_they_are(norm):
    fused = fusedres.PreActBasicBlock(32, 32, norm_layer=norm)
    plain = fusedres.unfuse(fused)
    events = []
    with observers.observe(events.append):
        check_module(fused, plain, randn(X))
    assert any(e.backend == "unfused" for e in events)


@pytest.mark.parametrize("size", [1, 2])
def test_small_images(size):
    fused, plain = pair("PreActBottleneck", stride=2)
    check_module(fused, plain, randn((5, 32, size, size)))
    with (
        pytest.raises(ValueError, match="Expected more than 1 value per channel"),
        Unchanged(fused),
    ):
        fused(randn((1, 32, 1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_errors_leave_everything_as_it_was(name):
    fused, plain = pair(name, project=False)
    for x in (randn((2, 15, 5, 5)), randn((2, 32, 5)), randn(X, torch.float64)):
        for block in (fused, plain):
            with pytest.raises((RuntimeError, ValueError, AssertionError)):
                block(x)
    before = copy.deepcopy(fused.state_dict())
    fused.conv2.weight.data = torch.zeros(3, 3, 1, 1)  # the error comes after norm1 has run
    with pytest.raises(RuntimeError):
        fused(randn(X))
    after = {n: t for n, t in fused.state_dict().items() if n != "conv2.weight"}
    assert_same_bits(after, {n: before[n] for n in after})


@pytest.mark.parametrize("make,error,message", [
    (lambda: fusedres.PreActBasicBlock(8, 8, groups=2), ValueError, "groups=1"),
    (lambda: fusedres.PreActBasicBlock(8, 8, dilation=2), NotImplementedError, "Dilation"),
    (lambda: fusedres.PreActBasicBlock(8, 8, dropout=1.5), ValueError, "dropout: wanted a prob"),
    (lambda: fusedres.PreActBottleneck(8, 8, drop_path=2.0), ValueError, "drop_path: wanted"),
    (lambda: fusedres.models.WideResNet(27, 10), ValueError, "depth: wanted 6"),
    (lambda: fusedres.models.WideResNet(28, 0), ValueError, "width: wanted a number"),
    (lambda: fusedres.models.preact_resnet18(drop_path_rate=-1), ValueError, "drop_path_rate"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- what a network runs


@layouts
def test_statistics_ride_on_the_sum(layout):
    """Only the network's first norm reads a tensor for its statistics alone."""
    model = fusedres.models.PreActResNet(fusedres.PreActBottleneck, [2, 1, 1, 1], num_classes=3)
    x = randn((4, 3, 40, 40), layout=layout)
    events = []
    with observers.observe(events.append):
        model(x)
    ops = [e.op for e in events]
    assert not any(e.reason for e in events)
    assert ops.count("residual_add") == 5  # a block each
    # conv_stats's own: the two inner convolutions of each block; and the stem's result
    assert ops.count("bn_stats") == 1 + 2 * 5
    # norms applied: in front of the two inner convolutions of each block, and of the first one
    # where the shortcut needs the tensor too (4) or not (1); the last norm
    assert ops.count("bn_act") == 2 * 5 + 4 + 1 + 1
    events.clear()
    with torch.no_grad(), observers.observe(events.append):
        model.eval()(x)
    assert {e.op for e in events} == {"bn_act", "conv_bn_act"}
    assert not any(e.backend == "unfused" for e in events)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_called(name):
    block = getattr(fusedres, name)
    model = fusedres.blocks.PreActStage(
        block(32, 32 // block.expansion), block(32, 32 // block.expansion)
    )
    plain, x, seen = copy.deepcopy(model), randn(X), []
    for m in ("blocks.1", "blocks.0.norm1", "blocks.1.conv2", "blocks.1.norm2"):
        model.get_submodule(m).register_forward_hook(
            lambda module, args, out: seen.append(type(module).__name__)
        )
    check_module(model, fusedres.unfuse(plain), x)
    assert len(seen) == 4


def test_a_block_does_not_change_what_it_is_given():
    fused, _ = pair("PreActBasicBlock", project=False)
    x = randn(X)
    with Unchanged(x):
        state = fused.advance(Sum(x), True)
    mean, var = torch.ops.fusedres.bn_stats(state.value)
    torch.testing.assert_close((state.mean, state.var), (mean, var))


def test_batch_mode_drop_path_passes_the_input_on():
    block = fusedres.PreActBasicBlock(32, 32, drop_path=fusedres.DropPath(1.0, "batch"))
    x = randn(X)
    assert block(x) is x
    assert int(block.norm1.num_batches_tracked) == 0


# --- networks


@pytest.mark.parametrize("name", TIMMS)
def test_the_state_is_timms(name):
    with torch.device("meta"):
        ours, peer = getattr(fusedres.models, name)(), timm.create_model(TIMMS[name])
    found, wanted = ([(n, tuple(t.shape)) for n, t in m.state_dict().items()] for m in (ours, peer))
    assert found == wanted


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50"])
def test_a_network_is_timms(name):
    options = dict(num_classes=5)
    ours, peer = (
        getattr(fusedres.models, name)(**options),
        timm.create_model(TIMMS[name], **options),
    )
    ours.load_state_dict(randomise(peer).state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)
    x = zoo.images(4, 40)
    check = zoo.train_step
    torch.testing.assert_close(
        check(copy.deepcopy(ours).double(), x.double()),
        check(copy.deepcopy(peer).double(), x.double()),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            ours.double().eval()(x.double()), peer.double().eval()(x.double())
        )


def test_drop_path_rates_and_numbers_are_timms():
    options = dict(num_classes=3, drop_path_rate=0.5)
    ours = fusedres.models.preact_resnet18(**options)
    peer = timm.create_model("resnetv2_18", **options)
    ours.load_state_dict(randomise(peer).state_dict())
    for name, m in peer.named_modules():
        if isinstance(m, timm.layers.DropPath):
            drop = ours.get_submodule(name)
            # timm's are rounded to float32
            torch.testing.assert_close(torch.tensor(drop.p), torch.tensor(m.drop_prob))
            drop.p = m.drop_prob
    x = zoo.images(6, 33).double()
    torch.testing.assert_close(*(zoo.train_step(m.double(), x) for m in (ours, peer)))


def test_fuse_unfuse_explain_and_verify():
    model = fusedres.models.preact_resnet18(num_classes=3, drop_path_rate=0.3)
    x = zoo.images(4, 40)
    for train in (True, False):
        verified = fusedres.verify(model, x, train=train)
        assert verified.ok, str(verified)
    plain = fusedres.unfuse(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not {r.op for r in fusedres.explain(plain, x).rows} & {"residual_add", "conv_stats"}
    zoo.assert_same_classes(fusedres.fuse(plain), model)


def test_compiles_into_one_graph():
    model = fusedres.blocks.PreActStage(
        fusedres.PreActBasicBlock(8, 8), fusedres.PreActBasicBlock(8, 8)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = randn((2, 8, 6, 6))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_second_derivatives():
    fused, plain = (b.double() for b in pair("PreActBottleneck", stride=2))
    x, found = randn(X, torch.float64).requires_grad_(), []
    for block in (fused, plain):
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(block.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_every_second_channel_of_a_tensor(training):
    fused, plain = pair("PreActBasicBlock")
    channels = fused.conv1.in_channels
    x = randn((2, 2 * channels, 6, 6))[:, ::2]
    check_module(fused.train(training), plain.train(training), x)


def test_an_export_leaves_nothing_behind():
    fused, plain = (b.eval() for b in pair("PreActBasicBlock"))
    x = randn((2, fused.conv1.in_channels, 6, 6))
    with torch.no_grad():
        torch.export.export(fused, (x,))
        check_module(fused, plain, x, graded=False)
