"""bn_se_act: batch norm, squeeze-excite, residual add and activation."""

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
from fusedres.ops.bn_se_act import backward_bytes_moved, bytes_moved
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_format,
    assert_same_non_finite,
    check,
    check_derivatives,
    gradients,
    same_bits,
)  # fmt: skip
from test_squeeze_excite import OPTIONS as SE_OPTIONS
from test_squeeze_excite import mlp_tensors

CONSTANTS = ("running_mean", "running_var")
PARAMETERS = ("weight", "bias", "w1", "b1", "w2", "b2")

RENAMED = {"post_act": "act", "act": "se_act"}
OPTIONS = {
    case: {RENAMED.get(name, name): value for name, value in options.items()}
    for case, options in SE_OPTIONS.items()
}
EVAL_OPTIONS = {
    "odd": dict(act="hardswish", residual=False, squeezed=3),
    "odd_nhwc": dict(act="relu", residual=True, squeezed=2),
    "one_channel": dict(act="relu6", residual=True, squeezed=1),
    "1x1": dict(act="identity", residual=True, squeezed=3),
    "one_row": dict(act="silu", residual=True, squeezed=2),
    "stage2_nhwc": dict(act="relu", residual=True, squeezed=8, gate="hard_sigmoid"),
    "stage4": dict(act="leaky_relu", residual=True, squeezed=32),
}


def tensors_of(
    shape, layout, dtype, *, residual=True, training=True, squeezed=2, param=None, **_
):  # fmt: skip
    c = shape[1]
    param = param or parameter_dtype(dtype)
    return dict(
        x=randn(shape, dtype, layout),
        weight=channels(c, param, low=-0.5, high=1.5),
        bias=channels(c, param),
        **mlp_tensors(c, squeezed, param),
        residual=randn(shape, dtype, layout) if residual else None,
        running_mean=None if training else channels(c, param),
        running_var=None if training else channels(c, param, low=0.5, high=2.0),
    )


def fused(act="relu", se_act="relu", gate="sigmoid", **_):
    def fn(x, weight, bias, w1, b1, w2, b2, residual, running_mean, running_var):
        return fusedres.functional.batch_norm_se_act(
            x, running_mean, running_var, weight, bias, w1, b1, w2, b2, running_mean is None,
            residual=residual, se_act=se_act, gate=gate, act=act,
        )  # fmt: skip

    return fn


def plain(act="relu", se_act="relu", gate="sigmoid", **_):
    def fn(x, weight, bias, w1, b1, w2, b2, residual, running_mean, running_var):
        stats = running_mean, running_var, running_mean is None, 1e-5
        tensors = x, weight, bias, w1, b1, w2, b2, residual
        return reference.bn_se_act(*tensors, *stats, se_act, gate, act)[0]

    return fn


def check_against_reference(tensors, options=None):
    sums = dict.fromkeys(PARAMETERS, values_per_channel(tensors["x"]))
    options = options or {}
    return check(fused(**options), plain(**options), tensors, constants=CONSTANTS, sums=sums)


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_training(case, backend, dtype):
    options = OPTIONS[case]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(*SHAPES[case], dtype, **options), options)


@executions
@pytest.mark.parametrize("case", EVAL_OPTIONS)
def test_running_statistics_with_gradients(case, backend, dtype):
    options = EVAL_OPTIONS[case]
    tensors = tensors_of(*SHAPES[case], dtype, training=False, **options)
    with fusedres.backend(backend):
        check_against_reference(tensors, options)


@executions
@pytest.mark.parametrize("shape", [(4, 6, 11), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, backend, dtype):
    with fusedres.backend(backend):
        check_against_reference(tensors_of(shape, "NCHW", dtype))


@executions
@layouts
def test_saved_statistics(layout, backend, dtype):
    """The mean, the variance and the squeeze that one pass over x gives."""
    t = tensors_of((4, 21, 13, 9), layout, dtype)
    t["x"] += 16
    args = [t[n] for n in ("x", *PARAMETERS)]
    with fusedres.backend(backend):
        found = torch.ops.fusedres.bn_se_act(
            *args, None, None, None, True, 1e-5, "relu", "sigmoid", "relu", False
        )[1:4]
    acc = reference.acc_dtype(dtype)
    eager, ref = (
        (*reference.bn_stats(x), x.mean((2, 3))) for x in (t["x"].to(acc), t["x"].double())
    )
    for out, ref_, eager_ in zip(found, ref, eager, strict=True):
        assert_as_accurate_as_eager(out, ref_, eager_, count=values_per_channel(t["x"]))


@backends
@pytest.mark.parametrize("missing", [("weight",), ("bias", "b1"), ("weight", "bias", "b2")])
def test_without_some_parameters(missing, backend):
    tensors = tensors_of((2, 5, 6, 6), "NHWC", torch.float32) | dict.fromkeys(missing)
    with fusedres.backend(backend):
        check_against_reference(tensors)


@backends
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(param, backend):
    tensors = tensors_of((2, 9, 5, 5), "NHWC", torch.bfloat16, param=param)
    with fusedres.backend(backend):
        out = check_against_reference(tensors)
    assert all(out[f"d{n}"].dtype == param for n in PARAMETERS)


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_over_a_sentinel(layout, dtype, backend):
    tensors = tensors_of((3, 13, 6, 5), layout, dtype)
    for view_of in (misaligned, sliced):
        views, buffers = dict(tensors), []
        for name in ("x", "residual", "w1", "w2", "weight"):
            views[name], buffer = view_of(tensors[name])
            buffers.append(buffer)
        with fusedres.backend(backend), Unchanged(*buffers):
            out = check_against_reference(views)
        assert_same_format(out["y"], F.batch_norm(views["x"], None, None, training=True))


@backends
@layouts
def test_operands_in_two_formats(layout, backend):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[layout]
    tensors = tensors_of((2, 6, 5, 4), layout, torch.float32)
    tensors["residual"] = arrange(tensors["residual"], other)
    with fusedres.backend(backend):
        check_against_reference(tensors)


@backends
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training, backend):
    tensors = tensors_of((0, 6, 4, 4), "NHWC", torch.float32, training=training)
    with fusedres.backend(backend):
        out = gradients(fused(), tensors, constants=CONSTANTS)
    for name, value in out.items():
        like = tensors["x" if name == "y" else name[1:]]
        assert torch.equal(value, torch.zeros_like(like)), name


