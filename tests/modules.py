"""Compares modules: the outputs, gradients and buffers of ours and of PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import conv1x1

import fusedres
from accuracy import assert_as_accurate_as_eager
from harness import assert_same_bits, assert_same_format, gradient_like


def randomise(module: nn.Module) -> nn.Module:
    """Weights and statistics of norms away from ones and zeros, so that each of them matters."""
    for m in module.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(m, name, None)
            if value is not None and value.dim() == 1:
                low, high = (-0.5, 0.5) if name in ("bias", "running_mean") else (0.5, 1.5)
                nn.init.uniform_(value, low, high)
    return module


def twins(fused: nn.Module, plain: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both modules with the same random state, each loaded strictly."""
    randomise(plain)
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def results(module: nn.Module, *inputs: Tensor, graded: bool = True) -> dict[str, Tensor]:
    """Output, the gradients of inputs and parameters, and the buffers, by name."""
    leaves = [x.detach().requires_grad_(graded) for x in inputs]
    module.zero_grad()
    y = module(*leaves)
    found = {"y": y.detach()}
    if graded:
        y.backward(gradient_like(y))
        found |= {f"dinput{i}": x.grad for i, x in enumerate(leaves)}
        found |= {f"d{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in module.named_buffers()}


def check_module(
    fused: nn.Module, plain: nn.Module, *inputs: Tensor, graded: bool = True, steps: int = 1
) -> dict[str, Tensor]:
    """``fused`` against ``plain``, its eager twin, over some forward and backward passes."""
    ref = copy.deepcopy(plain).double()
    before = [x.clone() for x in inputs]
    for _ in range(steps):
        out, eager = (results(m, *inputs, graded=graded) for m in (fused, plain))
        truth = results(ref, *(x.double() for x in inputs), graded=graded)
    for x, b in zip(inputs, before, strict=True):
        assert_same_bits({"input": x}, {"input": b})
    count = inputs[0].numel() // inputs[0].shape[1]
    assert_as_accurate(out, truth, eager, count, products=1 if graded else products(plain))
    return out


def products(module: nn.Module) -> int:
    """How many products an output of its largest convolution sums.

    A folded weight is rounded once more than eager's, in each of them.
    """
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return max((c.weight[0].numel() for c in convs), default=1)


def assert_as_accurate(out, truth, eager, count: int = 1, products: int = 1) -> None:
    """The accuracy rule for every result; what is not a floating-point number is equal."""
    assert out.keys() == eager.keys() == truth.keys()
    assert_same_format(out["y"], eager["y"])
    for name, value in out.items():
        if not value.is_floating_point():
            assert_same_bits({name: value}, {name: eager[name]})
            continue
        # In float64 the reference shares eager's roundings, so eager's error reads as zero.
        sums = count if name != "y" or value.dtype == torch.float64 else products
        of = dict(gradient=name.startswith("d"), count=sums, name=name)
        assert_as_accurate_as_eager(value, truth[name], eager[name], **of)


class PlainSEBasicBlock(torchvision.models.resnet.BasicBlock):
    """torchvision's block with torchvision's squeeze-excite before the addition."""

    def __init__(self, inplanes, planes, *args, reduction=16, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        channels = planes * self.expansion
        self.se = torchvision.ops.SqueezeExcitation(channels, max(1, channels // reduction))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class PlainSEBottleneck(torchvision.models.resnet.Bottleneck):
    """torchvision's bottleneck with torchvision's squeeze-excite before the addition."""

    def __init__(self, inplanes, planes, *args, reduction=16, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        channels = planes * self.expansion
        self.se = torchvision.ops.SqueezeExcitation(channels, max(1, channels // reduction))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


PLAIN_BLOCKS = {
    "BasicBlock": torchvision.models.resnet.BasicBlock,
    "Bottleneck": torchvision.models.resnet.Bottleneck,
    "SEBasicBlock": PlainSEBasicBlock,
    "SEBottleneck": PlainSEBottleneck,
}


def projection(inplanes: int, outplanes: int, stride: int, norm_layer=nn.BatchNorm2d):
    return nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))


def block_pair(name: str, inplanes=16, planes=8, stride=1, project=True, **kwargs):
    """One of our blocks and its eager twin, in the same state."""
    pair = []
    for cls in (getattr(fusedres, name), PLAIN_BLOCKS[name]):
        norm = kwargs.get("norm_layer") or nn.BatchNorm2d
        down = projection(inplanes, planes * cls.expansion, stride, norm) if project else None
        pair.append(cls(inplanes, planes, stride, down, **kwargs))
    return twins(*pair)


def compare(run: Callable, fused: nn.Module, plain: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What ``run(module, x)`` gives for our module, its eager twin, and that one in float64."""
    ref = copy.deepcopy(plain).double()
    out, eager, truth = (run(m, x.double() if m is ref else x) for m in (fused, plain, ref))
    assert_as_accurate(out, truth, eager, count=x.numel() // x.shape[1])
    return out


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {f"d{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
