"""conv_stats: convolution, the batch norm before it, and the statistics of its result."""

from __future__ import annotations

import math

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
    misaligned,
    parameter_dtype,
    randn,
    sliced,
    values_per_channel,
)  # fmt: skip
from fusedres import observers, reference
from fusedres.ops import gemm
from fusedres.ops.conv_stats import bytes_moved
from harness import (
    Unchanged,
    assert_same_bits,
    assert_same_non_finite,
    check,
    check_derivatives,
    gradients,
)  # fmt: skip

CONSTANTS = ("mean", "var")

# bn: the statistics of the batch norm before the convolution, None without one.
OPTIONS = {
    "3x3": dict(bn="batch"),
    "3x3_nhwc_stride": dict(bn="batch"),
    "1x1": dict(bn="running"),
    "1x1_nhwc": dict(bn="batch"),  # whose weight gradient is a product
    "1x1_nhwc_stride": dict(bn=None),
    "stem_nhwc": dict(bn=None),
    "grouped_nhwc": dict(bn="batch"),
    "depthwise": dict(bn="running", act="relu6"),
    "dilated_nhwc": dict(bn="batch", act="silu"),
    "row_kernel": dict(bn="batch", act="identity"),
    "wide_nhwc": dict(bn="batch"),  # another that is gathered for a product
    "1x1_images": dict(bn="batch", act="gelu"),
    "one_channel": dict(bn=None),
    "nhwc_weight": dict(bn="running", act="hardswish"),
    "stage4_nhwc": dict(bn="batch", act="leaky_relu"),
}


def tensors_of(conv: Conv, dtype, bn="batch", **_):
    t = conv_tensors(conv, dtype)
    c, param = conv.x[1], parameter_dtype(dtype)
    given = bn == "running"
    return t | dict(
        bn_weight=channels(c, param, low=-0.5, high=1.5) if bn else None,
        bn_bias=channels(c, param) if bn else None,
        mean=channels(c, param) if given else None,
        var=channels(c, param, low=0.5, high=2.0) if given else None,
    )


def fused(conv: Conv, bn="batch", act="relu"):
    def fn(x, weight, bias, bn_weight, bn_bias, mean, var):
        if bn == "batch":
            mean, var = torch.ops.fusedres.bn_stats(x.detach())
        before = bn_weight, bn_bias, mean, var, bn == "batch", 1e-5, act
        return torch.ops.fusedres.conv_stats(x, *before, weight, bias, *conv.geometry, True)[0]

    return fn


def plain(conv: Conv, bn="batch", act="relu"):
    def fn(x, weight, bias, bn_weight, bn_bias, mean, var):
        before = (bn_weight, bn_bias, mean, var, bn == "batch", 1e-5, act) if bn else None
        return reference.conv_stats(x, before, weight, bias, *conv.geometry)[0]

    return fn


def check_against_reference(tensors, conv, options=None):
    options = options or {}
    positions = math.prod(conv.out) // conv.out[1]
    before = values_per_channel(tensors["x"])
    sums = dict(weight=positions, bias=positions, bn_weight=before, bn_bias=before)
    arguments = dict(constants=CONSTANTS, sums=sums)
    return check(fused(conv, **options), plain(conv, **options), tensors, **arguments)


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients(case, backend, dtype):
    conv, options = CONVS[case], OPTIONS[case]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(conv, dtype, **options), conv, options)


@executions
@pytest.mark.parametrize("case", ["3x3", "1x1_nhwc_stride", "stem_nhwc", "one_channel"])
def test_statistics_of_the_result(case, backend, dtype):
    conv = CONVS[case]
    t = tensors_of(conv, dtype, bn=None)
    no_bn = None, None, None, None, False, 0.0, "identity"
    with fusedres.backend(backend):
        y, *found = torch.ops.fusedres.conv_stats(
            t["x"], *no_bn, t["weight"], t["bias"], *conv.geometry, True
        )
        _, *nothing = torch.ops.fusedres.conv_stats(
            t["x"], *no_bn, t["weight"], t["bias"], *conv.geometry, False
        )
    # Of the values as they were stored, not as they were before rounding.
    ref, eager = reference.bn_stats(y.double()), reference.bn_stats(y)
    for out, ref_, eager_ in zip(found, ref, eager, strict=True):
        assert_as_accurate_as_eager(out, ref_, eager_, count=values_per_channel(y))
    assert [t.numel() for t in nothing] == [0, 0]


@backends
@pytest.mark.parametrize("missing", ["bn_weight", "bn_bias"])
def test_without_affine_parameters(missing, backend):
    conv = CONVS["3x3_nhwc_stride"]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(conv, torch.float32) | {missing: None}, conv)


@backends
@pytest.mark.parametrize("case", ["3x3", "3x3_nhwc_stride"])
def test_views_over_a_sentinel(case, backend):
    conv = CONVS[case]
    tensors = tensors_of(conv, torch.float32)
    views, buffers = dict(tensors), []
    for name in ("x", "weight", "bn_weight"):
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with fusedres.backend(backend), Unchanged(*buffers):
        check_against_reference(views, conv)
    without_bn = tensors_of(conv, torch.float32, bn=None)
    without_bn["x"], buffer = sliced(without_bn["x"])
    with fusedres.backend(backend), Unchanged(buffer):
        check_against_reference(without_bn, conv, dict(bn=None))


@backends
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_empty_batch(layout, backend):
    conv = Conv((0, 4, 6, 6), (5, 4, 3, 3), layout=layout)
    tensors = tensors_of(conv, torch.float32, bn="running")
    options = dict(bn="running")
    with fusedres.backend(backend):
        out = gradients(fused(conv, **options), tensors, constants=CONSTANTS)
    eager = gradients(plain(conv, **options), tensors, constants=CONSTANTS)
    assert_same_bits(out, eager)