@pytest.mark.parametrize("backend,layout,training,options", [
    ("native", "NHWC", True, dict(act="relu")), ("native", "NCHW", True, dict(act="relu")),
    ("native", "NHWC", True, dict(act="gelu", se_act="silu")),
    ("native", "NCHW", False, dict(act="relu6")),
    ("native", "NCHW", True, dict(act="identity", gate="hard_sigmoid")),
    ("reference", "NHWC", True, dict(act="relu")),
])  # fmt: skip
def test_derivatives(backend, layout, training, options):
    tensors = tensors_of((3, 4, 2, 2), layout, torch.float64, training=training)
    with fusedres.backend(backend):
        check_derivatives(fused(**options), tensors, CONSTANTS)


@pytest.mark.parametrize("backend,layout,act", [
    ("native", "NHWC", "relu"), ("native", "NCHW", "silu"), ("reference", "NHWC", "relu"),
])  # fmt: skip
def test_opcheck(backend, layout, act):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32)
    leaves = [t[n].requires_grad_() for n in ("x", *PARAMETERS, "residual")]
    args = *leaves, None, None, True, 1e-5, "relu", "sigmoid", act, act == "relu"
    with fusedres.backend(backend):
        torch.library.opcheck(torch.ops.fusedres.bn_se_act, args)


@layouts
def test_opcheck_of_the_backward(layout):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32)
    x, dy = t["x"], randn((2, 5, 3, 3), layout=layout)
    params = t["weight"], t["bias"], t["w1"], t["w2"], t["residual"]
    saved = *reference.bn_stats(x), torch.randn(2, 5), torch.randn(2, 2), torch.randn(2, 5)
    mask = torch.empty(0, dtype=torch.uint8)
    acts = "relu", "sigmoid", "silu"
    args = dy, x, *params, *saved, mask, True, 1e-5, *acts, True
    torch.library.opcheck(torch.ops.fusedres.bn_se_act_backward, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler):
    tensors = tensors_of((2, 6, 5, 5), "NHWC", torch.float32)
    compiled = torch.compile(fused(), fullgraph=True, backend=compiler)
    check(compiled, plain(), tensors, sums=dict.fromkeys(PARAMETERS, 50))


@backends
def test_running_statistics_over_three_steps(backend):
    t = tensors_of((4, 7, 5, 5), "NHWC", torch.float32)
    params = [t[n] for n in PARAMETERS]
    running = torch.zeros(7), torch.ones(7)
    fused_stats, eager_stats = ([s.clone() for s in running] for _ in range(2))
    ref_stats = [s.double() for s in running]
    with fusedres.backend(backend):
        for x in [randn((4, 7, 5, 5)) for _ in range(3)]:
            fusedres.functional.batch_norm_se_act(
                x, *fused_stats, *params, training=True, momentum=0.3
            )
            F.batch_norm(x, *eager_stats, training=True, momentum=0.3)
            F.batch_norm(x.double(), *ref_stats, training=True, momentum=0.3)
    for out, ref, eager in zip(fused_stats, ref_stats, eager_stats, strict=True):
        assert_as_accurate_as_eager(out, ref, eager, count=100)
    assert not same_bits(fused_stats[0], running[0])


@pytest.mark.parametrize("case", ["stage1_nhwc", "stage1", "odd"])
def test_same_bits_at_any_thread_count(case):
    tensors = tensors_of(*SHAPES[case], torch.bfloat16, squeezed=16)
    assert_same_at_any_thread_count(fused(), tensors)
    tensors["residual"] = None
    assert_same_at_any_thread_count(fused(act="silu"), tensors)


@backends
@layouts
@pytest.mark.parametrize("name", ["x", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, name, layout, backend):
    tensors = tensors_of((2, 19, 3, 3), layout, torch.float32)
    tensors[name][1, 2, 1, 0] = value
    tensors[name][0, 17, 2, 2] = value
    with fusedres.backend(backend):
        out = gradients(fused(), tensors)
    assert_same_non_finite(out, gradients(plain(), tensors))


def test_bytes_moved():
    x, w1, w2 = torch.empty(2, 8, 4, 4), torch.empty(2, 8), torch.empty(8, 2)  # x: 1024 bytes
    bn, acts = (None, None, True, 1e-5), ("relu", "sigmoid", "relu")
    args = x, None, None, w1, None, w2, None, x, *bn, *acts, True
    mlp = 2 * 64 + 3 * 2 * 8 * 4
    assert bytes_moved(*args) == 4 * 1024 + mlp + 32  # R (both statistics) + RR + W
    events = []
    with observers.observe(events.append):
        _, *saved = torch.ops.fusedres.bn_se_act(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("bn_se_act", 4 * 1024 + mlp + 32)]
    assert events[0].eager_bytes == 11 * 1024 + mlp
    args = x, x, None, None, w1, w2, None, *saved, True, 1e-5, *acts, True
    assert backward_bytes_moved(*args) == 6 * 1024 + 2 * mlp + 2 * 32  # RR + RRWW, mask twice
