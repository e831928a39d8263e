"""squeeze_excite: squeeze, MLP, scale, residual add and activation."""

from __future__ import annotations

import pytest
import torch

import fusedres
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
)  # fmt: skip
from fusedres import observers, reference
from fusedres.ops.squeeze_excite import backward_bytes_moved, backward_op, bytes_moved, op
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_format,
    assert_same_non_finite,
    check,
    check_derivatives,
    gradients,
)  # fmt: skip

# squeezed: hidden channels; a few that fill no vector, one more than there are channels.
OPTIONS = {
    "odd": dict(post_act="relu", residual=True, squeezed=4),
    "odd_nhwc": dict(post_act="relu", residual=True, squeezed=1),
    "one_channel": dict(post_act="relu", residual=False, squeezed=3),
    "three_channels_nhwc": dict(post_act="identity", residual=True, squeezed=2),
    "one_image": dict(post_act="identity", residual=False, squeezed=2, gate="hard_sigmoid"),
    "one_image_nhwc": dict(post_act="relu6", residual=True, squeezed=5, act="silu"),
    "1x1": dict(post_act="relu6", residual=False, squeezed=5),
    "1x1_nhwc": dict(post_act="leaky_relu", residual=True, squeezed=7, act="identity"),
    "one_row": dict(post_act="leaky_relu", residual=False, squeezed=1),
    "tail_of_one_nhwc": dict(post_act="silu", residual=True, squeezed=9, gate="hard_sigmoid"),
    "stage1": dict(post_act="silu", residual=False, squeezed=4),
    "stage1_nhwc": dict(post_act="relu", residual=True, squeezed=4),
    "stage2_nhwc": dict(post_act="gelu", residual=True, squeezed=8, act="gelu"),
    "stage4": dict(post_act="gelu", residual=False, squeezed=32, act="hardswish"),
    "stage4_nhwc": dict(post_act="hardswish", residual=True, squeezed=128),
}


def mlp_tensors(c, r, dtype) -> dict:
    return dict(
        w1=(torch.randn(r, c) / c**0.5).to(dtype), b1=channels(r, dtype),
        w2=(torch.randn(c, r) / r**0.5).to(dtype), b2=channels(c, dtype),
    )  # fmt: skip


def tensors_of(shape, layout, dtype, *, residual=True, squeezed=2, param=None, **_):
    return dict(
        x=randn(shape, dtype, layout),
        **mlp_tensors(shape[1], squeezed, param or parameter_dtype(dtype)),
        residual=randn(shape, dtype, layout) if residual else None,
    )


def fused(post_act="relu", act="relu", gate="sigmoid", **_):
    def fn(x, w1, b1, w2, b2, residual):
        return fusedres.functional.squeeze_excite(
            x, w1, b1, w2, b2, residual=residual, act=act, gate=gate, post_act=post_act
        )

    return fn


def plain(post_act="relu", act="relu", gate="sigmoid", **_):
    def fn(x, w1, b1, w2, b2, residual):
        w1, w2 = w1.flatten(1), w2.flatten(1)
        return reference.squeeze_excite(x, w1, b1, w2, b2, residual, act, gate, post_act)[0]

    return fn


def check_against_reference(tensors, options=None):
    x = tensors["x"]
    sums = dict.fromkeys(("w1", "b1", "w2", "b2"), x.numel() // x.shape[1])
    options = options or {}
    return check(fused(**options), plain(**options), tensors, sums=sums)


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients(case, backend, dtype):
    options = OPTIONS[case]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(*SHAPES[case], dtype, **options), options)


