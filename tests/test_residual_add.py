"""residual_add: two normalised or scaled operands, their sum, its activation and statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fusedres
from accuracy import assert_as_accurate_as_eager
from cases import (
    SHAPES,
    backends,
    channels,
    executions,
    layouts,
    misaligned,
    parameter_dtype,
    randn,
    sliced,
    values_per_channel,
)  # fmt: skip
from fusedres import observers, reference
from fusedres.ops import residual_add
from fusedres.ops.residual_add import backward_bytes_moved, bytes_moved
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_bits,
    assert_same_format,
    assert_same_non_finite,
    check,
    gradients,
)  # fmt: skip

EPS, SIDE_EPS = 1e-5, 1e-3
CONSTANTS = ("mean", "var", "shortcut_mean", "shortcut_var")

# bn: statistics of the "batch", "running" ones, or none: then weight and bias alone, if "scaled".
OPTIONS = {
    "odd": dict(a="batch", b="batch"),
    "odd_nhwc": dict(a="batch", b="batch"),
    "one_channel": dict(a="batch", b=None, rows=1, act="identity"),
    "three_channels_nhwc": dict(a="batch", b="batch", rows=1),
    "one_image": dict(a="running", b="batch", act="relu6"),
    "one_image_nhwc": dict(a="batch", b="running", act="leaky_relu"),
    "1x1": dict(a="batch", b="scaled", act="silu"),
    "1x1_nhwc": dict(a="scaled", b="batch", rows="C"),
    "one_row": dict(a=None, b="scaled", rows=1, act="relu"),
    "tail_of_one_nhwc": dict(a="batch", b="batch", rows=1, act="gelu"),
    "stage2_nhwc": dict(a="batch", b=None, rows=1),
    "stage4": dict(a="scaled", b=None, act="hardswish"),
    "stage4_nhwc": dict(a=None, b=None, rows="C", act="identity"),
}


def factors(kind, prefix, c, param):
    """weight, bias, mean and var of one operand."""
    has = kind is not None
    return {
        f"{prefix}weight": channels(c, param, low=-0.5, high=1.5) if has else None,
        f"{prefix}bias": channels(c, param) if has else None,
        f"{prefix}mean": channels(c, param) if kind == "running" else None,
        f"{prefix}var": channels(c, param, low=0.5, high=2.0) if kind == "running" else None,
    }


def tensors_of(shape, layout, dtype, *, a="batch", b="batch", rows=None, param=None, **_):
    n, c = shape[:2]
    param = param or parameter_dtype(dtype)
    scale = None
    if rows is not None:  # with rows, one image in three is dropped, as stochastic depth does
        scale = torch.rand(n, c if rows == "C" else 1) + 0.5
        scale = (scale * (torch.arange(n) % 3 != 1).view(-1, 1)).to(param)
    return dict(
        x=randn(shape, dtype, layout),
        shortcut=randn(shape, dtype, layout),
        **factors(a, "", c, param),
        **factors(b, "shortcut_", c, param),
        scale=scale,
    )


def fused(a="batch", b="batch", act="relu", **_):
    def fn(x, shortcut, weight, bias, mean, var, scale, **side):
        if a == "batch":
            mean, var = torch.ops.fusedres.bn_stats(x.detach())
        side_stats = side["shortcut_mean"], side["shortcut_var"]
        if b == "batch":
            side_stats = torch.ops.fusedres.bn_stats(shortcut.detach())
        tensors = x, weight, bias, mean, var, shortcut, side["shortcut_weight"]
        tensors = *tensors, side["shortcut_bias"], *side_stats, scale
        numbers = a == "batch", b == "batch", EPS, SIDE_EPS
        graded = any(t is not None and t.requires_grad for t in tensors)
        save_mask = graded and act in reference.MASKED_ACTS
        return residual_add.op(*tensors, *numbers, act, save_mask, False)[0]

    return fn


def plain(a="batch", b="batch", act="relu", **_):
    def fn(x, shortcut, weight, bias, mean, var, scale, **side):
        if a == "batch":
            mean, var = reference.bn_stats(x)
        side_stats = side["shortcut_mean"], side["shortcut_var"]
        if b == "batch":
            side_stats = reference.bn_stats(shortcut)
        branch = weight, bias, mean, var, a == "batch", EPS
        other = side["shortcut_weight"], side["shortcut_bias"], *side_stats, b == "batch", SIDE_EPS
        return reference.residual_add(x, branch, shortcut, other, scale, act)[0]

    return fn


def check_against_reference(tensors, options):
    count = values_per_channel(tensors["x"])
    names = "weight", "bias", "shortcut_weight", "shortcut_bias", "scale"
    sums = dict.fromkeys(names, count)
    return check(fused(**options), plain(**options), tensors, constants=CONSTANTS, sums=sums)


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients(case, backend, dtype):
    options = OPTIONS[case]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(*SHAPES[case], dtype, **options), options)


@executions
@layouts
@pytest.mark.parametrize("case", ["odd", "tail_of_one_nhwc", "stage2_nhwc", "1x1"])
def test_statistics_of_the_sum(case, layout, backend, dtype):
    """Those of the values as they are stored, whether or not they are taken on the way."""
    shape, _ = SHAPES[case]
    for options in (dict(a=None, b=None), dict(a="batch", b="batch", rows=1)):
        t = tensors_of(shape, layout, dtype, **options)
        stats = (None,) * 4
        if options["a"]:
            stats = *reference.bn_stats(t["x"]), *reference.bn_stats(t["shortcut"])
        args = t["x"], t["weight"], t["bias"], *stats[:2], t["shortcut"], t["shortcut_weight"]
        args = *args, t["shortcut_bias"], *stats[2:], t["scale"]
        batch = options["a"] is not None
        numbers = batch, batch, EPS, SIDE_EPS, "relu", True
        with fusedres.backend(backend):
            y, mask, mean, var = residual_add.op(*args, *numbers, True)
            other = residual_add.op(*args, *numbers, False)
        assert_same_bits(dict(y=y, mask=mask), dict(y=other[0], mask=other[1]))
        eager = reference.bn_stats(y)
        truth = reference.bn_stats(y.double())
        for out, ref, plain_ in zip((mean, var), truth, eager, strict=True):
            assert_as_accurate_as_eager(out, ref, plain_, count=values_per_channel(y))


@executions
@pytest.mark.parametrize("shape", [(37, 19), (4, 6, 11), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, backend, dtype):
    options = dict(a="batch", b="batch", rows=1)
    with fusedres.backend(backend):
        check_against_reference(tensors_of(shape, "NCHW", dtype, **options), options)


@backends
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(param, backend):
    options = dict(a="running", b="running", rows="C")
    tensors = tensors_of((3, 9, 5, 5), "NHWC", torch.bfloat16, param=param, **options)
    with fusedres.backend(backend):
        out = gradients(fused(**options), tensors, constants=CONSTANTS)
        check_against_reference(tensors, options)
    assert {out[f"d{n}"].dtype for n in ("weight", "shortcut_bias", "scale")} == {param}


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_over_a_sentinel(layout, dtype, backend):
    tensors = tensors_of((3, 13, 6, 5), layout, dtype, a=None, b=None)
    operands = {n: tensors[n] for n in ("x", "shortcut")}

    def public(x, shortcut):
        return fusedres.functional.residual_add(x, shortcut, act="relu")

    for view_of in (misaligned, sliced):
        views, buffers = {}, []
        for name, t in operands.items():
            views[name], buffer = view_of(t)
            buffers.append(buffer)
        with fusedres.backend(backend), Unchanged(*buffers):
            out = check(public, lambda x, shortcut: F.relu(x + shortcut), views)
        assert_same_format(out["y"], views["x"] + views["shortcut"])


@backends
@layouts
def test_operands_in_two_formats(layout, backend):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[layout]
    x, shortcut = (randn((2, 6, 5, 4), layout=f) for f in (layout, other))
    weight, scale = channels(6), torch.tensor([0.0, 2.0])

    def public(x, shortcut, weight, scale):
        return fusedres.functional.residual_add(x, shortcut, weight=weight, scale=scale, act="relu")

    def eager(x, shortcut, weight, scale):
        return F.relu(x * weight.view(-1, 1, 1) * scale.view(-1, 1, 1, 1) + shortcut)

    tensors = dict(x=x, shortcut=shortcut, weight=weight, scale=scale)
    with fusedres.backend(backend):
        check(public, eager, tensors, sums=dict(weight=40, scale=120))


@backends
def test_a_scalar_factor(backend):
    """SkipInit and ReZero: one learnable number, which starts at zero; and x / L."""
    for start in (0.0, 0.7):
        tensors = dict(
            x=randn((3, 5, 4, 4)), shortcut=randn((3, 5, 4, 4)), alpha=torch.tensor([start])
        )
        with fusedres.backend(backend):
            check(
                lambda x, shortcut, alpha: fusedres.functional.residual_add(
                    x, shortcut, weight=alpha, shortcut_weight=torch.tensor([0.25])
                ),
                lambda x, shortcut, alpha: alpha * x + shortcut * 0.25,
                tensors,
                sums=dict(alpha=x_count(tensors)),
            )


def x_count(tensors):
    return tensors["x"].numel()


@backends
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)], ids=str)
@pytest.mark.parametrize("a", ["batch", "scaled"])
def test_empty_batch(a, shape, backend):
    tensors = tensors_of(shape, "NCHW", torch.float32, a=a, b="scaled", rows=1)
    with fusedres.backend(backend):
        out = gradients(fused(a=a, b="scaled"), tensors, constants=CONSTANTS)
    assert out["y"].shape == out["dx"].shape == out["dshortcut"].shape == shape
    assert out["dweight"].tolist() == out["dshortcut_weight"].tolist() == [0.0] * 4


@pytest.mark.parametrize("case", ["stage1_nhwc", "stage1", "odd"])
def test_same_bits_at_any_thread_count(case):
    for options in (dict(), dict(rows=1, act="silu")):
        tensors = tensors_of(*SHAPES[case], torch.bfloat16, **options)
        assert_same_at_any_thread_count(fused(**options), tensors, constants=CONSTANTS)


@backends
@layouts
@pytest.mark.parametrize("name", ["x", "shortcut"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, name, layout, backend):
    for kind in ("batch", "running"):
        options = dict(a=kind, b=kind, rows=1)
        tensors = tensors_of((3, 19, 3, 3), layout, torch.float32, **options)
        tensors[name][2, 2, 1, 0] = value
        tensors[name][0, 17, 2, 2] = value
        with fusedres.backend(backend):
            out = gradients(fused(**options), tensors, constants=CONSTANTS)
        eager = gradients(plain(**options), tensors, constants=CONSTANTS)
        assert_same_non_finite(out, eager)


@pytest.mark.parametrize("change,error,message", [
    (dict(shortcut=torch.zeros(2, 5, 4, 3)), ValueError, "shortcut: wanted shape"),
    (dict(shortcut=torch.zeros(2, 5, 4, 4).double()), TypeError, "shortcut: wanted dtype"),
    (dict(weight=torch.zeros(4)), ValueError, r"weight: wanted shape \(5,\) or \(1,\), got"),
    (dict(shortcut_weight=torch.zeros(5).int()), TypeError, "shortcut_weight: wanted a floating"),
    (dict(scale=torch.zeros(5)), ValueError, r"scale: wanted shape \(2,\), \(2, 1\) or \(2, 5\)"),
    (dict(act="tanh"), ValueError, "act: wanted one of"),
    (dict(branch=torch.zeros(5)), ValueError, "branch: wanted at least 2 dimensions"),
])  # fmt: skip
def test_error_messages(change, error, message):
    arguments = dict(branch=torch.zeros(2, 5, 4, 4), shortcut=torch.zeros(2, 5, 4, 4)) | change
    with pytest.raises(error, match=message):
        fusedres.functional.residual_add(**arguments)


def test_bytes_moved():
    x = torch.empty(2, 8, 4, 4)  # 1024 bytes
    p = torch.ones(8)
    args = x, p, p, p, p, x, p, p, p, p, None, True, True, EPS, EPS, "relu", True, True
    assert bytes_moved(*args) == 3 * 1024 + 32  # RR + W, one bit an element
    events = []
    with observers.observe(events.append):
        _, mask, *_ = torch.ops.fusedres.residual_add(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("residual_add", 3 * 1024 + 32)]
    assert events[0].eager_bytes == 10 * 1024  # RW + RW + RRW + RW + R
    args = x, *args[:11], mask, True, True, EPS, EPS, "relu", True, True, True
    assert backward_bytes_moved(*args) == 8 * 1024 + 2 * 32  # RRR (sums) + RRRWW, the mask twice
    args = x, None, *args[2:6], None, *args[7:-3], False, False, True
    assert backward_bytes_moved(*args) == 3 * 1024 + 32  # R + WW, the mask
