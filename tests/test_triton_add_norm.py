"""add_norm on Triton: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import test_add_norm as norms
from fusedres import triton_kernels
from harness import assert_same_bits, assert_same_non_finite, check, gradients
from triton_cases import devices, executions, to, triton_on

FORWARD, BACKWARD = ["add_norm_fwd_kernel"], ["add_norm_bwd_kernel"]
MERGE = ["add_norm_bwd_merge_kernel"]
SMALL = ("tokens", "odd", "three_columns", "one_token", "two_dimensions", "both")


@pytest.fixture
def narrow_blocks(monkeypatch):
    """A row has several blocks of columns, and a program several tiles of rows."""
    pytest.importorskip("triton")
    module = triton_kernels.package().module("add_norm")
    small = dict(BLOCK=16, COLUMNS=16, TILE=32, BACKWARD_TILE=32, REDUCE_PROGRAMS=2)
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)


@executions
@pytest.mark.parametrize("case", SMALL)
def test_layer_norm(case, device, dtype):
    shape, dims, drops = norms.CASES[case]
    if device == "cuda" and "dropout" in drops:
        pytest.skip("eager draws other random numbers there")
    tensors = to(device, norms.tensors_of(shape, dims, dtype))
    with triton_on(device), triton_kernels.counted() as launched:
        norms.check_against_eager(tensors, "layer", drops)
    assert launched == FORWARD + BACKWARD + MERGE


@executions
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.usefixtures("narrow_blocks")
def test_long_rows_and_many_of_them(norm, device, dtype):
    tensors = to(device, norms.tensors_of((7, 43), 1, dtype, norm=norm))
    options = {} if norm != "rms" else dict(eps=torch.finfo(torch.float32).eps)
    fused, plain = norms.fused(norm, **options), norms.plain(norm)
    with triton_on(device), triton_kernels.counted() as launched:
        check(fused, plain, tensors, sums=dict(weight=7, bias=7))
    parameters = [] if norm == "none" else ["add_norm_bwd_reduce_kernel", *MERGE]
    assert launched == FORWARD + BACKWARD + parameters


@devices
@pytest.mark.usefixtures("narrow_blocks")
def test_rows_that_fit_a_block_and_several_tiles_of_them(device):
    tensors = to(device, norms.tensors_of((37, 12), 1, torch.float32))
    with triton_on(device), triton_kernels.counted() as launched:
        norms.check_against_eager(tensors, "layer", {})
    assert launched == FORWARD + BACKWARD + MERGE


@devices
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_other_norms(norm, device):
    shape, _, drops = norms.CASES["both"]
    tensors = norms.tensors_of(shape, 1, torch.float32, norm=norm)
    options = {} if norm == "none" else dict(eps=torch.finfo(torch.float32).eps)
    drops = drops if device == "cpu" else {}
    fused, plain = norms.fused(norm, **drops, **options), norms.plain(norm, **drops)
    with triton_on(device):
        check(fused, plain, to(device, tensors), sums=dict(weight=20))


@devices
def test_rows_far_from_zero(device):
    tensors = norms.tensors_of((5, 67), 1, torch.float32)
    tensors["residual"] += 300.0
    with triton_on(device):
        norms.check_against_eager(to(device, tensors), "layer", {})


@devices
def test_without_parameters(device):
    tensors = norms.tensors_of((5, 20), 1, torch.float32)
    shape = tensors["weight"].shape

    def fused(x, residual):
        return torch.ops.fusedres.add_norm(x, residual, *[None] * 4, 1.0, 1e-5, "layer")[0]

    def plain(x, residual):
        return torch.nn.functional.layer_norm(x + residual, shape)

    operands = {n: tensors[n] for n in ("x", "residual")}
    with triton_on(device):
        check(fused, plain, to(device, operands))


@devices
def test_empty_batch(device):
    tensors = to(device, norms.tensors_of((0, 20), 1, torch.float32))
    with triton_on(device), triton_kernels.counted() as launched:
        out = gradients(norms.fused(), tensors)
    assert launched == [] and out["dx"].shape == (0, 20)
    assert out["dweight"].tolist() == [0.0] * 20


@devices
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value, device):
    tensors = to(device, norms.tensors_of((4, 33), 1, torch.float32))
    tensors["x"][2, 5] = value
    with triton_on(device):
        out = gradients(norms.fused(), tensors)
    assert_same_non_finite(out, gradients(norms.plain(), tensors))


@devices
@pytest.mark.usefixtures("narrow_blocks")
def test_same_bits_from_run_to_run(device):
    tensors = to(device, norms.tensors_of((9, 20), 1, torch.float16))
    with triton_on(device):
        assert_same_bits(gradients(norms.fused(), tensors), gradients(norms.fused(), tensors))


def test_rows_that_are_not_dense_are_refused_by_name():
    x = torch.randn(4, 6)
    with triton_on("cpu"), pytest.raises(ValueError, match=r"shortcut: wanted contiguous \(4, 6\)"):
        torch.ops.fusedres.add_norm(x, torch.randn(6, 4).t(), *[None] * 4, 1.0, 1e-5, "layer")
