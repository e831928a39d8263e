"""bn_se_act in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import test_bn_se_act as bnse
from cases import SHAPES, layouts, misaligned
from cuda_host import ORDERS
from cuda_ops import cases_of, cuda_on_host
from harness import Unchanged, assert_same_bits, check_derivatives, gradients

# What batch norm alone has; the rest is of vectors [N, C].
PASSES = ["stream_stats_kernel", "stream_fwd_apply_kernel"]
BACKWARD_PASSES = ["stream_bwd_reduce_kernel", "stream_bwd_apply_kernel"]


@cases_of(bnse.OPTIONS)
def test_training_has_no_pass_more_than_batch_norm(case, dtype):
    options = bnse.OPTIONS[case]
    tensors = bnse.tensors_of(*SHAPES[case], dtype, **options)
    with cuda_on_host() as launched:
        bnse.check_against_reference(tensors, options)
    assert [k for k in launched if k.startswith("stream_")] == PASSES + BACKWARD_PASSES
    assert len(launched) == 8 + 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", bnse.EVAL_OPTIONS)
def test_running_statistics_with_gradients(case, dtype):
    options = bnse.EVAL_OPTIONS[case]
    tensors = bnse.tensors_of(*SHAPES[case], dtype, training=False, **options)
    with cuda_on_host():
        bnse.check_against_reference(tensors, options)


@layouts
def test_misaligned_views_over_a_sentinel(layout):
    tensors = bnse.tensors_of((3, 16, 2, 4), layout, torch.bfloat16)
    views, buffers = dict(tensors), []
    for name in ("x", "residual"):
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with cuda_on_host(), Unchanged(*buffers):
        bnse.check_against_reference(views)


@layouts
def test_derivatives(layout):
    tensors = bnse.tensors_of((2, 3, 3, 3), layout, torch.float64)
    with cuda_on_host():
        check_derivatives(bnse.fused("silu", se_act="silu"), tensors, bnse.CONSTANTS)


def test_same_bits_in_every_order():
    tensors = bnse.tensors_of((3, 40, 9, 7), "NHWC", torch.float16, squeezed=10)
    found = []
    for order in ORDERS:
        with cuda_on_host(order=order):
            found.append(gradients(bnse.fused(), tensors, constants=bnse.CONSTANTS))
    for other in found[1:]:
        assert_same_bits(other, found[0])
