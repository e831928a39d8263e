"""BatchNormAct2d, ConvBNAct2d and SqueezeExcite against the modules they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fusedres
from cases import backends, layouts, randn
from fusedres import BatchNormAct2d, ConvBNAct2d, SqueezeExcite
from harness import assert_same_bits
from modules import assert_as_accurate, check_module, randomise, results, twins


class PlainBatchNormAct(nn.BatchNorm2d):
    """What BatchNormAct2d means: nn.BatchNorm2d, addition, activation."""

    def __init__(self, *args, act="relu", **kwargs):
        super().__init__(*args, **kwargs)
        self.act = fusedres.reference.ACTIVATIONS[act]

    def forward(self, x, residual=None):
        y = super().forward(x)
        return self.act(y if residual is None else y + residual)


class PlainConvBNAct(nn.Module):
    def __init__(self, conv: nn.Conv2d, act="relu"):
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)
        self.act = fusedres.reference.ACTIVATIONS[act]

    def forward(self, x, residual=None):
        y = self.bn(self.conv(x))
        return self.act(y if residual is None else y + residual)


# --- BatchNormAct2d

BN_OPTIONS = {
    "default": {},
    "cumulative": dict(momentum=None),
    "momentum": dict(momentum=0.3, eps=1e-3),
    "frozen_momentum": dict(momentum=0.0),
    "no_running_stats": dict(track_running_stats=False),
    "no_affine": dict(affine=False),
    "neither": dict(affine=False, track_running_stats=False, act="gelu"),
}


@backends
@pytest.mark.parametrize("case", BN_OPTIONS)
def test_batch_norm_over_three_steps(case, backend):
    options = BN_OPTIONS[case]
    fused, plain = twins(BatchNormAct2d(6, **options), PlainBatchNormAct(6, **options))
    with fusedres.backend(backend):
        check_module(fused, plain, randn((4, 6, 5, 5), layout="NHWC"), randn((4, 6, 5, 5)), steps=3)
        for module in (fused, plain):
            module.eval()
        check_module(fused, plain, randn((4, 6, 5, 5)))
        tracks = options.get("track_running_stats", True)
        check_module(fused, plain, randn((1, 6, 1, 1) if tracks else (3, 6, 1, 1)))


def test_batch_norm_state_is_pytorchs():
    fused, plain = BatchNormAct2d(7), nn.BatchNorm2d(7)
    assert isinstance(fused, nn.BatchNorm2d)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same_bits(fused.state_dict(), plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    double = BatchNormAct2d(7, device="cpu", dtype=torch.float64)
    assert double.weight.dtype == double.running_var.dtype == torch.float64
    assert "act='relu'" in repr(fused)


def test_batch_norm_whose_statistics_were_removed():
    """As in PyTorch, a module without buffers normalises with the batch in eval mode too."""
    fused, plain = twins(BatchNormAct2d(6), PlainBatchNormAct(6))
    for module in (fused, plain):
        module.eval()
        module.running_mean = module.running_var = None
    check_module(fused, plain, randn((4, 6, 5, 5)))


def test_batch_norm_that_stops_tracking():
    fused, plain = twins(BatchNormAct2d(6), PlainBatchNormAct(6))
    for module in (fused, plain):
        module.track_running_stats = False
    check_module(fused, plain, randn((4, 6, 5, 5)))
    for module in (fused, plain):
        module.eval()
    check_module(fused, plain, randn((4, 6, 5, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_reduced_precision_input_with_float32_parameters(training, dtype):
    fused, plain = twins(BatchNormAct2d(6), PlainBatchNormAct(6))
    fused.train(training), plain.train(training)
    x = randn((4, 6, 5, 5), dtype, "NHWC")
    check_module(fused, plain, x, randn((4, 6, 5, 5), dtype, "NHWC"))
    assert fused(x).dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_half_batch_norm(training):
    """half() turns the running statistics to float16 too."""
    fused, plain = twins(BatchNormAct2d(6).half(), PlainBatchNormAct(6).half())
    fused.train(training), plain.train(training)
    out = check_module(fused, plain, randn((4, 6, 5, 5), torch.float16), steps=2)
    assert out["running_var"].dtype == torch.float16


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (3, 6, 0, 4)], ids=str)
def test_empty_batch(shape):
    fused, plain = twins(BatchNormAct2d(6), PlainBatchNormAct(6))
    out, eager = (results(m, torch.empty(shape)) for m in (fused, plain))
    assert_same_bits(out, eager)


# --- ConvBNAct2d

CONV_OPTIONS = {
    "3x3": dict(kernel_size=3),
    "stride": dict(kernel_size=3, stride=2, act="relu6"),
    "1x1": dict(kernel_size=1, act="identity"),
    "grouped": dict(kernel_size=3, groups=4, act="silu"),
    "dilated": dict(kernel_size=(3, 5), dilation=2),
    "padding": dict(kernel_size=3, padding=0, act="leaky_relu"),
    "same": dict(kernel_size=3, padding="same", act="gelu"),
    "same_of_even_kernel": dict(kernel_size=2, padding="same"),
}


def conv_pair(act="relu", padding=None, **options):
    fused = ConvBNAct2d(8, 12, act=act, padding=padding, **options)
    conv = nn.Conv2d(8, 12, padding=fused.conv.padding, bias=False, **options)
    return twins(fused, PlainConvBNAct(conv, act))


@backends
@layouts
@pytest.mark.parametrize("case", CONV_OPTIONS)
def test_conv_bn_act(case, layout, backend):
    fused, plain = conv_pair(**CONV_OPTIONS[case])
    x = randn((3, 8, 9, 9), layout=layout)
    residual = randn(plain(x).shape)
    fused.load_state_dict(plain.state_dict())
    with fusedres.backend(backend):
        check_module(fused, plain, x, residual, steps=2)
        fused.eval(), plain.eval()
        check_module(fused, plain, x, residual)
        with torch.no_grad():
            check_module(fused, plain, x, residual, graded=False)
            check_module(fused, plain, x, graded=False)


def test_default_padding_keeps_the_size():
    x = torch.randn(1, 4, 9, 9)
    for options in (dict(kernel_size=5), dict(kernel_size=(1, 7)), dict(kernel_size=3, dilation=3)):
        assert ConvBNAct2d(4, 2, **options)(x).shape == (1, 2, 9, 9)


def test_conv_bn_act_holds_plain_modules():
    fused = ConvBNAct2d(4, 2, 3, dtype=torch.float64)
    assert type(fused.conv) is nn.Conv2d and type(fused.bn) is nn.BatchNorm2d
    assert fused.conv.bias is None and fused.bn.weight.dtype == torch.float64
    assert "act='relu'" in repr(fused)


# --- SqueezeExcite


class PlainSqueezeExcite(torchvision.ops.SqueezeExcitation):
    def forward(self, x, residual=None, post_act=None):
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y if post_act is None else F.relu(y)


class Tail(nn.Module):
    """Squeeze-excite, residual and activation."""

    def __init__(self, se, post_act):
        super().__init__()
        self.se, self.post_act = se, post_act

    def forward(self, x, residual=None):
        return self.se(x, residual, self.post_act)


@backends
@layouts
@pytest.mark.parametrize("post_act", [None, "relu"])
@pytest.mark.parametrize("act,gate", [("relu", "sigmoid"), ("silu", "hard_sigmoid")])
def test_squeeze_excite(act, gate, post_act, layout, backend):
    activations = dict(relu=nn.ReLU, silu=nn.SiLU, sigmoid=nn.Sigmoid, hard_sigmoid=nn.Hardsigmoid)
    fused = SqueezeExcite(12, 3, act=act, gate=gate)
    plain = PlainSqueezeExcite(12, 3, activations[act], activations[gate])
    pair = twins(Tail(fused, post_act), Tail(plain, post_act))
    x, residual = (randn((3, 12, 6, 5), layout=layout) for _ in range(2))
    with fusedres.backend(backend):
        check_module(*pair, x, residual)
        check_module(*pair, x)


def test_squeeze_excite_state_is_torchvisions():
    torch.manual_seed(1)
    fused = SqueezeExcite(32)
    torch.manual_seed(1)
    plain = torchvision.ops.SqueezeExcitation(32, 2)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same_bits(fused.state_dict(), plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert SqueezeExcite(8).fc1.out_channels == 1


def test_a_hook_inside_squeeze_excite_fires():
    module = randomise(SqueezeExcite(12, 3))
    x, seen = randn((2, 12, 4, 4)), []
    want = module(x)
    handle = module.fc2.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    unfused = module(x)
    handle.remove()
    assert seen == [(2, 12, 1, 1)]
    truth = randomise(SqueezeExcite(12, 3)).double()
    truth.load_state_dict(module.state_dict())
    assert_as_accurate(*({"y": y} for y in (want, truth(x.double()), unfused)))
