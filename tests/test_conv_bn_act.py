"""conv_bn_act: convolution, folded batch norm, residual and activation, for inference."""

from __future__ import annotations

import copy

import pytest
import torch

import fusedres
from accuracy import assert_as_accurate_as_eager
from cases import (
    CONVS,
    Conv,
    arrange,
    backends,
    channels,
    conv_tensors,
    executions,
    layouts,
    misaligned,
    parameter_dtype,
    randn,
    sliced,
)  # fmt: skip
from fusedres import observers, reference
from fusedres.ops.conv_bn_act import bytes_moved, eager_bytes
from harness import Unchanged, assert_same_format, double, same_bits

OPTIONS = {
    "3x3": dict(act="relu", residual=True),
    "3x3_nhwc_stride": dict(act="relu", residual=True),
    "1x1": dict(act="relu", residual=False),
    "1x1_nhwc_stride": dict(act="identity", residual=True),
    "stem_nhwc": dict(act="identity", residual=False),
    "grouped_nhwc": dict(act="relu6", residual=True),
    "depthwise": dict(act="relu6", residual=False),
    "dilated_nhwc": dict(act="leaky_relu", residual=True),
    "row_kernel": dict(act="leaky_relu", residual=False),
    "1x1_images": dict(act="silu", residual=True),
    "one_channel": dict(act="silu", residual=False),
    "nhwc_weight": dict(act="gelu", residual=True),
    "stage4_nhwc": dict(act="gelu", residual=False),
}


def tensors_of(conv: Conv, dtype, residual=True, **_):
    k, param = conv.weight[0], parameter_dtype(dtype)
    return conv_tensors(conv, dtype) | dict(
        residual=randn(conv.out, dtype, conv.layout) if residual else None,
        bn_weight=channels(k, param, low=-0.5, high=1.5),
        bn_bias=channels(k, param),
        mean=channels(k, param),
        var=channels(k, param, low=0.5, high=2.0),
    )


def run_fused(conv: Conv, act, *, x, weight, bias, residual, bn_weight, bn_bias, mean, var):
    stride, padding, dilation, groups = (
        tuple(g) if isinstance(g, list) else g for g in conv.geometry
    )
    return fusedres.functional.conv_bn_act(
        x, weight, bias, mean, var, bn_weight, bn_bias, 1e-5, stride, padding, dilation, groups,
        residual=residual, act=act,
    )  # fmt: skip


def run_plain(conv: Conv, act, *, x, weight, bias, residual, bn_weight, bn_bias, mean, var):
    norm = bn_weight, bn_bias, mean, var, 1e-5
    return reference.conv_bn_act(x, weight, bias, residual, *norm, *conv.geometry, act)


def check_against_reference(tensors, conv, act):
    before = copy.deepcopy(tensors)
    out = run_fused(conv, act, **tensors)
    again = run_fused(conv, act, **tensors)  # on the packed weight
    for name, t in tensors.items():
        assert t is None or same_bits(t, before[name]), f"{name} has changed"
    eager, ref = run_plain(conv, act, **tensors), run_plain(conv, act, **double(tensors))
    assert_same_format(out, eager)
    # Each result is a sum of products; in reduced precision its roundings vanish in the store's.
    wide = out.dtype in (torch.float32, torch.float64)
    count = tensors["weight"][0].numel() if wide else 1
    assert_as_accurate_as_eager(out, ref, eager, count=count)
    assert same_bits(out, again)
    return out


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_values(case, backend, dtype):
    conv, options = CONVS[case], OPTIONS[case]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(conv, dtype, **options), conv, options["act"])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["hardswish", "relu"])
def test_values_of_a_bottleneck(act, residual):
    conv = Conv((1, 64, 14, 14), (256, 64, 1, 1), padding=(0, 0))
    check_against_reference(tensors_of(conv, torch.float32, residual), conv, act)


@backends
@pytest.mark.parametrize("missing", [("bn_weight",), ("bn_bias",), ("bn_weight", "bn_bias")])
def test_without_affine_parameters(missing, backend):
    conv = CONVS["1x1"]
    with fusedres.backend(backend):
        check_against_reference(
            tensors_of(conv, torch.float32) | dict.fromkeys(missing), conv, "relu"
        )


@backends
@pytest.mark.parametrize("case", ["3x3", "3x3_nhwc_stride"])
def test_views_over_a_sentinel(case, backend):
    conv = CONVS[case]
    tensors = tensors_of(conv, torch.float32)
    for view_of in (misaligned, sliced):
        views, buffers = dict(tensors), []
        for name in ("x", "weight", "residual", "bn_weight"):
            views[name], buffer = view_of(tensors[name])
            buffers.append(buffer)
        with fusedres.backend(backend), Unchanged(*buffers):
            check_against_reference(views, conv, "relu")


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_in_the_other_format(dtype, layout, backend):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[layout]
    conv = Conv((2, 6, 5, 4), (8, 6, 3, 3), layout=layout)
    tensors = tensors_of(conv, dtype)
    tensors["residual"] = arrange(tensors["residual"], other)
    with fusedres.backend(backend):
        check_against_reference(tensors, conv, "relu")


@backends
@layouts
def test_the_residual_may_be_the_input(layout, backend):
    conv = Conv((2, 6, 5, 4), (6, 6, 3, 3), layout=layout)
    tensors = tensors_of(conv, torch.float32)
    tensors["residual"] = tensors["x"]
    with fusedres.backend(backend):
        check_against_reference(tensors, conv, "relu")