@executions
@pytest.mark.parametrize("shape", [(4, 6, 11), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, backend, dtype):
    with fusedres.backend(backend):
        check_against_reference(tensors_of(shape, "NCHW", dtype))


@backends
def test_weights_of_1x1_convolutions(backend):
    tensors = tensors_of((2, 6, 4, 4), "NHWC", torch.float32)
    for name in ("w1", "w2"):
        tensors[name] = tensors[name][..., None, None]
    with fusedres.backend(backend):
        out = check_against_reference(tensors)
    assert out["dw1"].shape == (2, 6, 1, 1)


@backends
@pytest.mark.parametrize("missing", ["b1", "b2"])
def test_without_bias(missing, backend):
    tensors = tensors_of((2, 6, 4, 4), "NHWC", torch.float32) | {missing: None}
    with fusedres.backend(backend):
        check_against_reference(tensors)


@backends
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(param, backend):
    tensors = tensors_of((2, 9, 5, 5), "NHWC", torch.bfloat16, param=param)
    with fusedres.backend(backend):
        out = check_against_reference(tensors)
    assert all(out[f"d{n}"].dtype == param for n in ("w1", "b1", "w2", "b2"))


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_over_a_sentinel(layout, dtype, backend):
    tensors = tensors_of((3, 13, 6, 5), layout, dtype)
    for view_of in (misaligned, sliced):
        views, buffers = dict(tensors), []
        for name in ("x", "residual", "w1", "w2", "b1"):
            views[name], buffer = view_of(tensors[name])
            buffers.append(buffer)
        with fusedres.backend(backend), Unchanged(*buffers):
            out = check_against_reference(views)
        assert_same_format(out["y"], views["x"] * 2)


@backends
@layouts
def test_operands_in_two_formats(layout, backend):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[layout]
    tensors = tensors_of((2, 6, 5, 4), layout, torch.float32)
    tensors["residual"] = arrange(tensors["residual"], other)
    tensors["w1"] = tensors["w1"].t().contiguous().t()
    with fusedres.backend(backend):
        check_against_reference(tensors)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_batch(dtype, backend):
    tensors = tensors_of((0, 6, 4, 4), "NHWC", dtype)
    with fusedres.backend(backend):
        out = gradients(fused(), tensors)
    eager = gradients(plain(), tensors)
    for name, value in out.items():
        assert value.shape == eager[name].shape
        assert torch.equal(value, eager[name]), name  # the parameters' gradients are zero


@pytest.mark.parametrize("backend,layout,options", [
    ("native", "NHWC", dict(post_act="relu")), ("native", "NCHW", dict(post_act="relu6")),
    ("native", "NHWC", dict(post_act="gelu", act="silu")),
    ("native", "NCHW", dict(post_act="identity", gate="hard_sigmoid")),
    ("reference", "NHWC", dict(post_act="relu")),
])  # fmt: skip
def test_derivatives(backend, layout, options):
    tensors = tensors_of((3, 4, 2, 2), layout, torch.float64)
    with fusedres.backend(backend):
        check_derivatives(fused(**options), tensors)


@pytest.mark.parametrize("backend,layout,post_act", [
    ("native", "NHWC", "relu"), ("native", "NCHW", "silu"), ("reference", "NHWC", "relu"),
])  # fmt: skip
def test_opcheck(backend, layout, post_act):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32)
    leaves = [p.requires_grad_() for p in t.values()]
    args = *leaves, "relu", "sigmoid", post_act, post_act == "relu"
    with fusedres.backend(backend):
        torch.library.opcheck(torch.ops.fusedres.squeeze_excite, args)


@layouts
def test_opcheck_of_the_backward(layout):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32)
    x, dy = t["x"], randn((2, 5, 3, 3), layout=layout)
    mlp = torch.randn(2, 5), torch.randn(2, 2), torch.randn(2, 5)
    mask = torch.empty(0, dtype=torch.uint8)
    args = dy, x, t["w1"], t["w2"], t["residual"], *mlp, mask, "relu", "sigmoid", "silu", True
    torch.library.opcheck(torch.ops.fusedres.squeeze_excite_backward, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler):
    tensors = tensors_of((2, 6, 5, 5), "NHWC", torch.float32)
    compiled = torch.compile(fused(), fullgraph=True, backend=compiler)
    check(compiled, plain(), tensors, sums=dict.fromkeys(("w1", "b1", "w2", "b2"), 50))


@pytest.mark.parametrize("case", ["stage1_nhwc", "stage1", "odd"])
def test_same_bits_at_any_thread_count(case):
    tensors = tensors_of(*SHAPES[case], torch.bfloat16, squeezed=16)
    assert_same_at_any_thread_count(fused(), tensors)
    tensors["residual"] = None
    assert_same_at_any_thread_count(fused(post_act="silu"), tensors)


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
    args = x, w1, None, w2, None, x, "relu", "sigmoid", "relu", True
    mlp = 2 * 64 + 3 * 2 * 8 * 4  # both matrices; squeezed, hidden's bound and logits
    assert bytes_moved(*args) == 4 * 1024 + mlp + 32  # R (squeeze) + RR + W, a bit an element
    events = []
    with observers.observe(events.append):
        _, *saved = torch.ops.fusedres.squeeze_excite(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("squeeze_excite", 4 * 1024 + mlp + 32)]
    assert events[0].eager_bytes == 8 * 1024 + mlp
    assert op.traffic.moved(1, *args) == 3 * 1024 + mlp + 32  # in one CUDA launch x is read once
    args = x, x, w1, w2, None, *saved, "relu", "sigmoid", "relu", True
    # RR (sums) + R + WW, the mask twice
    assert backward_bytes_moved(*args) == 5 * 1024 + 2 * mlp + 2 * 32
    assert backward_op.traffic.moved(2, *args) == 4 * 1024 + 2 * mlp + 2 * 32
    args = x, x, w1, w2, None, *saved[:3], x.new_empty(0), "relu", "sigmoid", "silu", False
    # RR (sums) + RR + W; a cluster holds dy and x
    assert [backward_op.traffic.moved(n, *args) for n in (7, 2)] == [
        5 * 1024 + 2 * mlp,
        3 * 1024 + 2 * mlp,
    ]
