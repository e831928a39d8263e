"""conv_bn_act and conv_stats on Triton: the convolutions' kernels, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

import test_conv_bn_act as inference
import test_conv_stats as training
from accuracy import assert_as_accurate_as_eager
from cases import Conv, arrange, channels, misaligned, sliced, values_per_channel
from fusedres import reference, triton_kernels
from harness import Unchanged, assert_same_bits, assert_same_non_finite, gradients
from triton_cases import devices, executions, to, triton_on

triton = pytest.importorskip("triton")

conv = triton_kernels.package().module("conv")
implicit_gemm = triton_kernels.package().module("implicit_gemm")
launch = triton_kernels.package().module("launch")
OPS = "conv_bn_act", "conv_stats", "conv_grad"
MODULES = tuple(triton_kernels.package().module(op) for op in OPS)

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels are compiled here")

# Sizes that fill no tile, every kind of geometry, and more than one tile of everything.
CASES = {
    "1x1": Conv((2, 17, 5, 3), (20, 17, 1, 1), padding=(0, 0), bias=True),
    "1x1_stride": Conv((2, 24, 7, 5), (9, 24, 1, 1), stride=(2, 2), padding=(0, 0)),
    "1x1_padded": Conv((1, 5, 3, 4), (6, 5, 1, 1), padding=(1, 1)),
    "1x1_images": Conv((5, 33, 1, 1), (20, 33, 1, 1), padding=(0, 0), layout="NCHW"),
    "3x3": Conv((2, 19, 5, 4), (21, 19, 3, 3)),
    "3x3_stride": Conv((2, 16, 8, 7), (24, 16, 3, 3), stride=(2, 2), weight_layout="NHWC"),
    "dilated": Conv((1, 6, 11, 9), (7, 6, 3, 3), padding=(2, 2), dilation=(2, 2)),
    "grouped": Conv((2, 40, 4, 5), (36, 20, 3, 3), groups=2, stride=(1, 2), bias=True),
    "row_kernel": Conv((2, 4, 5, 12), (6, 4, 1, 3), stride=(1, 2), padding=(0, 1)),
    "stem": Conv((1, 3, 8, 7), (10, 3, 7, 7), stride=(2, 2), padding=(3, 3)),
    "tiles": Conv((2, 66, 9, 8), (66, 66, 1, 1), padding=(0, 0)),
    "narrow_groups": Conv((2, 32, 4, 5), (32, 4, 3, 3), groups=8),  # ResNeXt's 32x4d
}
ACTS = dict(
    zip(CASES, 2 * ("relu", "identity", "silu", "relu6", "gelu", "hardswish"), strict=False)
)
NORMS = dict(zip(CASES, 4 * ("batch", "running", None), strict=False))


@pytest.fixture
def kernels_only(monkeypatch):
    """Our kernels carry every convolution out, 3x3 as well."""
    for module in MODULES:
        monkeypatch.setattr(module, "in_order", lambda conv, rivals: conv.ways())
    monkeypatch.setattr(MODULES[2], "backward_at_once", lambda view: False)


@pytest.fixture
def descriptors(monkeypatch):
    """The interpreter loads through tensor descriptors, as a GPU of today does."""
    monkeypatch.setattr(conv, "target_has_tma", lambda device: True)


def inference_tensors(case: Conv, dtype, residual=True):
    return inference.tensors_of(case, dtype, residual)


@executions
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("kernels_only")
def test_inference(case, device, dtype):
    tensors = inference_tensors(CASES[case], dtype, residual=len(case) % 2 == 0)
    with triton_on(device), triton_kernels.counted() as launched:
        inference.check_against_reference(to(device, tensors), CASES[case], ACTS[case])
    assert launched == ["conv_bn_act_fwd_kernel"] * 2


@executions
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("kernels_only")
def test_training(case, device, dtype):
    options = dict(bn=NORMS[case], act=ACTS[case])
    tensors = training.tensors_of(CASES[case], dtype, **options)
    with triton_on(device), triton_kernels.counted() as launched:
        training.check_against_reference(to(device, tensors), CASES[case], options)
    geometry = CASES[case]
    behind = NORMS[case] and geometry.stride == (1, 1) and case != "1x1_padded"
    wanted = ["conv_stats_fwd_kernel", *["conv_grad_kernel"] * bool(behind)]
    assert [n for n in launched if "conv" in n] == wanted


def check_statistics(found, y):
    """Mean and variance of the values that were stored."""
    for out, ref, eager in zip(
        found, reference.bn_stats(y.double()), reference.bn_stats(y), strict=True
    ):
        assert_as_accurate_as_eager(out, ref, eager, count=values_per_channel(y))


@executions
@pytest.mark.parametrize("case", ["1x1", "3x3_stride", "grouped", "tiles"])
@pytest.mark.usefixtures("kernels_only")
def test_statistics_are_of_the_values_that_are_stored(case, device, dtype, monkeypatch):
    monkeypatch.setattr(MODULES[1], "REDUCE_PROGRAMS", 1)  # one program has several tiles
    t = to(device, training.tensors_of(CASES[case], dtype, bn=None))
    no_bn = None, None, None, None, False, 0.0, "identity"
    args = t["x"], *no_bn, t["weight"], t["bias"], *CASES[case].geometry
    with triton_on(device):
        y, *found = torch.ops.fusedres.conv_stats(*args, True)
        same, *nothing = torch.ops.fusedres.conv_stats(*args, False)
    check_statistics(found, y)
    assert_same_bits({"y": y}, {"y": same})
    assert [t.numel() for t in nothing] == [0, 0]


@devices
@pytest.mark.usefixtures("kernels_only")
def test_statistics_far_from_zero(device, monkeypatch):
    """A bias that is many times the deviation of the products."""
    monkeypatch.setattr(MODULES[1], "REDUCE_PROGRAMS", 1)
    case = Conv((3, 16, 9, 8), (20, 16, 1, 1), padding=(0, 0), bias=True)
    t = training.tensors_of(case, torch.float32, bn=None)
    t = to(device, t | {"bias": torch.full((20,), 64.0)})
    no_bn = None, None, None, None, False, 0.0, "identity"
    with triton_on(device):
        y, *found = torch.ops.fusedres.conv_stats(
            t["x"], *no_bn, t["weight"], t["bias"], *case.geometry, True
        )
    check_statistics(found, y)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.usefixtures("kernels_only", "descriptors")
def test_through_tensor_descriptors(norm, dtype):
    """Rows, channels and steps that the last tile does not fill; images of one pixel."""
    odd = Conv((3, 72, 6, 5), (40, 72, 1, 1), padding=(0, 0), bias=True)
    pixels = Conv((5, 24, 1, 1), (20, 24, 1, 1), padding=(0, 0), layout="NCHW")
    with triton_on("cpu"), launch.dry_run() as recorded:
        MODULES[0].conv_bn_act(*inference_args(odd, inference_tensors(odd, dtype)))
    assert [one.flags["TMA"] for one in recorded] == [True, True, False, False]
    for case in (odd, pixels):
        tensors = training.tensors_of(case, dtype, norm)
        with triton_on("cpu"):
            inference.check_against_reference(inference_tensors(case, dtype), case, "relu")
            training.check_against_reference(tensors, case, dict(bn=norm, act="silu"))


@interpreted
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.usefixtures("kernels_only")
def test_rows_that_fill_up_the_last_tile_are_not_in_the_statistics(tma, monkeypatch):
    """What a norm makes of a descriptor's zeros is far from zero."""
    monkeypatch.setattr(conv, "target_has_tma", lambda device: tma)
    case = Conv((3, 24, 3, 5), (20, 24, 1, 1), padding=(0, 0))
    t = training.tensors_of(case, torch.float32, bn="running")
    norm = t["bn_weight"], t["bn_bias"] + 50.0, t["mean"], t["var"], False, 1e-5, "relu"
    args = t["x"], *norm, t["weight"], None, *case.geometry, True
    with triton_on("cpu"):
        y, *found = torch.ops.fusedres.conv_stats(*args)
    check_statistics(found, y)


