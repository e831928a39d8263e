"""Bad input: the error's type, the argument it names, and that nothing has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from cases import BACKENDS, channels, randn
from fusedres.functional import (
    batch_norm_act,
    batch_norm_se_act,
    conv_bn_act,
    residual_mix,
    squeeze_excite,
)  # fmt: skip
from harness import Unchanged, assert_same_bits
from modules import PLAIN_BLOCKS, block_pair

C = 6
META = torch.device("meta")


def integers(*shape):
    return torch.ones(shape, dtype=torch.int64)


def bn_arguments() -> dict:
    return dict(
        input=randn((3, C, 4, 4)), running_mean=torch.zeros(C), running_var=torch.ones(C),
        weight=channels(C), bias=channels(C), training=True, residual=randn((3, C, 4, 4)),
    )  # fmt: skip


def se_arguments() -> dict:
    return dict(
        input=randn((3, C, 4, 4)), w1=torch.randn(2, C), b1=torch.randn(2), w2=torch.randn(C, 2),
        b2=torch.randn(C), residual=randn((3, C, 4, 4)),
    )  # fmt: skip


def conv_arguments() -> dict:
    return dict(
        input=randn((3, C, 4, 4)), weight=torch.randn(8, C, 3, 3), bias=torch.randn(8),
        running_mean=torch.zeros(8), running_var=torch.ones(8), bn_weight=channels(8),
        bn_bias=channels(8), padding=1, residual=randn((3, 8, 4, 4)),
    )  # fmt: skip


def mix_arguments() -> dict:
    shape = (3, C, 4, 4)
    return dict(
        branch=randn(shape), shortcut=randn(shape), gate=torch.rand(shape), row_scale=torch.ones(3)
    )


ARGUMENTS = {
    batch_norm_act: bn_arguments,
    batch_norm_se_act: lambda: se_arguments() | bn_arguments(),
    squeeze_excite: se_arguments,
    conv_bn_act: conv_arguments,
    residual_mix: mix_arguments,
}
BN, SE = (batch_norm_act, batch_norm_se_act), (squeeze_excite, batch_norm_se_act)
ALL_BUT_MIX = (*BN, squeeze_excite, conv_bn_act)

# (functions, what is wrong, error, what its message says)
BAD = [
    # dimensions
    (BN, dict(input=torch.randn(C)), ValueError, r"input: wanted at least 2 dimensions"),
    (SE, dict(input=torch.randn(3, C)), ValueError, r"input: wanted at least 3 dimensions.*\(3, 6\)"),
    ([conv_bn_act], dict(input=torch.randn(C, 4, 4)), ValueError, r"input: wanted 4 dim.*\(6, 4, 4\)"),
    ([residual_mix], dict(branch=torch.randn(3)), ValueError, r"branch: wanted at least 2 dim"),
    # channels (types and wording of F.batch_norm and F.conv2d)
    (BN, dict(weight=torch.ones(5)), RuntimeError, r"weight should contain 6 elements not 5"),
    (BN, dict(bias=torch.ones(7)), RuntimeError, r"bias should contain 6 elements not 7"),
    (BN, dict(running_mean=torch.ones(1)), RuntimeError, r"running_mean should contain 6 .* not 1"),
    (BN, dict(running_var=torch.ones(7)), RuntimeError, r"running_var should contain 6 .* not 7"),
    ([conv_bn_act], dict(bn_weight=torch.ones(7)), RuntimeError, r"bn_weight should contain 8 .* not 7"),
    ([conv_bn_act], dict(running_var=torch.ones(7)), RuntimeError, r"running_var should contain 8"),
    ([conv_bn_act], dict(input=torch.randn(3, 5, 4, 4)), RuntimeError, r"input\[3, 5, 4, 4\] to have 6 channels"),
    (SE, dict(w1=torch.randn(2, 5)), ValueError, r"w1: wanted shape \[R, 6\].*got \(2, 5\)"),
    (SE, dict(w2=torch.randn(C, 3)), ValueError, r"w2: wanted shape \[6, 2\].*got \(6, 3\)"),
    (SE, dict(w1=torch.randn(2, C, 3, 3)), ValueError, r"w1: wanted shape.*\(2, 6, 3, 3\)"),
    (SE, dict(b1=torch.randn(3)), RuntimeError, r"b1 should contain 2 elements not 3"),
    (SE, dict(b2=torch.randn(1)), RuntimeError, r"b2 should contain 6 elements not 1"),
    # residual
    (ALL_BUT_MIX, dict(residual=torch.randn(3, 1, 4, 4)), ValueError, r"residual: wanted shape.*\(3, 1, 4"),
    (ALL_BUT_MIX, dict(residual=torch.randn(3, C, 4, 4).double()), (TypeError, ValueError), r"residual: wanted"),
    (ALL_BUT_MIX, dict(residual=integers(3, C, 4, 4)), TypeError, r"residual: wanted a floating"),
    (ALL_BUT_MIX, dict(residual=torch.randn(3, C, 4, 4, device=META)), RuntimeError, r"residual.*same device.*cpu.*meta"),
    ([residual_mix], dict(shortcut=torch.randn(3, C, 4, 5)), ValueError, r"shortcut: wanted shape.*\(3, 6, 4, 4\)"),
    ([residual_mix], dict(shortcut=torch.randn(3, C, 4, 4).half()), TypeError, r"shortcut: wanted dtype torch.float32"),
    ([residual_mix], dict(gate=torch.rand(3, C, 1, 1)), ValueError, r"gate: wanted shape"),
    ([residual_mix], dict(row_scale=torch.ones(2)), ValueError, r"row_scale: wanted shape \(3,\).*\(2,\)"),
    ([residual_mix], dict(row_scale=integers(3)), TypeError, r"row_scale: wanted a floating"),
    # momentum, eps, names
    (BN, dict(momentum=-0.1), ValueError, r"momentum: wanted .* >= 0, got -0.1"),
    (BN, dict(momentum=float("nan")), ValueError, r"momentum: wanted .* got nan"),
    ((*BN, conv_bn_act), dict(eps=-1e-5), ValueError, r"eps: wanted .* >=? 0, got -1e-05"),
    ((*BN, conv_bn_act, residual_mix), dict(act="swish"), ValueError, r"act: wanted one of 'identity', 'relu'.*'swish'"),
    ([squeeze_excite], dict(post_act="tanh"), ValueError, r"post_act: wanted one of.*'tanh'"),
    (SE, dict(gate="softmax"), ValueError, r"gate: wanted one of 'sigmoid', 'hard_sigmoid', got 'softmax'"),
    # integers, other things than tensors, devices
    (ALL_BUT_MIX, dict(input=integers(3, C, 4, 4)), TypeError, r"input: wanted a floating-point.*int64"),
    (ALL_BUT_MIX, dict(input=[1.0]), TypeError, r"input: wanted a tensor, got list"),
    (BN, dict(weight=integers(C)), TypeError, r"weight: wanted a floating-point.*int64"),
    (SE, dict(w1=integers(2, C)), TypeError, r"w1: wanted a floating-point.*int64"),
    (SE, dict(b2=integers(C)), TypeError, r"b2: wanted a floating-point.*int64"),
    ([conv_bn_act], dict(bn_bias=integers(8)), TypeError, r"bn_bias: wanted a floating-point.*int64"),
    ([residual_mix], dict(branch=integers(3, C, 4, 4)), TypeError, r"branch: wanted a floating"),
    (BN, dict(weight=torch.ones(C, device=META)), RuntimeError, r"weight.*same device.*cpu.*meta"),
    (SE, dict(w2=torch.ones(C, 2, device=META)), RuntimeError, r"w2.*same device.*cpu.*meta"),
    # statistics
    (BN, dict(input=torch.randn(1, C, 1, 1), residual=None), ValueError, r"Expected more than 1 value per channel"),
    (BN, dict(training=False, running_mean=None), RuntimeError, r"Expected running_mean and running_var to be def"),
    # convolution (F.conv2d's own) and inference only
    ([conv_bn_act], dict(groups=4), RuntimeError, r"groups"),
    ([conv_bn_act], dict(weight=torch.randn(8, C, 3, 3).double()), (RuntimeError, TypeError), r"weight|same|dtype"),
    ([conv_bn_act], dict(weight=torch.randn(8, C, 9, 9)), RuntimeError, r"[Kk]ernel size"),
    ([conv_bn_act], dict(input=randn((3, C, 4, 4)).requires_grad_()), RuntimeError, r"wanted input without requires_grad"),
    ([conv_bn_act], dict(bn_weight=torch.ones(8).requires_grad_()), RuntimeError, r"wanted bn_weight without"),
]  # fmt: skip
CASES = [
    pytest.param(f, *rest, id=f"{f.__name__}-{'-'.join(rest[0])}-{i}")
    for i, (functions, *rest) in enumerate(BAD)
    for f in functions
]


@pytest.mark.parametrize("function,wrong,error,message", CASES)
def test_functional(function, wrong, error, message):
    arguments = ARGUMENTS[function]() | wrong
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.device != META]
    for backend in BACKENDS:
        with fusedres.backend(backend), Unchanged(*tensors):
            with pytest.raises(error, match=message):
                function(**arguments)


def test_an_inference_op_called_with_gradients():
    """The op itself refuses too: a gradient is never silently lost."""
    a = conv_arguments()
    weight = a["weight"].requires_grad_()
    y = torch.ops.fusedres.conv_bn_act(
        a["input"], weight, None, None, None, None, a["running_mean"], a["running_var"], 1e-5,
        [1, 1], [1, 1], [1, 1], 1, "relu",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="for inference and has no derivative"):
        y.sum().backward()
    assert weight.grad is None


# --- modules


@pytest.mark.parametrize("make,error,message", [
    (lambda: fusedres.BatchNormAct2d(4, momentum=-1.0), ValueError, "momentum: wanted"),
    (lambda: fusedres.BatchNormAct2d(4, eps=-1.0), ValueError, "eps: wanted"),
    (lambda: fusedres.BatchNormAct2d(4, act="swish"), ValueError, "act: wanted one of"),
    (lambda: fusedres.ConvBNAct2d(4, 6, 3, groups=4), ValueError, "divisible by groups"),
    (lambda: fusedres.ConvBNAct2d(4, 6, 3, act="swish"), ValueError, "act: wanted one of"),
    (lambda: fusedres.SqueezeExcite(4, act="swish"), ValueError, "act: wanted one of"),
    (lambda: fusedres.SqueezeExcite(4, gate="relu"), ValueError, "gate: wanted one of"),
    (lambda: fusedres.BasicBlock(4, 4, groups=2), ValueError, "groups=1 and base_width=64"),
    (lambda: fusedres.BasicBlock(4, 4, base_width=128), ValueError, "groups=1 and base_width=64"),
    (lambda: fusedres.BasicBlock(4, 4, dilation=2), NotImplementedError, "Dilation > 1"),
    (lambda: fusedres.SEBasicBlock(4, 4, reduction=0), ValueError, "reduction: wanted"),
])  # fmt: skip
def test_constructors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", PLAIN_BLOCKS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", [
    torch.randn(2, 5, 6, 6), torch.randn(2, 16, 6), torch.randn(2, 16, 6, 6, 6),
    torch.ones(2, 16, 6, 6, dtype=torch.int64),
], ids=["channels", "3d", "5d", "integers"])  # fmt: skip
def test_blocks_raise_what_torchvisions_raise(x, training, name):
    fused, plain = (b.train(training) for b in block_pair(name))
    raised = []
    before = {b: {n: t.clone() for n, t in b.state_dict().items()} for b in (fused, plain)}
    for block in (fused, plain):
        with pytest.raises(Exception) as error:
            block(x)
        raised.append((type(error.value), str(error.value)))
        assert_same_bits(dict(block.state_dict()), before[block])
    assert raised[0] == raised[1]


@pytest.mark.parametrize("name", PLAIN_BLOCKS)
def test_one_value_per_channel_in_training(name):
    """Raised where PyTorch raises it; the norms that came before have counted nothing."""
    fused, plain = block_pair(name, stride=2)
    x = randn((1, 16, 2, 2))
    with pytest.raises(ValueError) as wanted:
        plain(x)
    with Unchanged(fused, x), pytest.raises(ValueError) as raised:
        fused(x)
    assert str(raised.value) == str(wanted.value)


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_a_shortcut_of_another_shape(name):
    fused, plain = block_pair(name, inplanes=16, planes=8, project=False)
    x = randn((2, 16, 6, 6))
    for training in (True, False):
        with pytest.raises(RuntimeError) as wanted:
            plain.train(training)(x)
        with Unchanged(fused, x), pytest.raises(RuntimeError) as raised:
            fused.train(training)(x)
        assert str(raised.value) == str(wanted.value)


LAYERS = {
    "bn": (lambda: fusedres.BatchNormAct2d(6), (3, 6, 4, 4)),
    "conv": (lambda: fusedres.ConvBNAct2d(6, 6, 3), (3, 6, 4, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("residual,error", [
    (torch.randn(3, 6, 4, 5), (ValueError, RuntimeError)),
    (torch.randn(3, 6, 4, 4, device="meta"), RuntimeError),
], ids=["shape", "device"])  # fmt: skip
def test_a_wrong_residual_leaves_a_layer_as_it_was(residual, error, layer):
    make, shape = LAYERS[layer]
    for training in (True, False):
        module, x = make().train(training), randn(shape)
        with torch.set_grad_enabled(training), Unchanged(module, x), pytest.raises(error):
            module(x, residual)


def test_batch_norm_input_of_three_dimensions():
    module = fusedres.BatchNormAct2d(6)
    with Unchanged(module), pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        module(torch.randn(2, 6, 4))


@pytest.mark.parametrize("name", PLAIN_BLOCKS)
def test_state_dicts_with_missing_or_extra_keys(name):
    fused, _ = block_pair(name)
    state = dict(fused.state_dict())
    missing = {n: t for n, t in state.items() if n != "bn1.running_mean"}
    extra = state | {"conv9.weight": torch.ones(1)}
    for wrong, message in (
        (missing, r'Missing.*"bn1.running_mean"'),
        (extra, r'Unexpected.*"conv9'),
    ):
        with Unchanged(fused), pytest.raises(RuntimeError, match=message):
            fused.load_state_dict(wrong)


def test_fuse_on_something_without_blocks():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with Unchanged(model), pytest.raises(ValueError, match="model: wanted residual blocks.*Linear"):
        fusedres.fuse(model)
    with pytest.raises(TypeError, match="model"):
        fusedres.fuse("resnet18")
