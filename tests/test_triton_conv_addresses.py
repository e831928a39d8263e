"""Where the convolutions on Triton count in 64 bits."""

from __future__ import annotations

import pytest
import torch

import test_conv_bn_act as inference
import test_conv_stats as training
from test_triton_conv import CASES, conv, implicit_gemm, inference_tensors, interpreted
from test_triton_conv import kernels_only as kernels_only  # a fixture
from triton_cases import triton_on

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@interpreted
@pytest.mark.usefixtures("kernels_only")
def test_rows_counted_in_64_bits(monkeypatch):
    monkeypatch.setattr(conv, "WIDE_ROWS", 1)
    case = CASES["3x3"]
    with triton_on("cpu"):
        inference.check_against_reference(inference_tensors(case, torch.float32), case, "relu")
        training.check_against_reference(training.tensors_of(case, torch.float32), case)


@triton.jit
def corner_kernel(out_ptr, m, P, Q, stride_n, stride_h, stride_w, stride, pad):
    """The 64-bit offset of pixel ``m`` in x, as the mainloop finds it."""
    offs_m = m + tl.arange(0, 1)
    _, _, offs = implicit_gemm.corners(
        offs_m, P, Q, stride_n, stride_h, stride_w, stride, stride, pad, pad
    )
    tl.store(out_ptr + tl.arange(0, 1), offs)


@interpreted
@pytest.mark.parametrize("n,p,q,c,stride", [
    (2**21, 7, 7, 40, 1), (3, 2**13, 2**13, 32, 1), (3, 2**12, 2**12 + 1, 64, 2),
])  # fmt: skip
def test_addresses_beyond_2_to_the_31_elements(n, p, q, c, stride):
    """The first tap of the last pixel of an x that 32-bit offsets do not reach."""
    w, found = q * stride, torch.zeros(1, dtype=torch.int64)
    h = p * stride
    strides = h * w * c, w * c, c
    corner_kernel[(1,)](found, n * p * q - 1, p, q, *strides, stride, 1)
    wanted = (n - 1) * strides[0] + ((p - 1) * stride - 1) * strides[1]
    assert found.item() == wanted + ((q - 1) * stride - 1) * strides[2] > 2**31
