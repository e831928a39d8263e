"""residual_mix: scaled residual, stochastic depth and highway gate."""

from __future__ import annotations

import pytest
import torch

import fusedres
from cases import SHAPES, arrange, backends, executions, layouts, misaligned, randn, sliced
from fusedres import observers, reference
from fusedres.ops.residual_mix import backward_bytes_moved, bytes_moved
from harness import (
    Unchanged,
    assert_same_at_any_thread_count,
    assert_same_bits,
    assert_same_format,
    assert_same_non_finite,
    check,
    check_derivatives,
    gradients,
)  # fmt: skip

CONSTANTS = ("row_scale",)

OPTIONS = {
    "odd": dict(act="relu"),
    "odd_nhwc": dict(act="relu", gate=True),
    "one_channel": dict(act="identity", alpha=0.5),
    "three_channels_nhwc": dict(act="identity", gate=True, rows=True),
    "one_image": dict(act="relu6", alpha=2.0, beta=-1.0),
    "one_image_nhwc": dict(act="relu6", gate=True, alpha=2.0),
    "1x1": dict(act="leaky_relu", rows=True),
    "1x1_nhwc": dict(act="leaky_relu", gate=True),
    "one_row": dict(act="silu", rows=True, beta=0.25),
    "tail_of_one_nhwc": dict(act="silu", gate=True),
    "stage1": dict(act="gelu", gate=True, rows=True, alpha=0.7, beta=1.3),
    "stage1_nhwc": dict(act="relu", rows=True),
    "stage2_nhwc": dict(act="gelu"),
    "stage4": dict(act="hardswish", gate=True),
    "stage4_nhwc": dict(act="hardswish", alpha=0.1),
}


def tensors_of(shape, layout, dtype, *, gate=False, rows=False, **_):
    n = shape[0]
    return dict(
        branch=randn(shape, dtype, layout),
        shortcut=randn(shape, dtype, layout),
        gate=arrange(torch.rand(shape).to(dtype), layout) if gate else None,
        # One image in three dropped, as stochastic depth does.
        row_scale=(torch.arange(n) % 3 != 1).to(dtype) * 1.5 if rows else None,
    )


def fused(act="relu", alpha=1.0, beta=1.0, **_):
    def fn(branch, shortcut, gate, row_scale):
        return fusedres.functional.residual_mix(
            branch, shortcut, alpha=alpha, beta=beta, gate=gate, row_scale=row_scale, act=act
        )

    return fn


def plain(act="relu", alpha=1.0, beta=1.0, **_):
    def fn(branch, shortcut, gate, row_scale):
        return reference.residual_mix(branch, shortcut, gate, row_scale, alpha, beta, act)[0]

    return fn


def check_against_reference(tensors, options=None):
    options = options or {}
    return check(fused(**options), plain(**options), tensors, constants=CONSTANTS)


@executions
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients(case, backend, dtype):
    options = OPTIONS[case]
    with fusedres.backend(backend):
        check_against_reference(tensors_of(*SHAPES[case], dtype, **options), options)


@executions
@pytest.mark.parametrize("shape", [(37, 19), (4, 6, 11), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, backend, dtype):
    with fusedres.backend(backend):
        check_against_reference(tensors_of(shape, "NCHW", dtype, gate=True, rows=True))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_scale_of_another_dtype(dtype, backend):
    tensors = tensors_of((3, 5, 4, 4), "NHWC", torch.bfloat16, rows=True)
    tensors["row_scale"] = tensors["row_scale"].to(dtype)
    with fusedres.backend(backend):
        check_against_reference(tensors)


@backends
def test_row_scale_gets_no_gradient(backend):
    t = tensors_of((3, 5, 4, 4), "NHWC", torch.float32, rows=True)
    t["row_scale"].requires_grad_()
    t["branch"].requires_grad_()
    with fusedres.backend(backend):
        fused()(**t).sum().backward()
    assert t["row_scale"].grad is None
    assert t["branch"].grad[1].count_nonzero() == 0  # the dropped image


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [False, True])
def test_views_over_a_sentinel(gate, layout, dtype, backend):
    tensors = tensors_of((3, 13, 6, 5), layout, dtype, gate=gate)
    for view_of in (misaligned, sliced):
        views, buffers = dict(tensors), []
        for name in ("branch", "shortcut") + ("gate",) * gate:
            views[name], buffer = view_of(tensors[name])
            buffers.append(buffer)
        with fusedres.backend(backend), Unchanged(*buffers):
            out = check_against_reference(views)
        assert_same_format(out["y"], views["branch"] + views["shortcut"])


@backends
@layouts
def test_operands_in_two_formats(layout, backend):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[layout]
    tensors = tensors_of((2, 6, 5, 4), layout, torch.float32, gate=True)
    with fusedres.backend(backend):
        first = check_against_reference(tensors)
        tensors["shortcut"] = arrange(tensors["shortcut"], other)
        check_against_reference(tensors)
        tensors["gate"] = arrange(tensors["gate"], other)
        assert_same_bits(gradients(fused(), tensors), first)