@pytest.mark.parametrize("backend,bn,act,layout", [
    ("native", "batch", "relu", "NHWC"), ("native", "running", "silu", "NCHW"),
    ("native", None, "relu", "NHWC"), ("reference", "batch", "relu", "NHWC"),
])  # fmt: skip
def test_derivatives(backend, bn, act, layout):
    conv = Conv((2, 3, 3, 3), (2, 3, 3, 3), layout=layout, bias=True)
    with fusedres.backend(backend):
        check_derivatives(fused(conv, bn, act), tensors_of(conv, torch.float64, bn), CONSTANTS)


@pytest.mark.parametrize("case,backend,bn", [
    ("3x3", "native", "running"), ("3x3_nhwc_stride", "native", "batch"),
    ("nhwc_weight", "native", None), ("1x1_images", "reference", "running"),
])  # fmt: skip
def test_opcheck(case, backend, bn):
    conv = CONVS[case]
    t = tensors_of(conv, torch.float32, bn)
    mean, var = reference.bn_stats(t["x"]) if bn == "batch" else (t["mean"], t["var"])
    leaves = {n: None if p is None else p.requires_grad_() for n, p in t.items()}
    before = leaves["bn_weight"], leaves["bn_bias"], mean, var, bn == "batch", 1e-5, "relu"
    args = leaves["x"], *before, leaves["weight"], leaves["bias"], *conv.geometry, True
    if mean is not None:
        mean.requires_grad_(False), var.requires_grad_(False)
    with fusedres.backend(backend):
        torch.library.opcheck(torch.ops.fusedres.conv_stats, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler):
    conv = CONVS["3x3_nhwc_stride"]
    compiled = torch.compile(fused(conv), fullgraph=True, backend=compiler)
    check(compiled, plain(conv), tensors_of(conv, torch.float32), sums=dict(weight=32, bn_bias=128))


@pytest.mark.parametrize("case", ["3x3", "1x1_nhwc", "wide_nhwc", "stage4_nhwc"])
def test_same_bits_from_run_to_run(case):
    tensors = tensors_of(CONVS[case], torch.float32)
    first = gradients(fused(CONVS[case]), tensors)
    for _ in range(2):
        assert_same_bits(gradients(fused(CONVS[case]), tensors), first)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value, backend):
    conv = CONVS["3x3_nhwc_stride"]
    for bn in ("batch", "running"):
        tensors = tensors_of(conv, torch.float32, bn)
        tensors["x"][1, 3, 2, 2] = value
        with fusedres.backend(backend):
            out = gradients(fused(conv, bn), tensors, constants=CONSTANTS)
        assert_same_non_finite(out, gradients(plain(conv, bn), tensors, constants=CONSTANTS))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels,size", [(4, 5), (1, 5), (4, 1)])
def test_the_format_of_the_result(channels, size, kernel):
    for x_layout in ("NCHW", "NHWC"):
        for weight_layout in ("NCHW", "NHWC"):
            x = arrange(torch.randn(2, channels, size, size), x_layout)
            weight = arrange(torch.randn(3, channels, kernel, kernel), weight_layout)
            no_bn = None, None, None, None, False, 0.0, "identity"
            geometry = [1, 1], [kernel // 2] * 2, [1, 1], 1
            y = torch.ops.fusedres.conv_stats(x, *no_bn, weight, None, *geometry, False)[0]
            assert y.stride() == torch.conv2d(x, weight, padding=kernel // 2).stride()


@pytest.mark.parametrize("case,limits,products", [
    ("1x1_nhwc", {}, 3),
    ("1x1_nhwc", dict(FEW_PIXELS=0), 1),  # the weight gradient alone
    ("wide_nhwc", {}, 1),
    ("wide_nhwc", dict(PATCHES_BYTES=1), 3),  # image by image
    ("wide_nhwc", dict(MAX_PATCHES_BYTES=1), 0),
    ("grouped_nhwc", {}, 0),
])  # fmt: skip
def test_what_is_a_product_where_products_are_faster(case, limits, products, monkeypatch):
    for name, limit in limits.items():
        monkeypatch.setattr(gemm, name, limit)
    for faster in (True, False):
        monkeypatch.setattr(gemm, "_faster", lambda faster=faster: faster)
        tensors = tensors_of(CONVS[case], torch.float32, bn=None)
        with torch.profiler.profile() as profiler:
            check_against_reference(tensors, CONVS[case], dict(bn=None))
        names = [e.name for e in profiler.events()]
        found = sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)
        assert found == faster * products


@pytest.mark.parametrize("case", ["1x1_nhwc", "wide_nhwc"])
def test_a_bias_does_not_bring_the_other_weight_gradient_back(case, monkeypatch):
    """oneDNN takes both or none."""
    monkeypatch.setattr(gemm, "_faster", lambda: True)
    t = tensors_of(CONVS[case], torch.float32, bn=None)
    with torch.profiler.profile() as profiler:
        gradients(fused(CONVS[case], bn=None), t, constants=(*CONSTANTS, "x"))
    assert not any("convolution_backward" in e.name for e in profiler.events())


def test_bytes_moved():
    x, weight = randn((2, 8, 4, 4)), randn((4, 8, 1, 1))  # 1024 and 128 bytes; y: 512
    no_bn = None, None, None, None, False, 0.0, "identity"
    args = x, *no_bn, weight, None, [1, 1], [0, 0], [1, 1], 1, True
    assert bytes_moved(*args) == 1024 + 128 + 512
    events = []
    with observers.observe(events.append):
        torch.ops.fusedres.conv_stats(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("conv_stats", 1664), ("bn_stats", 512)]
