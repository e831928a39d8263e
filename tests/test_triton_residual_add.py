"""residual_add on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import test_residual_add as add
from accuracy import assert_as_accurate_as_eager
from cases import SHAPES, layouts, values_per_channel
from fusedres import reference, triton_kernels
from harness import assert_same_bits, assert_same_non_finite, gradients
from triton_cases import SMALL, devices, executions, many_programs, to, triton_on  # noqa: F401

FORWARD = ["residual_add_fwd_kernel"]
APPLY, SCALE = ["residual_add_bwd_apply_kernel"], ["residual_add_bwd_scale_kernel"]
SUMS = ["residual_add_bwd_reduce_kernel", "residual_add_bwd_merge_kernel"]

CASES = {c: options for c, options in add.OPTIONS.items() if c in SMALL}


@executions
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, device, dtype):
    options = CASES[case]
    tensors = to(device, add.tensors_of(*SHAPES[case], dtype, **options))
    with triton_on(device), triton_kernels.counted() as launched:
        add.check_against_reference(tensors, options)
    backward = SUMS + (SCALE if "rows" in options else []) + APPLY
    assert [n for n in launched if "residual_add" in n] == FORWARD + backward


@executions
@pytest.mark.parametrize("rows", [None, 1, "C"])
def test_what_needs_no_sum_takes_one_pass_back(rows, device, dtype):
    options = dict(a=None, b=None, rows=rows)
    tensors = to(device, add.tensors_of((3, 9, 4, 5), "NHWC", dtype, **options))
    constants = *add.CONSTANTS, "scale"
    with triton_on(device), triton_kernels.counted() as launched:
        add.check(add.fused(**options), add.plain(**options), tensors, constants=constants)
    assert launched == FORWARD + APPLY


@devices
@layouts
@pytest.mark.parametrize("options", [dict(), dict(rows=1), dict(a="scaled", act="silu", rows="C")])
@pytest.mark.usefixtures("many_programs")
def test_several_tiles_and_chunks(options, layout, device):
    tensors = to(device, add.tensors_of((2, 18, 3, 7), layout, torch.float32, **options))
    with triton_on(device):
        add.check_against_reference(tensors, options)


@executions
@layouts
def test_statistics_of_the_sum(layout, device, dtype):
    t = to(device, add.tensors_of((3, 13, 5, 4), layout, dtype, a=None, b=None, rows=1))
    args = t["x"], *[None] * 4, t["shortcut"], *[None] * 4, t["scale"], False, False, 0.0, 0.0
    with triton_on(device):
        y, mask, *found = torch.ops.fusedres.residual_add(*args, "relu", True, True)
        same, _, *nothing = torch.ops.fusedres.residual_add(*args, "relu", False, False)
    for out, ref, eager in zip(
        found, reference.bn_stats(y.double()), reference.bn_stats(y), strict=True
    ):
        assert_as_accurate_as_eager(out, ref, eager, count=values_per_channel(y))
    assert_same_bits({"y": y}, {"y": same})
    assert [t.numel() for t in nothing] == [0, 0]


@devices
@pytest.mark.parametrize("shape", [(4, 19), (2, 3, 2, 3, 5)], ids=str)
def test_other_numbers_of_dimensions(shape, device):
    options = dict(rows=1)
    tensors = to(device, add.tensors_of(shape, "NCHW", torch.float32, **options))
    with triton_on(device):
        add.check_against_reference(tensors, options)


@devices
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)], ids=str)
def test_empty_batch(shape, device):
    tensors = to(
        device, add.tensors_of(shape, "NCHW", torch.float32, a="batch", b="scaled", rows=1)
    )
    with triton_on(device), triton_kernels.counted() as launched:
        out = gradients(add.fused(a="batch", b="scaled"), tensors, constants=add.CONSTANTS)
    assert launched == []
    assert out["y"].shape == out["dx"].shape == out["dshortcut"].shape == shape
    assert out["dweight"].tolist() == out["dshortcut_weight"].tolist() == [0.0] * 4


@devices
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value, device):
    options = dict(a="batch", b="running")
    tensors = to(device, add.tensors_of((2, 11, 3, 3), "NHWC", torch.float32, **options))
    tensors["x"][1, 2, 1, 0] = value
    tensors["shortcut"][0, 7, 2, 2] = value
    with triton_on(device):
        out = gradients(add.fused(**options), tensors, constants=add.CONSTANTS)
    eager = gradients(add.plain(**options), tensors, constants=add.CONSTANTS)
    assert_same_non_finite(out, eager)


@devices
@pytest.mark.usefixtures("many_programs")
def test_same_bits_from_run_to_run(device):
    tensors = to(device, add.tensors_of((2, 12, 3, 5), "NHWC", torch.float16, rows=1))
    with triton_on(device):
        assert_same_bits(gradients(add.fused(), tensors), gradients(add.fused(), tensors))


def test_a_scale_of_the_wrong_shape_is_refused_by_name():
    t = add.tensors_of((3, 5, 4, 4), "NCHW", torch.float32, rows=1)
    t["scale"] = t["scale"][:2]
    with triton_on("cpu"), pytest.raises(ValueError, match=r"scale: wanted shape \(3, 1\) or"):
        add.fused(a=None, b=None)(**t)