@backends
def test_one_tensor_in_both_roles(backend):
    x = randn((2, 6, 5, 4), layout="NHWC").requires_grad_()
    with fusedres.backend(backend):
        (grad,) = torch.autograd.grad(
            fusedres.functional.residual_mix(x, x, alpha=0.5, act="relu").sum(), x
        )
    assert torch.equal(grad, (x > 0) * 1.5)


@backends
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)], ids=str)
def test_empty_batch(shape, backend):
    tensors = tensors_of(shape, "NCHW", torch.float32, gate=True, rows=True)
    with fusedres.backend(backend):
        out = gradients(fused(), tensors, constants=CONSTANTS)
    assert {n: tuple(t.shape) for n, t in out.items()} == dict.fromkeys(
        ("y", "dbranch", "dshortcut", "dgate"), shape
    )


@pytest.mark.parametrize("backend,layout,options", [
    ("native", "NHWC", dict(act="relu", gate=True)), ("native", "NCHW", dict(act="relu6")),
    ("native", "NHWC", dict(act="gelu", rows=True)),
    ("native", "NCHW", dict(act="identity", gate=True, rows=True, beta=0.5)),
    ("reference", "NHWC", dict(act="relu", gate=True)),
])  # fmt: skip
def test_derivatives(backend, layout, options):
    tensors = tensors_of((3, 3, 2, 2), layout, torch.float64, **options)
    with fusedres.backend(backend):
        check_derivatives(fused(**options), tensors, CONSTANTS)


@pytest.mark.parametrize("backend,layout,act,gate", [
    ("native", "NHWC", "relu", False), ("native", "NCHW", "silu", True),
    ("reference", "NHWC", "relu", True),
])  # fmt: skip
def test_opcheck(backend, layout, act, gate):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32, gate=gate, rows=True)
    leaves = [
        None if t[n] is None else t[n].requires_grad_() for n in ("branch", "shortcut", "gate")
    ]
    args = *leaves, t["row_scale"], 0.5, 1.0, act, act == "relu"
    with fusedres.backend(backend):
        torch.library.opcheck(torch.ops.fusedres.residual_mix, args)


@layouts
def test_opcheck_of_the_backward(layout):
    t = tensors_of((2, 5, 3, 3), layout, torch.float32, gate=True, rows=True)
    mask = torch.empty(0, dtype=torch.uint8)
    args = randn((2, 5, 3, 3), layout=layout), *t.values(), mask, 0.5, 1.0, "silu"
    torch.library.opcheck(torch.ops.fusedres.residual_mix_backward, args)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler):
    tensors = tensors_of((2, 6, 5, 5), "NHWC", torch.float32, gate=True, rows=True)
    compiled = torch.compile(fused(), fullgraph=True, backend=compiler)
    check(compiled, plain(), tensors, constants=CONSTANTS)


@pytest.mark.parametrize("case", ["stage1_nhwc", "stage1", "odd"])
def test_same_bits_at_any_thread_count(case):
    tensors = tensors_of(*SHAPES[case], torch.bfloat16, gate=True, rows=True)
    assert_same_at_any_thread_count(fused(), tensors, constants=CONSTANTS)


@backends
@layouts
@pytest.mark.parametrize("name", ["branch", "shortcut", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate(value, name, layout, backend):
    # An infinite gate makes NaN, where PyTorch's own gradient of relu6 depends on its vector path.
    for act in ("relu",) if name == "gate" else ("relu", "relu6"):
        tensors = tensors_of((2, 19, 3, 3), layout, torch.float32, gate=name == "gate")
        tensors[name][1, 2, 1, 0] = value
        tensors[name][0, 17, 2, 2] = value
        with fusedres.backend(backend):
            out = gradients(fused(act), tensors)
        assert_same_non_finite(out, gradients(plain(act), tensors))


def test_bytes_moved():
    x = torch.empty(2, 8, 4, 4)  # 1024 bytes
    args = x, x, None, None, 0.5, 1.0, "relu", True
    assert bytes_moved(*args) == 3 * 1024 + 32  # RR + W, one bit an element
    events = []
    with observers.observe(events.append):
        _, mask = torch.ops.fusedres.residual_mix(*args)
    assert [(e.op, e.bytes_moved) for e in events] == [("residual_mix", 3 * 1024 + 32)]
    assert events[0].eager_bytes == 7 * 1024  # RW + RRW + RW
    assert bytes_moved(x, x, x, None, 1.0, 1.0, "identity", False) == 4 * 1024
    args = x, None, None, None, None, mask, 0.5, 1.0, "relu"
    assert backward_bytes_moved(*args) == 3 * 1024 + 32  # R + WW, the mask


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_hooks_that_save_in_another_layout(act):
    branch, shortcut, gate = (randn((2, 8, 4, 4), layout="NHWC") for _ in range(3))

    def grads():
        leaves = [t.detach().requires_grad_() for t in (branch, shortcut, gate)]
        y = fusedres.functional.residual_mix(leaves[0], leaves[1], gate=leaves[2], act=act)
        return torch.autograd.grad(y.sum(), leaves)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        found = grads()
    for a, b in zip(found, grads(), strict=True):
        assert torch.equal(a, b)