def inference_args(case: Conv, t: dict) -> tuple:
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    return *(t[n] for n in names), 1e-5, *case.geometry, "relu"


@interpreted
@pytest.mark.parametrize("case,wanted", [
    (Conv((2, 16, 4, 4), (8, 16, 1, 1), padding=(0, 0)), True),
    (Conv((2, 17, 4, 4), (8, 17, 1, 1), padding=(0, 0)), False),  # rows of 68 bytes
    (Conv((2, 16, 4, 4), (8, 16, 1, 1), stride=(2, 2), padding=(0, 0)), False),
    (Conv((2, 16, 4, 4), (8, 16, 1, 1)), False),
    (Conv((2, 16, 4, 4), (8, 16, 3, 3)), False),
    (Conv((2, 32, 4, 4), (32, 16, 1, 1), padding=(0, 0), groups=2), False),
])  # fmt: skip
@pytest.mark.usefixtures("descriptors")
def test_what_a_descriptor_describes(case, wanted):
    t = inference_tensors(case, torch.float32)
    assert conv.Conv("op", t["x"], t["weight"], case.geometry).has_tma() == wanted
    assert not conv.Conv("op", misaligned(t["x"])[0], t["weight"], case.geometry).has_tma()
    assert not conv.Conv("op", sliced(t["x"])[0], t["weight"], case.geometry).has_tma()


