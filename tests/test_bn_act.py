"""bn_act: batch norm, residual add and activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fusedres
from accuracy import assert_as_accurate_as_eager
from cases import (
    SHAPES,
    arrange,
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
from fusedres.ops.bn_act import backward_bytes_moved, backward_op, bytes_moved, op
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_format,
    assert_same_non_finite,
    check,
    gradients,
    same_bits,
)  # fmt: skip

CONSTANTS = ("running_mean", "running_var")

# Every activation with and without a residual.
OPTIONS = {
    "odd": dict(act="relu", residual=True),
    "odd_nhwc": dict(act="relu", residual=True),
    "one_channel": dict(act="relu", residual=False),
    "three_channels_nhwc": dict(act="identity", residual=True),
    "one_image": dict(act="identity", residual=False),
    "one_image_nhwc": dict(act="relu6", residual=True),
    "1x1": dict(act="relu6", residual=False),
    "1x1_nhwc": dict(act="leaky_relu", residual=True),
    "one_row": dict(act="leaky_relu", residual=False),
    "tail_of_one_nhwc": dict(act="silu", residual=True),
    "stage1": dict(act="silu", residual=False),
    "stage1_nhwc": dict(act="relu", residual=True),
    "stage2_nhwc": dict(act="gelu", residual=True),
    "stage4": dict(act="gelu", residual=False),
    "stage4_nhwc": dict(act="hardswish", residual=True),
}
EVAL_OPTIONS = {
    "odd": dict(act="hardswish", residual=False),
    "odd_nhwc": dict(act="relu", residual=False),
    "one_channel": dict(act="relu6", residual=True),
    "three_channels_nhwc": dict(act="relu", residual=True),
    "1x1": dict(act="identity", residual=True),
    "one_row": dict(act="silu", residual=True),
    "tail_of_one_nhwc": dict(act="leaky_relu", residual=False),
    "stage2_nhwc": dict(act="relu", residual=True),
    "stage4": dict(act="gelu", residual=True),
}


def tensors_of(shape, layout, dtype, *, residual=True, training=True, param=None):
    c = shape[1]
    param = param or parameter_dtype(dtype)
    return dict(
        x=randn(shape, dtype, layout),
        weight=channels(c, param, low=-0.5, high=1.5),
        bias=channels(c, param),
        residual=randn(shape, dtype, layout) if residual else None,
        running_mean=None if training else channels(c, param),
        running_var=None if training else channels(c, param, low=0.5, high=2.0),
    )


def fused(act="relu"):
    def fn(x, weight, bias, residual, running_mean, running_var):
        training = running_mean is None
        return fusedres.functional.batch_norm_act(
            x, running_mean, running_var, weight, bias, training, residual=residual, act=act
        )

    return fn


def plain(act="relu"):
    def fn(x, weight, bias, residual, running_mean, running_var):
        stats = running_mean, running_var, running_mean is None, 1e-5
        return reference.bn_act(x, weight, bias, residual, *stats, act)[0]

    return fn


def check_against_reference(tensors, act):
    count = values_per_channel(tensors["x"])
    sums = dict(weight=count, bias=count)
    return check(fused(act), plain(act), tensors, constants=CONSTANTS, sums=sums)


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_training(case, backend, dtype):
    options = OPTIONS[case]
    tensors = tensors_of(*SHAPES[case], dtype, residual=options["residual"])
    with fusedres.backend(backend):
        check_against_reference(tensors, options["act"])


@executions
@pytest.mark.parametrize("case", EVAL_OPTIONS)
def test_running_statistics_with_gradients(case, backend, dtype):
    options = EVAL_OPTIONS[case]
    tensors = tensors_of(*SHAPES[case], dtype, residual=options["residual"], training=False)
    with fusedres.backend(backend):
        check_against_reference(tensors, options["act"])


@executions
@pytest.mark.parametrize("shape", [(37, 19), (4, 6, 11), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, backend, dtype):
    with fusedres.backend(backend):
        check_against_reference(tensors_of(shape, "NCHW", dtype), "relu")


@executions
@layouts
def test_statistics_far_from_zero(layout, backend, dtype):
    """The variance of values whose mean is 64 times their deviation."""
    x = arrange((torch.randn(8, 5, 31, 31) + 64).to(dtype), layout)
    with fusedres.backend(backend):
        found = torch.ops.fusedres.bn_stats(x)
    eager = reference.bn_stats(x)
    for out, ref, plain_ in zip(found, reference.bn_stats(x.double()), eager, strict=True):
        assert_as_accurate_as_eager(out, ref, plain_, count=values_per_channel(x))


@backends
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_without_affine_parameters(missing, backend):
    tensors = tensors_of((2, 5, 6, 6), "NHWC", torch.float32)
    tensors |= {n: None for n in ("weight", "bias") if missing in (n, "both")}
    with fusedres.backend(backend):
        check_against_reference(tensors, "relu")


@backends
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(param, backend):
    for training in (True, False):
        tensors = tensors_of((2, 9, 5, 5), "NHWC", torch.bfloat16, training=training, param=param)
        with fusedres.backend(backend):
            out = gradients(fused(), tensors, constants=CONSTANTS)
            check_against_reference(tensors, "relu")
        assert out["dweight"].dtype == out["dbias"].dtype == param


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_over_a_sentinel(layout, dtype, backend):
    tensors = tensors_of((3, 13, 6, 5), layout, dtype)
    for view_of in (misaligned, sliced):
        views, buffers = dict(tensors), []
        for name in ("x", "residual", "weight"):
            views[name], buffer = view_of(tensors[name])
            buffers.append(buffer)
        with fusedres.backend(backend), Unchanged(*buffers):
            out = check_against_reference(views, "relu")
        assert_same_format(out["y"], F.batch_norm(views["x"], None, None, training=True))


@backends
@layouts
def test_operands_in_two_formats(layout, backend):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[layout]
    tensors = tensors_of((2, 6, 5, 4), layout, torch.float32)
    tensors["residual"] = arrange(tensors["residual"], other)
    with fusedres.backend(backend):
        check_against_reference(tensors, "relu")
        leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if t is not None}
        y = fused()(**leaves, running_mean=None, running_var=None)
        expanded = torch.tensor(0.5).expand(y.shape)
        strided = torch.autograd.grad(y, leaves["x"], expanded, retain_graph=True)[0]
        dense = torch.autograd.grad(y, leaves["x"], expanded.contiguous())[0]
    assert same_bits(strided, dense)


@backends
def test_transposed_input(backend):
    tensors = tensors_of((4, 5, 3, 7), "NCHW", torch.float32)
    tensors["x"] = randn((7, 5, 3, 4)).transpose(0, 3)
    with fusedres.backend(backend):
        check_against_reference(tensors, "relu")


@backends
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training, shape, backend):
    tensors = tensors_of(shape, "NCHW", torch.float32, training=False)
    running = [tensors[n].clone() for n in CONSTANTS]
    x = tensors["x"].requires_grad_()
    with fusedres.backend(backend):
        y = fusedres.functional.batch_norm_act(
            x, *running, tensors["weight"].requires_grad_(), tensors["bias"], training,
            residual=tensors["residual"],
        )  # fmt: skip
        y.sum().backward()
    wanted = [tensors[n].clone() for n in CONSTANTS]
    eager = F.batch_norm(x, *wanted, tensors["weight"], tensors["bias"], training)
    assert y.shape == eager.shape == x.grad.shape
    assert tensors["weight"].grad.tolist() == [0.0] * 4
    for out, eager_stats in zip(running, wanted, strict=True):
        assert same_bits(out, eager_stats)


@backends
def test_running_statistics_over_three_steps(backend):
    shape, running = (4, 7, 5, 5), (torch.zeros(7), torch.ones(7))
    fused_stats, eager_stats = ([t.clone() for t in running] for _ in range(2))
    ref_stats = [t.double() for t in running]
    steps = [randn(shape) for _ in range(3)]
    with fusedres.backend(backend):
        for x in steps:
            fusedres.functional.batch_norm_act(x, *fused_stats, training=True, momentum=0.3)
            F.batch_norm(x, *eager_stats, training=True, momentum=0.3)
            F.batch_norm(x.double(), *ref_stats, training=True, momentum=0.3)
    for out, ref, eager in zip(fused_stats, ref_stats, eager_stats, strict=True):
        assert_as_accurate_as_eager(out, ref, eager, count=100)


@backends
def test_half_running_statistics(backend):
    running = torch.zeros(5, dtype=torch.float16), torch.ones(5, dtype=torch.float16)
    fused_stats, eager_stats = ([t.clone() for t in running] for _ in range(2))
    ref_stats = [t.double() for t in running]
    x = randn((4, 5, 6, 6), torch.float16)
    with fusedres.backend(backend):
        fusedres.functional.batch_norm_act(x, *fused_stats, training=True)
    F.batch_norm(x, *eager_stats, training=True)
    F.batch_norm(x.double(), *ref_stats, training=True)
    for out, ref, eager in zip(fused_stats, ref_stats, eager_stats, strict=True):
        assert_as_accurate_as_eager(out, ref, eager)


@pytest.mark.parametrize("shape,layout", [SHAPES["stage1_nhwc"], SHAPES["stage1"], SHAPES["odd"]])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_same_bits_at_any_thread_count(act, shape, layout):
    tensors = tensors_of(shape, layout, torch.bfloat16)
    assert_same_at_any_thread_count(fused(act), tensors)


@backends
@layouts
@pytest.mark.parametrize("name", ["x", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, name, layout, backend):
    for training in (True, False):
        tensors = tensors_of((2, 19, 3, 3), layout, torch.float32, training=training)
        tensors[name][1, 2, 1, 0] = value
        tensors[name][0, 17, 2, 2] = value
        with fusedres.backend(backend):
            out = gradients(fused(), tensors, constants=CONSTANTS)
        eager = gradients(plain(), tensors, constants=CONSTANTS)
        assert_same_non_finite(out, eager)


def test_bytes_moved():
    x = torch.empty(2, 8, 4, 4)  # 1024 bytes
    args = x, None, None, x, None, None, True, 1e-5, "relu", True
    assert bytes_moved(*args) == 4 * 1024 + 32  # R (statistics) + RR + W, one bit an element
    events = []
    with observers.observe(events.append):
        _, mean, var, mask = torch.ops.fusedres.bn_act(*args)
    assert [(e.op, e.bytes_moved, e.eager_bytes) for e in events] == [("bn_act", 4128, 8 * 1024)]
    assert op.traffic.moved(1, *args) == 3 * 1024 + 32  # in one CUDA launch x is read once
    args = x, x, None, None, None, mean, var, mask, True, 1e-5, "relu", True
    assert backward_bytes_moved(*args) == 6 * 1024 + 2 * 32  # RR (sums) + RRWW, the mask twice
    assert backward_op.traffic.moved(1, *args) == 4 * 1024 + 2 * 32
