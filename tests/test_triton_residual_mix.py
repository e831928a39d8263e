"""residual_mix on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import test_residual_mix as mix
from cases import SHAPES, layouts, misaligned
from fusedres import triton_kernels
from harness import assert_same_non_finite, gradients
from triton_cases import SMALL, devices, executions, gpu, to, triton_on


@executions
@pytest.mark.parametrize("case", SMALL)
def test_values_and_gradients(case, device, dtype):
    options = mix.OPTIONS[case]
    tensors = to(device, mix.tensors_of(*SHAPES[case], dtype, **options))
    with triton_on(device), triton_kernels.counted() as launched:
        mix.check_against_reference(tensors, options)
    assert launched == ["residual_mix_fwd_kernel", "residual_mix_bwd_kernel"]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in SHAPES if c not in SMALL])
def test_resnets_own_shapes(case, dtype):
    options = mix.OPTIONS[case]
    tensors = to("cuda", mix.tensors_of(*SHAPES[case], dtype, **options))
    with triton_on("cuda"):
        mix.check_against_reference(tensors, options)


@devices
@layouts
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("gate", [False, True])
def test_every_operand(gate, act, layout, device):
    options = dict(act=act, gate=gate, rows=True, alpha=0.7, beta=-1.3)
    tensors = to(device, mix.tensors_of((4, 11, 3, 5), layout, torch.float32, **options))
    with triton_on(device):
        mix.check_against_reference(tensors, options)


@devices
@layouts
def test_misaligned_views_over_a_sentinel(layout, device):
    options = dict(gate=True, rows=True)
    tensors = to(device, mix.tensors_of((3, 13, 3, 5), layout, torch.float32, **options))
    views = {n: misaligned(tensors[n])[0] for n in ("branch", "gate")}
    with triton_on(device):
        mix.check_against_reference(tensors | views, options)


@devices
def test_row_scale_of_another_dtype(device):
    tensors = mix.tensors_of((3, 5, 4, 4), "NHWC", torch.float16, rows=True)
    tensors["row_scale"] = tensors["row_scale"].double()
    with triton_on(device):
        mix.check_against_reference(to(device, tensors))


@devices
@pytest.mark.parametrize("rows", [False, True])
def test_empty_batch(rows, device):
    tensors = to(device, mix.tensors_of((0, 6, 4, 4), "NHWC", torch.float32, rows=rows, gate=True))
    with triton_on(device), triton_kernels.counted() as launched:
        out = gradients(mix.fused(), tensors, constants=mix.CONSTANTS)
    assert launched == [] and {t.shape for t in out.values()} == {(0, 6, 4, 4)}


@devices
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value, device):
    tensors = mix.tensors_of((3, 9, 3, 3), "NHWC", torch.float32, rows=True)
    tensors["branch"][1, 2, 1, 0] = value
    tensors["shortcut"][0, 7, 2, 2] = value
    tensors = to(device, tensors)
    with triton_on(device):
        out = gradients(mix.fused(), tensors, constants=mix.CONSTANTS)
    assert_same_non_finite(out, gradients(mix.plain(), tensors, constants=mix.CONSTANTS))
