"""The residual blocks against torchvision's: state, values, gradients, modes, formats, dtypes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import resnet

import fusedres
from cases import arrange, backends, layouts, randn
from fusedres import observers
from harness import assert_same_bits, assert_same_format
from modules import PLAIN_BLOCKS, assert_as_accurate, block_pair, check_module, randomise, results

BLOCKS = {
    "basic": dict(name="BasicBlock", planes=16, project=False),
    "basic_stride": dict(name="BasicBlock", stride=2),
    "bottleneck": dict(name="Bottleneck", planes=4, project=False),
    "bottleneck_stride": dict(name="Bottleneck", stride=2),
    "bottleneck_wide": dict(name="Bottleneck", base_width=128),
    "bottleneck_grouped": dict(name="Bottleneck", planes=16, groups=4, base_width=16),
    "bottleneck_dilated": dict(name="Bottleneck", dilation=2),
    "se_basic": dict(name="SEBasicBlock", stride=2, reduction=4),
    "se_bottleneck": dict(name="SEBottleneck", planes=4, project=False),
    "se_bottleneck_stride": dict(name="SEBottleneck", stride=2, reduction=8),
}
NAMES = tuple(PLAIN_BLOCKS)


@backends
@pytest.mark.parametrize("layout,case", list(zip(("NCHW", "NHWC") * 5, BLOCKS, strict=True)))
def test_training_then_inference(case, layout, backend):
    fused, plain = block_pair(**BLOCKS[case])
    x = randn((3, 16, 9, 9), layout=layout)
    with fusedres.backend(backend):
        check_module(fused, plain, x, steps=3)
        fused.eval(), plain.eval()
        check_module(fused, plain, x)  # frozen statistics, with gradients
        with torch.no_grad():
            check_module(fused, plain, x, graded=False)


@pytest.mark.parametrize("case", ["basic_stride", "bottleneck", "se_bottleneck"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_images(size, case):
    fused, plain = block_pair(**BLOCKS[case])
    for layout in ("NCHW", "NHWC"):
        check_module(fused, plain, randn((5, 16, size, size), layout=layout))
    fused.eval(), plain.eval()
    with torch.no_grad():
        check_module(fused, plain, randn((1, 16, size, size)), graded=False)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_torchvisions(name):
    """Keys, shapes, order and default initialisation; strict loading both ways."""
    pair = []
    for cls in (getattr(fusedres, name), PLAIN_BLOCKS[name]):
        torch.manual_seed(3)
        pair.append(cls(32, 8, 2, nn.Conv2d(32, 8 * cls.expansion, 1, 2)))
    fused, plain = pair
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same_bits(fused.state_dict(), plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(randomise(fused).state_dict())
    fused.load_state_dict(randomise(plain).state_dict())
    assert_same_bits(fused.state_dict(), plain.state_dict())
    assert fused.expansion == plain.expansion and fused.stride == plain.stride == 2
    assert {n for n, _ in fused.named_children()} == {n for n, _ in plain.named_children()}


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_blocks_are_torchvisions_to_isinstance(name):
    """torchvision's zero_init_residual finds them, and the SE blocks too."""
    for prefix in ("", "SE"):
        block = getattr(fusedres, prefix + name)(8, 2)
        assert isinstance(block, getattr(resnet, name)) and isinstance(
            block, getattr(fusedres, name)
        )
        last = block.bn3 if name == "Bottleneck" else block.bn2
        block.zero_init_last()
        assert last.weight.count_nonzero() == 0 and block.bn1.weight.count_nonzero() > 0


# --- other norms

NORMS = {
    "sync": nn.SyncBatchNorm,
    "frozen": torchvision.ops.FrozenBatchNorm2d,
    "group": partial(nn.GroupNorm, 4),
    "instance": nn.InstanceNorm2d,
    "instance_tracking": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "partial": partial(nn.BatchNorm2d, eps=1e-3, momentum=None),
    "no_affine": partial(nn.BatchNorm2d, affine=False),
    "no_statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "identity": lambda channels: nn.Identity(),
}
UNFUSED = {"group", "instance", "instance_tracking", "identity"}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["BasicBlock", "SEBottleneck"])
def test_norm_layers(name, norm):
    fused, plain = block_pair(name, stride=2, norm_layer=NORMS[norm])
    x = randn((3, 16, 7, 7), layout="NHWC")
    check_module(fused, plain, x, steps=2)
    fused.eval(), plain.eval()
    check_module(fused, plain, x)
    events = []
    with torch.no_grad(), observers.observe(events.append):
        check_module(fused, plain, x, graded=False)
    unfused = [e.reason for e in events if e.backend == "unfused"]
    assert bool(unfused) == (norm in UNFUSED) and all(unfused)


