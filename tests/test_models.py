"""The networks against torchvision's, and our blocks inside torchvision's ResNet."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fusedres
from accuracy import assert_as_accurate_as_eager
from harness import assert_same_bits, gradient_like
from modules import PlainSEBasicBlock, PlainSEBottleneck, randomise

TORCHVISIONS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
SE = {
    "se_resnet18": (PlainSEBasicBlock, [2, 2, 2, 2]),
    "se_resnet34": (PlainSEBasicBlock, [3, 4, 6, 3]),
    "se_resnet50": (PlainSEBottleneck, [3, 4, 6, 3]),
    "se_resnet101": (PlainSEBottleneck, [3, 4, 23, 3]),
    "se_resnet152": (PlainSEBottleneck, [3, 8, 36, 3]),
}


def plain_model(name: str, **kwargs) -> nn.Module:
    if name in SE:
        return torchvision.models.ResNet(*SE[name], **kwargs)
    return getattr(torchvision.models, name)(**kwargs)


def layout_of(model: nn.Module) -> list[tuple]:
    return [(n, tuple(t.shape), t.dtype) for n, t in model.state_dict().items()]


@pytest.mark.parametrize("name", [*TORCHVISIONS, *SE])
def test_keys_shapes_and_order_are_torchvisions(name):
    with torch.device("meta"):
        fused, plain = getattr(fusedres.models, name)(), plain_model(name)
    assert layout_of(fused) == layout_of(plain)
    assert [n for n, _ in fused.named_modules()][1] == [n for n, _ in plain.named_modules()][1]


def test_every_model_is_tested():
    """Here, or in test_preact and test_densenet."""
    models = {n for n in fusedres.models.__all__ if n.islower()}
    elsewhere = {n for n in models if n.startswith(("preact_", "densenet"))}
    assert models - elsewhere == {*TORCHVISIONS, *SE, "wide_resnet28_10", "wide_resnet40_2"}


@pytest.mark.parametrize("name,options", [
    ("resnet18", dict(num_classes=10)), ("resnet18", dict(num_classes=3, zero_init_residual=True)),
    ("se_resnet18", dict(num_classes=5)), ("resnet50", dict(num_classes=7, zero_init_residual=True)),
])  # fmt: skip
def test_the_same_seed_gives_the_same_parameters(name, options):
    models = []
    for make in (getattr(fusedres.models, name), lambda **kw: plain_model(name, **kw)):
        torch.manual_seed(4)
        models.append(make(**options))
    fused, plain = models
    assert_same_bits(dict(fused.state_dict()), dict(plain.state_dict()))
    if options.get("zero_init_residual"):
        last = fused.layer1[0].bn3 if name == "resnet50" else fused.layer1[0].bn2
        assert last.weight.count_nonzero() == 0
    plain.load_state_dict(randomise(fused).state_dict())
    fused.load_state_dict(randomise(plain).state_dict())


@pytest.mark.parametrize("block,plain", [
    (fusedres.BasicBlock, torchvision.models.resnet.BasicBlock),
    (fusedres.SEBottleneck, PlainSEBottleneck),
])  # fmt: skip
def test_zero_init_residual_in_torchvisions_resnet(block, plain):
    models = []
    for cls in (block, plain):
        torch.manual_seed(4)
        models.append(
            torchvision.models.ResNet(cls, [1, 1, 1, 1], num_classes=2, zero_init_residual=True)
        )
    assert_same_bits(*(dict(m.state_dict()) for m in models))
    zeros = [n for n, p in models[0].named_parameters() if p.count_nonzero() == 0 and "weight" in n]
    assert len(zeros) == 4


def test_dilation_instead_of_stride():
    options = dict(replace_stride_with_dilation=[False, True, True], num_classes=4)
    fused, plain = fusedres.models.resnet50(**options), torchvision.models.resnet50(**options)
    fused.load_state_dict(randomise(plain).state_dict())
    check_network(fused.eval(), plain.eval(), torch.randn(1, 3, 48, 48), gradients=False)
    with pytest.raises(ValueError, match="replace_stride_with_dilation"):
        fusedres.models.resnet50(replace_stride_with_dilation=[True])


# --- values


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(x)
    y.backward(gradient_like(y))
    return {"y": y.detach()} | {f"d{n}": p.grad.clone() for n, p in model.named_parameters()}


def check_network(fused, plain, x: Tensor, *, gradients: bool = True, steps: int = 1) -> None:
    """Outputs and buffers in float32; gradients in float64.

    In float32 a rounding flips a ReLU somewhere in a deep network, and then the gradients of no two
    executions agree. In float64 none flips, and eager's error is that of its other memory format.
    """
    ref = copy.deepcopy(plain).double()
    if gradients:
        other, ours, truth = (copy.deepcopy(m).double() for m in (plain, fused, plain))
        out, want = step(ours, x.double()), step(truth, x.double())
        nhwc = other.to(memory_format=torch.channels_last)
        eager = step(nhwc, x.double().contiguous(memory_format=torch.channels_last))
        for name, value in out.items():
            of = dict(gradient=True, count=x.numel() // x.shape[1], name=name)
            assert_as_accurate_as_eager(value, want[name], eager[name], **of)
    with torch.no_grad():
        for _ in range(steps):
            out, eager, truth = fused(x), plain(x), ref(x.double())
    assert_as_accurate_as_eager(out, truth, eager)
    buffers = (dict(m.named_buffers()) for m in (fused, ref, plain))
    out, truth, eager = buffers
    for name, value in out.items():
        if value.is_floating_point():
            assert_as_accurate_as_eager(
                value, truth[name], eager[name], count=x.numel() // x.shape[1], name=name
            )
        else:
            assert torch.equal(value, eager[name])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_our_block_in_torchvisions_resnet(training, layout):
    options = dict(layers=[2, 2, 2, 2], num_classes=10)
    fused = torchvision.models.ResNet(fusedres.BasicBlock, **options)
    plain = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, **options)
    fused.load_state_dict(randomise(plain).state_dict())
    fused.train(training), plain.train(training)
    x = torch.randn(4, 3, 33, 33).contiguous(memory_format=layout)
    check_network(fused, plain, x, steps=3 if training else 1)


@pytest.mark.parametrize("name", ["resnet50", "se_resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("training", [True, False])
def test_networks(name, training):
    fused, plain = getattr(fusedres.models, name)(num_classes=5), plain_model(name, num_classes=5)
    fused.load_state_dict(randomise(plain).state_dict())
    fused.train(training), plain.train(training)
    x = torch.randn(2, 3, 33, 33).contiguous(memory_format=torch.channels_last)
    check_network(fused, plain, x, gradients=name == "se_resnet18")


@pytest.mark.parametrize("training", [True, False])
def test_fx_trace_of_a_network(training):
    model = randomise(fusedres.models.resnet18(num_classes=4)).train(training)
    traced = torch.fx.symbolic_trace(model)
    assert not any("fusedres" in str(n.target) for n in traced.graph.nodes)
    x = torch.randn(2, 3, 33, 33)
    ref = copy.deepcopy(traced).double()(x.double())
    with torch.no_grad():
        assert_as_accurate_as_eager(model(x), ref, copy.deepcopy(traced)(x))