@devices
@pytest.mark.parametrize("case", ["1x1", "3x3_stride"])
@pytest.mark.usefixtures("kernels_only")
def test_views_over_a_sentinel(case, device):
    """Strides are honoured; NaN lies everywhere around the tensors, and the images."""
    tensors = to(device, inference_tensors(CASES[case], torch.float32))
    for view_of in (misaligned, sliced):
        views, buffers = dict(tensors), []
        for name in ("x", "weight", "residual", "bn_weight"):
            views[name], buffer = view_of(tensors[name])
            buffers.append(buffer)
        with triton_on(device), Unchanged(*buffers), triton_kernels.counted() as launched:
            inference.check_against_reference(views, CASES[case], "relu")
        assert launched == ["conv_bn_act_fwd_kernel"] * 2
    without_bn = to(device, training.tensors_of(CASES[case], torch.float32, bn=None))
    without_bn["x"], buffer = sliced(without_bn["x"])
    with triton_on(device), Unchanged(buffer):
        training.check_against_reference(without_bn, CASES[case], dict(bn=None))


@devices
@pytest.mark.usefixtures("kernels_only")
def test_the_padding_is_of_the_activation_not_of_what_goes_into_it(device):
    """act(bn(0)) is far from zero, and still a tap outside of the image counts nothing."""
    case = Conv((2, 8, 4, 3), (6, 8, 3, 3))
    t = to(device, training.tensors_of(case, torch.float32, bn="running"))
    t["bn_bias"] = torch.full_like(t["bn_bias"], 50.0)
    with triton_on(device):
        training.check_against_reference(t, case, dict(bn="running"))


@devices
@pytest.mark.usefixtures("kernels_only")
def test_without_affine_parameters(device):
    case = CASES["1x1"]
    for missing in (("bn_weight",), ("bn_bias",), ("bn_weight", "bn_bias")):
        t = to(device, inference_tensors(case, torch.float32) | dict.fromkeys(missing))
        with triton_on(device):
            inference.check_against_reference(t, case, "relu")
    t = to(device, training.tensors_of(case, torch.float32) | dict.fromkeys(missing))
    with triton_on(device):
        training.check_against_reference(t, case)