def test_a_batch_norm_of_another_forward_is_not_replaced():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    fused, plain = block_pair("Bottleneck", norm_layer=Doubled)
    check_module(fused, plain, randn((3, 16, 6, 6)))


# --- memory formats


@pytest.mark.parametrize("case", ["basic", "bottleneck_stride", "se_basic"])
@pytest.mark.parametrize("weights", ["NCHW", "NHWC"])
@layouts
@pytest.mark.parametrize("training", [True, False])
def test_the_format_out_is_pytorchs(training, layout, weights, case):
    fused, plain = block_pair(**BLOCKS[case])
    if weights == "NHWC":
        fused, plain = (b.to(memory_format=torch.channels_last) for b in (fused, plain))
    fused.train(training), plain.train(training)
    x = randn((3, 16, 6, 6), layout=layout)
    with torch.set_grad_enabled(training):
        assert_same_format(fused(x), plain(x))
        view = arrange(randn((3, 16, 6, 12)), layout)[..., ::2]
        assert_same_format(fused(view), plain(view))


def test_slices_and_expanded_inputs():
    fused, plain = block_pair("BasicBlock", stride=2)
    base = randn((4, 20, 9, 9), layout="NHWC")
    check_module(fused, plain, base[:, 2:18])
    check_module(fused, plain, base[:3, :16, 1:8, 1:])
    expanded = randn((1, 16, 7, 7)).expand(3, -1, -1, -1)
    for block in (fused.eval(), plain.eval()):
        block.zero_grad()
    with torch.no_grad():
        check_module(fused, plain, expanded, graded=False)


@pytest.mark.parametrize("case", ["basic", "bottleneck_stride", "se_basic"])
def test_empty_batch(case):
    fused, plain = block_pair(**BLOCKS[case])
    for training in (True, False):
        fused.train(training), plain.train(training)
        out, eager = (results(b, torch.empty(0, 16, 6, 6)) for b in (fused, plain))
        assert_same_bits(out, eager)


# --- dtypes

# In reduced precision a rounding flips the ReLU of one element in a thousand, in any execution:
# enough elements that eager's own flips tell how much that may matter.
MANY = (32, 16, 9, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["basic_stride", "bottleneck", "se_bottleneck"])
def test_modules_of_another_dtype(case, dtype):
    fused, plain = (b.to(dtype) for b in block_pair(**BLOCKS[case]))
    x = randn(MANY, dtype, "NHWC")
    out = check_module(fused, plain, x)
    assert out["y"].dtype == out["bn1.running_var"].dtype == dtype
    fused.eval(), plain.eval()
    with torch.no_grad():
        check_module(fused, plain, x, graded=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_convolutions_beside_float32_norms(dtype):
    pair = block_pair("Bottleneck", stride=2)
    for block in pair:
        block.to(dtype)
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()
    out = check_module(*pair, randn(MANY, dtype, "NHWC"))
    assert out["dconv1.weight"].dtype == dtype and out["dbn1.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_input_and_weights_of_different_dtypes_raise_as_in_pytorch(name, dtype):
    fused, plain = block_pair(name)
    for training in (True, False):
        raised = []
        for block in (fused.train(training), plain.train(training)):
            before = copy.deepcopy(block.state_dict())
            with pytest.raises(RuntimeError) as error:
                block(randn((2, 16, 5, 5), dtype))
            raised.append(str(error.value))
            assert_same_bits(block.state_dict(), before)
        assert raised[0] == raised[1]


@pytest.mark.parametrize("case", ["basic_stride", "bottleneck", "se_bottleneck_stride"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(training, case):
    fused, plain = block_pair(**BLOCKS[case])
    ref = copy.deepcopy(plain).double()
    x = randn(MANY, layout="NHWC")
    for graded in (True, False):
        found = []
        for block in (fused, plain, ref):
            block.train(training)
            with torch.autocast("cpu", torch.bfloat16, enabled=block is not ref):
                found.append(results(block, x.double() if block is ref else x, graded=graded))
        out, eager, truth = found
        assert out["y"].dtype == torch.bfloat16
        assert_as_accurate(out, truth, eager)


def test_autocast_leaves_float64_alone():
    fused, plain = (b.double() for b in block_pair("BasicBlock"))
    x = randn((2, 16, 5, 5), torch.float64)
    for block in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.float64