@executions
def test_empty_batch(backend, dtype):
    conv = Conv((0, 6, 5, 4), (8, 6, 3, 3))
    tensors = tensors_of(conv, dtype)
    with fusedres.backend(backend):
        y = run_fused(conv, "relu", **tensors)
    assert (y.shape, y.dtype) == ((0, 8, 5, 4), dtype)


@pytest.mark.parametrize("case,backend,dtype,act", [
    ("3x3", "native", torch.float32, "relu"), ("3x3_nhwc_stride", "native", torch.float32, "relu"),
    ("nhwc_weight", "native", torch.bfloat16, "relu"), ("1x1_images", "native", torch.float32, "silu"),
    ("one_channel", "native", torch.float64, "gelu"), ("3x3_nhwc_stride", "reference", torch.float32, "relu"),
])  # fmt: skip
def test_opcheck(case, backend, dtype, act):
    conv = CONVS[case]
    t = tensors_of(conv, dtype)
    names = "x", "weight", "bias", "residual", "bn_weight", "bn_bias", "mean", "var"
    args = *(t[n] for n in names), 1e-5, *conv.geometry, act
    with fusedres.backend(backend):
        torch.library.opcheck(torch.ops.fusedres.conv_bn_act, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler):
    conv = CONVS["3x3_nhwc_stride"]
    tensors = tensors_of(conv, torch.float32)

    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(tensors):
        return run_fused(conv, "relu", **tensors)

    eager, ref = (run_plain(conv, "relu", **t) for t in (tensors, double(tensors)))
    assert_as_accurate_as_eager(compiled(tensors), ref, eager)


@pytest.mark.parametrize("case", ["3x3", "stage4_nhwc"])
def test_same_bits_from_run_to_run(case):
    conv = CONVS[case]
    tensors = tensors_of(conv, torch.float32)
    first = run_fused(conv, "relu", **tensors)
    for _ in range(2):
        fresh = {n: None if t is None else t.clone() for n, t in tensors.items()}
        assert same_bits(run_fused(conv, "relu", **fresh), first)


@layouts
@pytest.mark.parametrize("act", ["identity", "relu"])
def test_nan_in_inference(act, layout):
    """oneDNN's ReLU may turn the NaN of an image into 0 (documented); it touches nothing else."""
    conv = Conv((2, 6, 7, 5), (8, 6, 3, 3), layout=layout)
    tensors = tensors_of(conv, torch.float32)
    tensors["x"][1, 3, 2, 2] = float("nan")
    out, eager = run_fused(conv, act, **tensors), run_plain(conv, act, **tensors)
    differs = out.isnan() != eager.isnan()
    assert not out.isnan()[~eager.isnan()].any()
    assert act == "relu" or not differs.any()
    assert out[differs].count_nonzero() == 0
    ref = run_plain(conv, act, **double(tensors))
    assert_as_accurate_as_eager(out[0], ref[0], eager[0])


def test_what_cannot_be_one_call_says_why():
    conv = CONVS["3x3_nhwc_stride"]

    def event(dtype, act, residual=True):
        events = []
        with observers.observe(events.append):
            run_fused(conv, act, **tensors_of(conv, dtype, residual))
        return events[0]

    assert event(torch.float32, "relu").backend == "onednn"
    assert event(torch.float32, "relu").reason is None
    assert event(torch.float32, "gelu", residual=False).backend == "onednn"
    assert "takes relu or identity, not gelu" in event(torch.float32, "gelu").reason
    assert "no float64 convolution" in event(torch.float64, "relu").reason
    with fusedres.backend("reference"):
        assert "reference backend" in event(torch.float32, "relu").reason


def test_a_shape_is_worked_out_once(monkeypatch):
    """Every error of a misfit stays PyTorch's, each time."""
    x, w, stats = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 3, 3), (torch.zeros(4), torch.ones(4))
    calls, conv2d = [], torch.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda *args: calls.append(args) or conv2d(*args))
    for _ in range(2):
        fusedres.functional.conv_bn_act(x, w, None, *stats, stride=(2, 1))
    assert sum(args[0].is_meta for args in calls) <= 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected input"):
            fusedres.functional.conv_bn_act(x[:, :2], w, None, *stats)
        with pytest.raises(RuntimeError):
            fusedres.functional.conv_bn_act(x.double(), w, None, *stats)
        with pytest.raises(ValueError, match="residual: wanted shape"):
            fusedres.functional.conv_bn_act(x, w, None, *stats, residual=x)


def test_bytes_moved():
    x, weight = randn((2, 8, 4, 4)), randn((4, 8, 1, 1))  # 1024 and 128 bytes; y: 512
    stats = channels(4), channels(4, low=0.5)
    y = randn((2, 4, 4, 4))
    args = x, weight, None, y, None, None, *stats, 1e-5, [1, 1], [0, 0], [1, 1], 1, "relu"
    assert bytes_moved(*args) == 1024 + 128 + 2 * 512  # R, the weight, RW
    assert eager_bytes(*args) == 1024 + 128 + 8 * 512  # R, the weight, W, RW, RRW, RW
    events = []
    with observers.observe(events.append):
        torch.ops.fusedres.conv_bn_act(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("conv_bn_act", 2176)]
