"""squeeze_excite in CUDA C++, on the host simulator."""

from __future__ import annotations

import pytest
import torch

import test_squeeze_excite as se
from cases import DTYPES, SHAPES, layouts, misaligned
from cuda_host import ORDERS
from cuda_ops import cuda_on_host
from harness import Unchanged, assert_same_bits, check_derivatives, gradients

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("case", se.OPTIONS)
def test_values_and_gradients(case, dtype):
    options = se.OPTIONS[case]
    tensors = se.tensors_of(*SHAPES[case], dtype, **options)
    with cuda_on_host():
        se.check_against_reference(tensors, options)


@layouts
def test_more_images_than_a_block_of_the_mlp_takes(layout):
    tensors = se.tensors_of((19, 24, 3, 3), layout, torch.float32, squeezed=6)
    with cuda_on_host():
        se.check_against_reference(tensors)


@layouts
def test_misaligned_views_over_a_sentinel(layout):
    tensors = se.tensors_of((3, 16, 2, 4), layout, torch.bfloat16)
    views, buffers = dict(tensors), []
    for name in ("x", "residual"):
        views[name], buffer = misaligned(tensors[name])
        buffers.append(buffer)
    with cuda_on_host(), Unchanged(*buffers):
        se.check_against_reference(views)


@layouts
def test_derivatives(layout):
    tensors = se.tensors_of((2, 3, 3, 3), layout, torch.float64)
    with cuda_on_host():
        check_derivatives(se.fused("silu", act="silu"), tensors)


def test_same_bits_in_every_order():
    tensors = se.tensors_of((3, 40, 9, 7), "NHWC", torch.float16, squeezed=10)
    found = []
    for order in ORDERS:
        with cuda_on_host(order=order):
            found.append(gradients(se.fused(), tensors))
    for other in found[1:]:
        assert_same_bits(other, found[0])