@devices
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("kernels_only")
def test_non_finite_values_propagate(value, device):
    case = CASES["3x3"]
    t = to(device, training.tensors_of(case, torch.float32, "running"))
    t["x"][1, 3, 2, 2] = value
    out = t["x"].new_empty(0)
    with triton_on(device):
        out = training.fused(case, "running")(**t)
    eager = training.plain(case, "running")(**t)
    assert_same_non_finite({"y": out}, {"y": eager})


@devices
@pytest.mark.usefixtures("kernels_only")
def test_same_bits_from_run_to_run(device):
    case = CASES["tiles"]
    tensors = to(device, training.tensors_of(case, torch.float16))
    with triton_on(device):
        runs = [gradients(training.fused(case), tensors) for _ in range(2)]
    assert_same_bits(*runs)


@interpreted
@pytest.mark.parametrize("residual", [True, False])
def test_the_folded_weight_is_conv_then_batch_norm(residual, monkeypatch):
    """What cuDNN's fusion is given; its convolution is PyTorch's own here."""
    case = Conv((2, 6, 7, 5), (8, 3, 3, 3), groups=2, bias=True)
    t = inference_tensors(case, torch.float32, residual)

    def cudnn_convolution_relu(x, weight, bias, *geometry):
        return torch.conv2d(x, weight, bias, *geometry).relu()

    def cudnn_convolution_add_relu(x, weight, z, alpha, bias, *geometry):
        return (torch.conv2d(x, weight, bias, *geometry) + alpha * z).relu()

    for fake in (cudnn_convolution_relu, cudnn_convolution_add_relu):
        monkeypatch.setattr(torch.ops.aten, fake.__name__, fake)
    out = MODULES[0].Inference(*inference_args(case, t)).cudnn()
    ref = inference.run_plain(case, "relu", **inference.double(t))
    eager = inference.run_plain(case, "relu", **t)
    assert_as_accurate_as_eager(out, ref, eager, count=t["weight"][0].numel())


@pytest.mark.parametrize("case,reason", [
    (Conv((2, 8, 5, 5), (8, 8, 3, 3), layout="NCHW"), "NCHW, the kernels write channels_last"),
    (Conv((2, 8, 5, 5), (8, 8, 3, 3), layout="NCHW", weight_layout="NHWC"), "x is NCHW"),
    (Conv((2, 32, 6, 6), (32, 4, 3, 3), groups=8), None),
    (Conv((0, 8, 5, 5), (8, 8, 3, 3)), "nothing to compute"),
    (Conv((2, 8, 5, 5), (8, 8, 3, 3)), None),
], ids=lambda v: str(v)[:24])  # fmt: skip
def test_what_the_kernels_do_not_take(case, reason):
    t = training.tensors_of(case, torch.float32, bn=None)
    found = conv.why_not(t["x"], t["weight"], case.geometry)
    assert found is None if reason is None else reason in found


def test_operands_that_do_not_fit_are_pytorchs_to_refuse():
    x, weight = arrange(torch.randn(2, 8, 5, 5), "NHWC"), torch.randn(4, 6, 3, 3)
    geometry = [1, 1], [0, 0], [1, 1], 1
    assert conv.why_not(x, weight, geometry) == "the operands do not fit together"
    assert conv.why_not(x, weight.half(), geometry) == "the operands do not fit together"
    stats = channels(4), channels(4, low=0.5)
    with triton_on("cpu"), pytest.raises(RuntimeError, match="expected input"):
        torch.ops.fusedres.conv_bn_act(
            x, weight, None, None, None, None, *stats, 1e-5, *geometry, "relu"
        )


def test_tf32_follows_pytorchs_switch(monkeypatch):
    class OnGpu:
        dtype, is_cuda = torch.float32, True

    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert conv.precision(OnGpu) == ("tf32" if allowed else "tf32x3")
    assert conv.precision(torch.empty(1, dtype=torch.float16)) == "ieee"
